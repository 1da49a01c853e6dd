"""Short class names: a table of the package's own public classes, read from its source without importing it.

jsonargparse resolves a bare class name among the subclasses, already imported, of the type that an option
declares. So every name of the table that stands on the command line or in a config gets its module imported
before parsing, and no other module does. ``class_path: Name`` needs no type: it is completed from the table.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("methods", "metrics", "backbones", "datamodules", "modules", "callbacks", "samples", "reports")
STRATEGY = "fulgurite.callbacks.strategy.ModelParallelStrategy"
# Lightning has a class of the same name, which does not write this project's checkpoints.
STRATEGIES = {"ModelParallelStrategy": STRATEGY, "fsdp2": STRATEGY}

GENERATORS = ROOT / "datamodules" / "worlds"  # makes the default data; no config names its classes

# Frozen dataclasses are what code hands on to code.
_CLASS = re.compile(r"^(?<!@dataclass\(frozen=True\)\n)class ([A-Z]\w*)", re.MULTILINE)
_NAME = re.compile(r"(?<![\w.])[A-Z]\w*(?![\w.])")


@cache
def class_table() -> dict[str, list[str]]:
    """Short name -> modules that define a public top-level class of that name: one, unless a name is used twice.

    Without frozen dataclasses and without the classes of `GENERATORS`.
    """
    table: dict[str, list[str]] = {}
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            if file.is_relative_to(GENERATORS):
                continue
            parts = file.relative_to(ROOT).with_suffix("").parts
            module = ".".join(("fulgurite", *(part for part in parts if part != "__init__")))
            for name in _CLASS.findall(file.read_text(encoding="utf-8")):
                table.setdefault(name, []).append(module)
    return table


def complete(value: object) -> object:
    """``value`` with each ``class_path: Name`` of the table as a full path, and strategies by their names."""
    if isinstance(value, list):
        return [complete(item) for item in value]
    if not isinstance(value, dict):
        return value
    completed = {key: complete(item) for key, item in value.items()}
    name = completed.get("class_path")
    if isinstance(name, str) and len(modules := class_table().get(name, ())) == 1:
        completed["class_path"] = f"{modules[0]}.{name}"
    for key in ("strategy", "trainer.strategy"):
        named = completed.get(key)
        if isinstance(named, str) and named in STRATEGIES:
            completed[key] = {"class_path": STRATEGIES[named]}
    return completed


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
        typed: command line arguments; names are found anywhere in them, as in ``--model.kind={class_path:
            LoRA}``.
        documents: contents of configs; a string counts if it is a class name and nothing else.
    """
    names = {name for argument in typed for name in _NAME.findall(argument)}
    names.update(text for document in documents for text in scalars(document))
    table = class_table()
    modules = sorted({module for name in names for module in table.get(name, ())})
    for module in modules:
        importlib.import_module(module)
    return modules
