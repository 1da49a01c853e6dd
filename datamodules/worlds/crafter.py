"""Crafter's survival world: what lies around the player, which creatures come near, day and night.

Answers are materials, objects and the daylight of the world's own state. Train, validation and test use worlds of
different seeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import Any

import numpy as np
from PIL import Image

from fulgurite.datamodules.worlds.clip import NUM_FRAMES, SIZE, Clip, Question, simulator, spread

FIRST_SEED = {"train": 0, "val": 1_000_000, "test": 2_000_000}
NUM_WORLDS = {"train": 24, "val": 8, "test": 12}
AREA = 32
VIEW = 5  # cells along a side of the picture
CREATURES = ("Cow", "Zombie", "Skeleton")
# Cells of a view that must be of a terrain; the rare ones come in smaller patches.
LEAST = {"grass": 14, "sand": 10, "water": 10, "stone": 11, "path": 11}
COUNTS = ("one", "two", "three")
FACINGS = ((-1, 0), (1, 0), (0, -1), (0, 1))
DAY, NIGHT = 1.0, 0.25


class Land:
    """One generated world with the player in it."""

    def __init__(self, seed: int) -> None:
        engine, worldgen = simulator("crafter.engine"), simulator("crafter.worldgen")
        self.constants, self.objects = simulator("crafter.constants"), simulator("crafter.objects")
        self.world: Any = engine.World((AREA, AREA), self.constants.materials, (12, 12))
        self.world.reset(seed=seed)
        self.world.daylight = DAY
        self.player: Any = self.objects.Player(self.world, (AREA // 2, AREA // 2))
        self.world.add(self.player)
        worldgen.generate_world(self.world, self.player)
        textures = engine.Textures(self.constants.root / "assets")
        self.view = engine.LocalView(self.world, textures, [VIEW, VIEW])
        self.random = np.random.default_rng(seed)
        self.materials = {(x, y): self.world[x, y][0] for x in range(AREA) for y in range(AREA)}

    def around(self, x: int, y: int) -> list[tuple[int, int]]:
        """Cells of the view centred at (x, y)."""
        reach = range(-(VIEW // 2), VIEW // 2 + 1)
        return [(x + i, y + j) for i in reach for j in reach]

    def restore(self) -> None:
        """Remove all creatures and plants and make it day."""
        for thing in self.world.objects:
            if thing is not self.player:
                self.world.remove(thing)
        self.world.daylight = DAY

    def spots(self) -> list[tuple[int, int]]:
        """Cells that the player may stand on, away from the border, in random order."""
        inner = range(VIEW // 2 + 1, AREA - VIEW // 2 - 1)
        cells = [(x, y) for x in inner for y in inner if self.materials[x, y] in self.constants.walkable]
        return [cells[i] for i in self.random.permutation(len(cells))]

    def stand(self, cell: tuple[int, int]) -> None:
        """Move the player to a cell."""
        if tuple(self.player.pos) != cell:
            self.world.move(self.player, cell)

    def frame(self) -> np.ndarray:
        """(SIZE, SIZE, 3) picture of the view."""
        unit = SIZE // VIEW + 1
        canvas = self.view(self.player, np.array([unit, unit])).transpose(1, 0, 2)
        return np.asarray(Image.fromarray(canvas.astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BOX))


class Plots:
    """Balanced clips of one split."""

    def __init__(self, split: str, rng: np.random.Generator) -> None:
        self.rng = rng
        lands = (Land(FIRST_SEED[split] + i) for i in range(NUM_WORLDS[split]))
        self.lands, self.num_worlds = cycle(lands), NUM_WORLDS[split]
        self.grounds, self.creatures = spread(tuple(LEAST), rng), spread(CREATURES, rng)
        self.ground_pairs = spread([(a, b) for a in LEAST for b in LEAST if a != b], rng)
        self.creature_pairs = spread([(a, b) for a in CREATURES for b in CREATURES if a != b], rng)
        self.counts, self.lights = spread(COUNTS, rng), spread(("day", "night"), rng)
        self.ramps = spread(("brighter", "darker"), rng)

    def find(self, fits: Callable[[Land, int, int], bool]) -> Land:
        """The next world with a cell that fits; the player is put there."""
        for land in islice(self.lands, self.num_worlds):
            land.restore()
            for x, y in land.spots():
                if fits(land, x, y):
                    land.stand((x, y))
                    return land
        raise LookupError(f"none of {self.num_worlds} worlds has a place for this plot; raise NUM_WORLDS")

    def travels(self) -> Clip:
        """Two shots: the player among creatures on one ground, then among others on another ground."""
        grounds, names = next(self.ground_pairs), next(self.creature_pairs)
        change = int(self.rng.integers(5, 8))
        shots = []
        for ground, name in zip(grounds, names):
            land = self.find_ground(ground)
            self.populate(land, name, 3)
            shots.append(look_around(land))
        questions = (
            Question("What is most of the ground at first?", grounds[0], "order"),
            Question("Which creature comes first?", names[0].lower(), "order"),
        )
        return Clip(np.concatenate([shots[0][:change], shots[1][change:]]), questions)

    def populate(self, land: Land, name: str, number: int) -> None:
        """Put creatures on free cells of the view, or on any ground where there are too few."""
        kind = getattr(land.objects, name)
        cells = [c for c in land.around(*land.player.pos) if land.world[c][1] is None]
        walkable = [c for c in cells if land.materials[c] in land.constants.walkable]
        chosen = walkable if len(walkable) >= number else cells
        for index in self.rng.permutation(len(chosen))[:number]:
            land.world.add(kind(land.world, chosen[index], *(() if name == "Cow" else (land.player,))))

    def find_ground(self, ground: str) -> Land:
        """The next world with a place that is mostly of one ground; the player is put there."""

        def fits(land: Land, x: int, y: int) -> bool:
            (most, number), *_ = Counter(land.materials[c] for c in land.around(x, y)).most_common(1)
            return most == ground and number >= LEAST[ground]

        return self.find(fits)

    def meets(self) -> Clip:
        """One to three creatures of a kind stand about near the player."""
        name, count, light = next(self.creatures), next(self.counts), next(self.lights)

        def fits(land: Land, x: int, y: int) -> bool:
            return sum(land.materials[c] in land.constants.walkable for c in land.around(x, y)) >= 13

        land = self.find(fits)
        land.world.daylight = DAY if light == "day" else NIGHT
        self.populate(land, name, COUNTS.index(count) + 1)
        questions = (
            Question("Which creature is near the player?", name.lower(), "what"),
            Question("How many creatures are there?", count, "count"),
            Question("Is it day or night?", light, "light"),
        )
        return Clip(look_around(land), questions)

    def looks(self) -> Clip:
        """The player looks around on ground that is mostly of one kind, while the light comes or goes."""
        ground, ramp = next(self.grounds), next(self.ramps)
        land = self.find_ground(ground)
        light = DAY + (NIGHT - DAY) * np.clip(np.linspace(-0.6, 1.6, NUM_FRAMES), 0, 1)
        questions = (
            Question("What is most of the ground?", ground, "what"),
            Question("Does it get brighter or darker?", ramp, "change"),
        )
        return Clip(look_around(land, light if ramp == "darker" else light[::-1]), questions)


def look_around(land: Land, daylight: np.ndarray | None = None) -> np.ndarray:
    """Frames in which the player faces one side after the other; ``daylight`` (NUM_FRAMES,) changes if given."""
    frames = []
    for t in range(NUM_FRAMES):
        land.player.facing = FACINGS[t // 3]
        if daylight is not None:
            land.world.daylight = float(daylight[t])
        frames.append(land.frame())
    return np.stack(frames)


def clips(domain: str, split: str, rng: np.random.Generator) -> Iterator[Clip]:
    """Endless clips; the plots take turns."""
    plots = Plots(split, rng)
    while True:
        for plot in (plots.travels, plots.meets, plots.travels, plots.looks):
            yield plot()
