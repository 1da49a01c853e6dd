"""Sections on video question answering: a plain test, and a test of all modes after every stage.

Pure functions of what a module keeps of its test; see `ContinualTest`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from fulgurite.reports.examples import choose, credit, example_html, group_of, outcome_groups
from fulgurite.reports.images import img_tag, png_bytes
from fulgurite.reports.page import Section
from fulgurite.reports.plots import Panel, bars_figure, confusion_figure, lines_figure, matrices_figure
from fulgurite.reports.tables import (
    FORGETTING,
    best_cells,
    html_table,
    mode_values,
    percent,
    plain_table,
    terminal_table,
    uncounted,
)
from fulgurite.reports.uncertainty import sign_test, standard_error, standard_error_of_mean
from fulgurite.samples import Sample, Stage, first_stages

PICTURE = "accuracy_matrix.png"
ROUTERS = ("Router", "Second router")
STREAM_SCORES = {
    "forgetting": "forgetting, from the best",
    "forgetting_own": "forgetting, from its own stage",
    "backward_transfer": "backward transfer",
    "forward_transfer": "forward transfer",
    "unseen": "never trained domains",
}


@dataclass(frozen=True)
class ContinualTest:
    """A test of every mode after every trained stage.

    Args:
        results: ``modes`` (by mode ``matrix`` (T + 1, N), ``by_kind`` (N, kinds), ``top10`` (N),
            ``speech`` (N), ``average``, ``forgetting``, ...), ``confusion`` (one (T, T) per router), ``domains``,
            ``kinds``, ``mode`` (the configured one).
        answers: every test question once, in any order: ``id``, ``domain``, ``kind``, ``gold`` (score by
            accepted answer), ``answers`` (by mode), ``weights`` (by adapter set).
        samples: the questions themselves; may be empty.
        stages: all stages of the stream; the first T are trained.
        mode_names: how modes are called.
    """

    results: Mapping[str, Any]
    answers: Sequence[Mapping[str, Any]]
    samples: Sequence[Sample]
    stages: Sequence[Stage]
    mode_names: Mapping[str, str]

    @property
    def mode(self) -> str:
        """The configured mode, or the first tested one where it was not tested."""
        modes = self.results["modes"]
        return self.results["mode"] if self.results["mode"] in modes else next(iter(modes))

    @property
    def names(self) -> dict[str, str]:
        """Names of the tested modes."""
        return {m: self.mode_names.get(m, m) for m in self.results["modes"]}

    @property
    def domains(self) -> list[str]:
        """The N columns."""
        return list(self.results["domains"])

    @property
    def trained(self) -> list[Stage]:
        """The T stages trained so far."""
        return list(self.stages[: len(self.results["modes"][self.mode]["matrix"]) - 1])

    @property
    def rows(self) -> list[str]:
        """Names of the T + 1 rows."""
        return ["zero-shot", *(f"after {s.name}" for s in self.trained)]

    @property
    def trained_from(self) -> list[int | None]:
        """For every domain the stage (1..T) that trains it first, None where none has."""
        return first_stages(self.domains, self.trained)

    @property
    def numbers(self) -> list[int]:
        """Test questions per domain."""
        found = Counter(a["domain"] for a in self.answers)
        return [found[d] for d in self.domains]

    @property
    def shown(self) -> list[str]:
        """The modes pictured over the stages: the configured one and sequential fine-tuning."""
        return [self.mode, *(m for m in ("last",) if m in self.names and m != self.mode)]


def sections_of_continual(test: ContinualTest, examples: int = 12) -> list[Section]:
    """All sections on a continual test, with the table for the terminal and the picture for a README."""
    sections = [modes_section(test), stages_section(test)]
    sections += [router_section(test)] if any(map(any, _flat(test.results["confusion"]))) else []
    sections += [kinds_section(test)] if test.results["kinds"] else []
    return [*sections, examples_section(test, examples)] if test.answers else sections


def modes_section(test: ContinualTest) -> Section:
    """Table and bars of all modes, with what sampling alone does to them."""
    values = mode_values(test.results)
    rows, modes = list(values.values()), list(values)
    skip = [i for i, m in enumerate(modes) if m == "oracle"]
    best = {(r, c + 1) for r, c in best_cells(rows, skip=skip) if c != FORGETTING}
    table = html_table(
        ["mode", "average", "forgetting", *test.domains],
        [[test.names[m], *map(percent, row)] for m, row in values.items()],
        best,
        {modes.index(test.mode): "chosen"} | {i: "quiet" for i in skip if modes[i] != test.mode},
    )
    errors = [_average_error(test, m) for m in modes]
    averages = [math.nan if row[0] is None else row[0] for row in rows]
    points = [[v for v in row[2:] if v is not None and not math.isnan(v)] for row in rows]
    missing = uncounted(rows[0][2:])
    bars = bars_figure(
        [test.names[m] for m in modes], averages, errors, modes.index(test.mode), points, "Average accuracy"
    )
    html = (
        "<p>Accuracy on the test questions after the last stage, in percent, all modes from the same trained "
        f"adapters. The configured mode, <b>{escape(test.names[test.mode])}</b>, is shaded. Bold: best of "
        "the modes that are not told the domain. Forgetting: best accuracy so far minus final accuracy, mean "
        f"over the domains before the last; lower is better.</p>{table}{_note(missing)}<figure>"
        f"{img_tag(bars, 'Average accuracy of every mode')}<figcaption>Whiskers: one standard error. Dots: "
        f"single domains.</figcaption></figure>{_sampling(test)}{_pairs(test)}"
    )
    return Section("Modes", html, printed=terminal_table(test.results, test.mode_names))


def stages_section(test: ContinualTest) -> Section:
    """The accuracy matrices over the stages, and the same as lines."""
    panels = [_panel(test, m) for m in test.shown]
    matrices = matrices_figure(
        panels,
        test.rows,
        test.domains,
        test.trained_from,
        "Accuracy on every domain after every stage, %",
        "Below the line: domains already trained. Darker is higher.",
    )
    lines = lines_figure(panels, ["zero-shot", *(s.name for s in test.trained)], test.domains, test.trained_from)
    html = (
        f"<figure>{img_tag(matrices, 'Accuracy matrices over the stages')}</figure>"
        f"<figure>{img_tag(lines, 'Accuracy of every domain over the stages')}<figcaption>Dotted: before the "
        f"domain was trained. The marker is the stage that trained it.</figcaption></figure>{_stream(test)}"
    )
    return Section("Over the stages", html, files={PICTURE: png_bytes(matrices, dpi=200)})


def router_section(test: ContinualTest) -> Section:
    """Where each router sends the questions of each domain."""
    names = [s.name for s in test.trained]
    parts = []
    for title, counts in zip(ROUTERS, test.results["confusion"]):
        seen = [row[: len(names)] for row in counts[: len(names)]]
        total = sum(map(sum, seen))
        if total:
            share = sum(seen[i][i] for i in range(len(names))) / total
            figure = confusion_figure(seen, names, f"{title}: {percent(share)} % to the own domain")
            parts.append(f"<figure>{img_tag(figure, f'{title} confusion')}</figure>")
    html = (
        "<p>The adapter set with the largest weight for each question, by the question's true domain, which "
        f"the router is not told. Shares of the row, counts below.</p>{''.join(parts)}"
    )
    return Section("Router", html)


def kinds_section(test: ContinualTest) -> Section:
    """Accuracy by kind of question within each domain."""
    counts = Counter((a["domain"], a["kind"]) for a in test.answers)
    modes = list(test.names)
    labels, values = [], []
    for i, domain in enumerate(test.domains):
        for k, kind in enumerate(test.results["kinds"]):
            row = [test.results["modes"][m]["by_kind"][i][k] for m in modes]
            if not all(map(math.isnan, row)):
                labels.append([domain, kind, str(counts[domain, kind])])
                values.append(row)
    table = html_table(
        ["domain", "kind of question", "questions", *test.names.values()],
        [[*label, *map(percent, row)] for label, row in zip(labels, values)],
        text_columns=[1],
    )
    return Section("Kinds of question", f"<p>Accuracy after the last stage, in percent.</p>{table}")


def examples_section(test: ContinualTest, number: int = 12) -> Section:
    """Example questions by a stated rule, and how often each outcome occurs at all."""
    groups = outcome_groups(test.mode, list(test.names), test.names)
    chosen = choose(test.answers, test.domains, groups, number)
    samples = {(s.domain, s.id): s for s in test.samples}
    cards = [
        example_html(a, samples.get((a["domain"], a["id"])), test.names, groups[group_of(a, groups)].name)
        for a in chosen
    ]
    counts = Counter((a["domain"], group_of(a, groups)) for a in test.answers)
    table = html_table(
        ["outcome", *test.domains, "all"],
        [
            [g.name, *(str(counts[d, i]) for d in test.domains), str(sum(counts[d, i] for d in test.domains))]
            for i, g in enumerate(groups)
        ],
    )
    html = (
        "<p>How the test questions fall into groups by who answered them right:</p>"
        f"{table}"
        '<p class="note">The examples are chosen by a fixed rule: the questions of a domain stand in the '
        "order of the SHA-256 of their ids. The domains take turns, and each shows the next question of the "
        "next group that has one, going through the groups of the table in a cycle; every domain begins one "
        f"group further than the domain before it. So rare outcomes are shown more often than they occur.</p>"
        f'<div class="examples">{"".join(cards)}</div>'
    )
    return Section("Example questions", html)


def sections_of_plain(results: Mapping[str, Any], samples: Sequence[Sample]) -> list[Section]:
    """One section on a test without stages or modes, with a table for the terminal.

    Args:
        results: ``domains`` (N names), ``kinds``, ``matrix`` (1, N), ``by_kind`` (N, kinds), ``top10`` (N).
        samples: what was evaluated, to count the questions; may be empty.
    """
    domains, kinds = results["domains"], results["kinds"]
    of_domain, of_kind = Counter(s.domain for s in samples), Counter((s.domain, s.kind) for s in samples)
    rows = [
        [
            domain,
            percent(value),
            percent(standard_error(value, of_domain[domain])),
            percent(best),
            _number(of_domain[domain]),
        ]
        for domain, value, best in zip(domains, results["matrix"][-1], results["top10"])
        if not math.isnan(value)
    ]
    header = ["domain", "accuracy, %", "standard error", "among the best ten", "questions"]
    by_kind = [
        [domain, kind, percent(value), _number(of_kind[domain, kind])]
        for domain, row in zip(domains, results["by_kind"])
        for kind, value in zip(kinds, row)
        if not math.isnan(value)
    ]
    missing = uncounted(results["matrix"][-1])
    html = html_table(header, rows) + _note(missing)
    if by_kind:
        html += html_table(["domain", "kind of question", "accuracy, %", "questions"], by_kind, text_columns=[1])
    return [Section("Accuracy", html, printed=plain_table("Accuracy on test questions", header, rows, missing))]


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>' if text else ""


def _number(count: int) -> str:
    return str(count or "–")


def _panel(test: ContinualTest, mode: str) -> Panel:
    scores = test.results["modes"][mode]
    parts = [f"{k} {percent(scores[k])}" for k in ("average", "forgetting") if k in scores]
    return Panel(test.names[mode], scores["matrix"], " · ".join(parts))


def _stream(test: ContinualTest) -> str:
    modes = test.results["modes"]
    keys = [k for k in STREAM_SCORES if any(k in scores for scores in modes.values())]
    if not keys:
        return ""
    rows = [[test.names[m], *(percent(scores.get(k)) for k in keys)] for m, scores in modes.items()]
    return (
        "<p>Means over the domains, in points. Backward transfer: final accuracy minus that right after the "
        "domain's own stage. Forward transfer: accuracy right before the domain's stage minus zero-shot.</p>"
        f"{html_table(['mode', *(STREAM_SCORES[k] for k in keys)], rows)}"
    )


def _average_error(test: ContinualTest, mode: str) -> float:
    row = test.results["modes"][mode]["matrix"][-1]
    use = [(p, n) for p, n, t in zip(row, test.numbers, test.trained_from) if t is not None and n]
    return standard_error_of_mean([p for p, _ in use], [n for _, n in use]) if use else math.nan


def _sampling(test: ContinualTest) -> str:
    if not test.answers:
        return ""
    row = test.results["modes"][test.mode]["matrix"][-1]
    table = html_table(
        ["", "average", *test.domains],
        [
            ["questions", str(len(test.answers)), *map(str, test.numbers)],
            [
                "standard error",
                percent(_average_error(test, test.mode)),
                *(percent(standard_error(p, n)) for p, n in zip(row, test.numbers)),
            ],
            ["accepted answer among the best ten", "", *map(percent, test.results["modes"][test.mode]["top10"])],
        ],
    )
    return (
        "<h3>How exact these figures are</h3><p>Other test questions of the same kind would give other "
        f"figures. One standard error of the configured mode, in points, and its top-10 accuracy:</p>{table}"
    )


def _pairs(test: ContinualTest) -> str:
    others = [m for m in test.names if m != test.mode]
    if not test.answers or not others:
        return ""
    rows = []
    for other in others:
        gaps = [credit(a, test.mode) - credit(a, other) for a in test.answers]
        wins, losses = sum(g > 0 for g in gaps), sum(g < 0 for g in gaps)
        p = sign_test(wins, losses)
        rows.append([test.names[other], str(wins), str(losses), "< 0.001" if p < 0.001 else f"{p:.3f}"])
    table = html_table(["compared with", "configured mode better", "worse", "p (exact sign test)"], rows)
    return (
        "<p>All modes answer the same questions, so two modes are better compared question by question. A p "
        f"above 0.05 means: no difference shown. The chance in training is not in it; that takes several "
        f"seeds.</p>{table}"
    )


def _flat(confusions: Sequence[Sequence[Sequence[float]]]) -> list[Sequence[float]]:
    return [row for counts in confusions for row in counts]
