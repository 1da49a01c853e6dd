"""Reading questions and vocabularies from text files, with errors that name file and line."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
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


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: unreadable file, or not JSON.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON ({error.msg} at line {error.lineno})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON that can be read: {error}") from error


def read_names(path: Path) -> dict[str, int]:
    """Names, one a line, in order, with the number of the line (from 1) that has each first; blank lines are none.

    Raises:
        DataError: see `read_text`.
    """
    names: dict[str, int] = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            names.setdefault(line.strip(), number)
    return names


@contextmanager
def laid_out(path: Path | str, layout: str) -> Iterator[None]:
    """Within it, what does not go with the ``layout`` of a file raises a `DataError` that says which is expected."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(f"{path}: another layout than {layout} ({type(error).__name__}: {error})") from error


def listed(value: object) -> list[Any]:
    """A list as it is. Raises `TypeError` for anything else, of which texts would fall apart into letters."""
    if not isinstance(value, list | tuple):
        raise TypeError(f"expected a list, got {type(value).__name__}")
    return list(value)


def given_or_there(root: Path, given: Path | None, usual: Path) -> Path | None:
    """The file ``given`` below ``root``; None where it is None, or missing under its ``usual`` name."""
    if given is None or (given == usual and not (root / given).exists()):
        return None
    return root / given


def read_vocabulary(path: Path) -> tuple[str, ...]:
    """Answers of a JSON list, or of a JSON object of answers and positions, in order.

    Raises:
        DataError: unreadable file, another form, an empty or repeated answer, positions that are not 0..A-1.
    """
    content = read_json(path)
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
