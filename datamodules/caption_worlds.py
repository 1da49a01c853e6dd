"""The captioned videos that come with the package, as a stream or as one set."""

from __future__ import annotations

from typing import Any

from fulgurite.datamodules.captioned_videos import CaptionedVideos
from fulgurite.datamodules.continual import ContinualDataModule
from fulgurite.datamodules.worlds import CAPTIONED_DOMAINS, captioned_folder
from fulgurite.samples import DataError


class CaptionWorlds(ContinualDataModule):
    """Two worlds of OpenMoji pictures, each with 300 videos to train on (two captions each), 40 to validate and 120 to
    test (one caption each).

    Args:
        epochs_per_domain: see `ContinualDataModule`.
        worlds: names and order of the worlds; None takes both in their own order.
        stream: the other options of `ContinualDataModule`; the command line lists them one by one.
    """

    def __init__(self, epochs_per_domain: int | list[int] = 10, worlds: list[str] | None = None, **stream: Any) -> None:
        unknown = [name for name in worlds or () if name not in CAPTIONED_DOMAINS]
        if unknown:
            raise DataError(f"There are no captioned worlds {unknown}; choose among {list(CAPTIONED_DOMAINS)}")
        domains = [CaptionedVideos(captioned_folder() / name, domain=name) for name in worlds or CAPTIONED_DOMAINS]
        super().__init__(domains, epochs_per_domain, **stream)
