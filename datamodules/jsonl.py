"""Questions in JSON lines about videos or pictures in a folder: the way to bring own data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fulgurite.datamodules.base import FulguriteDataModule, Split
from fulgurite.datamodules.files import Folder, given_or_there, read_jsonl, read_vocabulary, require_root
from fulgurite.datamodules.picture_question import answer_scores, picture_at, picture_question
from fulgurite.samples import DataError, DataInfo, Sample, Video

FILES: dict[Split, Path] = {
    "train": Path("train.jsonl"),
    "val": Path("val.jsonl"),
    "test": Path("test.jsonl"),
    "predict": Path("questions.jsonl"),
}


class JsonlDataModule(FulguriteDataModule):
    """One JSON object per line: ``{"video": "a.mp4", "question": "What moves?", "answer": "a ball"}``.

    Other keys are left alone. Keys read: ``video`` (path below ``root``), ``question``, and optionally ``id``
    (else the line number), ``answer`` or ``answers`` (a list, or an object of answers and scores), ``kind``,
    ``speech``, ``options``. With ``image`` in place of ``video`` a line asks about a picture, for modules that write
    answers.

    A file that has its default name here may be missing: the folder then has no such split. Test and prediction
    read their own file alone; what the answers are is left to the checkpoint, or to ``vocabulary``.

    Args:
        root: folder that the paths below are relative to.
        train: file of training questions, or None.
        val: file of validation questions, or None.
        test: file of test questions, or None.
        predict: file of questions without known answers; None, or a missing one, takes the test file.
        media: folder of the videos and pictures, relative to ``root``.
        domain: name of this data set.
        vocabulary: JSON list of the answers to choose from, relative to ``root``; None takes all answers of
            the training file, sorted.
        unknown_answers: what an answer outside the vocabulary does in validation and test: ``"keep"`` counts
            it as wrong, ``"error"`` stops (a test then reads the training file too). Training questions outside
            a given vocabulary are filtered and counted.
        loading: the options of `FulguriteDataModule`; the command line lists them one by one.
    """

    def __init__(
        self,
        root: Folder,
        train: Path | None = FILES["train"],
        val: Path | None = FILES["val"],
        test: Path | None = FILES["test"],
        predict: Path | None = FILES["predict"],
        media: Path = Path("."),
        domain: str = "own",
        vocabulary: Path | None = None,
        unknown_answers: Literal["keep", "error"] = "keep",
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        self.root = Path(root).absolute()
        self.files: dict[Split, Path | None] = {"train": train, "val": val, "test": test, "predict": predict}
        self.media = self.root / media
        self.domain = domain
        self.vocabulary = vocabulary
        self.unknown_answers = unknown_answers
        self._rows: dict[Split, list[Sample]] = {}

    @property
    def folders(self) -> list[Path]:
        """What paths are relative to in the files and in the options."""
        return [self.root, self.media]

    def info(self) -> DataInfo:
        """The domain, its answers (empty where they are left to the checkpoint) and the kinds of what is read."""
        alone = self.stage in ("test", "predict")
        splits = (self.stage,) if alone else ("train", "val", "test")
        kinds = {s.kind for split in splits for s in self.rows(split) if s.kind is not None}
        tasks = {s.task for split in splits for s in self.rows(split)} or {Sample.task}
        return DataInfo((self.domain,), self._answers(alone), tuple(sorted(kinds)), tuple(sorted(tasks)))

    def read(self, split: Split) -> list[Sample]:
        """The questions of ``split``; answers outside the vocabulary are treated as the options say."""
        known = set(self.info().answers)
        samples = self.rows(split)
        if split == "predict" or not known:
            return samples
        return self.within_vocabulary(samples, known, split, self.unknown_answers, self.place(split))

    def place(self, split: Split) -> str:
        """The file, or the one that could be there."""
        path = self.path(split)
        return str(path) if path is not None else f"{self.root / FILES[split]} (no such file, or left out)"

    def path(self, split: Split) -> Path | None:
        """The file of ``split``; None where the folder has none."""
        path = given_or_there(self.root, self.files[split], FILES[split])
        return self.path("test") if path is None and split == "predict" else path

    def _answers(self, alone: bool) -> tuple[str, ...]:
        if self.vocabulary is not None:
            return read_vocabulary(self.root / self.vocabulary)
        if alone and "train" not in self._rows and self.unknown_answers == "keep":
            return ()
        return tuple(sorted({answer for s in self.rows("train") for answer in s.answers}))

    def rows(self, split: Split) -> list[Sample]:
        """All questions of a file, whatever their answers, read once."""
        if split not in self._rows:
            require_root(self.root)
            path = self.path(split)
            self._rows[split] = [] if path is None else self._file(split, path)
        return self._rows[split]

    def _file(self, split: Split, path: Path) -> list[Sample]:
        samples = []
        for number, row in read_jsonl(path):
            where = f"{path}, line {number}"
            with self.skipping(split, self.domain, where):
                samples.append(self._sample(row, number, where, answered=split != "predict"))
        return samples

    def _sample(self, row: Mapping[str, Any], number: int, where: str, answered: bool) -> Sample:
        media = "image" if "image" in row and "video" not in row else "video"
        if not isinstance(row.get(media), str) or not row[media]:
            raise DataError(f"{where}: the key {media!r} is missing or empty")
        question = row.get("question")
        if not isinstance(question, str) or not question.strip():
            raise DataError(f"{where}: the key 'question' is missing or empty")
        for key, kind in (("kind", str), ("speech", str), ("options", list)):
            if row.get(key) is not None and not isinstance(row[key], kind):
                raise DataError(f"{where}: the key {key!r} must be a {kind.__name__}, got {row[key]!r}")
        answers = answer_scores(row, where)
        if answered and not answers:
            raise DataError(
                f"{where}: the key 'answer' is missing; questions without answers belong in the file given as "
                "--data.predict"
            )
        id, question = str(row.get("id", number)), question.strip()
        options = tuple(str(option) for option in row.get("options") or ())
        more = {"kind": row.get("kind"), "speech": row.get("speech") or None, "options": options}
        if media == "image":
            picture = picture_at(self.media / row["image"], where, "it is looked for below --data.media")
            return picture_question(id, self.domain, question, answers, picture, **more)
        video = Video(self.media / row["video"], row["video"])
        return Sample(id, self.domain, question=question, answers=answers, video=video, **more)
