"""Sections on tasks that are answered by writing: figures by task, and examples with pictures.

Pure functions of what a module keeps of its test.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fulgurite.reports.examples import Group, accepted, choose, group_of, media_html
from fulgurite.reports.page import Section
from fulgurite.reports.tables import html_table, plain_table
from fulgurite.samples import Sample

EXAMPLES = 12
GROUPS = (
    Group("right", lambda answer: (answer["credit"] or 0) > 0),
    Group("wrong", lambda answer: answer["credit"] is not None),
    Group("written", lambda answer: True),
)
MARKS = {"right": ("right", "✓ "), "wrong": ("wrong", "✗ "), "written": ("", "")}


def sections_of_generation(
    results: Mapping[str, Any], answers: Sequence[Mapping[str, Any]], samples: Sequence[Sample]
) -> list[Section]:
    """The table of figures, and examples.

    Args:
        results: ``figures`` by name, see `WrittenScores.figures`; ``tasks``.
        answers: one row per sample: ``id``, ``domain``, ``task``, ``kind``, ``gold``, ``answer``, and ``credit`` from 0
            to 1, None where an answer is not judged alone.
        samples: what was asked; may be empty.
    """
    counts = Counter(answer["task"] for answer in answers)
    header, rows, by_kind = ["task", "samples", "figure", "value"], [], []
    for name, value in results["figures"].items():
        figure, _, rest = name.partition("/")
        task = next((task for task in results["tasks"] if rest == task or rest.startswith(f"{task}/")), "")
        kind = rest.removeprefix(task).removeprefix("/")
        if kind:
            by_kind.append([task, kind, f"{figure} {value:.2f}"])
        else:
            rows.append([task or "mean of the tasks", str(counts[task]) if task else "", figure, f"{value:.2f}"])
    title = "Scores of what was written"
    html = html_table(header, rows, text_columns=[2])
    if by_kind:
        html += html_table(["task", "kind", "value"], by_kind, text_columns=[1])
    table = Section(title, html, printed=plain_table(title, header, rows))
    return [table, Section("Examples", examples_html(answers, samples))] if answers else [table]


def examples_html(answers: Sequence[Mapping[str, Any]], samples: Sequence[Sample], number: int = EXAMPLES) -> str:
    """Samples with their pictures and what was written; the tasks take turns, see `examples`."""
    tasks = list(dict.fromkeys(answer["task"] for answer in answers))
    found = {(sample.domain, sample.id): sample for sample in samples}
    # The rule chooses by domain; here the tasks take the turns.
    rows = [{**answer, "of": answer["domain"], "domain": answer["task"]} for answer in answers]
    cards = [card(row, found.get((row["of"], row["id"]))) for row in choose(rows, tasks, GROUPS, number)]
    return f'<div class="examples">{"".join(cards)}</div>'


def card(answer: Mapping[str, Any], sample: Sample | None) -> str:
    """One sample."""
    outcome = GROUPS[group_of(answer, GROUPS)].name
    style, mark = MARKS[outcome]
    question = sample.question if sample is not None and sample.question else f"Sample {answer['id']}"
    where = " · ".join(str(part) for part in (answer["task"], answer["kind"], outcome) if part)
    credit = answer["credit"]
    partial = f" ({100 * credit:.0f} %)" if credit is not None and 0 < credit < 1 else ""
    return (
        f'<article class="example"><div class="where">{escape(where)}</div>'
        f'<div class="question">{escape(question)}</div>{media_html(sample)}'
        f'<dl class="answers"><dt>accepted</dt><dd>{escape(accepted(answer["gold"]))}</dd>'
        f'<dt>written</dt><dd><span class="{style}">{mark}{escape(answer["answer"])}{partial}</span></dd></dl>'
        "</article>"
    )
