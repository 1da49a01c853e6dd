"""Tables of the commands on files."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDE = 200  # columns where nobody looks at a terminal, so that names stay on one line


def console() -> Console:
    """A console on the present stdout: as wide as the terminal, wide and plain in a pipe or a file."""
    from rich.console import Console

    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDE, markup=False, highlight=False)


def plain_table(title: str, *columns: str) -> Table:
    """An empty table; columns without names have no header row. Cells are plain text, never markup."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title=Text(title, "bold"), title_justify="left", show_header=any(columns))
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def size_text(num_bytes: int) -> str:
    """A number of bytes with a unit: ``512 B``, ``1.5 kB``, ``3.2 MB`` (powers of 1000)."""
    size, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.1f} {unit}" if unit != "B" else f"{num_bytes} B"
