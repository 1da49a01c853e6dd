import pytest
import torch

from fulgurite.methods.quantization.gptq import gptq
from fulgurite.methods.quantization.packing import (
    from_compressed_tensors,
    from_gptq,
    pack_int,
    to_compressed_tensors,
    to_gptq,
    unpack_int,
)
from fulgurite.methods.quantization.quantized_weight import QuantizedWeight
from fulgurite.methods.quantization.rtn import quantize_rtn


def draw_integers(rows, columns, bits, seed=0):
    source = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), generator=source).to(torch.uint8)


def slow_words(values, bits):
    """Signed 32-bit words of one stream, by a single large Python integer."""
    stream = sum(value << (place * bits) for place, value in enumerate(values))
    words = [(stream >> (32 * place)) % 2**32 for place in range(-(-len(values) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@pytest.mark.parametrize("columns", [1, 9, 31, 32, 33, 45, 64, 100])
@pytest.mark.parametrize("bits", range(1, 9))
def test_integers_are_one_stream_of_bits_and_come_back(bits, columns):
    integers = draw_integers(3, columns, bits)
    integers[0], integers[1] = 0, 2**bits - 1
    packed = pack_int(integers, bits)
    assert packed.dtype == torch.int32
    assert packed.tolist() == [slow_words(row, bits) for row in integers.tolist()]
    assert torch.equal(unpack_int(packed, bits, columns), integers)
    down = pack_int(integers.T, bits, dim=0)
    assert torch.equal(down, packed.T)
    assert torch.equal(unpack_int(down, bits, columns, dim=0), integers.T)


def test_what_does_not_fit_is_refused():
    for bits, value in ((3, 8), (4, -1), (8, 256)):
        with pytest.raises(ValueError, match=f"do not fit in {bits} bits"):
            pack_int(torch.full((1, 4), value), bits)
    for call in (pack_int, lambda integers, bits: unpack_int(integers, bits, 4)):
        with pytest.raises(ValueError, match="bits=9"):
            call(torch.zeros(1, 4, dtype=torch.int32), 9)
    with pytest.raises(ValueError, match="do not hold"):
        unpack_int(torch.zeros(1, 4, dtype=torch.int32), 4, 33)


def same(one, other):
    """Whether two quantized weights hold the same, scales in the type of ``one``."""
    parts = ("integers", "scale", "zero", "group_index")
    return one.bits == other.bits and all(torch.equal(getattr(one, p), getattr(other, p)) for p in parts)


def weight_with_extreme_zeros(rows, columns, bits, groups=2):
    """Integers at random, and zeros at both ends of their range."""
    zero = draw_integers(rows, groups, bits, seed=1)
    zero[0], zero[1] = 0, 2**bits - 1
    scale = torch.rand(rows, groups, generator=torch.Generator().manual_seed(2)).half() + 0.5
    group_index = torch.arange(columns, dtype=torch.int32) // -(-columns // groups)
    return QuantizedWeight(draw_integers(rows, columns, bits), scale, zero, group_index, bits)


@pytest.mark.parametrize("shape", [(5, 45), (33, 64), (2, 31)])
@pytest.mark.parametrize("bits", range(1, 9))
def test_a_weight_comes_back_from_the_layout_of_compressed_tensors(bits, shape):
    quantized = weight_with_extreme_zeros(*shape, bits)
    tensors = to_compressed_tensors(quantized)
    assert tensors["weight_packed"].shape == (shape[0], -(-shape[1] * bits // 32))
    assert tensors["weight_zero_point"].shape == (-(-shape[0] * bits // 32), 2)
    assert tensors["weight_shape"].tolist() == list(shape)
    back = from_compressed_tensors(tensors, bits, group_size=-(-shape[1] // 2))
    assert same(back, quantized)
    assert torch.equal(back.dequantize(), quantized.dequantize())


@pytest.mark.parametrize("group_size", ["channel", "tensor", 16])
def test_symmetric_weights_store_no_zeros(group_size):
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    quantized = quantize_rtn(weight, 4, group_size, scheme="symmetric").quantized
    tensors = to_compressed_tensors(quantized)
    assert set(tensors) == {"weight_packed", "weight_scale", "weight_shape"}
    back = from_compressed_tensors(tensors, 4, group_size if group_size == 16 else None)
    assert torch.equal(back.dequantize(), quantized.dequantize())


def test_scattered_groups_store_the_group_of_every_column():
    weight = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    gram = torch.diag(torch.rand(40, generator=torch.Generator().manual_seed(1)))
    quantized = gptq(weight, gram, 3, 8, order="activation").quantized
    tensors = to_compressed_tensors(quantized)
    assert same(from_compressed_tensors(tensors, 3), quantized)
    ordered = gptq(weight, gram, 3, 8, order="activation", groups="static").quantized
    assert "weight_g_idx" not in to_compressed_tensors(ordered)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_weight_comes_back_from_the_layout_of_gptq(bits):
    quantized = weight_with_extreme_zeros(32, 64, bits)
    tensors = to_gptq(quantized, "gptq_v2")
    assert tensors["qweight"].shape == (64 * bits // 32, 32)
    assert tensors["qzeros"].shape == (2, 32 * bits // 32)
    assert tensors["scales"].shape == (2, 32)
    # Consecutive inputs of an output lie in one stream down a column.
    assert tensors["qweight"][:, 5].tolist() == slow_words(quantized.integers[5].tolist(), bits)
    assert same(from_gptq(tensors, bits, "gptq_v2"), quantized)
    with pytest.raises(ValueError, match="use 'gptq_v2'"):
        to_gptq(quantized)
    quantized.zero.clamp_(min=1)
    assert same(from_gptq(to_gptq(quantized), bits), quantized)


def test_zeros_of_symmetric_four_bits_are_the_known_words_of_both_formats():
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    quantized = quantize_rtn(weight, 4, scheme="symmetric", scale_dtype=torch.float16).quantized
    assert (to_gptq(quantized)["qzeros"] == 0x77777777).all()
    assert (to_gptq(quantized, "gptq_v2")["qzeros"] == 0x88888888 - 2**32).all()


def test_what_the_layouts_cannot_hold_is_refused():
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    half = {"scheme": "symmetric", "scale_dtype": torch.float16}
    with pytest.raises(ValueError, match="bits=5"):
        to_gptq(quantize_rtn(weight, 5, **half).quantized)
    with pytest.raises(ValueError, match="multiples of 32"):
        to_gptq(quantize_rtn(weight[:30], 4, **half).quantized)
    with pytest.raises(ValueError, match="not exact in float16"):
        to_gptq(quantize_rtn(weight, 4, scheme="symmetric").quantized)
    kept = quantize_rtn(weight, 4, kept=weight > 1.5, **half).quantized
    for store in (to_gptq, to_compressed_tensors):
        with pytest.raises(ValueError, match="kept weights have no place"):
            store(kept)
    good = quantize_rtn(weight, 4, **half).quantized
    with pytest.raises(ValueError, match="expected one of gptq, gptq_v2"):
        to_gptq(good, "awq")
    wrapped = to_gptq(good) | {"qzeros": torch.full((1, 4), -1, dtype=torch.int32)}
    with pytest.raises(ValueError, match="can mean 0 or 16"):
        from_gptq(wrapped, 4)
    with pytest.raises(ValueError, match="see group_size"):
        from_compressed_tensors(to_compressed_tensors(good), 4, group_size=8)
