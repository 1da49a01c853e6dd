"""Reading foreign pickled files without running anything from them.

Feature files and subtitles of published data sets come as ``torch.save`` files (``{id: tensor}``) and as
plain pickles (``{id: text}``, numpy arrays). They are read here once, and kept as safetensors from then on.
Only containers, text, numbers, and the functions that rebuild tensors and arrays are known; any other name in
the file is refused.
"""

from __future__ import annotations

import codecs
import collections
import io
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from fulgurite.checkpoints.errors import CheckpointError, DamagedError, MissingError, RefusedError

_TORCH_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# All that the pickle machine itself raises on a broken stream.
_BROKEN = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    RecursionError,
    struct.error,
    RuntimeError,
    OSError,
)


def load_pickle(path: str | Path) -> Any:
    """The content of a pickle or ``torch.save`` file of containers, text, numbers, tensors and numpy arrays.

    Raises:
        MissingError: no such file.
        RefusedError: the file names anything else; the text has that name. Nothing from the file has run.
        DamagedError: the file is truncated or changed.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"no file at {path}")
    try:
        return _plain(_load(path), {})
    except CheckpointError:
        raise
    except (*_BROKEN, zipfile.BadZipFile) as error:
        raise DamagedError(f"{path} cannot be read as a pickle: {_short(error)}. Fetch the file again.") from error


def _load(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        return _load_torch(path)
    with open(path, "rb") as file:
        first = _Unpickler(file, path).load()
    return _load_torch(path) if type(first) is int and first == _TORCH_LEGACY_MAGIC else first


def _load_torch(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(record.file_size for record in archive.infolist()) > path.stat().st_size:
                raise RefusedError(f"{path} says that it holds more bytes than it has, which torch.save never writes.")
            if (bad := archive.testzip()) is not None:
                raise DamagedError(f"{path} is damaged: record {bad!r} fails its checksum. Fetch the file again.")
    try:
        with torch.serialization.safe_globals([(value, name) for name, value in _NUMPY.items()]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused_or_damaged(path, error) from error


def _refused_or_damaged(path: Path, error: pickle.UnpicklingError) -> CheckpointError:
    match = re.search(r"GLOBAL ([\w.]+)", str(error))
    if match:
        return _refusal(path, match[1])
    return DamagedError(f"{path} cannot be read: {_short(error)}. Fetch the file again.")


def _refusal(path: Path, name: str) -> RefusedError:
    return RefusedError(
        f"{path} asks for {name}, which is not needed to hold text, numbers, tensors or arrays. Nothing was "
        f"run. If you trust the file, convert it to safetensors or JSON with the program that wrote it."
    )


class _Unpickler(pickle._Unpickler):
    """Written in Python: a few bytes can make the one in C fill the memory with an empty table."""

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: io.BufferedReader, path: Path) -> None:
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get(f"{module}.{name}")
        if known is None:
            raise _refusal(self.path, f"{module}.{name}")
        return known

    def persistent_load(self, pid: Any) -> Any:
        raise _refusal(self.path, f"the external object {str(pid)[:80]!r}")

    def load_build(self) -> None:
        state, target = self.stack[-1], self.stack[-2]
        if not isinstance(target, (_Array, _DType)) and (type(target), type(state)) != (collections.OrderedDict, dict):
            raise ValueError(f"attributes for a {type(target).__name__}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


class _DType:
    """Stands in for numpy's dtype, whose own ``__setstate__`` trusts its input and can crash the process."""

    def __init__(self, code: str | bytes, align: bool = False, copy: bool = False) -> None:
        code = code.decode("ascii") if isinstance(code, bytes) else code
        if not isinstance(code, str) or not _CODE.fullmatch(code):
            raise ValueError(f"an array of type {code!r}")
        self.real = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1].decode("ascii") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "|", "="):
            raise ValueError(f"an array with byte order {order!r}")
        self.real = self.real.newbyteorder(order)


class _Array(np.ndarray):
    """An array while it is being rebuilt: checks what numpy's own ``__setstate__`` would trust."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, data = state
        data = data.encode("latin1") if isinstance(data, str) else data
        if not isinstance(dtype, _DType) or not isinstance(data, bytes):
            raise ValueError("an array of objects")
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.real.itemsize != len(data):
            raise ValueError(f"an array of shape {shape} in {len(data)} bytes")
        super().__setstate__((1, shape, dtype.real, bool(is_fortran), data))


def _reconstruct(kind: type, shape: tuple[int, ...], code: bytes | str) -> _Array:
    if kind is not _Array or shape != (0,):
        raise ValueError("not an array written by numpy")
    return np.ndarray.__new__(_Array, (0,), np.uint8)


def _scalar(dtype: _DType, data: bytes | str) -> Any:
    data = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(data, dtype.real, count=1)[0]


def _from_buffer(data: bytes, dtype: _DType, shape: tuple[int, ...], order: str) -> np.ndarray:
    return np.frombuffer(data, dtype.real).reshape(shape, order=order)


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"bytes in encoding {encoding!r}")
    return codecs.encode(text, encoding)


def _tensor_from_bytes(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """``value`` with numpy's own array type for the arrays in its containers; ``done`` holds those met before."""
    if isinstance(value, _Array):
        return value.view(np.ndarray)
    if not isinstance(value, (tuple, dict, list)):
        return value
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, tuple):
        done[id(value)] = tuple(_plain(item, done) for item in value)
        return done[id(value)]
    done[id(value)] = value
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        value[key] = _plain(item, done)
    return value


_CODE = re.compile(r"[biufc](1|2|4|8|16)|[SU][0-9]{1,6}")
_NUMPY = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _DType,
    "numpy.core.multiarray._reconstruct": _reconstruct,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _from_buffer,
}
_NUMPY |= {name.replace(".core.", "._core."): value for name, value in _NUMPY.items()}
_KNOWN: dict[str, Callable[..., Any]] = {
    **_NUMPY,
    "builtins.set": set,
    "__builtin__.set": set,
    "builtins.frozenset": frozenset,
    "builtins.bytearray": bytearray,
    "builtins.complex": complex,
    "collections.OrderedDict": collections.OrderedDict,
    "_codecs.encode": _encode,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch.storage._load_from_bytes": _tensor_from_bytes,
}


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no details'}"
