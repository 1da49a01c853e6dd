"""The tensors of a compressed module as a checkpoint holds them, and what is compressed in one already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fulgurite.checkpoints import Manifest, load_tensors, read_manifest
from fulgurite.methods.compression import Compressor
from fulgurite.methods.packed_attention import tensor_name
from fulgurite.methods.quantization.quantized_weight import Compressed
from fulgurite.methods.quantization.storage import COMPRESSED, masks_of, stored
from fulgurite.methods.statistics.gram import input_width
from fulgurite.modules.compression import Compressible


def masked(name: str, result: Compressed, mask: Tensor | None, compressor: Compressor) -> Compressed:
    """``result`` with the mask of an earlier pruning.

    Raises:
        ValueError: weights that were pruned are not 0.
    """
    if mask is None:
        return result
    if result.weight[~mask].any():
        raise ValueError(f"{name}: {type(compressor).__name__} gave weights that were pruned other values than 0")
    return Compressed(result.weight, result.quantized, mask, result.loss, result.damping)


def source_masks(source: Path) -> dict[str, Tensor]:
    """Masks (out, in) of what was pruned in a checkpoint, by name of the tensor."""
    facts = read_manifest(source).facts.get(COMPRESSED, {})
    names = [f"{name}.mask" for name in facts if f"{name}.mask" in read_manifest(source).tensors["weights.safetensors"]]
    return masks_of(load_tensors(source, names=names), facts) if names else {}


def tensor_names(module: Compressible, layers: Iterable[str]) -> dict[str, str]:
    """Names in the module's state dict of the weights of layers of its part, by the names that the part has for them.

    The attentions of the part must be exposed.
    """
    part = module.get_submodule(module.compressible_part)
    return {layer: f"{module.compressible_part}.{tensor_name(part, layer)}" for layer in layers}


def whole_state(
    module: Compressible, results: Mapping[str, Compressed], source: Path, manifest: Manifest
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a compressed module as they are stored, and the facts of the compressed ones.

    What was compressed in the source and is none of ``results`` stays as it was stored there. The attentions of the
    module's part must be exposed.
    """
    part = module.get_submodule(module.compressible_part)
    tensors = {name: tensor.cpu() for name, tensor in module.state_dict().items()}
    new = {name: (layer, results[layer]) for layer, name in tensor_names(module, results).items()}
    before = {name: about for name, about in manifest.facts.get(COMPRESSED, {}).items() if name not in new}
    parts = [n for n in manifest.tensors["weights.safetensors"] if n.rpartition(".")[0] in before]
    compressed = dict(before)
    for name, about in before.items():
        if about["bits"] is not None:
            del tensors[name]
    tensors |= load_tensors(source, names=parts) if parts else {}
    for name, (layer, result) in new.items():
        transposed = input_width(part.get_submodule(layer))[1]
        own, facts = stored(name, result, transposed)
        if facts:
            del tensors[name]
            tensors |= own
            compressed[name] = facts
    return tensors, compressed
