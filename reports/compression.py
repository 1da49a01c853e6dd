"""Sections on compressed models: sparsity, bits and error of layers, importance of blocks, score against size."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from fulgurite.methods.compression import LayerReport, totals
from fulgurite.reports.canvas import INK, LINES, RULE, SOFT, new_axes, new_figure
from fulgurite.reports.heat import above, dots_figure, shortened
from fulgurite.reports.images import img_tag
from fulgurite.reports.page import Section
from fulgurite.reports.tables import html_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_ROWS = 120  # of a picture; a longer tower is shown in full in the table of layers alone


@dataclass(frozen=True)
class Point:
    """One model of a trade-off.

    Args:
        name: what it is called.
        size: bits per weight of the compressed layers, or bytes.
        score: the larger the better, or a perplexity.
    """

    name: str
    size: float
    score: float


def compression_sections(
    title: str, layers: Sequence[LayerReport], importance: Mapping[str, float] | None = None
) -> list[Section]:
    """What became of the layers of one model.

    Args:
        title: what the model is called.
        layers: in the order of the data.
        importance: of blocks (or layers, or towers), by name, where an allocation has measured it.
    """
    html = [towers_table(layers)]
    for tower in dict.fromkeys(each.tower for each in layers):
        own = [each for each in layers if each.tower == tower]
        for key, meaning in (
            ("sparsity", "share of weights that are 0"),
            ("bits", "bits per weight"),
            ("error", "relative squared error of the layer's output"),
        ):
            if tells(own, key):
                figure = layers_figure(own, key, f"{tower}: {meaning}", meaning)
                html.append(f"<figure>{img_tag(figure, f'{meaning} of every layer of {tower}')}</figure>")
    if importance:
        figure = dots_figure(
            {"importance": list(importance.values())}, list(importance), "Importance for the loss", "importance"
        )
        html.append(f"<figure>{img_tag(figure, 'importance of every group of layers')}</figure>")
    html.append(f"<details><summary>{len(layers)} layers</summary>{layers_table(layers)}</details>")
    return [Section(title, "".join(html))]


def towers_table(layers: Sequence[LayerReport]) -> str:
    """A row per tower, and one of all."""
    towers = list(dict.fromkeys(each.tower for each in layers))
    groups = [(tower, [each for each in layers if each.tower == tower]) for tower in towers]
    groups += [("all", list(layers))] if len(towers) > 1 else []
    header = ["tower", "layers", "weights", "sparsity", "bits", "mean error", "largest error", "seconds"]
    rows = []
    for name, own in groups:
        figures, errors = totals(own), [each.error for each in own]
        rows.append(
            [
                escape(name),
                f"{len(own):,}",
                f"{sum(math.prod(each.shape) for each in own):,}",
                f"{100 * figures['sparsity']:.1f} %",
                f"{figures['bits']:.2f}",
                f"{sum(errors) / len(errors):.3g}",
                f"{max(errors):.3g}",
                f"{sum(each.seconds for each in own):.1f}",
            ]
        )
    return html_table(header, rows)


def layers_table(layers: Sequence[LayerReport]) -> str:
    """A row per layer."""
    header = ["layer", "out x in", "sparsity", "bits", "kept exactly", "error", "damping"]
    rows = [
        [
            escape(each.name),
            " x ".join(map(str, each.shape)),
            f"{100 * each.sparsity:.1f} %",
            "–" if each.bits is None else str(each.bits),
            f"{100 * each.kept:.2f} %" if each.kept else "–",
            f"{each.error:.3g}",
            "–" if each.damping is None else f"{each.damping:.3g}",
        ]
        for each in layers
    ]
    return html_table(header, rows)


def tells(layers: Sequence[LayerReport], key: str) -> bool:
    """Whether a picture of these values says more than a number would, and fits."""
    values = {getattr(each, key) for each in layers}
    rows = len({each.block for each in layers})
    return 1 < rows <= MOST_ROWS and len(values) > 1


def layers_figure(layers: Sequence[LayerReport], key: str, title: str, meaning: str) -> Figure:
    """A row per block, a mark for every layer of it."""
    blocks = list(dict.fromkeys(each.block for each in layers))
    kinds = list(dict.fromkeys(kind_of(each) for each in layers))
    values = {(each.block, kind_of(each)): getattr(each, key) for each in layers}
    series = {
        kind: [math.nan if (found := values.get((block, kind))) is None else float(found) for block in blocks]
        for kind in kinds
    }
    return dots_figure(series, blocks, title, meaning)


def kind_of(layer: LayerReport) -> str:
    """The name of a layer within its block."""
    return layer.name.removeprefix(f"{layer.block}.")


def tradeoff_section(
    points: Sequence[Point], size: str, score: str, title: str = "Score against size", from_zero: bool = False
) -> Section:
    """A picture and a table of several models.

    Args:
        points: at least one.
        size: meaning of their sizes.
        score: meaning of their scores.
        title: heading.
        from_zero: begin the axis of sizes there, so that distances are shares.
    """
    ordered = sorted(points, key=lambda point: (point.size, point.name))
    rows = [[escape(point.name), f"{point.size:,.4g}", f"{point.score:.4g}"] for point in ordered]
    figure = tradeoff_figure(ordered, size, score, title, from_zero)
    html = f"<figure>{img_tag(figure, title)}</figure>{html_table(['model', size, score], rows)}"
    return Section(title, html)


def tradeoff_figure(points: Sequence[Point], size: str, score: str, title: str, from_zero: bool = False) -> Figure:
    """A dot per model, named in a key beside it; models whose names differ in their last number alone are joined."""
    families: dict[str, list[Point]] = {}
    for point in points:
        families.setdefault(family_of(point.name), []).append(point)
    tall = max(3.0, 0.26 * len(families) + 0.2)
    figure = new_figure(8.6, tall + 1.1)
    axes = new_axes(figure, 0.75, 0.6, 4.9, tall)
    for number, (name, members) in enumerate(families.items()):
        axes.plot(
            [each.size for each in members],
            [each.score for each in members],
            marker="osD^vPX*"[(number + number // len(LINES)) % 8],
            color=LINES[number % len(LINES)],
            linewidth=1.4,
            markersize=5,
            label=shortened(name if len(members) > 1 else members[0].name),
        )
    axes.set_xlabel(size, fontsize=8.5, color=SOFT)
    axes.set_ylabel(score, fontsize=8.5, color=SOFT)
    axes.tick_params(labelsize=8, colors=INK)
    axes.ticklabel_format(useOffset=False)
    if from_zero:
        axes.set_xlim(left=0)
    axes.grid(color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8.5)
    above(figure, title, "")
    return figure


def family_of(name: str) -> str:
    """``name`` without its last number and what follows it: "gptq 4 bits" and "gptq 2 bits" are of one family."""
    found = re.fullmatch(r"(.*?)[\s,_-]*\d+(\.\d+)?\s*(bits?|%|x)?", name)
    return found[1] if found and found[1] else name
