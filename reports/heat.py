"""Figures of one number per layer and model or pair of models: heat maps with a colour bar, and dots.

Rows are layers, as tall as it takes to read every name. Values stand in the cells of narrow matrices; wide ones have
colours alone. What has no value (NaN) is hatched.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from fulgurite.reports.canvas import (
    CHARACTER,
    ENDS,
    INK,
    LINES,
    MARKERS,
    RULE,
    SHADES,
    SOFT,
    new_axes,
    new_figure,
    put_text,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Matrix = Sequence[Sequence[float]]
Scale = Literal["signed", "share"]
ROW, NAME_SIZE, FOOT = 0.235, 8.5, 0.62
WITH_VALUES = 10  # columns of a matrix that has its values in the cells
LONGEST = 38  # characters of a row's name
LIMITS = (0.1, 0.2, 0.5, 1.0)


def heat_figure(
    matrix: Matrix, rows: Sequence[str], columns: Sequence[str], title: str, meaning: str, scale: Scale, note: str = ""
) -> Figure:
    """A heat map.

    Args:
        matrix: (L, N) numbers in [-1, 1]; NaN where there is none.
        rows: L names; long ones lose their beginning.
        columns: N short names.
        title: above it.
        meaning: of the colours, at the colour bar.
        scale: ``"signed"`` has two ends and runs from -limit to limit, ``"share"`` from 0 to limit; the limit is the
            next of 0.1, 0.2, 0.5 and 1 above all values.
        note: smaller, below the title.

    Raises:
        ValueError: the matrix has another shape.
    """
    from matplotlib.colors import LinearSegmentedColormap

    if len(matrix) != len(rows) or any(len(row) != len(columns) for row in matrix):
        raise ValueError(f"the matrix of {title!r} is not {len(rows)} rows by {len(columns)} columns")
    names = [shortened(name) for name in rows]
    valued = len(columns) <= WITH_VALUES
    cell = max(0.5 if valued else 0.3, CHARACTER * max(map(len, columns)) + 0.08)
    left, head = CHARACTER * max(map(len, names)) + 0.2, 0.66 + 0.22 * bool(note)
    box = cell * len(columns), ROW * len(rows)
    figure = new_figure(wide_enough(left + box[0] + 0.2, title, note), head + box[1] + FOOT)
    axes = new_axes(figure, left, FOOT, *box)
    limit = limit_of(value for row in matrix for value in row)
    low = -limit if scale == "signed" else 0.0
    shades = LinearSegmentedColormap.from_list("shades", list(ENDS if scale == "signed" else SHADES))
    axes.set_facecolor("#ffffff")
    picture = axes.imshow(
        [list(row) for row in matrix], cmap=shades.with_extremes(bad="none"), vmin=low, vmax=limit, aspect="auto"
    )
    places = [(r, c, value) for r, row in enumerate(matrix) for c, value in enumerate(row)]
    for r, c, value in places:
        if math.isnan(value):
            axes.fill_between(
                [c - 0.5, c + 0.5], r - 0.5, r + 0.5, facecolor="none", edgecolor=RULE, hatch="////", lw=0
            )
        elif valued:
            dark = abs(value) / limit > 0.62
            axes.text(c, r, shown(value), ha="center", va="center", fontsize=8, color="white" if dark else INK)
    frame_of(axes, names)
    axes.set_xticks(range(len(columns)), columns, fontsize=NAME_SIZE, color=INK, parse_math=False)
    axes.xaxis.tick_top()
    axes.tick_params(which="both", length=0)
    axes.set_xticks([i + 0.5 for i in range(len(columns) - 1)], minor=True)
    axes.set_yticks([i + 0.5 for i in range(len(rows) - 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.0)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    above(figure, title, note)
    bar = new_axes(figure, 0.3, 0.3, min(figure.get_figwidth() - 0.6, 2.6), 0.11)
    figure.colorbar(picture, cax=bar, orientation="horizontal", ticks=[low, (low + limit) / 2, limit])
    bar.tick_params(labelsize=8, length=2, colors=INK)
    bar.spines[:].set_visible(False)
    bar.set_title(meaning, fontsize=8, color=SOFT, loc="left", pad=3)
    return figure


def dots_figure(
    series: Mapping[str, Sequence[float]],
    rows: Sequence[str],
    title: str,
    meaning: str,
    strong: str | None = None,
    note: str = "",
) -> Figure:
    """One row per layer with a mark for every series, on a logarithmic scale where values are far apart.

    Args:
        series: name to L numbers; 0 and NaN have no mark.
        rows: L names.
        title: above it.
        meaning: of the axis.
        strong: the series in black.
        note: smaller, below the title.
    """
    names = [shortened(name) for name in rows]
    keys = [shortened(name) for name in series]
    left, wide = CHARACTER * max(map(len, names)) + 0.2, 4.6
    key_width = CHARACTER * max(map(len, keys)) + 0.7
    head, foot = 0.4 + 0.22 * bool(note), 0.55
    tall = ROW * max(len(rows), len(keys))
    figure = new_figure(wide_enough(left + wide + key_width, title, note), head + tall + foot)
    axes = new_axes(figure, left, foot + tall - ROW * len(rows), wide, ROW * len(rows))
    positive = [value for values in series.values() for value in values if value > 0 and math.isfinite(value)]
    logarithmic = bool(positive) and max(positive) > 30 * min(positive)
    step = 0.5 / max(len(series), 1)
    for number, (name, values) in enumerate(series.items()):
        offset = (number - (len(series) - 1) / 2) * step
        style = (
            {"color": INK, "marker": "|", "markersize": 9, "markeredgewidth": 2.2}
            if name == strong
            else {
                "color": LINES[number % len(LINES)],
                "marker": MARKERS[(number + number // len(LINES)) % len(MARKERS)],
                "markersize": 4.5,
            }
        )
        marked = [value if value > 0 else math.nan for value in values]
        axes.plot(marked, [r + offset for r in range(len(rows))], linestyle="none", zorder=3, **style)
        key = new_axes(figure, left + wide + 0.26, foot + tall - ROW * (number + 1), 0.2, ROW)
        key.plot([0], [0], linestyle="none", **style)
        key.set_axis_off()
        y = foot + tall - ROW * (number + 0.5)
        put_text(
            figure, left + wide + 0.5, y, keys[number], fontsize=NAME_SIZE, va="center", color=INK, parse_math=False
        )
    frame_of(axes, names)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    if logarithmic:
        axes.set_xscale("log")
    else:
        axes.set_xlim(0, 1.06 * max(positive, default=1.0))
    for r in range(0, len(rows), 2):
        axes.axhspan(r - 0.5, r + 0.5, color="#f6f4ec", zorder=0, lw=0)
    axes.grid(axis="x", color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", labelsize=8, colors=INK)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(meaning, fontsize=8.5, color=SOFT)
    above(figure, title, note)
    return figure


def limit_of(values: Iterable[float]) -> float:
    """The first of `LIMITS` that no value is beyond."""
    largest = max((abs(value) for value in values if not math.isnan(value)), default=0.0)
    return next((limit for limit in LIMITS if largest <= limit), LIMITS[-1])


def shown(value: float) -> str:
    """Two decimals, without a sign where that is zero."""
    return f"{value:z.2f}".replace("-", "−")


def shortened(name: str, longest: int = LONGEST) -> str:
    """The name, or its end where it is too long, from one of its parts on."""
    if len(name) <= longest:
        return name
    end = name[1 - longest :]
    return "…" + (end.partition(".")[2] or end)


def wide_enough(width: float, title: str, note: str) -> float:
    """Of a figure, so that its texts fit, too."""
    return max(width, CHARACTER * 1.2 * len(title) + 0.3, CHARACTER * len(note) + 0.3)


def above(figure: Figure, title: str, note: str) -> None:
    """Title and note in the upper left corner."""
    top = figure.get_figheight()
    put_text(figure, 0.12, top - 0.12, title, fontsize=10.5, weight="bold", va="top", color=INK, parse_math=False)
    put_text(figure, 0.12, top - 0.36, note, fontsize=8.5, va="top", color=SOFT, parse_math=False)


def frame_of(axes: Axes, names: Sequence[str]) -> None:
    """Names of the rows, and no box."""
    axes.set_yticks(range(len(names)), names, fontsize=NAME_SIZE, color=INK, parse_math=False)
    axes.spines[:].set_visible(False)
