"""Merged factors through a bank's set and peft's files, against what the models compute."""

from functools import partial

import pytest
import torch
from torch import nn

from fulgurite.methods.adapters.bank import AdapterBank, Placement
from fulgurite.methods.adapters.bottleneck import Bottleneck
from fulgurite.methods.adapters.lora import LoRA
from fulgurite.methods.adapters.peft_format import to_peft
from fulgurite.methods.merging.lora import Factors, MergeLoRA
from fulgurite.methods.merging.lora_io import factors_from_peft, factors_of, factors_to_peft, fill_set
from fulgurite.methods.structure import ModelSpec

D = 6


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.v = nn.Linear(D, D), nn.Linear(D, D)
        self.spec = ModelSpec(towers=(), points={"q": (r"q", 1), "v": (r"v", 1)})
        self.requires_grad_(False)

    def forward(self, x):
        return self.v(self.q(x).tanh())


def build(**settings):
    model = Model()
    bank = AdapterBank(model, [Placement(["q", "v"], partial(LoRA, **settings))], ["a", "b"])
    torch.manual_seed(1)
    for name in ("a", "b"):
        for parameter in bank.parameters_of(name):
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model, bank


@pytest.fixture
def x():
    return torch.randn(4, D, generator=torch.Generator().manual_seed(2))


def mixed(model, bank, x):
    """What the bank computes with the mean of both sets."""
    with bank.use(torch.full((len(x), 2), 0.5), ["a", "b"]):
        return model(x)


@pytest.mark.parametrize("settings", [{}, {"rslora": True}], ids=["lora", "rslora"])
def test_the_mean_in_a_set_is_the_banks_mixture(settings, x):
    model, bank = build(rank=2, alpha=3.0, **settings)
    merged = MergeLoRA("mean")([factors_of(bank, name) for name in ("a", "b")])
    wide_model, wide = build(rank=5, alpha=1.0)  # one more than both: the rest is zero
    fill_set(wide, "a", merged)
    with wide.use("a"):
        torch.testing.assert_close(wide_model(x), mixed(model, bank, x), rtol=1e-5, atol=1e-6)
    assert (wide.adapters_of("a")["q"].up.weight[:, 4] == 0).all()


def test_one_set_goes_through_to_the_bit():
    _, bank = build(rank=2, alpha=3.0, rslora=True)
    fill_set(bank, "b", MergeLoRA("svd")([factors_of(bank, "a")]))
    for a, b in zip(bank.parameters_of("a"), bank.parameters_of("b")):
        assert torch.equal(a, b)


def test_what_does_not_fit_a_set_changes_nothing():
    _, bank = build(rank=2)
    before = [p.clone() for p in bank.parameters_of("a")]
    factors = MergeLoRA()([factors_of(bank, name) for name in ("a", "b")])
    with pytest.raises(ValueError, match=r"q: rank 4 into 2; merge with form='svd', rank=2"):
        fill_set(bank, "a", factors)
    fits = factors_of(bank, "b")
    with pytest.raises(ValueError, match="other: no LoRA there"):
        fill_set(bank, "a", {**fits, "other": fits["q"]})
    with pytest.raises(ValueError, match=r"q down\.weight"):
        fill_set(bank, "a", {**fits, "q": Factors(torch.zeros(2, 9), torch.zeros(D, 2), 1.0)})
    assert all(torch.equal(a, b) for a, b in zip(before, bank.parameters_of("a")))
    other = AdapterBank(Model(), [Placement(["q"], LoRA), Placement(["v"], partial(Bottleneck, reduction=2))], ["a"])
    with pytest.raises(ValueError, match=r"also holds \{'v': 'Bottleneck'\}"):
        factors_of(other, "a")


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_files_are_merged_without_a_model_and_peft_computes_it(rslora, x):
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    model, bank = build(rank=2, alpha=3.0, rslora=rslora)
    files = [to_peft(bank, name, "tiny") for name in ("a", "b")]
    adapters = [factors_from_peft(*file) for file in files]
    like = {**files[0][0], "layers_to_transform": [0], "layers_pattern": "layers", "exclude_modules": ["q"]}
    config, tensors = factors_to_peft(MergeLoRA("mean")(adapters), like=like)
    assert (config["base_model_name_or_path"], config["r"], config["use_rslora"]) == ("tiny", 4, False)
    wrapped = get_peft_model(Model(), LoraConfig.from_peft_type(**config))
    assert set_peft_model_state_dict(wrapped, tensors).unexpected_keys == []
    torch.testing.assert_close(wrapped(x), mixed(model, bank, x), rtol=1e-5, atol=1e-6)


def test_ranks_and_scales_of_single_layers_survive():
    torch.manual_seed(0)
    factors = {
        "q": Factors(torch.randn(2, D), torch.randn(D, 2), 0.5),
        "deep.q": Factors(torch.randn(3, D), torch.randn(D, 3), 4.0),
        "v": Factors(torch.randn(2, D), torch.randn(D, 2), 1.25),
    }
    back = factors_from_peft(*factors_to_peft(factors))
    assert list(back) == list(factors)
    for site, f in factors.items():
        assert torch.equal(back[site].down, f.down)
        assert back[site].scale == pytest.approx(f.scale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"init_lora_weights": "pissa_niter_4"}, "moved the base's weights"),
        ({"r": 3}, "q: rank 2, in the configuration 3"),
    ],
)
def test_what_is_not_a_plain_product_is_refused(change, message):
    config, tensors = to_peft(build(rank=2)[1], "a")
    with pytest.raises(ValueError, match=message):
        factors_from_peft({**config, **change}, tensors)


def test_tensors_that_are_no_factors_are_refused():
    config, tensors = to_peft(build(rank=2)[1], "a")
    tensors["base_model.model.q.lora_magnitude_vector.weight"] = torch.ones(D)
    del tensors["base_model.model.v.lora_B.weight"]
    with pytest.raises(ValueError, match=r"lora_magnitude_vector[\s\S]*v: only lora_A"):
        factors_from_peft(config, tensors)
