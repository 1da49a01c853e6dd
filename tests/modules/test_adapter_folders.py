"""A fit leaves every stage's adapters in a folder of its own."""

import functools
import json

import torch

from fulgurite.callbacks.adapter_files import AdapterFolders, read_peft_folder
from fulgurite.checkpoints import load_tensors, read_manifest, verify
from fulgurite.methods.adapters.bank import Placement
from fulgurite.methods.adapters.lora import LoRA
from fulgurite.methods.adapters.replace import Replace
from fulgurite.modules.video_qa import VideoQA


def test_sets_are_verified_folders(make_module, make_data, make_trainer, tmp_path):
    module = make_module()
    make_trainer(callbacks=[AdapterFolders()]).fit(module, datamodule=make_data(("red", "green"), 1))
    assert sorted(p.name for p in (tmp_path / "adapters").iterdir()) == ["green", "initial", "red"]
    for name in ("initial", "red", "green"):
        folder = tmp_path / "adapters" / name
        assert verify(folder).ok
        assert read_manifest(folder).base["digest"] == module.base_digest
        stored = load_tensors(folder, "adapters")
        own = {k.replace("/", "."): v for k, v in module.bank.sets[name].state_dict().items()}
        assert stored.keys() == own.keys()
        assert all(torch.equal(stored[k], own[k]) for k in own)
        assert "text.encoder.layer.0.output.dense.up.weight" in stored


def test_lora_sets_are_folders_of_peft(make_module, make_data, make_trainer, tmp_path):
    def lora_module():
        plain = make_module()
        placements = [
            Placement(["query", "value"], functools.partial(LoRA, rank=2)),
            Placement(["video_projection"], Replace),
        ]
        return VideoQA(plain.backbone, placements, optimizer=plain.optimizer)

    module = lora_module()
    make_trainer(callbacks=[AdapterFolders()], max_epochs=1).fit(module, datamodule=make_data(("red",), 1))
    folder = tmp_path / "adapters" / "red"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("LORA", module.backbone.source)
    assert verify(folder).ok
    assert verify(folder).extra == []
    assert read_manifest(folder).base == {"source": module.backbone.source, "digest": module.base_digest}
    again = lora_module()
    read_peft_folder(again.bank, "live", folder, base_digest=module.base_digest)
    trained = dict(module.bank.sets["live"].named_parameters())
    for name, parameter in again.bank.sets["live"].named_parameters():
        assert torch.equal(parameter, trained[name]), name


def test_a_run_stopped_early_leaves_no_folder_of_a_stage_that_has_not_begun(
    make_module, make_data, make_trainer, tmp_path
):
    module = make_module()
    make_trainer(callbacks=[AdapterFolders()], max_epochs=1).fit(module, datamodule=make_data(("red", "green"), 2))
    assert sorted(p.name for p in (tmp_path / "adapters").iterdir()) == ["initial", "red"]
    stored = load_tensors(tmp_path / "adapters" / "red", "adapters")
    assert any(name.endswith("up.weight") and value.abs().sum() > 0 for name, value in stored.items())
