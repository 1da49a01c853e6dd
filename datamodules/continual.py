"""Several data sets, one after the other (or all at once)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.trainer.states import TrainerFn

from fulgurite.datamodules.base import FulguriteDataModule, Split
from fulgurite.samples import DataError, DataInfo, Sample, Stage, stage_of
from fulgurite.samples.loader import ResumableLoader


class ContinualDataModule(FulguriteDataModule):
    """A stream of domains: one stage per domain, in the given order.

    Training shows the domain of the current stage. Validation at the end of a stage, test and prediction show
    all domains in one loader; a sample's domain is there for metrics only. Ids become ``domain/id``.

    Args:
        domains: the data sets. The loading options below hold for all of them, and one that asks for others is
            refused; it may have a ``feature_cache`` of its own.
        epochs_per_domain: epochs of each stage, one number or one per domain; of the one stage where
            ``joint``.
        joint: train on all domains together in one stage.
        validate: ``"stage_end"`` validates (all domains) after a stage only, ``"every_epoch"`` also its own
            domains in between.
        loading: the options of `FulguriteDataModule`; the command line lists them one by one.
    """

    def __init__(
        self,
        domains: list[FulguriteDataModule],
        epochs_per_domain: int | list[int],
        joint: bool = False,
        validate: Literal["stage_end", "every_epoch"] = "stage_end",
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        if not domains:
            raise DataError("domains is empty: name at least one data set")
        stages = 1 if joint else len(domains)
        epochs = [epochs_per_domain] * stages if isinstance(epochs_per_domain, int) else list(epochs_per_domain)
        if len(epochs) != stages or min(epochs) < 1:
            raise DataError(f"epochs_per_domain={epochs_per_domain} must give at least 1 for each of {stages} stages")
        self._check_loading(domains)
        self.domains = domains
        self.epochs = epochs
        self.joint = joint
        self.validate = validate
        for domain in domains:
            domain.on_bad = self.on_bad
            domain.feature_cache = domain.feature_cache or self.feature_cache
            domain.skipped = self.skipped
            domain.filtered = self.filtered

    @property
    def folders(self) -> list[Path]:
        """Those of all data sets."""
        return [folder for domain in self.domains for folder in domain.folders]

    def info(self) -> DataInfo:
        """Domains in training order; answers and kinds in the order in which the domains bring them."""
        infos = [domain.info() for domain in self.domains]
        names = [name for info in infos for name in info.domains]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise DataError(f"The domains {repeated} occur twice; give each data set its own 'domain' name")
        return DataInfo(
            tuple(names),
            tuple(dict.fromkeys(answer for info in infos for answer in info.answers)),
            tuple(dict.fromkeys(kind for info in infos for kind in info.kinds)),
            tuple(dict.fromkeys(task for info in infos for task in info.tasks)),
        )

    def stages(self) -> list[Stage]:
        """One stage per data set, or one called ``"all"``."""
        if self.joint:
            count = self._num_batches(self.samples("train"))
            return [Stage("all", self.info().domains, self.epochs[0], count)]
        stages = []
        for domain, epochs in zip(self.domains, self.epochs):
            names = domain.info().domains
            count = self._num_batches(self._of(names, "train"))
            stages.append(Stage("+".join(names), names, epochs, count))
        return stages

    def trainer_options(self) -> dict[str, Any]:
        """As in the base; the stages say when a fit ends, and bring their own training data."""
        more = {"max_epochs": sum(self.epochs), "reload_dataloaders_every_n_epochs": 1}
        return {**super().trainer_options(), **more}

    def prepare_data(self) -> None:
        """What the data sets do once, on one process."""
        for domain in self.domains:
            domain.prepare_data()

    def read(self, split: Split) -> list[Sample]:
        """The samples of all domains, in order."""
        return [replace(s, id=f"{s.domain}/{s.id}") for domain in self.domains for s in domain.samples(split)]

    def setup(self, stage: str) -> None:
        """As in the base, for every domain; a fit also checks the trainer's options that stages need."""
        for domain in self.domains:  # so that each reads what this stage needs
            domain.stage = TrainerFn(stage).value
        super().setup(stage)
        if stage == "fit" and self.trainer is not None:
            self._check_stages()

    def train_dataloader(self) -> ResumableLoader:
        """The domains of the stage of the trainer's current epoch; without a trainer, of the first stage."""
        stage = self._stage()
        return self.loader("train", self._of(stage.domains, "train"), stage.name)

    def val_dataloader(self) -> ResumableLoader | list[ResumableLoader]:
        """All domains where the current epoch ends a stage, else the stage's own or none."""
        if self._fitting() and not self._ends_stage():
            if self.validate == "stage_end":
                return []
            samples = self._of(self._stage().domains, "val")
        else:
            samples = self.samples("val")
        return self.loader("val", samples) if samples else []

    def _of(self, domains: Sequence[str], split: Split) -> list[Sample]:
        return [s for s in self.samples(split) if s.domain in domains]

    def _stage(self) -> Stage:
        stages = self.stages()
        return stages[stage_of(stages, 0 if self.trainer is None else self.trainer.current_epoch)]

    def _fitting(self) -> bool:
        return self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING

    def _ends_stage(self) -> bool:
        done = self.trainer.current_epoch + 1
        return done >= self.trainer.max_epochs > 0 or done in [
            sum(self.epochs[: i + 1]) for i in range(len(self.epochs))
        ]

    def _check_loading(self, domains: Sequence[FulguriteDataModule]) -> None:
        options = inspect.signature(FulguriteDataModule).parameters.values()
        ignored = [
            f"{option.name}={domain.loading[option.name]!r} of domains[{i}] ({type(domain).__name__})"
            for i, domain in enumerate(domains)
            for option in options
            if option.name != "feature_cache"
            and domain.loading[option.name]
            not in (option.default, self.loading[option.name], getattr(self, option.name))
        ]
        if ignored:
            keys = sorted({f"data.init_args.{text.partition('=')[0]}" for text in ignored})
            raise DataError(
                f"A stream loads all its data sets alike, so these would be ignored: {', '.join(ignored)}; set "
                f"{', '.join(keys)} of the stream instead"
            )

    def _check_stages(self) -> None:
        trainer = self.trainer
        if len(self.epochs) > 1 and trainer.reload_dataloaders_every_n_epochs != 1:
            raise DataError(
                "The training data change from stage to stage: set trainer.reload_dataloaders_every_n_epochs to 1"
            )
        total = sum(self.epochs)
        if trainer.max_epochs is not None and trainer.max_epochs > total:
            raise DataError(
                f"{len(self.epochs)} stages of {self.epochs} epochs are over after {total} epochs, but the "
                f"trainer would go on to {trainer.max_epochs}: set trainer.max_epochs to {total}"
            )
