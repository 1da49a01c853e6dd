"""Pictures and their captions in JSON lines: what models with towers for both are calibrated on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fulgurite.datamodules.files import read_jsonl
from fulgurite.datamodules.picture_files import drawn
from fulgurite.datamodules.picture_question import picture_at
from fulgurite.samples.errors import DataError
from fulgurite.samples.picture import Picture

NAMED = "--pairs names JSON lines with 'image' and 'text'"


@dataclass(frozen=True)
class Pair:
    """One line.

    Args:
        picture: its picture.
        caption: its text.
        where: file and line.
    """

    picture: Picture
    caption: str
    where: str


def read_pairs(path: Path) -> list[Pair]:
    """All lines ``{"image": "a.jpg", "text": "a dog"}``; pictures lie relative to the file. Other keys are left alone.

    Raises:
        DataError: there is no such file, or a line has no path or no caption, or no picture lies there.
    """
    return [pair(path, f"{path}, line {number}", row) for number, row in read_jsonl(path, NAMED)]


def pair(path: Path, where: str, row: dict[str, object]) -> Pair:
    """The pair of a line. Raises as `read_pairs`."""
    for key in ("image", "text"):
        value = row.get(key)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{where}: the key {key!r} is missing or empty")
    return Pair(picture_at(path.parent / row["image"], where), row["text"].strip(), where)


def drawn_pairs(path: Path, count: int, seed: int) -> list[Pair]:
    """``count`` pairs of a file, drawn without replacement; the same for the same file and seed.

    Raises:
        DataError: there are fewer, or a line is wrong, drawn or not.
    """
    pairs = read_pairs(path)
    return drawn(pairs, count, seed, f"{path} holds {len(pairs)} pairs")
