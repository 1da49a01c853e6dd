"""GLUE: nine tasks on one or two sentences (Wang et al. 2019, arXiv 1804.07461)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fulgurite.datamodules.base import FulguriteDataModule, Split
from fulgurite.datamodules.files import Folder, read_jsonl, read_text, require_root
from fulgurite.samples import DataError, DataInfo, Sample

Name = Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"]
MATCHES = ("matched", "mismatched")


@dataclass(frozen=True)
class Task:
    """How the files of a task look.

    Args:
        folder: below the root, in the official release.
        fields: names of its texts on the hub, which text-to-text models get to read too.
        columns: names of the same in the official TSV files.
        label: name of their label.
        labels: what the files call each label, in the order of its numbers; empty for scores from 0 to 5.
        size: whether LST divides the published validation split (``"small"``) or the training split (``"large"``).
    """

    folder: str
    fields: tuple[str, ...]
    columns: tuple[str, ...]
    label: str = "label"
    labels: tuple[str, ...] = ("0", "1")
    size: Literal["small", "large"] = "small"


_PAIR = ("sentence1", "sentence2")
_ENTAILED = ("entailment", "not_entailment")
TASKS: dict[str, Task] = {
    "cola": Task("CoLA", ("sentence",), ("sentence",)),
    "sst2": Task("SST-2", ("sentence",), ("sentence",), size="large"),
    "mrpc": Task("MRPC", _PAIR, ("#1 String", "#2 String"), "Quality"),
    "qqp": Task("QQP", ("question1", "question2"), ("question1", "question2"), "is_duplicate", size="large"),
    "stsb": Task("STS-B", _PAIR, _PAIR, "score", ()),
    "mnli": Task("MNLI", ("premise", "hypothesis"), _PAIR, "gold_label", ("entailment", "neutral", "contradiction")),
    "qnli": Task("QNLI", ("question", "sentence"), ("question", "sentence"), labels=_ENTAILED, size="large"),
    "rte": Task("RTE", _PAIR, _PAIR, labels=_ENTAILED),
    "wnli": Task("WNLI", _PAIR, _PAIR),
}
SCORES = tuple(f"{step / 5:.1f}" for step in range(26))


@dataclass(frozen=True)
class Row:
    """One line of a file: its number from 0, its texts, its label's number or its score, None where that is hidden."""

    number: int
    texts: tuple[str, ...]
    label: float | None


class Glue(FulguriteDataModule):
    """One task of GLUE; its name is also that of the domain and of the task of its samples.

    ``root`` holds the official release, a folder per task with ``train.tsv``, ``dev.tsv`` and ``test.tsv`` (of MNLI
    ``dev_matched.tsv`` and so on), or a folder per task, by the names here, with JSON lines of the hub's columns:
    ``train.jsonl``, ``validation.jsonl``, ``test.jsonl`` (of MNLI ``validation_matched.jsonl`` and so on). The official
    QQP has a few broken lines, which the hub leaves out; ``on_bad: skip`` does the same.

    The answer is the number of the label as text: ``"0"`` is "no" (CoLA unacceptable, SST-2 negative, MRPC and QQP no
    paraphrase), in MNLI, QNLI and RTE it is entailment. STS-B has scores. Labels of the official test are hidden, so
    it is for prediction.

    Args:
        root: see above.
        task: which.
        form: ``"text"`` makes one text of all, ``sentence1: ... sentence2: ...``, and rounds scores of STS-B to a
            fifth, for models that answer in words (T5); ``"pair"`` gives ``question`` and ``text_pair``, for
            classifiers.
        splits: ``"official"`` validates and tests on the published validation split, of MNLI on both, told apart by
            kind. ``"divided"`` is that of LST and Compacter: of CoLA, RTE, MRPC, STS-B and WNLI the published
            validation split is halved into validation and test; of QQP, QNLI and SST-2 ``held_out`` training samples
            are kept apart for validation, and the published validation split is the test; MNLI validates on mismatched
            and tests on matched.
        held_out: training samples for validation where ``splits`` are divided.
        split_seed: of the order in which they are drawn.
        loading: the options of `FulguriteDataModule`; the command line lists them one by one.
    """

    def __init__(
        self,
        root: Folder,
        task: Name,
        form: Literal["text", "pair"] = "text",
        splits: Literal["official", "divided"] = "official",
        held_out: int = 1000,
        split_seed: int = 42,
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        if held_out < 1:
            raise DataError(f"data.held_out={held_out} must be at least 1")
        self.root = Path(root).absolute()
        self.task = task
        self.form = form
        self.splits = splits
        self.held_out = held_out
        self.split_seed = split_seed
        self._rows: dict[str, list[Row]] = {}

    @property
    def folders(self) -> list[Path]:
        """The root."""
        return [self.root]

    def info(self) -> DataInfo:
        """The labels; none where scores are to be regressed. Of MNLI in its official splits both kinds."""
        labels = tuple(map(str, range(len(TASKS[self.task].labels))))
        if not labels and self.form == "text":
            labels = SCORES
        kinds = MATCHES if self.task == "mnli" and self.splits == "official" else ()
        return DataInfo((self.task,), labels, kinds, (self.task,))

    def place(self, split: Split) -> str:
        """The folder of the task."""
        return f"{self.root / TASKS[self.task].folder}, split {split!r}"

    def read(self, split: Split) -> list[Sample]:
        """The samples of ``split``."""
        require_root(self.root)
        parts = MATCHES if self.task == "mnli" else ("",)
        if self.splits == "divided" and self.task == "mnli" and split in ("val", "test"):
            parts = ("mismatched",) if split == "val" else ("matched",)
        published = {"train": "train", "predict": "test"}.get(split, "dev")
        if self.splits == "divided" and self.task != "mnli" and split != "predict":
            return [self._sample(row, "") for row in self._divided(split)]
        if published == "train":
            parts = ("",)
        return [self._sample(row, part) for part in parts for row in self.rows(published, split, part)]

    def _divided(self, split: Split) -> list[Row]:
        """LST's splits: which half of a random order."""
        small = TASKS[self.task].size == "small"
        if split == ("train" if small else "test"):
            return self.rows("train" if small else "dev", split)
        rows = self.rows("dev" if small else "train", split)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.split_seed)).tolist()
        first = len(rows) // 2 if small else self.held_out
        return [rows[i] for i in (order[:first] if split == "val" else order[first:])]

    def _sample(self, row: Row, part: str) -> Sample:
        task = TASKS[self.task]
        answers = {} if row.label is None else {self._answer(row.label): 1.0}
        second = None
        if self.form == "text":
            question = " ".join(f"{name}: {text}" for name, text in zip(task.fields, row.texts))
        else:
            question, second = row.texts[0], row.texts[1] if len(row.texts) > 1 else None
        return Sample(
            id=f"{part}/{row.number}" if part else str(row.number),
            domain=self.task,
            task=self.task,
            question=question,
            text_pair=second,
            answers=answers,
            kind=part or None,
        )

    def _answer(self, label: float) -> str:
        if TASKS[self.task].labels:
            return str(int(label))
        return SCORES[round(label * 5)] if self.form == "text" else str(label)

    def rows(self, published: str, split: Split, part: str = "") -> list[Row]:
        """The rows of a published file, read once.

        Args:
            published: ``"train"``, ``"dev"`` or ``"test"``, without labels.
            split: for which split, where a row cannot be used.
            part: of MNLI.

        Raises:
            DataError: there is no such file, or a row cannot be used.
        """
        key = f"{published}_{part}" if part else published
        if key not in self._rows:
            task, rows = TASKS[self.task], []
            official = self.root / task.folder / f"{key}.tsv"
            hub = self.root / self.task / f"{key.replace('dev', 'validation')}.jsonl"
            if not official.exists() and not hub.exists():
                raise DataError(f"There is neither {official} nor {hub}; they are looked for below --data.root")
            source = self._official(official, published) if official.exists() else read_jsonl(hub)
            path, names = (official, task.columns) if official.exists() else (hub, task.fields)
            for number, (line, values) in enumerate(source):
                where = f"{path}, line {line}"
                with self.skipping(split, self.task, where):
                    if isinstance(values, DataError):
                        raise values
                    texts = tuple(self._text(values, name, where) for name in names)
                    hidden = published == "test"
                    given = values.get(task.label if path == official else "label")
                    rows.append(Row(number, texts, None if hidden else self._label(given, where)))
            self._rows[key] = rows
        return self._rows[key]

    def _official(self, path: Path, published: str) -> Iterator[tuple[int, dict[str, str] | DataError]]:
        """(line, values by column) of a TSV file without quoting; the error in place of the values of a broken line."""
        lines = [line.removesuffix("\r") for line in read_text(path).split("\n")]
        if self.task == "cola" and published != "test":  # these two files have no header
            header, first = ["source", "label", "mark", "sentence"], 0
        else:
            header, first = lines[0].split("\t"), 1
        for number, line in enumerate(lines[first:], start=first + 1):
            values = line.split("\t")
            if line and len(values) == len(header):
                yield number, dict(zip(header, values))
            elif line:
                yield number, DataError(f"{path}, line {number}: {len(values)} values in {len(header)} columns")

    def _text(self, values: dict[str, Any], name: str, where: str) -> str:
        if not isinstance(values.get(name), str) or not values[name].strip():
            raise DataError(f"{where}: the text {name!r} is missing or empty; it has {list(values)}")
        return values[name].strip()

    def _label(self, given: Any, where: str) -> float:
        labels = TASKS[self.task].labels
        if given in labels:
            return labels.index(given)
        try:
            value = float(given)
        except (TypeError, ValueError):
            value = -1.0
        if labels and value not in range(len(labels)):
            raise DataError(f"{where}: the label is {given!r}, not one of {list(labels)} or their numbers")
        if not 0 <= value <= 5:
            raise DataError(f"{where}: the score is {given!r}, not a number from 0 to 5")
        return value
