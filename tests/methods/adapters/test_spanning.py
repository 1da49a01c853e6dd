"""Kinds with one adapter for all sites of a placement, and several placements at one site."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from fulgurite.methods.adapters.bank import AdapterBank, Placement
from fulgurite.methods.adapters.base import Spanning
from fulgurite.methods.adapters.bottleneck import Bottleneck
from fulgurite.methods.adapters.delta import WeightDelta
from fulgurite.methods.adapters.folding import FoldError, fold
from fulgurite.methods.adapters.lora import LoRA
from fulgurite.methods.adapters.replace import Replace
from fulgurite.methods.structure import ModelSpec

D = 4


class Masked(nn.Linear):
    """A layer that is called with a mask, (B, S), by keyword."""

    def forward(self, x, mask=None):
        return super().forward(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Masked(D, D) for _ in range(3))
        self.norm = nn.LayerNorm(D)
        points = {"layer": (r"layers\.\d", 3), "norm": ("norm", 1), "last": (r"layers\.2", 1)}
        self.spec = ModelSpec(towers=(), points=points)
        self.requires_grad_(False)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x, mask=x[..., 0] > 0)
        return self.norm(x)


class Shift(Spanning):
    """Adds its row of a table where the mask is set; ``before`` scales the input of layers."""

    verb = "transform"

    def __init__(self, sites, factor=1.0):
        super().__init__()
        self.sites, self.factor = sites, factor
        self.table = nn.Parameter(torch.zeros(len(sites), D))

    def reset_parameters(self, generator=None):
        nn.init.zeros_(self.table)

    def before(self, index, args, kwargs):
        return ((args[0] * self.factor,), kwargs) if self.sites[index].point == "layer" else None

    def at(self, index, args, kwargs, y):
        mask = kwargs.get("mask")
        row = self.table[index]
        return y + row if mask is None else y + row * mask[..., None]


def build(*placements, sets=("a", "b")):
    torch.manual_seed(0)
    owner = nn.ModuleDict({"model": (model := Model()), "bank": AdapterBank(model, placements, sets)})
    for name in sets:
        for parameter in owner["bank"].parameters_of(name):
            parameter.data += torch.randn_like(parameter)
    return owner


@pytest.fixture
def x():
    return torch.randn(2, 3, D, generator=torch.Generator().manual_seed(1))


def slow(model, table, x, factor):
    for layer, row in zip(model.layers, table):
        x = x + nn.functional.linear(x * factor, layer.weight, layer.bias) + row * (x[..., :1] > 0)
    return nn.functional.layer_norm(x, (D,), model.norm.weight, model.norm.bias) + table[3]


def test_one_adapter_sees_every_call_of_all_sites(x):
    owner = build(Placement(["layer", "norm"], partial(Shift, factor=0.5)))
    adapters = owner["bank"].adapters_of("a")
    assert list(adapters) == owner["bank"].sites == ["placement-0"]
    assert [(s.name, s.point) for s in adapters["placement-0"].sites][2:] == [("layers.2", "layer"), ("norm", "norm")]
    assert set(owner["bank"].state_dict()) == {f"sets.{name}.placement-0.table" for name in ("a", "b", "live")}
    with owner["bank"].use("a"):
        torch.testing.assert_close(owner["model"](x), slow(owner["model"], adapters["placement-0"].table, x, 0.5))
    with owner["bank"].use(None):
        torch.testing.assert_close(owner["model"](x), slow(owner["model"], torch.zeros(4, D), x, 1.0))
    assert str(owner["bank"].report()).endswith("Shift at 4 sites (layer, norm)")
    assert owner["bank"].report().num_parameters == 4 * D


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_calls_its_own(clone, x):
    owner = build(Placement(["layer", "norm"], Shift))
    with owner["bank"].use("a"):
        expected = owner["model"](x)
    twin = clone(owner)
    for parameter in owner.parameters():
        parameter.data.zero_()
    with twin["bank"].use("a"):
        assert torch.equal(twin["model"](x), expected)
    assert twin["bank"].adapters_of("a")["placement-0"].sites[0].module is twin["model"].layers[0]


def test_mixing_and_sets_per_sample_are_refused_by_name_and_one_set_for_all_is_not(x):
    owner = build(Placement(["layer"], Shift))
    with (
        pytest.raises(ValueError, match=r"Shift\(\) at 'placement-0' does not define mixing"),
        owner["bank"].use(torch.full((2, 2), 0.5)),
    ):
        pass
    with (
        pytest.raises(ValueError, match="Shift cannot run another set for every sample"),
        owner["bank"].use(torch.tensor([0, 1])),
    ):
        owner["model"](x)
    with owner["bank"].use("b"):
        expected = owner["model"](x)
    with owner["bank"].use(torch.tensor([1, 1])):
        assert torch.equal(owner["model"](x), expected)
    with pytest.raises(FoldError, match=r"Shift cannot be folded.*Masked: layers\.0 and 2 more"):
        fold(owner["bank"], owner["model"], {"a": 1.0}, owner["bank"].sites)


def test_a_function_that_makes_a_spanning_kind_is_refused():
    with pytest.raises(ValueError, match="placement 0: Shift acts on all sites at once; give its class"):
        build(Placement(["norm"], lambda site: Shift([site])))


def test_placements_at_one_site_act_in_their_order(x):
    owner = build(Placement(["layer"], partial(LoRA, rank=2)), Placement(["last"], partial(Bottleneck, reduction=2)))
    bank, model = owner["bank"], owner["model"]
    assert bank.sites == ["layers.0", "layers.1", "layers.2", "layers.2@1"]
    assert "sets.a.layers/2@1.up.bias" in bank.state_dict()
    seen = []
    handle = model.layers[2].register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    with bank.use("a"):
        model(x)
    handle.remove()
    ((inputs, found),) = seen
    lora, bottleneck = bank.adapters_of("a")["layers.2"], bank.adapters_of("a")["layers.2@1"]
    layer = nn.functional.linear(inputs, model.layers[2].weight, model.layers[2].bias)
    torch.testing.assert_close(found, bottleneck(inputs, lora(inputs, layer)))


def test_a_later_placement_at_a_site_must_transform_its_output():
    build(Placement(["last"], Replace), Placement(["layer"], LoRA))
    with pytest.raises(ValueError, match=r"0 and 1 meet at 'layers\.2' \('last'\); after the first.*WeightDelta"):
        build(Placement(["layer"], LoRA), Placement(["last"], WeightDelta))
    with pytest.raises(ValueError, match=r"0 and 0 meet at 'layers\.2'"):
        build(Placement(["layer", "last"], LoRA))


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 0.3, "b": 0.7}], ids=str)
def test_what_meets_at_a_site_is_folded_one_into_the_other(weights, x):
    first = Replace if len(weights) == 1 else partial(LoRA, rank=3)
    owner = build(*(Placement([point], kind) for point, kind in (("last", first), ("layer", LoRA), ("last", LoRA))))
    chosen = "a" if len(weights) == 1 else torch.tensor([list(weights.values())] * 2)
    with owner["bank"].use(chosen):
        expected = owner["model"](x)
    plain = Model()
    folded = fold(owner["bank"], owner["model"], weights, owner["bank"].sites)
    plain.load_state_dict({**owner["model"].state_dict(), **folded})
    torch.testing.assert_close(plain(x), expected)
