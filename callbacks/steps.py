"""Steps from checkpoints to a checkpoint: merge, and what else makes a new model of trained ones.

A step reads folders and publishes one, all or nothing. It is the same object as part of a `Boundary` inside a fit, as
a sub-command on files, and in a library call::

    MergeAtCheckpoint(Ties(density=0.2), name="ties")([Path("runs/.../checkpoints/last")], Context(Path("merged")))

Made twice of the same sources with the same settings, the second time does nothing.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from fulgurite.callbacks.publish import PublishedCheckpoint
from fulgurite.checkpoints import MANIFEST_NAME, CheckpointError, digest_of_json, read_manifest, verify
from fulgurite.checkpoints.atomic import resolve
from fulgurite.checkpoints.sources import open_source
from fulgurite.datamodules.base import FulguriteDataModule
from fulgurite.methods.ranks import ALONE, Ranks
from fulgurite.samples.dataset import drawn_samples
from fulgurite.samples.loader import ResumableLoader

MADE_FROM = "made_from"
NOT_SETTINGS = ("scanned", "stage")  # where the last merge of a merger has stood


class NotReady(Exception):
    """There is nothing to do yet at this boundary; the text says what is missing."""


@dataclass(frozen=True)
class Context:
    """What a step may use beside its sources. With ``out`` alone it works on files, in one process.

    Args:
        out: the folder to publish.
        ranks: the processes that all make the step together.
        checkpoint: the published checkpoint at whose boundary the step is made; the first source where None.
        builder: makes the module of a checkpoint, as `fulgurite.load` does.
        data: for calibration.
        evaluator: scores the weights of a checkpoint on a split.
        device: where second modules are measured.
    """

    out: Path
    ranks: Ranks = ALONE
    checkpoint: Path | None = None
    builder: Callable[[Path], nn.Module] | None = None
    data: FulguriteDataModule | None = None
    evaluator: Callable[[Path, str], dict[str, float]] | None = None
    device: torch.device | str = "cpu"

    def build(self, path: Path) -> nn.Module:
        """A second module with the weights of ``path``, in evaluation mode. Memory: a whole model per process.

        Raises:
            LookupError: this context has no builder.
        """
        return self._given(self.builder, "builder")(path)

    def calibration(self, num_samples: int, seed: int, domains: Collection[str] | None = None) -> ResumableLoader:
        """Batches of ``num_samples`` training samples, the same for the same seed whatever the number of ranks.

        Each rank has its share, in equally many batches; what is in a batch twice is not ``counted``. Samples are
        prepared as for validation, and are of ``domains`` alone where given. Raises ValueError where there are fewer,
        LookupError where there are no data.
        """
        data = self._given(self.data, "data")
        samples = [sample for sample in data.samples("train") if domains is None or sample.domain in domains]
        if not 0 < num_samples <= len(samples):
            of = "" if domains is None else f" of {', '.join(domains)}"
            raise ValueError(f"calibration with {num_samples} of {len(samples)} training samples{of}: choose fewer")
        return data.loader("val", drawn_samples(samples, num_samples, seed), "calibration")

    def evaluate(self, path: Path, split: str = "val") -> dict[str, float]:
        """Scores by name of the weights in ``path``; a collective. LookupError where nothing can evaluate."""
        return self._given(self.evaluator, "evaluator")(path, split)

    def _given(self, value: Any, name: str) -> Any:
        if value is None:
            raise LookupError(f"this step needs a {name}: run it in a fit, or give Context({name}=...)")
        return value


class Step(ABC):
    """One step. A subclass says what it reads (`inputs`) and publishes a checkpoint there (`make`).

    Attributes:
        kind: what its artefacts are called: ``merged``, ``pruned``, ``quantized``.
        scored: whether what it makes can be evaluated with the module that made it.
        comes_first: whether it reads checkpoints of the run, and so cannot go on from another step.

    Args:
        name: of the artefact and its figures, unlike that of any other step of the run.
    """

    kind: ClassVar[str]
    scored: ClassVar[bool] = True
    comes_first: ClassVar[bool] = False

    def __init__(self, name: str) -> None:
        if not re.fullmatch(r"[\w=+,.-]+", name) or not name.strip("."):
            raise ValueError(f"name={name!r} is no plain name; use letters, digits and any of _=+,.-")
        self.name = name

    def inputs(self, sources: Sequence[Path], context: Context) -> list[Path]:
        """What `make` will read, in order; by default the sources themselves.

        Raises:
            NotReady: not all of it is there yet.
        """
        return list(sources)

    @abstractmethod
    def make(self, inputs: Sequence[Path], context: Context, facts: Mapping[str, Any]) -> None:
        """Publish the artefact ``context.out`` with ``facts`` among its manifest's. All ranks call it."""

    def check(self, at: str, publisher: PublishedCheckpoint, module: LightningModule) -> None:
        """Refuse, before a fit begins, what can be known to fail. Raises ValueError.

        Args:
            at: when the step is made; see `Boundary`.
            publisher: what writes and deletes the run's checkpoints.
            module: what trains; not yet built for its data.
        """
        return

    @property
    def settings(self) -> dict[str, Any]:
        """Class and options as plain values."""
        return described(self)

    def __call__(self, sources: Sequence[Path], context: Context) -> Path:
        """The artefact of ``sources``: made, or there already, intact and of the same sources and settings.

        All ranks must call it; an error on one of them is raised on all.

        Raises:
            NotReady: see `inputs`.
            CheckpointError: a source is damaged, or the operating system refused; nothing is left behind.
        """

        def look() -> tuple[list[Path], str, bool] | str:
            try:
                inputs = self.inputs(sources, context)
            except NotReady as missing:
                return str(missing)
            made_from = digest_of_json({"step": self.settings, "of": [identity(path) for path in inputs]})
            return inputs, made_from, context.ranks.rank == 0 and is_intact(context.out, made_from)

        found = context.ranks.together(look)[0]
        if isinstance(found, str):
            raise NotReady(found)
        inputs, made_from, known = found
        if known:
            rank_zero_info(f"{context.out}: is there already, of the same sources and settings")
        else:
            self.make(inputs, context, {"step": self.settings, MADE_FROM: made_from})
        return context.out


def identity(path: Path) -> Any:
    """What the weights at ``path`` are, wherever they lie: the digests of their files. Reads no weights of ours."""
    if not (resolve(path) / MANIFEST_NAME).is_file():
        return open_source(path).digest
    manifest = read_manifest(path)
    return {name: manifest.files[name].digest for name in manifest.tensors if name != "state.safetensors"}


def is_intact(path: Path, made_from: str) -> bool:
    """Whether a checkpoint of these sources and settings is at ``path``, every byte as it was written."""
    if not (resolve(path) / MANIFEST_NAME).is_file():
        return False
    try:
        return read_manifest(path).facts.get(MADE_FROM) == made_from and verify(path).ok
    except CheckpointError as error:
        rank_zero_info(f"{error} It is made again.")
        return False


def described(value: Any) -> Any:
    """``value`` as plain JSON: objects by class and public attributes, patterns by their text."""
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, Mapping):
        return {str(key): described(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [described(item) for item in value]
    if isinstance(value, re.Pattern):
        return value.pattern
    if isinstance(value, Path):
        return str(value)
    options = asdict(value) if is_dataclass(value) else {n: v for n, v in vars(value).items() if n[0] != "_"}
    kept = {name: described(item) for name, item in options.items() if name not in NOT_SETTINGS}
    return {"class_path": f"{type(value).__module__}.{type(value).__qualname__}", "init_args": kept}
