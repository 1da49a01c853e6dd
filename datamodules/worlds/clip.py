"""What a world hands to the generator: frames and the questions that its own state answers."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple, TypeVar

import numpy as np

SIZE = 128
# Every event of a clip lasts at least NUM_FRAMES / 6 frames: six evenly spaced frames see all of them.
NUM_FRAMES = 12
T = TypeVar("T")


class Question(NamedTuple):
    """One question with its answer; ``kind`` is the type of question, shared between the worlds."""

    text: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Clip:
    """A short video and what may be asked about it.

    Args:
        frames: (NUM_FRAMES, SIZE, SIZE, 3) uint8 RGB.
        questions: at least one.
    """

    frames: np.ndarray
    questions: tuple[Question, ...]


def spread(values: Sequence[T], rng: np.random.Generator) -> Iterator[T]:
    """Endless stream over ``values``, reshuffled each round, so that any stretch of it is balanced."""
    while True:
        for index in rng.permutation(len(values)):
            yield values[index]


def simulator(name: str) -> ModuleType:
    """Import an optional package of the generator, or say how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"making the default videos needs the package {name!r}: pip install 'fulgurite[worlds]'. "
            "Training on the shipped videos does not."
        ) from error
