"""Another library's model, compressed block by block and written: what ``prune`` and ``quantize`` do with files."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fulgurite.backbones.fresh import DifferenceError
from fulgurite.backbones.library_models import LibraryModel
from fulgurite.backbones.rotated_models import require_rotatable, rotate_model
from fulgurite.callbacks.compress_step import LAYERS, CompressAtCheckpoint
from fulgurite.callbacks.prune_step import PruneAtCheckpoint, needs_loss
from fulgurite.callbacks.quantize_step import QuantizeAtCheckpoint
from fulgurite.callbacks.saved_blocks import SavedBlocks
from fulgurite.callbacks.steps import described
from fulgurite.checkpoints import Manifest, digest_of_json, digest_of_tensor
from fulgurite.checkpoints.sources import Source
from fulgurite.checkpoints.store import new_manifest
from fulgurite.commands.calibration_inputs import calibration, evaluated, inputs_of, require_partners
from fulgurite.commands.compress import DEFAULT_FORMAT, DEFAULT_SHARDS, data_given
from fulgurite.commands.compress_output import documents_of, show_layers, show_result
from fulgurite.commands.errors import DONE, ConfigError
from fulgurite.commands.features import device_named
from fulgurite.commands.progress import progress
from fulgurite.commands.tables import console, plain_table, size_text
from fulgurite.methods.compression import CompressedBlock, Compressor, blocks_of, matrices, totals
from fulgurite.methods.layer_walk import LayerWalk
from fulgurite.methods.packed_attention import tensor_name
from fulgurite.methods.papers import papers_of
from fulgurite.methods.pruning.iterative import Iterative
from fulgurite.methods.quantization.compressed_tensors import require_fits
from fulgurite.methods.quantization.grid import UNQUANTIZED_BITS
from fulgurite.methods.quantization.quantized_weight import Compressed
from fulgurite.methods.quantization.rotation import Rotate
from fulgurite.methods.quantization.rotation_record import ROTATION
from fulgurite.methods.ranks import ALONE
from fulgurite.metrics.perplexity import perplexity_and_count
from fulgurite.modules.compressed_files import weights_of, write

if TYPE_CHECKING:
    from fulgurite.backbones.reload import Stored

PICTURES = "vision"  # the tower that they go through


@dataclass
class Job:
    """One compression, found possible.

    Args:
        verb: ``prune`` or ``quantize``.
        source: the files.
        opened: their model.
        step: that a fit would take, which knows the method.
        walk: over the model, with the calibration data.
        compressor: of the step, to be settled on the model.
        weights: of the layers, by name.
        masks: of those that were pruned before.
        stored: the layout of the result.
        data: what the calibration data are.
        evaluation: windows to score, or None.
        rotation: of the model before it is measured, or None.
    """

    verb: str
    source: Source
    opened: LibraryModel
    step: CompressAtCheckpoint
    walk: LayerWalk
    compressor: Compressor
    weights: dict[str, Tensor]
    masks: dict[str, Tensor]
    stored: Stored
    data: dict[str, Any]
    evaluation: Tensor | None
    rotation: Rotate | None

    @property
    def num_weights(self) -> int:
        """Of all layers together."""
        return sum(weight.numel() for weight in self.weights.values())

    @property
    def rough_size(self) -> int:
        """Bytes that the result will take at least, about: scales, kept weights and companions are left out."""
        size = self.source.num_bytes
        if self.verb == "prune":
            return size
        budget = self.step.budget
        for name, weight in self.weights.items():
            bits = self.compressor.bits_of(name) if budget is None else budget.average_bits
            size -= round(weight.numel() * max(weight.element_size() - bits / 8, 0))
        return size

    @property
    def fingerprint(self) -> str:
        """Of all that the result depends on to the bit."""
        return digest_of_json(
            {
                "source": self.source.digest,
                "configuration": self.opened.configuration,
                "step": self.step.settings,
                "data": self.data,
                "rotation": described(self.rotation),
                "device": self.walk.device.type,
                "torch": torch.__version__,
            }
        )


def prepared(source: Source, opened: LibraryModel, step: CompressAtCheckpoint, verb: str, options: Any) -> Job:
    """What the options ask for, found possible, where the attentions of the model are exposed.

    Raises:
        ConfigError: an option that does not fit the model or the method.
        CheckpointError, DataError, ValueError: a file cannot be used; the text names it.
    """
    device, path = device_named(options.device), source.path
    if opened.masks and verb == "prune":
        raise ConfigError(f"{path} is pruned already: prune the model that it was made from, to the sparsity wanted")
    if verb == "prune" and (bits := getattr(step.compressor, "bits", UNQUANTIZED_BITS)) < UNQUANTIZED_BITS:
        raise ConfigError(
            f"--pruner.bits {bits}: a pruned folder holds dense weights: leave it out, and quantize the folder by "
            "`fulgurite quantize`, which keeps what is 0"
        )
    require_shards(opened, options)
    require_readable(opened, path, step, options)
    rotation: Rotate | None = options.get("rotation")
    if rotation is not None:
        require_rotatable(opened, rotation, path, options.format)
    batches, data = calibration(opened, options)
    evaluation = evaluated(opened, options)
    opened.model.to(device)
    if options.pictures is not None and step.towers is None:
        step.towers = [PICTURES]
    walk = LayerWalk(opened.model, opened.spec, batches, opened.forward, opened.token_masks, towers=step.towers)
    weights = matrices(walk, step.layers)
    named = {tensor_name(opened.model, layer): layer for layer in weights}
    masks = {named[name]: mask for name, mask in opened.masks.items() if name in named}
    compressor = copy.copy(step.compressor)
    if isinstance(step, QuantizeAtCheckpoint):
        compressor.keep_zeros(masks)
        if options.format == DEFAULT_FORMAT:
            require_layout(opened, step, {name: opened.model.get_submodule(name) for name in weights})
    if not isinstance(compressor, Iterative):  # which is settled on the whole model
        copy.copy(compressor).begin(weights)
    stored: Stored = "dense" if verb == "prune" else options.format
    return Job(verb, source, opened, step, walk, compressor, weights, masks, stored, data, evaluation, rotation)


def require_shards(opened: LibraryModel, options: Any) -> None:
    """Refuse a size of shards that is none, or where one file is written."""
    size = options.max_shard_size
    if size == DEFAULT_SHARDS:
        return
    if opened.library != "hf" or options.get("format") == "own":
        raise ConfigError(f"--max_shard_size {size}: weights are written to one file here; leave it out")
    if not re.fullmatch(r"\s*\d+(\.\d+)?\s*[KMGT]B\s*", size, re.IGNORECASE):
        raise ConfigError(f"--max_shard_size {size}: expected a number and KB, MB, GB or TB, as 5GB")


def require_layout(opened: LibraryModel, step: QuantizeAtCheckpoint, layers: Mapping[str, nn.Module]) -> None:
    """Refuse what compressed-tensors has no place for."""
    if opened.library != "hf":
        raise ConfigError(
            f"--format compressed-tensors is what transformers loads, and {type(opened.model).__name__} is a model of "
            f"{opened.library}: give --format own"
        )
    bits = map(step.quantizer.bits_of, layers) if step.budget is None else [step.budget.average_bits]
    if min(bits) >= UNQUANTIZED_BITS:
        raise ConfigError(
            f"bits={UNQUANTIZED_BITS} of all layers: there is nothing to quantize: give fewer, or --format own"
        )
    require_package()
    if step.task_circuit is not None:
        raise ConfigError("compressed-tensors has no place for weights that a task circuit keeps: give --format own")
    require_fits(step.quantizer, layers, None if step.budget is None else step.budget.choices)


def require_package() -> None:
    """Refuse to write what cannot be read back."""
    from transformers.utils import is_compressed_tensors_available

    if not is_compressed_tensors_available():
        raise ConfigError(
            "--format compressed-tensors is read back by that package: pip install 'fulgurite[compressed-tensors]', or "
            "give --format own"
        )


def require_readable(opened: LibraryModel, path: Path, step: CompressAtCheckpoint, options: Any) -> None:
    """Refuse data that the model does not read, and scores that it does not give."""
    kind = type(opened.model).__name__
    known = [opened.reads, *(["pairs"] if opened.reads_pairs else [])]
    if (name := data_given(options)) and name not in known:
        wanted = " or ".join(f"--{each}" for each in known)
        raise ConfigError(f"--{name}: {kind} of {path} is measured on {opened.reads}: give {wanted}")
    if options.pictures is not None and set(step.towers or []) - {PICTURES}:
        raise ConfigError(f"--towers {step.towers}: pictures go through the tower {PICTURES!r} alone; leave out others")
    if opened.is_language_model:
        return
    if options.evaluate is not None:
        raise ConfigError(f"--evaluate: {kind} of {path} is no language model and has no perplexity; leave it out")
    if options.get("task_circuit") is not None:
        why = f"{kind} of {path} is no language model" if options.pairs is None else "a pair alone has none"
        raise ConfigError(f"--task_circuit takes gradients of the losses of single examples, and {why}; leave it out")
    if isinstance(step, PruneAtCheckpoint) and needs_loss(step.pruner, step.allocation):
        if options.pairs is None:
            among = ": give --pairs, which have one" if opened.reads_pairs else ""
            raise ConfigError(f"this method needs a loss, and {kind} of {path} is no language model{among}")
        require_partners(options)


def preview(job: Job, out: Path) -> int:
    """Print what would be done."""
    table = plain_table(f"{job.verb} {job.source.path} into {out}", "what", "")
    table.add_row("model", f"{type(job.opened.model).__name__}, {size_text(job.source.num_bytes)}")
    table.add_row("method", type(job.compressor).__name__)
    table.add_row("towers", ", ".join(tower.name for tower in job.walk.towers))
    table.add_row("layers", f"{len(job.weights):,} with {job.num_weights:,} weights")
    if job.data:
        what = f"x {job.data['length']} tokens" if "length" in job.data else job.data["of"]
        table.add_row("calibration", f"{job.data['samples']} {what}")
    if job.rotation is not None:
        table.add_row("rotation", f"{type(job.rotation).__name__}, heads {job.rotation.heads}")
    table.add_row("layout", job.stored)
    console().print(table)
    return DONE


def carry_out(job: Job, out: Path, report: bool, max_shard_size: str) -> int:
    """Compress, write, and print what came of it. A call that was cut short goes on after the last whole block.

    So does one whose result could not be compared; one that was compared and differs starts anew.
    """
    with SavedBlocks(partial_folder(out), job.fingerprint, ALONE) as blocks:
        metrics, _ = scores(job, "perplexity_before")
        rotated = {} if job.rotation is None else {ROTATION: rotate_model(job.opened, job.rotation).data()}
        facts, results = compress(job, blocks)
        reports = [blocks.reports[name] for name in results]
        after, tokens = scores(job, "perplexity")
        metrics |= after
        weights = weights_of(job.opened, results, job.stored)
        facts |= {**rotated, "totals": {**totals(reports), "stored_bits": weights.stored_bits}}
        manifest = manifest_of(job, {**facts, LAYERS: [each.data() for each in reports]}, metrics)
        documents = documents_of(reports, manifest, out) if report else {}
        try:
            write(job.opened, weights, out, manifest, documents, max_shard_size)
        except DifferenceError:
            blocks.remove()
            raise
        blocks.remove()
    show_layers(reports)
    sizes = {"bytes_before": job.source.num_bytes, "bytes": weights.num_bytes}
    show_result(job.verb, {**metrics, **sizes, "tokens": tokens, "stored_bits": weights.stored_bits}, out)
    return DONE


def partial_folder(out: Path) -> Path:
    """Where the blocks of ``out`` lie while it is made."""
    return out.with_name(f"{out.name}-partial")


def compress(job: Job, blocks: SavedBlocks) -> tuple[dict[str, Any], dict[str, Compressed]]:
    """What was found of the whole model, and what became of every layer."""
    total, names, saved = sum(1 for _ in blocks_of(job.walk)), [], []
    with progress(job.num_weights, job.source.num_bytes) as bar, torch.no_grad():

        def seen(done: CompressedBlock) -> None:
            names.append(done.block.name)
            if not done.reports:
                saved.append(done.block.name)
            elif saved and len(names) == len(saved) + 1:
                console().print(f"going on after block {len(saved)} of {total}, saved in {blocks.folder}")
            if bar is not None:
                bar(job.verb, sum(job.weights[name].numel() for name in done.results))
            elif done.reports:
                console().print(f"{job.verb}: block {len(names)} of {total}, {done.block.name}")

        facts = job.step.score(job.compressor, job.walk, job.opened.loss, blocks)
        job.compressor.begin(job.weights)
        return facts, job.step.solve(job.walk, job.compressor, job.masks, blocks, seen)


def scores(job: Job, name: str) -> tuple[dict[str, float], int]:
    """The perplexity of the model as it is now, where that was asked for, and the number of tokens that it is of."""
    if job.evaluation is None:
        return {}, 0
    value, tokens = perplexity_and_count(job.opened.scored, inputs_of(job.opened, job.evaluation))
    return {name: value}, tokens


def manifest_of(job: Job, facts: dict[str, Any], metrics: dict[str, float]) -> Manifest:
    """What made the result, and of what."""
    given = {name: value for name, value in job.step.settings["init_args"].items() if value is not None}
    compressor = given.pop("pruner" if job.verb == "prune" else "quantizer")
    methods = job.step.methods if job.rotation is None else [*job.step.methods, job.rotation]
    facts = {**facts, "papers": papers_of(*methods)}
    given |= {} if job.rotation is None else {ROTATION: described(job.rotation)}
    if job.evaluation is not None:
        facts["evaluation"] = {"windows": list(job.evaluation.shape), "data": digest_of_tensor(job.evaluation)}
    return new_manifest(
        parents=[{"path": str(job.source.path), "digest": job.source.digest}],
        settings={**given, job.verb: compressor, "calibration": job.data},
        metrics=metrics,
        facts=facts,
    )
