"""Which packages class paths may come from, and how values are read while they are."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import jsonargparse

from fulgurite.commands.errors import ConfigError
from fulgurite.commands.names import complete
from fulgurite.commands.yaml_loader import load_text

# Not all of torch: torch.hub.load would pass as a callable and run what it downloads.
ALLOWED = ("fulgurite", "torch.nn", "torch.optim", "torch.utils.data", "torchmetrics", "lightning.pytorch")
PARSER_MODE = "strict_yaml"
EPILOG = f"""Class paths may come from {", ".join(ALLOWED)}.
--allow PREFIX (on the command line only, repeatable) adds a package or module, and puts the working folder on
the import path. Classes of fulgurite have short names: the name of the class alone.
"""


@contextmanager
def imports_allowed(extra: tuple[str, ...]) -> Iterator[None]:
    """Let class paths come from ``ALLOWED`` and ``extra`` only; others are refused before their import."""
    for prefix in extra:
        if not all(part.isidentifier() for part in prefix.split(".")):
            raise ConfigError(f"--allow {prefix[:80]!r}: expected a package or module, as my_project.models")
    if extra and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    jsonargparse.set_loader(PARSER_MODE, load_value, (ConfigError,))
    jsonargparse.set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[*ALLOWED, *extra])
    try:
        yield
    finally:
        jsonargparse.set_parsing_settings(import_path_denylist=[*set(extra) - set(ALLOWED)])


def load_value(text: str, path: str = "") -> object:
    """A config or the value of an option: strict YAML with short class names completed.

    jsonargparse hands the value of an option that lies two classes deep on as text, by ``str``, and reads it again. So
    the description of a class is written as JSON, and a null is read as ``str`` writes it.
    """
    if text == str(None):
        return None
    value = complete(load_text(text, path))
    return _Described(value) if isinstance(value, dict) and "class_path" in value else value


class _Described(dict):
    """A class with its arguments, whose text is read as what it was."""

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False, default=str)
