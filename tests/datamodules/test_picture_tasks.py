"""VQAv2, GQA, NLVR2 and COCO captions, from small files in the layout of VL-T5."""

import json
import pickle
import shutil

import h5py
import pytest
import torch

from fulgurite.datamodules.coco_captions import CocoCaptions
from fulgurite.datamodules.gqa import Gqa
from fulgurite.datamodules.nlvr2 import Nlvr2
from fulgurite.datamodules.vqa_v2 import VqaV2
from fulgurite.samples import DataError, pixels_of

SETS = {"vqa": VqaV2, "gqa": Gqa, "nlvr2": Nlvr2, "caption": CocoCaptions}
SIZES = {
    "vqa": {"train": 8, "val": 5, "test": 5, "predict": 3},
    "gqa": {"train": 12, "val": 6, "test": 6, "predict": 3},
    "nlvr2": {"train": 4, "val": 4, "test": 4, "predict": 4},
    "caption": {"train": 4, "val": 2, "test": 2, "predict": 2},
}


@pytest.fixture
def own(picture_root, tmp_path):
    """A copy of the files, to spoil."""
    return shutil.copytree(picture_root, tmp_path / "datasets")


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("task", SETS)
def test_every_split_has_its_samples_with_their_task_and_media(picture_root, task):
    data = SETS[task](picture_root, feature_width=8)
    assert {split: len(data.samples(split)) for split in SIZES[task]} == SIZES[task]
    for split in SIZES[task]:
        for sample in data.samples(split):
            assert (sample.task, sample.domain, sample.image, sample.images) == (task, data.usual_name, None, ())
            assert sample.features["clip_rn101"].shape == (49 * sample.num_images, 8)
    assert data.info().tasks == (task,)
    assert pickle.loads(pickle.dumps(data.samples("train")))[0].has("features.clip_rn101")


def test_a_question_of_vqa_has_scores_and_what_ten_people_said(picture_root):
    data = VqaV2(picture_root, feature_width=8)
    trained, judged, asked = (data.samples(split)[1] for split in ("train", "test", "predict"))
    assert (trained.id, trained.question, trained.kind) == ("10", "What colour is bus 1?", "number")
    assert trained.answers == {"red": 1.0, "maroon": 0.3}
    assert trained.human_answers == asked.human_answers == ()
    assert judged.human_answers == ("red",) * 9 + ("maroon",)
    assert asked.answers == {}
    file = picture_root / "COCO/clip_features/data_clip_RN101_att/COCO_val2014_000000000001.h5"
    with h5py.File(file) as stored:
        expected = torch.from_numpy(stored["COCO_val2014_000000000001/features"][...])
    assert torch.equal(trained.features["clip_rn101"], expected)
    assert data.info().kinds == ("yes/no", "number", "other")


def test_a_question_of_vqa_that_people_disagree_on_has_an_empty_answer_that_counts_nothing(own):
    for split in ("train", "test"):
        edit(own / f"vqa/karpathy_{split}.json", lambda records: records[1].update(label={}))
    data = VqaV2(own, feature_width=8)
    assert data.samples("train")[1].answers == {"": 0.0}
    assert data.samples("test")[1].answers == {}


def test_what_people_said_comes_from_the_annotations_where_records_lack_it(own):
    def strip(records):
        for record in records:
            del record["answers"], record["answer_type"]

    edit(own / "vqa/karpathy_test.json", strip)
    with pytest.raises(DataError, match=r"karpathy_test.json, record 1: neither .*question 0; set --data.annotations"):
        VqaV2(own).samples("test")
    said = [{"question_id": 10 * i, "answers": [{"answer": f"it is {i}"}], "answer_type": "other"} for i in range(5)]
    (own / "vqa/v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": said}))
    samples = VqaV2(own).samples("test")
    assert [(s.human_answers, s.kind) for s in samples] == [((f"it is {i}",), "other") for i in range(5)]
    with pytest.raises(DataError, match=r"none\.json: cannot read"):
        VqaV2(own, annotations=["none.json"]).samples("test")


def test_gqa_trains_on_both_files_and_warns_that_it_validates_on_the_test(picture_root):
    data = Gqa(picture_root, feature_width=8)
    with pytest.warns(UserWarning, match="validation is on the test questions"):
        assert [s.id for s in data.samples("val")] == [s.id for s in data.samples("test")]
    apart = Gqa(picture_root, train=["GQA/train.json"], val=["GQA/valid.json"], feature_width=8)
    ids = [[s.id for s in apart.samples(split)] for split in ("train", "val")]
    assert ids[0] + ids[1] == [s.id for s in data.samples("train")]
    assert data.samples("train")[0].answers == {"yes": 1.0}


def test_a_sentence_of_nlvr2_has_both_pictures_one_after_the_other(picture_root):
    stored, raw = Nlvr2(picture_root, feature_width=8), Nlvr2(picture_root, images=["nlvr/images"])
    sample = stored.samples("val")[1]
    assert (sample.id, sample.num_images, sample.answers) == ("nlvr2_valid_1", 2, {"true": 1.0})
    assert stored.samples("val")[0].answers == {"false": 1.0}
    for half, name in zip(sample.features["clip_rn101"].split(49), ("dev-1-0-img0", "dev-1-0-img1")):
        with h5py.File(picture_root / f"nlvr/clip_features/data_clip_RN101_att/{name}.h5") as file:
            assert torch.equal(half, torch.from_numpy(file[f"{name}/features"][...]))
    sample = raw.samples("val")[1]
    assert [image.path.name for image in sample.images] == ["dev-1-0-img0.png", "dev-1-0-img1.png"]
    assert (sample.image, dict(sample.features)) == (None, {})
    assert pixels_of(sample.images[1]).shape == (3, 32, 32)
    assert stored.info().answers == ("false", "true")


def test_captions_are_trained_one_by_one_and_judged_together(picture_root):
    data = CocoCaptions(picture_root, images=["COCO/images"], features=["COCO/clip_features/data_clip_RN101_att"])
    train, test = data.samples("train"), data.samples("test")
    assert [(s.id, s.captions) for s in train[1:3]] == [
        ("COCO_val2014_000000000000/1", ("Picture 0 in sentence 1.",)),
        ("COCO_val2014_000000000001/0", ("Picture 1 in sentence 0.",)),
    ]
    assert [(s.id, s.captions) for s in test[:1]] == [
        ("COCO_val2014_000000000004", ("Picture 4 in sentence 0.", "Picture 4 in sentence 1."))
    ]
    assert {s.question for s in train + test} == {""}
    assert test[0].image.path.name == "COCO_val2014_000000000004.png"
    assert test[0].has("features.clip_rn101")


@pytest.mark.parametrize(
    ("task", "file", "change", "said"),
    [
        ("vqa", "vqa/karpathy_train.json", lambda r: r[1].pop("question_id"), r"record 2: the key 'question_id'"),
        ("vqa", "vqa/karpathy_train.json", lambda r: r[1].update(sent=" "), r"record 2: the key 'sent'"),
        ("vqa", "vqa/karpathy_train.json", lambda r: r[1].pop("label"), r"record 2: the key 'label'"),
        ("vqa", "vqa/karpathy_train.json", lambda r: r[1].update(label=["red"]), r"record 2: the key 'label'"),
        ("vqa", "vqa/karpathy_train.json", lambda r: r[1].update(label={"red": 3}), r"record 2: .*'red': 3"),
        ("vqa", "vqa/karpathy_train.json", lambda r: r[1].update(answer_type=5), r"record 2: 'answer_type'"),
        ("vqa", "vqa/karpathy_train.json", lambda r: r.insert(1, 5), r"record 2: expected an object"),
        ("gqa", "GQA/train.json", lambda r: r[1].update(img_id="none"), r"record 2: no file none.h5 .*--data.features"),
        ("gqa", "GQA/train.json", lambda r: r[1].pop("label"), r"record 2: the key 'label'"),
        ("gqa", "GQA/train.json", lambda r: r[1].update(question_id="train1000"), r"the id 'train1000' occurs twice"),
        (
            "nlvr2",
            "nlvr/train.json",
            lambda r: r[1].update(label=2),
            r"record 2: the key 'label' must be 0 or 1, got 2",
        ),
        ("nlvr2", "nlvr/train.json", lambda r: r[1].pop("img1"), r"record 2: the key 'img1'"),
        ("caption", "COCO/dataset_coco.json", lambda c: c["images"][1].update(sentences=[]), r"picture 2: 'sentences'"),
        (
            "caption",
            "COCO/dataset_coco.json",
            lambda c: c["images"][1]["sentences"][0].pop("raw"),
            r"picture 2: .*'raw'",
        ),
    ],
)
def test_a_bad_record_is_one_clear_error_or_left_out(own, task, file, change, said):
    edit(own / file, change)
    with pytest.raises(DataError, match=said) as caught:
        SETS[task](own).samples("train")
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)
    data = SETS[task](own, on_bad="skip")
    left = {"caption": 2, "vqa": 8 if "expected" in said else 7, "gqa": 11, "nlvr2": 3}[task]
    assert len(data.samples("train")) == left
    assert len(data.skipped) == 1


def test_files_of_another_layout_are_named(own):
    (own / "GQA/train.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match=r"GQA/train.json: another layout"):
        Gqa(own).samples("train")
    edit(own / "COCO/dataset_coco.json", lambda c: c["images"][2].update(split="extra"))
    with pytest.raises(DataError, match=r"picture 3: split 'extra' is none of"):
        CocoCaptions(own).samples("train")
    with pytest.raises(DataError, match=r"data\.features.*data\.images"):
        Gqa(own, features=[])
    with pytest.raises(DataError, match=r"other: cannot list the folder.*--data\.features"):
        Gqa(own, features=["other"]).samples("test")
    with pytest.raises(DataError, match=r"--data\.root"):
        VqaV2(own / "elsewhere").samples("train")
