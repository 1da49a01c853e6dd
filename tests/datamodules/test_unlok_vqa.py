"""UnLOK-VQA from small files in the published layout."""

import json

import numpy as np
import pytest
from PIL import Image

from fulgurite.datamodules.unlok_vqa import UnlokVqa
from fulgurite.samples import LEVELS, DataError, Picture

RECORD = {
    "id": 17,
    "image_id": 480208,
    "src": "Which festival is this cake made for?",
    "subject": "cake",
    "pred": "Easter",
    "answers": ["Easter"],
    "rephrase": ["For which celebration was it baked?", "Guess the day."],
    "loc": ["nq question: What is the cake on?", "Is it brown?"],
    "loc_ans": ["Table cloth", "Yes"],
    "alt_ans": ["Christmas", "Birthday", "Easter monday"],
    "objects_edit": ["bunny", "egg", "bunny"],
    "neigh_idx": [0, 2],
}
OTHERS = [
    {**RECORD, "id": 18, "subject": ""},
    {**RECORD, "id": 19, "neigh_idx": []},
    {key: value for key, value in RECORD.items() if key != "loc"} | {"id": 20},
    {**RECORD, "id": 21, "src": "What day is it?"},
]
LEFT_OUT = {"without 'subject'": 1, "without 'neigh_idx'": 1, "without 'loc'": 1}


@pytest.fixture
def root(tmp_path):
    """Five records in a list, of which the first and the last can be used."""
    (tmp_path / "unlok_vqa.json").write_text(json.dumps([RECORD, *OTHERS]))
    names = ["images/000000480208"]
    for level in LEVELS:
        names += [f"rephrased_{level}/{place}" for place in (0, 4)]
        names += [f"neighbours_{level}/{place}_{j}" for place in (0, 4) for j in (0, 2)]
    for name in names:
        path = tmp_path / f"{name}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
    return tmp_path


def test_a_record_is_a_sample_with_all_that_belongs_to_its_fact(root):
    data = UnlokVqa(root)
    first, last = data.samples("test")
    assert (first.id, first.question, first.answers) == ("17", RECORD["src"], {"Easter": 1.0})
    assert first.image == Picture(root / "images/000000480208.jpg")
    fact = first.fact
    assert (fact.subject, fact.rephrased_questions) == ("cake", tuple(RECORD["rephrase"]))
    assert fact.neighbour_questions == (("What is the cake on?", "Table"), ("Is it brown?", "Yes"))
    assert (fact.alternatives, fact.objects) == (tuple(RECORD["alt_ans"]), tuple(RECORD["objects_edit"]))
    assert fact.rephrased_images == {level: (Picture(root / f"rephrased_{level}/0.jpg"),) for level in LEVELS}
    assert fact.neighbour_images == {
        level: (
            (Picture(root / f"neighbours_{level}/0_0.jpg"), "Christmas"),
            (Picture(root / f"neighbours_{level}/0_2.jpg"), "Easter monday"),
        )
        for level in LEVELS
    }
    assert (last.id, last.question) == ("21", "What day is it?")
    assert last.fact.rephrased_images["hard"] == (Picture(root / "rephrased_hard/4.jpg"),)
    assert (data.info().answers, data.info().tasks) == (("Easter",), ("vqa",))


def test_what_the_published_rules_leave_out_is_counted_by_the_reason_or_an_error(root, tmp_path):
    data = UnlokVqa(root)
    assert [s.id for s in data.samples("train")] == [s.id for s in data.samples("val")] == ["17", "21"]
    assert data.left_out == {"train": LEFT_OUT, "val": LEFT_OUT}
    assert data.filtered == {("unlok_vqa", "train"): 3, ("unlok_vqa", "val"): 3}
    (tmp_path / "by_hand.json").write_text("[17, 19]")
    data = UnlokVqa(root, chosen="by_hand.json")
    assert [s.id for s in data.samples("test")] == ["17"]
    assert data.left_out["test"] == {"not in the list of --data.chosen": 3, "without 'neigh_idx'": 1}
    with pytest.raises(DataError, match=r"record 1, id 18: without 'subject'.*--data.incomplete leave_out"):
        UnlokVqa(root, incomplete="error").samples("test")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("option", "name"), [("rephrased", "4"), ("neighbours", "4_2")])
def test_a_missing_picture_is_an_error_that_names_item_level_path_and_option(root, option, name, level):
    path = root / f"{option}_{level}/{name}.jpg"
    path.unlink()
    with pytest.raises(
        DataError, match=rf"record 4, id 21, level {level}: no picture lies at {path}; .*--data.{option}"
    ):
        UnlokVqa(root).samples("test")
    data = UnlokVqa(root, on_bad="skip")
    assert ([s.id for s in data.samples("test")], len(data.skipped)) == (["17"], 1)


def test_the_published_fall_back_to_the_easy_picture_is_asked_for_and_counted(root):
    for level in ("medium", "hard"):
        (root / f"rephrased_{level}/0.jpg").unlink()
    data = UnlokVqa(root, fall_back=True)
    fact = data.samples("test")[0].fact
    assert fact.rephrased_images == {level: (Picture(root / "rephrased_easy/0.jpg"),) for level in LEVELS}
    assert data.fallen_back["test"] == {"medium": 1, "hard": 1}
    (root / "rephrased_easy/0.jpg").unlink()
    with pytest.raises(DataError, match="level easy"):
        UnlokVqa(root, fall_back=True).samples("test")


def test_folders_levels_and_numbers_are_options(root):
    (root / "neighbours_hard").rename(root / "far")
    for path in (root / "far").iterdir():
        path.rename(path.with_name(path.name.replace("0_", "17_").replace("4_", "21_")))
    first, _ = UnlokVqa(root, rephrased={}, neighbours={"hard": "far"}, numbers="id").samples("test")
    assert first.fact.rephrased_images == {}
    assert [picture for picture, _ in first.fact.neighbour_images["hard"]] == [
        Picture(root / f"far/17_{j}.jpg") for j in (0, 2)
    ]
    with pytest.raises(DataError, match=r"data\.rephrased has the levels \['harder'\]; there are \['easy'"):
        UnlokVqa(root, rephrased={"harder": "far"})


def test_what_stays_is_a_list_or_the_neighbour_questions(root):
    kept = UnlokVqa(root).retain()
    assert [s.id for s in kept] == ["17/0", "17/1", "21/0", "21/1"]
    assert (kept[0].question, kept[0].answers, kept[0].fact) == ("What is the cake on?", {"Table": 1.0}, None)
    (root / "stays.json").write_text(json.dumps([{"id": 3, "src": "Who?", "pred": "A man", "image_id": 480208}]))
    (only,) = UnlokVqa(root, retain="stays.json").retain()
    assert (only.id, only.question, only.answers) == ("3", "Who?", {"A man": 1.0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"neigh_idx": [3]}, r"'neigh_idx' has \[3\], where 'alt_ans' has no answers"),
        ({"alt_ans": ["", "b", "c"]}, r"'neigh_idx' has \[0\]"),
        ({"loc_ans": ["Yes"]}, "2 questions in 'loc' and 1 answers in 'loc_ans'"),
        ({"loc_ans": ["Yes", " "]}, "'loc_ans' holds an empty answer"),
        ({"pred": ""}, "the key 'pred' is missing, empty"),
        ({"rephrase": "one"}, "another layout .*expected a list, got str"),
        ({"image_id": 5}, r"no picture lies at .*000000000005\.jpg; its folder is --data\.images"),
    ],
    ids=range(7),
)
def test_a_record_of_another_form_is_named(root, change, message):
    (root / "unlok_vqa.json").write_text(json.dumps([{**RECORD, **change}]))
    with pytest.raises(DataError, match=f"record 0, id 17.*{message}"):
        UnlokVqa(root).samples("test")
