"""What data sets of videos with captions share: from what their files say to samples of retrieval."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn

from fulgurite.datamodules.base import FulguriteDataModule, Split
from fulgurite.datamodules.files import Folder, require_root
from fulgurite.datamodules.video_folder import VideoFolder
from fulgurite.samples import DataError, DataInfo, Sample, Video


class Described(NamedTuple):
    """A video and some or all of its captions, as the files of a data set give them.

    Args:
        video: its name there.
        captions: what is said of it.
        where: file and line, for messages.
        seconds: see `Video`.
    """

    video: str
    captions: Sequence[Any]
    where: str
    seconds: float | None = None


class CaptionedDataModule(FulguriteDataModule):
    """Videos and captions. Training has one sample per caption, called ``video/number``; validation, test and
    prediction (of the test videos) have one per video, with all its captions and its name.

    A missing video is one bad row, and so is an empty caption or a video without any, see ``on_bad``.

    Args:
        root: folder of the caption files, as they are published.
        videos: folder of the video files, relative to ``root``; they may lie in folders of it and have any ending.
        domain: name of this data set; None takes its usual one.
        loading: the options of `FulguriteDataModule`; the command line lists them one by one.
    """

    usual_name = "own"
    folder_option = "videos"

    def __init__(self, root: Folder, videos: Path = Path("videos"), domain: str | None = None, **loading: Any) -> None:
        super().__init__(**loading)
        self.root = Path(root).absolute()
        self.videos = VideoFolder(self.root / videos)
        self.domain = self.usual_name if domain is None else domain

    @abstractmethod
    def published(self, split: Split) -> Iterable[Described]:
        """What the files say of ``split``, in their order; of ``"predict"`` what they say of the test. A video may come
        several times."""

    def rows(self, split: Split) -> Iterable[Described]:
        """What is used of it."""
        return self.published(split)

    def names(self, video: str) -> tuple[str, ...]:
        """Under which names the file of a video may lie."""
        return (video,)

    def find(self, row: Described) -> Path:
        """The file of a video. Raises `DataError` where there is none."""
        return self.videos.find(self.names(row.video), row.where)

    @property
    def folders(self) -> list[Path]:
        """Those of the caption files and of the videos."""
        return [self.root, self.videos.path]

    def info(self) -> DataInfo:
        """The domain; there are no answers and no kinds."""
        return DataInfo((self.domain,), tasks=("retrieval",))

    def read(self, split: Split) -> list[Sample]:
        """The videos of ``split`` with their captions."""
        require_root(self.root)
        if not self.videos.path.is_dir():
            raise DataError(
                f"{self.videos.path}: no such folder; the videos are looked for there, set --data.{self.folder_option}"
            )
        videos: dict[str, Video] = {}
        captions: dict[str, list[str]] = {}
        for row in self.rows(split):
            with self.skipping(split, self.domain, row.where):
                if not row.captions:
                    raise DataError(f"{row.where}: no caption is given for the video {row.video!r}")
                if row.video not in videos:
                    videos[row.video] = Video(self.find(row), row.video, row.seconds)
                    captions[row.video] = []
            for caption in row.captions if row.video in videos else ():
                with self.skipping(split, self.domain, row.where):
                    captions[row.video].append(_text(caption, row))
        if split == "train":
            return [
                self._sample(f"{name}/{number}", (caption,), videos[name])
                for name, said in captions.items()
                for number, caption in enumerate(said)
            ]
        return [self._sample(name, tuple(said), videos[name]) for name, said in captions.items() if said]

    def _sample(self, id: str, captions: tuple[str, ...], video: Video) -> Sample:
        return Sample(id=id, domain=self.domain, task="retrieval", captions=captions, video=video)


class HeldOutCaptions(CaptionedDataModule):
    """Captioned videos whose published validation split is their test split: ``published`` gives the test for both.

    Args:
        root: see `CaptionedDataModule`.
        videos: see `CaptionedDataModule`.
        domain: see `CaptionedDataModule`.
        validation: ``"held_out"`` keeps training videos apart and validates on them; ``"test"`` validates on the
            test videos and trains on all others, as published.
        held_out: share of the training videos that is kept apart.
        held_out_seed: which of them.
        loading: the options of `FulguriteDataModule`; the command line lists them one by one.
    """

    def __init__(
        self,
        root: Folder,
        videos: Path = Path("videos"),
        domain: str | None = None,
        validation: Literal["held_out", "test"] = "held_out",
        held_out: float = 0.1,
        held_out_seed: int = 0,
        **loading: Any,
    ) -> None:
        super().__init__(root, videos, domain, **loading)
        if not 0 < held_out < 1:
            raise DataError(f"data.held_out={held_out} must be a share of the training videos, above 0 and below 1")
        self.validation = validation
        self.held_out = held_out
        self.held_out_seed = held_out_seed

    def rows(self, split: Split) -> Iterable[Described]:
        """As published, or with a validation split out of the training split; a warning says which."""
        if split in ("test", "predict"):
            return self.published(split)
        if self.validation == "test":
            if split == "val":
                rank_zero_warn(
                    f"{self.domain}: validation is on the test videos, as published, so that what is chosen by it is "
                    "chosen on the test; --data.validation held_out keeps training videos apart"
                )
            return self.published(split)
        rows = list(self.published("train"))
        names = sorted({row.video for row in rows})
        count = max(1, int(self.held_out * len(names))) if names else 0
        apart = set(random.Random(self.held_out_seed).sample(names, count))
        if split == "val":
            rank_zero_warn(
                f"{self.domain}: the published validation split is the test split, so {count} of {len(names)} "
                "training videos are held out for validation (--data.held_out); --data.validation test validates on "
                "the test videos, as published"
            )
        return [row for row in rows if (row.video in apart) == (split == "val")]


def _text(caption: object, row: Described) -> str:
    if not isinstance(caption, str) or not caption.strip():
        raise DataError(f"{row.where}: a caption of the video {row.video!r} is empty or no text: {caption!r}")
    return caption.strip()
