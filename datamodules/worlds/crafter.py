"""Crafter's survival world: what lies around the player, which creatures come near, what is placed, day and night.

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
PLACED = {"stone": "stone", "table": "table", "furnace": "furnace", "plant": "sapling"}
CREATURES = ("Cow", "Zombie", "Skeleton")
# Cells of a view that must be of a terrain; the rare ones come in smaller patches.
LEAST = {"grass": 14, "sand": 9, "water": 10, "stone": 11, "path": 9}
COUNTS = ("one", "two", "three")
SIDES = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
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
        """Remove all creatures and plants, and put back what was there before anything was placed."""
        for thing in self.world.objects:
            if thing is not self.player:
                self.world.remove(thing)
        for cell in self.around(*self.player.pos):
            self.world[cell] = self.materials[cell]
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

    def act(self, action: str) -> None:
        """Let the player do one of crafter's actions."""
        self.player.action = action
        self.player.update()

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
        self.pairs = spread([(a, b) for a in PLACED for b in PLACED if a != b], rng)
        self.creatures, self.counts = spread(CREATURES, rng), spread(COUNTS, rng)
        self.terrain, self.sides = spread(tuple(LEAST), rng), spread(tuple(SIDES), rng)
        self.lights, self.ramps = spread(("day", "night"), rng), spread(("brighter", "darker"), rng)

    def find(self, fits: Callable[[Land, int, int], bool]) -> Land:
        """The next world with a cell that fits; the player is put there."""
        for land in islice(self.lands, self.num_worlds):
            land.restore()
            for x, y in land.spots():
                if fits(land, x, y):
                    land.stand((x, y))
                    return land
        raise LookupError(f"none of {self.num_worlds} worlds has a place for this plot; raise NUM_WORLDS")

    def places(self) -> Clip:
        """The player places two different things, one on each of two sides."""
        (first, second), one, two = next(self.pairs), next(self.sides), next(self.sides)
        while two == one:
            two = next(self.sides)

        def fits(land: Land, x: int, y: int) -> bool:
            steps = (SIDES[one], SIDES[two])
            return all(land.materials[x + i, y + j] == "grass" for i, j in steps)

        land = self.find(fits)
        for item in ("stone", "wood", "sapling"):
            land.player.inventory[item] = 9
        times = {int(self.rng.integers(2, 4)): (first, one), int(self.rng.integers(7, 9)): (second, two)}
        frames = []
        for t in range(NUM_FRAMES):
            if t in times:
                thing, side = times[t]
                land.player.facing = SIDES[side]
                land.act(f"place_{thing}")
            frames.append(land.frame())
        questions = (
            Question("What does the player place first?", PLACED[first], "order"),
            Question("What does the player place last?", PLACED[second], "order"),
            Question(f"Where is the {PLACED[first]} placed?", one, "where"),
        )
        return Clip(np.stack(frames), questions)

    def meets(self) -> Clip:
        """One to three creatures of a kind stand about near the player."""
        name, count, light = next(self.creatures), next(self.counts), next(self.lights)

        def free(land: Land, x: int, y: int) -> list[tuple[int, int]]:
            return [c for c in land.around(x, y) if c != (x, y) and land.materials[c] in land.constants.walkable]

        land = self.find(lambda land, x, y: len(free(land, x, y)) >= 12)
        land.world.daylight = DAY if light == "day" else NIGHT
        kind, cells = getattr(land.objects, name), free(land, *land.player.pos)
        for index in self.rng.permutation(len(cells))[: COUNTS.index(count) + 1]:
            land.world.add(kind(land.world, cells[index], *(() if name == "Cow" else (land.player,))))
        questions = (
            Question("Which creature is near the player?", name.lower(), "what"),
            Question("How many creatures are there?", count, "count"),
            Question("Is it day or night?", light, "light"),
        )
        return Clip(look_around(land), questions)

    def looks(self) -> Clip:
        """The player looks around on ground that is mostly of one kind, while the light comes or goes."""
        ground, ramp = next(self.terrain), next(self.ramps)

        def fits(land: Land, x: int, y: int) -> bool:
            (most, number), *_ = Counter(land.materials[c] for c in land.around(x, y)).most_common(1)
            return most == ground and number >= LEAST[ground]

        land = self.find(fits)
        light = np.linspace(NIGHT, DAY, NUM_FRAMES)
        questions = (
            Question("What is most of the ground?", ground, "what"),
            Question("Does it get brighter or darker?", ramp, "change"),
        )
        return Clip(look_around(land, light if ramp == "brighter" else light[::-1]), questions)


def look_around(land: Land, daylight: np.ndarray | None = None) -> np.ndarray:
    """Frames in which the player faces one side after the other; ``daylight`` (NUM_FRAMES,) changes if given."""
    frames = []
    for t in range(NUM_FRAMES):
        land.player.facing = list(SIDES.values())[t // 3]
        if daylight is not None:
            land.world.daylight = float(daylight[t])
        frames.append(land.frame())
    return np.stack(frames)


def clips(domain: str, split: str, rng: np.random.Generator) -> Iterator[Clip]:
    """Endless clips; the plots take turns."""
    plots = Plots(split, rng)
    while True:
        for plot in (plots.places, plots.meets, plots.looks):
            yield plot()
