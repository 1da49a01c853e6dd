"""Reading questions and vocabularies from text files, with errors that name file and line."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonargparse.typing import register_type

from fulgurite.samples import DataError


class Folder(type(Path())):
    """A path in a config. Relative to the working directory, and written absolute into the config of a run, so that
    this holds from everywhere.
    """


# Not made absolute when read: a parser reads a config file with that file's folder as its working directory.
register_type(Folder, lambda path: str(path.absolute()), Folder)


BELOW_ROOT = "it is looked for below --data.root"


def require_root(root: Path) -> None:
    """Raise `DataError` where the folder of the data is not there, with the option that names it."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; the data are looked for there, set --data.root")


def read_jsonl(path: Path, place: str = BELOW_ROOT) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line that is not blank; see `read_text`.

    Raises:
        DataError: missing or unreadable file, not UTF-8, a line that is no JSON object.
    """
    for number, line in enumerate(read_text(path, place).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not JSON that can be read: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected an object, got {type(row).__name__}")
        yield number, row


def read_text(path: Path, place: str = BELOW_ROOT) -> str:
    """The file as text, its line ends as they are; ``place`` says which option names it.

    Raises:
        DataError: it is missing, unreadable or not UTF-8 (naming the line).
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read the file: {error.strerror}; {place}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8; save the file with the encoding UTF-8") from error


def read_vocabulary(path: Path) -> tuple[str, ...]:
    """Answers of a JSON list, or of a JSON object of answers and positions, in order.

    Raises:
        DataError: unreadable file, another form, an empty or repeated answer, positions that are not 0..A-1.
    """
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON ({error.msg} at line {error.lineno})") from error
    if isinstance(content, dict):
        if sorted(content.values(), key=str) != sorted(range(len(content)), key=str):
            raise DataError(f"{path}: the positions of the answers must be 0 to {len(content) - 1}, each once")
        content = sorted(content, key=content.__getitem__)
    if not isinstance(content, list) or not content or not all(isinstance(a, str) and a for a in content):
        raise DataError(f"{path}: expected a JSON list of answers, or an object of answers and positions")
    repeated = [answer for answer, count in Counter(content).items() if count > 1]
    if repeated:
        raise DataError(f"{path}: answers occur twice: {repeated[:5]}")
    return tuple(content)
