import pytest
import torch
from torch import nn

from fulgurite.methods.compression import compressed_blocks, matrices, totals
from fulgurite.methods.layer_walk import LayerWalk
from fulgurite.methods.pruning.iterative import Iterative
from fulgurite.methods.structure import ModelSpec, Tower


class Conv1D(nn.Module):
    """x W + b with W (in, out), as GPT-2 has it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


def case():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), Conv1D(7, 4), nn.Linear(4, 3)).double().eval()
    spec = ModelSpec((Tower("all", r"\d", 3, 5),))
    walk = LayerWalk(model, spec, [torch.randn(6, 5, dtype=torch.float64) for _ in range(2)], model)
    return walk, lambda x: torch.tanh(model(x)).square().mean()


def slow(walk, loss, sparsity, rounds, gradient):
    """(out, in) masks, by whole sorts of all scores."""
    layers = [walk.model[number] for number in range(3)]
    saved = [layer.weight.detach().clone() for layer in layers]
    total = sum(weight.numel() for weight in saved)
    kept = [torch.ones_like(weight, dtype=torch.bool) for weight in saved]
    for number in range(1, rounds + 1):
        for layer, weight, mask in zip(layers, saved, kept):
            layer.weight.data = weight * mask
        scores = [layer.weight.detach().abs() for layer in layers]
        if gradient:
            grads = [torch.autograd.grad(loss(batch), [layer.weight for layer in layers]) for batch in walk.batches]
            scores = [s * sum(g[i].abs() for g in grads) / len(grads) for i, s in enumerate(scores)]
        flat = torch.cat([torch.where(mask, s, -1.0).flatten() for s, mask in zip(scores, kept)])
        gone = flat.argsort(stable=True)[: round(sparsity ** (rounds / number) * total)]
        everything = torch.ones(total, dtype=torch.bool)
        everything[gone] = False
        kept = [part.view_as(s) for part, s in zip(everything.split([s.numel() for s in scores]), scores)]
    for layer, weight in zip(layers, saved):
        layer.weight.data = weight
    return {str(i): mask.T if i == 1 else mask for i, mask in enumerate(kept)}


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("score", ["magnitude", "gradient"])
def test_masks_are_those_of_a_slow_loop_and_the_model_stays(score, rounds):
    walk, loss = case()
    expected = slow(walk, loss, 0.6, rounds, score == "gradient")
    before = {name: value.clone() for name, value in walk.model.state_dict().items()}
    pruner = Iterative(0.6, rounds, score)
    masks = pruner.find(walk, loss)
    assert all(torch.equal(value, before[name]) for name, value in walk.model.state_dict().items())
    assert masks.keys() == expected.keys()
    for name in masks:
        assert torch.equal(masks[name], expected[name]), name
    pruner.begin(matrices(walk))
    reports = [report for block in compressed_blocks(walk, pruner) for report in block.reports.values()]
    sizes = sum(mask.numel() for mask in masks.values())
    assert totals(reports)["sparsity"] * sizes == pytest.approx(round(0.6 * sizes))
    for number, mask in enumerate(masks.values()):
        kept = mask.T if number == 1 else mask
        assert torch.equal(walk.model[number].weight, before[f"{number}.weight"] * kept)


def test_a_failing_loss_leaves_the_model_as_it_was():
    walk, loss = case()
    before = {name: value.clone() for name, value in walk.model.state_dict().items()}
    calls = []

    def failing(batch):
        calls.append(batch)
        return loss(batch) * (float("nan") if len(calls) > 3 else 1)

    with pytest.raises(ValueError, match="not finite"):
        Iterative(0.5).find(walk, failing)
    assert all(torch.equal(value, before[name]) for name, value in walk.model.state_dict().items())


def test_what_is_refused():
    walk, _ = case()
    with pytest.raises(ValueError, match="no masks of 3 layers, first 0: call find"):
        Iterative(0.5).begin(matrices(walk))
    for wrong, options in (("outside", {"sparsity": 1.5}), ("round 1 of 0", {"sparsity": 0.5, "rounds": 0})):
        with pytest.raises(ValueError, match=wrong):
            Iterative(**options)
