"""Minigrid rooms seen from above: an agent walks and looks at what lies about.

Answers are the environment's objects, colours and positions. Train, validation and test use different seeds
of the environment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from fulgurite.datamodules.worlds.clip import SIZE, Clip, Question, simulator, spread

FIRST_SEED = {"train": 0, "val": 1_000_000, "test": 2_000_000}
SHAPES = ("ball", "box", "door", "key")
COLOURS = ("red", "green", "blue", "purple", "yellow", "grey")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
DIRECTIONS = {"right": (1, 0), "down": (0, 1), "left": (-1, 0), "up": (0, -1)}  # in minigrid's order
COUNTS = ("one", "two", "three", "four")
FLOOR = 4  # cells of floor along a side
TILE = 32
LOOK_AROUND = (None, None, "left", None, None, "left", None, None, "right", None, None, "right")
CROSS = (None, None, None, "forward", None, None, "forward", None, "forward", None, None, None)


class Room:
    """An empty room of FLOOR x FLOOR cells around minigrid's environment; cells count from 0 at the top left."""

    def __init__(self, seed: int) -> None:
        self.minigrid = simulator("minigrid.minigrid_env")
        self.objects = simulator("minigrid.core.world_object")
        grid = simulator("minigrid.core.grid").Grid
        mission = simulator("minigrid.core.mission").MissionSpace

        class EmptyRoom(self.minigrid.MiniGridEnv):
            def _gen_grid(self, width: int, height: int) -> None:
                self.grid = grid(width, height)
                self.grid.wall_rect(0, 0, width, height)
                self.agent_pos, self.agent_dir = (1, 1), 0
                self.mission = ""

        space = mission(mission_func=lambda: "")
        self.env: Any = EmptyRoom(mission_space=space, grid_size=FLOOR + 2, max_steps=1000)
        self.env.reset(seed=seed)
        self.rng: np.random.Generator = self.env.np_random

    def put(self, shape: str, colour: str, cell: tuple[int, int]) -> None:
        """Lay an object down."""
        thing = getattr(self.objects, shape.title())(colour)
        self.env.put_obj(thing, cell[0] + 1, cell[1] + 1)

    def agent(self, cell: tuple[int, int], direction: str) -> None:
        """Place the agent."""
        self.env.agent_pos = (cell[0] + 1, cell[1] + 1)
        self.env.agent_dir = list(DIRECTIONS).index(direction)

    def cells(self, number: int) -> list[tuple[int, int]]:
        """Different cells, chosen at random."""
        return [divmod(int(cell), FLOOR) for cell in self.rng.permutation(FLOOR * FLOOR)[:number]]

    def frame(self) -> np.ndarray:
        """Picture of the floor with half a cell of wall, (SIZE, SIZE, 3)."""
        full = self.env.grid.render(TILE, self.env.agent_pos, self.env.agent_dir)
        inner = full[TILE // 2 : -TILE // 2, TILE // 2 : -TILE // 2]
        return np.asarray(Image.fromarray(inner).resize((SIZE, SIZE), Image.Resampling.BOX))


def film(room: Room, actions: Sequence[str | None]) -> list[np.ndarray]:
    """One frame before every one of minigrid's actions; None waits."""
    frames = []
    for action in actions:
        frames.append(room.frame())
        if action:
            room.env.step(room.env.actions[action])
    return frames


def corner_cell(corner: str, rng: np.random.Generator) -> tuple[int, int]:
    """A cell in the outer part of a quarter of the room."""
    x, y = rng.integers(0, 2, 2)
    return (int(x) + 2 * ("right" in corner), int(y) + 2 * ("bottom" in corner))


class Plots:
    """Balanced clips of one split."""

    def __init__(self, split: str, rng: np.random.Generator) -> None:
        self.rng = rng
        self.seeds = iter(FIRST_SEED[split] + rng.permutation(100_000))
        self.shapes, self.colours = spread(SHAPES, rng), spread(COLOURS, rng)
        self.pairs = spread([(a, b) for a in SHAPES for b in SHAPES if a != b], rng)
        self.corners, self.counts = spread(CORNERS, rng), spread(COUNTS, rng)
        self.directions = spread(tuple(DIRECTIONS), rng)

    def room(self) -> Room:
        """A room of the next seed."""
        return Room(int(next(self.seeds)))

    def two_colours(self) -> tuple[str, str]:
        """Two different colours."""
        first, second = next(self.colours), next(self.colours)
        while second == first:
            second = next(self.colours)
        return first, second

    def two_rooms(self) -> Clip:
        """The agent looks around in a room with one object, then in another room with another."""
        (first, second), colours = next(self.pairs), self.two_colours()
        change = int(self.rng.integers(5, 8))
        rooms = []
        for shape, colour in zip((first, second), colours):
            room = self.room()
            cells = room.cells(2)
            room.put(shape, colour, cells[0])
            room.agent(cells[1], "up")
            rooms.append(room)
        frames = [
            *film(rooms[0], LOOK_AROUND[:change]),
            *film(rooms[1], LOOK_AROUND[change:]),
        ]
        questions = (
            Question("Which object is in the first room?", first, "order"),
            Question("What colour is the object in the first room?", colours[0], "order"),
        )
        return Clip(np.stack(frames), questions)

    def passes(self) -> Clip:
        """The agent walks across the room past one object."""
        room, way = self.room(), next(self.directions)
        shape, colour, corner = next(self.shapes), next(self.colours), next(self.corners)
        cell = corner_cell(corner, room.rng)
        dx, dy = DIRECTIONS[way]
        lanes = [i for i in range(FLOOR) if i != (cell[1] if dx else cell[0])]
        lane = lanes[room.rng.integers(len(lanes))]
        start = 0 if dx + dy > 0 else FLOOR - 1
        room.put(shape, colour, cell)
        room.agent((start, lane) if dx else (lane, start), way)
        questions = (
            Question(f"Where is the {shape}?", corner, "where"),
            Question("Which object is in the room?", shape, "what"),
            Question("What colour is the object?", colour, "colour"),
        )
        return Clip(np.stack(film(room, CROSS)), questions)

    def counts_objects(self) -> Clip:
        """One to four objects of a kind lie about; the agent looks around."""
        room, count = self.room(), next(self.counts)
        shape, colour = next(self.shapes), next(self.colours)
        agent, *cells = room.cells(COUNTS.index(count) + 2)
        for cell in cells:
            room.put(shape, colour, cell)
        room.agent(agent, "up")
        questions = (
            Question("How many objects are in the room?", count, "count"),
            Question("Which objects are in the room?", shape, "what"),
            Question("What colour are the objects?", colour, "colour"),
        )
        return Clip(np.stack(film(room, LOOK_AROUND)), questions)


def clips(domain: str, split: str, rng: np.random.Generator) -> Iterator[Clip]:
    """Endless clips; the plots take turns."""
    plots = Plots(split, rng)
    while True:
        for plot in (plots.two_rooms, plots.passes, plots.two_rooms, plots.counts_objects):
            yield plot()
