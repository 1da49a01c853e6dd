"""fulgurite: adapt, merge, compress and unlearn vision-language models with Lightning."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fulgurite.backbones.compressed_models import load_model
    from fulgurite.commands.loading import load

__version__ = "0.1.0"
__all__ = ["__version__", "load", "load_model"]


def __getattr__(name: str) -> object:
    if name == "load":
        from fulgurite.commands.loading import load

        return load
    if name == "load_model":
        from fulgurite.backbones.compressed_models import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
