"""Exporting as a step: at the end of a chain within a fit, and once for the same source and settings."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fulgurite
from fulgurite.callbacks.export_step import ExportAtCheckpoint
from fulgurite.callbacks.steps import Context
from fulgurite.checkpoints import MismatchError, load_tensors, read_manifest, verify
from fulgurite.cli import main
from fulgurite.modules import export_files

CHAIN = """\
test_after_fit: false
trainer:
  callbacks:
    - class_path: Boundary
      init_args:
        at: fit_end
        steps:
          - {class_path: MergeAtCheckpoint, init_args: {merger: Average}}
          - {class_path: ExportAtCheckpoint, init_args: {to: hf, adapters: separate, dtype: bfloat16}}
"""


def test_a_fit_ends_with_a_merged_model_that_transformers_loads(stream_config, tmp_path, compared_in_process):
    (tmp_path / "chain.yaml").write_text(CHAIN)
    configs = ("--config", str(stream_config), "--config", str(tmp_path / "chain.yaml"))
    assert main(["fit", *configs, "--run", str(tmp_path / "run"), "--data.epochs_per_domain", "1"]) == 0
    (merged,) = (tmp_path / "run" / "artefacts").glob("merged-average-*")
    (out,) = (tmp_path / "run" / "artefacts").glob("exported-hf-*")
    assert verify(out).ok
    manifest = read_manifest(out)
    assert manifest.parents == [{"path": str(merged), "digest": read_manifest(merged).digest}]
    model = transformers.AutoModel.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    adapters = load_file(out / "fulgurite_adapters.safetensors")
    prefix = "bank.sets.live."
    live = {n.removeprefix(prefix).replace("/", "."): t for n, t in load_tensors(merged).items() if prefix in n}
    assert adapters.keys() == live.keys()
    assert all(torch.equal(adapters[name], live[name]) for name in live)

    # The same step on the same artefact has nothing to do; with other settings it is made again.
    step = ExportAtCheckpoint("hf", adapters="separate", dtype="bfloat16")
    context = Context(tmp_path / "alone", builder=fulgurite.load)
    assert step([merged], context) == tmp_path / "alone"
    before = (tmp_path / "alone" / "manifest.json").stat().st_ino
    step([merged], context)
    assert (tmp_path / "alone" / "manifest.json").stat().st_ino == before
    ExportAtCheckpoint("hf", adapters="separate")([merged], context)
    assert transformers.AutoModel.from_pretrained(tmp_path / "alone").dtype == torch.float32
    with pytest.raises(ValueError, match="exports one checkpoint, and there are 2"):
        step([merged, out], context)


def test_one_that_fails_leaves_what_was_there(tmp_path, compared_in_process, monkeypatch):
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    context = Context(tmp_path / "out")
    ExportAtCheckpoint("hf")([tmp_path / "bert"], context)
    write = export_files.write_model

    def damaged(to, model, folder, *rest):
        write(to, model, folder, *rest)
        state = load_file(folder / "model.safetensors")
        save_file({n: t + 1 for n, t in state.items()}, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(export_files, "write_model", damaged)
    digest = read_manifest(tmp_path / "out").digest
    with pytest.raises(MismatchError, match="is not the model"):
        ExportAtCheckpoint("hf", dtype="bfloat16")([tmp_path / "bert"], context)
    assert read_manifest(tmp_path / "out").digest == digest
    assert verify(tmp_path / "out").ok
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bert", "out"]
