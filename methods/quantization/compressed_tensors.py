"""The configuration of the layout pack-quantized of compressed-tensors, beside the tensors that `packing` makes.

One group of layers per way of quantizing: a single one targets all linear layers but those it ignores, several name
their layers. What the layout could hold and transformers does not load is refused: zeros that are stored, columns
that are scattered over groups, and a last group that is short.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fulgurite.methods.quantization.base import Quantizer
from fulgurite.methods.quantization.gptq import Gptq
from fulgurite.methods.quantization.grid import UNQUANTIZED_BITS
from fulgurite.methods.quantization.quantized_weight import QuantizedWeight
from fulgurite.methods.quantization.storage import run_of

BITS = (2, 4, 8)  # those that all versions pack alike
Scheme = dict[str, Any]


def require_fits(quantizer: Quantizer, layers: Mapping[str, nn.Module], choices: Sequence[int] | None = None) -> None:
    """Refuse, before anything is solved, what the layout cannot hold.

    Args:
        quantizer: of all layers.
        layers: by name.
        choices: bits that a layer may get, in the place of the quantizer's.

    Raises:
        ValueError: names the option to change.
    """
    if quantizer.scheme == "asymmetric":
        raise ValueError(
            "scheme='asymmetric': transformers loads no stored zeros of compressed-tensors; use a symmetric one"
        )
    if isinstance(quantizer, Gptq) and quantizer.order == "activation" and quantizer.groups != "static":
        raise ValueError(
            f"groups={quantizer.groups!r} with order='activation' scatters the columns of a group, which "
            "compressed-tensors does not load: use groups='static' or order='group_aware'"
        )
    size = quantizer.group_size
    for name, layer in layers.items():
        possible = [each for each in choices or [quantizer.bits_of(name)] if each < UNQUANTIZED_BITS]
        if wrong := [each for each in possible if each not in BITS]:
            raise ValueError(f"{name}: bits={wrong[0]}: compressed-tensors is written with {BITS}; use --format own")
        if not possible:
            continue
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{name} is a {type(layer).__name__}: compressed-tensors knows torch's Linear alone")
        columns = layer.in_features
        if isinstance(size, int) and size < columns and columns % size:
            fits = [each for each in range(size, 15, -1) if columns % each == 0 and each % 8 == 0]
            hint = f", as {fits[0]}" if fits else ""
            raise ValueError(
                f"{name}: group_size={size} does not divide its {columns} columns, as compressed-tensors wants: set "
                f"another{hint}, or 'channel'"
            )
        kind = str(layer.weight.dtype).removeprefix("torch.")
        if quantizer.scale_dtype not in (None, kind):
            raise ValueError(
                f"{name}: scale_dtype={quantizer.scale_dtype!r}: compressed-tensors has the weights' {kind}"
            )


def scheme_of(quantized: QuantizedWeight) -> Scheme:
    """How one layer is quantized, as compressed-tensors says it.

    Raises:
        ValueError: zeros that are stored, or groups that are no runs of columns.
    """
    size, num_columns = run_of(quantized.group_index), quantized.integers.shape[1]
    if size is None or not quantized.symmetric:
        raise ValueError("zeros that are stored, or columns scattered over groups, have no place in compressed-tensors")
    grouped = size < num_columns
    return {
        "num_bits": quantized.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if grouped else "channel",
        "group_size": size if grouped else None,
        "dynamic": False,
    }


def quantization_config(schemes: Mapping[str, Scheme], others: Sequence[str]) -> dict[str, Any]:
    """What stands in ``config.json`` under ``quantization_config``.

    Args:
        schemes: of the quantized layers, by name.
        others: names of the linear layers that are not quantized.
    """
    groups: list[tuple[Scheme, list[str]]] = []
    for name, scheme in schemes.items():
        names = next((names for each, names in groups if each == scheme), None)
        if names is None:
            groups.append((scheme, [name]))
        else:
            names.append(name)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {"targets": ["Linear"] if len(groups) == 1 else names, "weights": scheme}
            for number, (scheme, names) in enumerate(groups)
        },
        "ignore": list(others),
    }
