"""Two worlds of OpenMoji pictures with captions: ``emoji_living`` and ``emoji_things``.

A clip is one of nine plots; its captions are composed from what was drawn. All splits show the same pictures, but in
other plots, places, numbers, colours or company: no clip and no caption of validation or test occurs in training, and
no caption stands for two clips.
"""

from __future__ import annotations

import json
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from fulgurite.datamodules.worlds import CAPTIONED_DOMAINS, SPLITS, wording
from fulgurite.datamodules.worlds.clip import NUM_FRAMES, SIZE, spread
from fulgurite.datamodules.worlds.emoji import BACKGROUNDS, COUNTS, DIRECTIONS, SIDES, TIMES, Emoji, draw, picture
from fulgurite.datamodules.worlds.encode import write_video

SIZES = {"train": 300, "val": 40, "test": 120}
NUM_CAPTIONS = {"train": 2, "val": 1, "test": 1}
PLOTS = ("moves", "pair", "follows", "crowd", "moves", "blinks", "follows", "grows", "spins", "pair", "recolours")
T = TypeVar("T")


class Told(NamedTuple):
    """A clip and all that can be said of it.

    Args:
        frames: (NUM_FRAMES, SIZE, SIZE, 3) uint8 RGB.
        captions: its wordings.
    """

    frames: np.ndarray
    captions: tuple[str, ...]


class Noted(Generic[T]):
    """Endless stream over ``values`` like `spread`, which knows what it gave last."""

    def __init__(self, values: Sequence[T], rng: np.random.Generator) -> None:
        self.stream, self.last = spread(values, rng), values[0]

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        self.last = next(self.stream)
        return self.last


class Captioned(Emoji):
    """The plots of the emoji worlds with the pictures of ``domain``, and two more; notes what it draws."""

    def __init__(self, domain: str, rng: np.random.Generator) -> None:
        super().__init__("train", rng)
        groups = wording.names(domain)
        self.headings = spread([group for group, names in groups.items() for _ in range(len(names) // 7)], rng)
        self.pools = {group: spread([code_of(name) for name in names], rng) for group, names in groups.items()}
        self.backgrounds = Noted(sorted(BACKGROUNDS), rng)
        self.directions = Noted(sorted(DIRECTIONS), rng)
        self.sides = Noted(sorted(SIDES), rng)
        self.counts = Noted(COUNTS[1:], rng)
        self.times = Noted(TIMES, rng)
        self.changes = Noted(("larger", "smaller"), rng)
        self.shown: tuple[str, ...] = ()
        self.before = ""

    def glyph(self) -> tuple[str, str]:
        """As in the emoji worlds; noted as the one picture."""
        drawn = super().glyph()
        self.shown = (drawn[1],)
        return drawn

    def two_glyphs(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """As in the emoji worlds; noted as the two pictures."""
        both = super().two_glyphs()
        self.shown = tuple(code for _, code in both)
        return both

    def spins(self) -> np.ndarray:
        """Frames of one picture that makes one turn, either way round."""
        code, background = self.glyph()[1], next(self.backgrounds)
        size, sense = int(self.rng.integers(64, 86)), self.rng.choice((-1, 1))
        x, y = (self.rng.uniform(52, 76, 2) - size / 2).round().astype(int).tolist()
        frames = []
        for turn in range(NUM_FRAMES):
            glyph = picture(code, size).rotate(sense * turn * 360 / NUM_FRAMES, Image.Resampling.BICUBIC)
            canvas = Image.new("RGB", (SIZE, SIZE), BACKGROUNDS[background])
            canvas.paste(glyph, (x, y), glyph)
            frames.append(np.asarray(canvas))
        return np.stack(frames)

    def recolours(self) -> np.ndarray:
        """Frames of one picture in place, behind which one colour follows another."""
        code, self.before, after = self.glyph()[1], next(self.backgrounds), next(self.backgrounds)
        while after == self.before:
            after = next(self.backgrounds)
        size, change = int(self.rng.integers(62, 84)), int(self.rng.integers(5, 8))
        spot = self.rng.uniform(46, 82, 2)
        return np.stack([draw(self.before if t < change else after, [(code, size, *spot)]) for t in range(NUM_FRAMES)])

    def tell(self, plot: str) -> Told:
        """The next clip of a plot."""
        made = getattr(self, plot)()
        facts = dict(zip("ab", map(name_of, self.shown)), colour=self.backgrounds.last)
        if plot == "recolours":
            facts |= {"colour": self.before, "other": self.backgrounds.last}
        noted = {"moves": ("direction", self.directions), "pair": ("side", self.sides)}
        noted |= {"crowd": ("count", self.counts), "blinks": ("times", self.times)}
        if plot in noted:
            key, stream = noted[plot]
            facts[key] = stream.last
        frames = made if isinstance(made, np.ndarray) else made.frames
        return Told(frames, wording.captions(self.changes.last if plot == "grows" else plot, facts))


def code_of(name: str) -> str:
    """A character (hex) by its name."""
    return f"{ord(unicodedata.lookup(name.upper())):X}"


def name_of(code: str) -> str:
    """The inverse of `code_of`."""
    return unicodedata.name(chr(int(code, 16))).lower()


def clips(domain: str, rng: np.random.Generator, said: set[str]) -> Iterator[Told]:
    """Endless clips; the plots take turns.

    Args:
        domain: one of `CAPTIONED_DOMAINS`.
        rng: of all choices.
        said: captions that are not to be true of a further clip; those of each clip are added.
    """
    world = Captioned(domain, rng)
    for plot in cycle(PLOTS):
        told = world.tell(plot)
        if said.isdisjoint(told.captions):
            said.update(told.captions)
            yield told


def generate_captioned(out: Path, domains: Sequence[str] = CAPTIONED_DOMAINS, seed: int = 0) -> None:
    """Write videos and captions of ``domains`` below ``out`` in the layout of `captioned_folder`.

    Args:
        out: folder; files of the same name are replaced.
        domains: names out of `CAPTIONED_DOMAINS`.
        seed: another seed gives other clips of the same pictures.

    Raises:
        ValueError: an unknown domain.
        ImportError: the drawings are not installed (``pip install 'fulgurite[worlds]'``).
    """
    if unknown := set(domains) - set(CAPTIONED_DOMAINS):
        raise ValueError(f"no captioned world named {sorted(unknown)}; domains= takes names out of {CAPTIONED_DOMAINS}")
    for domain in domains:
        (out / domain / "videos").mkdir(parents=True, exist_ok=True)
        said: set[str] = set()
        for split in SPLITS:
            rng = np.random.default_rng([seed, zlib.crc32(f"{domain}/{split}".encode())])
            lines = []
            for number, told in enumerate(islice(clips(domain, rng, said), SIZES[split])):
                video = f"videos/{split}-{number:03d}.mp4"
                write_video(out / domain / video, told.frames)
                chosen = rng.permutation(len(told.captions))[: NUM_CAPTIONS[split]]
                lines += [json.dumps({"video": video, "caption": told.captions[index]}) for index in chosen]
            (out / domain / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
