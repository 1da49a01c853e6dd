"""A tensor file written piece by piece, in any order and by several threads, without holding any tensor whole.

The file gets its full size first, so a full disk is found before any work; every piece goes to its place. Digests are
taken at the end in one pass over what was written.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from fulgurite.checkpoints.atomic import naming
from fulgurite.checkpoints.digest import DEFAULT, FileRecord, digest_of_bytes, tensor_bytes
from fulgurite.checkpoints.errors import WriteError
from fulgurite.checkpoints.tensorfile import TensorRecord, dtype_name, file_layout

Pieces = Callable[[str], Iterable[tuple[int, Tensor]]]


def write_in_place(
    path: Path, like: Mapping[str, Tensor], pieces: Pieces, threads: int = 1, algorithm: str = DEFAULT
) -> tuple[FileRecord, dict[str, TensorRecord]]:
    """Write a safetensors file at ``path`` (not atomic by itself: use it in `publish_folder`).

    Several processes that share the file system may write one file: one calls `reserve`, then each calls `fill` for
    names of its own, then one calls `records_of`; this function is all three.

    Args:
        path: where nothing is yet.
        like: types and shapes by name; values are not read, so the meta device will do.
        pieces: for a name, (index of the first element, elements) of parts that together are the tensor, flat.
        threads: tensors written at a time.
        algorithm: of the digests.

    Returns:
        the record of the file, and of each tensor in the order of ``like``.

    Raises:
        WriteError: the operating system refused.
        ValueError: the pieces of a tensor are not of its type, or do not make up its size.
    """
    reserve(path, like)
    fill(path, like, pieces, list(like), threads)
    return records_of(path, like, algorithm)


def reserve(path: Path, like: Mapping[str, Tensor]) -> None:
    """Make the file at its full size, with its header, so that a full disk is found before any work."""
    header, _, size = file_layout(like)
    with naming(path), open(path, "xb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            why = f"cannot write {path}: {size:,} bytes are needed: {error.strerror}"
            raise WriteError(why, error.errno) from error
        os.pwrite(file.fileno(), header, 0)


def fill(path: Path, like: Mapping[str, Tensor], pieces: Pieces, names: Sequence[str], threads: int = 1) -> None:
    """Write the tensors ``names`` into the file that `reserve` has made."""
    _, places, _ = file_layout(like)
    with naming(path), open(path, "rb+") as file:

        def write(name: str) -> None:
            tensor, done = like[name], 0
            for start, piece in pieces(name):
                if piece.dtype != tensor.dtype:
                    raise ValueError(f"a piece of {name} is {piece.dtype}, the tensor {tensor.dtype}")
                with naming(path):
                    write_all(file.fileno(), tensor_bytes(piece), places[name] + start * tensor.element_size())
                done += piece.numel()
            if done != tensor.numel():
                raise ValueError(f"the pieces of {name} hold {done} of {tensor.numel()} elements")

        largest_first = sorted(names, key=lambda name: -like[name].numel())
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(write, largest_first):
                pass


def records_of(
    path: Path, like: Mapping[str, Tensor], algorithm: str = DEFAULT
) -> tuple[FileRecord, dict[str, TensorRecord]]:
    """The records of a file that is complete, and of its tensors."""
    _, places, size = file_layout(like)
    with (
        naming(path),
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        memoryview(data) as view,
    ):
        records = {}
        for name, tensor in like.items():
            with view[places[name] : places[name] + tensor.numel() * tensor.element_size()] as part:
                digest = digest_of_bytes(part, algorithm)
            records[name] = TensorRecord(dtype_name(tensor.dtype), list(tensor.shape), digest)
        return FileRecord(size, digest_of_bytes(view, algorithm)), records


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """`os.pwrite` until all is written."""
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
