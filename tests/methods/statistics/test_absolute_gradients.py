import pytest
import torch
from torch import nn

from fulgurite.methods.statistics.absolute_gradients import AbsoluteGradients


def setup(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double().requires_grad_(False)
        return model, torch.randn(5, 4).double(), torch.randn(5, 3).double()


@pytest.mark.parametrize("moment", ["absolute", "square"])
def test_moments_are_those_of_a_loop_over_examples(moment):
    model, x, y = setup()
    weights = {name: p for name, p in model.named_parameters() if name.endswith("weight")}
    gradients = AbsoluteGradients(weights, moment)
    with gradients.differentiable():
        for example in range(5):
            gradients.update((model(x[example]) - y[example]).square().sum())
        expected = {name: torch.zeros_like(p) for name, p in weights.items()}
        for example in range(5):
            found = torch.autograd.grad((model(x[example]) - y[example]).square().sum(), list(weights.values()))
            for total, g in zip(expected.values(), found):
                total += (g.abs() if moment == "absolute" else g**2) / 5
    for name, mean in gradients.means().items():
        torch.testing.assert_close(mean, expected[name], rtol=1e-12, atol=0)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_opposite_gradients_add_up():
    weight = torch.ones(3, requires_grad=True)
    gradients = AbsoluteGradients({"w": weight})
    gradients.update((2 * weight).sum())
    gradients.update((-2 * weight).sum())
    assert gradients.means()["w"].tolist() == [2, 2, 2]


def test_what_would_be_wrong_is_refused():
    weight = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="two names"):
        AbsoluteGradients({"a": weight, "b": weight})
    gradients = AbsoluteGradients({"w": weight})
    with pytest.raises(ValueError, match="not finite"):
        gradients.update(weight.sum() * float("nan"))
    weight.grad = torch.ones(3)
    with pytest.raises(ValueError, match="gradient already"):
        gradients.update(weight.sum())
    with pytest.raises(ValueError, match="no loss"):
        gradients.means()


def test_a_gradient_is_freed_before_the_next_one_is_complete():
    model, x, y = setup()
    weights, seen = {"0": model[0].weight, "2": model[2].weight}, []
    gradients = AbsoluteGradients(weights)
    with gradients.differentiable():
        weights["0"].register_hook(lambda _: seen.append((gradients.sums["2"].any().item(), weights["2"].grad)))
        gradients.update((model(x) - y).square().sum())
    assert seen == [(True, None)]


class Sharded(torch.Tensor):
    def full_tensor(self):
        return self


def test_sharded_weights_are_refused():
    with pytest.raises(ValueError, match=r"1 weights are sharded \(w\)"):
        AbsoluteGradients({"w": torch.ones(3).as_subclass(Sharded)})
