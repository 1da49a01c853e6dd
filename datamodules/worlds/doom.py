"""Freedoom 2 through ViZDoom: monsters are put into a map, and the camera turns or walks past them.

Answers are the classes that the engine's label buffer reports and the moves that the player was given. Train,
validation and test use different maps.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fulgurite.datamodules.worlds.clip import NUM_FRAMES, SIZE, Clip, Question, simulator, spread

MAPS = {"train": range(1, 12), "val": range(12, 15), "test": range(15, 21)}
# Class in the engine -> its English name.
MONSTERS = {
    "Cacodemon": "cacodemon",
    "Demon": "demon",
    "DoomImp": "imp",
    "Fatso": "mancubus",
    "HellKnight": "hell knight",
    "LostSoul": "lost soul",
    "Revenant": "revenant",
    "Zombieman": "zombie man",
}
COUNTS = ("one", "two", "three")
GAMMA = 0.6  # the maps are dark on screens without the game's own gamma
HALF_TURN = 34.0  # degrees to either side of a monster at which it is at the picture's edge
MIN_DEPTH = 14  # of the depth buffer (0 to 255): room for a monster in front of the player
MIN_HEIGHT = 60  # of 240 pixels: a monster that fell off a ledge is not in view


class Doom:
    """One engine; `visit` walks through the places of the maps of a split."""

    def __init__(self, split: str, rng: np.random.Generator, folder: Path) -> None:
        vizdoom = simulator("vizdoom")
        self.rng, self.folder = rng, folder
        self.maps = spread(MAPS[split], rng)
        game = vizdoom.DoomGame()
        game.set_doom_game_path(str(Path(vizdoom.__file__).parent / "freedoom2.wad"))
        game.set_doom_config_path(str(folder / "engine.ini"))
        game.set_screen_resolution(vizdoom.ScreenResolution.RES_320X240)
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        game.set_labels_buffer_enabled(True)
        game.set_depth_buffer_enabled(True)
        game.set_objects_info_enabled(True)
        for show in (
            game.set_render_messages,
            game.set_window_visible,
            game.set_render_hud,
            game.set_render_weapon,
            game.set_render_crosshair,
        ):
            show(False)
        game.set_available_buttons([vizdoom.Button.TURN_LEFT_RIGHT_DELTA])
        game.set_available_game_variables([vizdoom.GameVariable.ANGLE])
        game.set_episode_timeout(0)
        game.set_seed(int(rng.integers(1 << 30)))
        game.add_game_args("+sv_cheats 1 +sv_nomonsters 1")
        self.game: Any = game

    def places(self) -> Iterator[tuple[float, float]]:
        """Positions of the things that lie about in the maps, eight a visit, endlessly."""
        while True:
            self.game.close()
            self.game.set_doom_map(f"map{next(self.maps):02d}")
            # The engine leaves a folder of its own where it starts.
            with chdir(self.folder):
                self.game.init()
            for command in ("god", "notarget"):
                self.game.send_game_command(command)
            self.game.advance_action(4)
            things = self.game.get_state().objects
            for index in self.rng.permutation(len(things))[:8]:
                yield things[index].position_x, things[index].position_y

    def warp(self, x: float, y: float) -> None:
        """Put the player down at a point of the map."""
        self.game.send_game_command(f"warp {x:.0f} {y:.0f}")
        self.game.advance_action(2)

    def face(self, angle: float) -> Any:
        """Turn to an angle in degrees (anticlockwise from east) and return the engine's state."""
        now = float(self.game.get_state().game_variables[0])
        self.game.make_action([(now - angle + 180) % 360 - 180])
        return self.game.get_state()

    def summon(self, monster: str, angle: float) -> None:
        """Put a monster in front of the player."""
        self.face(angle)
        self.game.send_game_command(f"summon {monster}")
        self.game.advance_action(1)

    def open_heading(self, width: float) -> float | None:
        """A heading with free room ``width`` degrees to either side, or None."""
        first = float(self.rng.uniform(0, 360))
        for turn in range(0, 360, 45):
            depths = [self.face(first + turn + side).depth_buffer for side in (-width, 0, width)]
            if min(depth[95:122, 110:210].min() for depth in depths) >= MIN_DEPTH:
                return first + turn
        return None

    def boxes(self, state: Any) -> list[tuple[str, float, float]]:
        """Monsters in the cropped picture as (class, centre from -1 to 1, height of 240)."""
        found = [
            (label.object_name, (label.x + label.width / 2 - 160) / 120, label.height)
            for label in state.labels
            if label.object_name in MONSTERS
        ]
        return [box for box in found if abs(box[1]) < 1 and box[2] >= MIN_HEIGHT]

    def film(self, x: float, y: float, path: list[tuple[float, float, float]]) -> tuple[np.ndarray, list[list]] | None:
        """Frames and monsters in view along (forward, heading of the walk, angle); None if the way is blocked."""
        frames, seen = [], []
        for forward, heading, angle in path:
            if forward:
                self.warp(
                    x + forward * math.cos(math.radians(heading)),
                    y + forward * math.sin(math.radians(heading)),
                )
            state = self.face(angle)
            frames.append(state.screen_buffer[:, 40:280])
            seen.append(self.boxes(state))
        return np.stack([picture(frame) for frame in frames]), seen

    def clear(self) -> None:
        """Remove every monster."""
        for monster in MONSTERS:
            self.game.send_game_command(f"remove {monster}")
        self.game.advance_action(2)


def picture(screen: np.ndarray) -> np.ndarray:
    """(240, 240, 3) screen to a brighter (SIZE, SIZE, 3) picture."""
    small = np.asarray(Image.fromarray(screen).resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float32) / 255
    return (255 * small**GAMMA).round().astype(np.uint8)


def order(doom: Doom, x: float, y: float, monsters: list[str], move: str) -> Clip | None:
    """The camera turns from one monster to another."""
    heading = doom.open_heading(40)
    if heading is None:
        return None
    sign = 1 if move == "left" else -1
    for monster, side in zip(monsters, (-1, 1)):
        doom.summon(monster, heading + sign * side * HALF_TURN)
    # Stay on each monster, turn in between.
    sweep = np.clip(np.linspace(-1.6, 1.6, NUM_FRAMES), -1, 1)
    frames, seen = doom.film(x, y, [(0, heading, heading + sign * HALF_TURN * s) for s in sweep])
    ends = ([name for name, _, _ in seen[i]] for i in (0, 1, -2, -1))
    if list(ends) != [[monsters[0]], [monsters[0]], [monsters[1]], [monsters[1]]]:
        return None
    questions = (
        Question("Which monster is seen first?", MONSTERS[monsters[0]], "order"),
        Question("Which monster is seen last?", MONSTERS[monsters[1]], "order"),
    )
    return Clip(frames, questions)


def group(doom: Doom, x: float, y: float, monsters: list[str], move: str) -> Clip | None:
    """One, two or three monsters of a kind in front of a still camera; a single one stands at one side."""
    count, place = move.split("/")
    heading = doom.open_heading(20)
    if heading is None:
        return None
    sides = {"left": (1,), "middle": (0,), "right": (-1,), "two": (1, -1), "three": (1, 0, -1)}[place]
    for side in sides:
        doom.summon(monsters[0], heading + 26 * side)
    sway = 2 * np.sin(np.linspace(0, 2 * np.pi, NUM_FRAMES))
    frames, seen = doom.film(x, y, [(0, heading, heading + s) for s in sway])
    if any([name for name, _, _ in boxes] != monsters[:1] * len(sides) for boxes in seen):
        return None
    questions = [
        Question("How many monsters are there?", count, "count"),
        Question("Which monster is seen?", MONSTERS[monsters[0]], "what"),
    ]
    if count == "one":
        questions.append(Question("Where is the monster?", place, "where"))
    return Clip(frames, tuple(questions))


def clips(domain: str, split: str, rng: np.random.Generator) -> Iterator[Clip]:
    """Endless clips; the plots take turns, and a plot is tried at one place after another until it fits."""
    names, moves = spread(sorted(MONSTERS), rng), spread(("left", "right"), rng)
    singles = spread(("one/left", "one/middle", "one/right"), rng)
    groups = spread(("two/two", "three/three"), rng)
    with tempfile.TemporaryDirectory() as folder:
        doom = Doom(split, rng, Path(folder))
        places = doom.places()
        try:
            while True:
                for plot, plans in ((order, moves), (group, singles), (order, moves), (group, groups)):
                    first, second = next(names), next(names)
                    while second == first:
                        second = next(names)
                    move, clip = next(plans), None
                    while clip is None:
                        x, y = next(places)
                        doom.warp(x, y)
                        clip = plot(doom, x, y, [first, second], move)
                        doom.clear()
                    yield clip
        finally:
            doom.game.close()
