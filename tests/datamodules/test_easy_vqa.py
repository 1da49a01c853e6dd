"""easy-VQA out of a package of the same layout, and out of the installed one where there is."""

import importlib.util
import json
import sys

import numpy as np
import pytest
from PIL import Image

from fulgurite.datamodules.easy_vqa import EasyVqa
from fulgurite.samples import DataError, pixels_of


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package ``easy_vqa`` with ten pictures to train on and two to test, three questions about each."""
    rng = np.random.default_rng(0)
    for part, size in (("train", 10), ("test", 2)):
        folder = tmp_path / "easy_vqa/data" / part
        (folder / "images").mkdir(parents=True)
        rows = []
        for i in range(size):
            Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"images/{i}.png")
            rows += [
                ["what shape is in the image?", "circle", i],
                ["what color is it?", "teal", i],
                ["is it?", "no", i],
            ]
        (folder / "questions.json").write_text(json.dumps(rows))
    (tmp_path / "easy_vqa/__init__.py").write_text("raise RuntimeError('the package is not to be imported')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    return tmp_path / "easy_vqa"


def test_questions_of_a_picture_stay_together(package):
    data = EasyVqa(held_out=0.2)
    train, val, test = (data.samples(split) for split in ("train", "val", "test"))
    assert [len(train), len(val), len(test)] == [24, 6, 6]
    pictures = [{s.image.path for s in samples} for samples in (train, val)]
    assert pictures[0].isdisjoint(pictures[1])
    sample = test[1]
    assert (sample.task, sample.question, sample.answers, sample.kind) == (
        "vqa",
        "what color is it?",
        {"teal": 1.0},
        "colour",
    )
    assert sample.human_answers == ("teal",) * 10
    assert [s.kind for s in test[::2]] == ["shape", "yes/no", "colour"]
    assert pixels_of(sample.image).shape == (3, 64, 64)
    assert len(data.info().answers) == 13


def test_what_is_missing_or_of_another_form_is_named(package, monkeypatch):
    (package / "data/test/questions.json").write_text('[["q", "purple", 0]]')
    with pytest.raises(DataError, match=r"question 0: the answer 'purple'"):
        EasyVqa().samples("test")
    (package / "data/test/questions.json").write_text('{"q": 1}')
    with pytest.raises(DataError, match=r"another layout"):
        EasyVqa().samples("test")
    with pytest.raises(DataError, match=r"data\.held_out=1\.5"):
        EasyVqa(held_out=1.5)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install easy-vqa==1\.0"):
        EasyVqa().samples("train")


@pytest.mark.skipif(importlib.util.find_spec("easy_vqa") is None, reason="easy-vqa is not installed")
def test_the_installed_package_has_its_published_sizes():
    data = EasyVqa()
    assert len(data.samples("train")) + len(data.samples("val")) == 38575
    assert len(data.samples("test")) == 9673
    assert {len({s.image.path for s in data.samples(split)}) for split in ("val",)} == {400}
    assert set(data.info().answers) == {answer for s in data.samples("test") for answer in s.answers}
