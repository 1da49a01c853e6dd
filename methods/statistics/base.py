"""What every statistic shares: sums over examples that can be added over processes, stored, and taken up again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

LISTED = 8  # names in a message


class Statistic(ABC):
    """Sums over examples and what they are divided by, as named tensors.

    Sums are additive: the same whatever the batches, and the sum over processes is that of one process. All tensors
    exist from the start, so that processes agree on them even where one has seen no data.

    Args:
        dtype: of the sums, float32 or float64. By default float64 on the CPU and float32 elsewhere.

    Attributes:
        sums: name -> sum.
        counts: name -> 0-dimensional number to divide by.
        reduced: the sums are those of all processes.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"dtype={dtype}: statistics are summed in torch.float32 or torch.float64")
        self.dtype = dtype
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.reduced = False

    @abstractmethod
    def update(self, *args: Any, **kwargs: Any) -> None:
        """Add some examples. Refused once reduced, since a second reduction would count the first twice."""

    @abstractmethod
    def means(self) -> dict[str, Tensor]:
        """The statistic itself: sums over counts. Raises ValueError where nothing was seen."""

    @property
    def settings(self) -> dict[str, Any]:
        """What the sums mean, as plain values; stored, and compared when a state is loaded."""
        return {}

    def sum_dtype(self, device: torch.device) -> torch.dtype:
        """Type of sums that lie on ``device``."""
        return self.dtype or (torch.float64 if device.type == "cpu" else torch.float32)

    def make(self, name: str, shape: tuple[int, ...], device: torch.device) -> None:
        """Start the sum ``name`` at zero."""
        self.sums[name] = torch.zeros(shape, dtype=self.sum_dtype(device), device=device)

    def make_count(self, name: str, device: torch.device) -> None:
        """Start the count ``name`` at zero: float64, which the Metal back end lacks."""
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.counts[name] = torch.zeros((), dtype=dtype, device=device)

    def check_open(self) -> None:
        """Raise ValueError once reduced."""
        if self.reduced:
            raise ValueError(f"this {type(self).__name__} is already summed over processes; call reset() to start anew")

    @torch.no_grad()
    def reduce(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Replace every sum and count by that of all processes, one at a time and in the same order everywhere.

        Args:
            fn: sums a tensor over processes, and returns it.

        Raises:
            ValueError: called twice.
        """
        self.check_open()
        for tensors in (self.sums, self.counts):
            for name in sorted(tensors):
                tensors[name] = fn(tensors[name])
        self.reduced = True

    def reset(self) -> None:
        """Forget all examples."""
        for tensors in (self.sums, self.counts):
            for name, tensor in tensors.items():
                tensors[name] = torch.zeros_like(tensor)
        self.reduced = False

    def state_dict(self) -> dict[str, Any]:
        """Copies of the sums and counts of this process, and what they mean."""
        copies = {
            "sums": {name: tensor.clone() for name, tensor in self.sums.items()},
            "counts": {name: tensor.clone() for name, tensor in self.counts.items()},
        }
        return {**copies, "reduced": self.reduced, "settings": dict(self.settings)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a stored state, on the devices and in the types of this statistic.

        Raises:
            ValueError: names, shapes or settings differ. Nothing is changed then.
        """
        wrong = [
            f"{key}: stored {state['settings'].get(key)!r}, here {value!r}"
            for key, value in self.settings.items()
            if state["settings"].get(key) != value
        ]
        for kind, own in (("sums", self.sums), ("counts", self.counts)):
            stored = state[kind]
            wrong += [f"{name}: only stored" for name in stored if name not in own]
            wrong += [f"{name}: not stored" for name in own if name not in stored]
            wrong += [
                f"{name}: stored {tuple(stored[name].shape)}, here {tuple(tensor.shape)}"
                for name, tensor in own.items()
                if name in stored and stored[name].shape != tensor.shape
            ]
        if wrong:
            more = f"\n  ... and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
            listed = "\n  ".join(wrong[:LISTED])
            raise ValueError(f"the stored {type(self).__name__} is of something else:\n  {listed}{more}")
        for kind, own in (("sums", self.sums), ("counts", self.counts)):
            for name, tensor in own.items():
                own[name] = state[kind][name].to(tensor.device, tensor.dtype, copy=True)
        self.reduced = bool(state["reduced"])
