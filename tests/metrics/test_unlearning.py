"""Attack success and unlearning scores: exact whatever ranks hold, repeat or lack."""

import math

import pytest
import torch

from fulgurite.metrics.item_figures import ItemFigures
from fulgurite.metrics.unlearning import AttackSuccess, UnlearningScores

IDS = [f"item {i}" for i in range(7)]


def figures(metric):
    return {name: value.item() for name, value in metric.compute().items()}


def joined(metric, *others):
    """Let ``metric`` meet other ranks at its next exchange."""
    met = iter([[other.joined(name) for other in others] for name in ("items", "figures", "values")])
    metric.dist_sync_fn = lambda tensor, group: [tensor, *next(met)]
    metric.distributed_available_fn = lambda: True
    return metric


def attack_success():
    return AttackSuccess({"head_projection": 20, "rephrase": 10}, resamples=50)


def shares(seed):
    return torch.randint(0, 3, (7,), generator=torch.Generator().manual_seed(seed)) / 10


def test_attack_success_written_out():
    metric, after, before = attack_success(), shares(1), shares(2)
    metric.update(IDS, "head_projection", after, before)
    metric.update(IDS[:4], "rephrase", after[:4])
    found = figures(metric)
    assert found["success/head_projection"] == pytest.approx(100 * sum(after > 0).item() / 7)
    assert found["success_before/head_projection"] == pytest.approx(100 * sum(before > 0).item() / 7)
    assert found["fraction/head_projection"] == pytest.approx(100 * after.mean().item())
    assert found["fraction_before/head_projection"] == pytest.approx(100 * before.mean().item())
    assert found["success/rephrase"] == pytest.approx(100 * sum(after[:4] > 0).item() / 4)
    assert math.isnan(found["success_before/rephrase"])
    assert (found["budget/head_projection"], found["budget/rephrase"]) == (20, 10)
    assert found["success/rephrase/low"] <= found["success/rephrase"] <= found["success/rephrase/high"]


def test_ranks_with_other_items_with_repeats_and_without_any_have_the_figures_of_one():
    after, before = shares(1), shares(2)
    whole = attack_success()
    whole.update(IDS, "head_projection", after, before)
    ranks = [attack_success() for _ in range(3)]
    ranks[0].update(IDS[4:], "head_projection", after[4:], before[4:])
    ranks[2].update(IDS[:5], "head_projection", after[:5], before[:5])
    assert figures(joined(ranks[1], ranks[0], ranks[2])) == pytest.approx(figures(whole), nan_ok=True)


def test_of_an_item_that_differs_among_ranks_the_first_counts():
    first, second = ItemFigures(["figure"]), ItemFigures(["figure"])
    first.update(["a", "b"], {"figure": [1.0, 2.0]})
    second.update(["b", "c"], {"figure": [50.0, 3.0]})
    assert figures(joined(first, second))["figure"] == 2


def test_the_order_of_items_changes_nothing():
    values = torch.randn(7, generator=torch.Generator().manual_seed(3)).double()
    one, other = ItemFigures(["x", "y"], resamples=40), ItemFigures(["x", "y"], resamples=40)
    one.update(IDS, {"x": values, "y": values.where(values > 0, math.nan)})
    for i in (5, 2, 0, 6, 1, 4, 3):
        other.update([IDS[i]], {"y": values[i : i + 1].where(values[i : i + 1] > 0, math.nan)})
        other.update([IDS[i]], {"x": values[i : i + 1]})
    assert figures(one) == figures(other)
    assert figures(one)["y"] == pytest.approx(values[values > 0].mean().item())


@pytest.mark.parametrize("form", ["erasure", "injection"])
def test_unlearning_scores_written_out(form):
    generator = torch.Generator().manual_seed(4)
    before, after = torch.rand(7, 3, generator=generator), torch.rand(7, 3, generator=generator)
    before[2, 1] = after[2, 1] = math.nan
    had, has = torch.rand(7, generator=generator), torch.rand(7, generator=generator)
    had[5] = math.nan
    metric = UnlearningScores(form, resamples=50)
    metric.update(IDS, before, after, {"random": (had, has)})
    found, rows = figures(metric), []
    for old, new in zip(before.tolist(), after.tolist()):
        edit = [
            max(0, (p - q) / p) if form == "erasure" else max(2e-8, 1 - (1 - q) / (1 - p))
            for p, q in zip(old[:2], new[:2])
        ]
        rows.append([*edit, 1 - abs(new[2] - old[2]) / (abs(old[2] - 0.5) + 0.5)])
    rows[2][1] = math.nan
    targets = [0.0 if math.isnan(sum(row)) or 0 in row else 3 / sum(1 / x for x in row) for row in rows]
    for name, column in zip(("rewrite", "paraphrase", "neighbourhood"), zip(*rows)):
        known = [x for x in column if not math.isnan(x)]
        assert found[name] == pytest.approx(sum(known) / len(known), rel=1e-5)
    assert found["target"] == pytest.approx(sum(targets) / 7, rel=1e-5)
    kept = [i for i in range(7) if i != 5]
    delta = 100 * (had[kept] - has[kept]).double()
    assert found["delta/random"] == pytest.approx(delta.mean().item(), rel=1e-5)
    assert found["accuracy_before/random"] == pytest.approx(100 * had[kept].mean().item(), rel=1e-5)
    assert found["accuracy_after/random"] == pytest.approx(100 * has.mean().item(), rel=1e-5)
    assert found["delta/random/low"] <= found["delta/random"] <= found["delta/random/high"]
    assert math.isnan(found["delta/neighbour_images"])


def test_nothing_edited_is_nothing_erased_and_nothing_harmed():
    p = torch.rand(7, 3, generator=torch.Generator().manual_seed(5))
    metric, right = UnlearningScores(resamples=10), torch.ones(7)
    metric.update(IDS, p, p)
    metric.update(IDS, accuracies={"random": (right, right)})
    found = figures(metric)
    assert (found["rewrite"], found["neighbourhood"], found["target"], found["delta/random"]) == (0, 1, 0, 0)


def test_a_metric_begins_anew_after_reset():
    metric = attack_success()
    metric.update(IDS, "rephrase", shares(1))
    metric.reset()
    assert math.isnan(figures(metric)["success/rephrase"])
    metric.update(IDS, "rephrase", torch.ones(7))
    assert figures(metric)["success/rephrase"] == 100


def test_wrong_input_is_refused():
    for make, message in [
        (lambda: AttackSuccess({}), "budgets={}"),
        (lambda: AttackSuccess({"a": 0}), "budgets={'a': 0}"),
        (lambda: UnlearningScores("other"), "form='other'"),
        (lambda: ItemFigures(["a", "a"]), "each once"),
        (lambda: attack_success().update(IDS, "relearning", shares(1)), "'success/relearning' has values"),
        (lambda: attack_success().update(IDS[:3], "rephrase", shares(1)), "for 3 items"),
        (lambda: UnlearningScores().update(IDS, torch.rand(7, 2), torch.rand(7, 2)), "three for each"),
        (lambda: UnlearningScores().update(IDS, torch.rand(7, 3)), "three for each"),
        (lambda: UnlearningScores().update(IDS, accuracies={"x": (shares(1), shares(1))}), "'delta/x'"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
