"""``merge`` on the command line: files in, an artefact out, and one message for whatever is wrong."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
import yaml
from safetensors.torch import save_file

from fulgurite.checkpoints import load_tensors, read_manifest, save_checkpoint_folder, verify
from fulgurite.cli import main
from fulgurite.methods.merging.linear import Average


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    base = {"a.weight": torch.randn(9, 4, generator=generator), "a.bias": torch.randn(9, generator=generator)}
    tuned = [{n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in base.items()} for _ in range(3)]
    save_file(base, "base.safetensors")
    for number, model in enumerate(tuned):
        save_file(model, f"ft{number}.safetensors")
    return base, tuned


BASED = ("--base", "base.safetensors", "--merger", "TaskArithmetic")


def test_a_glob_of_sources_and_a_short_name(models, capsys):
    base, tuned = models
    assert main(["merge", "--sources", "[ft*.safetensors]", *BASED, "--merger.lam", "0.4", "--out", "out"]) == 0
    assert verify("out").ok
    for name, tensor in load_tensors("out").items():
        torch.testing.assert_close(tensor, base[name] + 0.4 * sum(t[name] - base[name] for t in tuned))
    settings = read_manifest("out").settings
    assert settings["merge"] == {
        "class_path": "fulgurite.methods.merging.linear.TaskArithmetic",
        "init_args": {"lam": 0.4, "normalize": False},
    }
    printed = capsys.readouterr().out
    assert "merged 3 models: out" in printed
    assert "a.weight" in printed


def test_of_a_run_the_newest_checkpoint_is_merged(models):
    _, tuned = models
    for step, model in enumerate((tuned[0], tuned[1])):
        save_checkpoint_folder(f"run/checkpoints/step={step}", {"weights": model}, kind="self-contained", base=None)
    sources = ("--sources", "[run, ft2.safetensors]", "--merger", "Average", "--out", "out")
    assert main(["merge", *sources]) == 0
    torch.testing.assert_close(load_tensors("out")["a.bias"], (tuned[1]["a.bias"] + tuned[2]["a.bias"]) / 2)


def test_a_config_says_the_same_and_the_command_line_wins(models, tmp_path):
    _, tuned = models
    options = {
        "sources": ["ft0.safetensors", "ft1.safetensors"],
        "merger": {"class_path": "Average"},
        "weights": [1, 3],
    }
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump({**options, "out": "nowhere"}))
    assert main(["merge", "--config", "merge.yaml", "--out", "out"]) == 0
    expected = (tuned[0]["a.bias"] + 3 * tuned[1]["a.bias"]) / 4
    torch.testing.assert_close(load_tensors("out")["a.bias"], expected)
    assert not (tmp_path / "nowhere").exists()


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(models, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    assert main(["merge", "--sources", "ft*.safetensors", *BASED, "--out", "out", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for part in ("TaskArithmetic into out", "ft2.safetensors", "2 tensors are merged", "to write", "free"):
        assert part in printed
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--sources", "[x*.safetensors]", "--merger", "Average"), "x*.safetensors matches nothing"),
        (("--sources", "[nix]", "--merger", "Average"), "no model at nix"),
        (("--sources", "[ft0.safetensors]", "--merger", "Averge"), "did you mean Average"),
        (("--sources", "[ft0.safetensors]", "--merger", "Ties", "--merger.densty", "0.2"), "did you mean density?"),
        (
            ("--sources", "[ft0.safetensors]", "--merger", "Ties", "--merger.density", "2"),
            "merger: density lies between",
        ),
        (("--sources", "[ft0.safetensors]", "--merger", "TaskArithmetic"), "needs the base"),
        (("--sources", "[ft0.safetensors]", "--merger", "Average", "--weights", "[1, 2]"), "2 weights for 1 models"),
        (("--sources", "[ft0.safetensors]", "--merger", "os.system"), "os.system"),
        (("--merger", "Average"), "sources"),
    ],
)
def test_what_is_wrong_is_one_message(argv, said, models, tmp_path, capsys):
    assert main(["merge", *argv, "--out", "out"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.encode()) < 2000
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_it_imports_torch_at_most(models, tmp_path):
    (tmp_path / "m.yml").write_text(
        "{models: [{model: ft0.safetensors}], merge_method: linear, parameters: {weight: 1}}"
    )
    script = """
import json, sys
from fulgurite.cli import main
code = main(["merge", "--sources", "[ft0.safetensors, ft1.safetensors]", "--merger", "Average", "--out", "o"])
code += main(["merge", "--mergekit", "m.yml", "--out", "p"])
heavy = ("lightning", "transformers", "timm", "open_clip", "peft", "torchmetrics", "scipy", "huggingface_hub", "PIL")
print(json.dumps([code, [name for name in heavy if name in sys.modules]]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [0, []]


def test_too_little_disk_is_refused_before_any_work(models, tmp_path, monkeypatch, capsys):
    free = namedtuple("free", "total used free")(10**9, 10**9, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    monkeypatch.setattr(Average, "merge_tensor", None)
    for more in ((), ("--dry-run",)):
        assert main(["merge", "--sources", "[ft*.safetensors]", "--merger", "Average", "--out", "out", *more]) == 2
        err = capsys.readouterr().err
        assert "are needed, 100 are free" in err
    assert not (tmp_path / "out").exists()


def test_a_bar_is_shown_on_a_terminal_alone(models, monkeypatch, capsys):
    argv = ["merge", "--sources", "[ft*.safetensors]", "--merger", "Ties", "--base", "base.safetensors", "--out"]
    assert main([*argv, "quiet"]) == 0
    assert "MB/s" not in capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main([*argv, "out"]) == 0
    printed = capsys.readouterr().out
    size = 4 * sum(t.numel() for t in models[0].values()) * 4  # four models in float32
    for part in ("bins", "values", "signs", "merge", f"{size}/{size} bytes"):
        assert part in printed


def test_a_report_lies_in_the_artefact_and_is_covered_by_its_digests(models, tmp_path):
    base, tuned = models
    argv = ("--sources", "[ft*.safetensors]", *BASED, "--merger.lam", "0.4")
    assert main(["merge", *argv, "--report", "--out", "out"]) == 0
    assert verify("out").ok
    page = (tmp_path / "out" / "report.html").read_text()
    for part in ("<h1>out</h1>", "3 models merged by TaskArithmetic", "ft2.safetensors", "Model kinship", "Merge tree"):
        assert part in page
    change = torch.cat([(tuned[0][name] - base[name]).flatten() for name in base]).norm()
    assert f">{change:.4f}<" in page
    card = (tmp_path / "out" / "README.md").read_text()
    assert "[arXiv 2212.04089](https://arxiv.org/abs/2212.04089)" in card
    assert "- expert 3, weight 1: `ft2.safetensors`" in card
    assert main(["merge", *argv, "--out", "plain"]) == 0
    assert not (tmp_path / "plain" / "report.html").exists()
    assert (tmp_path / "plain" / "README.md").is_file()
