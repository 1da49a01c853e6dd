import copy
import math
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fulgurite.methods.compression import compressed_blocks, matrices, totals
from fulgurite.methods.layer_walk import LayerWalk
from fulgurite.methods.pruning.ecoflap import Ecoflap
from fulgurite.methods.pruning.magnitude import Magnitude
from fulgurite.methods.statistics.zeroth_order import ZerothOrderStatistics, two_passes
from fulgurite.methods.structure import ModelSpec, Tower


class ResidualBlock(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.fc2(torch.tanh(self.fc1(x)))


class TwoTowers(nn.Module):
    """Pictures and texts that meet in the loss alone, as in CLIP."""

    def __init__(self):
        super().__init__()
        self.visual = nn.ModuleList(ResidualBlock(6, 10) for _ in range(3))
        self.text = nn.ModuleList(ResidualBlock(6, 8) for _ in range(2))

    def forward(self, batch):
        image, text = batch
        for block in self.visual:
            image = block(image)
        for block in self.text:
            text = block(text)
        return image.mean(1) @ text.mean(1).T


def generator(seed):
    return torch.Generator().manual_seed(seed)


def case(name, language_models, batches=2):
    """Walk over a fresh model, and its loss."""
    if name == "two towers":
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            model = TwoTowers().double().eval()
        spec = ModelSpec((Tower("visual", r"visual\.\d", 3, 6), Tower("text", r"text\.\d", 2, 6)))
        data = [
            tuple(torch.randn(3, 4, 6, generator=generator(9 * i + j)).double() for j in range(2))
            for i in range(batches)
        ]
        return LayerWalk(model, spec, data, model), lambda batch: cross_entropy(model(batch), torch.arange(3))
    model, spec = copy.deepcopy(language_models[name][0]), language_models[name][1]
    data = [torch.randint(3, 40, (2, 6), generator=generator(i)) for i in range(batches)]
    extra = {"use_cache": False}

    def forward(ids):
        return model(input_ids=ids, **({"labels": ids} if name == "t5" else {}), **extra).logits

    return LayerWalk(model, spec, data, forward), lambda ids: cross_entropy(forward(ids).flatten(0, 1), ids.flatten())


MODELS = ("llama", "t5", "two towers")


def counted(modules):
    """How often the forward of each module really runs."""
    count = Counter()

    def replaced(name, forward):
        def run(*args, **kwargs):
            count[name] += 1
            return forward(*args, **kwargs)

        return run

    for name, module in modules.items():
        module.forward = replaced(name, module.forward)
    return count


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_whole_passes_of_which_half_are_run(name, language_models):
    walk, loss = case(name, language_models)
    model, names = walk.model, list(matrices(walk))
    plain = ZerothOrderStatistics({each: model.get_submodule(each).weight for each in names}, seed=3)
    for number, batch in enumerate(walk.batches):
        plain.update(two_passes(lambda batch=batch: loss(batch)), number)
    before = {each: tensor.clone() for each, tensor in model.state_dict().items()}
    blocks = walk.spec.all_block_names(model)
    count = counted({each: model.get_submodule(each) for each in (*blocks, *names)})
    patched = {each: module.forward for each, module in model.named_modules() if "forward" in module.__dict__}
    state = torch.get_rng_state()
    found = Ecoflap(samples=None, seed=3).importance(walk, loss)
    assert found == pytest.approx({each: value.item() for each, value in plain.means().items()}, rel=1e-6)
    assert all(torch.equal(tensor, before[each]) for each, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(model.get_submodule(each).forward is forward for each, forward in patched.items())
    assert not any(parameter.grad is not None for parameter in model.parameters())
    expected, spec = 3 * len(blocks) - len(walk.towers), walk.spec
    for tower in spec.towers:
        own = spec.block_names(model, tower.name)
        later = [] if name == "two towers" or tower is spec.towers[-1] else spec.block_names(model, spec.towers[1].name)
        for place, block in enumerate(own):
            # Its own for both signs, those that follow for both together, and the other tower that sees it.
            calls = 2 + (len(own) - place - 1) + 2 * len(later)
            expected += calls * sum(each.startswith(f"{block}.") for each in names)
    assert sum(count[block] for block in blocks) == len(walk.batches) * expected
    assert expected <= {"llama": 0.57, "t5": 0.55, "two towers": 0.42}[name] * 2 * len(names) * len(blocks)


def test_at_most_half_of_the_calls_are_left_and_hardly_more_of_the_arithmetic():
    """As in a model of the usual depth."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.Sequential(*(ResidualBlock(4, 6) for _ in range(12))).double().eval()
    walk = LayerWalk(model, ModelSpec((Tower("all", r"\d+", 12, 4),)), [torch.randn(2, 4).double()], model)
    rows = Counter()
    for block in model:
        forward = block.forward

        def run(x, forward=forward):
            rows["calls"] += 1
            rows["examples"] += len(x)
            return forward(x)

        block.forward = run
    found = Ecoflap(samples=None).importance(walk, lambda x: model(x).square().mean())
    assert len(found) == 24
    assert rows["calls"] < 0.4 * 2 * 24 * 12
    assert rows["examples"] < 2 * 0.63 * 2 * 24 * 12


def test_a_linear_loss_gives_its_product_with_the_noise_whatever_eps(language_models):
    walk, _ = case("two towers", language_models)
    weights = {name: walk.model.get_submodule(name).weight for name in matrices(walk)}
    slopes = {name: torch.randn(w.shape, generator=generator(7)).double() for name, w in weights.items()}

    def loss(batch):
        walk.model(batch)
        return sum((slopes[name] * weight).sum() for name, weight in weights.items())

    noise = ZerothOrderStatistics(weights, seed=5)
    for eps in (1e-3, 0.5):
        found = Ecoflap(samples=None, seed=5, eps=eps, draws=2).importance(walk, loss)
        for name, weight in weights.items():
            products = [
                abs((slopes[name].flatten() @ noise.noise(name, number, 0, weight.numel())).item())
                for number in range(4)
            ]
            assert found[name] == pytest.approx(sum(products) / 4, rel=1e-8)
    group = Ecoflap(samples=None, seed=5, perturb="group").importance(walk, loss)
    assert list(group) == walk.spec.all_block_names(walk.model)
    for block, value in group.items():
        products = [
            abs(
                sum(
                    (slopes[name].flatten() @ noise.noise(name, number, 0, weights[name].numel())).item()
                    for name in (f"{block}.fc1", f"{block}.fc2")
                )
            )
            for number in range(2)
        ]
        assert value == pytest.approx(sum(products) / 2, rel=1e-8)


@pytest.mark.parametrize("score", ["gradient", "magnitude", "squared"])
@pytest.mark.parametrize("name", MODELS)
def test_first_order_scores_are_those_of_autograd(name, score, language_models):
    walk, loss = case(name, language_models)
    weights = {each: walk.model.get_submodule(each).weight for each in matrices(walk)}
    found = Ecoflap(order="first", score=score, samples=None).importance(walk, loss)
    gradients = [torch.autograd.grad(loss(batch), list(weights.values())) for batch in walk.batches]
    for number, (each, weight) in enumerate(weights.items()):
        if score == "squared":
            expected = sum(weight**2 * g[number] ** 2 for g in gradients).sum() / 2
        else:
            mean = sum(g[number].abs() for g in gradients) / 2
            expected = (mean if score == "gradient" else weight.abs() * mean).sum()
        assert found[each] == pytest.approx(expected.item(), rel=1e-9)
    assert not any(parameter.grad is not None for parameter in walk.model.parameters())


@pytest.mark.parametrize("granularity", ["model", "block", "layer"])
@pytest.mark.parametrize("per_tower", [False, True])
def test_sparsities_meet_the_target_and_the_cap(granularity, per_tower, language_models):
    walk, loss = case("two towers", language_models)
    method = Ecoflap(0.5, 0.65, order="first", granularity=granularity, per_tower=per_tower)
    found = {
        name: value * (3 if name.startswith("text") else 1) for name, value in method.importance(walk, loss).items()
    }
    table = method.allocate(walk, found)
    sizes = {name: weight.numel() for name, weight in matrices(walk).items()}
    assert table.keys() == sizes.keys()
    assert (sum(table[name] * sizes[name] for name in sizes if name.startswith("text")) < 90) is not per_tower
    for tower in ("visual", "text") if per_tower else ("",):
        chosen = [name for name in sizes if name.startswith(tower)]
        pruned = sum(round(table[name] * sizes[name], 6) for name in chosen)
        assert sum(sizes[name] for name in chosen) - pruned == pytest.approx(
            int(sum(sizes[name] for name in chosen) * 0.5)
        )
    assert 0 <= min(table.values()) <= max(table.values()) <= 0.65 + 1e-9
    number = {"model": 2, "block": 5, "layer": 10}[granularity]
    of_group = {}
    for name, value in table.items():
        of_group.setdefault(name.rsplit(".", {"model": 2, "block": 1, "layer": 0}[granularity])[0], set()).add(value)
    assert len(of_group) == number
    assert all(len(values) == 1 for values in of_group.values())
    assert Ecoflap(order="first").sparsities(walk, loss) == Ecoflap().allocate(walk, method.importance(walk, loss))
    flat = Ecoflap(0.5, 0.5, order="first", granularity=granularity).allocate(walk, found)
    assert max(abs(value - 0.5) * sizes[name] for name, value in flat.items()) <= 1


def test_scores_serve_another_target_and_a_pruner(language_models):
    walk, loss = case("llama", language_models)
    importance = Ecoflap(0.5).importance(walk, loss)
    table = Ecoflap(0.3, granularity="layer").allocate(walk, importance)
    pruner = Magnitude(0.3)
    pruner.assign(table)
    pruner.begin(matrices(walk))
    reports = [report for block in compressed_blocks(walk, pruner) for report in block.reports.values()]
    assert totals(reports)["sparsity"] == pytest.approx(0.3, abs=2e-3)
    assert {report.name: report.sparsity for report in reports} == pytest.approx(table, abs=5e-3)
    assert len(set(table.values())) > 3


@pytest.mark.parametrize("order", ["first", "zeroth"])
def test_two_ranks_find_what_one_does(order, language_models, on_ranks):
    walk, loss = case("two towers", language_models, batches=3)
    method = Ecoflap(order=order, samples=7)
    alone = method.importance(walk, loss)

    def work(ranks):
        model = copy.deepcopy(walk.model)
        own = LayerWalk(model, walk.spec, walk.batches[ranks.rank :: 2], model, ranks=ranks)
        return method.importance(own, lambda batch: cross_entropy(model(batch), torch.arange(3)))

    for found in on_ranks(2, work):
        assert found == pytest.approx(alone, rel=1e-9)


def test_what_is_refused(language_models):
    walk, loss = case("llama", language_models)
    with pytest.raises(ValueError, match="use_cache=False"):
        Ecoflap().sparsities(walk, lambda ids: walk.model(input_ids=ids, labels=ids).loss)
    with pytest.raises(ValueError, match=r"loss .*nan.* is not finite|losses nan and nan of batch 0 are not finite"):
        Ecoflap().sparsities(walk, lambda ids: loss(ids) * math.nan)
    with pytest.raises(ValueError, match="the importance of all layers is 0"):
        Ecoflap().sparsities(walk, lambda ids: loss(ids) * 0)
    with pytest.raises(ValueError, match=r"misses 20 names and has 0 others, first model\.layers\.0\.mlp\.gate_proj"):
        Ecoflap().allocate(walk, {"model.layers.0.mlp.down_proj": 1.0})
    walk.batches.clear()
    with pytest.raises(ValueError, match="no calibration data"):
        Ecoflap().sparsities(walk, loss)
    for wrong, options in (
        ("0 <= target <= max_sparsity <= 1", {"target": 0.6, "max_sparsity": 0.5}),
        ("perturb=group", {"perturb": "group", "order": "first"}),
        ("granularity='tower'", {"granularity": "tower"}),
        ("at least 1", {"draws": 0}),
    ):
        with pytest.raises(ValueError, match=wrong):
            Ecoflap(**options)
