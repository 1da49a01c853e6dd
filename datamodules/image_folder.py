"""Labelled pictures in folders: the way to bring own pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fulgurite.datamodules.base import FulguriteDataModule, Split
from fulgurite.datamodules.files import Folder, require_root
from fulgurite.samples import DataError, DataInfo, Picture, Sample
from fulgurite.samples.picture import SUFFIXES

TASK = "image_classification"


class ImageFolder(FulguriteDataModule):
    """Pictures ``<root>/<split>/<label>/<name>``, with splits ``train``, ``val``, ``test`` and ``predict``.

    Only the split that a command needs must be there. The pictures to predict may lie in ``predict`` itself, without
    labels. A picture's id is its path below the split's folder; files of other kinds are left alone.

    Args:
        root: folder of the splits.
        domain: name of this data set; a classifier has one head for each.
        loading: the options of `FulguriteDataModule`; the command line lists them one by one.
    """

    def __init__(self, root: Folder, domain: str = "own", **loading: Any) -> None:
        super().__init__(**loading)
        self.root, self.domain = Path(root).absolute(), domain

    @property
    def folders(self) -> list[Path]:
        """The root."""
        return [self.root]

    def info(self) -> DataInfo:
        """The domain, and the labels of the training folder; none where it is missing (the checkpoint has them)."""
        return DataInfo((self.domain,), self.labels("train"), tasks=(TASK,))

    def labels(self, split: Split) -> tuple[str, ...]:
        """Names of the folders of a split, sorted."""
        require_root(self.root)
        folder = self.root / split
        return tuple(sorted(each.name for each in folder.iterdir() if each.is_dir())) if folder.is_dir() else ()

    def place(self, split: Split) -> str:
        """The split's folder."""
        return str(self.root / split)

    def read(self, split: Split) -> list[Sample]:
        """The pictures of ``split`` in the order of their paths; one that cannot be read is a bad sample."""
        require_root(self.root)
        folder, known, samples = self.root / split, set(self.labels("train")), []
        paths = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        for path in sorted(paths, key=lambda each: each.relative_to(folder).parts):
            parts = path.relative_to(folder).parts
            with self.skipping(split, self.domain, str(path)):
                if len(parts) != 2 and split != "predict":
                    raise DataError(f"{path}: pictures lie in a folder with the name of their label, in {folder}")
                if split in ("val", "test") and known and parts[0] not in known:
                    raise DataError(f"{path}: the label {parts[0]!r} is in {split} and not in train")
                picture = Picture(path)
                picture.check()
                answers = {parts[0]: 1.0} if len(parts) == 2 else {}
                samples.append(Sample("/".join(parts), self.domain, TASK, answers=answers, image=picture))
        return samples
