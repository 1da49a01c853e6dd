"""Compressed weights as named tensors and plain facts, and back: what a checkpoint of such weights holds.

Of a tensor ``<layer>.weight`` there are, by what was done to it:

    quantized   .integers (out, in b/32) int32, packed by rows; .scale (out, G); .zero, packed as one row, where not all
                are 2^(b-1); .group_index (in,) where groups are no runs of equal length; of entries that are kept as
                they are .kept_values, .kept_columns, and .kept_counts (out,) of every row
    pruned      the tensor itself, with zeros, and .mask, a bit per entry, 1 where it was not pruned
    both        what a quantized one has, and .mask

The facts of a tensor are its ``shape``, ``bits`` (None where not quantized), ``dtype``, ``group_size`` (None where
``.group_index`` says it) and whether the layer stores it ``transposed``, (in, out).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fulgurite.checkpoints import DamagedError, load_tensors, read_manifest
from fulgurite.methods.quantization.packing import pack_int, unpack_int
from fulgurite.methods.quantization.quantized_weight import Compressed, QuantizedWeight

COMPRESSED = "compressed"
QUANTIZED_PARTS = ("integers", "scale", "zero", "group_index", "kept_values", "kept_columns", "kept_counts")
NARROW = 1 << 16  # columns whose numbers fit in 16 bits

Tensors = dict[str, Tensor]
Facts = dict[str, Any]


def packed_mask(mask: Tensor) -> Tensor:
    """(ceil(n / 8),) uint8 of a bool tensor with n entries, row by row, lowest bit first."""
    flat = mask.detach().flatten()
    padded = torch.zeros(-(-flat.numel() // 8) * 8, dtype=torch.uint8, device=flat.device)
    padded[: flat.numel()] = flat
    shifts = torch.arange(8, dtype=torch.uint8, device=flat.device)
    return (padded.view(-1, 8) << shifts).sum(1, dtype=torch.uint8)


def unpacked_mask(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The bool tensor of that shape that `packed_mask` packed."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    flat = ((bits[:, None] >> shifts) & 1).bool().flatten()
    return flat[: torch.Size(shape).numel()].view(shape)


def packed(
    name: str, quantized: QuantizedWeight, dtype: torch.dtype = torch.float32, transposed: bool = False
) -> tuple[Tensors, Facts]:
    """Tensors ``<name>.<part>`` of a quantized weight, and its facts.

    Args:
        name: of the tensor, ``<layer>.weight``.
        quantized: (out, in).
        dtype: in which the layer computes with it.
        transposed: whether the layer has it as (in, out).
    """
    num_rows, num_columns = quantized.integers.shape
    parts = {"integers": pack_int(quantized.integers, quantized.bits), "scale": quantized.scale}
    if not quantized.symmetric:
        parts["zero"] = pack_int(quantized.zero.reshape(1, -1), quantized.bits)
    group_size = run_of(quantized.group_index)
    if group_size is None:
        parts["group_index"] = quantized.group_index
    if quantized.kept is not None:
        columns = quantized.kept.nonzero()[:, 1]
        parts["kept_values"] = quantized.kept_values
        parts["kept_columns"] = columns.to(torch.int16 if num_columns <= NARROW else torch.int32)
        parts["kept_counts"] = quantized.kept.sum(1, dtype=torch.int32)
    facts = facts_of((num_rows, num_columns), dtype, transposed, quantized.bits, group_size)
    return {f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}, facts


def unpacked(name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> QuantizedWeight:
    """The weight that `packed` stored under ``name``.

    Raises:
        DamagedError: a part is missing.
    """
    num_rows, num_columns = facts["shape"]
    bits = facts["bits"]
    scale = part_of(name, "scale", tensors)
    zero = torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8, device=scale.device)
    if f"{name}.zero" in tensors:
        zero = unpack_int(tensors[f"{name}.zero"], bits, scale.numel()).view(scale.shape)
    if facts["group_size"] is None:
        group_index = part_of(name, "group_index", tensors)
    else:
        group_index = torch.arange(num_columns, dtype=torch.int32, device=scale.device) // facts["group_size"]
    kept, kept_values = None, tensors.get(f"{name}.kept_values")
    if kept_values is not None:
        counts = part_of(name, "kept_counts", tensors).long()
        columns = part_of(name, "kept_columns", tensors)
        # Numbers from 2^15 on became negative in 16 bits.
        columns = columns.long() & (NARROW - 1) if columns.dtype == torch.int16 else columns.long()
        kept = torch.zeros(num_rows, num_columns, dtype=torch.bool, device=scale.device)
        kept[torch.arange(num_rows, device=scale.device).repeat_interleave(counts), columns] = True
    integers = unpack_int(part_of(name, "integers", tensors), bits, num_columns)
    return QuantizedWeight(integers, scale, zero, group_index, bits, kept, kept_values)


def stored(name: str, result: Compressed, transposed: bool = False) -> tuple[Tensors, Facts]:
    """Tensors and facts of what became of a weight; no facts where it was neither pruned nor quantized."""
    dtype = result.weight.dtype
    if result.quantized is not None:
        tensors, facts = packed(name, result.quantized, dtype, transposed)
    else:
        weight = result.weight.T if transposed else result.weight
        tensors, facts = {name: weight.contiguous()}, {}
    if result.mask is not None:
        tensors[f"{name}.mask"] = packed_mask(result.mask)
        facts = facts or facts_of(tuple(result.weight.shape), dtype, transposed)
    return tensors, facts


def restored(
    name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], transposed: bool = False
) -> Compressed:
    """What `stored` was given; ``facts`` may be empty as there."""
    mask = None
    if f"{name}.mask" in tensors:
        mask = unpacked_mask(tensors[f"{name}.mask"], tuple(facts["shape"]))
    if facts.get("bits") is not None:
        quantized = unpacked(name, tensors, facts)
        return Compressed(quantized.dequantize(getattr(torch, facts["dtype"])), quantized, mask)
    weight = part_of(name, "", tensors)
    return Compressed(weight.T if transposed else weight, mask=mask)


def dense(tensors: Mapping[str, Tensor], facts: Mapping[str, Mapping[str, Any]]) -> Tensors:
    """``tensors`` with every compressed one whole under its own name, bit for bit what its layer computed with.

    Args:
        tensors: of a checkpoint.
        facts: of its compressed tensors, by name.

    Raises:
        DamagedError: a part is missing.
    """
    parts = {f"{name}.{part}" for name in facts for part in (*QUANTIZED_PARTS, "mask")}
    out = {name: tensor for name, tensor in tensors.items() if name not in parts}
    for name, about in facts.items():
        if about["bits"] is not None:
            weight = unpacked(name, tensors, about).dequantize(getattr(torch, about["dtype"]))
            out[name] = weight.T.contiguous() if about["transposed"] else weight
        else:
            part_of(name, "", tensors)
    return out


def masks_of(tensors: Mapping[str, Tensor], facts: Mapping[str, Mapping[str, Any]]) -> Tensors:
    """(out, in) bool masks of the pruned tensors, by their names."""
    named = {name: about for name, about in facts.items() if f"{name}.mask" in tensors}
    return {name: unpacked_mask(tensors[f"{name}.mask"], tuple(about["shape"])) for name, about in named.items()}


def load_dense(path: str | Path) -> Tensors:
    """The weights of a checkpoint as a module takes them, whether they are stored compressed or not.

    Tensors that are not quantized are mapped from the file. Raises `CheckpointError` as `load_tensors` does.
    """
    return dense(load_tensors(path), read_manifest(path).facts.get(COMPRESSED, {}))


def facts_of(
    shape: tuple[int, int],
    dtype: torch.dtype,
    transposed: bool,
    bits: int | None = None,
    group_size: int | None = None,
) -> Facts:
    """What is known of a compressed tensor beside its parts; see the module."""
    return {
        "shape": list(shape),
        "bits": bits,
        "dtype": str(dtype).removeprefix("torch."),
        "group_size": group_size,
        "transposed": transposed,
    }


def run_of(group_index: Tensor) -> int | None:
    """Columns of a group where groups are runs of equal length (the last may be short), else None."""
    size = int((group_index == group_index[0]).sum())
    runs = torch.arange(len(group_index), dtype=group_index.dtype, device=group_index.device) // size
    return size if torch.equal(group_index, runs) else None


def part_of(name: str, part: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """A tensor that must be there.

    Raises:
        DamagedError: it is not.
    """
    whole = f"{name}.{part}" if part else name
    if whole not in tensors:
        raise DamagedError(f"the compressed tensor {name} lacks {whole}: the checkpoint is not whole")
    return tensors[whole]
