"""A bar for work on files: bytes done, rate and time left, where somebody looks at a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fulgurite.commands.tables import console

Seen = Callable[[str, int], None]


@contextmanager
def progress(num_entries: int, num_bytes: int) -> Iterator[Seen | None]:
    """A callback for entries that were read, which moves a bar per pass; None where nobody looks.

    Args:
        num_entries: of one pass.
        num_bytes: that they take in all models together.
    """
    screen = console()
    if not screen.is_terminal:
        yield None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=screen, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def seen(stage: str, count: int) -> None:
            if stage not in tasks:
                tasks.setdefault(stage, bars.add_task(stage, total=num_bytes))
            bars.advance(tasks[stage], count * num_bytes / max(num_entries, 1))

        yield seen
