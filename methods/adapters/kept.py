"""What is computed from parameters alone, kept in evaluation for as long as they stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Kept:
    """A cache of results of parameters. Copies and pickles of it are empty.

    A change in place counts a parameter's version up, and a move gives it other memory; either makes the result anew.
    (A write through ``parameter.data`` is not seen.)
    """

    def __init__(self) -> None:
        self._results: dict[Hashable, tuple[Any, Any]] = {}

    def get(self, key: Hashable, parameters: Sequence[Tensor], make: Callable[[], T]) -> T:
        """What ``make`` gives, or gave for the same ``key`` and values of ``parameters``."""
        device = parameters[0].device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        state = (autocast, *((p.data_ptr(), p.dtype, p._version) for p in parameters))
        kept = self._results.get(key)
        if kept is None or kept[0] != state:
            kept = self._results[key] = (state, make())
        return kept[1]

    def clear(self) -> None:
        """Forget all."""
        self._results.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()
