"""Public places of VL-BART and VL-T5, and published numbers of parameters at full size, without memory for weights."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fulgurite.backbones.vl_bart import VLBart
from fulgurite.backbones.vl_t5 import VLT5
from fulgurite.methods.adapters.bank import AdapterBank, Placement
from fulgurite.methods.adapters.bottleneck import Bottleneck
from fulgurite.methods.adapters.replace import Replace

VISUAL = 1_582_848  # of 2048 features in a width of 768


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        return {"bart": VLBart(pretrained=False), "t5": VLT5(pretrained=False)}


def trained(model, *placements):
    with torch.device("meta"):
        bank = AdapterBank(model, [Placement(points, kind) for points, kind in placements], sets=[])
    return sum(p.numel() for p in bank.parameters_of("live"))


@pytest.mark.parametrize("kind", ["bart", "t5"])
@pytest.mark.parametrize("options", [{}, {"train_order": True}, {"features": None}])
def test_every_place_matches_as_many_modules_as_it_says(make_generative, kind, options):
    shapes = {"bart": {"decoder_layers": 3}, "t5": {"num_decoder_layers": 3, "feed_forward_proj": "gated-gelu"}}
    for config in ({}, shapes[kind]):
        model = make_generative(kind, config=config, **options)
        for point in model.spec.points:
            assert model.spec.point_names(model, point)
        model.spec.all_block_names(model)
        owners = [name for name, module in model.named_modules() if list(module.parameters(recurse=False))]
        assert model.spec.point_names(model, "parameters") == owners
        norms = [name for name, m in model.language.named_modules() if "Norm" in type(m).__name__]
        assert model.spec.point_names(model, "layer_norms") == [f"language.{name}" for name in norms]
        linears = [name for name, m in model.language.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
        assert model.spec.point_names(model, "linears") == [f"language.{name}" for name in linears]
        biased = [name for name, m in model.language.named_modules() if getattr(m, "bias", None) is not None]
        assert ("biased" in model.spec.points) == bool(biased)
        if biased:
            assert model.spec.point_names(model, "biased") == [f"language.{name}" for name in biased]


def test_all_parameters_of_the_published_models(full_size):
    assert sum(p.numel() for p in full_size["bart"].parameters()) == 141_156_864
    # T5-base of 222,903,552 with 72 more rows; its norms have no bias.
    assert sum(p.numel() for p in full_size["t5"].parameters()) == 222_903_552 + 72 * 768 + VISUAL - 2 * 768


def test_trained_parameters_of_the_published_rows(full_size):
    bart = full_size["bart"]
    assert trained(bart, (["visual_embedding"], Replace)) == VISUAL
    assert trained(bart, (["layer_norms"], Replace)) == 49_152
    biases = sum(bart.get_submodule(name).bias.numel() for name in bart.spec.point_names(bart, "biased"))
    assert biases == 125_952
    norms = trained(full_size["t5"], (["layer_norms"], Replace))
    assert norms == (12 * 2 + 12 * 3 + 2) * 768
    assert trained(full_size["t5"], (["visual_embedding"], Replace)) == VISUAL - 2 * 768


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_single_adapters_take_a_twentieth_of_the_operations_of_inference(make_generative, kind):
    """Of a small model in the proportions of the published one."""
    shape = {"d_model": 64, "num_heads": 4, "d_kv": 16, "d_ff": 256}
    shape = shape if kind == "t5" else {"d_model": 64, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256}
    model = make_generative(kind, config=shape, train_dropout="off").eval()
    batch = {"text": torch.ones(2, 20, dtype=torch.long), "text_mask": torch.ones(2, 20, dtype=torch.bool)}
    batch |= {"features": torch.ones(2, 36, 12), "picture": torch.zeros(2, 36, dtype=torch.long)}

    @torch.no_grad()
    def operations():
        with FlopCounterMode(display=False) as counter:
            model(batch, torch.ones(2, 10, dtype=torch.long))
        return counter.get_total_flops()

    plain = operations()
    outputs = ["self_attention_output", "cross_attention_output", "feed_forward_output"]
    AdapterBank(model, [Placement(outputs, partial(Bottleneck, reduction=8))], sets=[])
    assert plain * 1.01 < operations() < plain * 1.05
