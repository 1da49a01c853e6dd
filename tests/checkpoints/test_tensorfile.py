"""Tensor files against the layout of the format read by hand, the safetensors library, and plain hash functions."""

import errno
import hashlib
import itertools
import json
import os
import random

import pytest
import safetensors.torch
import torch
import xxhash

from fulgurite.checkpoints import CheckpointError, DamagedError, MissingError, RefusedError, WriteError, tensorfile
from fulgurite.checkpoints.digest import digest_of_bytes
from fulgurite.checkpoints.tensorfile import (
    FileRecord,
    TensorRecord,
    check_file,
    check_storable,
    dtype_name,
    dtype_of,
    map_verified,
    read_tensors,
    write_tensors,
)


def state():
    generator = torch.Generator().manual_seed(0)
    return {
        "wide": torch.randn(3, 5, generator=generator).T,
        "half": torch.randn(7, generator=generator).bfloat16(),
        "flag": torch.tensor(True),
        "none": torch.empty(0, 4, dtype=torch.int64),
        "é": torch.randint(-9, 9, (2, 2), generator=generator),
        "wave": torch.randn(3, dtype=torch.complex128, generator=generator),
    }


def raw(tensor):
    """The elements in row-major order, by way of a list of numbers rather than of memory."""
    flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if flat.dtype is torch.bfloat16:
        return flat.view(torch.int16).numpy().tobytes()
    return torch.tensor(flat.tolist(), dtype=flat.dtype).reshape(flat.shape).numpy().tobytes()


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "w.safetensors"
    return path, *write_tensors(path, state())


def test_header_and_bytes_are_those_of_the_format(written):
    path, _, _ = written
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    codes = {"wide": "F32", "half": "BF16", "flag": "BOOL", "none": "I64", "é": "I64", "wave": "U8"}
    assert {name: entry["dtype"] for name, entry in header.items()} == codes
    for name, tensor in state().items():
        begin, end = header[name]["data_offsets"]
        assert body[begin:end] == raw(tensor), name
        assert header[name]["shape"] == ([48] if name == "wave" else list(tensor.shape))
    ends = sorted(entry["data_offsets"] for entry in header.values())
    assert ends[0][0] == 0
    assert ends[-1][1] == len(body)
    assert all(one[1] == other[0] for one, other in itertools.pairwise(ends))


def test_the_library_reads_the_same_values(written):
    found = safetensors.torch.load_file(written[0])
    expected = state() | {"wave": None}
    assert found.keys() == expected.keys()
    for name in expected.keys() - {"wave"}:
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name], expected[name])


@pytest.mark.parametrize(("algorithm", "function"), [("xxh3_128", xxhash.xxh3_128), ("sha256", hashlib.sha256)])
def test_digests_are_those_of_the_plain_functions(tmp_path, algorithm, function):
    path = tmp_path / "w.safetensors"
    whole, records = write_tensors(path, state(), algorithm)
    data = path.read_bytes()
    assert whole == FileRecord(len(data), f"{algorithm}:{function(data).hexdigest()}")
    assert list(records) == list(state())
    for name, tensor in state().items():
        digest = f"{algorithm}:{function(raw(tensor)).hexdigest()}"
        assert records[name] == TensorRecord(str(tensor.dtype).split(".")[1], list(tensor.shape), digest)


def test_what_is_read_is_what_was_written(written):
    path, _, records = written
    found = read_tensors(path, records)
    assert list(found) == list(state())
    for name, tensor in state().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert list(read_tensors(path, records, ["é"])) == ["é"]
    with pytest.raises(MissingError, match="'gone'"):
        read_tensors(path, records, ["gone"])


def test_records_of_another_file_are_damage_with_both_sides(written):
    path, _, records = written
    half = records["half"]
    for wrong, match in (
        ({"half": TensorRecord("float16", [7], half.digest)}, r"'half' is bfloat16 \[7\], expected float16 \[7\]"),
        ({"half": TensorRecord("bfloat16", [1, 7], half.digest)}, r"\[7\], expected bfloat16 \[1, 7\]"),
        ({"half": TensorRecord("bfloat16", [7], "xxh3_128:00")}, rf"has digest {half.digest}, expected xxh3_128:00"),
        ({"more": half}, "'more' is only in the file or the manifest"),
    ):
        with pytest.raises(DamagedError, match=match):
            read_tensors(path, records | wrong)


def test_only_typed_errors_escape_from_changed_bytes(written):
    """Without the digest of the whole file, each flip is found by the tensor's digest or leaves every value right."""
    path, whole, records = written
    sound, generator, found = path.read_bytes(), random.Random(0), 0
    for _ in range(400):
        data = bytearray(sound)
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(data)
        with pytest.raises(DamagedError, match="digest"):
            check_file(path, whole)
        try:
            tensors = read_tensors(path, records)
        except CheckpointError:
            found += 1
        else:
            assert all(torch.equal(tensors[name], tensor) for name, tensor in state().items())
    assert found > 200


def test_a_file_is_checked_by_size_kind_and_digest(written, tmp_path):
    path, whole, _ = written
    check_file(path, whole)
    with pytest.raises(DamagedError, match=f"{whole.bytes} bytes, expected 3"):
        check_file(path, FileRecord(3, whole.digest))
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(MissingError, match="is a link"):
        check_file(tmp_path / "link", whole)
    (tmp_path / "empty").touch()
    check_file(tmp_path / "empty", FileRecord(0, f"sha256:{hashlib.sha256().hexdigest()}"))


def test_the_bytes_that_were_compared_are_those_that_are_used(written, monkeypatch):
    """Another process replaces the file right after its digest was found good."""
    path, whole, records = written

    def compare_then_replace(data, algorithm):
        digest = digest_of_bytes(data, algorithm)
        path.unlink()
        write_tensors(path, {name: tensor.clone().zero_() for name, tensor in state().items()})
        return digest

    monkeypatch.setattr(tensorfile, "digest_of_bytes", compare_then_replace)
    found = map_verified(path, whole, records)
    monkeypatch.undo()
    assert list(found) == list(state())
    assert all(torch.equal(found[name], tensor) for name, tensor in state().items())
    assert read_tensors(path, records, verify=False)["wide"].abs().sum() == 0


def test_mapped_tensors_can_be_changed_and_the_file_stays(written):
    path, whole, records = written
    before = path.read_bytes()
    for tensor in map_verified(path, whole, records).values():
        tensor.zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{}",
        b"{",
        b"[" * 100_000,
        b'{"__metadata__": {}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 800]}}',
        b'{"__metadata__": {}, "a": {"dtype": "F32", "shape": [200], "data_offsets": [0, 800]}}',
        b'{"__metadata__": {}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
        b'{"__metadata__": {}, "a": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}}',
        b'{"__metadata__": {}, "a": {"dtype": "F32", "shape": [1e9], "data_offsets": [0, 8]}}',
        b'{"__metadata__": {}, "a": {"dtype": "X", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"__metadata__": {}, "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
        b'{"__metadata__": {}, "a": [], "b": {}}',
    ],
)
def test_nonsense_with_the_right_digest_is_damage(header, tmp_path):
    path, records = tmp_path / "x", {"a": TensorRecord("float32", [2], "xxh3_128:00")}
    for length in (len(header), 1 << 60):
        data = length.to_bytes(8, "little") + header + bytes(8)
        path.write_bytes(data)
        with pytest.raises(DamagedError, match=str(path)):
            map_verified(path, FileRecord(len(data), digest_of_bytes(data)), records)
    for data in (b"", b"1234567"):
        path.write_bytes(data)
        with pytest.raises(DamagedError, match="no header"):
            map_verified(path, FileRecord(len(data), digest_of_bytes(data)), records)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("x", [1.0], "is a list"),
        ("x", torch.empty(2, device="meta"), "meta device"),
        ("x", torch.eye(2).to_sparse(), "only dense"),
        ("__metadata__", torch.ones(1), "does not allow"),
        ("\ud800", torch.ones(1), "does not allow"),
    ],
)
def test_what_cannot_be_stored_is_refused(name, value, match, tmp_path):
    with pytest.raises(RefusedError, match=match):
        check_storable(name, value)
    with pytest.raises(RefusedError, match=match):
        write_tensors(tmp_path / "x", {name: value})
    assert not (tmp_path / "x").exists()


def test_a_file_that_is_there_is_not_written_over(written):
    with pytest.raises(WriteError, match=r"w\.safetensors.*exists"):
        write_tensors(written[0], state())


def test_names_of_types():
    for dtype in (torch.float8_e4m3fn, torch.complex64, torch.bool):
        assert dtype_of(dtype_name(dtype)) is dtype
    for name in ("float1", "nn", "__name__"):
        with pytest.raises(DamagedError, match=name):
            dtype_of(name)


def mixed():
    """Tensors of many sizes, so that some digests are taken beside the writing and some are not."""
    generator = torch.Generator().manual_seed(3)
    sizes = (1 << 20, 3, 1 << 18, 0, 17, (1 << 20) + 5, 1 << 19)
    return {f"t{i}": torch.randn(n, generator=generator)[:: 1 + i % 2] for i, n in enumerate(sizes)}


def test_digests_taken_beside_the_writing_are_those_of_the_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorfile, "_SYNC", 1 << 20)
    path, tensors = tmp_path / "m.safetensors", mixed()
    whole, records = write_tensors(path, tensors)
    assert whole == FileRecord(path.stat().st_size, digest_of_bytes(path.read_bytes()))
    assert {n: r.digest for n, r in records.items()} == {
        n: f"xxh3_128:{xxhash.xxh3_128(t.contiguous().numpy()).hexdigest()}" for n, t in tensors.items()
    }
    loaded = safetensors.torch.load_file(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_disk_that_fails_beside_the_writing_is_an_error(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensorfile, "_SYNC", 1 << 20)
    monkeypatch.setattr(os, "fdatasync", full)
    with pytest.raises(WriteError, match=r"m\.safetensors.*disk is full"):
        write_tensors(tmp_path / "m.safetensors", mixed())
