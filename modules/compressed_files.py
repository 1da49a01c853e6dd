"""A compressed model of another library written to a folder, loaded in a fresh process, compared, and then published.

    dense               as the library reads it, pruned weights as zeros; masks beside them
    compressed-tensors  as transformers reads it with that package; see `methods.quantization.compressed_tensors`
    own                 anything, for `fulgurite.load_model`

Memory beside the model: what is written, and the model in float32 for the comparison.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fulgurite.backbones.foreign_models import write_model
from fulgurite.backbones.fresh import compare_fresh, require_same
from fulgurite.backbones.library_models import MASKS, LibraryModel, other_linears
from fulgurite.backbones.probe import probe
from fulgurite.backbones.reload import Stored, outputs, tokens_of
from fulgurite.checkpoints import Manifest
from fulgurite.checkpoints.atomic import naming
from fulgurite.checkpoints.companions import WEIGHTS
from fulgurite.checkpoints.foreign import companions, copy_files, foreign_folder, record_files, require_space
from fulgurite.checkpoints.manifest import write_manifest
from fulgurite.checkpoints.tensorfile import write_tensors
from fulgurite.methods.packed_attention import tensor_name
from fulgurite.methods.quantization.compressed_tensors import quantization_config, scheme_of
from fulgurite.methods.quantization.packing import to_compressed_tensors
from fulgurite.methods.quantization.quantized_weight import Compressed
from fulgurite.methods.quantization.storage import COMPRESSED, packed_mask, stored
from fulgurite.methods.statistics.gram import input_width

COMPRESSED_TENSORS: Stored = "compressed-tensors"


@dataclass(frozen=True)
class Weights:
    """What is written of a compressed model.

    Args:
        stored: the layout.
        tensors: in the place of the model's own; None where those are written.
        masks: bitmaps beside them.
        compressed: facts of the compressed tensors, by name.
        config: ``quantization_config``, where the library reads one.
        num_bytes: of all tensors.
        stored_bits: of an entry of the compressed layers, scales, indices and masks included.
    """

    stored: Stored
    tensors: dict[str, Tensor] | None
    masks: dict[str, Tensor]
    compressed: dict[str, dict]
    config: dict | None
    num_bytes: int
    stored_bits: float


def weights_of(opened: LibraryModel, results: Mapping[str, Compressed], layout: Stored) -> Weights:
    """The tensors of a model whose layers have become ``results``, as a layout stores them.

    Masks of what was pruned before, and is none of ``results``, go along.
    """
    state, own = opened.state(), {}
    schemes, masks, compressed, replaced = {}, {}, {}, set()
    for layer, result in results.items():
        name = tensor_name(opened.model, layer)
        parts, facts = stored(name, result, input_width(opened.model.get_submodule(layer))[1])
        replaced.add(name)
        bits = {key: tensor for key, tensor in parts.items() if key == f"{name}.mask"}
        if layout == COMPRESSED_TENSORS and result.quantized is not None:
            schemes[layer] = scheme_of(result.quantized)
            parts = {f"{layer}.{part}": tensor for part, tensor in to_compressed_tensors(result.quantized).items()}
            facts = {**facts, "bits": None} if bits else {}
        if layout != "own":
            masks |= bits
        own |= {key: tensor for key, tensor in parts.items() if layout == "own" or key not in bits}
        if facts:
            compressed[name] = facts
    size, entries = num_bytes(own) + num_bytes(masks), sum(each.weight.numel() for each in results.values())
    others = {name: mask for name, mask in opened.masks.items() if name not in replaced}
    (own if layout == "own" else masks).update({f"{name}.mask": packed_mask(mask) for name, mask in others.items()})
    compressed |= {name: opened.pruned[name] for name in others}
    whole = {name: tensor for name, tensor in state.items() if name not in replaced} | own
    return Weights(
        layout,
        None if layout == "dense" else whole,
        masks,
        compressed,
        quantization_config(schemes, other_linears(opened.model, list(schemes))) if schemes else None,
        num_bytes(whole) + num_bytes(masks),
        8 * size / entries,
    )


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Size of all of them."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write(
    opened: LibraryModel,
    weights: Weights,
    out: Path,
    manifest: Manifest,
    documents: Mapping[str, bytes],
    max_shard_size: str = "50GB",
) -> None:
    """Write, compare in a fresh process, publish; ``opened.model`` is on the CPU in float32 afterwards.

    Args:
        opened: the live model, with the compressed weights.
        weights: of it.
        out: a folder that is not there yet, or empty.
        manifest: gets what is known of the files and of the comparison.
        documents: more files for the folder, by name.
        max_shard_size: of one file of weights, for transformers.

    Raises:
        CheckpointError: the library cannot load it, or makes another model of it; nothing is left.
    """
    library, model, folder_of = opened.library, opened.model, opened.folder
    require_space(out, weights.num_bytes)
    manifest.facts |= {
        COMPRESSED: weights.compressed,
        "library": {"own": "fulgurite"}.get(weights.stored, "transformers" if library == "hf" else library),
        **({"loaded_by": type(model).__name__} if library == "hf" else {}),
    }
    inputs = probe(library, model)
    with foreign_folder(out, manifest) as folder, naming(folder):
        if weights.stored == "own":
            copy_files(companions(folder_of), folder)
            write_tensors(folder / WEIGHTS, weights.tensors)
        else:
            if weights.config is not None:
                model.config.quantization_config = weights.config
            write_model(library, model, folder, folder_of, max_shard_size=max_shard_size, tensors=weights.tensors)
            if weights.masks:
                write_tensors(folder / MASKS, weights.masks)
        for name, text in documents.items():
            (folder / name).write_bytes(text)
        if weights.stored == "own":  # whose loader reads the manifest
            record_files(folder, manifest)
            write_manifest(folder, manifest)
        expected = outputs(library, model.float().cpu(), inputs)
        found = compare_fresh(library, folder, inputs, expected, type(model).__name__, stored=weights.stored)
        require_same(found, model, tokens_of(str(folder_of)))
        manifest.facts |= {"reloaded": found.versions, "errors": found.errors}
