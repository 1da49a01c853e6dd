"""Sections on deleted facts: what attacks still get out, at what cost, in which layers, and item by item.

Pure functions of what a module keeps of its test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean
from typing import Any

from fulgurite.reports.compression import Point, tradeoff_section
from fulgurite.reports.examples import media_html
from fulgurite.reports.heat import heat_figure
from fulgurite.reports.images import img_tag
from fulgurite.reports.page import Section
from fulgurite.reports.tables import html_table, plain_table
from fulgurite.samples import Sample

ITEMS = 24  # that have a card of their own
NONE = "–"
SHARES = (
    "An attack makes at most so many candidates for an item, and succeeds where the deleted answer is among them. The "
    "last column is the share of candidates that are the answer, after the edit. Low is good after the edit."
)
MEANINGS = (
    "Rewrite: how much of the answer's probability is gone (or, where another text is injected, how sure that is now). "
    "Paraphrase: the same for other words. Neighbourhood: 1 where its probability elsewhere did not move. Target: "
    "their harmonic mean. Scores are good high; accuracy lost is good low."
)
SCORES = ("rewrite", "paraphrase", "neighbourhood", "target")
BESIDE = {
    "random": "other items",
    "neighbour_questions": "neighbour questions",
    "neighbour_images": "neighbour pictures",
}
Row = Mapping[str, Any]


def sections_of_unlearning(results: Row, rows: Sequence[Row], samples: Sequence[Sample]) -> list[Section]:
    """All sections of one test.

    Args:
        results: ``figures`` by name, see `metrics.unlearning`, each with ``/low`` and ``/high``; ``attacks``, the part
            of these names by title; ``layers`` with lists ``before`` and ``after``, means by layer.
        rows: one per item, see `modules.item_figures`.
        samples: what was deleted; may be empty.
    """
    figures = results["figures"]
    return [
        attacks_section(figures, results["attacks"], len(rows)),
        tradeoff(figures, results["attacks"]),
        scores_section(figures),
        layers_section(results["layers"]),
        Section("Items", items_html(rows, samples)),
    ]


def interval(figures: Mapping[str, float], name: str, times: float = 1.0) -> str:
    """``12.3 (8.0 to 17.1)``."""
    mean, low, high = (times * figures[f"{name}{end}"] for end in ("", "/low", "/high"))
    return NONE if math.isnan(mean) else f"{mean:.1f} ({low:.1f} to {high:.1f})"


def attacks_section(figures: Mapping[str, float], attacks: Mapping[str, str], items: int) -> Section:
    """Success of every attack before and after."""
    known = figures["answered_before"]
    title = (
        f"Attack success on {items} items, {known:.0f} % of them answered right before, % (95 % interval over items)"
    )
    header = ["attack", "candidates", "before the edit", "after", "share of candidates, %"]
    cells = [
        [
            title_of,
            f"{figures[f'budget/{key}']:.0f}",
            interval(figures, f"success_before/{key}"),
            interval(figures, f"success/{key}"),
            f"{figures[f'fraction/{key}']:.1f}",
        ]
        for title_of, key in attacks.items()
    ]
    html = f"<p>{escape(title)}</p>{html_table(header, cells)}<p>{escape(SHARES)}</p>"
    return Section("Attacks", html, printed=plain_table(title, header, cells))


def scores_section(figures: Mapping[str, float]) -> Section:
    """What the edit did where it should, and where it should not."""
    title = "Scores and accuracies, % (95 % interval over items)"
    cells = [[name, interval(figures, name, 100)] for name in SCORES]
    for name, text in BESIDE.items():
        cells.append([f"accuracy, {text}, before", interval(figures, f"accuracy_before/{name}")])
        cells.append([f"accuracy, {text}, after", interval(figures, f"accuracy_after/{name}")])
        cells.append([f"accuracy lost, {text}", interval(figures, f"delta/{name}")])
    header = ["score", "mean"]
    html = f"{html_table(header, cells)}<p>{escape(MEANINGS)}</p>"
    return Section("Scores", html, printed=plain_table(title, header, cells))


def tradeoff(figures: Mapping[str, float], attacks: Mapping[str, str]) -> Section:
    """A point per attack at this edit's damage, and one for all of them before it."""
    damage = figures["delta/random"]
    damage = 0.0 if math.isnan(damage) else damage
    points = [Point(title, damage, figures[f"success/{key}"]) for title, key in attacks.items()]
    before = fmean(figures[f"success_before/{key}"] for key in attacks.values())
    points.append(Point("before the edit, mean", 0.0, before))
    return tradeoff_section(
        points, "accuracy lost on other items, points", "attack success, %", "Extraction against damage"
    )


def layers_section(layers: Mapping[str, Sequence[float]]) -> Section:
    """Probability of the answer's first token by the logit lens, as a mean over items."""
    names = list(layers)
    depth = len(layers[names[0]])
    matrix = [[layers[name][layer] for name in names] for layer in range(depth)]
    title = "The deleted answer in the hidden states"
    figure = heat_figure(
        matrix, ["embeddings", *[f"block {n}" for n in range(1, depth)]], names, title, "probability", "share"
    )
    return Section("Layers", f"<figure>{img_tag(figure, title)}</figure>")


def items_html(rows: Sequence[Row], samples: Sequence[Sample], number: int = ITEMS) -> str:
    """The first items as cards, and all of them as a table."""
    found = {(sample.domain, sample.id): sample for sample in samples}
    cards = [card(row, found.get((row["domain"], row["id"]))) for row in rows[:number]]
    header = ["item", "answer", "before", "after", "got out by"]
    cells = [
        [str(row["id"]), row["gold"], row["before"]["written"], row["after"]["written"], ", ".join(succeeded(row))]
        for row in rows
    ]
    table = html_table(header, cells, text_columns=[1, 2, 3, 4])
    return (
        f'<div class="examples">{"".join(cards)}</div>'
        f"<details><summary>All {len(rows)} items</summary>{table}</details>"
    )


def succeeded(row: Row) -> list[str]:
    """Titles of the attacks that found the answer after the edit."""
    return [title for title, share in row["after"]["attacks"].items() if share > 0]


def card(row: Row, sample: Sample | None) -> str:
    """One item with its picture."""
    question = sample.question if sample is not None and sample.question else f"Item {row['id']}"
    out = succeeded(row)
    probabilities = [f"{row[when]['answer']['question']:.2g}" for when in ("before", "after")]
    found_before = any(share > 0 for share in row["before"]["attacks"].values())
    style, mark = ("wrong", "✗ still there: ") if out else ("right", "✓ no attack found it")
    if not out and not found_before:
        style, mark = "", "not found before either"
    return (
        f'<article class="example"><div class="where">{escape(str(row["id"]))}</div>'
        f'<div class="question">{escape(question)}</div>{media_html(sample)}'
        f'<dl class="answers"><dt>to delete</dt><dd>{escape(row["gold"])}</dd>'
        f"<dt>before</dt><dd>{escape(row['before']['written'])} (p {probabilities[0]})</dd>"
        f"<dt>after</dt><dd>{escape(row['after']['written'])} (p {probabilities[1]})</dd>"
        f'<dt>attacks</dt><dd><span class="{style}">{mark}{escape(", ".join(out))}</span></dd></dl></article>'
    )
