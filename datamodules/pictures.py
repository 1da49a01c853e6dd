"""Five small sets of labelled pictures that come with what is installed: four from the shipped videos, and letters.

    emoji     drawings (OpenMoji, CC BY-SA 4.0) in 11 groups; other characters in every split
    doom      views in three dimensions (Freedoom, BSD) of 8 monsters; other maps in every split
    crafter   maps of a survival game (Crafter, MIT) with 3 creatures; other worlds in every split
    grid      rooms of a grid world (Minigrid, Apache-2.0) with 4 kinds of objects; other rooms in every split
    letters   26 letters, large and small, in the typefaces of matplotlib (DejaVu, STIX and Computer Modern fonts, free
              licences that lie beside them); other typefaces in every split

Pictures of a video show the same thing and are no independent samples: `Pictures.num_clips` says how many videos there
are. Nothing is downloaded.
"""

from __future__ import annotations

import json
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fulgurite.datamodules.base import FulguriteDataModule, Split
from fulgurite.datamodules.image_folder import TASK
from fulgurite.datamodules.worlds import clips_folder
from fulgurite.samples import DataInfo, Sample, Video

Name = Literal["emoji", "doom", "crafter", "grid", "letters"]
THROUGHOUT, FIRST = (1, 4, 7, 10), (0, 1)  # of 12 frames; what comes first is there for at least two


@dataclass(frozen=True)
class Asked:
    """Which pictures of a world's videos show what a question asks for.

    Args:
        world: of the shipped videos.
        frames: by the text of the question.
    """

    world: str
    frames: dict[str, tuple[int, ...]]


VIDEOS = {
    "emoji": Asked("emoji_scenes", {"What is shown?": THROUGHOUT}),
    "doom": Asked("doom", {"Which monster is seen?": THROUGHOUT, "Which monster is seen first?": FIRST}),
    "crafter": Asked(
        "crafter", {"Which creature is near the player?": THROUGHOUT, "Which creature comes first?": FIRST}
    ),
    "grid": Asked(
        "grid",
        {
            "Which object is in the room?": THROUGHOUT,
            "Which objects are in the room?": THROUGHOUT,
            "Which object is in the first room?": FIRST,
        },
    ),
}
TYPEFACES: dict[str, tuple[str, ...]] = {
    "train": (
        *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
        *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
        *("cmr10", "cmb10", "STIXGeneral", "STIXGeneralBol"),
    ),
    "val": ("DejaVuSansMono", "cmss10", "STIXGeneralItalic"),
    "test": (
        *(f"DejaVuSansMono{style}" for style in ("-Bold", "-Oblique", "-BoldOblique")),
        *("cmti10", "cmtt10", "STIXGeneralBolIta"),
    ),
}
SIDE, POINTS = 96, 64  # of a drawn letter's picture, in pixels


class Pictures(FulguriteDataModule):
    """One of the five sets; its name is also that of the domain. Prediction takes the test pictures.

    Args:
        dataset: which.
        loading: the options of `FulguriteDataModule`; the command line lists them one by one.
    """

    def __init__(self, dataset: Name, **loading: Any) -> None:
        super().__init__(**loading)
        self.dataset = dataset

    def info(self) -> DataInfo:
        """The labels of all splits."""
        if self.dataset == "letters":
            labels = set(string.ascii_lowercase)
        else:
            labels = {label for split in ("train", "val", "test") for _, label, _ in asked(self.dataset, split)}
        return DataInfo((self.dataset,), tuple(sorted(labels)), tasks=(TASK,))

    def read(self, split: Split) -> list[Sample]:
        """All pictures of ``split``, in memory."""
        split = "test" if split == "predict" else split
        found = letters(split) if self.dataset == "letters" else frames(self.dataset, split)
        return [Sample(name, self.dataset, TASK, answers={label: 1.0}, image=pixels) for name, label, pixels in found]

    def num_clips(self, split: Split) -> int:
        """Videos that the pictures of ``split`` are from; for letters, pictures."""
        if self.dataset == "letters":
            return len(self.samples(split))
        return len({video for video, _, _ in asked(self.dataset, split)})


def asked(dataset: str, split: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """(video, label, frames) of every question of a split that labels pictures."""
    source = VIDEOS[dataset]
    lines = (clips_folder() / source.world / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = map(json.loads, lines)
    return [
        (row["video"], row["answer"], source.frames[row["question"]])
        for row in rows
        if row["question"] in source.frames
    ]


def frames(dataset: str, split: str) -> list[tuple[str, str, Tensor]]:
    """(id, label, (3, 128, 128) uint8) of every picture of a set from the shipped videos."""
    folder = clips_folder() / VIDEOS[dataset].world
    return [
        (f"{Path(video).stem}-{number}", label, pixels.clone())
        for video, label, numbers in asked(dataset, split)
        for number, pixels in zip(numbers, Video(folder / video).frames(numbers))
    ]


def letters(split: str) -> list[tuple[str, str, Tensor]]:
    """(id, letter, (3, 96, 96) uint8) of every letter in every typeface of a split, at its own place and colours."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    found = []
    for face in TYPEFACES[split]:
        font = ImageFont.truetype(folder / f"{face}.ttf", POINTS)
        rng = np.random.default_rng(list(face.encode()))
        for letter in string.ascii_letters:
            paper, ink = rng.integers(150, 256, 3), rng.integers(0, 110, 3)
            if rng.random() < 0.5:
                paper, ink = ink, paper
            image = Image.new("RGB", (SIDE, SIDE), tuple(paper.tolist()))
            place = tuple((SIDE / 2 + rng.uniform(-8, 8, 2)).tolist())
            ImageDraw.Draw(image).text(place, letter, tuple(ink.tolist()), font, anchor="mm")
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
            found.append((f"{face}-{letter}", letter.lower(), pixels))
    return found
