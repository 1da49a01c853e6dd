"""Tensor files in the safetensors format, written in one pass that also takes the digests.

Any reader of safetensors can open them. Types that the format lacks (complex128 and rare ones) are stored as
bytes; their type is in the manifest. Tied tensors are written once per name. Extra memory when writing: two
tensors, and only where they are views or on another device. Threads take the digests and keep the disk busy meanwhile.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fulgurite.checkpoints.atomic import fault, naming, reading
from fulgurite.checkpoints.digest import (
    DEFAULT,
    Digest,
    FileRecord,
    algorithm_of,
    digest_of_bytes,
    digest_of_tensor,
    tensor_bytes,
)
from fulgurite.checkpoints.errors import DamagedError, MissingError, RefusedError

_CODES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_CHUNK = 1 << 22
_SYNC = 1 << 25  # bytes after which the disk is given more to do
_LENGTH = 8  # bytes of the header's length


@dataclass(frozen=True)
class TensorRecord:
    """Type (torch's name without prefix), shape, and digest of the row-major elements of one tensor."""

    dtype: str
    shape: list[int]
    digest: str


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], algorithm: str = DEFAULT
) -> tuple[FileRecord, dict[str, TensorRecord]]:
    """Write ``tensors`` to ``path`` (not atomic by itself: use it in `publish_folder`).

    Returns:
        the record of the file, and of each tensor in the order of ``tensors``.

    Raises:
        RefusedError: a tensor or a name that cannot be stored.
        WriteError: the operating system refused.
    """
    for name, tensor in tensors.items():
        check_storable(name, tensor)
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header = _header(tensors, order)
    head = len(header).to_bytes(_LENGTH, "little") + header
    whole, size, digests = Digest(algorithm), len(head), {}
    whole.update(head)

    def digest(name: str, data: memoryview) -> None:
        single = Digest(algorithm)
        for start in range(0, len(data), _CHUNK):
            piece = data[start : start + _CHUNK]
            single.update(piece)
            whole.update(piece)
        digests[name] = str(single)

    with naming(path), open(path, "xb") as file, ThreadPoolExecutor(2) as beside:
        file.write(head)
        digesting: Future[None] | None = None
        syncing: Future[None] | None = None
        unsynced = 0
        for name in order:
            data = tensor_bytes(tensors[name])
            _settle(digesting)
            digesting = beside.submit(digest, name, data) if len(data) >= _CHUNK // 4 else digest(name, data)
            file.write(data)
            fault("tensor_written")
            size += len(data)
            unsynced += len(data)
            if unsynced >= _SYNC and (syncing is None or syncing.done()):
                _settle(syncing)
                syncing, unsynced = beside.submit(os.fdatasync, file.fileno()), 0
        _settle(digesting)
        _settle(syncing)
    records = {
        name: TensorRecord(dtype_name(tensor.dtype), list(tensor.shape), digests[name])
        for name, tensor in tensors.items()
    }
    return FileRecord(size, str(whole)), records


def _settle(future: Future[None] | None) -> None:
    """Wait for ``future``, if there is one, and raise what it raised."""
    if future is not None:
        future.result()


def read_tensors(
    path: Path, records: Mapping[str, TensorRecord], names: Iterable[str] | None = None, verify: bool = True
) -> dict[str, Tensor]:
    """Map the tensors of ``path`` into memory, in the order of ``records``.

    Copy-on-write, so changing them never changes the file. With ``verify`` the digest of each tensor returned is
    checked first. Raises `MissingError` for a name that is not recorded, `DamagedError` naming file and tensor.
    """
    wanted = list(records) if names is None else list(names)
    if missing := [name for name in wanted if name not in records]:
        raise MissingError(f"{path} has no tensor {missing[0]!r} ({len(missing)} of {len(wanted)} are missing)")
    result = _tensors_in(path, _mapped(path), records, wanted)
    if verify:
        for name, tensor in result.items():
            check_tensor(path, name, tensor, records[name])
    return result


def map_verified(path: Path, record: FileRecord, records: Mapping[str, TensorRecord]) -> dict[str, Tensor]:
    """All tensors of ``path``, in the order of ``records``, after one pass that compares every byte with ``record``.

    The file is opened once, so the bytes that were compared are the bytes that are used, whatever is put at ``path``
    meanwhile. Mapped copy-on-write: extra memory is what the caller touches. Raises `MissingError` and `DamagedError`.
    """
    check_size(path, record)
    data = _mapped(path)
    check_bytes(path, memoryview(data), record)
    return _tensors_in(path, data, records, records)


def _mapped(path: Path) -> mmap.mmap:
    """The bytes of a file; changing them leaves the file alone."""
    with reading(path), open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size < _LENGTH:
            raise DamagedError(f"{path} is damaged: it has no header.")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _tensors_in(
    path: Path, data: mmap.mmap, records: Mapping[str, TensorRecord], names: Iterable[str]
) -> dict[str, Tensor]:
    """Tensors of a mapped file, whose header must name those of ``records`` and describe them alike."""
    try:
        begin = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
        entries = json.loads(data[_LENGTH:begin])
        entries.pop("__metadata__", None)
        if stray := set(entries) ^ set(records):
            raise DamagedError(f"{path} is damaged: tensor {min(stray)!r} is only in the file or the manifest.")
        return {name: _restore(_tensor_at(data, begin, entries[name]), records[name], path, name) for name in names}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, RuntimeError, OverflowError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError(f"{path} is damaged: its header cannot be read: {error!r}.") from error


def _tensor_at(data: mmap.mmap, begin: int, entry: Mapping[str, Any]) -> Tensor:
    """The tensor that a header's entry describes; ValueError where it does not lie inside the file."""
    dtype, shape, (start, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    count = math.prod(shape)
    if not 0 <= start <= end <= len(data) - begin or end - start != count * dtype.itemsize:
        raise ValueError(f"{entry} does not fit the file")
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=begin + start).reshape(shape)


def check_tensor(path: Path, name: str, tensor: Tensor, record: TensorRecord) -> None:
    """Raise `DamagedError` unless the elements of ``tensor`` have the recorded digest."""
    found = digest_of_tensor(tensor, algorithm_of(record.digest))
    if found != record.digest:
        raise DamagedError(f"{path} is damaged: tensor {name!r} has digest {found}, expected {record.digest}.")


def check_file(path: Path, record: FileRecord) -> None:
    """Raise `MissingError` or `DamagedError` unless ``path`` is a file of the recorded size and digest."""
    check_size(path, record)
    with reading(path), open(path, "rb") as file:
        if record.bytes == 0:
            check_bytes(path, b"", record)
        else:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
                check_bytes(path, view, record)


def check_bytes(path: Path, data: bytes | memoryview, record: FileRecord) -> None:
    """Raise `DamagedError` unless ``data``, read from ``path``, has the recorded digest."""
    found = digest_of_bytes(data, algorithm_of(record.digest))
    if found != record.digest:
        raise DamagedError(f"{path} is damaged: digest {found}, expected {record.digest}.")


def check_size(path: Path, record: FileRecord) -> None:
    """Raise unless ``path`` is a plain file (no link) of the recorded size."""
    if path.is_symlink() or not path.is_file():
        what = "is a link" if path.is_symlink() else "is missing"
        raise MissingError(f"{path} {what}, but the manifest lists it as a file.")
    if (size := path.stat().st_size) != record.bytes:
        raise DamagedError(f"{path} is damaged: {size} bytes, expected {record.bytes}.")


def check_storable(name: str, tensor: object) -> None:
    """Raise `RefusedError` unless ``tensor`` is dense, with values, and its name is one the format allows."""
    problem = None
    if not isinstance(tensor, Tensor):
        problem = f"is a {type(tensor).__name__}, not a tensor"
    elif is_sharded(tensor):
        problem = "is sharded over ranks; gather it with full_tensor() first"
    elif tensor.layout is not torch.strided or tensor.is_quantized:
        problem = f"has layout {tensor.layout}, only dense tensors are stored"
    elif tensor.device.type == "meta":
        problem = "is on the meta device and has no values"
    elif name == "__metadata__" or any("\ud800" <= letter <= "\udfff" for letter in name):
        problem = "has a name that the file format does not allow"
    if problem:
        raise RefusedError(f"tensor {name!r} {problem}")


def is_sharded(tensor: object) -> bool:
    """Whether each rank holds a part of ``tensor`` (a ``DTensor``)."""
    return hasattr(tensor, "full_tensor")


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` as ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """Inverse of `dtype_name`; `DamagedError` if this torch has no such type."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise DamagedError(f"type {name!r} of a stored tensor is not known to torch {torch.__version__}")
    return dtype


def file_layout(like: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int], int]:
    """Head of a file for tensors of these types and shapes, the offset of each in the file, and the file's size."""
    for name, tensor in like.items():
        if tensor.dtype not in _CODES:
            raise RefusedError(f"tensor {name!r} is {dtype_name(tensor.dtype)}, which the file format does not have")
    order = sorted(like, key=lambda name: (-like[name].element_size(), name))
    header = _header(like, order)
    head = len(header).to_bytes(_LENGTH, "little") + header
    places, at = {}, len(head)
    for name in order:
        places[name] = at
        at += like[name].numel() * like[name].element_size()
    return head, places, at


def map_file(path: Path) -> dict[str, Tensor]:
    """The tensors of any safetensors file, mapped copy-on-write; `DamagedError` where it is none.

    Without a manifest nothing says whether its bytes are as they were written.
    """
    data = _mapped(path)
    try:
        begin = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
        entries = json.loads(data[_LENGTH:begin])
        entries.pop("__metadata__", None)
        return {name: _tensor_at(data, begin, entry) for name, entry in entries.items()}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, RuntimeError, OverflowError) as error:
        raise DamagedError(f"{path} is no safetensors file, or damaged: {error!r}.") from error


def _header(tensors: Mapping[str, Tensor], order: list[str]) -> bytes:
    entries, start = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        tensor = tensors[name]
        count = tensor.numel() * tensor.element_size()
        code = _CODES.get(tensor.dtype)
        shape = list(tensor.shape) if code else [count]
        entries[name] = {"dtype": code or "U8", "shape": shape, "data_offsets": [start, start + count]}
        start += count
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _restore(tensor: Tensor, record: TensorRecord, path: Path, name: str) -> Tensor:
    try:
        dtype = dtype_of(record.dtype)
    except DamagedError as error:
        raise DamagedError(f"{path}, tensor {name!r}: {error}") from error
    if dtype not in _CODES and tensor.dtype is torch.uint8:
        tensor = tensor.clone().view(dtype).reshape(record.shape)
    if tensor.dtype != dtype or list(tensor.shape) != record.shape:
        raise DamagedError(
            f"{path} is damaged: tensor {name!r} is {dtype_name(tensor.dtype)} {list(tensor.shape)}, "
            f"expected {record.dtype} {record.shape}."
        )
    return tensor
