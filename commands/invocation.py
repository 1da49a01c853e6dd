"""What the user typed, read before any parser exists: configs, allowed prefixes, names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fulgurite.commands.errors import ConfigError
from fulgurite.commands.names import STRATEGIES
from fulgurite.commands.yaml_loader import load_file, load_text

FLAGS = ("resume_from_older", "test_after_fit")  # true where nothing follows


@dataclass(frozen=True)
class Invocation:
    """One call of a Trainer command.

    Attributes:
        command: fit, validate, test or predict.
        typed: the arguments as typed, in the form of `spelt`.
        configs: the ``--config`` files, left to right.
        documents: their contents, one mapping each.
        allow: the prefixes of ``--allow``.
        arguments: what the parser gets: all but ``--allow``, which no config can set.
    """

    command: str
    typed: tuple[str, ...]
    configs: tuple[Path, ...]
    documents: tuple[dict, ...]
    allow: tuple[str, ...]
    arguments: tuple[str, ...]

    @classmethod
    def of(cls, command: str, argv: Sequence[str]) -> Invocation:
        """Read the arguments and every config file that they name. Raises ``ConfigError``."""
        argv = spelt(argv)
        configs = tuple(Path(value) for value in values_of(argv, "--config", "-c"))
        documents = tuple(load_file(path) for path in configs)
        allow = tuple(values_of(argv, "--allow"))
        arguments = tuple(with_strategy(without(argv, "--allow")))
        return cls(command, tuple(argv), configs, documents, allow, arguments)

    def on_top_of(self, stored: Path) -> Invocation:
        """The same call with a run's config below everything else."""
        configs, documents = (stored, *self.configs), (load_file(stored), *self.documents)
        arguments = ("--config", str(stored), *self.arguments)
        return replace(self, configs=configs, documents=documents, arguments=arguments)

    def option(self, name: str) -> str | None:
        """A text option as it will be parsed: the command line's last value, else that of the last config.

        Raises ``ConfigError`` where a config gives something else than text.
        """
        value, where = self._last(name)
        if where == "command line":
            return None if value in ("null", "") else value
        if not isinstance(value, str | None):
            raise ConfigError(f"{name}: expected text, got {str(value)[:80]!r} ({where})")
        return value

    def flag(self, name: str) -> bool:
        """An option that is true or false, found as `option` finds one; False where nobody sets it.

        Raises ``ConfigError`` for any other value.
        """
        value, where = self._last(name)
        if where == "command line":
            value = load_text(value, f"--{name}")
        if not isinstance(value, bool) and where:
            raise ConfigError(f"{name}: expected true or false, got {str(value)[:80]!r} ({where})")
        return bool(value)

    def _last(self, name: str) -> tuple[Any, str]:
        """The value that holds and who set it; (None, "") where nobody did."""
        typed = values_of(self.typed, f"--{name}")
        if typed:
            return typed[-1], "command line"
        for path, document in reversed(list(zip(self.configs, self.documents))):
            found, value = _look_up(document, name)
            if found:
                return value, str(path)
        return None, ""

    def source_of(self, key: str) -> str:
        """Who set a dotted key: "command line", the name of the last config that has it, or "default"."""
        key = key.replace(".init_args", "")
        flags = [argument.partition("=")[0].removesuffix("+").replace(".init_args", "") for argument in self.typed]
        if any(flag == f"--{key}" or f"--{key}".startswith(f"{flag}.") for flag in flags if flag.startswith("--")):
            return "command line"
        files = [path for path, document in zip(self.configs, self.documents) if _holds(document, key)]
        return str(files[-1]) if files else "default"


def _look_up(document: dict, name: str) -> tuple[bool, object]:
    """Whether a dotted name is in a nested mapping, and its value."""
    head, _, rest = name.partition(".")
    if name in document:
        return True, document[name]
    inner = document.get(head)
    return _look_up(inner, rest) if rest and isinstance(inner, dict) else (False, None)


def _holds(document: object, key: str) -> bool:
    """Whether a nested mapping sets a dotted key, ``init_args`` left out; keys may be dotted themselves."""
    if not isinstance(document, dict):
        return False
    for name, value in document.items():
        name = str(name).replace(".init_args", "")
        if name == key or (name == "init_args" and _holds(value, key)):
            return True
        if key.startswith(f"{name}.") and _holds(value, key.removeprefix(f"{name}.")):
            return True
    return False


def spelt(argv: Sequence[str]) -> list[str]:
    """``argv`` with ``--some-option`` as ``--some_option``, and ``true`` behind each of `FLAGS` that has no value.

    Names with a dot stay: they may hold keys of the user's own.
    """
    kept = []
    for argument, following in zip(argv, [*argv[1:], "--"]):
        name, equals, value = argument.partition("=")
        if name.startswith("--") and "." not in name:
            name = "--" + name[2:].replace("-", "_")
            if name[2:] in FLAGS and not equals and following.startswith("-"):
                equals, value = "=", "true"
            argument = name + equals + value
        kept.append(argument)
    return kept


def values_of(argv: Sequence[str], *flags: str) -> list[str]:
    """Values of a flag that may be repeated, written ``--flag value`` or ``--flag=value``."""
    values = []
    for position, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name not in flags:
            continue
        if not equals:
            if position + 1 == len(argv):
                raise ConfigError(f"{name}: a value must follow")
            value = argv[position + 1]
        values.append(value)
    return values


def with_strategy(argv: Sequence[str]) -> list[str]:
    """``argv`` with the value of ``--trainer.strategy`` as a full path, where it names a strategy of this
    project.
    """
    flag, kept = "--trainer.strategy", []
    for position, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name == flag and equals:
            argument = f"{flag}={_strategy(value)}"
        elif position and argv[position - 1] == flag:
            argument = _strategy(argument)
        kept.append(argument)
    return kept


def _strategy(name: str) -> str:
    return json.dumps({"class_path": STRATEGIES[name]}) if name in STRATEGIES else name


def without(argv: Sequence[str], *flags: str) -> list[str]:
    """``argv`` without the given flags and their values."""
    kept, skip = [], False
    for argument in argv:
        name, equals, _ = argument.partition("=")
        if skip:
            skip = False
        elif name in flags:
            skip = not equals
        else:
            kept.append(argument)
    return kept
