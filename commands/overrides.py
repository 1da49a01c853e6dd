"""Options that would change less, or more, than they seem to: into a list, and to another class."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import yaml

from fulgurite.commands.differences import leaves
from fulgurite.commands.errors import ConfigError, shorten
from fulgurite.commands.invocation import Invocation
from fulgurite.commands.names import class_table
from fulgurite.commands.yaml_loader import load_text


def refuse_into_lists(invocation: Invocation) -> None:
    """Refuse an option below a list, as ``--model.adapters.kind``: the parser would change the last entry alone.

    An entry that the command line itself has set by name before (``--trainer.callbacks+=EarlyStopping``) may be
    completed (``--trainer.callbacks.monitor=...``). Raises `ConfigError` with the list as it stands, to be changed.
    """
    lists: dict[str, tuple[list, str]] = {}
    for path, document in zip(invocation.configs, invocation.documents):
        lists |= {key: (value, str(path)) for key, value in settings(document) if isinstance(value, list)}
    for flag, value in options(invocation.typed):
        key = flag.removesuffix("+")
        above = next((name for name in lists if key.startswith(f"{name}.")), None)
        if above is not None:
            entries, where = lists[above]
            flow = yaml.safe_dump(entries, default_flow_style=True, sort_keys=False, width=10**6).strip()
            raise ConfigError(
                f"{key}: {above} is a list of {len(entries)} ({where}), and this would change its last entry alone. "
                f"Give the whole list, in a YAML file after it or as --{above} '{shorten(flow, 1000)}'"
            )
        given = load_text(value, f"--{key}") if value.startswith("[") else value
        if isinstance(given, list):
            lists[key] = (given, "command line")
        else:
            lists.pop(key, None)


def options(typed: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Dotted key, ``init_args`` left out, and value of every option of the command line."""
    typed = list(typed)
    for argument, following in zip(typed, [*typed[1:], ""]):
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            yield bare(name.removeprefix("--")), value if equals else following


def dropped(invocation: Invocation, config: dict[str, Any]) -> list[str]:
    """A line for each class that has replaced another, with the settings of the other that it has no options for.

    Args:
        invocation: what was written.
        config: the complete config that the parser has made of it.
    """
    used = dict(settings(config))
    known = {key.rsplit(".", n)[0] for key in used for n in range(key.count(".") + 1)}
    classes = {
        key.removesuffix(".class_path"): str(value) for key, value in used.items() if key.endswith(".class_path")
    }
    lost: dict[str, dict[str, None]] = {}
    for document in invocation.documents:
        written = dict(settings(document))
        for key in written:
            if key in known or key.endswith("class_path"):
                continue
            parts = key.split(".")
            first = next(n for n in range(1, len(parts) + 1) if ".".join(parts[:n]) not in known)
            owner = ".".join(parts[: first - 1])
            if owner in classes and not same_class(written.get(f"{owner}.class_path"), classes[owner]):
                lost.setdefault(owner, {})[parts[first - 1]] = None
    return [
        f"{owner}: {classes[owner]} ({invocation.source_of(f'{owner}.class_path')}) has no {', '.join(names)}; "
        "what the configs set there for another class is left out"
        for owner, names in lost.items()
    ]


def same_class(written: object, path: str) -> bool:
    """Whether a config names the class of a full path, by it or by its short name."""
    return written == path or (written in class_table() and path.rpartition(".")[2] == written)


def settings(document: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """Dotted key, ``init_args`` left out, and value of every leaf; a class without arguments has ``class_path`` too."""
    for name, value in document.items():
        for key, leaf in leaves(value, str(name)):
            yield bare(key), leaf


def bare(key: str) -> str:
    """A dotted key without ``init_args``."""
    return ".".join(part for part in key.split(".") if part != "init_args")
