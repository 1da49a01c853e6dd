"""What the user typed, read before any parser exists: configs, allowed prefixes, names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fulgurite.commands.errors import ConfigError
from fulgurite.commands.yaml_loader import load_file


@dataclass(frozen=True)
class Invocation:
    """One call of a Trainer command.

    Attributes:
        command: fit, validate, test or predict.
        typed: the arguments as typed.
        configs: the ``--config`` files, left to right.
        documents: their contents, one mapping each.
        allow: the prefixes of ``--allow``.
    """

    command: str
    typed: tuple[str, ...]
    configs: tuple[Path, ...]
    documents: tuple[dict, ...]
    allow: tuple[str, ...]

    @classmethod
    def of(cls, command: str, argv: list[str]) -> Invocation:
        """Read the arguments and every config file that they name. Raises ``ConfigError``."""
        configs = tuple(Path(value) for value in values_of(argv, "--config", "-c"))
        documents = tuple(load_file(path) for path in configs)
        allow = [*values_of(argv, "--allow")]
        return cls(command, tuple(argv), configs, documents, tuple(allow))

    @property
    def arguments(self) -> list[str]:
        """The arguments for the parser: all but ``--allow``, which a config must not be able to set."""
        return without(self.typed, "--allow")

    @property
    def words(self) -> str:
        """All typed values, where short class names are looked for."""
        return " ".join(self.typed)


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
