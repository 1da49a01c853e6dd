"""The six video question answering sets of FrozenBiLM and DAM as one stream, from one root folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from fulgurite.datamodules.continual import ContinualDataModule
from fulgurite.datamodules.video_qa import LAYOUTS, VideoQADataModule
from fulgurite.samples import DataError


class SixDomains(ContinualDataModule):
    """iVQA, MSVD-QA, MSRVTT-QA, LSMDC-FiB, ActivityNet-QA and TGIF-FrameQA, one stage each, in DAM's order.

    Args:
        datasets: names and order of the sets, as `VideoQADataModule` calls them; None takes all.
        vocabulary: JSON of the answers of all sets together, relative to ``root``.
        epochs_per_domain: see `ContinualDataModule`.
        joint: see `ContinualDataModule`.
        validate: see `ContinualDataModule`.
        sets: the other options of `VideoQADataModule`, the same for every set; the command line lists them one
            by one.
    """

    def __init__(
        self,
        datasets: list[str] | None = None,
        vocabulary: Path = Path("vocab_6db.json"),
        epochs_per_domain: int | list[int] = 20,
        joint: bool = False,
        validate: Literal["stage_end", "every_epoch"] = "stage_end",
        **sets: Any,
    ) -> None:
        names = list(LAYOUTS) if datasets is None else datasets
        unknown = [name for name in names if name not in LAYOUTS]
        if unknown:
            raise DataError(f"There are no data sets {unknown}; choose among {list(LAYOUTS)}")
        if not names:
            raise DataError(f"data.datasets is empty: name at least one of {list(LAYOUTS)}")
        domains = [VideoQADataModule(dataset=name, vocabulary=vocabulary, **sets) for name in names]
        super().__init__(domains, epochs_per_domain, joint, validate, **domains[0].loading)
