"""Make the default videos anew: ``generate(Path("out"))``.

Every split of every domain draws from its own random stream, and from its own characters, maps or world seeds, so
one domain can be made without the others and gives the same clips.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from fulgurite.datamodules.worlds import DOMAINS, SPLITS, crafter, doom, emoji, grid
from fulgurite.datamodules.worlds.clip import Clip
from fulgurite.datamodules.worlds.encode import write_video

# Clips per (train, val, test).
SIZES = {
    "doom": (140, 32, 52),
    "emoji_scenes": (140, 28, 72),
    "grid": (120, 24, 40),
    "emoji_stories": (145, 30, 75),
    "crafter": (120, 24, 40),
}
WORLDS: dict[str, Callable[[str, str, np.random.Generator], Iterator[Clip]]] = {
    "doom": doom.clips,
    "emoji_scenes": emoji.clips,
    "grid": grid.clips,
    "emoji_stories": emoji.clips,
    "crafter": crafter.clips,
}


def generate(out: Path, domains: Sequence[str] = DOMAINS, seed: int = 0) -> None:
    """Write videos and questions of ``domains`` below ``out`` in the layout of `clips_folder`.

    Args:
        out: folder; files of the same name are replaced.
        domains: names out of `DOMAINS`.
        seed: another seed gives other clips from the same characters, maps and world seeds.

    Raises:
        ValueError: an unknown domain.
        ImportError: a simulator is not installed (``pip install 'fulgurite[worlds]'``).
    """
    if unknown := set(domains) - set(DOMAINS):
        raise ValueError(f"no world named {sorted(unknown)}; domains= takes names out of {DOMAINS}")
    for domain in domains:
        (out / domain / "videos").mkdir(parents=True, exist_ok=True)
        seen: set[bytes] = set()
        for split, size in zip(SPLITS, SIZES[domain]):
            rng = np.random.default_rng([seed, zlib.crc32(f"{domain}/{split}".encode())])
            lines = []
            for number, clip in enumerate(islice(unseen(WORLDS[domain](domain, split, rng), seen), size)):
                name = f"{split}-{number:03d}"
                video = f"videos/{name}.mp4"
                write_video(out / domain / video, clip.frames)
                for index, (question, answer, kind) in enumerate(clip.questions):
                    line = {
                        "id": f"{domain}-{name}-{index}",
                        "video": video,
                        "question": question,
                        "answer": answer,
                        "kind": kind,
                    }
                    lines.append(json.dumps(line))
            (out / domain / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def unseen(clips: Iterator[Clip], seen: set[bytes]) -> Iterator[Clip]:
    """Drop clips whose frames are in ``seen`` to the last pixel; add the others to it."""
    for clip in clips:
        digest = hashlib.sha256(clip.frames.tobytes()).digest()
        if digest not in seen:
            seen.add(digest)
            yield clip
