"""Another library's model, compressed block by block and written: what ``prune`` and ``quantize`` do with files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fulgurite.backbones.library_models import LibraryModel, open_library_model
from fulgurite.callbacks.compress_step import LAYERS, masked
from fulgurite.callbacks.saved_blocks import SavedBlocks
from fulgurite.callbacks.steps import described
from fulgurite.checkpoints import Manifest, MismatchError, digest_of_json, digest_of_tensor
from fulgurite.checkpoints.sources import Source, open_source
from fulgurite.checkpoints.store import new_manifest
from fulgurite.commands.compress_output import csv_of, show_layers, show_result
from fulgurite.commands.errors import DONE, ConfigError
from fulgurite.commands.features import device_named
from fulgurite.commands.progress import progress
from fulgurite.commands.tables import console, plain_table, size_text
from fulgurite.datamodules.text_windows import consecutive_windows, random_windows, token_ids
from fulgurite.methods.compression import Compressor, LayerReport, compressed_blocks, matrices, totals
from fulgurite.methods.layer_walk import LayerWalk
from fulgurite.methods.papers import papers_of
from fulgurite.methods.pruning.base import Pruner
from fulgurite.methods.quantization.base import Quantizer
from fulgurite.methods.quantization.compressed_tensors import require_fits
from fulgurite.methods.quantization.quantized_weight import Compressed
from fulgurite.methods.ranks import ALONE
from fulgurite.metrics.perplexity import perplexity
from fulgurite.modules.compressed_files import num_bytes, weights_of, write

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
        walk: over it, with the calibration data.
        compressor: settled on its weights.
        layers: full pattern of names, or None.
        stored: the layout of the result.
        data: what the calibration data are.
        evaluation: windows to score, or None.
        sizes: entries of the layers, by name.
    """

    verb: str
    source: Source
    opened: LibraryModel
    walk: LayerWalk
    compressor: Compressor
    layers: str | None
    stored: Stored
    data: dict[str, Any]
    evaluation: Tensor | None
    sizes: dict[str, int]

    @property
    def fingerprint(self) -> str:
        """Of all that the result depends on to the bit."""
        return digest_of_json(
            {
                "source": self.source.digest,
                "compressor": described(self.compressor),
                "layers": self.layers,
                "towers": [tower.name for tower in self.walk.towers],
                "data": self.data,
                "device": self.walk.device.type,
                "torch": torch.__version__,
            }
        )


def prepared(path: Path, compressor: Compressor, verb: str, options: Any) -> Job:
    """What the options ask for, found possible.

    Raises:
        ConfigError: an option that does not fit the model or the method.
        CheckpointError, DataError, ValueError: a file cannot be used; the text names it.
    """
    require_data(compressor, options.text)
    device = device_named(options.device)
    source = open_source(path)
    opened = open_library_model(source, None if options.like is None else Path(options.like))
    if opened.masks and isinstance(compressor, Pruner):
        raise ConfigError(f"{path} is pruned already: prune the model that it was made from, to the sparsity wanted")
    stored: Stored = "dense" if isinstance(compressor, Pruner) else options.format
    if (options.text is not None or options.evaluate is not None) and not opened.is_language_model:
        raise ConfigError(
            f"{path}: {type(opened.model).__name__} is no language model: leave out --text and --evaluate"
        )
    windows, data = calibration(opened, options)
    evaluation = evaluated(opened, options)
    opened.model.to(device)
    batches = [] if windows is None else [opened.text_inputs(part) for part in at_once(windows)]
    walk = LayerWalk(opened.model, opened.spec, batches, opened.forward, towers=options.towers)
    weights = matrices(walk, options.layers)
    if isinstance(compressor, Quantizer):
        compressor.keep_zeros({name: mask for name, mask in opened.masks.items() if name in weights})
        if stored == "compressed-tensors":
            require_package()
            require_fits(compressor, {name: opened.model.get_submodule(name) for name in weights})
    compressor.begin(weights)
    sizes = {name: weight.numel() for name, weight in weights.items()}
    return Job(verb, source, opened, walk, compressor, options.layers, stored, data, evaluation, sizes)


def require_data(compressor: Compressor, text: Any) -> None:
    """Refuse text that is not used, and the lack of text that is needed."""
    name = type(compressor).__name__
    if compressor.needs == "nothing" and text is not None:
        raise ConfigError(f"{name} needs no inputs of layers: leave out --text")
    if compressor.needs != "nothing" and text is None:
        raise ConfigError(f"{name} needs inputs of layers: give --text FILE, what the model reads")


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


def at_once(windows: Tensor) -> Sequence[Tensor]:
    """Windows that run together."""
    return windows.split(max(1, TOKENS_AT_ONCE // windows.shape[1]))


def preview(job: Job, out: Path) -> int:
    """Print what would be done."""
    table = plain_table(f"{job.verb} {job.source.path} into {out}", "what", "")
    table.add_row("model", f"{type(job.opened.model).__name__}, {size_text(job.source.num_bytes)}")
    table.add_row("method", type(job.compressor).__name__)
    table.add_row("towers", ", ".join(tower.name for tower in job.walk.towers))
    table.add_row("layers", f"{len(job.sizes):,} with {sum(job.sizes.values()):,} weights")
    if job.data:
        table.add_row("calibration", f"{job.data['samples']} x {job.data['length']} tokens")
    table.add_row("layout", job.stored)
    console().print(table)
    return DONE


def carry_out(job: Job, out: Path, report: bool, max_shard_size: str) -> int:
    """Compress, write, and print what came of it. A call that was cut short goes on after the last whole block."""
    blocks = SavedBlocks(partial_folder(out), job.fingerprint, ALONE)
    metrics = scores(job, "perplexity_before")
    results = compress(job, blocks)
    reports = [blocks.reports[name] for name in results]
    metrics |= scores(job, "perplexity")
    weights = weights_of(job.opened, results, job.stored)
    manifest = manifest_of(job, reports, metrics, weights.stored_bits)
    try:
        write(job.opened, weights, out, manifest, {REPORT_NAME: csv_of(reports)} if report else {}, max_shard_size)
    except MismatchError:
        blocks.remove()
        raise
    blocks.remove()
    show_layers(reports)
    sizes = {"bytes_before": num_bytes(job.source.tensors), "bytes": weights.num_bytes}
    tokens = 0 if job.evaluation is None else job.evaluation.numel()
    show_result(job.verb, {**metrics, **sizes, "tokens": tokens, "stored_bits": weights.stored_bits}, out)
    return DONE


def partial_folder(out: Path) -> Path:
    """Where the blocks of ``out`` lie while it is made."""
    return out.with_name(f"{out.name}-partial")


def compress(job: Job, blocks: SavedBlocks) -> dict[str, Compressed]:
    """What became of every layer; each block is saved as soon as it is done."""
    results: dict[str, Compressed] = {}
    with progress(sum(job.sizes.values()), job.source.num_bytes) as seen, torch.no_grad():
        for done in compressed_blocks(job.walk, job.compressor, job.layers, done=blocks.find):
            if done.reports:
                masks = job.opened.masks
                done.results.update({n: masked(n, r, masks.get(n), job.compressor) for n, r in done.results.items()})
                blocks.save(done)
            results |= done.results
            if seen is not None:
                seen(job.verb, sum(job.sizes[name] for name in done.results))
    return results


def scores(job: Job, name: str) -> dict[str, float]:
    """The perplexity of the model as it is now, where that was asked for."""
    if job.evaluation is None:
        return {}
    return {name: perplexity(job.opened.scored, at_once(job.evaluation))}


def manifest_of(job: Job, reports: Sequence[LayerReport], metrics: dict[str, float], stored_bits: float) -> Manifest:
    """What made the result, and of what."""
    settings = {job.verb: described(job.compressor), "layers": job.layers}
    settings |= {"towers": [tower.name for tower in job.walk.towers], "calibration": job.data}
    facts = {
        "papers": papers_of(job.compressor),
        LAYERS: [report.data() for report in reports],
        "totals": {**totals(reports), "stored_bits": stored_bits},
    }
    if job.evaluation is not None:
        facts["evaluation"] = {"windows": list(job.evaluation.shape), "data": digest_of_tensor(job.evaluation)}
    parent = {"path": str(job.source.path), "digest": job.source.digest}
    return new_manifest(parents=[parent], settings=settings, metrics=metrics, facts=facts)
