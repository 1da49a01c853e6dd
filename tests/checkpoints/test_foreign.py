"""Folders in other libraries' layouts: all or nothing, with digests, and read again."""

import json
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import save_file

from fulgurite.checkpoints import RefusedError, WriteError, read_manifest, verify
from fulgurite.checkpoints.foreign import companions, foreign_folder, require_space
from fulgurite.checkpoints.sources import open_source
from fulgurite.checkpoints.store import new_manifest

TENSORS = {f"layer.{i}": torch.full((3,), float(i)) for i in range(4)}


def test_every_file_and_tensor_gets_a_digest(tmp_path):
    with foreign_folder(tmp_path / "out", new_manifest()) as folder:
        (folder / "config.json").write_text("{}")
        save_file(TENSORS, folder / "model.safetensors")
    assert verify(tmp_path / "out").ok
    assert set(read_manifest(tmp_path / "out").tensors["model.safetensors"]) == set(TENSORS)
    (tmp_path / "out" / "config.json").write_text("{ }")
    assert "config.json" in verify(tmp_path / "out").problems[0]


def half_written(out):
    with foreign_folder(out, new_manifest()) as folder:
        (folder / "config.json").write_text("{}")
        raise KeyError


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(KeyError):
        half_written(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    with foreign_folder(tmp_path / "out", new_manifest()) as folder:
        (folder / "config.json").write_text("{}")
    with pytest.raises(RefusedError, match="nothing is replaced"), foreign_folder(tmp_path / "out", new_manifest()):
        raise AssertionError
    (tmp_path / "file").write_text("")
    with pytest.raises(RefusedError, match="not an empty folder"), foreign_folder(tmp_path / "file", new_manifest()):
        raise AssertionError


def test_the_disk_is_asked_first(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(100, 90, 10))
    require_space(tmp_path / "new" / "out", 10)
    with pytest.raises(WriteError, match="11 bytes are needed, 10 are free"):
        require_space(tmp_path / "new" / "out", 11)


def test_shards_are_opened_as_one_model_and_the_rest_is_not_part_of_it(tmp_path):
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    with foreign_folder(tmp_path / "out", new_manifest()) as folder:
        save_file(dict(list(TENSORS.items())[:3]), folder / names[0])
        save_file({"layer.3": TENSORS["layer.3"]}, folder / names[1])
        save_file({"other": torch.zeros(1)}, folder / "fulgurite_rest.safetensors")
        index = {"weight_map": {name: names[name == "layer.3"] for name in TENSORS}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = open_source(tmp_path / "out").tensors
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_one_file_of_weights_beside_another(tmp_path):
    with foreign_folder(tmp_path / "out", new_manifest()) as folder:
        save_file(TENSORS, folder / "open_clip_model.safetensors")
        save_file({"other": torch.zeros(1)}, folder / "fulgurite_rest.safetensors")
    assert open_source(tmp_path / "out").tensors.keys() == TENSORS.keys()


def test_companions_are_what_belongs_to_a_model_but_its_weights(tmp_path):
    kept = ["LICENSE", "chat_template.jinja", "config.json", "merges.txt", "spiece.model", "vocab.json"]
    left = ["manifest.json", "digests.json", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"]
    for name in [*kept, *left, "modeling.py", ".hidden.json"]:
        (tmp_path / name).write_text("")
    (tmp_path / "folder.json").mkdir()
    assert [file.name for file in companions(tmp_path)] == kept
