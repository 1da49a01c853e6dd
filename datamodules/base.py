"""What all DataModules share: splits of samples, checks at `setup`, loaders that resume and share out."""

from __future__ import annotations

import json
import os
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from fulgurite.checkpoints.atomic import write_text
from fulgurite.datamodules.cache import fill_features
from fulgurite.datamodules.files import Folder
from fulgurite.datamodules.processes import check_trainer, epochs_of, rank_and_world
from fulgurite.samples import (
    Collator,
    DataError,
    DataInfo,
    Sample,
    Stage,
    check_fields,
    check_picklable,
)
from fulgurite.samples.dataset import SampleDataset
from fulgurite.samples.features import FeatureExtractor, Media, media_of
from fulgurite.samples.loader import ResumableLoader
from fulgurite.samples.sampler import GlobalBatchSampler

Split = Literal["train", "val", "test", "predict"]
SPLITS_OF_STAGE: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
}
STAGE_OF_SPLIT = {"train": "fit", "val": "validate"}

# Lightning cannot know that these samplers never drop a sample.
warnings.filterwarnings("ignore", message=r"You are using a custom batch sampler `(GlobalBatch|TaskBatch)Sampler`")


class FulguriteDataModule(LightningDataModule, ABC):
    """Base of all DataModules. A subclass says where samples come from (`read`) and what they are (`info`).

    Within a fit the collator is asked of the trainer's module; elsewhere give one with `attach`.

    Subclasses hand the options below on as ``**loading`` (jsonargparse reads them here, so the command line and
    YAML have them in every subclass, and refuse others).

    Args:
        batch_size: samples per training step over all processes together; must divide by their number.
        eval_batch_size: the same for validation, test and prediction; None takes ``batch_size``.
        num_workers: loading processes per process; 0 loads in the process itself.
        seed: of the order of the training samples, together with the epoch.
        on_bad: what a row, video or picture that cannot be used does: ``"error"`` stops with its name, ``"skip"``
            counts it and writes it to ``skipped.jsonl`` of the run folder (not with ``fast_dev_run``).
        feature_cache: folder of stored features of frames and pictures, filled at `setup` where some are missing; None
            computes them in every pass.
        feature_dtype: of the numbers stored there.
    """

    def __init__(
        self,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        on_bad: Literal["error", "skip"] = "error",
        feature_cache: Folder | None = None,
        feature_dtype: Literal["float16", "float32"] = "float16",
    ) -> None:
        super().__init__()
        sizes = {
            "batch_size": batch_size,
            "eval_batch_size": batch_size if eval_batch_size is None else eval_batch_size,
        }
        for name, size in sizes.items():
            if size < 1:
                raise DataError(f"data.{name}={size} must be at least 1")
        if num_workers < 0:
            raise DataError(f"data.num_workers={num_workers} must be at least 0")
        self.batch_size = batch_size
        self.eval_batch_size = sizes["eval_batch_size"]
        self.num_workers = num_workers
        self.seed = seed
        self.on_bad = on_bad
        self.feature_cache = None if feature_cache is None else Path(feature_cache).absolute()
        self.feature_dtype: Literal["float16", "float32"] = feature_dtype
        self.loading: dict[str, Any] = {
            "batch_size": batch_size,
            "eval_batch_size": eval_batch_size,
            "num_workers": num_workers,
            "seed": seed,
            "on_bad": on_bad,
            "feature_cache": self.feature_cache,
            "feature_dtype": feature_dtype,
        }
        """The options above as given, to build another DataModule that loads alike."""
        self.skipped: list[dict[str, str]] = []
        self.filtered: Counter[tuple[str, str]] = Counter()
        self._collators: dict[str, Collator] = {}
        self._attached: FeatureExtractor | None = None
        self._splits: dict[Split, list[Sample]] = {}
        self._ready: set[Split] = set()  # splits without what cannot be used
        self.stage = ""

    @property
    def folders(self) -> list[Path]:
        """Folders of the data; ``skipped.jsonl`` names files relative to them, as the data do."""
        return []

    @abstractmethod
    def read(self, split: Split) -> list[Sample]:
        """All usable samples of ``split``; an empty list where the data has no such split."""

    @abstractmethod
    def info(self) -> DataInfo:
        """Vocabulary, domains and kinds, for ``self.stage``: what `setup` was called for last, empty before.
        Reads files if need be; needs no trainer."""

    def place(self, split: Split) -> str:
        """Where the samples of ``split`` come from, for messages."""
        return f"{type(self).__name__}, split {split!r}"

    def stages(self) -> list[Stage]:
        """One stage over the whole training split, as long as the trainer says.

        Raises:
            DataError: within a fit that has no end.
        """
        domains = self.info().domains
        name = domains[0] if len(domains) == 1 else "all"
        batches = self._num_batches(self.samples("train"))
        return [Stage(name, domains, epochs_of(self, batches), batches)]

    def trainer_options(self) -> dict[str, Any]:
        """What the command line gives the Trainer in place of Lightning's own defaults: here the end is asked of
        the user, and samples are shared out over processes already."""
        return {"max_epochs": -1, "use_distributed_sampler": False}

    def samples(self, split: Split) -> list[Sample]:
        """The samples of ``split``, read once; a repeated id makes a bad sample."""
        if split not in self._splits:
            seen: set[tuple[str, str]] = set()
            kept = []
            for sample in self.read(split):
                name = (sample.domain, sample.id)
                with self.skipping(split, sample.domain, f"{self.place(split)}, id {sample.id}"):
                    if name in seen:
                        raise DataError(
                            f"{self.place(split)}: the id {sample.id!r} occurs twice in {sample.domain!r}; ids must "
                            "be unique"
                        )
                    kept.append(sample)
                seen.add(name)
            self._splits[split] = kept
        return self._splits[split]

    @contextmanager
    def skipping(self, split: Split, domain: str, where: str) -> Iterator[None]:
        """Within it a `DataError` stops the run or is counted and noted, as ``on_bad`` says."""
        try:
            yield
        except DataError as error:
            if self.on_bad == "error":
                raise DataError(f"{error}. To leave such samples out: --data.on_bad skip") from error
            texts = {"where": where, "reason": str(error)}
            for folder in sorted(self.folders, key=lambda each: len(each.parts), reverse=True):
                texts = {key: text.replace(f"{folder}{os.sep}", "") for key, text in texts.items()}
            self.skipped.append({"split": split, "domain": domain, **texts})

    def within_vocabulary(
        self,
        samples: Sequence[Sample],
        known: set[str],
        split: Split,
        unknown: Literal["keep", "error"],
        source: str,
    ) -> list[Sample]:
        """Training samples whose best answer is outside ``known`` are filtered and counted; elsewhere they
        stay and count as wrong, or are bad samples where ``unknown`` says ``"error"``."""
        kept = []
        for sample in samples:
            best = max(sample.answers, key=sample.answers.__getitem__, default=None)
            if best in known:
                kept.append(sample)
            elif split == "train":
                self.filtered[sample.domain, split] += 1
            elif unknown == "keep":
                kept.append(sample)
            else:
                with self.skipping(split, sample.domain, f"{source}, id {sample.id}"):
                    raise DataError(
                        f"{source}: the answer {best!r} of {sample.id!r} is outside the vocabulary; add it, "
                        "or set --data.unknown_answers keep, which counts it as wrong"
                    )
        return kept

    def attach(self, collator: Collator, extractor: FeatureExtractor | None = None) -> None:
        """Use ``collator`` for all stages, and ``extractor`` where there is a feature cache.

        For work without a trainer: features, indexing, calibration.
        """
        check_picklable(collator)
        self._collators = dict.fromkeys(SPLITS_OF_STAGE, collator)
        self._attached = extractor

    def setup(self, stage: str) -> None:
        """Read the splits of ``stage``, ask the module for its collator, fill the feature cache, check that all fit.

        The test after a fit is left out where the data have no test questions.

        Raises:
            DataError: a field that the module needs is not filled; unusable rows or videos where ``on_bad`` is
                ``"error"``; nothing to train on or to evaluate; an option of the trainer that would spoil the batches.
        """
        fitted = self.stage == "fit"
        stage = self.stage = TrainerFn(stage).value
        if self.trainer is None and stage not in self._collators:
            raise DataError(f"{type(self).__name__}: no trainer and no collator; call attach(collator) first")
        owner = "the attached collator"
        if self.trainer is not None:
            self._check_trainer()
            module = self.trainer.lightning_module
            owner = type(module).__name__
            stages = ("fit", "validate") if stage == "fit" else (stage,)
            self._collators |= {name: module.collator(name) for name in stages}
        for split in SPLITS_OF_STAGE[stage]:
            collator = self._collator(split)
            check_picklable(collator)
            samples = self._usable(split, collator)
            if not samples and fitted and stage == "test":
                rank_zero_info(f"{self.place(split)}: no samples, so there is no test after the fit")
            elif not samples and split == SPLITS_OF_STAGE[stage][0]:
                raise DataError(f"{self.place(split)}: no samples to {stage} with")
            check_fields(samples, collator, type(self).__name__, owner)
            self._keep(split, samples)
            self._log_counts(split, samples)
        self._write_skipped()
        if stage == "fit" and self.trainer is not None:
            self.stages()  # a fit without end is refused whatever module it is of

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled by (seed, epoch)."""
        return self.loader("train", self.samples("train"))

    def val_dataloader(self) -> ResumableLoader | list[ResumableLoader]:
        """In the order of the data; an empty list where there is no validation split."""
        samples = self.samples("val")
        return self.loader("val", samples) if samples else []

    def test_dataloader(self) -> ResumableLoader | list[ResumableLoader]:
        """In the order of the data; an empty list after a fit on data without test questions."""
        samples = self.samples("test")
        return self.loader("test", samples) if samples else []

    def predict_dataloader(self) -> DataLoader:
        """In the order of the data. A plain loader: Lightning builds it anew to follow the indices."""
        parts = self._parts("predict", self.samples("predict"))
        return DataLoader(**parts, generator=torch.Generator().manual_seed(self.seed))

    def loader(self, split: Split, samples: Sequence[Sample], name: str = "") -> ResumableLoader:
        """A loader over ``samples`` for this process, with the collator and batch size of ``split``."""
        return ResumableLoader(**self._parts(split, samples), name=name or split)

    def within_fit(self, split: Literal["val", "test"]) -> ResumableLoader:
        """A new loader over all `prepared` samples of ``split``, with a generator of its own, whatever the fit has
        reached. Raises DataError where there are none."""
        if not self.prepared(split):
            raise DataError(f"{self.place(split)}: no samples to evaluate on")
        return self.loader(split, self.samples(split), f"{split} within a fit")

    def prepared(self, split: Split) -> list[Sample]:
        """The samples of ``split`` as `setup` for its own stage leaves them, in any stage. All ranks must call it."""
        if split not in self._ready:
            stage = STAGE_OF_SPLIT.get(split, split)
            owner = "the attached collator"
            if stage not in self._collators:
                module = self.trainer.lightning_module
                self._collators[stage], owner = module.collator(stage), type(module).__name__
            samples = self._usable(split, self._collators[stage])
            check_fields(samples, self._collators[stage], type(self).__name__, owner)
            self._keep(split, samples)
        return self.samples(split)

    def _keep(self, split: Split, samples: list[Sample]) -> None:
        """These samples are what there is to use of ``split``."""
        self._splits[split] = samples
        self._ready.add(split)

    def _parts(self, split: Split, samples: Sequence[Sample]) -> dict[str, Any]:
        return {
            "dataset": SampleDataset(samples),
            "batch_sampler": self._sampler(split, samples),
            "collate_fn": self._collator(split),
            "num_workers": self.num_workers,
        }

    def _sampler(self, split: Split, samples: Sequence[Sample]) -> GlobalBatchSampler:
        """The order of ``samples`` and their batches, for this process."""
        rank, world = rank_and_world(self.trainer)
        size = self.batch_size if split == "train" else self.eval_batch_size
        return GlobalBatchSampler(len(samples), size, rank, world, self._shuffles(split), self.seed)

    def _shuffles(self, split: Split) -> bool:
        overfit = self.trainer is not None and self.trainer.overfit_batches > 0
        return split == "train" and not overfit

    def _usable(self, split: Split, collator: Collator) -> list[Sample]:
        """The samples of ``split`` whose files can be read, with stored features where there is a cache."""
        samples = self.samples(split)
        extractor = self._extractor()
        if extractor is not None:
            return fill_features(self, split, samples, extractor)
        if any("video" in need for need in collator.needs):
            return self.readable(split, samples, lambda media: media.check())
        return samples

    def readable(self, split: Split, samples: Sequence[Sample], check: Callable[[Media], object]) -> list[Sample]:
        """The samples whose video or pictures pass ``check``; the others are bad samples."""
        errors: dict[Media, DataError | None] = {}
        kept = []
        for sample in samples:
            media = media_of(sample)
            for each in media:
                if each not in errors:
                    try:
                        check(each)
                        errors[each] = None
                    except DataError as error:
                        errors[each] = error
            bad = next((each for each in media if errors[each] is not None), None)
            if bad is None:
                kept.append(sample)
                continue
            with self.skipping(split, sample.domain, f"{bad.name}, id {sample.id}"):
                raise errors[bad]
        return kept

    def _extractor(self) -> FeatureExtractor | None:
        if self.feature_cache is None:
            return None
        if self.trainer is None:
            return self._attached
        ask = getattr(self.trainer.lightning_module, "feature_extractor", None)
        return None if ask is None else ask()

    def _write_skipped(self) -> None:
        trainer = self.trainer
        if self.skipped and trainer is not None and trainer.is_global_zero and not trainer.fast_dev_run:
            lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in self.skipped]
            write_text(Path(trainer.default_root_dir) / "skipped.jsonl", "".join(lines))

    def _collator(self, split: Split) -> Collator:
        return self._collators[STAGE_OF_SPLIT.get(split, split)]

    def _num_batches(self, samples: Sequence[Sample]) -> int:
        return -(-len(samples) // self.batch_size)

    def _check_trainer(self) -> None:
        check_trainer(self.trainer, self.batch_size)

    def _log_counts(self, split: Split, samples: Sequence[Sample]) -> None:
        kept = Counter(s.domain for s in samples)
        skipped = Counter(s["domain"] for s in self.skipped if s["split"] == split)
        filtered = Counter({d: n for (d, at), n in self.filtered.items() if at == split})
        for domain in dict.fromkeys([*self.info().domains, *kept, *skipped, *filtered]):
            rank_zero_info(
                f"{domain} {split}: {kept[domain]} kept, {filtered[domain]} filtered, {skipped[domain]} skipped"
            )
