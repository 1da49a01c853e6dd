"""Compressed weights come back from their parts as the very bits that a layer computed with."""

import pytest
import torch

from fulgurite.checkpoints import DamagedError, save_checkpoint_folder
from fulgurite.methods.pruning.magnitude import matrix_mask, pruned
from fulgurite.methods.pruning.sparsegpt import sparsegpt
from fulgurite.methods.quantization.gptq import gptq
from fulgurite.methods.quantization.quantized_weight import Compressed
from fulgurite.methods.quantization.rtn import quantize_rtn
from fulgurite.methods.quantization.storage import (
    dense,
    load_dense,
    masks_of,
    packed,
    packed_mask,
    restored,
    stored,
    unpacked,
    unpacked_mask,
)

NAME = "block.layer.weight"


@pytest.fixture
def weight():
    return torch.randn(24, 40, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def gram():
    x = torch.randn(200, 40, generator=torch.Generator().manual_seed(1))
    return x.T @ x


def same(one, other):
    parts = ("integers", "scale", "zero", "group_index", "kept", "kept_values")
    pairs = [(getattr(one, part), getattr(other, part)) for part in parts]
    assert one.bits == other.bits
    return all((a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in pairs)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
@pytest.mark.parametrize("group_size", [16, "channel", "tensor"])
def test_rounded_weights_come_back(bits, scheme, group_size, weight):
    result = quantize_rtn(weight, bits, group_size, scheme)
    tensors, facts = packed(NAME, result.quantized)
    assert all(name.startswith(f"{NAME}.") for name in tensors)
    assert (f"{NAME}.zero" in tensors) == (scheme == "asymmetric")
    assert tensors[f"{NAME}.integers"].numel() == 24 * -(-40 * bits // 32)
    assert same(unpacked(NAME, tensors, facts), result.quantized)
    assert torch.equal(dense(tensors, {NAME: facts})[NAME], result.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_type_of_the_layer_comes_back(dtype, weight):
    result = quantize_rtn(weight.to(dtype), 4, 16, scale_dtype=dtype)
    tensors, facts = stored(NAME, result)
    found = dense(tensors, {NAME: facts})[NAME]
    assert found.dtype == dtype
    assert torch.equal(found, result.weight)


@pytest.mark.parametrize("order", ["none", "activation"])
def test_scattered_groups_and_kept_weights_come_back(order, weight, gram):
    kept = torch.rand(24, 40, generator=torch.Generator().manual_seed(2)) < 0.1
    result = gptq(weight, gram, 3, 16, order=order, groups="fresh", kept=kept)
    tensors, facts = packed(NAME, result.quantized)
    assert (facts["group_size"] is None) == (order == "activation") == (f"{NAME}.group_index" in tensors)
    assert same(unpacked(NAME, tensors, facts), result.quantized)
    # 16 bits of index beside 32 of value here.
    assert tensors[f"{NAME}.kept_columns"].nbytes == 2 * int(kept.sum())
    assert torch.equal(dense(tensors, {NAME: facts})[NAME], result.weight)


def test_columns_beyond_15_bits_are_kept_where_they_are():
    weight = torch.randn(2, 40000, generator=torch.Generator().manual_seed(0))
    kept = torch.zeros_like(weight, dtype=torch.bool)
    kept[0, 39999] = kept[1, 32768] = kept[1, 5] = True
    result = quantize_rtn(weight, 4, kept=kept)
    tensors, facts = packed(NAME, result.quantized)
    assert torch.equal(unpacked(NAME, tensors, facts).kept, kept)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 16)])
def test_masks_take_a_bit_per_entry_and_come_back(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.5
    bits = packed_mask(mask)
    size = mask.numel()
    assert bits.numel() == -(-size // 8)
    expected = sum(int(kept) << place for place, kept in enumerate(mask.flatten().tolist()))
    assert int.from_bytes(bytes(bits.tolist()), "little") == expected
    assert torch.equal(unpacked_mask(bits, shape), mask)


@pytest.mark.parametrize("transposed", [False, True])
def test_pruned_weights_stay_whole_beside_their_masks(transposed, weight):
    result = pruned(weight, matrix_mask(weight.abs(), 0.5))
    tensors, facts = stored(NAME, result, transposed)
    assert tensors.keys() == {NAME, f"{NAME}.mask"}
    found = dense(tensors, {NAME: facts})
    assert found.keys() == {NAME}
    assert torch.equal(found[NAME], result.weight.T if transposed else result.weight)
    assert torch.equal(masks_of(tensors, {NAME: facts})[NAME], result.mask)
    again = restored(NAME, tensors, facts, transposed)
    assert torch.equal(again.weight, result.weight)
    assert torch.equal(again.mask, result.mask)


@pytest.mark.parametrize("transposed", [False, True])
def test_pruned_and_quantized_at_once(transposed, weight, gram):
    result = sparsegpt(weight, gram, 0.5, bits=4, group_size=16)
    tensors, facts = stored(NAME, result, transposed)
    found = dense(tensors, {NAME: facts})[NAME]
    assert torch.equal(found, result.weight.T if transposed else result.weight)
    again = restored(NAME, tensors, facts, transposed)
    assert torch.equal(again.weight, result.weight)
    assert torch.equal(again.mask, result.mask)
    assert same(again.quantized, result.quantized)


@pytest.mark.parametrize("transposed", [False, True])
def test_what_was_left_as_it_is_has_no_facts(transposed, weight):
    tensors, facts = stored(NAME, Compressed(weight), transposed)
    assert not facts
    assert tensors.keys() == {NAME}
    assert torch.equal(restored(NAME, tensors, facts, transposed).weight, weight)


def test_a_checkpoint_gives_whole_weights_and_others_as_they_are(weight, tmp_path):
    result = quantize_rtn(weight, 4, 16)
    tensors, facts = packed(NAME, result.quantized)
    other = {"block.layer.bias": torch.arange(3.0), "scale": torch.ones(1)}
    save_checkpoint_folder(tmp_path / "c", {"weights": {**tensors, **other}}, facts={"compressed": {NAME: facts}})
    found = load_dense(tmp_path / "c")
    assert found.keys() == {NAME, *other}
    assert torch.equal(found[NAME], result.weight)
    save_checkpoint_folder(tmp_path / "plain", {"weights": other})
    assert load_dense(tmp_path / "plain").keys() == other.keys()


def test_a_missing_part_is_named(weight):
    tensors, facts = packed(NAME, quantize_rtn(weight, 4, 16).quantized)
    del tensors[f"{NAME}.scale"]
    with pytest.raises(DamagedError, match=r"lacks block\.layer\.weight\.scale"):
        dense(tensors, {NAME: facts})
    with pytest.raises(DamagedError, match=rf"lacks {NAME}"):
        dense({}, {NAME: {**facts, "bits": None}})
