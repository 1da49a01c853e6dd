"""A merge as it is written: by several threads and processes, published all or nothing, and looked at afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fulgurite.checkpoints import CheckpointError, DamagedError, Manifest, RefusedError
from fulgurite.checkpoints.card import CARD_NAME, card, library_of
from fulgurite.checkpoints.digest import Digest, FileRecord, tensor_bytes
from fulgurite.checkpoints.inplace import fill, records_of, reserve
from fulgurite.checkpoints.store import write_checkpoint
from fulgurite.checkpoints.tensorfile import TensorRecord
from fulgurite.methods.merging.base import survey
from fulgurite.methods.merging.job import Job, Merged
from fulgurite.methods.papers import papers_of
from fulgurite.methods.ranks import ALONE, Ranks

Seen = Callable[[str, int], None]
Describe = Callable[[Path, Manifest], Mapping[str, bytes]]
FAILURES = (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError)


def carry_out(job: Job, ranks: Ranks = ALONE, seen: Seen | None = None, describe: Describe | None = None) -> Merged:
    """Merge and publish; other arguments and errors are those of `merge_files`.

    Args:
        describe: makes documents for the artefact of the folder with its weights and of the manifest so far; on rank 0.
    """
    writing = _Writing(job, ranks, seen, describe)
    with one_kernel_thread(job.threads > 1 or job.merger.piecewise):
        survey(job.merger, job.plan, job.threads, ranks, job.piece_size, seen)
        if ranks.rank == 0:
            _publish(writing)
        else:
            _follow(writing)
    return writing.done


@contextmanager
def one_kernel_thread(wanted: bool) -> Iterator[None]:
    """Kernels on one thread each inside, where ``wanted``: tensors are shared out, and pieces too small to be."""
    before = torch.get_num_threads()
    try:
        if wanted:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


class _Writing:
    """Merged tensors as pieces, with a look at what changed and a digest of what is handed on."""

    def __init__(self, job: Job, ranks: Ranks, seen: Seen | None, describe: Describe | None) -> None:
        self.job, self.ranks, self.seen, self.describe = job, ranks, seen, describe
        self.plan, self.like, self.files, self.done = job.plan, job.like, job.layout.weights, Merged(job.out)
        self.change: dict[str, float] = {}
        self.digests: dict[str, str] = {}
        self.equal = [True] * len(job.plan.labels)

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """One tensor of the result."""
        digest = Digest()
        for start, piece in self._pieces(name):
            digest.update(tensor_bytes(piece))
            yield start, piece
        self.digests[name] = str(digest)

    def _pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        source = self.plan.tied.get(name, name)
        if source not in self.plan.merged:
            yield 0, self.plan.copied[source].reshape(-1)
            return
        operands = self.plan.operands(source, self.job.piece_size)
        given = [tensor.detach().reshape(-1) for tensor in operands.tensors]
        models = self.plan.models(source)
        for model in set(range(len(self.equal))) - set(models):
            self.equal[model] = False
        start, moved, norm = 0, 0.0, 0.0
        for merged in self.job.merger.merge_one(operands, self.job.weights):
            merged = merged.reshape(-1)
            part = slice(start, start + merged.numel())
            first = given[0][part].to(merged.dtype)
            moved += square_sum(merged - first)
            norm += square_sum(first)
            for model, tensor in zip(models, given):
                if self.equal[model] and not torch.equal(merged, tensor[part].to(merged.dtype)):
                    self.equal[model] = False
            yield start, stored(merged, self.like[name].dtype, name)
            start = part.stop
            if self.seen is not None:
                self.seen("merge", merged.numel())
        self.change[name] = math.sqrt(moved / norm) if norm else math.sqrt(moved)

    def share(self, folder: Path) -> None:
        """Merge and write the tensors that are this rank's, and learn from all ranks what has changed."""

        def work() -> Any:
            own = set(self.ranks.share({name: tensor.numel() for name, tensor in self.like.items()}))
            for file, names in self.files.items():
                like = {name: self.like[name] for name in names}
                fill(folder / file, like, self.pieces, [name for name in names if name in own], self.job.threads)
            return self.change, self.equal, self.digests

        parts = self.ranks.together(work)
        found = {name: value for own, _, _ in parts for name, value in own.items()}
        self.done.change.update((name, found[name]) for name in self.plan.order if name in found)
        self.digests = {name: value for _, _, own in parts for name, value in own.items()}
        if self.plan.merged:
            equal = [all(flags) for flags in zip(*(flags for _, flags, _ in parts))]
            self.done.equal_to += [label for label, same in zip(self.plan.labels, equal) if same]

    def documents(self, folder: Path, manifest: Manifest) -> dict[str, bytes]:
        """The model card, and what else was asked for."""
        more = {} if self.describe is None else self.describe(folder, manifest)
        return {**card_of(manifest, self.job.out), **more}

    def records(self, folder: Path) -> dict[str, tuple[FileRecord, dict[str, TensorRecord]]]:
        """The records of the weight files, mapped anew.

        Raises:
            DamagedError: a tensor in the file is not the one that was written.
        """
        out = {}
        for file, names in self.files.items():
            out[file] = records_of(folder / file, {name: self.like[name] for name in names})
            for name, record in out[file][1].items():
                if record.digest != self.digests[name]:
                    raise DamagedError(
                        f"{folder / file}: {name} reads {record.digest} and was written as {self.digests[name]}"
                    )
        return out


def card_of(manifest: Manifest, out: Path) -> dict[str, bytes]:
    """The model card as a document."""
    return {CARD_NAME: card(manifest, out.name).encode()}


def stored(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """``values`` in the type that is written. Raises ValueError where one is too large for it."""
    out = values.to(dtype)
    if dtype != values.dtype and not math.isfinite(out.sum()) and (out.isinf() & values.isfinite()).any():
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{name}: a merged value of {float(values.abs().max()):.4g} is too large for {kind}: set dtype"
        )
    return out


def square_sum(values: Tensor) -> float:
    """Sum of squares of flat entries."""
    return float(torch.dot(values, values))


def _publish(writing: _Writing) -> None:
    """Rank 0's part: make the files, write its share, and publish what all ranks have written."""
    job, waiting, error = writing.job, True, None

    def others(folder: Path) -> dict[str, Any]:
        nonlocal waiting
        for file, names in writing.files.items():
            reserve(folder / file, {name: writing.like[name] for name in names})
        waiting = False
        writing.ranks.gather(str(folder))
        writing.share(folder)
        equal_to = writing.done.equal_to
        if equal_to and sum(weight != 0 for weight in job.weights) > 1:
            raise RefusedError(
                f"the merge equals {' and '.join(equal_to)} in every tensor: the sources are the same, or the "
                "settings do nothing"
            )
        job.manifest.facts |= {"change": writing.done.change, "papers": papers_of(job.merger)}
        if library := library_of(job.layout.texts):
            job.manifest.facts["library"] = library
        return writing.records(folder)

    try:
        write_checkpoint(job.out, job.manifest, {}, job.layout.texts, others=others, describe=writing.documents)
    except FAILURES as caught:
        error = caught
    if waiting:
        writing.ranks.gather(None)
    writing.ranks.gather(None if error is None else str(error))
    if error is not None:
        raise error


def _follow(writing: _Writing) -> None:
    """The other ranks' part: write a share into the files that rank 0 has made."""
    path, own = writing.ranks.gather(None)[0], None
    if path is not None:
        try:
            writing.share(Path(path))
        except FAILURES as caught:
            own = caught
    text = writing.ranks.gather(None)[0]
    if own is not None:
        raise own
    if text is not None:
        raise CheckpointError(text)
