"""Short class names: a table of the package's own public classes, read from its source without importing it.

jsonargparse resolves a bare class name among the subclasses, already imported, of the type that an option declares.
So every bare name of the table that stands anywhere in the command line or in a config gets its module imported
before parsing, and no other module does.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("methods", "metrics", "backbones", "datamodules", "modules", "callbacks", "samples", "reports")
_WORD = re.compile(r"[A-Z][A-Za-z0-9_]*")


@cache
def class_table() -> dict[str, list[str]]:
    """Short name -> modules that define a public top-level class of that name (one, unless a name is used twice)."""
    table: dict[str, list[str]] = {}
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            module = ".".join(("fulgurite", *(part for part in parts if part != "__init__")))
            for node in ast.parse(file.read_bytes()).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    table.setdefault(node.name, []).append(module)
    return table


def words(value: object) -> Iterator[str]:
    """Every capitalised word in the keys and strings of a nested value: what may be a short class name."""
    if isinstance(value, str):
        yield from _WORD.findall(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from words(key)
            yield from words(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from words(item)


def import_named(values: Iterable[object]) -> list[str]:
    """Import the modules of all classes of the table that ``values`` name; returns those modules' names."""
    table = class_table()
    modules = {module for word in set(words(list(values))) for module in table.get(word, ())}
    for module in sorted(modules):
        importlib.import_module(module)
    return sorted(modules)
