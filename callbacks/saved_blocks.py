"""What became of the blocks of a model so far, beside the artefact that they will be in, until that is there.

An interrupted compression goes on at the first block that is not saved, and gives what an uninterrupted one gives, bit
for bit. Memory: none; the disk holds the compressed matrices once more while the step runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fulgurite.callbacks.merge_statistics import FINGERPRINT, facts_of
from fulgurite.checkpoints import load_tensors, read_manifest, remove, save_checkpoint_folder, verify
from fulgurite.methods.compression import CompressedBlock, LayerReport
from fulgurite.methods.quantization.quantized_weight import Compressed
from fulgurite.methods.quantization.storage import COMPRESSED, restored, stored
from fulgurite.methods.ranks import Ranks

REPORTS = "layers"


@dataclass
class SavedBlocks:
    """The blocks of one step.

    Args:
        folder: holds one folder per block.
        fingerprint: of model, data and settings; what was saved under another one is made again.
        ranks: that all make the step; rank 0 writes, all read.
        reports: of the layers of the blocks so far.
    """

    folder: Path
    fingerprint: str
    ranks: Ranks
    reports: dict[str, LayerReport] = field(default_factory=dict)

    def find(self, block: str) -> dict[str, Compressed] | None:
        """Results by name of the layer, where the block is saved and intact. All ranks call it."""
        path = self.folder / block
        ranks = self.ranks

        def is_there() -> bool:
            return ranks.rank == 0 and facts_of(path, self.fingerprint) is not None and verify(path).ok

        return ranks.agree(lambda: self._read(path)) if ranks.together(is_there)[0] else None

    def _read(self, path: Path) -> dict[str, Compressed]:
        facts, tensors = read_manifest(path).facts, load_tensors(path)
        reports = {each["name"]: LayerReport(**{**each, "shape": tuple(each["shape"])}) for each in facts[REPORTS]}
        self.reports |= reports
        return {name: restored(name, tensors, facts[COMPRESSED].get(name, {})) for name in reports}

    def save(self, done: CompressedBlock) -> None:
        """Keep a block that has just been made. All ranks call it."""
        self.reports |= done.reports
        self.ranks.agree(lambda: self._write(done) if self.ranks.rank == 0 else None)

    def _write(self, done: CompressedBlock) -> None:
        tensors, compressed = of_results(done.results)
        facts = {
            FINGERPRINT: self.fingerprint,
            COMPRESSED: compressed,
            REPORTS: [report.data() for report in done.reports.values()],
        }
        save_checkpoint_folder(self.folder / done.block.name, {"weights": tensors}, facts=facts)

    def remove(self) -> None:
        """Forget all blocks. All ranks call it."""
        self.ranks.agree(lambda: remove(self.folder) if self.ranks.rank == 0 else None)


def of_results(results: Mapping[str, Compressed]) -> tuple[dict, dict]:
    """Tensors of all results, and the facts of those that were compressed, by name of the layer."""
    tensors, compressed = {}, {}
    for name, result in results.items():
        own, facts = stored(name, result)
        tensors |= own
        if facts:
            compressed[name] = facts
    return tensors, compressed
