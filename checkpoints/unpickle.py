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
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fulgurite.checkpoints.errors import CheckpointError, DamagedError, MissingError, RefusedError

_TORCH_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_ARRAY_TYPES = [np.ndarray, np.dtype, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefdFDSU"}]
# All that the pickle machine itself raises on a broken stream.
_BROKEN = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    ImportError,
    OverflowError,
    MemoryError,
    RecursionError,
    struct.error,
    RuntimeError,
    OSError,
)


def load_pickle(path: str | Path) -> Any:
    """The content of a pickle or ``torch.save`` file made of containers, text, numbers, tensors and numpy
    arrays.

    Raises:
        MissingError: no such file.
        RefusedError: the file names anything else; the text has that name. Nothing from the file has run.
        DamagedError: the file is truncated or changed.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"no file at {path}")
    try:
        if zipfile.is_zipfile(path):
            return _load_torch(path)
        with open(path, "rb") as file:
            first = _Unpickler(file, path).load()
        return _load_torch(path) if first == _TORCH_LEGACY_MAGIC and type(first) is int else first
    except CheckpointError:
        raise
    except (*_BROKEN, zipfile.BadZipFile) as error:
        raise DamagedError(
            f"{path} cannot be read as a pickle: {_short(error)}. Fetch the file again."
        ) from error


def _load_torch(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if (bad := archive.testzip()) is not None:
                raise DamagedError(
                    f"{path} is damaged: record {bad!r} fails its checksum. Fetch the file again."
                )
    try:
        with torch.serialization.safe_globals(
            [*_ARRAY_TYPES, (_reconstruct, _reconstruct_name()), (_scalar, _scalar_name())]
        ):
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


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BufferedReader, path: Path) -> None:
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get((module.replace("numpy._core.", "numpy.core."), name))
        if known is None:
            raise _refusal(self.path, f"{module}.{name}")
        return known

    def persistent_load(self, pid: Any) -> Any:
        raise _refusal(self.path, f"the external object {str(pid)[:80]!r}")


def _reconstruct(kind: type, shape: tuple[int, ...], code: bytes | str) -> np.ndarray:
    if kind is not np.ndarray or shape != (0,):
        raise ValueError("not an array written by numpy")
    return np.ndarray.__new__(np.ndarray, shape, code)


def _scalar(dtype: np.dtype, data: bytes) -> Any:
    if dtype.hasobject or not isinstance(data, bytes):
        raise ValueError("a numpy scalar of objects")
    return np.frombuffer(data, dtype, count=1)[0]


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"bytes in encoding {encoding!r}")
    return codecs.encode(text, encoding)


def _tensor_from_bytes(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _reconstruct_name() -> str:
    return f"{np.zeros(0).__reduce__()[0].__module__}._reconstruct"


def _scalar_name() -> str:
    return f"{np.float64(0).__reduce__()[0].__module__}.scalar"


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "bytearray"): bytearray,
    ("builtins", "complex"): complex,
    ("__builtin__", "set"): set,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): lambda data, dtype, shape, order: np.frombuffer(
        data, dtype
    ).reshape(shape, order=order),
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch.storage", "_load_from_bytes"): _tensor_from_bytes,
}


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no details'}"
