"""``verify PATH``: check every recorded digest below a folder, and say which files have none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from fulgurite.commands.errors import BAD_INPUT, DONE
from fulgurite.commands.plain import PlainParser
from fulgurite.commands.tables import console, plain_table

if TYPE_CHECKING:
    from fulgurite.checkpoints import FileState

LISTED = 8  # files without a digest that are shown per folder
COLOURS = {"good": "green", "damaged": "bold red", "missing": "bold red", "not covered": "yellow", "leftover": "cyan"}
EPILOG = """\
States: good (its digest is the recorded one), damaged, missing, not covered (no digest was recorded, so
nothing is known of it), leftover (of an interrupted write; cleared when the run goes on).
Exit code: 0 if something was checked and nothing is damaged or missing, 2 otherwise."""


def run(command: str, argv: list[str]) -> int:
    """Print a table of all files; 2 if any is damaged or missing, or none has a digest."""
    parser = PlainParser(
        prog="fulgurite verify", description="Check every digest of checkpoints, runs and stores.", epilog=EPILOG
    )
    parser.add_argument(
        "path",
        type=Path,
        nargs="+",
        help="run, folder of runs, checkpoints folder, checkpoint, adapters, feature store, index",
    )
    options = parser.parse_args(argv)
    from fulgurite.checkpoints import audit

    return max(show(path, audit(path)) for path in options.path)


def show(root: Path, states: list[FileState]) -> int:
    """Print what was found below ``root``; the exit code that it means."""
    table = plain_table(str(root), "state", "file", "remark")
    for state, name, note in rows(root, states):
        table.add_row(state, name, note, style=COLOURS[state])
    out = console()
    out.print(table)
    for problem in (state.note for state in states if not state.sound):
        out.print(problem, soft_wrap=True)
    counts = Counter(state.state for state in states)
    checked = sum(counts[state] for state in ("good", "damaged", "missing"))
    lost = counts["damaged"] + counts["missing"]
    summary = ", ".join(f"{counts[state]} {state}" for state in COLOURS if counts[state]) or "no files"
    verdict = "DAMAGED" if lost else "every recorded digest is right" if checked else "nothing here has a digest"
    out.print(f"{root}: {summary}: {verdict}")
    return DONE if checked and not lost else BAD_INPUT


def rows(root: Path, states: Iterable[FileState]) -> Iterator[tuple[str, str, str]]:
    """State, name and remark of each row; many files without a digest in one folder are one row."""
    for (folder, state), group in groupby(states, key=lambda s: (s.path.parent, s.state)):
        files = list(group)
        shown = files if state != "not covered" or len(files) <= LISTED else files[: LISTED - 1]
        for file in shown:
            yield state, _relative(file.path, root), file.note if file.sound else "see below"
        if len(shown) < len(files):
            yield state, _relative(folder, root), f"and {len(files) - len(shown)} more files"


def _relative(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
