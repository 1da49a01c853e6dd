"""The manifest refuses what it does not know, what leaves the folder, and what contradicts itself."""

import json
import math
import platform

import pytest
import torch

from fulgurite.checkpoints import (
    CheckpointError,
    DamagedError,
    MismatchError,
    RefusedError,
    digest_of_bytes,
    read_manifest,
    save_checkpoint_folder,
)

BASE = {"source": "tiny-bert", "digest": "xxh3_128:00ff"}


@pytest.fixture
def folder(tmp_path):
    save_checkpoint_folder(tmp_path / "c", {"weights": {"a": torch.ones(2)}}, {"state": {"n": 1}})
    return tmp_path / "c"


def resign(folder, change):
    """Change the manifest and give it a valid digest again, as an adversary could."""
    value = json.loads((folder / "manifest.json").read_text())
    change(value)
    del value["digest"]
    body = json.dumps(value, indent=2, ensure_ascii=False).removesuffix("\n}") + ","
    tail = f'\n  "digest": "{digest_of_bytes(body.encode())}"\n}}\n'
    (folder / "manifest.json").write_text(body + tail)


def test_resigned_without_change_reads(folder):
    resign(folder, lambda value: None)
    assert read_manifest(folder).kind == "self-contained"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda v: v.update(format_version=99), "format version 99.*reads 1"),
        (lambda v: v["files"].update({"../x": v["files"]["state.json"]}), r"'\.\./x' leaves the folder"),
        (lambda v: v["files"].update({"/x": v["files"]["state.json"]}), "'/x' leaves the folder"),
        (lambda v: v.update(kind="partial"), "'partial'"),
        (lambda v: v.update(kind="delta"), "only a delta"),
        (lambda v: v.update(base=BASE), "only a delta"),
        (lambda v: v.pop("created"), "entries"),
        (lambda v: v.update(surprise=1), "surprise"),
        (lambda v: v.update(files=[]), "'files'"),
        (lambda v: v["files"]["state.json"].update(digest="md5:00"), "md5"),
        (lambda v: v["files"]["state.json"].update(bytes="12"), "'state.json'"),
        (lambda v: v["tensors"].pop("weights.safetensors"), "'weights.safetensors'"),
        (lambda v: v["tensors"].update({"no.safetensors": {}}), "'no.safetensors'"),
        (lambda v: v["tensors"]["weights.safetensors"]["a"].update(shape=[-1]), "shape"),
        (lambda v: v["tensors"]["weights.safetensors"]["a"].pop("digest"), "'a'"),
    ],
)
def test_wrong_entries_are_named(folder, change, text):
    resign(folder, change)
    with pytest.raises(CheckpointError, match=text):
        read_manifest(folder)


@pytest.mark.parametrize("data", [b"", b"{}", b"\x80\x04N.", b"[" * 100_000, b'{"a": 1'])
def test_other_content_is_damage(folder, data):
    (folder / "manifest.json").write_bytes(data)
    with pytest.raises(DamagedError, match=r"manifest\.json"):
        read_manifest(folder)


def test_values_survive(tmp_path):
    given = {"a": {1: (2, 3)}, "inf": math.inf, "none": None}
    save_checkpoint_folder(
        tmp_path / "c",
        {},
        kind="delta",
        base=BASE,
        structure=given,
        parents=[{"path": "runs/x", "digest": "sha256:00"}],
        settings=given,
        metrics={"accuracy": math.nan},
        facts={"epoch": 3},
    )
    manifest = read_manifest(tmp_path / "c")
    software = manifest.facts.pop("software")
    assert (software["python"], software["torch"]) == (platform.python_version(), torch.__version__)
    assert manifest.structure == manifest.settings == given
    assert math.isnan(manifest.metrics["accuracy"])
    assert (manifest.kind, manifest.base, manifest.facts) == ("delta", BASE, {"epoch": 3})


def test_another_base_is_a_mismatch(tmp_path):
    manifest = save_checkpoint_folder(tmp_path / "c", {}, kind="delta", base=BASE)
    manifest.require_base("xxh3_128:00ff", "c")
    with pytest.raises(MismatchError, match=r"runs/c.*tiny-bert.*00ff.*1234"):
        manifest.require_base("xxh3_128:1234", "runs/c")


@pytest.mark.parametrize("fields", [{"kind": "delta"}, {"base": BASE}, {"kind": "half"}, {"settings": {"x": object()}}])
def test_contradictions_are_refused_before_writing(tmp_path, fields):
    with pytest.raises(RefusedError):
        save_checkpoint_folder(tmp_path / "c", {}, **fields)
    assert list(tmp_path.iterdir()) == []
