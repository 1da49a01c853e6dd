"""TIES against a loop over coordinates in plain Python, in each dialect."""

import itertools
import math

import pytest
import torch

from fulgurite.methods.merging.base import survey
from fulgurite.methods.merging.plan import Matching, plan_of
from fulgurite.methods.merging.ties import Ties


def sign(x):
    return (x > 0) - (x < 0)


def kept_of(tau, keep, all_ties):
    order = sorted(range(len(tau)), key=lambda j: (-abs(tau[j]), j))
    chosen = set(order[:keep])
    if all_ties:
        chosen |= {j for j in order if abs(tau[j]) >= abs(tau[order[keep - 1]])}
    return [value if j in chosen else 0.0 for j, value in enumerate(tau)]


def slow_ties(taus, weights, densities, aggregate, vote, dialect):
    """tau* of flat task vectors, all in the same scope."""
    count = len(taus[0])
    official = dialect == "official"
    keep = [min(int(d * count) + 1, count) if official else max(int(d * count), d > 0) for d in densities]
    taus = [kept_of(tau, own, official) for tau, own in zip(taus, keep)]
    heard = [1.0] * len(taus) if dialect == "peft" else weights

    def votes(j, strength):
        return sum(w * (sign(t[j]) if vote == "frequency" else t[j]) for w, t in zip(strength, taus))

    majority = sign(sum(sign(votes(j, [1.0] * len(taus))) for j in range(count)))
    merged = []
    for j in range(count):
        elected = sign(votes(j, heard)) or (1 if dialect in ("mergekit", "peft") else majority)
        agree = [(w, t[j]) for w, h, t in zip(weights, heard, taus) if (h * t[j] > 0 if elected > 0 else h * t[j] < 0)]
        if aggregate == "max":
            merged.append(elected * max((abs(w * t) for w, t in agree), default=0.0))
            continue
        total = sum(w * t for w, t in agree)
        divisor = len(agree) if dialect == "peft" else sum(abs(w) for w, _ in agree)
        merged.append(total / divisor if aggregate == "mean" and divisor else total)
    return torch.tensor(merged, dtype=torch.float64)


def integers(seed, count=40, models=4):
    """Task vectors of small integers: many ties, and many votes that cancel."""
    return torch.randint(-3, 4, (models, count), generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("dialect", ["none", "official", "mergekit", "peft"])
@pytest.mark.parametrize("aggregate", ["mean", "sum", "max"])
def test_every_rule_is_its_definition(dialect, aggregate):
    weights = [[1.0] * 4, [1.0, 0.5, 2.0, -0.75], [1.0, 0.0, 1.0, 1.0]]
    densities, votes = [0.2, 0.5, 1.0], ["total", "frequency"]
    base = {"x": torch.zeros(40, dtype=torch.float64)}
    for seed, (own, density, vote) in enumerate(itertools.product(weights, densities, votes)):
        taus = integers(seed)
        merger = Ties(density, 1.0, aggregate, vote=vote, dialect=dialect)
        merged = merger([{"x": tau} for tau in taus], base, own)["x"]
        expected = slow_ties(taus.tolist(), own, [density] * 4, aggregate, vote, dialect)
        torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dialect", ["none", "official", "mergekit"])
def test_every_expert_has_its_own_density(dialect):
    densities, base = [0.1, 1.0, 0.6, 0.0], {"x": torch.zeros(40, dtype=torch.float64)}
    taus = integers(21)
    expected = slow_ties(taus.tolist(), [1.0] * 4, densities, "mean", "total", dialect)
    for scope in ("model", "tensor"):
        merged = Ties(densities, scope=scope, dialect=dialect)([{"x": tau} for tau in taus], base)["x"]
        torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)
        singles = [{"x": tau.float()} for tau in taus]
        merged = Ties(densities, scope=scope, dialect=dialect)(singles, {"x": torch.zeros(40)})["x"]
        torch.testing.assert_close(merged, expected.float())
    with pytest.raises(ValueError, match="density has 4 values for 2 models"):
        Ties(densities)([{"x": tau} for tau in taus[:2]], base)


@pytest.mark.parametrize("dialect", ["none", "official"])
@pytest.mark.parametrize("density", [0.15, 0.6, 1.0])
def test_the_models_scope_is_one_flat_vector_in_sorted_order(dialect, density):
    taus = integers(11, 60, 3)
    names, sizes = ["a", "b", "c"], [25, 5, 30]
    experts = [dict(zip(names, tau.split(sizes))) for tau in taus]
    base = {name: torch.zeros(size, dtype=torch.float64) for name, size in zip(names, sizes)}
    merged = Ties(density, dialect=dialect)([dict(reversed(e.items())) for e in experts], base)
    expected = slow_ties(taus.tolist(), [1.0] * 3, [density] * 3, "mean", "total", dialect)
    torch.testing.assert_close(torch.cat([merged[n] for n in names]), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dialect", ["none", "official"])
def test_pieces_threads_and_scopes_change_nothing(dialect):
    generator = torch.Generator().manual_seed(5)
    taus = torch.randn(3, 300, generator=generator).mul(20).round()
    base = {"x": torch.zeros(300), "y": torch.zeros(40)}
    experts = [{"x": tau, "y": tau[:40].flip(0)} for tau in taus]
    merger = Ties(0.3, dialect=dialect)
    whole = merger(experts, base)
    plan = plan_of(experts, base)
    survey(merger, plan, threads=2, size=64)
    pieces = {name: list(merger.merge_one(plan.operands(name, 64), [1.0] * 3)) for name in base}
    assert len(pieces["x"]) == 5
    assert all(torch.equal(torch.cat(pieces[name]), whole[name]) for name in base)
    alone = [
        Ties(0.3, scope=s, dialect=dialect)([{"x": t} for t in taus], {"x": base["x"]}) for s in ("tensor", "model")
    ]
    assert torch.equal(alone[0]["x"], alone[1]["x"])


def test_scaling_all_task_vectors_scales_the_result(base, experts):
    merger = Ties(0.3)
    once = merger(experts, base)
    larger = [
        {n: base[n] + 4 * (e[n] - base[n]) if base[n].is_floating_point() else base[n] for n in base} for e in experts
    ]
    times = merger(larger, base)
    for name in ("embed.weight", "conv.weight", "scale"):
        torch.testing.assert_close(times[name] - base[name], 4 * (once[name] - base[name]), rtol=1e-4, atol=1e-5)


def test_lam_multiplies_and_zero_gives_the_base(base, experts):
    once, twice = Ties(0.4)(experts, base), Ties(0.4, lam=2.0)(experts, base)
    for name in ("embed.weight", "scale"):
        torch.testing.assert_close(twice[name] - base[name], 2 * (once[name] - base[name]), rtol=1e-4, atol=1e-5)
    nothing = Ties(0.4, lam=0.0)(experts, base)
    assert torch.equal(nothing["embed.weight"], base["embed.weight"])


def test_entries_of_one_expert_alone_are_its_own_to_the_bit(base, experts):
    merged = Ties(0.2, scope="tensor")(experts, base)["embed.weight"]
    keep = int(0.2 * merged.numel())
    own = base["embed.weight"]
    masks = []
    for expert in experts:
        change = (expert["embed.weight"] - own).abs().flatten()
        masks.append(torch.zeros_like(change, dtype=torch.bool).index_fill_(0, change.topk(keep).indices, True))
    masks = torch.stack(masks).view(3, *own.shape)
    alone = masks.sum(0) == 1
    assert alone.sum() > 10
    for mask, expert in zip(masks, experts):
        assert torch.equal(merged[mask & alone], expert["embed.weight"][mask & alone])
    assert torch.equal(merged[~masks.any(0)], own[~masks.any(0)])


def test_running_statistics_take_no_part_in_the_models_threshold(base, experts):
    plain = Ties(0.3)(experts, base)
    for expert in experts:
        expert["bn.running_var"] = expert["bn.running_var"] * 1000
    assert torch.equal(Ties(0.3)(experts, base)["embed.weight"], plain["embed.weight"])


def test_a_model_with_other_rows_is_cut_to_the_common_ones(base, experts):
    experts[1]["embed.weight"] = experts[1]["embed.weight"][:5]
    short = [{**e, "embed.weight": e["embed.weight"][:5]} for e in experts]
    merged = Ties(0.3)(experts, base, matching=Matching(rows="common"))
    expected = Ties(0.3)(short, {**base, "embed.weight": base["embed.weight"][:5]})
    assert all(torch.equal(merged[n], expected[n]) for n in merged)


def test_densities_and_defaults():
    assert [Ties(dialect=d).density for d in ("none", "official", "mergekit")] == [0.2, 0.2, 1.0]
    assert [Ties(0.2, dialect=d).scope for d in ("none", "official", "mergekit", "peft")] == ["model"] * 2 + [
        "tensor"
    ] * 2
    with pytest.raises(ValueError, match="give density"):
        Ties(dialect="peft")
    for wrong in (-0.1, 1.5, 20, math.nan, [0.5, 2.0], []):
        with pytest.raises(ValueError, match="density lies between 0 and 1"):
            Ties(wrong)
