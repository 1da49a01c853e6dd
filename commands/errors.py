"""From exceptions to exit codes: wrong config and wrong input become one short message."""

from __future__ import annotations

import dis
import re
import sys
from collections.abc import Callable

LIMIT = 1800  # bytes of one message; with the prefix it stays under 2 kB

DONE, BAD_INPUT, NOT_FINITE, SIGNALLED = 0, 2, 3, 128
INTERRUPTED = SIGNALLED + 2  # a second Ctrl-C, without a checkpoint


class ConfigError(ValueError):
    """A config file or a command line option is wrong. The text names what, where, and what would work."""


def shorten(text: str, limit: int = LIMIT) -> str:
    """``text`` with its middle left out where its UTF-8 form would be longer than ``limit`` bytes."""
    raw = text.encode("utf-8", "replace")
    if len(raw) <= limit:
        return text
    head, tail = raw[: limit * 3 // 4], raw[-(limit // 4) + 10 :]
    return f"{head.decode('utf-8', 'ignore')} [...] {tail.decode('utf-8', 'ignore')}"


def bad_input_types() -> tuple[type[Exception], ...]:
    """The errors that a user mends in a config, a file or an option, so that a traceback would say nothing
    more.
    """
    from fulgurite.checkpoints.errors import CheckpointError
    from fulgurite.samples.errors import DataError

    return ConfigError, DataError, CheckpointError


def message_of(error: BaseException) -> str:
    """The text of an error without the traceback that a data loading worker wraps around it."""
    text = str(error)
    if text.startswith("Caught ") and "worker process" in text:
        text = re.split(rf"\n(?:\S+\.)?{type(error).__name__}: ", text)[-1].strip()
    return text


def refused_on_purpose(error: Exception) -> bool:
    """Whether a ``raise`` statement of this package made an error, and no slip: ``int("x")`` is a ValueError too."""
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    here = str(last.tb_frame.f_globals.get("__name__")).startswith("fulgurite.")
    return here and dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


def exit_code_of(run: Callable[[str, list[str]], int], command: str, argv: list[str]) -> int:
    """Run a command and give its exit code; an error that the user mends prints one message and gives 2.

    Bad input is: a `ConfigError` (what a constructor of the config refuses is made one, see ``building.py``), a
    `DataError` or a `CheckpointError`, wherever it comes from; and a ValueError or LookupError of a ``raise`` statement
    of this package, since those are its words for settings. All others are bugs and keep their traceback.
    """
    try:
        return run(command, argv)
    except SystemExit as ended:  # --help and --print_config
        return int(ended.code or 0)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, LookupError, *bad_input_types()) as error:
        if not isinstance(error, bad_input_types()) and not refused_on_purpose(error):
            raise
        print(f"fulgurite {command}: {shorten(message_of(error))}", file=sys.stderr)
        return BAD_INPUT
