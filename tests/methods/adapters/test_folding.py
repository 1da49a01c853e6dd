"""Folded weights against the adapters that they replace: a site alone gives the same outputs."""

from functools import partial

import pytest
import torch
from torch import nn

from fulgurite.methods.adapters.bank import AdapterBank, Placement
from fulgurite.methods.adapters.base import FoldError
from fulgurite.methods.adapters.bias import Bias
from fulgurite.methods.adapters.bottleneck import Bottleneck
from fulgurite.methods.adapters.delta import WeightDelta
from fulgurite.methods.adapters.folding import fold
from fulgurite.methods.adapters.ia3 import IA3, IA3Input
from fulgurite.methods.adapters.lora import LoRA
from fulgurite.methods.adapters.replace import Replace
from fulgurite.methods.structure import ModelSpec

SPEC = ModelSpec(towers=(), points={"first": ("0", 1), "norm": ("1", 1), "last": ("2", 1)})


def banked(kind, points=("first", "last"), sets=("a", "b")):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)).eval()
    bank = AdapterBank(model, [Placement(list(points), kind)], sets, SPEC).eval()
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.5)
    return model, bank


def bare(model, tensors):
    """A model of its own with some tensors of another one replaced."""
    own = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)).eval()
    own.load_state_dict({**model.state_dict(), **tensors})
    return own


KINDS = {
    "lora": partial(LoRA, rank=2, alpha=3.0),
    "rslora": partial(LoRA, rank=2, rslora=True),
    "delta": WeightDelta,
    "replace": Replace,
    "ia3": IA3,
    "ia3_input": IA3Input,
    "bias": Bias,
}


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 0.3, "b": 0.7}, {"a": 1.5, "b": -0.5}], ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_folded_weights_give_what_the_adapters_give(kind, weights):
    model, bank = banked(kind)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    names = list(weights)
    chosen = names[0] if len(names) == 1 else torch.tensor([list(weights.values())] * 4)
    with bank.use(chosen, names if len(names) > 1 else None):
        expected = model(x)
    folded = fold(bank, model, weights, bank.sites)
    torch.testing.assert_close(bare(model, folded)(x), expected, rtol=1e-5, atol=1e-5)
    assert (bare(model, {})(x) - expected).abs().max() > 0.1


def test_a_replaced_norm_and_only_the_sites_that_are_named():
    model, bank = banked(Replace, ("norm", "last"))
    folded = fold(bank, model, {"b": 1.0}, ["1"])
    assert sorted(folded) == ["1.bias", "1.weight"]
    assert torch.equal(folded["1.weight"], bank.adapters_of("b")["1"].module.weight)


def test_nothing_is_changed():
    model, bank = banked(KINDS["lora"])
    before = {n: t.clone() for n, t in {**model.state_dict(), **bank.state_dict()}.items()}
    fold(bank, model, {"a": 0.5, "b": 0.5}, bank.sites)
    after = {**model.state_dict(), **bank.state_dict()}
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_a_low_precision_weight_is_changed_in_float32():
    model, bank = banked(KINDS["lora"])
    model.bfloat16()
    adapter = bank.adapters_of("a")["0"]
    weight = model[0].weight.double()
    expected = weight + adapter.scale * adapter.up.weight.double() @ adapter.down.weight.double()
    found = fold(bank, model, {"a": 1.0}, ["0"])["0.weight"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_what_has_no_weights_is_refused_by_name():
    model, bank = banked(partial(Bottleneck, reduction=2))
    with pytest.raises(FoldError, match="Bottleneck cannot be folded into the weights of a Linear: 0 and 1 more"):
        fold(bank, model, {"a": 1.0}, bank.sites)
    with pytest.raises(ValueError, match="sum to 1"):
        fold(bank, model, {"a": 0.5}, bank.sites)
    with pytest.raises(LookupError, match="no adapter set 'c'"):
        fold(bank, model, {"c": 1.0}, bank.sites)
