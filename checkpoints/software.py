"""Which software wrote a checkpoint."""

from __future__ import annotations

import platform
import sys

# What the numbers of a model can depend on.
LIBRARIES = ("fulgurite", "torch", "lightning", "transformers", "timm", "open_clip", "peft")


def software() -> dict[str, str]:
    """Versions of Python and of the libraries of `LIBRARIES` that this process has imported."""
    imported = {name: str(sys.modules[name].__version__) for name in LIBRARIES if name in sys.modules}
    return {"python": platform.python_version(), **imported}
