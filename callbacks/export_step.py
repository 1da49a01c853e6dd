"""Exporting as a step: a folder of another library, of a checkpoint or of what another step has made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from fulgurite.callbacks.steps import Context, Step
from fulgurite.modules.export import AdapterChoice, Target
from fulgurite.modules.export_files import MAX_SHARD_SIZE, export


class ExportAtCheckpoint(Step):
    """Writes the source as a model that another library loads, as ``fulgurite export`` does, on rank 0.

    It is loaded and compared in a fresh process before it is published. Put it last in a chain: the libraries' folders
    are not scored within the fit.

    Args:
        to: the library.
        set: name of an adapter set, or weights of several; may be left out where there is one, or all are merged.
        part: of the backbone, where several fit.
        adapters: folded into the weights, or left beside them.
        dtype: of the weights; as they are where null.
        max_shard_size: of one file of weights, for ``hf``.
        like: folder with configuration and tokenizer, for sources that are plain weights.
        architecture: the library's name of the model, where no such folder says it.
        name: of the artefact; the library's by default.
    """

    kind = "exported"
    scored = False

    def __init__(
        self,
        to: Target,
        set: str | dict[str, float] | None = None,
        part: str | None = None,
        adapters: AdapterChoice = "fold",
        dtype: Literal["float16", "bfloat16", "float32"] | None = None,
        max_shard_size: str = MAX_SHARD_SIZE,
        like: Path | None = None,
        architecture: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(to if name is None else name)
        self.to, self.set, self.part, self.adapters, self.dtype = to, set, part, adapters, dtype
        self.max_shard_size, self.like, self.architecture = max_shard_size, like, architecture

    def make(self, inputs: Sequence[Path], context: Context, facts: Mapping[str, Any]) -> None:
        """Raises ValueError where there is more than one source."""
        if len(inputs) != 1:
            raise ValueError(f"{self.name} exports one checkpoint, and there are {len(inputs)}")
        context.ranks.agree(lambda: self._export(inputs[0], context, facts) if context.ranks.rank == 0 else None)

    def _export(self, source: Path, context: Context, facts: Mapping[str, Any]) -> None:
        export(
            source,
            context.out,
            self.to,
            context.build,
            self.set,
            self.part,
            self.adapters,
            None if self.dtype is None else getattr(torch, self.dtype),
            self.like,
            self.architecture,
            max_shard_size=self.max_shard_size,
            facts=facts,
            replace=True,
        )
