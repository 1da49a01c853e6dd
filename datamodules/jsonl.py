"""Questions in JSON lines about videos in a folder: the way to bring own data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fulgurite.datamodules.base import FulguriteDataModule, Split
from fulgurite.datamodules.files import read_jsonl, read_vocabulary
from fulgurite.samples import DataError, DataInfo, Sample, Video


class JsonlDataModule(FulguriteDataModule):
    """One JSON object per line: ``{"video": "a.mp4", "question": "What moves?", "answer": "a ball"}``.

    Other keys are left alone. Keys read: ``video`` (path below ``root``), ``question``, and optionally ``id``
    (else the line number), ``answer`` or ``answers`` (a list, or an object of answers and scores), ``kind``,
    ``speech``, ``options``.

    Args:
        root: folder that the paths below are relative to.
        train: file of training questions, or None.
        val: file of validation questions, or None.
        test: file of test questions, or None.
        predict: file of questions without known answers; None takes the test file.
        media: folder of the videos, relative to ``root``.
        domain: name of this data set.
        vocabulary: JSON list of the answers to choose from, relative to ``root``; None takes all answers of
            the training file, sorted.
        unknown_answers: what an answer outside the vocabulary does in validation and test: ``"keep"`` counts
            it as wrong, ``"error"`` stops. Training questions outside a given vocabulary are filtered and
            counted.
        batch_size: see `FulguriteDataModule`.
        eval_batch_size: see `FulguriteDataModule`.
        num_workers: see `FulguriteDataModule`.
        seed: see `FulguriteDataModule`.
        on_bad: see `FulguriteDataModule`.
        feature_cache: see `FulguriteDataModule`.
    """

    def __init__(
        self,
        root: Path,
        train: Path | None = None,
        val: Path | None = None,
        test: Path | None = None,
        predict: Path | None = None,
        media: Path = Path("."),
        domain: str = "own",
        vocabulary: Path | None = None,
        unknown_answers: Literal["keep", "error"] = "keep",
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        on_bad: Literal["error", "skip"] = "error",
        feature_cache: Path | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed, on_bad, feature_cache)
        self.root = Path(root)
        self.files: dict[Split, Path | None] = {
            "train": train,
            "val": val,
            "test": test,
            "predict": predict or test,
        }
        self.media = self.root / media
        self.domain = domain
        self.vocabulary = vocabulary
        self.unknown_answers = unknown_answers
        self._info: DataInfo | None = None
        self._read: dict[Split, list[Sample]] = {}

    def info(self) -> DataInfo:
        """The domain, its answers (empty without training file and vocabulary) and its kinds, sorted."""
        if self._info is None:
            rows = {split: self._rows(split) for split in ("train", "val", "test", "predict")}
            kinds = {s.kind for samples in rows.values() for s in samples if s.kind is not None}
            self._info = DataInfo((self.domain,), self._answers(rows["train"]), tuple(sorted(kinds)))
        return self._info

    def read(self, split: Split) -> list[Sample]:
        """The questions of ``split``; answers outside the vocabulary are treated as the options say."""
        known = set(self.info().answers)
        samples = self._rows(split)
        if split == "predict" or not known:
            return samples
        return self.within_vocabulary(samples, known, split, self.unknown_answers, str(self.files[split]))

    def _answers(self, train: list[Sample]) -> tuple[str, ...]:
        if self.vocabulary is not None:
            return read_vocabulary(self.root / self.vocabulary)
        return tuple(sorted({answer for s in train for answer in s.answers}))

    def _rows(self, split: Split) -> list[Sample]:
        if split not in self._read:
            file = self.files[split]
            self._read[split] = [] if file is None else self._file(split, file)
        return self._read[split]

    def _file(self, split: Split, file: Path) -> list[Sample]:
        path = self.root / file
        samples = []
        for number, row in read_jsonl(path):
            where = f"{path}, line {number}"
            with self.skipping(split, self.domain, where):
                samples.append(self._sample(row, number, where, answered=split != "predict"))
        return samples

    def _sample(self, row: Mapping[str, Any], number: int, where: str, answered: bool) -> Sample:
        if not isinstance(row.get("video"), str) or not row["video"]:
            raise DataError(f"{where}: the key 'video' is missing or empty")
        question = row.get("question")
        if not isinstance(question, str) or not question.strip():
            raise DataError(f"{where}: the question is missing or empty")
        for key, kind in (("kind", str), ("speech", str), ("options", list)):
            if row.get(key) is not None and not isinstance(row[key], kind):
                raise DataError(f"{where}: the key {key!r} must be a {kind.__name__}, got {row[key]!r}")
        answers = _scores(row, where)
        if answered and not answers:
            raise DataError(f"{where}: no answer; questions without answers belong in the file given as 'predict'")
        return Sample(
            id=str(row.get("id", number)),
            domain=self.domain,
            question=question.strip(),
            answers=answers,
            kind=row.get("kind"),
            speech=row.get("speech") or None,
            options=tuple(str(option) for option in row.get("options") or ()),
            video=Video(self.media / row["video"]),
        )


def _scores(row: Mapping[str, Any], where: str) -> dict[str, float]:
    given = row.get("answers", row.get("answer"))
    if given is None:
        return {}
    if isinstance(given, str):
        given = [given]
    if isinstance(given, Mapping):
        scores = {str(answer): score for answer, score in given.items()}
        wrong = {a: x for a, x in scores.items() if not isinstance(x, int | float) or not 0 <= x <= 1}
        if wrong:
            raise DataError(f"{where}: scores of answers must be numbers from 0 to 1, got {wrong!r}")
    elif isinstance(given, list):
        scores = dict.fromkeys((str(answer) for answer in given), 1.0)
    else:
        raise DataError(f"{where}: 'answer' must be a text, a list, or an object of scores, got {given!r}")
    if any(not answer.strip() for answer in scores):
        raise DataError(f"{where}: an answer is empty")
    return {answer.strip(): score for answer, score in scores.items()}
