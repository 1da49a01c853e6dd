"""What ``merge`` prints: what it would do, and what it has done."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from fulgurite.commands.tables import console, plain_table

SHOWN = 12  # tensors with the largest change in the table


def show_merge(change: Mapping[str, float], start: str, what: str, out: Path) -> None:
    """Print what changed most, and where the result is.

    Args:
        change: relative norm by tensor.
        start: what it is a change from.
        what: was merged.
        out: the result.
    """
    table = plain_table(f"Change from the {start}", "tensor", "relative norm")
    ranked = sorted(change.items(), key=lambda item: -item[1])
    for name, value in ranked[:SHOWN]:
        table.add_row(name, f"{value:.4f}")
    screen = console()
    screen.print(table)
    if len(ranked) > SHOWN:
        screen.print(f"and {len(ranked) - SHOWN} tensors that changed less")
    screen.print(f"merged {what}: {out}", soft_wrap=True)


def show_plan(
    method: str, out: Path, sources: Sequence[tuple[str, int, int]], plan: str, held: int, written: int, files: str
) -> None:
    """Print what a merge would read, hold and write.

    Args:
        method: its name.
        out: where the result would be.
        sources: path, number of tensors and bytes of each.
        plan: what would become of the tensors.
        held: bytes of memory.
        written: bytes on disk.
        files: names of the files that would be there.
    """
    table = plain_table(f"{method} into {out}", "source", "tensors", "MB")
    for path, count, size in sources:
        table.add_row(path, f"{count:,}", f"{size / 1e6:,.1f}")
    folder = next(parent for parent in out.absolute().parents if parent.is_dir())
    screen = console()
    screen.print(table)
    screen.print(
        f"{plan}; about {held / 1e6:,.0f} MB of memory, about {written / 1e6:,.1f} MB to write, "
        f"{shutil.disk_usage(folder).free / 1e6:,.0f} MB free",
        soft_wrap=True,
    )
    screen.print(f"files: {files}", soft_wrap=True)
