"""easy-VQA: small pictures of one shape each with questions about it, out of an installed package."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from fulgurite.datamodules.base import FulguriteDataModule, Split
from fulgurite.datamodules.files import laid_out, listed, read_json
from fulgurite.samples import DataError, DataInfo, Picture, Sample

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
KINDS = ("colour", "shape", "yes/no")
ANSWERS = tuple(sorted((*SHAPES, *COLOURS, "no", "yes")))


class EasyVqa(FulguriteDataModule):
    """The package ``easy-vqa`` 1.0 (MIT): 4,000 pictures of 64 x 64 with 38,575 questions to train on, and 1,000 with
    9,673 to test; 13 answers. Install it by ``pip install easy-vqa==1.0``; nothing is downloaded here.

    Validation is on training pictures that are kept apart with all their questions; prediction on the test pictures.

    Args:
        held_out: share of the training pictures for validation.
        loading: the options of `FulguriteDataModule`; the command line lists them one by one.
    """

    def __init__(self, held_out: float = 0.1, **loading: Any) -> None:
        super().__init__(**loading)
        if not 0 < held_out < 1:
            raise DataError(f"data.held_out={held_out} must be a share of the training pictures, above 0 and below 1")
        self.held_out = held_out

    @cached_property
    def folder(self) -> Path:
        """The data of the package, which is not imported. Raises `DataError` where it is not installed."""
        found = importlib.util.find_spec("easy_vqa")
        if found is None or found.origin is None:
            raise DataError("The package easy-vqa is not installed: pip install easy-vqa==1.0")
        return Path(found.origin).parent / "data"

    @property
    def folders(self) -> list[Path]:
        """That of the package."""
        return [self.folder]

    def info(self) -> DataInfo:
        """The 13 answers and three kinds of questions."""
        return DataInfo(("easy_vqa",), ANSWERS, KINDS, ("vqa",))

    def place(self, split: Split) -> str:
        """The file of questions."""
        return str(self.folder / self._part(split) / "questions.json")

    def read(self, split: Split) -> list[Sample]:
        """The questions of ``split``."""
        samples = list(self._questions(split))
        if split in ("test", "predict"):
            return samples
        pictures = sorted({sample.image.path for sample in samples})
        count = max(1, int(self.held_out * len(pictures)))
        apart = set(random.Random(0).sample(pictures, count))
        return [sample for sample in samples if (sample.image.path in apart) == (split == "val")]

    def _part(self, split: Split) -> str:
        return "train" if split in ("train", "val") else "test"

    def _questions(self, split: Split) -> Iterator[Sample]:
        path = self.folder / self._part(split) / "questions.json"
        with laid_out(path, "[[question, answer, number of the picture], ...]"):
            rows = [(str(question), str(answer), int(picture)) for question, answer, picture in listed(read_json(path))]
        for number, (question, answer, picture) in enumerate(rows):
            if answer not in ANSWERS:
                raise DataError(f"{path}, question {number}: the answer {answer!r} is none of {list(ANSWERS)}")
            yield Sample(
                id=str(number),
                domain="easy_vqa",
                task="vqa",
                question=question,
                answers={answer: 1.0},
                human_answers=(answer,) * 10,
                kind="shape" if answer in SHAPES else "colour" if answer in COLOURS else "yes/no",
                image=Picture(path.parent / "images" / f"{picture}.png"),
            )
