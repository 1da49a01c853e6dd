"""Scores of a mask against gradients taken one example after the other."""

from functools import partial

import pytest
import torch
from torch import nn

from fulgurite.methods.adapters.bank import AdapterBank, Placement
from fulgurite.methods.adapters.mask_scores import data_scores
from fulgurite.methods.adapters.sparse_mask import SparseMask
from fulgurite.methods.structure import ModelSpec

N, C, REPEATS = 12, 3, 300


class Classifier(nn.Sequential):
    """Some features to scores of C classes."""

    def __init__(self):
        super().__init__(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Dropout(0.5), nn.Linear(6, C))
        self.spec = ModelSpec(towers=(), points={"parameters": ("[024]", 3)})


def build(score, density=0.4, seed=0):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = Classifier().double()
    kind = partial(SparseMask, density=density, score=score, seed=seed)
    bank = AdapterBank(model.requires_grad_(False), [Placement(["parameters"], kind)], ())
    return model, bank.adapters_of("live")["placement-0"]


def data(count=N):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(C, (count,), generator=generator)


def losses(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def logits(model, batch):
    return model(batch[0])


def scores(score, size=N, ranks=None, part=slice(None), numbers=None, model_and_mask=None, **options):
    model, mask = model_and_mask or build(score)
    x, y = data()
    batches = [batch for batch in zip(x[part].split(size), y[part].split(size)) if len(batch[0])]
    function = losses if score.startswith("label") else logits
    return data_scores(mask, model, function, batches, numbers, ranks, **options)


def gradients(model, loss):
    return dict(
        zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))
    )


def slow(score, examples=None):
    """One backward pass for each example, or each of its classes."""
    model = Classifier().double().eval()
    model.load_state_dict(build(score)[0].state_dict())
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x, y in zip(*data()) if examples is None else examples:
        surprise = -model(x[None]).log_softmax(-1)[0]
        chosen = [(1.0, surprise[y])] if score.startswith("label") else [(torch.exp(-s).item(), s) for s in surprise]
        for weight, loss in chosen:
            for name, g in gradients(model, loss).items():
                total[name] += weight * (g.abs() if score.endswith("absolute") else g.square())
    return total


def close(first, second, **options):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **options)


def distance(drawn, exact):
    """Of scores over ``REPEATS`` draws, in parts of the exact ones."""
    found, expected = (torch.cat([total.flatten() for total in each.values()]) for each in (drawn, exact))
    return (found / REPEATS - expected).norm() / expected.norm()


@pytest.mark.parametrize("score", ["label", "label_absolute", "expect", "expect_absolute"])
@pytest.mark.parametrize("size", [1, 5, N])
def test_scores_are_sums_over_single_examples_whatever_the_batches(score, size):
    close(scores(score, size), slow(score))


@pytest.mark.parametrize("score", ["label", "sampled"])
def test_two_processes_sum_to_one(score, on_ranks):
    alone = scores(score)
    models = [build(score) for _ in range(2)]  # not in the ranks' threads, which share the random state

    def share(ranks):
        part = slice(ranks.rank, None, 2)
        return scores(score, ranks=ranks, part=part, numbers=[torch.arange(N)[part]], model_and_mask=models[ranks.rank])

    for found in on_ranks(2, share):
        close(found, alone, rtol=1e-6, atol=0)


def test_a_process_without_examples_adds_nothing(on_ranks):
    models, parts = [build("label") for _ in range(2)], (slice(0), slice(None))
    for found in on_ranks(2, lambda r: scores("label", ranks=r, part=parts[r.rank], model_and_mask=models[r.rank])):
        close(found, scores("label"), rtol=1e-6, atol=0)


@pytest.mark.parametrize("score", ["expect", "expect_absolute"])
def test_an_expectation_over_several_labels_is_refused(score):
    model, mask = build(score)
    several = [(torch.randn(2, 5, 4, dtype=torch.float64),)]
    with pytest.raises(ValueError, match=f'score="{score}" .* one label, .* has 5: set score="sampled", or "label"'):
        data_scores(mask, model, logits, several)
    one = [(several[0][0][:, :1],)]
    close(data_scores(mask, model, logits, one), data_scores(mask, model, logits, [(one[0][0][:, 0],)]))


def test_a_sampled_score_is_that_of_one_class_drawn_by_the_seed():
    x, found = data()[0][:1], []
    classes = [slow("label", [(x[0], c)]) for c in range(C)]
    for seed in (0, 0, *range(1, 9)):
        model, mask = build("sampled", seed=seed)
        drawn = data_scores(mask, model, logits, [(x,)])
        same = [all(torch.allclose(drawn[name], one[name]) for name in drawn) for one in classes]
        assert sum(same) == 1
        found.append(same.index(True))
    assert found[0] == found[1]
    assert len(set(found)) > 1


@torch.no_grad()
def test_of_two_classes_that_are_as_likely_each_label_gives_the_expectation():
    def of_two(model, batch):
        return logits(model, batch)[:, :2]

    def loss(model, batch):
        return nn.functional.cross_entropy(of_two(model, batch), batch[1], reduction="none")

    x, found = data()[0][:1], []
    for score, function, label in (("label", loss, 0), ("label", loss, 1), ("expect", of_two, 0)):
        model, mask = build(score)
        model[4].bias -= model.eval()(x)[0]
        found.append(data_scores(mask, model, function, [(x, torch.tensor([label]))]))
    close(found[0], found[2])
    close(found[1], found[2])
    assert found[2]["0.weight"].any()


def test_labels_of_the_model_give_the_expectation():
    model, mask = build("label")
    x, _ = data()
    many = x.repeat(REPEATS, 1)
    with torch.no_grad():
        believed = model.eval()(many).softmax(-1)
    drawn = torch.multinomial(believed, 1, generator=torch.Generator().manual_seed(2))[:, 0]
    assert distance(data_scores(mask, model, losses, [(many, drawn)], chunk=2000), scores("expect")) < 0.1


def test_sampled_scores_converge_to_the_expectation():
    model, mask = build("sampled")
    many = data()[0].repeat(REPEATS, 1)
    assert distance(data_scores(mask, model, logits, [(many,)], chunk=2000), scores("expect")) < 0.1


def test_a_factor_of_the_loss_leaves_the_mask():
    chosen = []
    for factor in (1, 100):
        model, mask = build("label")
        batch = data()
        mask.set_scores(data_scores(mask, model, lambda m, b, f=factor: f * losses(m, b), [batch]))
        chosen.append(mask.positions.clone())
    assert torch.equal(*chosen)


def test_scores_are_those_of_the_present_values():
    model, mask = build("label")
    mask.set_scores(scores("label"))
    mask.values.data += 0.5
    start = {name: p.clone() for name, p in model.named_parameters()}
    plain = Classifier().double().requires_grad_(False)
    plain.load_state_dict(start)
    for name, (index, change) in mask.deltas().items():
        plain.get_parameter(name).view(-1)[index] += change
    other = AdapterBank(plain, [Placement(["parameters"], partial(SparseMask, density=0.4))], ())
    expected = scores("label", model_and_mask=(plain, other.adapters_of("live")["placement-0"]))
    close(scores("label", model_and_mask=(model, mask)), expected)
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())


class Roundabout(Classifier):
    """Reads a layer's weight without calling the layer."""

    def forward(self, x):
        return nn.functional.linear(self[1](self[0](x)), self[4].weight)


def test_what_cannot_be_scored_is_refused():
    model = Roundabout().double().requires_grad_(False)
    bank = AdapterBank(model, [Placement(["parameters"], partial(SparseMask, density=0.4))], ())
    mask = bank.adapters_of("live")["placement-0"]
    with pytest.raises(ValueError, match=r"reads 4\.weight and 0 more tensors without calling"):
        data_scores(mask, model, losses, [data()])
    with pytest.raises(ValueError, match="shorter"):
        scores("sampled", size=N // 2, numbers=[torch.arange(N // 2)])
    with pytest.raises(ValueError, match="no example"):
        data_scores(mask, model, losses, [])
    with pytest.raises(ValueError, match='score="random" needs no data'):
        data_scores(build("random")[1], model, losses, [data()])
    with pytest.raises(ValueError, match='score="label" needs data'):
        mask.own_scores()
