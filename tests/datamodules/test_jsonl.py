import json

import pytest
from PIL import Image

from fulgurite.datamodules.jsonl import JsonlDataModule
from fulgurite.samples import DataError, DataInfo, pixels_of

FILES = {"train": "train.jsonl", "val": "val.jsonl", "test": "test.jsonl"}


def data(folder, **options):
    return JsonlDataModule(folder / "a", domain="a", **{**FILES, "batch_size": 2, **options})


def append(folder, split, row):
    path = folder / "a" / f"{split}.jsonl"
    line = row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
    path.write_bytes(path.read_bytes() + line + b"\n")


def test_samples_and_facts(folder):
    module = data(folder)
    first = module.samples("train")[0]
    assert (first.id, first.domain, first.question, first.answers) == ("1", "a", "What is 0?", {"both": 1.0})
    assert first.video.path == folder / "a" / "0.mp4"
    assert first.video.name == "0.mp4"
    assert len(module.samples("predict")) == 5
    info = module.info()
    assert info.answers == ("a0", "a1", "a2", "both")
    assert (info.domains, info.kinds) == (("a",), ("kind a",))
    assert module.stages()[0].num_batches == 4


def test_forms_of_answers_and_optional_keys(folder):
    rows = [
        {
            "video": "0.mp4",
            "question": " q? ",
            "answers": ["x", "y"],
            "id": "k",
            "speech": "hi",
            "options": ["x"],
        },
        {"video": "0.mp4", "question": "q?", "answers": {"x": 1, "y": 0.5}, "source": "somewhere"},
    ]
    (folder / "a" / "own.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n")
    one, two = data(folder, train="own.jsonl").samples("train")
    assert (one.id, one.question, one.answers, one.speech, one.options) == (
        "k",
        "q?",
        {"x": 1.0, "y": 1.0},
        "hi",
        ("x",),
    )
    assert two.answers == {"x": 1.0, "y": 0.5}
    assert two.id == "2"


def test_a_line_may_ask_about_a_picture(folder):
    home = folder / "a"
    (home / "pictures").mkdir()
    Image.new("RGB", (6, 4), "red").save(home / "pictures" / "own.png")
    row = {"image": "own.png", "question": " What colour? ", "answers": ["red", "crimson"], "kind": "colour", "id": "p"}
    lines = [row, {**row, "id": "q", "image": "none.png"}, {**row, "id": "r", "image": ""}]
    (home / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    module = data(folder, train="own.jsonl", val=None, test=None, media="pictures", on_bad="skip")
    (sample,) = module.samples("train")
    assert (sample.id, sample.task, sample.question, sample.kind) == ("p", "vqa", "What colour?", "colour")
    assert sample.answers == {"red": 1.0, "crimson": 1.0}
    assert sample.human_answers == ("red",) * 10 + ("crimson",) * 10
    assert pixels_of(sample.image)[:, 0, 0].tolist() == [255, 0, 0]
    assert module.info() == DataInfo(("a",), ("crimson", "red"), ("colour",), ("vqa",))
    missing, empty = (entry["reason"] for entry in module.skipped)
    assert "line 2: no picture lies at none.png; it is looked for below --data.media" in missing
    assert "line 3: the key 'image' is missing or empty" in empty


def test_vocabulary_filters_training_and_keeps_test(folder):
    (folder / "a" / "vocabulary.json").write_text('["a1", "both"]')
    module = data(folder, vocabulary="vocabulary.json")
    assert {a for s in module.samples("train") for a in s.answers} == {"a1", "both"}
    assert module.filtered == {("a", "train"): 7 - len(module.samples("train"))}
    assert len(module.samples("test")) == 5
    with pytest.raises(DataError, match=r"outside the vocabulary.*unknown_answers"):
        data(folder, vocabulary="vocabulary.json", unknown_answers="error").samples("test")


def test_prediction_needs_no_answers(folder, trainer, watcher):
    (folder / "a" / "ask.jsonl").write_text('{"video": "1.mp4", "question": "Who?"}\n')
    module = JsonlDataModule(folder / "a", predict="ask.jsonl", domain="a")
    assert trainer().predict(watcher, datamodule=module) == [["1"]]
    assert module.info().answers == ()


GOOD = {"video": "0.mp4", "question": "q?", "answer": "a0"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GOOD, "question": "  "}, r"train\.jsonl, line 8.*'question'"),
        ({"question": "q?", "answer": "a"}, r"line 8.*'video'"),
        ({"video": "0.mp4", "question": "q?"}, r"line 8.*'answer' is missing.*--data\.predict"),
        ({**GOOD, "answer": 3}, r"line 8.*'answer'"),
        ({**GOOD, "answer": ""}, r"line 8.*empty"),
        ({**GOOD, "id": "2"}, r"'2' occurs twice"),
    ],
)
def test_a_bad_row_stops_or_is_skipped(folder, row, message):
    append(folder, "train", row)
    with pytest.raises(DataError, match=message + r".*--data\.on_bad skip"):
        data(folder).samples("train")
    module = data(folder, on_bad="skip")
    assert len(module.samples("train")) == 7
    assert [(s["split"], s["domain"]) for s in module.skipped] == [("train", "a")]
    assert module.skipped[0]["where"].startswith("train.jsonl, ")
    assert module.skipped[0]["reason"].startswith("train.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [(b'{"video": "\xff"}', "line 8: not UTF-8"), (b"{broken", "line 8: not JSON"), (b"[1]", "line 8.*list")],
)
def test_a_bad_file_always_stops(folder, line, message):
    append(folder, "train", line)
    with pytest.raises(DataError, match=message):
        data(folder, on_bad="skip").samples("train")


def test_missing_file_and_vocabulary(folder):
    with pytest.raises(DataError, match=r"none\.jsonl.*--data\.root"):
        data(folder, train="none.jsonl").samples("train")
    for content, message in (
        ("[]", "list"),
        ('["x", "x"]', "twice"),
        ('{"x": 1}', "positions"),
        ("{", "JSON"),
    ):
        (folder / "a" / "v.json").write_text(content)
        with pytest.raises(DataError, match=message):
            data(folder, vocabulary="v.json").info()


@pytest.mark.parametrize(("stage", "split"), [("predict", "predict"), ("test", "test")])
def test_an_evaluation_reads_its_own_file_alone(folder, trainer, watcher, stage, split):
    """Broken files beside it do not matter, and nor does it if there are none; answers are the checkpoint's."""
    home = folder / "a"
    (home / "test.jsonl").rename(home / "asked.jsonl")
    for other in ("train", "val", "test", "questions"):
        (home / f"{other}.jsonl").write_text("{broken")
    module = JsonlDataModule(home, domain="a", **{split: "asked.jsonl"})
    getattr(trainer(), stage)(watcher, datamodule=module)
    assert module.info() == DataInfo(("a",), (), ("kind a",))
    assert [s.id for s in module.samples(split)] == ["1", "2", "3", "4", "5"]
    for other in ("train", "val", "test", "questions"):
        (home / f"{other}.jsonl").unlink()
    getattr(trainer(), stage)(watcher, datamodule=JsonlDataModule(home, **{split: "asked.jsonl"}))
    assert watcher.ids("test") == (["1", "2", "3", "4", "5"] * 2 if stage == "test" else [])


def test_a_given_vocabulary_holds_in_evaluations(folder, trainer, watcher):
    (folder / "a" / "v.json").write_text('["a1", "both"]')
    module = JsonlDataModule(folder / "a", vocabulary="v.json")
    trainer().test(watcher, datamodule=module)
    assert module.info().answers == ("a1", "both")
    strict = JsonlDataModule(folder / "a", unknown_answers="error")
    append(folder, "test", {**GOOD, "answer": "never seen"})
    with pytest.raises(DataError, match=r"'never seen'.*outside the vocabulary.*--data\.unknown_answers keep"):
        trainer().test(watcher, datamodule=strict)


def test_files_of_default_names_may_be_missing(folder, trainer, watcher, caplog):
    home = folder / "a"
    module = JsonlDataModule(home, domain="a")
    assert [len(module.samples(split)) for split in ("train", "val", "test", "predict")] == [7, 3, 5, 5]
    for name in ("val", "test"):
        (home / f"{name}.jsonl").unlink()
    module, t = JsonlDataModule(home, domain="a", batch_size=2), trainer()
    t.fit(watcher, datamodule=module)
    assert watcher.ids("train")
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        t.test(watcher, datamodule=module)  # as after a fit
    assert "test.jsonl (no such file, or left out): no samples, so there is no test after the fit" in caplog.text
    assert not watcher.ids("val") + watcher.ids("test")
    for stage in ("validate", "test", "predict"):
        with pytest.raises(DataError, match=rf"{home}.*no such file.*no samples to {stage} with"):
            getattr(trainer(), stage)(watcher, datamodule=JsonlDataModule(home, domain="a"))
    (home / "train.jsonl").unlink()
    with pytest.raises(DataError, match=r"train\.jsonl.*: no samples to fit with"):
        trainer().fit(watcher, datamodule=JsonlDataModule(home, domain="a"))


def test_videos_elsewhere_are_named_as_the_file_names_them(folder, trainer, watcher):
    (folder / "a" / "clips").mkdir()
    for name in ("0.mp4", "1.mp4", "2.mp4"):
        (folder / "a" / name).rename(folder / "a" / "clips" / name)
    (folder / "a" / "clips" / "2.mp4").write_bytes(b"")
    module = data(folder, media="clips", on_bad="skip")
    assert [s.video.name for s in module.samples("train")[:3]] == ["0.mp4", "1.mp4", "2.mp4"]
    trainer().validate(watcher, datamodule=module)
    assert module.skipped == [
        {
            "split": "val",
            "domain": "a",
            "where": "2.mp4, id 3",
            "reason": "2.mp4: the video file is empty (0 bytes)",
        }
    ]


def test_a_wrong_root_names_its_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"{tmp_path}/nowhere: no such folder.*--data\.root"):
        JsonlDataModule("nowhere").info()


def test_vocabulary_object_gives_the_order(folder):
    (folder / "a" / "v.json").write_text('{"both": 1, "a1": 0}')
    assert data(folder, vocabulary="v.json").info().answers == ("a1", "both")
