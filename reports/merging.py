"""Sections on a merge: how alike the changes of its sources are, layer by layer, and what everything was made from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import PurePath

from torch import Tensor

from fulgurite.checkpoints.card import made_by, method_of, number, step_of, visible
from fulgurite.checkpoints.lineage import Node, nodes
from fulgurite.methods.merging.diagnostics import Alikeness, by_layer, over_pairs, pairs, whole
from fulgurite.reports.heat import dots_figure, heat_figure
from fulgurite.reports.images import img_tag
from fulgurite.reports.page import Section, render_page
from fulgurite.reports.tables import html_table

REPORT_NAME = "report.html"
MOST_PAIRS = 45  # columns of a picture; beyond, each model's mean with the others
MOST_SCORES = 8  # columns of the table of artefacts
MERGED = "merged"
STATES = {
    "file": "has no manifest, digest not checked",
    "missing": "not there any more",
    "changed": "another checkpoint lies there now",
    "damaged": "its manifest is damaged",
    "repeated": "stands above in full",
    "further": "its own parents are not shown",
}


def merge_page(found: Mapping[str, Alikeness], names: Sequence[str], has_base: bool, root: Node) -> str:
    """The whole ``report.html`` of an artefact.

    Args:
        found: see `diagnose`.
        names: what the T sources are called.
        has_base: whether task vectors are from a base, not from the mean of the sources.
        root: see `lineage`.
    """
    method = method_of(root.manifest) if root.manifest is not None else None
    title = PurePath(root.path).name or root.path
    software = {} if root.manifest is None else root.manifest.facts.get("software", {})
    sections = [*sections_of_merge(found, names, has_base), *sections_of_lineage(root)]
    subtitle = f"{len(names)} models merged{f' by {method}' if method else ''}"
    return render_page(visible(title), subtitle, sections, {name: str(version) for name, version in software.items()})


def sections_of_merge(found: Mapping[str, Alikeness], names: Sequence[str], has_base: bool) -> list[Section]:
    """Task vectors over the whole model, then in every layer; see `merge_page`."""
    labels = [f"{number}  {visible(name)}" for number, name in enumerate(distinct(names), 1)]
    return [model_section(whole(found), labels, has_base), layer_section(by_layer(found), labels, has_base)]


def model_section(total: Alikeness, labels: Sequence[str], has_base: bool) -> Section:
    """Figures of the whole model: a table of the models, and heat maps of the pairs."""
    start = "the base" if has_base else "the mean of the models, for want of a base"
    merged = not math.isnan(total.merged_norm)
    cosines = total.merged_cosine.tolist()
    rows = [
        [label, decimals(norm), decimals(ratio), decimals(cosine)]
        for label, norm, ratio, cosine in zip(labels, total.norms.tolist(), total.norm_ratios.tolist(), cosines)
    ]
    rows += [[MERGED, decimals(total.merged_norm), decimals(total.merged_ratio), ""]] if merged else []
    header = ["model", "norm of its change", "over norm of the start", "cosine with the merged change"]
    cut = slice(None) if merged else slice(3)
    html = (
        f"<p>A task vector is what a model has changed from {start}.{mean_note(labels, has_base)}</p>"
        f"{html_table(header[cut], [row[cut] for row in rows], row_class={len(labels): 'chosen'} if merged else None)}"
    )
    if len(labels) > 1:
        html += f"{kinship_text(total)}{pair_figures(total, labels)}"
    if merged:
        html += (
            f"<p>The merge has changed {share(total.kept)} of the entries that any model had changed. Rounding to "
            "another type than that of the start counts as a change.</p>"
        )
    return Section("Task vectors", html)


def mean_note(labels: Sequence[str], has_base: bool) -> str:
    """What the lack of a base does to the cosines."""
    if has_base or len(labels) < 2:
        return ""
    value = decimals(-1 / (len(labels) - 1), 2)
    kind = "always have" if len(labels) == 2 else "that have nothing in common have about"
    return f" Such changes cancel: {len(labels)} models {kind} cosine {value}."


def kinship_text(total: Alikeness) -> str:
    """Means over the pairs."""
    return (
        f"<p>Model kinship {decimals(over_pairs(total.correlation), 3)}: the mean over the pairs of the correlation of "
        "their task vectors (<a href='https://arxiv.org/abs/2410.12613'>arXiv 2410.12613</a>). Mean cosine "
        f"{decimals(over_pairs(total.cosine), 3)}. Of the entries that at least two models have changed, "
        f"{share(total.contested)} were changed in opposite directions by some.</p>"
    )


def pair_figures(total: Alikeness, labels: Sequence[str]) -> str:
    """Cosine and sign conflict of all pairs."""
    columns = [str(number) for number in range(1, len(labels) + 1)]
    cosine = heat_figure(off_diagonal(total.cosine), labels, columns, "Cosine of task vectors", "cosine", "signed")
    conflict = heat_figure(
        off_diagonal(total.conflict),
        labels,
        columns,
        "Sign conflicts",
        "share of the entries that both changed",
        "share",
    )
    return figures([(cosine, "Cosine of every pair of task vectors"), (conflict, "Sign conflicts of every pair")])


def layer_section(layers: Mapping[str, Alikeness], labels: Sequence[str], has_base: bool) -> Section:
    """The same in every layer, and how much each has changed."""
    rows = [visible(name) for name in layers]
    drawn = []
    if len(labels) > 1:
        columns = pair_columns(len(labels))
        mean = ["each model's mean with the others"] if columns[0] == "1" else []
        for title, meaning, scale, values in (
            ("Cosine of task vectors", "cosine", "signed", [item.cosine for item in layers.values()]),
            (
                "Sign conflicts",
                "share of the entries that both changed",
                "share",
                [i.conflict for i in layers.values()],
            ),
        ):
            matrix = [pair_values(value) for value in values]
            empty = ["hatched: one has not changed"] if any(math.isnan(v) for row in matrix for v in row) else []
            note = "; ".join([*mean, *empty])
            drawn.append((heat_figure(matrix, rows, columns, title, meaning, scale, note), f"{title} in every layer"))
    norms = {label: [item.norm_ratios[i].item() for item in layers.values()] for i, label in enumerate(labels)}
    merged = [item.merged_ratio for item in layers.values()]
    if not all(map(math.isnan, merged)):
        norms[MERGED] = merged
    start = "base" if has_base else "mean"
    idle = any(value == 0 for values in norms.values() for value in values)
    note = "A layer without a mark of a model was not changed by it." if idle else ""
    dots = dots_figure(norms, rows, "Size of the change", f"norm of the change / norm of the {start}", MERGED, note)
    drawn.append((dots, "Norm of the change in every layer"))
    numbers = ", ".join(map(escape, labels))
    return Section("Layers", f'<p class="note">Models: {numbers}.</p>{figures(drawn)}')


def pair_columns(num: int) -> list[str]:
    """Names of the columns of `pair_values`."""
    named = [f"{i + 1}–{j + 1}" for i, j in pairs(num)]
    return named if len(named) <= MOST_PAIRS else [str(i + 1) for i in range(num)]


def pair_values(matrix: Tensor) -> list[float]:
    """Of (T, T): every pair; each model's mean with the others where pairs are too many for a picture."""
    values = [float(matrix[i, j]) for i, j in pairs(len(matrix))]
    if len(values) <= MOST_PAIRS:
        return values
    others = matrix.clone().fill_diagonal_(math.nan)
    return others.nanmean(1).tolist()


def off_diagonal(matrix: Tensor) -> list[list[float]]:
    """The matrix with NaN for each model with itself."""
    return matrix.clone().fill_diagonal_(math.nan).tolist()


def sections_of_lineage(root: Node) -> list[Section]:
    """The merge tree, and the scores of what stands in it, where there are any."""
    tree = Section("Merge tree", f'<ul class="tree">{node_html(root)}</ul>')
    known = [node for node in nodes(root) if node.manifest is not None and node.manifest.metrics]
    return [tree, *([scores_section(known)] if known else [])]


def node_html(node: Node) -> str:
    """One model with all that it was made from, as a list item."""
    name = "/".join(PurePath(node.path).parts[-2:])
    lines = [f'<b title="{escape(visible(node.path))}">{escape(visible(name))}</b>']
    lines += [f'<span class="part">{escape(node.part)}</span>'] if node.part else []
    lines += [f"<code>{escape(visible(short(node.digest)))}</code>"] if node.digest else []
    lines += [f'<span class="part">{STATES[node.state]}</span>'] if node.state in STATES else []
    if node.manifest is not None:
        method = method_of(node.manifest)
        step = step_of(node.manifest)
        settings = (made_by(node.manifest) or {}).get("init_args") or {}
        options = ", ".join(f"{key} {json.dumps(value, ensure_ascii=False)}" for key, value in settings.items())
        made = " ".join(filter(None, [step and f"{step}:", method, options and f"({options})"]))
        scores = ", ".join(f"{key} {number(value)}" for key, value in sorted(node.manifest.metrics.items()))
        lines += [f"<div>{escape(visible(made))}</div>"] if made else []
        lines += [f'<div class="part">{escape(visible(scores))}</div>'] if scores else []
    parents = "".join(map(node_html, node.parents))
    inner = f"<ul>{parents}</ul>" if parents else ""
    return f'<li><div class="node {node.state}">{" ".join(lines)}</div>{inner}</li>'


def scores_section(known: Sequence[Node]) -> Section:
    """A row per model of the tree that has scores, a column per score."""
    keys = sorted({key for node in known if node.manifest is not None for key in node.manifest.metrics})
    columns = keys[:MOST_SCORES]
    rows = []
    for node, name in zip(known, distinct([node.path for node in known])):
        metrics = {} if node.manifest is None else node.manifest.metrics
        rows.append([visible(name), *(number(metrics[key]) if key in metrics else "–" for key in columns)])
    left = len(keys) - len(columns)
    more = (
        f'<p class="note">{left} more scores are in the manifests; <code>inspect</code> prints them.</p>'
        if left
        else ""
    )
    return Section("Scores", html_table(["model", *map(visible, columns)], rows) + more)


def distinct(paths: Iterable[str]) -> list[str]:
    """Paths without the folders that all have in common, at both ends; the last part always stays if all are equal."""
    split = [PurePath(path).parts or (path,) for path in paths]
    if len(set(split)) < 2:
        return [parts[-1] for parts in split]
    while len({parts[0] for parts in split}) == 1 and all(len(parts) > 1 for parts in split):
        split = [parts[1:] for parts in split]
    while len({parts[-1] for parts in split}) == 1 and all(len(parts) > 1 for parts in split):
        split = [parts[:-1] for parts in split]
    return ["/".join(parts) for parts in split]


def figures(drawn: Iterable[tuple[object, str]]) -> str:
    """Pictures with their texts."""
    return "".join(f"<figure>{img_tag(figure, text)}</figure>" for figure, text in drawn)


def short(digest: str) -> str:
    """The first digits of a digest, without its algorithm; of each of several."""
    return ", ".join(part.rpartition(":")[2][:10] for part in digest.split(","))


def decimals(value: float, digits: int = 4) -> str:
    """A number for a table; a dash where there is none."""
    return "–" if math.isnan(value) else f"{value:z.{digits}f}".replace("-", "−")


def share(value: float) -> str:
    """A share in percent."""
    return "–" if math.isnan(value) else f"{100 * value:.1f} %"
