"""Tables of results, as HTML and for the terminal. Fractions go in, percent with one decimal come out."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


FORGETTING = 1


def percent(value: float | None) -> str:
    """``0.123`` as ``12.3``; a dash where there is no value. What rounds to zero has no sign."""
    if value is None or math.isnan(value):
        return "–"
    text = f"{100 * value:.1f}"
    return "0.0" if text == "-0.0" else text


def html_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    best: Collection[tuple[int, int]] = (),
    row_class: Mapping[int, str] | None = None,
    text_columns: Collection[int] = (),
) -> str:
    """An HTML table that scrolls sideways where the screen is narrow; all texts are escaped.

    Args:
        header: column titles.
        rows: cells, as many in each row as there are titles.
        best: (row, column) of the cells set in bold.
        row_class: style of some rows: ``chosen`` or ``quiet``.
        text_columns: columns beside the first that are set to the left.
    """
    row_class = row_class or {}
    head = "".join(
        f'<th class="text">{escape(t)}</th>' if c in text_columns else f"<th>{escape(t)}</th>"
        for c, t in enumerate(header)
    )
    lines = []
    for r, row in enumerate(rows):
        cells = []
        for c, cell in enumerate(row):
            style = " ".join([*(["best"] if (r, c) in best else []), *(["text"] if c in text_columns else [])])
            cells.append(f'<td class="{style}">{escape(cell)}</td>' if style else f"<td>{escape(cell)}</td>")
        name = f' class="{row_class[r]}"' if r in row_class else ""
        lines.append(f"<tr{name}>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def best_cells(values: Sequence[Sequence[float | None]], skip: Collection[int] = ()) -> set[tuple[int, int]]:
    """(row, column) of the largest value of every column, all of them where the shown value ties.

    Args:
        values: fractions by row and column; None and NaN never win.
        skip: rows out of competition.
    """
    found = set()
    for c in range(len(values[0]) if values else 0):
        column = {
            r: round(100 * row[c], 1)
            for r, row in enumerate(values)
            if r not in skip and row[c] is not None and not math.isnan(row[c])
        }
        if column:
            top = max(column.values())
            found |= {(r, c) for r, v in column.items() if v == top}
    return found


def uncounted(row: Sequence[float | None]) -> str:
    """How many domains have no accuracy in ``row`` and so are in no mean; empty where all have."""
    missing = sum(value is None or math.isnan(value) for value in row)
    return f"not counted, for want of test questions: {missing} of {len(row)} domains" if missing else ""


def mode_values(results: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """By mode: average, forgetting (None where undefined), then the accuracy on each domain in the end."""
    return {
        mode: [scores.get("average"), scores.get("forgetting"), *scores["matrix"][-1]]
        for mode, scores in results["modes"].items()
    }


def plain_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> Table:
    """Any table for the terminal, with a ``caption`` below; the first column is text, the others are numbers."""
    from rich import box
    from rich.markup import escape as escape_markup
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    table.caption, table.caption_justify = caption or None, "left"
    for column, name in enumerate(header):
        table.add_column(escape_markup(name), justify="right" if column else "left")
    for row in rows:
        table.add_row(*map(escape_markup, row))
    return table


def terminal_table(results: Mapping[str, Any], mode_names: Mapping[str, str]) -> Table:
    """The modes for the terminal: average, forgetting, and each domain, in percent."""
    from rich import box
    from rich.markup import escape as escape_markup
    from rich.table import Table

    values = mode_values(results)
    rows = list(values.values())
    skip = [i for i, mode in enumerate(values) if mode == "oracle"]
    best = {(r, c) for r, c in best_cells(rows, skip=skip) if c != FORGETTING}
    table = Table(
        box=box.SIMPLE_HEAD,
        title="Accuracy on test questions after the last stage, %",
        title_justify="left",
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("mode", min_width=16)
    for name in ("average", "forget", *results["domains"]):
        table.add_column(re.sub(r"[_ -]", r"\g<0>\n", escape_markup(name)), justify="right", no_wrap=True)
    for r, (mode, row) in enumerate(values.items()):
        cells = [f"[bold]{percent(v)}[/bold]" if (r, c) in best else percent(v) for c, v in enumerate(row)]
        name = escape_markup(mode_names.get(mode, mode))
        table.add_row(f"{name} *" if mode == results["mode"] else name, *cells)
    notes = ["* the configured mode; bold: best without the oracle, which is told the domain"]
    table.caption = "\n".join([*notes, *filter(None, [uncounted(rows[0][2:])])])
    table.caption_justify = "left"
    return table
