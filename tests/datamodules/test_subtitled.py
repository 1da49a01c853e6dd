"""TVQA, How2QA, TVC and YC2C, from small files in the layout of VALUE."""

import json
import shutil

import numpy as np
import pytest
import torch

from fulgurite.datamodules import subtitled
from fulgurite.datamodules.subtitled import time_of
from fulgurite.datamodules.tvc import Tvc, Yc2c
from fulgurite.datamodules.tvqa import How2Qa, Tvqa
from fulgurite.samples import DataError

SETS = {"tvqa": Tvqa, "how2qa": How2Qa, "tvc": Tvc, "yc2c": Yc2c}


@pytest.fixture
def own(video_root, tmp_path):
    """A copy of the files, to spoil."""
    return shutil.copytree(video_root, tmp_path / "video")


def edit(path, line, **changes):
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    rows[line - 1] |= changes
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if v is not ...}) + "\n" for row in rows))


@pytest.mark.parametrize("task", SETS)
def test_every_split_has_its_samples_with_64_frames(video_root, task):
    data = SETS[task](video_root, feature_width=8)
    trained = 16 if task in ("tvc", "yc2c") else 8
    assert [len(data.samples(split)) for split in ("train", "val", "test", "predict")] == [trained, 3, 3, 3]
    for split in ("train", "test"):
        for sample in data.samples(split):
            assert (sample.task, sample.domain) == (task, task)
            assert sample.features["clip_vitb32"].shape == (64, 8)
    assert data.info().tasks == (task,)


def test_a_question_is_written_out_with_subtitles_moment_and_choices(video_root):
    data = Tvqa(video_root, feature_width=8)
    sample = data.samples("train")[1]
    assert sample.question == (
        "[Subs] Line 0 of 1. Line 1 of 1. [Q] Why 1? [TS] (1.10-9.75) [Choices] "
        "a0: choice 0. a1: choice 1. a2: choice 2. a3: choice 3. a4: choice 4."
    )
    assert (sample.id, sample.answers, sample.speech) == ("1", {"a1": 1.0}, "Line 0 of 1. Line 1 of 1.")
    assert sample.options == tuple(f"choice {k}" for k in range(5))
    assert data.samples("train")[3].question.startswith("[Subs] [Q] Why 3?")  # of video 3 there are no subtitles
    assert data.samples("train")[3].speech is None
    assert data.info().answers == ("a0", "a1", "a2", "a3", "a4")
    assert all(s.answers == {} for s in data.samples("predict"))

    four = How2Qa(video_root, feature_width=8)
    assert four.samples("train")[1].question.endswith(
        "[Choices] a0: choice 0. a1: choice 1. a2: choice 2. a3: choice 3."
    )
    assert four.info().answers == ("a0", "a1", "a2", "a3")


def test_types_of_questions_are_kinds(own):
    edit(own / "ann/tvqa/tvqa_train.jsonl", 2, type="what")
    data = Tvqa(own)
    assert [s.kind for s in data.samples("train")[:2]] == [None, "what"]
    assert data.info().kinds == ("what",)


def test_captions_are_trained_one_by_one_and_judged_together(video_root):
    tvc, yc2c = Tvc(video_root, feature_width=8), Yc2c(video_root, feature_width=8)
    assert [(s.id, s.captions) for s in tvc.samples("train")[1:3]] == [
        ("clip0/1", ("Caption 1 of 0.",)),
        ("clip1/0", ("Caption 0 of 1.",)),
    ]
    assert [(s.id, s.captions) for s in tvc.samples("val")[1:2]] == [("clip1", ("Caption 0 of 1.", "Caption 1 of 1."))]
    assert tvc.samples("val")[1].question == "[Subs] Line 0 of 1. Line 1 of 1. [TS] (1.10-9.75)"
    assert yc2c.samples("val")[1].question == "[Subs] Line 0 of 1. Line 1 of 1."


def test_features_are_those_of_the_video_brought_to_the_frames_that_are_asked_for(video_root):
    data = Tvqa(video_root, feature_width=8, num_frames=50, features_name="own")
    with np.load(video_root / "vis_features/tv/clip-vit/tv0.npz") as stored:
        assert torch.equal(data.samples("train")[0].features["own"], torch.from_numpy(stored["features"]))
    with pytest.raises(DataError, match=r"expected \(rows, 512\)"):
        Tvqa(video_root).samples("train")[0].features["clip_vitb32"]


def test_video_files_can_stand_in_for_features(own, clips):
    clips(own / "clips", [f"tv{i}.mp4" for i in range(4)])
    data = Tvc(own, videos="clips")
    sample = data.samples("train")[0]
    assert (sample.video.path, len(sample.features)) == (own / "clips/tv0.mp4", 0)
    assert data.folders == [own, own / "clips"]


def test_files_are_those_that_are_named_and_it_is_said_how_many_have_subtitles(own, monkeypatch):
    told = []
    monkeypatch.setattr(subtitled, "rank_zero_info", told.append)
    said = [{"text": "Hello "}, {"text": " there."}]
    rows = [{"vid_name": "tv0", "sub": []}, {"vid_name": "tv1", "sub": said}]
    (own / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Tvqa(own, train="ann/tvqa/tvqa_val.jsonl", subtitles="said.jsonl", domain="mine")
    assert [(s.speech, s.domain) for s in data.samples("train")] == [
        (speech, "mine") for speech in (None, "Hello there.", None)
    ]
    assert told == ["mine train: 33.3% of 3 with subtitles"]
    assert data.samples("train")[0].question.startswith("[Subs] [Q]")
    assert data.folders == [own, own / "vis_features/tv/clip-vit"]


def test_videos_and_subtitles_are_read_once(video_root):
    data = Tvqa(video_root, feature_width=8)
    samples = data.samples("train")
    assert samples[0].features is samples[4].features  # of the same video
    assert samples[0].features is not samples[1].features
    assert data.spoken() is data.spoken()


def test_a_moment_is_a_text_or_two_numbers():
    assert [time_of({"ts": value}, "here") for value in (" 3.10-9.75 ", [3.1, 9])] == ["(3.10-9.75)", "(3.1-9)"]
    for value in ([3.1], " ", 5):
        with pytest.raises(DataError, match="here: the key 'ts' must be a stretch of time"):
            time_of({"ts": value}, "here")


@pytest.mark.parametrize(
    ("task", "changes", "said"),
    [
        ("tvqa", {"answer_idx": 5}, r"'answer_idx' must be 0 to 4, got 5"),
        ("tvqa", {"answer_idx": ...}, r"'answer_idx' .*--data\.predict"),
        ("tvqa", {"a3": ""}, r"the key 'a3'"),
        ("tvqa", {"q": 3}, r"the key 'q'"),
        ("tvqa", {"ts": None}, r"the key 'ts'"),
        ("tvqa", {"type": 3}, r"the key 'type'"),
        ("tvqa", {"vid_name": "none"}, r"no file none\.npz .*--data\.features"),
        ("tvqa", {"qid": 0}, r"the id '0' occurs twice"),
        ("tvc", {"descs": []}, r"the key 'descs'"),
        ("tvc", {"descs": ...}, r"the key 'descs' .*--data\.predict"),
        ("tvc", {"descs": [{"desc": " "}]}, r"the key 'desc'"),
        ("tvc", {"clip_id": ...}, r"the key 'clip_id'"),
    ],
)
def test_a_bad_record_is_one_clear_error_or_left_out(own, task, changes, said):
    file = {"tvqa": "tvqa_train.jsonl", "tvc": "tvc_train_release.jsonl"}[task]
    edit(own / "ann" / task / file, 3, **changes)
    with pytest.raises(DataError, match=said) as caught:
        SETS[task](own).samples("train")
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)
    data = SETS[task](own, on_bad="skip")
    assert len(data.samples("train")) == (7 if task == "tvqa" else 14)
    assert len(data.skipped) == 1


def test_missing_subtitles_are_named(own):
    (own / "ann/tv_subtitles.jsonl").unlink()
    with pytest.raises(DataError, match=r"tv_subtitles\.jsonl: cannot read .*--data\.subtitles"):
        Tvqa(own).samples("train")
    (own / "ann/tv_subtitles.jsonl").write_text('{"vid_name": "tv0", "sub": "text"}\n')
    with pytest.raises(DataError, match=r"tv_subtitles\.jsonl: another layout"):
        Tvqa(own).samples("train")
