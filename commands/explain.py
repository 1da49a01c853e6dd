"""Parser errors in one short message: key, value, expected, and the nearest valid names."""

from __future__ import annotations

from fulgurite.commands.errors import ConfigError


def explain(error: Exception, parser: object, invocation: object) -> ConfigError:
    """The error of a parser as a ``ConfigError``."""
    return ConfigError(str(error))
