"""Samples of retrieval from own files: JSON lines and a folder."""

import json

import pytest

from fulgurite.datamodules.captioned_videos import CaptionedVideos
from fulgurite.datamodules.continual import ContinualDataModule
from fulgurite.samples import DataError, sample_fields


class Captions:
    needs = ("video", "captions")

    def __call__(self, samples):
        return sample_fields(samples)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


@pytest.fixture
def own(tmp_path, clips):
    """A folder with four videos; gives a DataModule over the rows."""
    clips(tmp_path / "videos", ["a.mp4", "b.mp4", "c.mp4", "below/d.mp4"])

    def make(rows=(), test=(), **options):
        if rows:
            write(tmp_path / "train.jsonl", rows)
        if test:
            write(tmp_path / "test.jsonl", test)
        return CaptionedVideos(tmp_path, **{"media": "videos", **options})

    return make


ROWS = [
    {"video": "b.mp4", "caption": " a ball rolls ", "extra": 1},
    {"video": "a.mp4", "captions": ["a dog runs", "something runs"]},
    {"video": "b.mp4", "caption": "it rolls"},
    {"video": "below/d.mp4", "caption": "a ball rolls"},
]


def told(samples):
    return [(s.id, s.captions, s.video.name) for s in samples]


def test_training_has_a_sample_per_caption_and_evaluation_one_per_video(own, tmp_path):
    data = own(ROWS, ROWS, domain="mine")
    assert told(data.samples("train")) == [
        ("b.mp4/0", ("a ball rolls",), "b.mp4"),
        ("b.mp4/1", ("it rolls",), "b.mp4"),
        ("a.mp4/0", ("a dog runs",), "a.mp4"),
        ("a.mp4/1", ("something runs",), "a.mp4"),
        ("below/d.mp4/0", ("a ball rolls",), "below/d.mp4"),
    ]
    videos = [
        ("b.mp4", ("a ball rolls", "it rolls"), "b.mp4"),
        ("a.mp4", ("a dog runs", "something runs"), "a.mp4"),
        ("below/d.mp4", ("a ball rolls",), "below/d.mp4"),
    ]
    assert told(data.samples("test")) == told(data.samples("predict")) == videos
    assert data.samples("val") == []
    assert {(s.task, s.domain) for s in data.samples("train")} == {("retrieval", "mine")}
    assert data.samples("test")[0].video.path == tmp_path / "videos" / "b.mp4"
    info = data.info()
    assert (info.domains, info.answers, info.kinds, info.tasks) == (("mine",), (), (), ("retrieval",))


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"caption": "x"}, "line 2: the key 'video' is missing or empty"),
        ({"video": "a.mp4"}, "line 2: expected one of the keys 'caption' and 'captions'"),
        ({"video": "a.mp4", "caption": "x", "captions": ["y"]}, "line 2: expected one of the keys"),
        ({"video": "a.mp4", "captions": "x"}, "line 2: the key 'captions' must be a list, got 'x'"),
        ({"video": "a.mp4", "captions": []}, "line 2: no caption is given for the video 'a.mp4'"),
        ({"video": "a.mp4", "caption": " \n"}, "line 2: a caption of the video 'a.mp4' is empty or no text"),
        ({"video": "a.mp4", "caption": 3}, "line 2: a caption of the video 'a.mp4' is empty or no text: 3"),
        ({"video": "z.mp4", "caption": "x"}, r"line 2: no video lies at .*z\.mp4; set --data\.media"),
    ],
)
def test_a_bad_line_stops_or_is_left_out_and_counted(own, row, text):
    rows = [ROWS[1], row, ROWS[0]]
    with pytest.raises(DataError, match=rf"train\.jsonl, {text}.*--data\.on_bad skip"):
        own(rows).samples("train")
    data = own(rows, on_bad="skip")
    assert [s.id for s in data.samples("train")] == ["a.mp4/0", "a.mp4/1", "b.mp4/0"]
    (entry,) = data.skipped
    assert (entry["split"], entry["domain"]) == ("train", "own")
    assert entry["where"] == "train.jsonl, line 2"


def test_one_empty_caption_of_several_is_left_out_alone(own):
    data = own(
        ROWS[:1], [{"video": "a.mp4", "captions": ["x", ""]}, {"video": "c.mp4", "captions": [""]}], on_bad="skip"
    )
    assert told(data.samples("test")) == [("a.mp4", ("x",), "a.mp4")]
    assert [entry["split"] for entry in data.skipped] == ["test", "test"]


def test_an_undecodable_video_stops_or_is_left_out(own, tmp_path):
    (tmp_path / "videos" / "bad.mp4").write_bytes(b"no video")
    rows = [*ROWS, {"video": "bad.mp4", "caption": "x"}]
    data = own(rows)
    data.attach(Captions())
    with pytest.raises(DataError, match=r"bad\.mp4: not a readable video.*--data\.on_bad skip"):
        data.setup("fit")
    data = own(rows, on_bad="skip")
    data.attach(Captions())
    data.setup("fit")
    assert len(data.samples("train")) == 5
    assert [entry["where"] for entry in data.skipped] == ["bad.mp4, id bad.mp4/0"]


def test_files_that_are_not_there(own, tmp_path):
    with pytest.raises(DataError, match=r"other\.jsonl: cannot read the file"):
        own(train="other.jsonl").samples("train")
    with pytest.raises(DataError, match=r"nowhere: no such folder.*--data\.root"):
        CaptionedVideos(tmp_path / "nowhere").samples("train")
    with pytest.raises(DataError, match=r"nowhere: no such folder.*set --data\.media"):
        own(ROWS, media="nowhere", on_bad="skip").samples("train")
    data = own(ROWS)
    data.attach(Captions())
    with pytest.raises(DataError, match=r"test\.jsonl \(no such file, or left out\): no samples to test with"):
        data.setup("test")


def test_a_module_for_questions_is_refused(own, watcher, trainer):
    with pytest.raises(DataError, match=r"needs the field 'question'.*from CaptionedVideos"):
        trainer(limit_val_batches=0).fit(watcher, own(ROWS))


@pytest.mark.parametrize("joint", [False, True])
def test_several_sets_are_a_stream_or_one_set(own, joint):
    data = ContinualDataModule([own(ROWS, ROWS, domain=name) for name in ("one", "two")], 1, joint=joint)
    assert data.info().domains == ("one", "two")
    assert data.info().tasks == ("retrieval",)
    assert [s.name for s in data.stages()] == (["all"] if joint else ["one", "two"])
    ids = [s.id for s in data.samples("train")]
    assert len(set(ids)) == 10
    assert ids[:2] == ["one/b.mp4/0", "one/b.mp4/1"]
    assert [s.id for s in data.samples("test")][3:] == ["two/b.mp4", "two/a.mp4", "two/below/d.mp4"]
