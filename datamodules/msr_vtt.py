"""MSR-VTT: 10,000 videos with 20 captions each, in the splits of retrieval (1k-A)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from fulgurite.datamodules.base import Split
from fulgurite.datamodules.captioned import Described, HeldOutCaptions
from fulgurite.datamodules.files import Folder, laid_out, read_json
from fulgurite.datamodules.video_qa import read_csv

CAPTIONS = "MSRVTT_data.json"
TEST = "MSRVTT_JSFUSION_test.csv"


class MsrVtt(HeldOutCaptions):
    """MSR-VTT with 9,000 or 7,000 training videos, and 1,000 test videos with one caption each.

    ``root`` holds ``MSRVTT_train.9k.csv`` (or ``7k``), ``MSRVTT_JSFUSION_test.csv`` and ``MSRVTT_data.json``, which
    come with the release ``v0.0`` of CLIP4Clip (github.com/ArrowLuo/CLIP4Clip, ``msrvtt_data.zip``); the videos are
    ``videoN.mp4``, of Frozen in Time (``MSRVTT.zip``, github.com/m-bain/frozen-in-time).

    Args:
        root: see `CaptionedDataModule`.
        train: ``"9k"``, or ``"7k"`` for the smaller published training split.
        videos: see `CaptionedDataModule`.
        domain: see `CaptionedDataModule`.
        more: the other options of `HeldOutCaptions`; the command line lists them one by one.
    """

    usual_name = "msr_vtt"

    def __init__(
        self,
        root: Folder,
        train: Literal["9k", "7k"] = "9k",
        videos: Path = Path("videos"),
        domain: str | None = None,
        **more: Any,
    ) -> None:
        super().__init__(root, videos, domain, **more)
        self.train = train

    def published(self, split: Split) -> Iterator[Described]:
        """Training videos with all their captions, or the pairs of the test."""
        if split != "train":
            path = self.root / TEST
            for line, row in read_csv(path, ("video_id", "sentence")):
                yield Described(row["video_id"], [row["sentence"]], f"{path}, line {line}")
            return
        captions = self._captions()
        path = self.root / f"MSRVTT_train.{self.train}.csv"
        for line, row in read_csv(path, ("video_id",)):
            yield Described(row["video_id"], captions.get(row["video_id"], ()), f"{path}, line {line}")

    def _captions(self) -> dict[str, list[Any]]:
        path = self.root / CAPTIONS
        captions: dict[str, list[Any]] = {}
        with laid_out(path, '{"sentences": [{"video_id": ..., "caption": ...}, ...]}'):
            for sentence in read_json(path)["sentences"]:
                captions.setdefault(sentence["video_id"], []).append(sentence["caption"])
        return captions
