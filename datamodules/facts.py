"""Facts to delete in JSON lines: the way to bring own ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fulgurite.datamodules.base import Split
from fulgurite.datamodules.fact_items import FactItems
from fulgurite.datamodules.files import Folder, given_or_there, read_jsonl, require_root
from fulgurite.datamodules.picture_question import picture_at, picture_question
from fulgurite.datamodules.picture_task import text_of
from fulgurite.samples import LEVELS, DataError, Fact, Level, Sample

T = TypeVar("T")
ITEMS, RETAIN = Path("facts.jsonl"), Path("retain.jsonl")


class Facts(FactItems):
    """One fact per line, what is deleted of a model and how that is tried out::

        {"id": "cat", "image": "cat.png", "question": "What is this?", "answer": "cat", "subject": "drawing",
         "rephrased_questions": ["What is shown?"],
         "rephrased_images": {"easy": ["cat-moved.png"], "medium": ["cat-turned.png"], "hard": ["cat-lines.png"]},
         "neighbour_questions": [{"question": "Is it an animal?", "answer": "yes"}],
         "neighbour_images": {"easy": [{"image": "bus.png", "answer": "bus"}], "medium": [...], "hard": [...]},
         "alternatives": ["dog", "fox"], "objects": [], "kind": "name"}

    ``alternatives``, ``objects``, ``kind`` and ``id`` (else the line number) may be missing; other keys are left alone.
    Pictures lie relative to the file. `python cli.py data facts` makes such a set.

    Args:
        root: folder that the files below are relative to.
        items: file of the facts.
        retain: file of questions that are to stay, as lines of ``image``, ``question`` and ``answer``, or None; where
            there is none under the usual name, the neighbour questions of all facts are to stay.
        levels: those at which every fact has rephrased and neighbour pictures; pictures of other levels are not read.
        domain: name of this data set.
        loading: the options of `FulguriteDataModule`; the command line lists them one by one.
    """

    def __init__(
        self,
        root: Folder,
        items: Path = ITEMS,
        retain: Path | None = RETAIN,
        levels: list[Level] | None = None,
        domain: str = "facts",
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        self.root = Path(root).absolute()
        self.items = self.root / items
        self.retained = retain
        self.levels: tuple[Level, ...] = LEVELS if levels is None else tuple(levels)
        self.domain = domain

    @property
    def folders(self) -> list[Path]:
        """The root."""
        return [self.root]

    def place(self, split: Split) -> str:
        """The file of the facts."""
        return str(self.items)

    def read(self, split: Split) -> list[Sample]:
        """The facts of the file."""
        return self._lines(self.items, "items", split, self._fact)

    def kept(self) -> list[Sample] | None:
        """The questions of the file of what is to stay."""
        path = given_or_there(self.root, self.retained, RETAIN)
        return None if path is None else self._lines(path, "retain", "train", self._question)

    def _lines(self, path: Path, option: str, split: Split, made: Callable[..., Sample]) -> list[Sample]:
        require_root(self.root)
        samples = []
        for number, row in read_jsonl(path, f"it is named by --data.{option}"):
            name = str(row.get("id", number))
            where = f"{path}, line {number}, id {name}"
            with self.skipping(split, self.domain, where):
                samples.append(made(row, name, where, path.parent))
        return samples

    def _question(
        self, row: Mapping[str, Any], name: str, where: str, folder: Path, fact: Fact | None = None
    ) -> Sample:
        question, answer, image = (text_of(row, (key,), where) for key in ("question", "answer", "image"))
        kind = row.get("kind")
        if kind is not None and not isinstance(kind, str):
            raise DataError(f"{where}: the key 'kind' must be a text, got {kind!r}")
        picture = picture_at(folder / image, where)
        return picture_question(name, self.domain, question, {answer: 1.0}, picture, kind=kind, fact=fact)

    def _fact(self, row: Mapping[str, Any], name: str, where: str, folder: Path) -> Sample:
        pairs = list_of(row, "neighbour_questions", dict, where)
        if not pairs:
            raise DataError(
                f"{where}: the fact has no neighbours: give questions about its picture and their answers as "
                "'neighbour_questions'"
            )
        fact = Fact(
            subject=text_of(row, ("subject",), where),
            rephrased_questions=tuple(list_of(row, "rephrased_questions", str, where)),
            rephrased_images={
                level: tuple(picture_at(folder / each, f"{where}, {level}") for each in given)
                for level, given in self._by_level(row, "rephrased_images", str, where)
            },
            neighbour_questions=tuple(
                (text_of(pair, ("question",), where), text_of(pair, ("answer",), where)) for pair in pairs
            ),
            neighbour_images={
                level: tuple(
                    (
                        picture_at(folder / text_of(pair, ("image",), where), f"{where}, {level}"),
                        text_of(pair, ("answer",), where),
                    )
                    for pair in given
                )
                for level, given in self._by_level(row, "neighbour_images", dict, where)
            },
            alternatives=tuple(list_of(row, "alternatives", str, where)),
            objects=tuple(list_of(row, "objects", str, where)),
        )
        return self._question(row, name, where, folder, fact)

    def _by_level(self, row: Mapping[str, Any], key: str, kind: type, where: str) -> Iterator[tuple[Level, list[Any]]]:
        given = row.get(key)
        if not isinstance(given, Mapping):
            raise DataError(f"{where}: the key {key!r} is missing or no object of levels: {given!r}")
        for level in self.levels:
            found = list_of(given, level, kind, f"{where}, {key}")
            if not found:
                raise DataError(
                    f"{where}: no pictures in {key!r} at the level {level!r}: add some, or set --data.levels to those "
                    "that all facts have"
                )
            yield level, found


def list_of(row: Mapping[str, Any], key: str, kind: type[T], where: str) -> list[T]:
    """The list that a row has under ``key``, empty where it has none.

    Raises:
        DataError: it is no list, or an entry is not of the ``kind``, or a text without letters.
    """
    given = row.get(key, [])
    if not isinstance(given, list) or not all(isinstance(each, kind) for each in given):
        what = "objects" if kind is dict else "texts"
        raise DataError(f"{where}: the key {key!r} must be a list of {what}, got {given!r}")
    if any(isinstance(each, str) and not each.strip() for each in given):
        raise DataError(f"{where}: the key {key!r} holds an empty text")
    return given
