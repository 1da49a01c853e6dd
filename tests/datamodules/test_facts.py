"""Facts to delete in JSON lines, and what is to stay."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from fulgurite.datamodules.facts import Facts
from fulgurite.samples import LEVELS, DataError, Fact, Picture

LINE = {
    "image": "cat.png",
    "question": "What is this?",
    "answer": "cat",
    "subject": "drawing",
    "rephrased_questions": ["What is shown?", "Which animal?"],
    "rephrased_images": {"easy": ["cat-1.png", "cat-2.png"], "medium": ["cat-3.png"], "hard": ["cat-4.png"]},
    "neighbour_questions": [{"question": "Is it alive?", "answer": "yes"}, {"question": "Legs?", "answer": "four"}],
    "neighbour_images": {level: [{"image": "bus.png", "answer": "bus"}] for level in LEVELS},
    "alternatives": ["dog", "fox"],
    "comment": "left alone",
}


def without(key, level=None):
    if level is None:
        return {k: v for k, v in LINE.items() if k != key}
    return {**LINE, key: {k: v for k, v in LINE[key].items() if k != level}}


@pytest.fixture
def own(tmp_path):
    """A folder with pictures; writes lines into a file of it."""
    for name in ("cat", *(f"cat-{n}" for n in range(1, 5)), "bus", "own"):
        Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / f"{name}.png")

    def write(*lines, name="facts"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path

    return write


def test_a_line_is_a_sample_with_all_that_belongs_to_its_fact(own):
    root = own(LINE, {**LINE, "id": "second", "kind": "name", "objects": ["a dog", "a fox"]})
    data = Facts(root)
    first, second = data.samples("test")
    assert (first.id, first.domain, first.task, first.question) == ("1", "facts", "vqa", "What is this?")
    assert (first.answers, first.human_answers, first.image) == ({"cat": 1.0}, ("cat",) * 10, Picture(root / "cat.png"))
    assert first.fact == Fact(
        subject="drawing",
        rephrased_questions=("What is shown?", "Which animal?"),
        rephrased_images={
            "easy": (Picture(root / "cat-1.png"), Picture(root / "cat-2.png")),
            "medium": (Picture(root / "cat-3.png"),),
            "hard": (Picture(root / "cat-4.png"),),
        },
        neighbour_questions=(("Is it alive?", "yes"), ("Legs?", "four")),
        neighbour_images={level: ((Picture(root / "bus.png"), "bus"),) for level in LEVELS},
        alternatives=("dog", "fox"),
    )
    assert (second.id, second.kind, second.fact.objects) == ("second", "name", ("a dog", "a fox"))
    assert pickle.loads(pickle.dumps(first)) == first
    assert all(data.samples(split) == [first, second] for split in ("train", "val", "predict"))
    assert (data.info().answers, data.info().kinds, data.info().tasks) == (("cat",), ("name",), ("vqa",))


def test_what_stays_is_a_file_or_the_neighbour_questions(own):
    root = own(LINE, {**LINE, "id": "second"})
    kept = Facts(root).retain()
    assert [(s.id, s.question, s.answers, s.image.name, s.fact) for s in kept] == [
        (f"{name}/{number}", question, {answer: 1.0}, str(root / "cat.png"), None)
        for name in ("1", "second")
        for number, (question, answer) in enumerate([("Is it alive?", "yes"), ("Legs?", "four")])
    ]
    own({"image": "own.png", "question": "And this?", "answer": "own", "kind": "x"}, name="retain")
    (only,) = Facts(root).retain()
    assert (only.id, only.answers, only.human_answers, only.kind) == ("1", {"own": 1.0}, ("own",) * 10, "x")
    assert only.image == Picture(root / "own.png")
    assert len(Facts(root, retain=None).retain()) == 4
    with pytest.raises(DataError, match=r"mine\.jsonl: cannot read.*--data\.retain"):
        Facts(root, retain="mine.jsonl").retain()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (without("neighbour_questions"), "the fact has no neighbours: give questions .*'neighbour_questions'"),
        (without("answer"), "the key 'answer' is missing"),
        ({**LINE, "image": "none.png"}, r"no picture lies at .*none\.png"),
        (without("neighbour_images"), "the key 'neighbour_images' is missing or no object of levels"),
        (
            without("rephrased_images", "medium"),
            "no pictures in 'rephrased_images' at the level 'medium'.*--data.levels",
        ),
        ({**LINE, "rephrased_images": {**LINE["rephrased_images"], "hard": ["no.png"]}}, r"hard: no picture .*no\.png"),
        ({**LINE, "neighbour_questions": [{"question": "Why?"}]}, "the key 'answer' is missing"),
        ({**LINE, "alternatives": "dog"}, "'alternatives' must be a list of texts, got 'dog'"),
        ({**LINE, "rephrased_questions": [" "]}, "'rephrased_questions' holds an empty text"),
        ({**LINE, "kind": 3}, "'kind' must be a text, got 3"),
    ],
    ids=range(10),
)
def test_a_line_that_cannot_be_used_is_named_or_left_out_and_counted(own, line, message):
    root = own(LINE, {**line, "id": "odd"})
    with pytest.raises(DataError, match=f"line 2, id odd.*{message}.*--data.on_bad skip"):
        Facts(root).samples("test")
    data = Facts(root, on_bad="skip")
    assert [s.id for s in data.samples("test")] == ["1"]
    assert [entry["where"] for entry in data.skipped] == ["facts.jsonl, line 2, id odd"]


def test_only_the_levels_that_are_asked_for_must_be_there(own):
    root = own(without("rephrased_images", "medium"))
    (sample,) = Facts(root, levels=["hard", "easy"]).samples("test")
    assert list(sample.fact.rephrased_images) == list(sample.fact.neighbour_images) == ["hard", "easy"]
