"""A parser for the commands that need no classes: wrong usage is one message."""

from __future__ import annotations

import argparse
from typing import NoReturn

from fulgurite.commands.errors import ConfigError


class PlainParser(argparse.ArgumentParser):
    """An argparse parser that raises ``ConfigError`` for wrong usage and knows no abbreviations."""

    def __init__(self, **settings: object) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise the message, with where to read more."""
        raise ConfigError(f"{message}; see {self.prog} --help")
