"""Kinship and sign conflicts against slow plain formulas, and where they have no value."""

import math
from dataclasses import replace

import pytest
import torch

from fulgurite.methods.merging.diagnostics import by_layer, comparable, diagnose, diagnose_plan, over_pairs, whole
from fulgurite.methods.merging.plan import Matching, plan_of


def flat(state, names):
    return torch.cat([state[name].double().reshape(-1) for name in names])


def sparse(experts, base):
    """The experts with about a third of their changes taken back, so that zeros occur."""
    generator = torch.Generator().manual_seed(9)
    out = []
    for expert in experts:
        taken = {n: torch.rand(t.shape, generator=generator) < 0.3 for n, t in base.items()}
        out.append({n: torch.where(taken[n], base[n], t) for n, t in expert.items()})
    return out


def plain(experts, base, merged, names):
    """Every figure by loops over coordinates."""
    start = flat(base, names).tolist()
    taus = [[a - b for a, b in zip(flat(expert, names).tolist(), start)] for expert in experts]
    change = [a - b for a, b in zip(flat(merged, names).tolist(), start)]

    def norm(x):
        return math.sqrt(sum(v * v for v in x))

    def cosine(x, y):
        return sum(a * b for a, b in zip(x, y)) / (norm(x) * norm(y))

    def centred(x):
        return [v - sum(x) / len(x) for v in x]

    def conflict(x, y):
        both = [a * b for a, b in zip(x, y) if a and b]
        return sum(v < 0 for v in both) / len(both)

    rows = list(zip(*taus))
    shared = [row for row in rows if sum(v != 0 for v in row) >= 2]
    fought = [row for row in shared if min(row) < 0 < max(row)]
    touched = [c for c, row in zip(change, rows) if any(row)]
    return {
        "cosine": [[cosine(x, y) for y in taus] for x in taus],
        "correlation": [[cosine(centred(x), centred(y)) for y in taus] for x in taus],
        "conflict": [[conflict(x, y) for y in taus] for x in taus],
        "norms": [norm(x) for x in taus],
        "norm_ratios": [norm(x) / norm(start) for x in taus],
        "contested": len(fought) / len(shared),
        "merged_norm": norm(change),
        "merged_ratio": norm(change) / norm(start),
        "merged_cosine": [cosine(change, x) for x in taus],
        "kept": sum(v != 0 for v in touched) / len(touched),
    }


@pytest.fixture
def merged(experts, base):
    return {n: (experts[0][n] + base[n]) / 2 if t.is_floating_point() else t for n, t in base.items()}


@pytest.mark.parametrize("names", [None, ["embed.weight"]])
def test_every_figure_is_that_of_the_plain_formula(experts, base, merged, names):
    experts = sparse(experts, base)
    found = diagnose(experts, base, merged)
    result = whole(found) if names is None else found[names[0]]
    expected = plain(experts, base, merged, names or list(found))
    for figure, value in expected.items():
        torch.testing.assert_close(
            torch.as_tensor(getattr(result, figure), dtype=torch.float64),
            torch.tensor(value, dtype=torch.float64),
            rtol=1e-9,
            atol=1e-12,
        )
    assert over_pairs(result.cosine) == pytest.approx(
        sum(expected["cosine"][i][j] for i, j in [(0, 1), (0, 2), (1, 2)]) / 3
    )


def test_integers_are_not_compared_and_tied_tensors_count_once(experts, base):
    for model in (base, *experts):
        model["tied.weight"] = model["embed.weight"]
    found = diagnose(experts, base)
    assert set(base) - set(found) == {"bn.num_batches_tracked", "position_ids", "tied.weight"}


def test_pieces_change_nothing(experts, base, merged):
    one, many = (whole(diagnose(experts, base, merged, piece=size)) for size in (2**18, 5))
    for figure, value in vars(one).items():
        torch.testing.assert_close(getattr(many, figure), value, rtol=1e-12, atol=1e-12)
    assert torch.equal(one.opposed, many.opposed)


def test_the_same_change_and_the_opposite_one(base, experts):
    opposite = {n: 2 * base[n] - t if t.is_floating_point() else t for n, t in experts[0].items()}
    double = {n: t.double() if t.is_floating_point() else t for n, t in base.items()}  # 2 b - t has no rounding then
    result = whole(diagnose([experts[0], experts[0], opposite], double))
    expected = torch.tensor([[1.0, 1, -1], [1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    torch.testing.assert_close(result.cosine, expected, rtol=0, atol=1e-6)
    assert torch.equal(result.conflict[0], torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    assert result.contested == 1


def test_without_a_change_there_is_no_direction(base, experts):
    result = whole(diagnose([experts[0], base], base, base))
    assert torch.equal(result.cosine.isnan(), torch.tensor([[False, True], [True, True]]))
    assert result.conflict[0, 1].isnan()
    assert math.isnan(result.contested)
    assert result.norms[1] == result.norm_ratios[1] == result.merged_norm == result.kept == 0
    assert math.isnan(over_pairs(result.cosine))


@pytest.mark.parametrize("size", range(5, 40))
def test_a_shift_by_one_number_has_no_correlation(size):
    base = {"a": torch.zeros(size, dtype=torch.float64)}
    ramp = torch.arange(float(size), dtype=torch.float64)
    result = whole(diagnose([{"a": torch.full((size,), 0.1, dtype=torch.float64)}, {"a": ramp}], base))
    assert result.correlation[0].isnan().all()
    assert result.correlation[1, 1] == pytest.approx(1)
    assert result.cosine[0, 1] == pytest.approx(float(ramp.sum() / (size**0.5 * ramp.norm())))


def test_without_a_merged_model_its_figures_have_no_value(base, experts):
    result = whole(diagnose(experts, base))
    assert math.isnan(result.merged_norm)
    assert math.isnan(result.kept)
    assert result.merged_cosine.isnan().all()


def test_without_a_base_changes_are_from_the_mean(experts):
    mean = {n: sum(e[n].double() for e in experts) / 3 if t.is_floating_point() else t for n, t in experts[0].items()}
    apart, given = whole(diagnose(experts)), whole(diagnose(experts, mean))
    torch.testing.assert_close(apart.cosine, given.cosine)
    torch.testing.assert_close(apart.base_square, given.base_square)
    two = whole(diagnose(experts[:2]))
    torch.testing.assert_close(two.cosine[0, 1], torch.tensor(-1.0, dtype=torch.float64))


def test_layers_stand_in_the_order_of_their_numbers_and_add_up():
    names = [
        "cls",
        "blocks.10.a.weight",
        "blocks.2.b.weight",
        "blocks.2.a.weight",
        "0.weight",
        "head.weight",
        "head.bias",
    ]
    generator = torch.Generator().manual_seed(3)
    base, *experts = ({n: torch.randn(4, generator=generator) for n in names} for _ in range(3))
    layers = by_layer(diagnose(experts, base))
    assert list(layers) == ["cls", "blocks.2", "blocks.10", "0", "head"]
    assert layers["head"].size == 8
    torch.testing.assert_close(whole(layers).gram, whole(diagnose(experts, base)).gram)


def test_models_with_nothing_in_common_are_refused():
    with pytest.raises(ValueError, match="nothing to compare"):
        whole(diagnose([{"n": torch.tensor(3)}] * 2))
    with pytest.raises(ValueError, match="holds NaN in a"):
        diagnose([{"a": torch.tensor([torch.nan])}], {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"a: the merged tensor is \(3,\), the models' \(2,\)"):
        diagnose([{"a": torch.ones(2)}], {"a": torch.zeros(2)}, {"a": torch.ones(3)})


def test_only_tensors_that_all_models_have_a_part_in_are_compared(experts, base):
    for expert in experts[1:]:
        expert["head.weight"] = expert["head.weight"][:2]
    plan = plan_of(experts, base, Matching(rows="common"))
    plan = replace(plan, owners={"embed.weight": [0, 2, 1, 3], "conv.weight": [0, 1, 2, 3], "scale": [0, 1]})
    assert set(plan.merged) - set(comparable(plan)) == {"embed.weight", "scale"}
    cut = {n: t[:2] if n == "head.weight" else t for n, t in base.items()}
    found = diagnose_plan(plan, cut)
    assert set(found) == set(comparable(plan))
    assert found["head.weight"].size == 12
    assert found["head.weight"].merged_square == 0
