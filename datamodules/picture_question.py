"""One question about one picture, answered freely: what DataModules of single files make of their lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fulgurite.samples import DataError, Picture, Sample

TASK = "vqa"
BESIDE = "paths are relative to the file"


def picture_question(
    id: str, domain: str, question: str, answers: Mapping[str, float], picture: Picture, **more: Any
) -> Sample:
    """The sample, with ``more`` of its fields; each of the ``answers`` counts in full, as if ten people had said it."""
    said = tuple(answer for answer, score in answers.items() if score > 0 for _ in range(10))
    return Sample(id, domain, TASK, question, answers=answers, human_answers=said, image=picture, **more)


def picture_at(path: Path, where: str, place: str = BESIDE) -> Picture:
    """The picture at ``path``; ``place`` says what names it. Raises `DataError` where there is no file."""
    if not path.is_file():
        raise DataError(f"{where}: no picture lies at {path}; {place}")
    return Picture(path)


def answer_scores(row: Mapping[str, Any], where: str) -> dict[str, float]:
    """Accepted answers with their scores, of ``answers`` or ``answer``; empty where a row has neither.

    Raises:
        DataError: they are of another form, or one is empty.
    """
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
        raise DataError(f"{where}: the key 'answer' must be a text, a list, or an object of scores, got {given!r}")
    if any(not answer.strip() for answer in scores):
        raise DataError(f"{where}: the key 'answer' holds an empty answer")
    return {answer.strip(): score for answer, score in scores.items()}
