"""Compression as a step: the blocks of a checkpoint made smaller one by one, in a second module of its own.

The artefact is self-contained: all of the module, a frozen backbone included, with pruned weights beside their masks
and quantized ones packed. It loads wherever a checkpoint of the run does. The second module is whole in every process,
whatever the strategy; the processes share the samples that inputs are measured on, and the matrices that are solved.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from fulgurite.callbacks.checkpoint_io import MANIFEST_KEY
from fulgurite.callbacks.compress_data import CalibrationSamples, Inputs, calibration_batches, loss_of, walk_over
from fulgurite.callbacks.compressed_state import masked, tensor_names, whole_state
from fulgurite.callbacks.merge_step import documents_of
from fulgurite.callbacks.publish import PublishedCheckpoint
from fulgurite.callbacks.saved_blocks import SavedBlocks
from fulgurite.callbacks.steps import MADE_FROM, Context, Step, described
from fulgurite.checkpoints import CheckpointError, digest_of_json, read_manifest
from fulgurite.checkpoints.card import CARD_NAME, STEPS, card
from fulgurite.checkpoints.shards import SHARDS
from fulgurite.checkpoints.store import encode, new_manifest, write_checkpoint
from fulgurite.datamodules.base import FulguriteDataModule
from fulgurite.methods.calibration import Loss
from fulgurite.methods.compression import (
    CompressedBlock,
    Compressor,
    LayerReport,
    TokenWeights,
    compressed_blocks,
    matrices,
    totals,
)
from fulgurite.methods.layer_walk import LayerWalk
from fulgurite.methods.packed_attention import exposed_attention
from fulgurite.methods.papers import papers_of
from fulgurite.methods.quantization.quantized_weight import Compressed
from fulgurite.methods.quantization.storage import COMPRESSED
from fulgurite.methods.structure import ModelSpec
from fulgurite.modules.compression import Compressible

LAYERS = "layers"
# What a source's facts and settings say of how the source was made.
OF_SOURCE = ("change", "statistics", "opcm", "papers", "data", "importance", "errors", COMPRESSED, LAYERS, "totals")
OF_STEPS = ("merger", "weights", *STEPS)


class CompressAtCheckpoint(Step):
    """Gives the linear layers of a module's blocks new weights; a subclass says by what.

    Memory, in every process: the second module, its compressed matrices once more on the CPU, the hidden states of the
    calibration batches, and what one block and the compressor take.

    Attributes:
        verb: under which the card and ``settings`` name it.

    Args:
        compressor: what becomes of each matrix; it is copied before it is used.
        layers: full pattern of the names of the layers within backbone or image encoder, as
            ``text\\.encoder\\..*\\.dense``; all linear layers of the blocks where null.
        towers: names of the towers whose blocks are compressed; all where null.
        calibration: training samples that inputs are measured on, with the live adapters: merge first what is to
            answer for several stages. Of a compressor that needs no inputs, null.
        name: of artefact and figures; that of the compressor's class by default.
        scored: whether the model is scored as a whole before (`score`).
    """

    verb: str

    def __init__(
        self,
        compressor: Compressor,
        layers: str | None,
        towers: list[str] | None,
        calibration: CalibrationSamples | None,
        name: str | None,
        scored: bool = False,
    ) -> None:
        super().__init__(type(compressor).__name__.lower() if name is None else name)
        if (compressor.needs == "nothing" and not scored) != (calibration is None):
            raise ValueError(
                f"{type(compressor).__name__} needs no inputs of layers: leave out calibration"
                if calibration is not None
                else f"{self.name} is measured on data: set calibration, e.g. to {{samples: 128}}"
            )
        self.layers, self.towers, self.calibration = layers, towers, calibration

    @property
    @abstractmethod
    def compressor(self) -> Compressor:
        """What becomes of each matrix."""

    @property
    def methods(self) -> list[object]:
        """All whose papers the result owes something to."""
        return [self.compressor]

    @abstractmethod
    def prepare(self, compressor: Compressor, tensors: Mapping[str, str], source: Path) -> dict[str, Tensor]:
        """Look at what is compressed in the source already.

        Args:
            compressor: a copy that may be changed.
            tensors: names in the checkpoint of the weights that will be compressed, by name of the layer.
            source: the checkpoint.

        Returns:
            masks, by name of the layer, of weights that must stay 0.

        Raises:
            ValueError: this cannot be compressed further.
        """

    def score(self, compressor: Compressor, walk: LayerWalk, loss: Loss, saved: SavedBlocks) -> dict[str, Any]:
        """Score the whole model before it is compressed, and tell the compressor. All ranks call it.

        Args:
            compressor: a copy that may be changed.
            walk: with the batches.
            loss: of a batch.
            saved: keeps what costs time.

        Returns:
            facts for the manifest.
        """
        return {}

    @property
    def token_weights(self) -> TokenWeights | None:
        """How much the tokens of a block count; all alike where None."""
        return None

    def check(self, at: str, publisher: PublishedCheckpoint, module: LightningModule) -> None:
        """Refuse a module without blocks, and more samples than there are.

        Raises:
            ValueError: with the option to change.
        """
        known = [tower.name for tower in require_compressible(module, self.name).towers]
        if unknown := sorted(set(self.towers or []) - set(known)):
            raise ValueError(f"{self.name}: towers={unknown}: {type(module).__name__} has {known}")
        if self.calibration is None:
            return
        data = module.trainer.datamodule
        if not isinstance(data, FulguriteDataModule):
            raise ValueError(f"{type(data).__name__} gives no samples to measure on: use a DataModule of this project")
        available, ranks = len(data.samples("train")), module.trainer.world_size
        if not ranks <= self.calibration.samples <= available:
            raise ValueError(
                f"{self.name}: calibration.samples={self.calibration.samples}: there are {available} training samples "
                f"and {ranks} processes, each of which needs one; set it to {ranks} to {available}"
            )

    def make(self, inputs: Sequence[Path], context: Context, facts: Mapping[str, Any]) -> None:
        """Compress, publish. Raises ValueError where there is more than one source."""
        if len(inputs) != 1:
            raise ValueError(f"{self.name} compresses one checkpoint, and there are {len(inputs)}")
        (source,), ranks, before = inputs, context.ranks, version_of(context.out)
        # A checkpoint may be published within a validation, whose tensors know no gradients.
        with torch.inference_mode(False), torch.no_grad():
            module = ranks.agree(lambda: built(source, context))
            with exposed_attention(module.get_submodule(module.compressible_part), module.blocks_spec().inside_blocks):
                self._compress(source, module, context, facts, before)

    def _compress(
        self, source: Path, module: Compressible, context: Context, facts: Mapping[str, Any], before: int | None
    ) -> None:
        ranks = context.ranks
        batches, data = self._batches(module, context)
        walk = walk_over(module, batches, context, self.towers)
        compressor = copy.copy(self.compressor)
        weights = ranks.agree(lambda: matrices(walk, self.layers))
        masks = ranks.agree(lambda: self.prepare(compressor, tensor_names(module, weights), source))
        about = digest_of_json(self._about(facts, data, context))
        with SavedBlocks(blocks_folder(context.out), about, ranks) as blocks:
            figures = self.score(compressor, walk, loss_of(module, context), blocks)
            ranks.agree(lambda: compressor.begin(weights))
            results = self.solve(walk, compressor, masks, blocks)
            facts = {**facts, **figures, "papers": papers_of(*self.methods), **({"data": data} if data else {})}

            def publish() -> None:
                if ranks.rank == 0:
                    require_version(context.out, before)
                    self._publish(source, module, results, blocks.reports, context.out, facts)

            ranks.agree(publish)
            blocks.remove()

    def solve(
        self,
        walk: LayerWalk,
        compressor: Compressor,
        masks: Mapping[str, Tensor],
        blocks: SavedBlocks,
        seen: Callable[[CompressedBlock], None] = lambda done: None,
    ) -> dict[str, Compressed]:
        """What becomes of every layer, in the model too; each block is saved once it is made. All ranks call it.

        Args:
            walk: over the model.
            compressor: settled.
            masks: by name of the layer, of weights that must stay 0.
            blocks: those of an earlier run are taken.
            seen: is told of each block.
        """
        results: dict[str, Compressed] = {}
        for done in compressed_blocks(walk, compressor, self.layers, self.token_weights, blocks.find):
            if done.reports:  # else it was saved
                kept = {name: masked(name, each, masks.get(name), compressor) for name, each in done.results.items()}
                done.results.update(kept)
                blocks.save(done)
            results |= done.results
            seen(done)
        return results

    def _batches(self, module: Compressible, context: Context) -> tuple[list[Inputs], dict[str, Any]]:
        """This process's batches, and what the samples are; none where none are needed."""
        if self.calibration is None:
            return [], {}
        return calibration_batches(module, self.calibration, context)

    def _about(self, facts: Mapping[str, Any], data: Mapping[str, Any], context: Context) -> dict[str, Any]:
        """All that the result depends on to the bit."""
        where = {"ranks": context.ranks.size, "device": torch.device(context.device).type}
        return {MADE_FROM: facts[MADE_FROM], "data": data, **where}

    def _publish(
        self,
        source: Path,
        module: Compressible,
        results: Mapping[str, Compressed],
        reports: Mapping[str, LayerReport],
        out: Path,
        facts: Mapping[str, Any],
    ) -> None:
        manifest = read_manifest(source)
        changed = module.weights_changed()
        tensors, compressed = whole_state(module, results, source, manifest)
        before = [each for each in manifest.facts.get(LAYERS, []) if each["name"] not in reports]
        before = [LayerReport.from_data(each) for each in before]
        layers = [*before, *reports.values()]
        documents = documents_of(source)
        state = documents["state"]
        state["state_dict"] = {**state["state_dict"], "order": None}
        state[MANIFEST_KEY] = {**state[MANIFEST_KEY], "kind": "self-contained", "base": None, **changed}
        own = new_manifest(
            structure={name: value for name, value in manifest.structure.items() if name != SHARDS},
            parents=[{"path": str(source), "digest": manifest.digest}],
            settings={
                **{name: value for name, value in manifest.settings.items() if name not in OF_STEPS},
                self.verb: described(self.compressor),
            },
            facts={
                **{name: value for name, value in manifest.facts.items() if name not in OF_SOURCE},
                **facts,
                **changed,
                COMPRESSED: compressed,
                LAYERS: [report.data() for report in layers],
                "totals": totals(layers),
            },
        )
        write_checkpoint(
            out,
            own,
            *encode({"weights": tensors}, documents),
            describe=lambda _, complete: {CARD_NAME: card(complete, out.name).encode()},
        )
        figures = ", ".join(f"{name} {value:.3g}" for name, value in totals(list(reports.values())).items())
        rank_zero_info(f"{out.name}: {len(reports)} layers, {figures}")


def blocks_folder(artefact: Path) -> Path:
    """Where the blocks of ``artefact`` lie while it is made."""
    return artefact.with_name(f"{artefact.name}-blocks")


def version_of(out: Path) -> int | None:
    """What tells a folder from one that has taken its place; None where there is none."""
    return out.stat().st_ino if out.exists() else None


def require_version(out: Path, before: int | None) -> None:
    """Raise CheckpointError where another process has published ``out`` since `version_of` gave ``before``."""
    if version_of(out) != before:
        raise CheckpointError(
            f"{out} was written by another process in the meantime and is left as it is: move it away and call again, "
            f"which goes on from {blocks_folder(out)}"
        )


def require_compressible(module: Any, name: str) -> ModelSpec:
    """Where the blocks of a module are. Raises ValueError where there is nothing to compress."""
    if not isinstance(module, Compressible):
        raise ValueError(
            f"{name}: {type(module).__name__} has no blocks that can be compressed: take VideoQA, "
            "ImageClassifier, or another library's model by `fulgurite prune` and `fulgurite quantize`"
        )
    try:
        return module.blocks_spec()
    except ValueError as error:
        raise ValueError(f"{name}: {type(module).__name__} has no blocks that can be compressed: {error}") from error


def built(source: Path, context: Context) -> Compressible:
    """The second module of a checkpoint, where it shall lie. Memory: a whole model per process."""
    module = context.build(source).to(context.device)
    require_compressible(module, str(source))
    return module.eval()
