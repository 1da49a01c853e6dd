import pytest
import torch

from fulgurite.datamodules.continual import ContinualDataModule
from fulgurite.datamodules.video_qa import VideoQADataModule
from fulgurite.samples import DataError


def row(video, question, answer, kind=0):
    return {"video_id": video, "question": question, "answer": answer, "type": kind}


ROWS = [
    row(7010, "what runs", "dog"),
    row(7011, "what color is it", "red", 2),
    row(7010, "who sleeps", "emu", 4),
]


@pytest.fixture
def msvd(official):
    def write(rows=ROWS, **options):
        files = {"train.csv": rows, "val.csv": ROWS, "test.csv": ROWS}
        features = {7010: torch.randn(4, 768).half(), 7011: torch.randn(12, 768).half()}
        options = {"features": features, "subtitles": {7010: "a dog barks", 7011: ""}, **options}
        return official("MSVD-QA", files, **options)

    return write


def test_msvd(msvd, caplog):
    data = VideoQADataModule(msvd(), "msvd")
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        train = data.samples("train")
    assert [(s.id, s.question, s.answers, s.kind, s.speech) for s in train] == [
        ("0", "what runs", {"dog": 1.0}, "what", "a dog barks"),
        ("1", "what color is it", {"red": 1.0}, "color", None),
    ]
    assert "msvd train: 66.7% of 3 with speech" in caplog.text
    assert data.filtered == {("msvd", "train"): 1}  # emu
    assert [s.answers for s in data.samples("test")][2] == {"emu": 1.0}
    assert train[1].features["clip_vitl14"].shape == (12, 768)
    info = data.info()
    assert (info.domains, info.answers) == (("msvd",), ("cat", "dog", "red"))
    assert info.kinds == ("what", "how", "color", "where", "who", "when")


def test_ivqa_scores_and_filter(official):
    def five(*answers):
        return {"video_id": "aBcD_123xyz", "question": "what is it"} | {
            f"answer{i + 1}": a for i, a in enumerate(answers)
        }

    rows = [
        five("emu", "dog", "dog", "cat", "dog"),
        five("emu", "emu", "dog", "cat", "red"),
        five("cat", "cat", "dog", "dog", "dog"),
    ]
    root = official(
        "iVQA",
        {"train.csv": rows, "val.csv": rows, "test.csv": rows},
        {"aBcD_123xyz": torch.zeros(2, 768)},
        {"aBcD_123xyz": "hello"},
    )
    data = VideoQADataModule(root, "ivqa")
    assert [s.answers for s in data.samples("test")] == [
        {"emu": 0.5, "dog": 1.0, "cat": 0.5},
        {"emu": 1.0, "dog": 0.5, "cat": 0.5, "red": 0.5},
        {"cat": 1.0, "dog": 1.0},
    ]
    # The most common answer decides: emu is outside, dog (three times) is inside.
    assert [s.id for s in data.samples("train")] == ["0", "2"]


def test_lsmdc_and_shared_vocabulary(official, tmp_path):
    rows = [{"video_id": "1004_Film_00.01", "question": "SOMEONE closes the _____ .", "answer": "door"}]
    features = {"1004_Film_00.01": torch.zeros(2, 768)}
    root = official(
        "LSMDC", {"training.csv": rows, "val.csv": rows, "test.csv": rows}, features, {"1004_Film_00.01": "x"}
    )
    assert VideoQADataModule(root, "lsmdc").samples("train") == []
    (root / "all.json").write_text('{"door": 0}')
    sample = VideoQADataModule(root, "lsmdc", vocabulary="all.json").samples("train")[0]
    assert sample.question == "SOMEONE closes the _____ ."
    assert sample.kind is None


def test_tgif_holds_out_whole_videos(official):
    rows = [row(f"gif{i % 10}", "what runs", "dog") for i in range(30)]
    test = [row("other", "what runs", "dog")]
    features = {f"gif{i}": torch.zeros(1, 768) for i in range(10)} | {"other": torch.zeros(1, 768)}
    root = official("TGIF-QA", {"train_frameqa.csv": rows, "test_frameqa.csv": test}, features)
    data = VideoQADataModule(root, "tgif", held_out=0.2)
    train, val = data.samples("train"), data.samples("val")
    assert (len(train), len(val)) == (24, 6)

    def films(samples):
        return {s.features.places["clip_vitl14"][1] for s in samples}

    assert not films(train) & films(val)
    assert train[0].speech is None
    published = VideoQADataModule(root, "tgif", held_out=0)
    assert len(published.samples("train")) == 30
    assert len(published.samples("val")) == 1


def test_a_bad_row_of_a_divided_file_counts_once(official):
    rows = [row(f"gif{i}", "what runs", "dog") for i in range(10)] + [row("gif3", " ", "dog")]
    test = [row("other", "what runs", "dog")]
    features = {f"gif{i}": torch.zeros(1, 768) for i in range(10)} | {"other": torch.zeros(1, 768)}
    root = official("TGIF-QA", {"train_frameqa.csv": rows, "test_frameqa.csv": test}, features)
    data = VideoQADataModule(root, "tgif", held_out=0.2, on_bad="skip")
    assert (len(data.samples("val")), len(data.samples("train"))) == (2, 8)
    assert [(s["split"], s["where"].rpartition(", ")[2]) for s in data.skipped] == [("train", "line 12")]


def test_missing_folders_and_files_name_their_option(msvd, tmp_path):
    with pytest.raises(DataError, match=r"MSVD-QA: no such folder.*--data\.root"):
        VideoQADataModule(tmp_path / "nowhere", "msvd").info()
    root = msvd()
    with pytest.raises(DataError, match=r"other\.pth: no such file of features.*--data\.features_file"):
        VideoQADataModule(root, "msvd", features_file="other.pth").samples("train")
    (root / "MSVD-QA" / "train.csv").unlink()
    with pytest.raises(DataError, match=r"train\.csv.*--data\.root"):
        VideoQADataModule(root, "msvd").samples("train")


def test_raw_videos_instead_of_features(msvd):
    root = msvd(features=None)
    data = VideoQADataModule(root, "msvd", features_file=None, videos="video", video_suffix=".avi")
    video = data.samples("test")[0].video
    assert (video.path, video.name) == (root / "MSVD-QA" / "video" / "7010.avi", "7010.avi")
    with pytest.raises(DataError, match="videos"):
        VideoQADataModule(root, "msvd", features_file=None)


def test_missing_features(msvd):
    root = msvd([*ROWS, row(99, "what runs", "cat")])
    with pytest.raises(DataError, match=r"train\.csv, line 5.*'99'.*missing_features"):
        VideoQADataModule(root, "msvd").samples("train")
    zeros = VideoQADataModule(root, "msvd", missing_features="zeros").samples("train")[2]
    assert torch.equal(zeros.features["clip_vitl14"], torch.zeros(1, 768))
    skipping = VideoQADataModule(root, "msvd", on_bad="skip")
    assert len(skipping.samples("train")) == 2
    assert [s["where"] for s in skipping.skipped] == ["train.csv, line 5"]
    assert skipping.skipped[0]["reason"].startswith("train.csv, line 5: ")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"video_id": 7010, "question": "q"}], r"columns \['answer'\].*video_id"),
        ([row(7010, " ", "dog")], r"line 2.*question is empty"),
        ([row(7010, "q", "")], r"line 2.*answer is empty"),
        ([row(7010, "q", "dog", 6)], r"line 2.*type '6'"),
    ],
)
def test_bad_rows(msvd, rows, message):
    with pytest.raises(DataError, match=message):
        VideoQADataModule(msvd(rows), "msvd").samples("train")


def test_bad_files(msvd):
    root = msvd()
    path = root / "MSVD-QA" / "train.csv"
    good = path.read_bytes()
    path.write_bytes(good + "7010,where is the caf\u00e9,dog,3\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"train\.csv, line 5: not UTF-8"):
        VideoQADataModule(root, "msvd").samples("train")
    path.write_bytes(good + b"7010,too short\n")
    with pytest.raises(DataError, match=r"line 5: expected 4 values"):
        VideoQADataModule(root, "msvd").samples("train")
    with pytest.raises(DataError, match=r"\(frames, 512\).*feature_width"):
        VideoQADataModule(root, "msvd", feature_width=512).samples("test")


def test_commas_and_quotes_in_questions(msvd):
    root = msvd([row(7010, 'who says "hi, you"', "dog")])
    assert VideoQADataModule(root, "msvd").samples("train")[0].question == 'who says "hi, you"'


@pytest.mark.parametrize(
    ("subtitles", "message"),
    [({7010: "", 7011: " "}, "all 2 subtitles are empty"), ({7010: 3}, "7010"), ([1], "dict")],
)
def test_subtitles_that_would_cost_accuracy_silently(msvd, subtitles, message):
    root = msvd(subtitles=subtitles)
    with pytest.raises(DataError, match=message):
        VideoQADataModule(root, "msvd").samples("train")
    assert VideoQADataModule(root, "msvd", subtitles=None).samples("train")[0].speech is None


def test_missing_subtitles(msvd):
    with pytest.raises(DataError, match=r"subtitles\.pkl.*subtitles to null"):
        VideoQADataModule(msvd(subtitles=None), "msvd").samples("train")


def test_as_part_of_a_stream(msvd):
    data = ContinualDataModule([VideoQADataModule(msvd(), "msvd")], 2)
    data.prepare_data()
    assert [s.id for s in data.samples("train")] == ["msvd/0", "msvd/1"]
    assert data.filtered == {("msvd", "train"): 1}
