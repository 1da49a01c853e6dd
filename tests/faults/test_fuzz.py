"""Readers fed with mutated files whose outer digests fit: a value or a typed error that names the file, soon."""

import pickle
import random
import resource
import shutil
import struct
import time

import pytest
import torch

from fulgurite.checkpoints import (
    CheckpointError,
    audit,
    load_document,
    load_pickle,
    load_tensors,
    read_manifest,
    save_checkpoint_folder,
    verify,
    write_json,
)
from fulgurite.checkpoints.digest import FileRecord, digest_of_bytes
from fulgurite.checkpoints.listing import read_listing
from fulgurite.checkpoints.manifest import write_manifest
from fulgurite.checkpoints.tensorfile import read_tensors

TOKENS = [b'"', b"{", b"[", b"}", b"\0", b"-", b"1e999", b"NaN", b"\xff", b"\\u", b"$", b"true"]
NUMBERS = [-1, 0, 1, 1 << 31, 1 << 40, -(1 << 63)]


def mutated(data, generator):
    """One to four edits of kinds that parsers stumble over."""
    data = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        place = generator.randrange(len(data) + 1)
        match generator.choice(["flip", "flip", "cut", "repeat", "number", "token", "end", "copy"]):
            case "flip":
                data[place : place + 1] = bytes(b ^ 1 << generator.randrange(8) for b in data[place : place + 1])
            case "cut":
                del data[place : place + generator.choice([1, 4, 8, 64])]
            case "repeat":
                data[place:place] = data[place : place + generator.randint(1, 16)] * generator.randint(1, 8)
            case "number":
                data[place : place + 8] = struct.pack("<q", generator.choice(NUMBERS))
            case "token":
                data[place:place] = generator.choice(TOKENS)
            case "end":
                del data[place:]
            case "copy":
                other = generator.randrange(len(data) + 1)
                data[place : place + 8] = data[other : other + 8]
    return bytes(data)


def signed(data):
    """``data`` with the digest as last entry that fits all before it."""
    body = data[: data.rfind(b'\n  "digest"')]
    return body + f'\n  "digest": "{digest_of_bytes(body)}"\n}}\n'.encode()


class Corpus:
    """Sound files of each kind in ``folder``, and what reads each."""

    def __init__(self, folder):
        self.sound, self.folder = folder / "sound", folder / "fuzzed"
        tensors = {"a": torch.randn(8, 4), "b": torch.ones(3).bfloat16(), "c": torch.tensor(True), "d": torch.empty(0)}
        state = {"step": 3, "rate": 0.1, "pair": (1, None), "moment": torch.ones(2), "odd": {1: [float("inf")]}}
        structure = {"pruned": {"heads": (1, 2)}}
        save_checkpoint_folder(self.sound, {"weights": tensors}, {"state": state}, structure=structure)
        write_json(folder / "metrics.json", {"loss": 0.5})
        torch.save({"a": torch.ones(3), "b": ["text", 1.5]}, folder / "zip.pt")
        torch.save({"a": torch.ones(3)}, folder / "legacy.pt", _use_new_zipfile_serialization=False)
        self.manifest = read_manifest(self.sound)
        read = self.folder
        names = ("weights.safetensors", "state.json", "manifest.json")
        self.files = {name: (self.sound / name).read_bytes() for name in names} | {
            "digests.json": (folder / "digests.json").read_bytes(),
            "zip.pt": (folder / "zip.pt").read_bytes(),
            "legacy.pt": (folder / "legacy.pt").read_bytes(),
            "plain.pkl": pickle.dumps({"a": torch.arange(3), "b": [1, "x", (2.5, None)], "c": {1, 2}}),
        }
        whole = [lambda: load_tensors(read), lambda: load_document(read, "state"), lambda: verify(read)]
        records = self.manifest.tensors["weights.safetensors"]
        self.readers = {name: [lambda name=name: load_pickle(read / name)] for name in self.files} | {
            "weights.safetensors": [*whole, lambda: read_tensors(read / "weights.safetensors", records)],
            "state.json": whole,
            "manifest.json": [*whole, lambda: audit(read)],
            "digests.json": [lambda: read_listing(read), lambda: audit(read)],
        }

    def put(self, name, data):
        """Put ``data`` in the place of a file, under digests that fit it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.sound, self.folder)
        if name == "digests.json":
            (self.folder / "manifest.json").unlink()
        (self.folder / name).write_bytes(signed(data) if name in ("manifest.json", "digests.json") else data)
        if name in self.manifest.files:
            manifest = read_manifest(self.folder)
            manifest.files[name] = FileRecord(len(data), digest_of_bytes(data))
            write_manifest(self.folder, manifest)


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_only_typed_errors_that_name_the_file_escape(seconds, tmp_path, tally):
    corpus, generator = Corpus(tmp_path), random.Random(seconds)
    names, reads, longest, unnamed = list(corpus.files), 0, 0.0, []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        name = generator.choice(names)
        corpus.put(name, mutated(corpus.files[name], generator))
        for reader in corpus.readers[name]:
            reads += 1
            start = time.perf_counter()
            try:
                reader()
            except CheckpointError as error:
                unnamed += [] if str(tmp_path) in str(error) else [f"{name}: {error}"]
            taken = time.perf_counter() - start
            if taken > longest:
                longest, slowest = taken, (name, reads)
                (tmp_path / "slowest").write_bytes((corpus.folder / name).read_bytes())
    grew = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    tally("H1", reads, reads - len(unnamed))
    assert unnamed == []
    assert longest < 2, slowest
    assert grew < 128 << 10, f"{grew} KiB"
