"""The default data: the five small worlds that come with the package, as one stream."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fulgurite.datamodules.continual import ContinualDataModule
from fulgurite.datamodules.jsonl import JsonlDataModule
from fulgurite.datamodules.worlds import DOMAINS, clips_folder
from fulgurite.samples import DataError


class Worlds(ContinualDataModule):
    """The shipped videos and questions, one stage per world.

    Args:
        epochs_per_domain: see `ContinualDataModule`.
        worlds: names and order of the worlds; None takes all in their own order.
        joint: see `ContinualDataModule`.
        validate: see `ContinualDataModule`.
        batch_size: see `FulguriteDataModule`.
        eval_batch_size: see `FulguriteDataModule`.
        num_workers: see `FulguriteDataModule`.
        seed: see `FulguriteDataModule`.
        on_bad: see `FulguriteDataModule`.
        feature_cache: see `FulguriteDataModule`.
    """

    def __init__(
        self,
        epochs_per_domain: int | list[int] = 7,
        worlds: list[str] | None = None,
        joint: bool = False,
        validate: Literal["stage_end", "every_epoch"] = "stage_end",
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        on_bad: Literal["error", "skip"] = "error",
        feature_cache: Path | None = None,
    ) -> None:
        unknown = [name for name in worlds or () if name not in DOMAINS]
        if unknown:
            raise DataError(f"There are no worlds {unknown}; choose among {list(DOMAINS)}")
        domains = [
            JsonlDataModule(
                clips_folder() / name, Path("train.jsonl"), Path("val.jsonl"), Path("test.jsonl"), domain=name
            )
            for name in worlds or DOMAINS
        ]
        super().__init__(
            domains,
            epochs_per_domain,
            joint,
            validate,
            batch_size,
            eval_batch_size,
            num_workers,
            seed,
            on_bad,
            feature_cache,
        )
