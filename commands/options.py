"""Options of the commands that build no module: from arguments to values, wrong usage as one message."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jsonargparse

from fulgurite.commands.errors import ConfigError
from fulgurite.commands.imports import imports_allowed
from fulgurite.commands.invocation import values_of, without


def with_flags(argv: Sequence[str], flags: Sequence[str]) -> list[str]:
    """``argv`` in which a flag alone means true; a dash within its name counts as an underscore."""
    out = []
    for position, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        name = "--" + name[2:].replace("-", "_") if name.startswith("--") else name
        if name not in flags:
            out.append(argument)
            continue
        following = argv[position + 1] if position + 1 < len(argv) else "--"
        out.append(f"{name}=true" if not equals and following.startswith("--") else name + equals + value)
    return out


def parsed(
    argv: Sequence[str], parser_of: Callable[[], jsonargparse.ArgumentParser], flags: Sequence[str] = ()
) -> tuple[jsonargparse.Namespace, tuple[str, ...]]:
    """The options, and the prefixes that class paths may come from.

    Raises:
        ConfigError: an option is wrong.
    """
    allow = tuple(values_of(argv, "--allow"))
    with imports_allowed(allow):
        try:
            return parser_of().parse_args(without(with_flags(argv, flags), "--allow")), allow
        except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
            raise ConfigError(str(error)) from error
