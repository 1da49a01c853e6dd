"""What data sets of questions and captions about pictures share: their media, their files, their splits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from fulgurite.datamodules.base import FulguriteDataModule, Split
from fulgurite.datamodules.files import Folder, laid_out, listed, read_json, require_root
from fulgurite.datamodules.grid_features import FileFeatures, Files, GridFile
from fulgurite.samples import DataError, DataInfo, Picture, Sample
from fulgurite.samples.picture import SUFFIXES


class PictureTask(FulguriteDataModule):
    """Records about pictures, each with the name of its picture or of two.

    Args:
        root: folder of all data sets, as VL-T5 and VL-Adapter lay them out (``datasets/``); paths are relative to it.
        train: files of the training split; None takes the published ones.
        val: the same for validation.
        test: the same for the test.
        predict: the same for prediction; answers may be missing there.
        features: folders of ``<picture>.h5`` files, see `fulgurite.datamodules.grid_features`; None takes the published
            ones, or none where there are ``images``.
        features_name: encoder name under which samples carry them.
        feature_width: their width.
        images: folders of the pictures themselves, by name with any ending.
        domain: name of this data set; None takes its usual one.
        loading: the options of `FulguriteDataModule`; the command line lists them one by one.
    """

    usual_name: ClassVar[str]
    task: ClassVar[str]
    files: ClassVar[Mapping[Split, tuple[str, ...]]]
    feature_folders: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        root: Folder,
        train: list[Path] | None = None,
        val: list[Path] | None = None,
        test: list[Path] | None = None,
        predict: list[Path] | None = None,
        features: list[Path] | None = None,
        features_name: str = "clip_rn101",
        feature_width: int = 2048,
        images: list[Path] | None = None,
        domain: str | None = None,
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        self.root = Path(root).absolute()
        given: dict[Split, list[Path] | None] = {"train": train, "val": val, "test": test, "predict": predict}
        self.paths = {
            split: [self.root / path for path in (self.files.get(split, ()) if paths is None else paths)]
            for split, paths in given.items()
        }
        if features is None:
            features = [] if images else [Path(folder) for folder in self.feature_folders]
        if not features and not images:
            raise DataError("Give the folders of stored data.features, or those of the pictures as data.images")
        self.features = Files([self.root / folder for folder in features], (".h5",), "features")
        self.features_name = features_name
        self.feature_width = feature_width
        self.images = Files([self.root / folder for folder in images or ()], SUFFIXES, "images")
        self.domain = self.usual_name if domain is None else domain
        self._media: dict[tuple[str, ...], dict[str, Any]] = {}

    @property
    def folders(self) -> list[Path]:
        """The root, and those of features and pictures."""
        return [self.root, *self.features.folders, *self.images.folders]

    def info(self) -> DataInfo:
        """The domain and the task; the answers are free."""
        return DataInfo((self.domain,), tasks=(self.task,))

    def place(self, split: Split) -> str:
        """The files of the split."""
        return ", ".join(map(str, self.paths[split])) or f"{type(self).__name__}: no file for the split {split!r}"

    def read(self, split: Split) -> list[Sample]:
        """The samples of all records of ``split``."""
        require_root(self.root)
        samples: list[Sample] = []
        for where, record in self.records(split):
            with self.skipping(split, self.domain, where):
                if not isinstance(record, Mapping):
                    raise DataError(f"{where}: expected an object, got {type(record).__name__}")
                samples.extend(self.of_record(record, where, split))
        return samples

    def records(self, split: Split) -> Iterator[tuple[str, Any]]:
        """(file and number from 1, record) of all files of a split, which hold one list each."""
        for path in self.paths[split]:
            with laid_out(path, "[{...}, ...]"):
                content = listed(read_json(path))
            for number, record in enumerate(content, start=1):
                yield f"{path}, record {number}", record

    @abstractmethod
    def of_record(self, record: Mapping[str, Any], where: str, split: Split) -> Sequence[Sample]:
        """The samples of one record. Raises `DataError` for one that cannot be used."""

    def media(self, pictures: Sequence[str], where: str) -> dict[str, Any]:
        """The fields of a sample about one picture or several: stored features and pictures, as far as there are any.

        Raises:
            DataError: one has no file.
        """
        names = tuple(pictures)
        if names not in self._media:  # questions about the same picture share what is read
            media: dict[str, Any] = {"num_images": len(names)}
            if self.features.folders:
                files = [GridFile(self.features.find(name, where), name, self.feature_width) for name in names]
                media["features"] = FileFeatures(self.features_name, files)
            if self.images.folders:
                found = tuple(Picture(self.images.find(name, where)) for name in names)
                media |= {"image": found[0]} if len(found) == 1 else {"images": found}
            self._media[names] = media
        return self._media[names]


def text_of(record: Mapping[str, Any], keys: Sequence[str], where: str) -> str:
    """The first of ``keys`` that a record has, as text without spaces around it.

    Raises:
        DataError: it has none, or it is empty or no text.
    """
    value = next((record[key] for key in keys if key in record), None)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: the key {keys[0]!r} is missing, empty or no text: {value!r}")
    return value.strip()


def name_of(record: Mapping[str, Any], key: str, where: str) -> str:
    """The name or number that a record has under ``key``, as text. Raises `DataError` where it has none."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | str) or str(value).strip() == "":
        raise DataError(f"{where}: the key {key!r} is missing, empty or no name: {value!r}")
    return str(value)


def label_of(record: Mapping[str, Any], where: str, needed: bool) -> dict[str, float]:
    """The scores of accepted answers, ``label``; empty where it is missing and not ``needed``.

    An object without answers, or with scores of 0 alone, stays as it is: such questions exist, and no answer is right.

    Raises:
        DataError: it is missing, of another form, or a score is no number from 0 to 1.
    """
    label = record.get("label")
    if label is None and not needed:
        return {}
    if not isinstance(label, Mapping):
        raise DataError(f"{where}: the key 'label' is missing or no object of answers and scores: {label!r}")
    for answer, score in label.items():
        if not answer.strip() or isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
            raise DataError(f"{where}: 'label' needs answers with scores from 0 to 1, got {answer!r}: {score!r}")
    return {answer: float(score) for answer, score in label.items()}
