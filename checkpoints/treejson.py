"""Lossless split of nested Python values into JSON and tensors, and back.

Lists, strings, booleans, integers, None, finite floats and dicts with string keys become themselves. All else
is an object with the one key ``$``: ``{"$": ["tuple", [..]]}``, ``{"$": ["tensor", "path/in/the/tree"]}`` and
so on; a dict that has a key ``$`` or other than string keys is written as a list of pairs. Sharing between
values is not kept.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path, PosixPath
from typing import Any

import torch
from torch import Tensor

from fulgurite.checkpoints.errors import DamagedError, RefusedError
from fulgurite.checkpoints.tensorfile import check_storable, dtype_name, dtype_of, is_sharded

_MAX_DEPTH = 100
_PLAIN = (str, bool, int, type(None))


def split(value: object, where: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Split ``value`` into a JSON value and the tensors in it.

    Args:
        value: dicts, lists, tuples of tensors, numbers, strings, None; also torch sizes, types and devices,
            and paths.
        where: key path of ``value``, for messages.

    A tensor that is sharded over ranks is returned as it is; writing it takes `shards`.

    Raises:
        RefusedError: for anything else, with its key path. Nothing is converted silently.
    """
    tensors: dict[str, Tensor] = {}
    return _Splitter(tensors).encode(value, (where,) if where else ()), tensors


def join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of `split`. Raises `DamagedError` for JSON that `split` did not write."""
    if isinstance(value, list):
        return [join(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$" not in value:
        return {key: join(item, tensors) for key, item in value.items()}
    try:
        tag, content = value["$"]
        return _DECODERS[tag](content, tensors)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise DamagedError(f"stored value {str(value)[:80]} cannot be decoded: {error!r}") from error


class _Splitter:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def encode(self, value: object, path: tuple[str, ...]) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return self._string(value, path) if kind is str else value
        if kind is float:
            return value if math.isfinite(value) else {"$": ["float", repr(value)]}
        if isinstance(value, Tensor):
            return {"$": ["tensor", self._store(value, path)]}
        if len(path) > _MAX_DEPTH:
            raise RefusedError(f"{_name(path[:5])}/... is nested more than {_MAX_DEPTH} deep, or holds itself")
        if kind is dict and all(type(key) is str for key in value) and "$" not in value:
            return {self._string(key, path): self.encode(item, (*path, key)) for key, item in value.items()}
        if kind in (dict, OrderedDict):
            pairs = [[self.encode(k, (*path, "key")), self.encode(v, (*path, str(k)))] for k, v in value.items()]
            return {"$": ["dict" if kind is dict else "ordered", pairs]}
        if kind in (list, tuple):
            items = [self.encode(item, (*path, str(index))) for index, item in enumerate(value)]
            return items if kind is list else {"$": ["tuple", items]}
        return self._rare(value, path)

    def _rare(self, value: object, path: tuple[str, ...]) -> Any:
        if type(value) is torch.Size:
            return {"$": ["size", list(value)]}
        if type(value) is torch.dtype:
            return {"$": ["dtype", dtype_name(value)]}
        if type(value) is torch.device:
            return {"$": ["device", str(value)]}
        if type(value) is PosixPath:
            return {"$": ["path", self._string(str(value), path)]}
        raise RefusedError(
            f"{_name(path)} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint "
            f"cannot hold. Store tensors, numbers, strings, lists, tuples and dicts (a numpy value by "
            f".item() or torch.as_tensor; leave objects out of save_hyperparameters with ignore=[...])."
        )

    def _store(self, tensor: Tensor, path: tuple[str, ...]) -> str:
        name, count = _name(path), 1
        while name in self.tensors:
            count += 1
            name = f"{_name(path)}#{count}"
        if not is_sharded(tensor):
            check_storable(name, tensor)
        self.tensors[name] = tensor.detach()
        return name

    @staticmethod
    def _string(value: Any, path: tuple[str, ...]) -> str:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RefusedError(f"{_name(path)} holds text that is not valid Unicode: {value!r}") from error
        return value


def _name(path: tuple[str, ...]) -> str:
    return "/".join(path) or "value"


def _pairs(content: list[list[Any]], tensors: Mapping[str, Tensor]) -> list[tuple[Any, Any]]:
    return [(join(key, tensors), join(item, tensors)) for key, item in content]


_DECODERS: dict[str, Callable[[Any, Mapping[str, Tensor]], Any]] = {
    "float": lambda content, tensors: float(content),
    "tensor": lambda content, tensors: tensors[content],
    "dict": lambda content, tensors: dict(_pairs(content, tensors)),
    "ordered": lambda content, tensors: OrderedDict(_pairs(content, tensors)),
    "tuple": lambda content, tensors: tuple(join(item, tensors) for item in content),
    "size": lambda content, tensors: torch.Size(content),
    "dtype": lambda content, tensors: dtype_of(content),
    "device": lambda content, tensors: torch.device(content),
    "path": lambda content, tensors: Path(content),
}
