"""What became of the blocks of a model so far, beside the artefact that they will be in, until that is there.

An interrupted compression goes on at the first block that is not saved, and gives what an uninterrupted one gives, bit
for bit. Memory: none; the disk holds the compressed matrices once more while the step runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from fulgurite.callbacks.merge_statistics import FINGERPRINT, facts_of
from fulgurite.checkpoints import load_tensors, read_manifest, remove, save_checkpoint_folder, verify
from fulgurite.checkpoints.lock import writing
from fulgurite.methods.compression import CompressedBlock, LayerReport
from fulgurite.methods.quantization.quantized_weight import Compressed
from fulgurite.methods.quantization.storage import COMPRESSED, restored, stored
from fulgurite.methods.ranks import Ranks

REPORTS = "layers"


@dataclass
class SavedBlocks:
    """The blocks of one step, whose folder is this process's alone within ``with``, however that ends.

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
    _lock: ExitStack = field(default_factory=ExitStack, init=False, repr=False)

    def __enter__(self) -> SavedBlocks:
        """Keep other processes out. All ranks call it. Raises LockedError where one is at work."""
        self.ranks.agree(lambda: self._lock.enter_context(writing(self.folder)) if self.ranks.rank == 0 else None)
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.close()
        if self.ranks.rank == 0:
            with suppress(OSError):  # where something is saved, or all was removed
                self.folder.rmdir()

    def find(self, block: str) -> dict[str, Compressed] | None:
        """Results by name of the layer, where the block is saved and intact. All ranks call it."""
        path = self.folder / block
        return self.ranks.agree(lambda: self._read(path)) if self._is_there(path) else None

    def _is_there(self, path: Path) -> bool:
        def look() -> bool:
            return self.ranks.rank == 0 and facts_of(path, self.fingerprint) is not None and verify(path).ok

        return self.ranks.together(look)[0]

    def _read(self, path: Path) -> dict[str, Compressed]:
        facts, tensors = read_manifest(path).facts, load_tensors(path)
        reports = {each["name"]: LayerReport.from_data(each) for each in facts[REPORTS]}
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

    def once(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What ``make`` gives, from the disk where an earlier run has left it. All ranks call it, and ``make``.

        Args:
            name: of what it is, unlike that of a block.
        """
        path = self.folder / name
        if self._is_there(path):
            return self.ranks.agree(lambda: load_tensors(path))
        made = dict(make())

        def write() -> None:
            save_checkpoint_folder(path, {"weights": made}, facts={FINGERPRINT: self.fingerprint})

        self.ranks.agree(lambda: write() if self.ranks.rank == 0 else None)
        return made

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
