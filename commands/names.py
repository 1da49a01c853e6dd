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
_NAME = re.compile(r"(?<![\w.])[A-Z]\w*(?![\w.])")


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


def scalars(value: object) -> Iterator[str]:
    """Every string in a nested value, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from scalars(item)
    elif isinstance(value, list):
        for item in value:
            yield from scalars(item)


def import_named(typed: Iterable[str], documents: Iterable[dict]) -> list[str]:
    """Import the modules of the table's classes that are named; returns the modules' names.

    Args:
        typed: command line arguments; names are found anywhere in them, as in ``--model.kind={class_path: LoRA}``.
        documents: contents of configs; a string counts if it is a class name and nothing else.
    """
    names = {name for argument in typed for name in _NAME.findall(argument)}
    names.update(text for document in documents for text in scalars(document))
    table = class_table()
    modules = sorted({module for name in names for module in table.get(name, ())})
    for module in modules:
        importlib.import_module(module)
    return modules
