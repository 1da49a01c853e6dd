"""Figures of results, each a `matplotlib.figure.Figure` of its own; nothing touches pyplot's global state.

A matrix has its values in the cells. Sizes are in inches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fulgurite.reports.canvas import CHARACTER, INK, LINES, MARKERS, RULE, SHADES, SOFT, new_axes, new_figure, put_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Matrix = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Panel:
    """One of several matrices beside each other.

    Args:
        title: above it.
        matrix: (T + 1, N) fractions; NaN stays blank.
        note: a line below it.
    """

    title: str
    matrix: Matrix
    note: str = ""


def matrix_figure(
    matrix: Matrix,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    trained_from: Sequence[int | None] | None = None,
) -> Figure:
    """Accuracy on every domain (column) after every stage (row), in percent; see `matrices_figure`."""
    return matrices_figure([Panel(title, matrix)], rows, columns, trained_from)


def matrices_figure(
    panels: Sequence[Panel],
    rows: Sequence[str],
    columns: Sequence[str],
    trained_from: Sequence[int | None] | None = None,
    title: str = "",
    subtitle: str = "",
) -> Figure:
    """Several accuracy matrices with one colour scale.

    Args:
        panels: (T + 1, N) matrices.
        rows: T + 1 names, e.g. ``zero-shot, after a, after b``.
        columns: N names.
        trained_from: for each column the first row whose model was trained on it, None where none was. A line
            divides the rows before from those after.
        title: above all.
        subtitle: smaller, below the title.
    """
    for panel in panels:
        if len(panel.matrix) != len(rows) or any(len(r) != len(columns) for r in panel.matrix):
            raise ValueError(f"matrix {panel.title!r} is not {len(rows)} rows by {len(columns)} columns")
    cell = min(max(0.66, CHARACTER * max(map(len, columns)) + 0.14), 1.25)
    height, gap = 0.38, 0.35
    left = CHARACTER * max(map(len, rows)) + 0.25
    across = min(len(panels), 2 if len(columns) <= 7 else 1)
    down = math.ceil(len(panels) / across)
    noted = any(p.note for p in panels)
    box = (cell * len(columns), height * len(rows))
    above, below = 0.72, 0.34 if noted else 0.12
    head = 0.42 * bool(title) + 0.28 * bool(subtitle)
    width = max(left + across * box[0] + (across - 1) * gap + 0.2, CHARACTER * 1.35 * len(title) + 0.3)
    width = max(width, CHARACTER * len(subtitle) + 0.3)
    figure = new_figure(width, head + down * (above + box[1] + below) + 0.05)
    total = figure.get_figheight()
    if title:
        put_text(figure, 0.12, total - 0.16, title, fontsize=13, weight="bold", va="top", color=INK)
    if subtitle:
        put_text(figure, 0.12, total - 0.48, subtitle, fontsize=9.5, va="top", color=SOFT)
    finite = [v for p in panels for r in p.matrix for v in r if not math.isnan(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    high = max(high, low + 0.05)
    for index, panel in enumerate(panels):
        x = left + (index % across) * (box[0] + gap)
        y = total - head - above - box[1] - (index // across) * (above + box[1] + below)
        axes = new_axes(figure, x, y, *box)
        _cells(axes, panel.matrix, low, high, lambda v: f"{100 * v:.1f}")
        _names(axes, rows if index % across == 0 else [""] * len(rows), columns)
        if trained_from is not None:
            axes.plot(*_staircase(trained_from, len(rows)), color=INK, linewidth=1.8, clip_on=False, zorder=3)
        put_text(figure, x, y + box[1] + above - 0.14, panel.title, fontsize=10.5, weight="bold", va="top")
        if panel.note:
            put_text(figure, x, y - 0.09, panel.note, fontsize=9, va="top", color=SOFT)
    return figure


def confusion_figure(counts: Matrix, names: Sequence[str], title: str = "") -> Figure:
    """Where a router sends each domain's samples: share of the row, and the count below it.

    Args:
        counts: (T, T); row = true domain, column = where the largest weight lies.
        names: T names.
        title: above it.
    """
    sums = [sum(row) for row in counts]
    shares = [[v / s if s else math.nan for v in row] for row, s in zip(counts, sums)]
    size, tall = min(max(0.72, CHARACTER * max(map(len, names)) + 0.14), 1.25), 0.5
    left, above = CHARACTER * max(map(len, names)) + 0.5, 0.78
    box = (size * len(names), tall * len(names))
    width = max(left + box[0] + 0.2, CHARACTER * 1.12 * len(title) + left)
    figure = new_figure(width, above + box[1] + 0.12)
    axes = new_axes(figure, left, 0.12, *box)
    _cells(axes, shares, 0.0, 1.0, lambda v: "")
    for r, row in enumerate(counts):
        for c, count in enumerate(row):
            share = shares[r][c]
            if not math.isnan(share):
                strong = {"weight": "bold"} if r == c else {}
                colour = _on(share)
                axes.text(c, r - 0.14, f"{100 * share:.0f} %", ha="center", va="center", color=colour, **strong)
                axes.text(c, r + 0.24, f"{count:.0f}", ha="center", va="center", color=colour, fontsize=7.5)
    _names(axes, names, names)
    axes.set_ylabel("domain of the question", color=SOFT, fontsize=9)
    put_text(figure, left, above + box[1] - 0.02, title, fontsize=10.5, weight="bold", va="top")
    put_text(figure, left, box[1] + 0.58, "sent to", fontsize=9, va="top", color=SOFT)
    return figure


def lines_figure(
    panels: Sequence[Panel],
    stages: Sequence[str],
    domains: Sequence[str],
    trained_from: Sequence[int | None],
) -> Figure:
    """Accuracy over the stages, a line per domain: dotted before the domain was trained, full after.

    Args:
        panels: (T + 1, N) matrices; at most a few.
        stages: T + 1 names.
        domains: N names.
        trained_from: see `matrices_figure`.
    """
    label = CHARACTER * max(map(len, domains)) + 0.25
    wide, tall, gap = max(2.6, 0.62 * len(stages)), 2.6, 0.3
    foot = 0.6 * CHARACTER * max(map(len, stages)) + 0.35
    figure = new_figure(0.65 + len(panels) * (wide + gap + label), foot + tall + 0.45)
    finite = [100 * v for p in panels for r in p.matrix for v in r if not math.isnan(v)]
    low, high = (min(finite) - 4, max(finite) + 4) if finite else (0, 100)
    for index, panel in enumerate(panels):
        axes = new_axes(figure, 0.65 + index * (wide + gap + label), foot, wide, tall)
        ends = []
        for i, name in enumerate(domains):
            values = [100 * row[i] for row in panel.matrix]
            start = trained_from[i] if trained_from[i] is not None else len(stages) - 1
            style: dict[str, Any] = {"color": LINES[i % len(LINES)], "linewidth": 1.8}
            axes.plot(range(start + 1), values[: start + 1], linestyle=":", **style)
            axes.plot(range(start, len(stages)), values[start:], **style)
            axes.plot([start], values[start : start + 1], marker=MARKERS[i % 8], markersize=6, **style)
            if not math.isnan(values[-1]):
                ends.append((values[-1], name, style["color"]))
        axes.set_xlim(-0.2, len(stages) - 0.8)
        axes.set_ylim(low, high)
        for (_, name, colour), y in zip(sorted(ends), _spread([e[0] for e in ends], (high - low) * 0.066)):
            axes.text(len(stages) - 0.72, y, name, color=colour, va="center", fontsize=9, clip_on=False)
        axes.set_xticks(range(len(stages)), stages, rotation=35, ha="right", rotation_mode="anchor", fontsize=8.5)
        axes.tick_params(axis="y", labelsize=8.5)
        axes.grid(axis="y", color=RULE, linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(panel.title, fontsize=10.5, weight="bold", loc="left", color=INK)
        if index == 0:
            axes.set_ylabel("accuracy, %", color=SOFT, fontsize=9)
    return figure


def bars_figure(
    names: Sequence[str],
    values: Sequence[float],
    errors: Sequence[float],
    chosen: int | None = None,
    points: Sequence[Sequence[float]] = (),
    title: str = "",
) -> Figure:
    """One bar per mode with its standard error, and a small dot for every domain.

    Args:
        names: M modes, top to bottom.
        values: M fractions.
        errors: M standard errors, NaN for none.
        chosen: the bar set in the strong colour.
        points: M lists of the domains' fractions.
        title: above it.
    """
    left = CHARACTER * max(map(len, names)) + 0.25
    figure = new_figure(left + 5.2, 0.36 * len(names) + 0.95)
    axes = new_axes(figure, left, 0.5, 4.5, 0.36 * len(names))
    colours = [LINES[0] if i == chosen else "#a9bcc4" for i in range(len(names))]
    axes.barh(range(len(names)), [100 * v for v in values], height=0.66, color=colours, zorder=1)
    for y, row in enumerate(points):
        axes.scatter([100 * v for v in row], [y] * len(row), s=11, color=INK, alpha=0.45, zorder=2, linewidths=0)
    for y, (value, error) in enumerate(zip(values, errors)):
        if not math.isnan(error):
            axes.errorbar(100 * value, y, xerr=100 * error, color=INK, linewidth=1.3, capsize=3, zorder=3)
        if not math.isnan(value):
            axes.text(102.5, y, f"{100 * value:.1f}", va="center", fontsize=9, color=INK, clip_on=False)
    axes.set_xlim(0, 100)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("accuracy, %", color=SOFT, fontsize=9)
    axes.tick_params(axis="x", labelsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(title, fontsize=10.5, weight="bold", loc="left", color=INK)
    return figure


def _cells(axes: Axes, matrix: Matrix, low: float, high: float, show: Any) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("shades", list(SHADES)).with_extremes(bad="white")
    axes.imshow([list(r) for r in matrix], cmap=shades, vmin=low, vmax=high, aspect="auto")
    for r, row in enumerate(matrix):
        for c, value in enumerate(row):
            if not math.isnan(value) and show(value):
                colour = _on((value - low) / (high - low))
                axes.text(c, r, show(value), ha="center", va="center", fontsize=9.5, color=colour)
    axes.set_xticks([i + 0.5 for i in range(len(matrix[0]) - 1)], minor=True)
    axes.set_yticks([i + 0.5 for i in range(len(matrix) - 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def _names(axes: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    axes.set_xticks(range(len(columns)), columns, fontsize=9, color=INK)
    axes.set_yticks(range(len(rows)), rows, fontsize=9, color=INK)
    axes.xaxis.tick_top()
    axes.tick_params(which="both", length=0)


def _on(depth: float) -> str:
    return "white" if depth > 0.58 else INK


def _staircase(trained_from: Sequence[int | None], rows: int) -> tuple[list[float], list[float]]:
    """The line above the first trained row of every column."""
    x: list[float] = []
    y: list[float] = []
    for column, first in enumerate(trained_from):
        level = (rows if first is None else first) - 0.5
        x += [column - 0.5, column + 0.5]
        y += [level, level]
    return x, y


def _spread(values: Sequence[float], least: float) -> list[float]:
    """Positions near the sorted ``values``, at least ``least`` apart."""
    placed = sorted(values)
    for _ in range(100):
        moved = False
        for i in range(len(placed) - 1):
            lack = least - (placed[i + 1] - placed[i])
            if lack > 1e-9:
                placed[i] -= lack / 2
                placed[i + 1] += lack / 2
                moved = True
        if not moved:
            break
    return placed
