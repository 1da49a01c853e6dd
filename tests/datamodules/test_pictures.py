import collections
import json

import pytest
import torch

from fulgurite.datamodules.pictures import THROUGHOUT, TYPEFACES, VIDEOS, Pictures
from fulgurite.datamodules.unlabelled import UnlabelledTasks
from fulgurite.datamodules.worlds import clips_folder
from fulgurite.samples import Video, sample_fields

SPLITS = ("train", "val", "test")


class Whole:
    needs = ("image",)

    def __call__(self, samples):
        return sample_fields(samples)


@pytest.fixture(scope="module")
def sets():
    return {name: Pictures(name) for name in ("grid", "letters")}


@pytest.mark.parametrize("name", ["grid", "letters"])
def test_pictures_are_labelled_and_no_two_are_one(name, sets):
    data = sets[name]
    assert data.info().domains == (name,)
    for split in SPLITS:
        samples = data.samples(split)
        assert {label for s in samples for label in s.answers} == set(data.info().answers)
        assert len({s.id for s in samples}) == len(samples) > 50
        assert all(s.image.dtype == torch.uint8 and s.image.shape[0] == 3 and s.domain == name for s in samples)


def test_a_video_gives_its_pictures_with_its_answer(sets):
    path = clips_folder() / "grid" / "test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    row = next(row for row in rows if row["question"] == "Which object is in the room?")
    samples = [s for s in sets["grid"].samples("test") if s.id.startswith(row["video"].split("/")[1].split(".")[0])]
    assert [dict(s.answers) for s in samples] == [{row["answer"]: 1.0}] * 4
    frames = Video(clips_folder() / "grid" / row["video"]).frames(THROUGHOUT)
    assert all(torch.equal(sample.image, frame) for sample, frame in zip(samples, frames))


@pytest.mark.parametrize("name", sorted(VIDEOS))
def test_splits_share_no_video_and_every_label_is_trained(name):
    data = Pictures(name)
    source = clips_folder() / VIDEOS[name].world
    files = {split: {json.loads(line)["video"] for line in (source / f"{split}.jsonl").open()} for split in SPLITS}
    assert not files["train"] & files["test"]
    assert not files["val"] & (files["train"] | files["test"])
    assert all(data.num_clips(split) > 15 for split in SPLITS)
    assert 3 <= len(data.info().answers) <= 11


def test_splits_share_no_typeface_and_letters_come_once_a_case(sets):
    faces = [face for split in SPLITS for face in TYPEFACES[split]]
    assert len(set(faces)) == len(faces)
    counts = collections.Counter(next(iter(s.answers)) for s in sets["letters"].samples("val"))
    assert set(counts.values()) == {2 * len(TYPEFACES["val"])}


def test_letters_are_drawn_the_same_every_time_and_differ(sets):
    again = Pictures("letters").samples("val")
    for a, b in zip(again, sets["letters"].samples("val"), strict=True):
        assert torch.equal(a.image, b.image)
    assert not torch.equal(again[0].image, again[1].image)


def test_every_letter_has_ink(sets):
    for split in SPLITS:
        for sample in sets["letters"].samples(split):
            flat = sample.image.flatten(1).float()
            share = (flat - flat[:, :1]).abs().sum(0).gt(60).float().mean()
            assert 0.01 < share < 0.5, sample.id


def test_unlabelled_tasks_show_a_batch_of_each_without_answers():
    data = UnlabelledTasks([Pictures("grid"), Pictures("letters")], adapt_to="val", batch_size=16)
    data.attach(Whole())
    loaders = data.train_dataloader()
    assert list(loaders) == ["grid", "letters"]
    for name, loader in loaders.items():
        seen = [row for batch in loader for row in zip(batch["id"], batch["domain"], batch["answers"])]
        assert {(domain, len(answers)) for _, domain, answers in seen} == {(name, 0)}
        assert sorted(each for each, _, _ in seen) == sorted(f"{name}/{s.id}" for s in Pictures(name).samples("val"))
    (stage,) = data.stages()
    assert stage.num_batches == max(map(len, loaders.values()))
    labelled = data.samples("test")
    assert all(sample.answers for sample in labelled)
    assert {sample.domain for sample in labelled} == {"grid", "letters"}
