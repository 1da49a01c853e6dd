"""Other pictures of what a drawing of OpenMoji shows: moved, turned, in other colours, without any."""

from __future__ import annotations

import colorsys

import numpy as np
from PIL import Image

from fulgurite.datamodules.worlds.clip import SIZE
from fulgurite.datamodules.worlds.emoji_sorts import drawing
from fulgurite.samples.picture import on_white


def plain(name: str) -> Image.Image:
    """The drawing on white, (SIZE, SIZE) RGB, as are all pictures here."""
    return on_white(drawing(name, SIZE))


def moved(name: str, rng: np.random.Generator) -> Image.Image:
    """A little smaller or larger, at another place, so that some of it may be cut off."""
    return put(drawing(name, int(rng.integers(96, 140))), paper((255, 255, 255)), rng, 12)


def turned(name: str, rng: np.random.Generator) -> Image.Image:
    """Turned by 12 to 30 degrees either way, its hues shifted a little, on a pale colour."""
    size = int(rng.integers(100, 128))
    shown = rotated(drawing(name, size), rng, 12, 30)
    return put(hues(shown, float(rng.uniform(-0.06, 0.06))), paper(pale(rng)), rng, 8)


def outlined(name: str, rng: np.random.Generator) -> Image.Image:
    """Its outlines alone, black on white, at another place and size."""
    return put(drawing(name, int(rng.integers(100, 128)), "lines"), paper((255, 255, 255)), rng, 8)


def estranged(name: str, rng: np.random.Generator) -> Image.Image:
    """Mirrored, turned by 30 to 60 degrees, in wholly other hues, on stripes of two pale colours."""
    size = int(rng.integers(88, 116))
    shown = rotated(drawing(name, size).transpose(Image.Transpose.FLIP_LEFT_RIGHT), rng, 30, 60)
    stripes = np.array(paper(pale(rng)))
    across, width = int(rng.integers(2)), int(rng.integers(8, 17))
    odd = np.arange(SIZE) // width % 2 == 1
    stripes[(odd, slice(None)) if across else (slice(None), odd)] = pale(rng)
    return put(hues(shown, float(rng.uniform(0.25, 0.75))), Image.fromarray(stripes), rng, 8)


def rotated(shown: Image.Image, rng: np.random.Generator, least: float, most: float) -> Image.Image:
    """Turned by so many degrees either way, with room for its corners."""
    degrees = float(rng.choice((-1, 1)) * rng.uniform(least, most))
    return shown.rotate(degrees, Image.Resampling.BICUBIC, expand=True)


def pale(rng: np.random.Generator) -> tuple[int, int, int]:
    """A light colour of any hue."""
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.2, 0.45), 0.95))


def paper(colour: tuple[int, int, int]) -> Image.Image:
    """A picture of one colour."""
    return Image.new("RGB", (SIZE, SIZE), colour)


def put(shown: Image.Image, ground: Image.Image, rng: np.random.Generator, most: int) -> Image.Image:
    """``shown`` on the ``ground``, at most so many pixels beside its middle each way."""
    left, top = (np.array([SIZE - shown.width, SIZE - shown.height]) // 2 + rng.integers(-most, most + 1, 2)).tolist()
    ground.paste(shown, (left, top), shown)
    return ground


def hues(shown: Image.Image, shift: float) -> Image.Image:
    """All hues moved on by a share of the circle; black, white and gray stay, as does what is transparent."""
    hue, *rest = shown.convert("RGB").convert("HSV").split()
    hue = Image.fromarray((np.asarray(hue).astype(int) + round(256 * shift)).astype(np.uint8))
    moved_on = Image.merge("HSV", (hue, *rest)).convert("RGB")
    moved_on.putalpha(shown.getchannel("A"))
    return moved_on
