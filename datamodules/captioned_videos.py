"""Videos with captions in JSON lines: the way to bring own data to video-text retrieval."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fulgurite.datamodules.base import Split
from fulgurite.datamodules.captioned import CaptionedDataModule, Described
from fulgurite.datamodules.files import Folder, given_or_there, read_jsonl
from fulgurite.samples import DataError

FILES: dict[Split, Path] = {
    "train": Path("train.jsonl"),
    "val": Path("val.jsonl"),
    "test": Path("test.jsonl"),
    "predict": Path("test.jsonl"),
}


class CaptionedVideos(CaptionedDataModule):
    """One JSON object per line: ``{"video": "a.mp4", "caption": "a dog runs"}``, or ``"captions"`` with a list.

    Several lines may speak of one video: its captions are joined. Other keys are left alone. A file that has its
    default name here may be missing: the folder then has no such split.

    Args:
        root: folder that the paths below are relative to.
        train: file of training captions, or None.
        val: file of validation captions, or None.
        test: file of test captions, or None.
        media: folder of the videos, relative to ``root``; ``video`` is a path below it.
        domain: name of this data set.
        loading: the options of `FulguriteDataModule`; the command line lists them one by one.
    """

    folder_option = "media"

    def __init__(
        self,
        root: Folder,
        train: Path | None = FILES["train"],
        val: Path | None = FILES["val"],
        test: Path | None = FILES["test"],
        media: Path = Path("."),
        domain: str = "own",
        **loading: Any,
    ) -> None:
        super().__init__(root, media, domain, **loading)
        self.files: dict[Split, Path | None] = {"train": train, "val": val, "test": test, "predict": test}

    def place(self, split: Split) -> str:
        """The file, or the one that could be there."""
        path = given_or_there(self.root, self.files[split], FILES[split])
        return str(path) if path is not None else f"{self.root / FILES[split]} (no such file, or left out)"

    def find(self, row: Described) -> Path:
        """The file at the path of a row."""
        path = self.videos.path / row.video
        if not path.is_file():
            raise DataError(f"{row.where}: no video lies at {path}; set --data.media where the paths start elsewhere")
        return path

    def published(self, split: Split) -> Iterable[Described]:
        """The lines of the file of ``split``."""
        path = given_or_there(self.root, self.files[split], FILES[split])
        for number, row in () if path is None else read_jsonl(path):
            where = f"{path}, line {number}"
            with self.skipping(split, self.domain, where):
                yield Described(*_line(row, where), where)


def _line(row: dict[str, Any], where: str) -> tuple[str, list[Any]]:
    video, captions = row.get("video"), row.get("captions")
    if not isinstance(video, str) or not video:
        raise DataError(f"{where}: the key 'video' is missing or empty")
    if (captions is None) == ("caption" not in row):
        raise DataError(f"{where}: expected one of the keys 'caption' and 'captions'")
    if captions is not None and not isinstance(captions, list):
        raise DataError(f"{where}: the key 'captions' must be a list, got {captions!r}")
    return video, [row["caption"]] if captions is None else captions
