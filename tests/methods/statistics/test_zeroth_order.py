import math

import pytest
import torch

from fulgurite.methods.statistics.noise import normal
from fulgurite.methods.statistics.zeroth_order import ZerothOrderStatistics, two_passes


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_noise_depends_on_its_place_alone_and_is_standard_normal():
    whole = normal(1, "test", 2, "w", 20001)
    for start, count in ((0, 7), (1, 7), (4, 1), (33, 100), (20000, 1)):
        assert torch.equal(normal(1, "test", 2, "w", count, start), whole[start : start + count])
    assert not torch.equal(normal(1, "test", 3, "w", 7), whole[:7])
    assert abs(whole.mean()) < 0.02
    assert abs(whole.std() - 1) < 0.02
    assert abs((whole**4).mean() - 3) < 0.25
    assert abs((whole[:-1:2] * whole[1::2]).mean()) < 0.03


def test_a_linear_loss_gives_its_product_with_the_noise_whatever_eps(monkeypatch):
    monkeypatch.setattr("fulgurite.methods.statistics.zeroth_order.PIECE", 7)
    weight, slope = draw(6, 5), draw(6, 5, seed=1)
    for eps in (1e-3, 0.5):
        scores = ZerothOrderStatistics({"w": weight}, eps=eps, draws=2, seed=3)
        scores.update(two_passes(lambda: (slope * weight).sum()), batch=4)
        noises = [scores.noise("w", number, 0, 30).view(6, 5) for number in (8, 9)]
        expected = sum(abs((slope * noise).sum().item()) for noise in noises) / 2
        assert scores.means()["w"].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("together", [False, True])
def test_the_mean_tends_to_the_norm_of_the_gradient(together):
    weights = {"a": draw(4, 6), "b": draw(3, 4, seed=1)}
    x = draw(10, 6, seed=2)

    def loss():
        return (torch.tanh(x @ weights["a"].T) @ weights["b"].T).square().mean()

    for weight in weights.values():
        weight.requires_grad_(True)
    gradients = torch.autograd.grad(loss(), list(weights.values()))
    for weight in weights.values():
        weight.requires_grad_(False)
    draws = 3000
    units = {"a": "block", "b": "block"} if together else None
    scores = ZerothOrderStatistics(weights, units, eps=1e-5, draws=draws)
    scores.update(two_passes(loss), batch=0)
    norms = {name: gradient.norm().item() for name, gradient in zip(weights, gradients)}
    if together:
        norms = {"block": math.hypot(*norms.values())}
    spread = math.sqrt(math.pi / 2 - 1)  # of |c| relative to its mean: 0.76
    for unit, norm in norms.items():
        assert abs(scores.means()[unit].item() / (math.sqrt(2 / math.pi) * norm) - 1) < 3 * spread / math.sqrt(draws)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_random_numbers_are_put_back_bit_for_bit(dtype):
    weights = {"a": draw(40, 6, dtype=torch.float32).to(dtype), "b": draw(3, 4, seed=1, dtype=torch.float32).to(dtype)}
    before, state = {name: weight.clone() for name, weight in weights.items()}, torch.get_rng_state()
    seen = []

    def loss():
        seen.append(torch.rand(3).tolist())  # dropout, say
        assert any(not torch.equal(weights[name], before[name]) for name in weights)
        return sum(weight.float().sum() for weight in weights.values())

    scores = ZerothOrderStatistics(weights, eps=0.1)
    scores.update(two_passes(loss), batch=0)
    assert seen[0] == seen[1] == seen[2]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[name], before[name]) for name in weights)

    def fails():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        scores.update(two_passes(fails), batch=1)
    assert all(torch.equal(weights[name], before[name]) for name in weights)
    with pytest.raises(ValueError, match="not finite"):
        scores.update(two_passes(lambda: math.nan), batch=1)


def test_batches_may_be_shared_by_processes_and_weights_sharded_by_rows(monkeypatch):
    monkeypatch.setattr("fulgurite.methods.statistics.zeroth_order.PIECE", 7)
    weight, slopes = draw(6, 5), draw(4, 6, 5, seed=1)

    def scored(batches):
        scores = ZerothOrderStatistics({"w": weight}, draws=2, seed=5)
        for batch in batches:
            scores.update(two_passes(lambda batch=batch: (slopes[batch] * weight).sum()), batch)
        return scores

    whole, first, second = scored(range(4)), scored([0, 2]), scored([1, 3])
    assert whole.sums["w"].item() == pytest.approx(first.sums["w"].item() + second.sums["w"].item(), rel=1e-12)
    shards = [
        ZerothOrderStatistics({"w": weight[rows]}, seed=5, first_rows={"w": start})
        for rows, start in ((slice(0, 4), 0), (slice(4, 6), 4))
    ]
    parts = torch.cat([shard.noise("w", 3, 0, shard.parameters["w"].numel()) for shard in shards])
    assert torch.equal(parts, whole.noise("w", 3, 0, 30))


def test_a_caller_may_run_only_what_follows_the_unit():
    layers = [draw(5, 5, seed=seed) for seed in range(4)]
    weights = {str(number): layer for number, layer in enumerate(layers)}
    x = draw(2, 5, seed=9)

    def suffix(state, first):
        for layer in layers[first:]:
            state = torch.tanh(state @ layer.T)
        return state

    entering = [x]
    for number in range(4):
        entering.append(torch.tanh(entering[-1] @ layers[number].T))

    def from_here(unit, at):
        states = []
        for sign in (1, -1):
            with at(sign):
                states.append(torch.tanh(entering[int(unit)] @ layers[int(unit)].T))
        plus, minus = suffix(torch.stack(states), int(unit) + 1).square().sum((1, 2))
        return plus, minus

    plain, cached = ZerothOrderStatistics(weights), ZerothOrderStatistics(weights)
    plain.update(two_passes(lambda: suffix(x, 0).square().sum()), 0)
    cached.update(from_here, 0)
    for unit, score in plain.means().items():
        assert cached.means()[unit].item() == pytest.approx(score.item(), rel=1e-8)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="eps=0"):
        ZerothOrderStatistics({"w": draw(2, 2)}, eps=0)
    with pytest.raises(ValueError, match="no unit"):
        ZerothOrderStatistics({"w": draw(2, 2)}, {"v": "u"})
    scores = ZerothOrderStatistics({"w": draw(2, 2)})
    with pytest.raises(LookupError, match="no unit 'v'"):
        scores.update(two_passes(lambda: 0.0), 0, units=["v"])
    with pytest.raises(ValueError, match="never scored"):
        scores.means()
