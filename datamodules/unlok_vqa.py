"""UnLOK-VQA: questions of OK-VQA whose answers are to be deleted (arXiv 2505.01456), in the published files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info

from fulgurite.datamodules.base import Split
from fulgurite.datamodules.fact_items import FactItems
from fulgurite.datamodules.files import Folder, laid_out, listed, read_json, require_root
from fulgurite.datamodules.picture_question import picture_at, picture_question
from fulgurite.datamodules.picture_task import name_of, text_of
from fulgurite.samples import LEVELS, DataError, Fact, Level, Picture, Sample

REPHRASED = {level: Path(f"rephrased_{level}") for level in LEVELS}
NEIGHBOURS = {level: Path(f"neighbours_{level}") for level in LEVELS}
MARK = "nq question: "  # stands before the published neighbour questions


class UnlokVqa(FactItems):
    """The published JSON list, of records ``{"id": ..., "image_id": ..., "src": question, "pred": answer, "subject":
    ..., "rephrase": [...], "loc": [...], "loc_ans": [...], "alt_ans": [...], "objects_edit": [...], "neigh_idx":
    [...]}``, with pictures of COCO and others by level.

    As published, the answer to a neighbour question is the first word of its entry in ``loc_ans``, and records are left
    out that have no ``subject``, no ``neigh_idx`` or no ``loc``, or that are not ``chosen``. Here they are counted by
    the reason, in ``left_out``, and the counts are printed. The neighbour picture number j shows what ``alt_ans`` lists
    at j; the published code takes the entry of the first one for all.

    Args:
        root: folder that the paths below are relative to.
        items: the JSON list.
        images: folder of the pictures of COCO, ``<image_id of 12 digits>.jpg``.
        rephrased: folders of the rephrased pictures by level, ``<number>.jpg``; None takes ``rephrased_<level>``.
        neighbours: those of the neighbour pictures, ``<number>_<j>.jpg``; None takes ``neighbours_<level>``;
            levels that are not named, here and there, are not read.
        numbers: the number that these files go by is a record's place in the list, from 0, or its ``id``.
        chosen: JSON list of the ids that were kept by hand; None takes all.
        incomplete: what the published rules leave out is left out and counted, or is an error.
        fall_back: a rephrased picture that is missing at the level medium or hard is the one of easy, as published;
            they are counted in ``fallen_back``. By default it is an error.
        retain: JSON list of records of what is to stay; None takes the neighbour questions of all facts.
        domain: name of this data set.
        loading: the options of `FulguriteDataModule`; the command line lists them one by one.

    Raises:
        DataError: a level that there is not.
    """

    def __init__(
        self,
        root: Folder,
        items: Path = Path("unlok_vqa.json"),
        images: Path = Path("images"),
        rephrased: dict[str, Path] | None = None,
        neighbours: dict[str, Path] | None = None,
        numbers: Literal["place", "id"] = "place",
        chosen: Path | None = None,
        incomplete: Literal["leave_out", "error"] = "leave_out",
        fall_back: bool = False,
        retain: Path | None = None,
        domain: str = "unlok_vqa",
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        self.root = Path(root).absolute()
        self.items, self.images = self.root / items, self.root / images
        self.rephrased = self._levels("rephrased", REPHRASED if rephrased is None else rephrased)
        self.neighbours = self._levels("neighbours", NEIGHBOURS if neighbours is None else neighbours)
        self.numbers = numbers
        self.chosen = None if chosen is None else self.root / chosen
        self.incomplete = incomplete
        self.fall_back = fall_back
        self.retained = None if retain is None else self.root / retain
        self.domain = domain
        self.left_out: dict[str, Counter[str]] = {}
        self.fallen_back: dict[str, Counter[str]] = {}

    @property
    def folders(self) -> list[Path]:
        """The root, and those of the pictures."""
        return [self.root, self.images, *self.rephrased.values(), *self.neighbours.values()]

    def place(self, split: Split) -> str:
        """The file of the facts."""
        return str(self.items)

    def read(self, split: Split) -> list[Sample]:
        """The facts of the list, but for those that the published rules leave out."""
        left_out = self.left_out[split] = Counter()
        fallen_back = self.fallen_back[split] = Counter()
        chosen = None if self.chosen is None else set(map(str, self._listed(self.chosen)))
        samples = []
        for place, record in enumerate(self._listed(self.items)):
            where = f"{self.items}, record {place}"
            with self.skipping(split, self.domain, where):
                if not isinstance(record, Mapping):
                    raise DataError(f"{where}: expected an object, got {type(record).__name__}")
                where = f"{where}, id {name_of(record, 'id', where)}"
                if lacking := lacks(record, chosen):
                    if self.incomplete == "error":
                        raise DataError(
                            f"{where}: {lacking}; --data.incomplete leave_out leaves such records out, as published"
                        )
                    left_out[lacking] += 1
                    self.filtered[self.domain, split] += 1
                    continue
                number = str(place) if self.numbers == "place" else str(record["id"])
                with laid_out(where, "that of UnlokVqa, see its documentation"):
                    samples.append(self._fact(record, number, where, fallen_back))
        for reason, count in left_out.items():
            rank_zero_info(f"{self.domain}: {count} records are left out, as published: {reason}")
        for level, count in fallen_back.items():
            rank_zero_info(f"{self.domain}: {count} facts have the easy picture for the {level} one, as published")
        return samples

    def kept(self) -> list[Sample] | None:
        """The questions of the list of what is to stay."""
        if self.retained is None:
            return None
        samples = []
        for place, record in enumerate(self._listed(self.retained)):
            where = f"{self.retained}, record {place}"
            with self.skipping("train", self.domain, where), laid_out(where, "a list of records"):
                samples.append(self._question(record, where))
        return samples

    def _levels(self, option: str, given: Mapping[str, Path]) -> dict[Level, Path]:
        wrong = [level for level in given if level not in LEVELS]
        if wrong:
            raise DataError(f"data.{option} has the levels {wrong}; there are {list(LEVELS)}")
        return {level: self.root / given[level] for level in LEVELS if level in given}

    def _listed(self, path: Path) -> list[Any]:
        require_root(self.root)
        with laid_out(path, "a JSON list"):
            return listed(read_json(path))

    def _question(self, record: Mapping[str, Any], where: str, fact: Fact | None = None) -> Sample:
        question, answer = (text_of(record, (key,), where) for key in ("src", "pred"))
        name = name_of(record, "image_id", where).rjust(12, "0")
        picture = picture_at(self.images / f"{name}.jpg", where, "its folder is --data.images")
        return picture_question(name_of(record, "id", where), self.domain, question, {answer: 1.0}, picture, fact=fact)

    def _fact(self, record: Mapping[str, Any], number: str, where: str, fallen_back: Counter[str]) -> Sample:
        asked, said = listed(record["loc"]), listed(record["loc_ans"])
        if len(asked) != len(said):
            raise DataError(f"{where}: {len(asked)} questions in 'loc' and {len(said)} answers in 'loc_ans'")
        alternatives = tuple(map(str, listed(record["alt_ans"])))
        shown = [int(j) for j in listed(record["neigh_idx"])]
        if wrong := [j for j in shown if not 0 <= j < len(alternatives) or not alternatives[j].strip()]:
            raise DataError(f"{where}: 'neigh_idx' has {wrong}, where 'alt_ans' has no answers: {alternatives}")
        fact = Fact(
            subject=text_of(record, ("subject",), where),
            rephrased_questions=tuple(map(str, listed(record["rephrase"]))),
            rephrased_images={level: (self._rephrased(level, number, where, fallen_back),) for level in self.rephrased},
            neighbour_questions=tuple(
                (question.removeprefix(MARK).strip(), first_word(answer, where))
                for question, answer in zip(asked, said)
            ),
            neighbour_images={
                level: tuple((self._at("neighbours", level, f"{number}_{j}", where), alternatives[j]) for j in shown)
                for level in self.neighbours
            },
            alternatives=alternatives,
            objects=tuple(map(str, listed(record.get("objects_edit", [])))),
        )
        return self._question(record, where, fact)

    def _rephrased(self, level: Level, number: str, where: str, fallen_back: Counter[str]) -> Picture:
        missing = not (self.rephrased[level] / f"{number}.jpg").is_file()
        if missing and self.fall_back and level != "easy" and "easy" in self.rephrased:
            fallen_back[level] += 1
            level = "easy"
        return self._at("rephrased", level, number, where)

    def _at(self, option: str, level: Level, name: str, where: str) -> Picture:
        path = getattr(self, option)[level] / f"{name}.jpg"
        return picture_at(path, f"{where}, level {level}", f"its folder is --data.{option}, its number --data.numbers")


def lacks(record: Mapping[str, Any], chosen: set[str] | None) -> str | None:
    """Why the published rules leave a record out; None where they take it."""
    if chosen is not None and str(record["id"]) not in chosen:
        return "not in the list of --data.chosen"
    keys = ("subject", "neigh_idx", "loc")
    return next((f"without {key!r}" for key in keys if not record.get(key)), None)


def first_word(answer: str, where: str) -> str:
    """Of an answer to a neighbour question. Raises DataError where it has none."""
    words = answer.split()
    if not words:
        raise DataError(f"{where}: 'loc_ans' holds an empty answer")
    return words[0]
