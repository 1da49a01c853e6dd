"""GLUE from small files of the official release and of the hub."""

import json
import shutil

import pytest
import torch

from fulgurite.datamodules.glue import TASKS, Glue
from fulgurite.samples import DataError

LARGE = ("sst2", "qqp", "qnli")


def ids(data, split):
    return [sample.id for sample in data.samples(split)]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_read_in_both_forms(glue_root, task):
    text, pair = Glue(glue_root, task), Glue(glue_root, task, form="pair")
    both = 2 if task == "mnli" else 1
    sizes = [len(text.samples(split)) for split in ("train", "val", "test", "predict")]
    assert sizes == [12, 6 * both, 6 * both, 6 * both]
    for one, other in zip(text.samples("train"), pair.samples("train")):
        texts = [other.question] + ([] if other.text_pair is None else [other.text_pair])
        names = TASKS[task].fields
        assert one.question == " ".join(f"{name}: {words}" for name, words in zip(names, texts, strict=True))
        assert one.text_pair is None
        assert (one.task, one.domain) == (task, task)
    assert all(sample.answers == {} for sample in text.samples("predict"))


def test_a_label_is_its_number_as_text_and_a_score_is_rounded_for_texts_alone(glue_root):
    def first(task, count, **options):
        return [next(iter(s.answers)) for s in Glue(glue_root, task, **options).samples("train")[:count]]

    assert first("mnli", 3) == ["1", "0", "2"]
    assert first("rte", 2) == ["1", "0"]
    assert first("mrpc", 2) == ["1", "0"]
    assert first("stsb", 4) == ["0.0", "2.4", "3.8", "5.0"]  # 12.5 fifths are rounded to the even 12
    assert first("stsb", 4, form="pair") == ["0.0", "2.5", "3.8", "5.0"]
    assert Glue(glue_root, "mnli").info().answers == ("0", "1", "2")
    assert len(Glue(glue_root, "stsb").info().answers) == 26
    assert Glue(glue_root, "stsb", form="pair").info().answers == ()


def test_the_texts_are_those_of_the_files(glue_root):
    sample = Glue(glue_root, "mrpc").samples("test")[2]
    assert sample.question == 'sentence1: #1 String "2 of dev sentence2: #2 String "2 of dev'
    assert Glue(glue_root, "cola").samples("predict")[0].question == 'sentence: sentence "0 of test'
    mnli = Glue(glue_root, "mnli")
    assert [s.kind for s in mnli.samples("val")] == ["matched"] * 6 + ["mismatched"] * 6
    assert mnli.info().kinds == ("matched", "mismatched")


@pytest.mark.parametrize("task", [name for name in TASKS if name != "mnli"])
def test_divided_splits_are_the_parts_of_a_seeded_order(glue_root, task):
    data = Glue(glue_root, task, splits="divided", held_out=5)
    large = task in LARGE
    order = [str(i) for i in torch.randperm(12 if large else 6, generator=torch.Generator().manual_seed(42)).tolist()]
    assert ids(data, "val") == order[: 5 if large else 3]
    assert ids(data, "train" if large else "test") == order[5 if large else 3 :]
    assert ids(data, "test" if large else "train") == [str(i) for i in range(6 if large else 12)]
    of = "train" if large else "dev"
    assert all(f"of {of}" in s.question for s in data.samples("val"))
    assert all("of dev" in s.question for s in data.samples("test"))


def test_divided_mnli_validates_on_mismatched_and_tests_on_matched(glue_root):
    data = Glue(glue_root, "mnli", splits="divided")
    assert [len(data.samples(split)) for split in ("train", "val", "test")] == [12, 6, 6]
    assert all("of dev_mismatched" in s.question for s in data.samples("val"))
    assert all("of dev_matched" in s.question for s in data.samples("test"))


def test_files_of_the_hub_are_read_in_the_same_way(tmp_path):
    (tmp_path / "qnli").mkdir()
    for split in ("train", "validation", "test"):
        rows = [
            {"question": f"Q{i}?", "sentence": f"S{i}.", "label": -1 if split == "test" else i % 2, "idx": i}
            for i in range(4)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "qnli" / f"{split}.jsonl").write_text(text)
    data = Glue(tmp_path, "qnli")
    assert [(s.question, s.answers) for s in data.samples("train")[:2]] == [
        ("question: Q0? sentence: S0.", {"0": 1.0}),
        ("question: Q1? sentence: S1.", {"1": 1.0}),
    ]
    assert [len(data.samples(split)) for split in ("val", "predict")] == [4, 4]


@pytest.mark.parametrize(
    ("task", "folder", "line", "said"),
    [
        ("qqp", "QQP", "5\t1\t2\tonly this", r"line 3: 4 values in 6 columns"),
        ("rte", "RTE", "1\ta\tb\tmaybe", r"line 3: the label is 'maybe', not one of \['entailment'"),
        ("stsb", "STS-B", "1\tnews\ta\tb\t7", r"line 3: the score is '7'"),
        ("stsb", "STS-B", "1\tnews\ta\tb\tnan", r"line 3: the score is 'nan'"),
        ("sst2", "SST-2", " \t1", r"line 3: the text 'sentence' is missing or empty"),
    ],
)
def test_a_bad_line_is_one_clear_error_or_left_out(glue_root, tmp_path, task, folder, line, said):
    shutil.copytree(glue_root, tmp_path / "glue")
    path = tmp_path / "glue" / folder / "train.tsv"
    lines = path.read_text().split("\n")
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(DataError, match=said) as caught:
        Glue(tmp_path / "glue", task).samples("train")
    assert str(path) in str(caught.value)
    data = Glue(tmp_path / "glue", task, on_bad="skip")
    assert len(data.samples("train")) == 12
    assert [entry["where"] for entry in data.skipped] == [f"{folder}/train.tsv, line 3"]


def test_missing_files_and_columns_are_named(glue_root, tmp_path):
    shutil.copytree(glue_root, tmp_path / "glue")
    (tmp_path / "glue/RTE/dev.tsv").unlink()
    with pytest.raises(DataError, match=r"neither .*RTE/dev\.tsv nor .*rte/validation\.jsonl.*--data\.root"):
        Glue(tmp_path / "glue", "rte").samples("val")
    (tmp_path / "glue/SST-2/train.tsv").write_text("text\tlabel\nfine\t1\n")
    with pytest.raises(DataError, match=r"line 2: the text 'sentence' is missing.*\['text', 'label'\]"):
        Glue(tmp_path / "glue", "sst2").samples("train")
    with pytest.raises(DataError, match=r"data\.held_out=0"):
        Glue(glue_root, "sst2", held_out=0)
