"""Section on the artefacts of a run: their scores, beside those of the trained weights in every mode."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from fulgurite.reports.page import Section
from fulgurite.reports.tables import best_cells, html_table, percent, plain_table

Scores = Mapping[str, float]
TESTED = re.compile(r"test/(?:(?P<mode>\w+)/)?accuracy/(?P<domain>.+)")
RECALL = "/R@1"
TOLD = ("oracle",)  # is told the domain, and is out of competition


def scores_by_mode(metrics: Mapping[str, float], names: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """By name of the mode, ``test/accuracy`` and ``test/accuracy/<domain>`` as a test has logged them.

    Args:
        metrics: ``test/<mode>/accuracy/<domain>``, or ``test/accuracy/<domain>`` where there is one mode.
        names: how modes are called.
    """
    rows: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        if found := TESTED.fullmatch(key):
            mode = found["mode"]
            name = "trained weights" if mode is None else names.get(mode, mode)
            rows.setdefault(name, {})[f"test/accuracy/{found['domain']}"] = float(value)
    return {name: {"test/accuracy": sum(row.values()) / len(row), **row} for name, row in rows.items()}


def artefacts_section(
    title: str, modes: Mapping[str, Scores], artefacts: Mapping[str, Scores], names: Mapping[str, str]
) -> Section:
    """One table of accuracies in percent; of recalls, where artefacts of retrieval have those.

    Args:
        title: heading.
        modes: see `scores_by_mode`.
        artefacts: by what it is called, ``<split>/accuracy`` and ``<split>/accuracy/<domain>``, or
            ``<split>/<direction>/R@1`` and so on.
        names: how modes are called.
    """
    if any(key.endswith(RECALL) for row in artefacts.values() for key in row):
        return _recalls(title, artefacts)
    rows = {**modes, **artefacts}
    splits = [s for s in ("val", "test") if any(f"{s}/accuracy" in row for row in rows.values())]
    shown = splits[-1] if splits else "test"  # none where nothing was counted
    prefix = f"{shown}/accuracy/"
    domains = list(dict.fromkeys(k.removeprefix(prefix) for row in rows.values() for k in row if k.startswith(prefix)))
    header = ["model", *(f"{split} average" for split in splits), *domains]
    keys = [*(f"{split}/accuracy" for split in splits), *(f"{prefix}{domain}" for domain in domains)]
    values: Sequence[Sequence[float | None]] = [[row.get(key) for key in keys] for row in rows.values()]
    told = [names.get(mode, mode) for mode in TOLD]
    skip = [index for index, name in enumerate(rows) if name in told]
    best = {(r, c + 1) for r, c in best_cells(values, skip)}
    cells = [[name, *map(percent, row)] for name, row in zip(rows, values)]
    html = (
        f"<p>Accuracy in percent; each domain on the {shown} questions. Artefacts are one model for all domains; the "
        "rows above them are the trained adapters. Bold: best of those that are not told the domain.</p>"
        f"{html_table(header, cells, best, dict.fromkeys(skip, 'quiet'))}"
    )
    return Section(title, html, printed=plain_table(f"{title}, accuracy in %", header, cells))


def _recalls(title: str, artefacts: Mapping[str, Scores]) -> Section:
    """R@1 of each split and direction, with its R@5."""
    found = dict.fromkeys(key for row in artefacts.values() for key in row if key.endswith(RECALL))
    keys = [key.removesuffix("1") + k for key in found for k in ("1", "5")]
    rows = [[name, *(f"{row[key]:.1f}" if key in row else "–" for key in keys)] for name, row in artefacts.items()]
    header = ["model", *(key.replace("/", " ").replace("_", " ") for key in keys)]
    html = (
        f"<p>Recall in percent; those of the trained weights have a table of their own.</p>{html_table(header, rows)}"
    )
    return Section(title, html, printed=plain_table(f"{title}, recall in %", header, rows))
