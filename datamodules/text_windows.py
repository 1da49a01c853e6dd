"""Plain text as windows of tokens: what language models are calibrated and scored on.

All texts are joined by two newlines and tokenized once. Calibration takes windows at random places, those that GPTQ and
RSQ take of the same tokens with the same seed; scoring takes all, one after the other.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fulgurite.datamodules.files import read_jsonl, read_text
from fulgurite.samples.errors import DataError

BETWEEN = "\n\n"
NAMED = "--text and --evaluate name it"


def read_texts(path: Path) -> list[str]:
    """The whole of a file of text, or of a ``.jsonl`` file the field ``text`` of every line.

    Raises:
        DataError: it cannot be read, or a line has no such field.
    """
    if path.suffix != ".jsonl":
        return [read_text(path, NAMED)]
    texts = []
    for number, row in read_jsonl(path, NAMED):
        if not isinstance(row.get("text"), str):
            raise DataError(f"{path}, line {number}: expected an object with a field 'text' of text")
        texts.append(row["text"])
    return texts


def token_ids(paths: Sequence[Path], tokenize: Callable[[str], Sequence[int]]) -> Tensor:
    """(N,) ids of all texts of these files, joined."""
    texts = [text for path in paths for text in read_texts(path)]
    return torch.tensor(list(tokenize(BETWEEN.join(texts))), dtype=torch.long)


def random_windows(ids: Tensor, count: int, length: int, seed: int) -> Tensor:
    """(count, length) of (N,) ids, each from a random place on.

    Raises:
        DataError: there are not more than ``length`` of them.
    """
    if len(ids) <= length:
        raise DataError(
            f"{len(ids)} tokens of text are too few for windows of {length}: give more text, or lower --length"
        )
    draw = random.Random(seed)
    starts = [draw.randint(0, len(ids) - length - 1) for _ in range(count)]
    return torch.stack([ids[start : start + length] for start in starts])


def consecutive_windows(ids: Tensor, length: int, limit: int | None = None) -> Tensor:
    """(W, length) of (N,) ids, one after the other; what is left at the end is no window.

    Raises:
        DataError: there is not one.
    """
    count = len(ids) // length if limit is None else min(len(ids) // length, limit)
    if count < 1:
        raise DataError(f"{len(ids)} tokens of text are too few for a window of {length}: give more, or lower --length")
    return ids[: count * length].view(count, length)
