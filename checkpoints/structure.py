"""Modules that are not as the model's class builds them: recorded as data, rebuilt before weights load.

A checkpoint whose model was pruned, quantized or otherwise changed in shape says so in its manifest's structure:

    {"modules": {submodule: {"class": "torch.nn.modules.linear.Linear", "arguments": {"in_features": 6, ...}}}}

Classes come from this package's methods and from ``torch.nn`` alone, and take plain values.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from fulgurite.checkpoints.errors import MismatchError, RefusedError
from fulgurite.checkpoints.shards import SHARDS

MODULES = "modules"
KNOWN = (MODULES, SHARDS)
PREFIXES = ("fulgurite.methods.", "torch.nn.modules.")


def rebuild(model: nn.Module, structure: Mapping[str, Any]) -> None:
    """Replace the submodules that ``structure`` lists by new ones of its classes and arguments; values come later.

    What was replaced is kept as ``model.rebuilt``, for the structure of later checkpoints.

    Raises:
        MismatchError: a submodule is not in the model, or the structure holds what this version cannot rebuild.
        RefusedError: a class is not one of the admitted ones, or does not take its arguments.
    """
    unknown = sorted(set(structure) - set(KNOWN))
    if unknown:
        raise MismatchError(
            f"the checkpoint's structure holds {', '.join(unknown)}, which this version of fulgurite cannot rebuild: "
            "use the version that wrote it"
        )
    built = {name: build(name, entry) for name, entry in structure.get(MODULES, {}).items()}
    missing = [name for name in built if not has_submodule(model, name)]
    if missing:
        raise MismatchError(
            f"the checkpoint's structure names {missing[0]} ({len(missing)} of {len(built)} submodules), which "
            f"{type(model).__name__} does not have: use the settings that the checkpoint was made with"
        )
    for name, module in built.items():
        parent, _, child = name.rpartition(".")
        old = model.get_submodule(name)
        reference = next(old.parameters(), None)
        if reference is not None:
            module.to(reference.device)
        setattr(model.get_submodule(parent), child, module.train(old.training))
    if built:
        model.rebuilt = {**getattr(model, "rebuilt", {}), **structure[MODULES]}


def build(name: str, entry: Any) -> nn.Module:
    """The module that one entry describes.

    Raises:
        RefusedError: the class is not admitted, is none, or does not take the arguments.
    """
    try:
        path, arguments = entry["class"], dict(entry["arguments"])
        admitted = isinstance(path, str) and path.startswith(PREFIXES)
    except (TypeError, KeyError, ValueError) as error:
        raise RefusedError(f"the structure of {name} is {str(entry)[:80]!r}, not a class and its arguments") from error
    if not admitted:
        raise RefusedError(f"the structure of {name} names the class {str(path)[:80]!r}; only {PREFIXES} are built")
    module, _, kind = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), kind)
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise TypeError(f"{path} is no module")
        return cls(**arguments)
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise RefusedError(f"the structure of {name}: {path} cannot be built with {arguments}: {error}") from error


def has_submodule(model: nn.Module, name: str) -> bool:
    """Whether ``model`` has a submodule of that name."""
    try:
        return bool(name) and model.get_submodule(name) is not None
    except AttributeError:
        return False
