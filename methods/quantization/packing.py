"""Integers of b bits in 32-bit words, and the two layouts of quantized linear layers that others read.

A row of integers is one stream of bits: element i lies at bit i b, lowest bit first, over word boundaries where b does
not divide 32. Widths are those of the stream, rounded up to whole words.

    compressed-tensors, pack-quantized
        weight_packed (out, in b/32) along the input; weight_scale (out, G); weight_shape (2,); where not symmetric
        weight_zero_point (out b/32, G) along the output; where columns are scattered over groups weight_g_idx (in,)
    GPTQ
        qweight (in b/32, out) along the input; qzeros (G, out b/32) along the output; scales (G, out) float16;
        g_idx (in,). Format ``gptq`` stores zeros less 1 and so has no 0, ``gptq_v2`` stores them as they are

The integers of both are those of `QuantizedWeight`: compressed-tensors adds 2^(b-1) to its signed ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fulgurite.methods.quantization.quantized_weight import QuantizedWeight

GptqFormat = Literal["gptq", "gptq_v2"]

WORD = 32
GPTQ_BITS = (2, 3, 4, 8)


def pack_int(integers: Tensor, bits: int, dim: Literal[0, 1] = 1) -> Tensor:
    """Pack (rows, columns) along ``dim``: that axis becomes ceil(n bits / 32) words, int32.

    Raises:
        ValueError: bits outside 1 to 8, or an integer outside 0 to 2^bits - 1.
    """
    if bits not in range(1, 9):
        raise ValueError(f"bits={bits}: expected 1 to 8")
    if integers.numel() and not (int(integers.min()) >= 0 and int(integers.max()) < 2**bits):
        raise ValueError(f"integers from {integers.min()} to {integers.max()} do not fit in {bits} bits without sign")
    if dim == 0:
        return pack_int(integers.T, bits).T.contiguous()
    rows, count = integers.shape
    packed = torch.zeros(rows, -(-count // WORD), bits, dtype=torch.int32, device=integers.device)
    for first in range(min(WORD, count)):  # 32 integers fill ``bits`` words
        values = integers[:, first::WORD].to(torch.int32)
        word, offset = divmod(first * bits, WORD)
        packed[:, : values.shape[1], word] |= values << offset
        if offset + bits > WORD:
            packed[:, : values.shape[1], word + 1] |= values >> (WORD - offset)
    return packed.reshape(rows, -1)[:, : num_words(count, bits)].contiguous()


def unpack_int(packed: Tensor, bits: int, count: int, dim: Literal[0, 1] = 1) -> Tensor:
    """The ``count`` integers along ``dim`` of what `pack_int` made, uint8.

    Raises:
        ValueError: bits outside 1 to 8, or another number of words.
    """
    if bits not in range(1, 9):
        raise ValueError(f"bits={bits}: expected 1 to 8")
    if dim == 0:
        return unpack_int(packed.T, bits, count).T.contiguous()
    rows, words = packed.shape
    if words != num_words(count, bits):
        raise ValueError(f"{words} words of {WORD} bits do not hold {count} integers of {bits} bits")
    runs = -(-count // WORD)
    padded = torch.zeros(rows, runs * bits, dtype=torch.int32, device=packed.device)
    padded[:, :words] = packed
    padded = padded.view(rows, runs, bits)
    out = torch.empty(rows, count, dtype=torch.uint8, device=packed.device)
    for first in range(min(WORD, count)):
        place = out[:, first::WORD]
        word, offset = divmod(first * bits, WORD)
        here = min(bits, WORD - offset)
        # The shift of a negative word carries its sign along, which the mask takes off again.
        values = (padded[:, : place.shape[1], word] >> offset) & (2**here - 1)
        if here < bits:
            values |= (padded[:, : place.shape[1], word + 1] & (2 ** (bits - here) - 1)) << here
        place.copy_(values)
    return out


def num_words(count: int, bits: int) -> int:
    """Words of 32 bits that hold ``count`` integers."""
    return -(-count * bits // WORD)


def to_compressed_tensors(quantized: QuantizedWeight) -> dict[str, Tensor]:
    """Tensors of the layout pack-quantized by the names that compressed-tensors gives them, less the layer's.

    Raises:
        ValueError: weights are kept off the grid, for which it has no place.
    """
    refuse_kept(quantized, "pack-quantized")
    num_rows, num_columns = quantized.integers.shape
    scale, zero = per_row(quantized)
    out = {
        "weight_packed": pack_int(quantized.integers, quantized.bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([num_rows, num_columns]),
    }
    if not quantized.symmetric:
        out["weight_zero_point"] = pack_int(zero, quantized.bits, dim=0)
    if (quantized.group_index.diff() < 0).any():
        out["weight_g_idx"] = quantized.group_index
    return out


def from_compressed_tensors(tensors: Mapping[str, Tensor], bits: int, group_size: int | None = None) -> QuantizedWeight:
    """The weight that `to_compressed_tensors` stored.

    Args:
        tensors: by their names, less the layer's.
        bits: of an integer.
        group_size: columns of a group; the whole row when not given.

    Raises:
        ValueError: the shapes do not fit.
    """
    num_rows, num_columns = tensors["weight_shape"].tolist()
    scale = tensors["weight_scale"]
    if "weight_zero_point" in tensors:
        zero = unpack_int(tensors["weight_zero_point"], bits, num_rows, dim=0)
    else:
        zero = torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8, device=scale.device)
    group_index = tensors.get("weight_g_idx")
    if group_index is None:
        group_index = torch.arange(num_columns, dtype=torch.int32, device=scale.device) // (group_size or num_columns)
    integers = unpack_int(tensors["weight_packed"], bits, num_columns)
    return checked(QuantizedWeight(integers, scale, zero, group_index.to(torch.int32), bits), (num_rows, num_columns))


def to_gptq(quantized: QuantizedWeight, checkpoint_format: GptqFormat = "gptq") -> dict[str, Tensor]:
    """Tensors of the GPTQ layout by their names, less the layer's.

    Raises:
        ValueError: bits, a width, a scale or a zero has no place in it, or weights are kept off the grid.
    """
    refuse_kept(quantized, checkpoint_format)
    num_rows, num_columns = quantized.integers.shape
    if quantized.bits not in GPTQ_BITS:
        raise ValueError(f"bits={quantized.bits}: the GPTQ layout has {GPTQ_BITS}; export as compressed-tensors")
    if num_rows % WORD or num_columns % WORD:
        raise ValueError(f"a weight of {num_rows} x {num_columns}: the GPTQ layout needs multiples of {WORD}")
    scale, zero = per_row(quantized)
    stored = scale.to(torch.float16)
    if not torch.equal(stored.to(scale.dtype), scale):
        raise ValueError(
            "scales are not exact in float16, which the GPTQ layout stores: quantize with that scale_dtype"
        )
    less = zero_offset(checkpoint_format)
    if (zero < less).any():
        raise ValueError("a zero of 0 has no place in checkpoint_format='gptq': use 'gptq_v2'")
    return {
        "qweight": pack_int(quantized.integers, quantized.bits).T.contiguous(),
        "qzeros": pack_int((zero - less).T, quantized.bits),
        "scales": stored.T.contiguous(),
        "g_idx": quantized.group_index,
    }


def from_gptq(tensors: Mapping[str, Tensor], bits: int, checkpoint_format: GptqFormat = "gptq") -> QuantizedWeight:
    """The weight that `to_gptq` stored.

    Raises:
        ValueError: the shapes do not fit, or a zero is 2^bits, which writers of ``gptq`` that wrap 0 leave behind.
    """
    num_columns, num_rows = len(tensors["g_idx"]), tensors["scales"].shape[1]
    zero = unpack_int(tensors["qzeros"], bits, num_rows).T.to(torch.int16) + zero_offset(checkpoint_format)
    if (zero > 2**bits - 1).any():
        raise ValueError(
            f"a stored zero of {2**bits - 1} in checkpoint_format={checkpoint_format!r} can mean 0 or {2**bits}: "
            "if the file was written as 'gptq_v2', say so"
        )
    integers = unpack_int(tensors["qweight"].T, bits, num_columns)
    scale = tensors["scales"].T.contiguous()
    group_index = tensors["g_idx"].to(torch.int32)
    zero = zero.to(torch.uint8).contiguous()
    return checked(QuantizedWeight(integers, scale, zero, group_index, bits), (num_rows, num_columns))


def zero_offset(checkpoint_format: GptqFormat) -> int:
    """What a format takes off a zero.

    Raises:
        ValueError: an unknown format.
    """
    offsets = {"gptq": 1, "gptq_v2": 0}
    if checkpoint_format not in offsets:
        raise ValueError(f"checkpoint_format={checkpoint_format!r}: expected one of {', '.join(offsets)}")
    return offsets[checkpoint_format]


def per_row(quantized: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Scales and zeros (out, G), those of a tensor repeated."""
    num_rows = len(quantized.integers)
    return (
        quantized.scale.expand(num_rows, -1).contiguous(),
        quantized.zero.expand(num_rows, -1).contiguous(),
    )


def refuse_kept(quantized: QuantizedWeight, layout: str) -> None:
    """Raise a ValueError if weights are kept off the grid."""
    if quantized.kept is not None and quantized.kept.any():
        raise ValueError(f"{int(quantized.kept.sum())} kept weights have no place in the layout {layout}")


def checked(quantized: QuantizedWeight, shape: tuple[int, int]) -> QuantizedWeight:
    """``quantized``, if its parts fit each other.

    Raises:
        ValueError: they do not.
    """
    num_groups = int(quantized.group_index.max()) + 1
    found = (tuple(quantized.integers.shape), tuple(quantized.scale.shape), tuple(quantized.zero.shape))
    expected = (shape, (shape[0], num_groups), (shape[0], num_groups))
    if found != expected:
        raise ValueError(f"shapes of integers, scales and zeros are {found}, expected {expected}; see group_size")
    return quantized
