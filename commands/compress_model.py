"""Another library's model, compressed block by block and written: what ``prune`` and ``quantize`` do with files."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fulgurite.backbones.library_models import LibraryModel, open_library_model
from fulgurite.callbacks.compress_step import LAYERS, CompressAtCheckpoint
from fulgurite.callbacks.quantize_step import QuantizeAtCheckpoint
from fulgurite.callbacks.saved_blocks import SavedBlocks
from fulgurite.checkpoints import Manifest, MismatchError, digest_of_json, digest_of_tensor
from fulgurite.checkpoints.sources import Source, open_source
from fulgurite.checkpoints.store import new_manifest
from fulgurite.commands.compress_output import csv_of, show_layers, show_result
from fulgurite.commands.errors import DONE, ConfigError
from fulgurite.commands.features import device_named
from fulgurite.commands.progress import progress
from fulgurite.commands.tables import console, plain_table, size_text
from fulgurite.datamodules.text_windows import consecutive_windows, random_windows, token_ids
from fulgurite.methods.compression import CompressedBlock, Compressor, matrices, totals
from fulgurite.methods.layer_walk import LayerWalk
from fulgurite.methods.papers import papers_of
from fulgurite.methods.quantization.compressed_tensors import require_fits
from fulgurite.methods.quantization.quantized_weight import Compressed
from fulgurite.methods.ranks import ALONE
from fulgurite.metrics.perplexity import perplexity
from fulgurite.modules.compressed_files import weights_of, write

if TYPE_CHECKING:
    from fulgurite.backbones.reload import Stored

TOKENS_AT_ONCE = 2048  # of windows that run together
REPORT_NAME = "layers.csv"


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

    @property
    def num_weights(self) -> int:
        """Of all layers together."""
        return sum(weight.numel() for weight in self.weights.values())

    @property
    def fingerprint(self) -> str:
        """Of all that the result depends on to the bit."""
        return digest_of_json(
            {
                "source": self.source.digest,
                "step": self.step.settings,
                "data": self.data,
                "device": self.walk.device.type,
                "torch": torch.__version__,
            }
        )


def prepared(path: Path, step: CompressAtCheckpoint, verb: str, options: Any) -> Job:
    """What the options ask for, found possible.

    Raises:
        ConfigError: an option that does not fit the model or the method.
        CheckpointError, DataError, ValueError: a file cannot be used; the text names it.
    """
    device = device_named(options.device)
    source = open_source(path)
    opened = open_library_model(source, None if options.like is None else Path(options.like))
    if opened.masks and verb == "prune":
        raise ConfigError(f"{path} is pruned already: prune the model that it was made from, to the sparsity wanted")
    if (options.text is not None or options.evaluate is not None) and not opened.is_language_model:
        kind = type(opened.model).__name__
        raise ConfigError(f"{path}: {kind} is no language model: leave out --text and --evaluate")
    windows, data = calibration(opened, options)
    evaluation = evaluated(opened, options)
    opened.model.to(device)
    batches = [] if windows is None else inputs_of(opened, windows)
    walk = LayerWalk(opened.model, opened.spec, batches, opened.forward, towers=step.towers)
    weights = matrices(walk, step.layers)
    masks = {name: mask for name, mask in opened.masks.items() if name in weights}
    compressor = copy.copy(step.compressor)
    if isinstance(step, QuantizeAtCheckpoint):
        compressor.keep_zeros(masks)
        if options.format == "compressed-tensors":
            require_layout(step, {name: opened.model.get_submodule(name) for name in weights})
    copy.copy(compressor).begin(weights)
    stored: Stored = "dense" if verb == "prune" else options.format
    return Job(verb, source, opened, step, walk, compressor, weights, masks, stored, data, evaluation)


def require_layout(step: QuantizeAtCheckpoint, layers: Mapping[str, nn.Module]) -> None:
    """Refuse what compressed-tensors has no place for."""
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


def files_of(given: str | list[str]) -> list[Path]:
    """Paths of one or more files."""
    return [Path(each) for each in ([given] if isinstance(given, str) else given)]


def calibration(opened: LibraryModel, options: Any) -> tuple[Tensor | None, dict[str, Any]]:
    """Windows (samples, length), and what they are; nothing without text."""
    if options.text is None:
        return None, {}
    require_length(opened, options.length)
    ids = token_ids(files_of(options.text), opened.tokenize)
    windows = random_windows(ids, options.samples, options.length, options.seed)
    facts = {"samples": options.samples, "length": options.length, "seed": options.seed, "tokens_of_text": len(ids)}
    return windows, {**facts, "data": digest_of_tensor(windows)}


def evaluated(opened: LibraryModel, options: Any) -> Tensor | None:
    """Windows to score, or None."""
    if options.evaluate is None:
        return None
    require_length(opened, options.length)
    ids = token_ids(files_of(options.evaluate), opened.tokenize)
    return consecutive_windows(ids, options.length, options.evaluate_samples)


def require_length(opened: LibraryModel, length: int) -> None:
    """Refuse windows that the model cannot read."""
    if length < 2:
        raise ConfigError(f"--length {length}: a window has at least 2 tokens")
    if opened.longest is not None and length > opened.longest:
        raise ConfigError(f"--length {length}: the model reads at most {opened.longest} tokens; set --length lower")


def inputs_of(opened: LibraryModel, windows: Tensor) -> list[dict[str, Tensor]]:
    """Batches of windows that run together."""
    return [opened.text_inputs(part) for part in windows.split(max(1, TOKENS_AT_ONCE // windows.shape[1]))]


def preview(job: Job, out: Path) -> int:
    """Print what would be done."""
    table = plain_table(f"{job.verb} {job.source.path} into {out}", "what", "")
    table.add_row("model", f"{type(job.opened.model).__name__}, {size_text(job.source.num_bytes)}")
    table.add_row("method", type(job.compressor).__name__)
    table.add_row("towers", ", ".join(tower.name for tower in job.walk.towers))
    table.add_row("layers", f"{len(job.weights):,} with {job.num_weights:,} weights")
    if job.data:
        table.add_row("calibration", f"{job.data['samples']} x {job.data['length']} tokens")
    table.add_row("layout", job.stored)
    console().print(table)
    return DONE


def carry_out(job: Job, out: Path, report: bool, max_shard_size: str) -> int:
    """Compress, write, and print what came of it. A call that was cut short goes on after the last whole block."""
    blocks = SavedBlocks(partial_folder(out), job.fingerprint, ALONE)
    metrics = scores(job, "perplexity_before")
    facts, results = compress(job, blocks)
    reports = [blocks.reports[name] for name in results]
    metrics |= scores(job, "perplexity")
    weights = weights_of(job.opened, results, job.stored)
    facts["totals"] = {**totals(reports), "stored_bits": weights.stored_bits}
    manifest = manifest_of(job, {**facts, LAYERS: [each.data() for each in reports]}, metrics)
    try:
        write(job.opened, weights, out, manifest, {REPORT_NAME: csv_of(reports)} if report else {}, max_shard_size)
    except MismatchError:
        blocks.remove()
        raise
    blocks.remove()
    show_layers(reports)
    sizes = {"bytes_before": job.source.num_bytes, "bytes": weights.num_bytes}
    tokens = 0 if job.evaluation is None else job.evaluation.numel()
    show_result(job.verb, {**metrics, **sizes, "tokens": tokens, "stored_bits": weights.stored_bits}, out)
    return DONE


def partial_folder(out: Path) -> Path:
    """Where the blocks of ``out`` lie while it is made."""
    return out.with_name(f"{out.name}-partial")


def compress(job: Job, blocks: SavedBlocks) -> tuple[dict[str, Any], dict[str, Compressed]]:
    """What was found of the whole model, and what became of every layer."""
    with progress(job.num_weights, job.source.num_bytes) as bar, torch.no_grad():

        def seen(done: CompressedBlock) -> None:
            if bar is not None:
                bar(job.verb, sum(job.weights[name].numel() for name in done.results))

        facts = job.step.score(job.compressor, job.walk, job.opened.loss, blocks)
        job.compressor.begin(job.weights)
        return facts, job.step.solve(job.walk, job.compressor, job.masks, blocks, seen)


def scores(job: Job, name: str) -> dict[str, float]:
    """The perplexity of the model as it is now, where that was asked for."""
    if job.evaluation is None:
        return {}
    return {name: perplexity(job.opened.scored, inputs_of(job.opened, job.evaluation))}


def manifest_of(job: Job, facts: dict[str, Any], metrics: dict[str, float]) -> Manifest:
    """What made the result, and of what."""
    given = {name: value for name, value in job.step.settings["init_args"].items() if value is not None}
    compressor = given.pop("pruner" if job.verb == "prune" else "quantizer")
    facts = {**facts, "papers": papers_of(job.compressor)}
    if job.evaluation is not None:
        facts["evaluation"] = {"windows": list(job.evaluation.shape), "data": digest_of_tensor(job.evaluation)}
    return new_manifest(
        parents=[{"path": str(job.source.path), "digest": job.source.digest}],
        settings={**given, job.verb: compressor, "calibration": job.data},
        metrics=metrics,
        facts=facts,
    )
