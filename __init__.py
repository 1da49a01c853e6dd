"""fulgurite: adapt, merge, compress and unlearn vision-language models with Lightning."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fulgurite.commands.loading import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> object:
    if name == "load":
        from fulgurite.commands.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
