"""The published sets of video-text retrieval, from small files in their official layouts."""

import json
import pickle
import random

import pytest

from fulgurite.datamodules.activity_net import ActivityNet
from fulgurite.datamodules.didemo import Didemo
from fulgurite.datamodules.lsmdc import Lsmdc
from fulgurite.datamodules.msr_vtt import MsrVtt
from fulgurite.datamodules.msvd import Msvd
from fulgurite.datamodules.vatex import Vatex
from fulgurite.samples import DataError
from fulgurite.samples.sampling import FrameSampling

TRAIN = [f"t{i}" for i in range(12)]
TEST = ["z", "y", "x"]
MIXED = [".mp4", ".avi", ".webm"]


def lines(path, names):
    path.write_text("".join(f"{name}\n" for name in names))


def write_json(path, content):
    path.write_text(json.dumps(content))


def said(samples):
    return [(s.id, s.captions) for s in samples]


@pytest.fixture
def root(tmp_path, clips):
    """Videos of three kinds, in a folder and below it."""
    names = [*TRAIN, *TEST, "v"]
    clips(tmp_path / "videos", [f"{'film/' * (i % 2)}{name}{MIXED[i % 3]}" for i, name in enumerate(names)])
    return tmp_path


@pytest.fixture
def msr_vtt(root):
    (root / "MSRVTT_train.9k.csv").write_text("video_id\n" + "\n".join(TRAIN) + "\n")
    (root / "MSRVTT_train.7k.csv").write_text("video_id\n" + "\n".join(TRAIN[:10]) + "\n")
    rows = [f'ret{i},msr{i},{name},"{name}, of a test"' for i, name in enumerate(TEST)]
    (root / "MSRVTT_JSFUSION_test.csv").write_text("key,vid_key,video_id,sentence\n" + "\n".join(rows) + "\n")
    sentences = [{"video_id": name, "caption": f"{k} of {name}", "sen_id": 0} for k in range(3) for name in TRAIN[::-1]]
    write_json(root / "MSRVTT_data.json", {"videos": [], "sentences": sentences})
    return root


def test_msr_vtt(msr_vtt):
    data = MsrVtt(msr_vtt, validation="test")
    expected = [(f"{name}/{k}", (f"{k} of {name}",)) for name in TRAIN for k in range(3)]
    assert said(data.samples("train")) == expected
    assert said(data.samples("test")) == [(name, (f"{name}, of a test",)) for name in TEST]
    assert said(data.samples("predict")) == said(data.samples("test"))
    assert data.info().domains == ("msr_vtt",)
    assert data.samples("test")[0].video.seconds is None
    assert len(MsrVtt(msr_vtt, "7k", validation="test").samples("train")) == 30
    assert MsrVtt(msr_vtt, domain="mine").info().domains == ("mine",)


def test_validation_on_held_out_videos_unless_asked_for_the_test(msr_vtt):
    data = MsrVtt(msr_vtt, held_out=0.25)
    with pytest.warns(UserWarning, match=r"3 of 12 training videos are held out.*--data\.validation test"):
        val = data.samples("val")
    train = data.samples("train")
    assert (len(val), len(train)) == (3, 27)
    assert {s.video for s in val}.isdisjoint(s.video for s in train)
    assert {s.video for s in val} | {s.video for s in train} == {
        s.video for s in MsrVtt(msr_vtt, validation="test").samples("train")
    }
    assert all(len(s.captions) == 3 for s in val)
    assert {s.id for s in val} == set(random.Random(0).sample(sorted(TRAIN), 3))  # the same in every process
    again = MsrVtt(msr_vtt, held_out=0.25, seed=5)
    assert said(again.samples("val")) == said(val)
    others = {tuple(s.id for s in MsrVtt(msr_vtt, held_out=0.25, held_out_seed=k).samples("val")) for k in range(8)}
    assert len(others) > 2
    published = MsrVtt(msr_vtt, validation="test")
    with pytest.warns(UserWarning, match=r"validation is on the test videos, as published"):
        assert said(published.samples("val")) == said(published.samples("test"))
    for share in (0, 1):
        with pytest.raises(DataError, match=r"data\.held_out=\d must be a share"):
            MsrVtt(msr_vtt, held_out=share)


def test_a_missing_video_and_one_without_captions(msr_vtt):
    (msr_vtt / "videos" / "t3.mp4").unlink(missing_ok=True)
    (msr_vtt / "videos" / "film" / "t3.mp4").unlink(missing_ok=True)
    with open(msr_vtt / "MSRVTT_train.9k.csv", "a") as file:
        file.write("v\n")
    with pytest.raises(DataError, match=r"9k\.csv, line 5: no file of the video 't3' below .*set --data\.videos"):
        MsrVtt(msr_vtt, validation="test").samples("train")
    data = MsrVtt(msr_vtt, validation="test", on_bad="skip")
    assert len(data.samples("train")) == 33
    assert [entry["where"] for entry in data.skipped] == ["MSRVTT_train.9k.csv, line 5", "MSRVTT_train.9k.csv, line 14"]
    assert "no caption is given for the video 'v'" in data.skipped[1]["reason"]
    held = MsrVtt(msr_vtt, on_bad="skip", held_out=0.5)
    held.samples("train"), held.samples("val")
    assert sorted(entry["where"] for entry in held.skipped) == sorted(entry["where"] for entry in data.skipped)


def test_two_files_of_one_video(msr_vtt, clips):
    clips(msr_vtt / "videos", ["y.mkv"])
    with pytest.raises(DataError, match=r"line 3: 2 files are the video 'y'"):
        MsrVtt(msr_vtt).samples("test")


def test_other_layouts_and_missing_files_are_named(msr_vtt):
    write_json(msr_vtt / "MSRVTT_data.json", {"sentences": [{"video": "t0"}]})
    with pytest.raises(DataError, match=r"MSRVTT_data\.json: another layout than .*KeyError: 'video_id'"):
        MsrVtt(msr_vtt).samples("train")
    (msr_vtt / "MSRVTT_data.json").write_text("{")
    with pytest.raises(DataError, match=r"MSRVTT_data\.json: not JSON"):
        MsrVtt(msr_vtt).samples("train")
    (msr_vtt / "MSRVTT_data.json").unlink()
    with pytest.raises(DataError, match=r"MSRVTT_data\.json: cannot read the file: .*--data\.root"):
        MsrVtt(msr_vtt).samples("train")
    with pytest.raises(
        DataError, match=r"elsewhere: no such folder; the videos are looked for there, set --data\.videos"
    ):
        MsrVtt(msr_vtt, videos="elsewhere", on_bad="skip").samples("test")


def test_msvd(root):
    for split, names in (("train", TRAIN), ("val", ["v"]), ("test", TEST)):
        lines(root / f"{split}_list.txt", names)
    captions = {name: [["a", "ball", name], ["it", "rolls"]] for name in [*TRAIN, *TEST, "v"]}
    (root / "raw-captions.pkl").write_bytes(pickle.dumps(captions))
    data = Msvd(root)
    assert said(data.samples("train"))[:3] == [
        ("t0/0", ("a ball t0",)),
        ("t0/1", ("it rolls",)),
        ("t1/0", ("a ball t1",)),
    ]
    assert len(data.samples("train")) == 24
    assert said(data.samples("val")) == [("v", ("a ball v", "it rolls"))]
    assert said(data.samples("test")) == [(name, (f"a ball {name}", "it rolls")) for name in TEST]
    (root / "raw-captions.pkl").write_bytes(pickle.dumps({name: ["a ball"] for name in TRAIN}))
    with pytest.raises(DataError, match=r"raw-captions\.pkl: another layout than .*expected a list, got str"):
        Msvd(root).samples("train")
    (root / "raw-captions.pkl").unlink()
    with pytest.raises(DataError, match=r"no file at .*raw-captions\.pkl.*--data\.root"):
        Msvd(root).samples("train")


def test_lsmdc(root, clips):
    film = "0001_A_Film_00.03.38.168-00.03.40.105"
    clips(root / "videos" / "0001_A_Film", [f"{film}.avi"])
    row = "{}\t00:01\t00:02\t00:01\t00:02\t{}\n"
    (root / "LSMDC16_annos_training.csv").write_text("".join(row.format(t, f'SOMEONE "{t}" , runs.') for t in TRAIN))
    (root / "LSMDC16_annos_val.csv").write_text(row.format(film, "He goes."))
    (root / "LSMDC16_challenge_1000_publictect.csv").write_text("".join(row.format(t, t) for t in TEST))
    data = Lsmdc(root)
    assert said(data.samples("train"))[0] == ("t0/0", ('SOMEONE "t0" , runs.',))
    assert len(data.samples("train")) == 12
    assert said(data.samples("val")) == [(film, ("He goes.",))]
    assert data.samples("val")[0].video.path.parent.name == "0001_A_Film"
    assert said(data.samples("test")) == said(data.samples("predict")) == [(t, (t,)) for t in TEST]
    with open(root / "LSMDC16_annos_training.csv", "a") as file:
        file.write("t1\tshort\n")
    with pytest.raises(DataError, match=r"training\.csv, line 13: 2 values between tabs, expected clip, start_aligned"):
        Lsmdc(root).samples("train")
    data = Lsmdc(root, on_bad="skip")
    assert (len(data.samples("train")), len(data.skipped)) == (12, 1)


def test_activity_net(root, clips):
    clips(root / "videos", ["v_a.mp4", "b.mkv"])
    entry = {"duration": 1.2, "timestamps": [[0, 1], [1, 1.2]], "sentences": [" A man sits. ", "He stands."]}
    named = {f"v_{name}": entry for name in ("a", "b", "t0", "t1")}
    write_json(root / "train.json", named)
    write_json(root / "val_1.json", named)
    write_json(root / "train_ids.json", ["v_t1", "v_t0", "v_t1"])
    write_json(root / "val_ids.json", ["v_b", "v_a"])
    data = ActivityNet(root, validation="test")
    assert said(data.samples("train")) == [(f"{name}/0", ("A man sits. He stands.",)) for name in ("v_t1", "v_t0")]
    test = data.samples("test")
    assert said(test) == [(name, ("A man sits. He stands.",)) for name in ("v_b", "v_a")]
    assert [s.video.path.name for s in test] == ["b.mkv", "v_a.mp4"]
    assert {s.video.seconds for s in test} == {2}
    assert FrameSampling("clip4clip", 64).indices(test[0].video) == [0, 10, 20]
    assert test[0].video.num_frames == 21
    write_json(root / "val_ids.json", ["v_nobody"])
    with pytest.raises(DataError, match=r"val_ids\.json, entry 0: no caption is given for the video 'v_nobody'"):
        ActivityNet(root).samples("test")
    write_json(root / "val_1.json", {"v_a": {"sentences": []}})
    with pytest.raises(DataError, match=r"val_1\.json: another layout than"):
        ActivityNet(root).samples("test")


def test_didemo(root):
    moments = [
        {"video": "y.mov", "description": "the cat leaves ", "times": [[2, 2]]},
        {"video": "z.mp4", "description": "a dog", "times": [[0, 0]]},
        {"video": "y.mov", "description": "a cat comes", "times": [[0, 1]]},
        {"video": "unlisted.mp4", "description": "nothing", "times": [[0, 0]]},
    ]
    for split, names in (("train", ["z.mp4"]), ("val", ["z"]), ("test", ["z", "y.mov"])):
        write_json(root / f"{split}_data.json", moments)
        lines(root / f"{split}_list.txt", names)
    data = Didemo(root)
    assert said(data.samples("train")) == [("z.mp4/0", ("a dog",))]
    assert said(data.samples("test")) == [("z", ("a dog",)), ("y.mov", ("the cat leaves a cat comes",))]
    assert said(data.samples("val")) == said(data.samples("test"))[:1]
    assert {s.video.seconds for s in data.samples("test")} == {31}


def test_vatex(root):
    lines(root / "train_list.txt", TRAIN)
    lines(root / "test_list.txt", [*TEST, "", "v"])
    captions = {name: [f"{name} in one way", f"{name} in another"] for name in ["v", *TEST, *TRAIN]}
    write_json(root / "ref_captions.json", captions)
    data = Vatex(root)
    assert said(data.samples("test")) == [(name, tuple(captions[name])) for name in [*TEST, "v"]]
    assert len(data.samples("val")) == 1
    assert len(data.samples("train")) == 22
    order = [s.id.partition("/")[0] for s in data.samples("train")[::2]]
    assert order == [name for name in TRAIN if name in order]
    write_json(root / "ref_captions.json", dict.fromkeys(TEST, "letters"))
    with pytest.raises(DataError, match=r"ref_captions\.json: another layout than .*expected a list, got str"):
        Vatex(root).samples("test")
