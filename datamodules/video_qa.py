"""The six video question answering sets in the folder layout of FrozenBiLM and DAM."""

from __future__ import annotations

import csv
import io
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info

from fulgurite.checkpoints.errors import CheckpointError
from fulgurite.checkpoints.unpickle import load_pickle
from fulgurite.datamodules.base import FulguriteDataModule, Split
from fulgurite.datamodules.files import Folder, read_text, read_vocabulary, require_root
from fulgurite.samples import DataError, DataInfo, Sample, Video
from fulgurite.samples.features import FeatureReader, StoredFeatures
from fulgurite.samples.foreign import foreign_features

_WHAT_WHO = ("what", "how", "color", "where", "who", "when")
_FRAME_QA = ("what", "how", "color", "where")
_ACTIVITY = ("motion", "spatial", "temporal", "yesno", "color", "object", "location", "number", "other")


@dataclass(frozen=True)
class Layout:
    """Names of one data set's files.

    Args:
        folder: below the root.
        train: CSV of the training split.
        val: CSV of the validation split; None where the set has none.
        test: CSV of the test split.
        types: names of the numbers in the column ``type``.
        annotators: answers per question, in ``answer1``.. where there are several.
        speech: whether the set comes with subtitles.
    """

    folder: str
    train: str = "train.csv"
    val: str | None = "val.csv"
    test: str = "test.csv"
    types: tuple[str, ...] = ()
    annotators: int = 1
    speech: bool = True

    @property
    def answer_columns(self) -> tuple[str, ...]:
        """The CSV columns that hold answers."""
        return ("answer",) if self.annotators == 1 else tuple(f"answer{i + 1}" for i in range(self.annotators))


LAYOUTS = {
    "ivqa": Layout("iVQA", annotators=5),
    "msvd": Layout("MSVD-QA", types=_WHAT_WHO),
    "msrvtt": Layout("MSRVTT-QA", types=_WHAT_WHO),
    "lsmdc": Layout("LSMDC", train="training.csv"),
    "activitynet": Layout("ActivityNet-QA", types=_ACTIVITY),
    "tgif": Layout("TGIF-QA", "train_frameqa.csv", None, "test_frameqa.csv", _FRAME_QA, speech=False),
}


class VideoQADataModule(FulguriteDataModule):
    """One of iVQA, MSVD-QA, MSRVTT-QA, LSMDC-FiB, ActivityNet-QA and TGIF-FrameQA.

    Training questions whose answer (iVQA: the most common of five) is outside the vocabulary are filtered, as
    published; in validation and test they stay and count as wrong.

    Args:
        root: folder that holds ``iVQA``, ``MSVD-QA`` and so on.
        dataset: which set; also the name of the domain.
        vocabulary: JSON of the answers, relative to ``root``; None takes ``vocab1000.json`` of the set. Give
            all sets of a stream the same file.
        features_file: features by video id, in the set's folder; None where frames come from ``videos``.
        features_name: encoder name under which samples carry them.
        feature_width: their width.
        missing_features: a video without features stops with its name, or gets one zero vector, as published.
        videos: folder of video files named by video id, relative to the set's folder, or None.
        video_suffix: their ending.
        subtitles: file of speech by video id, in the set's folder; None leaves speech out.
        held_out: TGIF has no validation split: this share of its training videos becomes one. 0 validates on
            the test split, as published.
        unknown_answers: what an answer outside the vocabulary does in validation and test: ``"keep"`` counts
            it as wrong, ``"error"`` stops.
        loading: the options of `FulguriteDataModule`; the command line lists them one by one.
            ``feature_cache`` also takes the converted form of ``features_file``.
    """

    def __init__(
        self,
        root: Folder,
        dataset: Literal["ivqa", "msvd", "msrvtt", "lsmdc", "activitynet", "tgif"],
        vocabulary: Path | None = None,
        features_file: Path | None = Path("clipvitl14.pth"),
        features_name: str = "clip_vitl14",
        feature_width: int = 768,
        missing_features: Literal["error", "zeros"] = "error",
        videos: Path | None = None,
        video_suffix: str = ".mp4",
        subtitles: Path | None = Path("subtitles.pkl"),
        held_out: float = 0.1,
        unknown_answers: Literal["keep", "error"] = "keep",
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        if features_file is None and videos is None:
            raise DataError("Give features_file, or the folder of the video files as videos")
        if not 0 <= held_out < 1:
            raise DataError(f"held_out={held_out} must be a share of the training videos, from 0 up to below 1")
        self.dataset = dataset
        self.layout = LAYOUTS[dataset]
        self.folder = Path(root).absolute() / self.layout.folder
        self.vocabulary = self.folder / "vocab1000.json" if vocabulary is None else Path(root).absolute() / vocabulary
        self.features_file = features_file
        self.features_name = features_name
        self.feature_width = feature_width
        self.missing_features = missing_features
        self.videos = None if videos is None else self.folder / videos
        self.video_suffix = video_suffix
        self.subtitles = subtitles if self.layout.speech else None
        self.held_out = held_out
        self.unknown_answers = unknown_answers
        self._reader: FeatureReader | None = None
        self._speech: dict[str, str] | None = None
        self._to_divide: list[tuple[str, Sample]] | None = None

    def prepare_data(self) -> None:
        """Convert the feature file, once, on one process."""
        self._features()

    @property
    def folders(self) -> list[Path]:
        """Those of the set and of its videos."""
        return [self.folder] if self.videos is None else [self.folder, self.videos]

    def info(self) -> DataInfo:
        """The set's name, the vocabulary in the order of its file, the set's question types."""
        require_root(self.folder)
        return DataInfo((self.dataset,), read_vocabulary(self.vocabulary), self.layout.types)

    def read(self, split: Split) -> list[Sample]:
        """The questions of ``split``; prediction takes the test questions."""
        samples = self._split(split)
        if self.subtitles is not None and samples:
            spoken = sum(s.speech is not None for s in samples)
            rank_zero_info(f"{self.dataset} {split}: {spoken / len(samples):.1%} of {len(samples)} with speech")
        known = set(self.info().answers)
        return self.within_vocabulary(samples, known, split, self.unknown_answers, str(self.folder))

    def _split(self, split: Split) -> list[Sample]:
        layout = self.layout
        if layout.val is None and split in ("train", "val") and self.held_out > 0:
            if self._to_divide is None:  # both splits come out of one file: its bad rows count once
                self._to_divide = list(self._rows(layout.train, "train"))
            rows = self._to_divide
            videos = sorted({name for name, _ in rows})
            apart = set(random.Random(0).sample(videos, max(1, int(self.held_out * len(videos)))))
            return [sample for name, sample in rows if (name in apart) == (split == "val")]
        file = {"train": layout.train, "val": layout.val or layout.test}.get(split, layout.test)
        return [sample for _, sample in self._rows(file, split)]

    def _rows(self, file: str, split: Split) -> Iterator[tuple[str, Sample]]:
        path = self.folder / file
        columns = ("video_id", "question", *self.layout.answer_columns)
        for number, (line, row) in enumerate(read_csv(path, columns)):
            where = f"{path}, line {line}"
            with self.skipping(split, self.dataset, where):
                yield row["video_id"], self._sample(row, str(number), where)

    def _sample(self, row: Mapping[str, str], id: str, where: str) -> Sample:
        video_id = row["video_id"].strip()
        question = row["question"].strip()
        given = [row[column].strip() for column in self.layout.answer_columns]
        for name, value in (("video_id", video_id), ("question", question), ("answer", "".join(given))):
            if not value:
                raise DataError(f"{where}: the {name} is empty")
        counts = Counter(answer for answer in given if answer).most_common()
        scores = {a: min(n / 2, 1.0) if self.layout.annotators > 1 else 1.0 for a, n in counts}
        file = video_id + self.video_suffix
        sample = Sample(
            id=id,
            domain=self.dataset,
            question=question,
            answers=scores,
            kind=self._kind(row.get("type"), where),
            speech=self._speech_of(video_id),
            video=None if self.videos is None else Video(self.videos / file, file),
        )
        reader = self._features()
        if reader is None:
            return sample
        if video_id not in reader:
            if self.missing_features == "error":
                raise DataError(
                    f"{where}: {self.features_file} has no features of video {video_id!r}; "
                    "set missing_features to zeros for one zero vector, as published"
                )
            return replace(sample, features={self.features_name: torch.zeros(1, self.feature_width)})
        return replace(sample, features=StoredFeatures({self.features_name: (reader, video_id)}))

    def _kind(self, given: str | None, where: str) -> str | None:
        if not given or not self.layout.types:
            return None
        if not given.isdecimal() or int(given) >= len(self.layout.types):
            raise DataError(f"{where}: type {given!r} is not one of 0 to {len(self.layout.types) - 1}")
        return self.layout.types[int(given)]

    def _features(self) -> FeatureReader | None:
        if self._reader is None and self.features_file is not None:
            path = self.folder / self.features_file
            if not path.is_file():
                raise DataError(
                    f"{path}: no such file of features; set --data.features_file (null, with --data.videos, "
                    "takes frames) or --data.root"
                )
            self._reader = foreign_features(path, self.feature_width, self.feature_cache)
        return self._reader

    def _speech_of(self, video_id: str) -> str | None:
        if self.subtitles is None:
            return None
        if self._speech is None:
            self._speech = read_subtitles(self.folder / self.subtitles)
        return self._speech.get(video_id) or None


def read_csv(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, row) of a CSV file with a header.

    Raises:
        DataError: unreadable or not UTF-8, a missing column, a row of another length.
    """
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    missing = [column for column in columns if column not in (reader.fieldnames or ())]
    if missing:
        raise DataError(f"{path}: the columns {missing} are missing; it has {list(reader.fieldnames or ())}")
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(f"{path}, line {reader.line_num}: expected {len(reader.fieldnames)} values")
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV ({error})") from error


def read_subtitles(path: Path) -> dict[str, str]:
    """Speech by video id, out of a pickled ``{video id: text}``.

    Raises:
        DataError: missing or refused file, another content, or no text at all (which would silently cost
        accuracy).
    """
    try:
        content = load_pickle(path)
    except CheckpointError as error:
        raise DataError(f"{error} To go without speech, set subtitles to null.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a dict of texts by video id, got {type(content).__name__}")
    wrong = [key for key, text in content.items() if text is not None and not isinstance(text, str)]
    if wrong:
        raise DataError(f"{path}: the subtitles of video {wrong[0]} are not one text")
    speech = {str(key): (text or "").strip() for key, text in content.items()}
    if not any(speech.values()):
        raise DataError(f"{path}: all {len(speech)} subtitles are empty; to go without speech, set subtitles to null")
    return speech
