"""Freedoom 2 through ViZDoom: monsters are put into a map, and the camera turns or walks past them.

Answers are the classes that the engine's label buffer reports and the moves that the player was given. Train,
validation and test use different maps.
"""

from __future__ import annotations

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
        game.set_available_game_variables([vizdoom.GameVariable.ANGLE, vizdoom.GameVariable.SECRETCOUNT])
        game.set_episode_timeout(0)
        game.set_seed(int(rng.integers(1 << 30)))
        game.add_game_args("+sv_cheats 1 +sv_nomonsters 1")
        self.game: Any = game

    def visit(self) -> Iterator[None]:
        """Put the player where things lie about in the maps, up to eight places a visit to a map, endlessly."""
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
                self.game.send_game_command(f"warp {things[index].position_x:.0f} {things[index].position_y:.0f}")
                self.game.advance_action(2)
                if self.game.get_state().game_variables[1]:
                    # The engine announces a found secret across the picture, for as long as the map is played.
                    break
                yield

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

    def monsters(self, state: Any) -> list[str]:
        """Classes of the monsters whose middle is in the cropped picture."""
        return [
            label.object_name
            for label in state.labels
            if label.object_name in MONSTERS
            and abs(label.x + label.width / 2 - 160) < 120
            and label.height >= MIN_HEIGHT
        ]

    def film(self, angles: np.ndarray) -> tuple[np.ndarray, list[list[str]]]:
        """Frames, (F, SIZE, SIZE, 3), and the classes of the monsters in view in each, at these angles."""
        frames, seen = [], []
        for angle in angles:
            state = self.face(angle)
            frames.append(picture(state.screen_buffer[:, 40:280]))
            seen.append(self.monsters(state))
        return np.stack(frames), seen

    def clear(self) -> None:
        """Remove every monster."""
        for monster in MONSTERS:
            self.game.send_game_command(f"remove {monster}")
        self.game.advance_action(2)


def picture(screen: np.ndarray) -> np.ndarray:
    """(240, 240, 3) screen to a brighter (SIZE, SIZE, 3) picture."""
    small = np.asarray(Image.fromarray(screen).resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float32) / 255
    return (255 * small**GAMMA).round().astype(np.uint8)


def order(doom: Doom, monsters: list[str], move: str) -> Clip | None:
    """The camera turns from one monster to another; None if the place has no room for it."""
    heading = doom.open_heading(40)
    if heading is None:
        return None
    sign = 1 if move == "left" else -1
    for monster, side in zip(monsters, (-1, 1)):
        doom.summon(monster, heading + sign * side * HALF_TURN)
    # Rest on each monster, turn in between.
    sweep = np.clip(np.linspace(-1.6, 1.6, NUM_FRAMES), -1, 1)
    frames, seen = doom.film(heading + sign * HALF_TURN * sweep)
    if [seen[i] for i in (0, 1, -2, -1)] != [monsters[:1]] * 2 + [monsters[1:]] * 2:
        return None
    questions = (Question("Which monster is seen first?", MONSTERS[monsters[0]], "order"),)
    return Clip(frames, questions)


def group(doom: Doom, monsters: list[str], move: str) -> Clip | None:
    """One, two or three monsters of a kind before a nearly still camera; a single one stands at one side.

    None if the place has no room for it.
    """
    count, place = move.split("/")
    heading = doom.open_heading(20)
    if heading is None:
        return None
    sides = {"left": (1,), "middle": (0,), "right": (-1,), "two": (1, -1), "three": (1, 0, -1)}[place]
    for side in sides:
        doom.summon(monsters[0], heading + 26 * side)
    frames, seen = doom.film(heading + 2 * np.sin(np.linspace(0, 2 * np.pi, NUM_FRAMES)))
    if any(found != monsters[:1] * len(sides) for found in seen):
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
        places = doom.visit()
        try:
            while True:
                for plot, plans in ((order, moves), (group, singles), (order, moves), (group, groups)):
                    first, second = next(names), next(names)
                    while second == first:
                        second = next(names)
                    move, clip = next(plans), None
                    while clip is None:
                        next(places)
                        clip = plot(doom, [first, second], move)
                        doom.clear()
                    yield clip
        finally:
            doom.game.close()
