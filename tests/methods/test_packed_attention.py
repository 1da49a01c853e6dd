"""Attention whose projections are exposed is torch's own."""

import pytest
import torch
from torch import nn

from fulgurite.methods.compression import compressed_blocks, matrices
from fulgurite.methods.layer_walk import LayerWalk
from fulgurite.methods.packed_attention import exposed_attention, tensor_name
from fulgurite.methods.pruning.wanda import Wanda
from fulgurite.methods.structure import ModelSpec, Tower

CLOSE = {"rtol": 1e-10, "atol": 1e-12}  # float64, sums in another order


def seeded(make):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = make().double().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
    return model


def attention(**settings):
    return seeded(lambda: nn.Sequential(nn.MultiheadAttention(8, 2, **settings)))


def rows(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
MASKS = {
    "none": {},
    "padding": {"key_padding_mask": PADDING},
    "added padding": {"key_padding_mask": torch.zeros(3, 5, dtype=torch.float64).masked_fill(PADDING, -3.0)},
    "causal": {"attn_mask": CAUSAL},
    "hinted": {"attn_mask": CAUSAL, "is_causal": True},
    "added": {"attn_mask": rows(5, 5)},
    "by head": {"attn_mask": rows(6, 5, 5)},
    "both": {"attn_mask": CAUSAL, "key_padding_mask": PADDING},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("weights", [{"need_weights": False}, {}, {"average_attn_weights": False}])
@pytest.mark.parametrize("settings", [{"batch_first": True}, {"batch_first": False, "bias": False}])
def test_outputs_are_those_of_torch(settings, weights, mask):
    model = attention(**settings)
    x = rows(3, 5, 8) if settings["batch_first"] else rows(5, 3, 8)
    given = {**MASKS[mask], **weights}
    with torch.no_grad():
        expected = model[0](x, x, x, **given)
        with exposed_attention(model):
            found = model[0](x, x, x, **given)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_one_sequence_without_a_batch():
    model, x = attention(), rows(5, 8)
    expected = model[0](x, x, x)
    with exposed_attention(model):
        torch.testing.assert_close(model[0](x, x, x), expected, **CLOSE)


def test_parameters_and_their_names_are_the_same_and_all_is_put_back():
    model = attention(batch_first=True)
    original, before = model[0], {name: value.clone() for name, value in model.state_dict().items()}
    with exposed_attention(model) as layers:
        assert layers == ["0.in_proj"]
        assert model[0].in_proj.weight is original.in_proj_weight
        assert model[0].out_proj is original.out_proj
        assert not torch.backends.mha.get_fastpath_enabled()
        state = model.state_dict()
        assert state.keys() == before.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
        assert tensor_name(model, "0.in_proj") == "0.in_proj_weight"
        model.half()
    assert model[0] is original
    assert original.in_proj_weight.dtype == torch.float16
    assert torch.backends.mha.get_fastpath_enabled()
    assert tensor_name(model, "0.in_proj") == "0.in_proj_weight"
    assert tensor_name(model, "0.out_proj") == "0.out_proj.weight"


def test_all_is_put_back_after_an_error():
    model = attention()
    original = model[0]
    with pytest.raises(ZeroDivisionError), exposed_attention(model):
        raise ZeroDivisionError
    assert model[0] is original
    assert torch.backends.mha.get_fastpath_enabled()


def test_what_cannot_be_exposed_is_named():
    for settings, why in (({"kdim": 4}, "separate projections"), ({"add_bias_kv": True}, "keys and values of its own")):
        with pytest.raises(ValueError, match=rf"^0 .*{why}"), exposed_attention(attention(**settings)):
            pass
    hooked = attention()
    hooked[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"^0 has hooks"), exposed_attention(hooked):
        pass
    with exposed_attention(hooked, "none") as layers:
        assert layers == []
    model = attention(batch_first=True)
    with exposed_attention(model), pytest.raises(ValueError, match=r"^0: keys come from elsewhere"):
        model[0](rows(1, 2, 8), rows(1, 3, 8), rows(1, 3, 8))


def test_an_encoder_of_torch_is_walked_as_it_computes():
    """The Gram of the packed projection is that of the layer's input, and unmasked columns of it decide."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True)
    model = seeded(lambda: nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    spec = ModelSpec((Tower("text", r"layers\.\d+", 2, 8),))
    x, real = rows(3, 5, 8), (~PADDING).long()
    with torch.no_grad():
        plain = model(x, src_key_padding_mask=PADDING)
        normed = model.layers[0].norm1(x)[~PADDING]
    with exposed_attention(model):
        torch.testing.assert_close(model(x, src_key_padding_mask=PADDING)[~PADDING], plain[~PADDING], **CLOSE)
        walk = LayerWalk(
            model,
            spec,
            [x],
            lambda batch: model(batch, src_key_padding_mask=PADDING),
            lambda batch, names: dict.fromkeys(names, real),
        )
        block = next(iter(walk))
        (energies,) = block.grams([["layers.0.self_attn.in_proj"]], diagonal=True).means().values()
        torch.testing.assert_close(energies, normed.square().mean(0), **CLOSE)
        names = list(matrices(walk))
        reports = [r for done in compressed_blocks(walk, Wanda(0.5)) for r in done.reports]
    assert reports == names
    inner = ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")
    assert names == [f"layers.{i}.{name}" for i in range(2) for name in inner]
    state = model.state_dict()
    assert all((state[tensor_name(model, name)] == 0).sum(1).eq(4 if name[-1] != "2" else 6).all() for name in names)


def test_without_it_the_walk_says_what_to_do():
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    walk = LayerWalk(model, ModelSpec((Tower("text", r"layers\.\d+", 1, 8),)), [rows(1, 2, 8).float()], model)
    block = next(iter(walk))
    with pytest.raises(ValueError, match=r"self_attn\.out_proj.* not called as modules.*exposed_attention"):
        block.input_groups(block.linears())
