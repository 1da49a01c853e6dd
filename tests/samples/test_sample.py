"""The fields of a sample, and what of them every batch carries."""

import torch

from fulgurite.samples import Sample, sample_fields


def test_a_field_is_filled_where_it_holds_something():
    pair = Sample(
        "0", "d", question="", text_pair="b", images=(torch.zeros(3, 1, 1),), features={"clip": torch.ones(2)}
    )
    for need in ("question", "text_pair", "images", "features.clip", "image|images"):
        assert pair.has(need)
    for need in ("image", "captions", "human_answers", "features.other", "video|captions"):
        assert not pair.has(need)


def test_a_batch_says_what_its_samples_are_judged_by():
    samples = [
        Sample("0", "a", "vqa", answers={"red": 0.3}, human_answers=("red", "blue")),
        Sample("1", "b", "caption", captions=("one", "two"), counted=False),
    ]
    batch = sample_fields(samples)
    assert batch["task"] == ["vqa", "caption"]
    assert batch["answers"] == [{"red": 0.3}, {}]
    assert batch["human_answers"] == [("red", "blue"), ()]
    assert batch["captions"] == [(), ("one", "two")]
    assert batch["counted"].tolist() == [True, False]
