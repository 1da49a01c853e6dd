"""The default data: the five small worlds that come with the package, as one stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fulgurite.datamodules.continual import ContinualDataModule
from fulgurite.datamodules.jsonl import JsonlDataModule
from fulgurite.datamodules.worlds import DOMAINS, clips_folder
from fulgurite.samples import DataError


class Worlds(ContinualDataModule):
    """The shipped videos and questions, one stage per world.

    Args:
        epochs_per_domain: see `ContinualDataModule`.
        worlds: names and order of the worlds; None takes all in their own order.
        stream: the other options of `ContinualDataModule`; the command line lists them one by one.
    """

    def __init__(
        self,
        epochs_per_domain: int | list[int] = 7,
        worlds: list[str] | None = None,
        **stream: Any,
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
        super().__init__(domains, epochs_per_domain, **stream)
