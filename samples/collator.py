"""From samples to one batch: a small picklable object, owned by the module, used by every worker."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from fulgurite.samples.errors import DataError
from fulgurite.samples.sample import Sample

Batch = dict[str, Any]


class Collator(Protocol):
    """Turns samples into a batch. Holds tokenizers and transforms, never a module or a trainer.

    ``needs`` names the `Sample` fields that it reads (see `Sample.has` for the notation).
    """

    needs: ClassVar[tuple[str, ...]] | tuple[str, ...]

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """One batch; always has the keys of `sample_fields`."""
        ...


def sample_fields(samples: Sequence[Sample]) -> Batch:
    """The model-free part of every batch: ``id``, ``domain``, ``task``, ``kind``, ``answers``, ``human_answers`` and
    ``captions`` as lists of length B, ``counted`` and ``speech`` (whether it comes with any) as (B,) bool."""
    return {
        "id": [s.id for s in samples],
        "domain": [s.domain for s in samples],
        "task": [s.task for s in samples],
        "kind": [s.kind for s in samples],
        "answers": [dict(s.answers) for s in samples],
        "human_answers": [s.human_answers for s in samples],
        "captions": [s.captions for s in samples],
        "speech": torch.tensor([bool(s.speech) for s in samples], dtype=torch.bool),
        "counted": torch.tensor([s.counted for s in samples], dtype=torch.bool),
    }


def check_fields(samples: Sequence[Sample], collator: Collator, source: str, module: str) -> None:
    """Raise `DataError` for the first sample that lacks a field that ``collator`` needs."""
    for sample in samples:
        for need in collator.needs:
            if not sample.has(need):
                raise DataError(
                    f"{module} needs the field {need!r} of every sample, but sample {sample.id!r} from {source} "
                    f"does not fill it. Choose a DataModule that provides {need!r}, or another module."
                )


class _WorkerPickler(pickle.Pickler):
    def reducer_override(self, obj: object) -> Any:
        if isinstance(obj, nn.Module) or type(obj).__module__.startswith("lightning."):
            raise TypeError(f"a collator must not hold a {type(obj).__name__}: it would travel to every worker")
        return NotImplemented


def check_picklable(collator: Collator) -> None:
    """Raise `TypeError` if ``collator`` does not pickle or carries a module or trainer to the workers."""
    _WorkerPickler(io.BytesIO()).dump(collator)
