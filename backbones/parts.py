"""What of a backbone another library can load: its parts, each a model of that library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

Library = Literal["hf", "open_clip", "timm"]


@dataclass(frozen=True)
class Part:
    """One model of a library inside a backbone.

    Args:
        name: of the option that chooses among several parts.
        library: that loads it.
        build: makes the library's model; what `places` does not fill keeps the values that it has here.
        places: module of the built model -> module of the backbone whose tensors fill it; ``""`` is the whole.
        live: what the backbone's own modules make of the inputs of the built model's forward pass.
        tokenizer: is written beside the weights.
        base: folder or hub name that the part was loaded from; None where it began with random weights.
    """

    name: str
    library: Library
    build: Callable[[], nn.Module]
    places: Mapping[str, str]
    live: Callable[..., Any]
    tokenizer: Any = None
    base: str | None = None

    def holds(self, name: str) -> bool:
        """Whether the backbone's tensor or module of that name is in the part's places."""
        return any(name == place or name.startswith(f"{place}.") for place in self.places.values())

    def source_of(self, name: str) -> str | None:
        """The backbone's name for a tensor of the built model; None where no place fills it."""
        for inner, place in self.places.items():
            if not inner:
                return f"{place}.{name}"
            if name.startswith(f"{inner}."):
                return place + name.removeprefix(inner)
        return None

    def fill(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
        """Put the backbone's ``tensors`` into a built model; returns the names of those that were used."""
        state, used = model.state_dict(), []
        for name in state:
            source = self.source_of(name)
            if source in tensors:
                state[name] = tensors[source].to(state[name].dtype)
                used.append(source)
        model.load_state_dict(state)
        return used
