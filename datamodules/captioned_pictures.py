"""Captioned pictures in JSON lines: the way to bring own ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fulgurite.datamodules.base import FulguriteDataModule, Split
from fulgurite.datamodules.files import BELOW_ROOT, Folder, given_or_there, read_jsonl, require_root
from fulgurite.datamodules.picture_pairs import Pair, pair
from fulgurite.samples import DataInfo, Picture, Sample

FILES: dict[Split, Path] = {"train": Path("train.jsonl"), "val": Path("val.jsonl"), "test": Path("test.jsonl")}
TASK = "caption"


class CaptionedPictures(FulguriteDataModule):
    """One JSON object per line: ``{"image": "a.jpg", "text": "a dog"}``; pictures lie relative to the file.

    Lines about the same picture are several captions of it. Training has one sample per caption, called
    ``picture/number``; validation, test and prediction (of the test pictures) have one per picture, with all its
    captions. The text in is empty. A file that has its default name here may be missing: the folder then has no such
    split.

    Args:
        root: folder that the files below are relative to.
        train: file of the training split, or None.
        val: file of the validation split, or None.
        test: file of the test split, or None.
        domain: name of this data set.
        loading: the options of `FulguriteDataModule`; the command line lists them one by one.
    """

    def __init__(
        self,
        root: Folder,
        train: Path | None = FILES["train"],
        val: Path | None = FILES["val"],
        test: Path | None = FILES["test"],
        domain: str = "own",
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        self.root = Path(root).absolute()
        self.files: dict[Split, Path | None] = {"train": train, "val": val, "test": test, "predict": test}
        self.domain = domain

    @property
    def folders(self) -> list[Path]:
        """The root."""
        return [self.root]

    def info(self) -> DataInfo:
        """The domain and the task; there are no answers to choose from."""
        return DataInfo((self.domain,), tasks=(TASK,))

    def place(self, split: Split) -> str:
        """The file of the split."""
        return f"{self.root / (self.files[split] or split)}"

    def read(self, split: Split) -> list[Sample]:
        """The pictures of ``split`` in the order in which they come first."""
        require_root(self.root)
        usual = FILES.get(split, FILES["test"])
        path = given_or_there(self.root, self.files[split], usual)
        captions: dict[Picture, list[str]] = {}
        for number, row in read_jsonl(path, BELOW_ROOT) if path is not None else ():
            where = f"{path}, line {number}"
            with self.skipping(split, self.domain, where):
                found: Pair = pair(path, where, row)
                captions.setdefault(found.picture, []).append(found.caption)
        samples = []
        for picture, said in captions.items():
            name = Path(os.path.relpath(picture.path, path.parent)).as_posix()  # it may lie elsewhere
            if split == "train":
                samples += [self._sample(f"{name}/{n}", picture, (caption,)) for n, caption in enumerate(said)]
            else:
                samples.append(self._sample(name, picture, tuple(said)))
        return samples

    def _sample(self, name: str, picture: Picture, captions: tuple[str, ...]) -> Sample:
        return Sample(name, self.domain, TASK, question="", captions=captions, image=picture)
