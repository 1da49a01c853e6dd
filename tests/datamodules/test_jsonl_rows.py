"""Rows of a JSONL file whose values are of the wrong kind are one error each."""

import json

import pytest

from fulgurite.datamodules.jsonl import JsonlDataModule
from fulgurite.samples import DataError


@pytest.mark.parametrize(
    "wrong",
    [
        {"answers": {"x": 5}},
        {"answers": {"x": float("nan")}},
        {"answers": {"x": "much"}},
        {"answer": "x", "kind": 3},
        {"answer": "x", "speech": 5},
        {"answer": "x", "options": "x"},
    ],
    ids=str,
)
def test_a_value_of_the_wrong_kind_names_the_line(tmp_path, wrong):
    good = {"video": "a.mp4", "question": "What?", "answer": "x"}
    rows = [good, {"video": "a.mp4", "question": "What?", **wrong}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = JsonlDataModule(tmp_path, train="train.jsonl")
    with pytest.raises(DataError, match="line 2"):
        data.read("train")
    skipping = JsonlDataModule(tmp_path, train="train.jsonl", on_bad="skip")
    assert len(skipping.read("train")) == 1
