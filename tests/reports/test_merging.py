"""The page of a merge: its figures are those of the diagnostics, and nothing from files is markup."""

import math
import re

import pytest
import torch

from fulgurite.checkpoints import read_manifest, save_checkpoint_folder
from fulgurite.checkpoints.lineage import Node, lineage
from fulgurite.methods.merging.diagnostics import by_layer, diagnose, over_pairs, whole
from fulgurite.reports import merging
from fulgurite.reports.merging import (
    distinct,
    layer_section,
    merge_page,
    model_section,
    pair_columns,
    pair_values,
    sections_of_lineage,
    sections_of_merge,
    short,
)

NAMES = ["blocks.0.a.weight", "blocks.1.a.weight", "head.weight"]


def models(num):
    generator = torch.Generator().manual_seed(0)
    base = {n: torch.randn(6, 5, generator=generator) for n in NAMES}
    experts = [{n: t + torch.randn(6, 5, generator=generator) for n, t in base.items()} for _ in range(num)]
    return base, experts


def cells(html):
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", html)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


def text_of(html):
    return re.sub(r"<[^>]+>", "", re.sub(r"<img[^>]*>", "", html))


def test_the_table_and_the_text_are_the_figures_of_the_whole_model():
    base, experts = models(3)
    merged = {n: (experts[0][n] + base[n]) / 2 for n in base}
    merged["head.weight"] = base["head.weight"]
    total = whole(diagnose(experts, base, merged))
    html = model_section(total, ["1  a", "2  b", "3  c"], True).html
    rows = cells(html)
    for i in range(3):
        figures = (total.norms[i], total.norm_ratios[i], total.merged_cosine[i])
        assert rows[i + 1][1:] == [f"{value:.4f}".replace("-", "−") for value in figures]
    assert rows[4][:3] == ["merged", f"{total.merged_norm:.4f}", f"{total.merged_ratio:.4f}"]
    assert "changed 66.7 % of the entries" in text_of(html)
    kinship = f"{over_pairs(total.correlation):.3f}".replace("-", "−")
    assert f"Model kinship {kinship}: the mean over the pairs of the correlation" in text_of(html)
    assert html.count("<img") == 2


def test_without_a_merged_model_base_or_second_source():
    base, experts = models(3)
    one = "".join(section.html for section in sections_of_merge(diagnose(experts[:1], base), ["a"], True))
    assert one.count("<img") == 1  # the norms alone
    assert "kinship" not in one
    assert "The merge has changed" not in one
    two = model_section(whole(diagnose(experts[:2])), ["1  a", "2  b"], False).html
    assert "from the mean of the models, for want of a base. Such changes cancel: 2 models always have cosine −1" in two
    three = model_section(whole(diagnose(experts)), ["1  a", "2  b", "3  c"], False).html
    assert "3 models that have nothing in common have about cosine −0.50" in three


def test_a_model_that_has_not_changed_has_dashes(monkeypatch):
    base, experts = models(2)
    drawn = []
    monkeypatch.setattr(
        merging, "heat_figure", lambda *given: drawn.append(given) or merging.dots_figure({"a": [1.0]}, ["x"], "", "")
    )
    total = whole(diagnose([experts[0], base], base))
    assert "Model kinship –" in model_section(total, ["1  a", "2  b"], True).html
    layer_section(
        by_layer(diagnose([experts[0], {**experts[1], "head.weight": base["head.weight"]}], base)), ["a", "b"], True
    )
    matrix, rows, columns, *_, note = drawn[2]
    assert rows == ["blocks.0", "blocks.1", "head"]
    assert columns == ["1–2"]
    assert math.isnan(matrix[2][0])
    assert note == "hatched: one has not changed"


def test_too_many_pairs_become_the_mean_with_the_others():
    generator = torch.Generator().manual_seed(0)
    for num in (10, 11):
        matrix = torch.randn(num, num, generator=generator)
        matrix = matrix + matrix.T
        assert len(pair_values(matrix)) == len(pair_columns(num))
    assert pair_columns(10)[:2] == ["1–2", "1–3"]
    assert pair_columns(11)[:2] == ["1", "2"]
    assert pair_values(matrix)[3] == pytest.approx(float((matrix[3].sum() - matrix[3, 3]) / 10), rel=1e-5)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a/checkpoints/last", "runs/b/checkpoints/last"], ["a", "b"]),
        (["x/a.safetensors", "x/b.safetensors"], ["a.safetensors", "b.safetensors"]),
        (["a/m", "b/n"], ["a/m", "b/n"]),
        (["a/m", "a/m"], ["m", "m"]),
        (["a/b", "a"], ["a/b", "a"]),
        (["a/b/c", "a/b"], ["b/c", "b"]),
        (["only/one"], ["one"]),
    ],
)
def test_names_are_what_paths_do_not_have_in_common(paths, names):
    assert distinct(paths) == names


def test_digests_are_short():
    assert short("xxh3_128:0123456789abcdef") == "0123456789"
    assert short("xxh3_128:0123456789abcdef,sha256:fedcba9876543210") == "0123456789, fedcba9876"


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Two generations; one parent is gone, and names are hostile."""
    monkeypatch.chdir(tmp_path)

    def made(path, parents, metrics, options):
        recorded = [{"path": p, "digest": read_manifest(p).digest if p == "pair" else "xxh3_128:0123"} for p in parents]
        merge = {"class_path": "fulgurite.methods.merging.linear.Average", "init_args": options}
        settings = {"merge": merge, "merger": "Average", "weights": [1.0, 0.5]}
        save_checkpoint_folder(
            path, {"weights": {"a": torch.ones(2)}}, parents=recorded, settings=settings, metrics=metrics
        )

    made("pair", ["a<script>", "b"], {"val/accuracy": 0.5}, {})
    made("all", ["pair", "gone"], {"val/accuracy": 0.75, "<b>": 1}, {"normalize": False, "note": "<i>"})
    return lineage("all")


def test_the_tree_says_what_every_model_was(tree):
    section, scores = sections_of_lineage(tree)
    assert section.html.count("<li>") == 5
    assert re.search(r"<b[^>]*>pair</b>.*?<ul><li>.*?a&lt;script&gt;", section.html)
    text = text_of(section.html)
    for part in (
        "merge: Average (normalize false, note &quot;&lt;i&gt;&quot;)",
        "expert 2, weight 0.5 0123 not there any more",
        "val/accuracy 0.75",
        read_manifest("pair").digest.partition(":")[2][:10],
    ):
        assert part in text
    assert "<script" not in section.html
    assert "<i>" not in section.html
    assert cells(scores.html) == [
        ["model", "&lt;b&gt;", "val/accuracy"],
        ["all", "1", "0.75"],
        ["pair", "–", "0.5"],
    ]


def test_many_scores_are_counted(tree):
    tree.manifest.metrics.update({f"m{i}": float(i) for i in range(20)})
    (_, scores) = sections_of_lineage(tree)
    assert len(cells(scores.html)[0]) == 9
    assert "14 more scores" in scores.html


def test_the_page_stands_alone_and_is_the_same_again(tree):
    base, experts = models(2)
    names = ["a<script>", "b$x$"]
    first = merge_page(diagnose(experts, base), names, True, tree)
    assert first == merge_page(diagnose(experts, base), names, True, tree)
    assert "<script" not in first
    assert "<h1>all</h1>" in first
    assert not re.search(r"""(src|href)=["'](?!data:|#|https://arxiv)""", first)
    assert [re.sub("<.*?>", "", t) for t in re.findall("<h2>.*?</h2>", first)] == [
        *("Task vectors", "Layers", "Merge tree", "Scores", "Run"),
    ]


def test_every_state_of_a_parent_can_be_shown():
    for state in ("file", "missing", "changed", "damaged", "repeated", "further"):
        (section,) = sections_of_lineage(Node("a/b", "xxh3_128:01", "base", state))
        assert merging.STATES[state] in section.html
