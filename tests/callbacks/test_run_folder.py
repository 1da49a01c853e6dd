import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fulgurite.callbacks.run_folder import RunFolder, plain, with_questions
from fulgurite.samples import Sample, Video


def trainer_of(**settings):
    strategy = SimpleNamespace(broadcast=lambda value: value)
    defaults = {"strategy": strategy, "is_global_zero": True, "fast_dev_run": False, "datamodule": None}
    return SimpleNamespace(**{**defaults, "global_rank": 0, "callback_metrics": {}, **settings})


def test_rank_0_decides_the_folder(tmp_path):
    strategy = SimpleNamespace(broadcast=lambda value: str(tmp_path / "of rank 0"))
    trainer = trainer_of(strategy=strategy, is_global_zero=False)
    folder = RunFolder(tmp_path / "of rank 1", "a: 1\n")
    folder.setup(trainer, None, "fit")
    assert folder.path == tmp_path / "of rank 0"
    assert trainer._default_root_dir == str(tmp_path / "of rank 0")
    assert not list(tmp_path.iterdir())
    trainer.is_global_zero = True
    folder.setup(trainer, None, "fit")
    assert (tmp_path / "of rank 0" / "config.yaml").read_text() == "a: 1\n"


def test_metrics_are_numbers_and_those_of_test_join_those_of_fit(tmp_path):
    folder = RunFolder(tmp_path, "")
    folder.on_fit_end(trainer_of(callback_metrics={"b": torch.tensor(0.5), "a": torch.tensor(float("nan"))}), None)
    folder.on_test_end(trainer_of(callback_metrics={"c": torch.tensor(2)}), None)
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"a": None, "b": 0.5, "c": 2.0}


def test_validation_inside_a_fit_writes_nothing(tmp_path):
    folder = RunFolder(tmp_path, "")
    folder.on_validation_end(trainer_of(state=SimpleNamespace(fn="fit")), None)
    assert not list(tmp_path.iterdir())
    folder.on_validation_end(trainer_of(state=SimpleNamespace(fn="validate")), None)
    assert (tmp_path / "metrics.json").exists()


def test_predictions_of_two_ranks_are_interleaved(tmp_path, monkeypatch):
    """Rank r of 2 holds items r::2 of every global batch of 4; the last item of rank 1 was an uncounted repeat."""
    ranks = [RunFolder(tmp_path, ""), RunFolder(tmp_path, "")]
    for rank, batches in enumerate([[[0, 2], [4, 6]], [[1, 3], [5]]]):
        for index, batch in enumerate(batches):
            rows = [{"id": item, "scores": torch.tensor([item, 0.5])} for item in batch]
            ranks[rank].on_predict_batch_end(trainer_of(global_rank=rank), None, rows, None, index)

    both = ranks[0].predictions + ranks[1].predictions
    monkeypatch.setattr("fulgurite.callbacks.run_folder.gather_rows", lambda rows: both)
    ranks[0].on_predict_end(trainer_of(), None)
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"id": n, "scores": [n, 0.5]} for n in range(7)]


def test_rows_get_the_question_and_the_video_of_the_sample_in_their_place():
    samples = [
        Sample(id="a", domain="d", question="Who?", video=Video(Path("v/a.mp4"))),
        Sample(id="b", domain="e", question="What?"),
        Sample(id="c", domain="e", question="Third?", video=Video(Path("/home/me/v/c.mp4"), "v/c.mp4")),
        Sample(id="d", domain="e", question="Not asked"),
    ]
    rows = [{"id": "a", "answer": "x"}, {"id": "b", "question": "kept", "answer": "y"}, {"id": "c"}]
    assert with_questions(rows, samples) == [
        {"id": "a", "domain": "d", "question": "Who?", "video": "v/a.mp4", "answer": "x"},
        {"id": "b", "domain": "e", "question": "kept", "video": None, "answer": "y"},
        {"id": "c", "domain": "e", "question": "Third?", "video": "v/c.mp4"},
    ]
    assert list(with_questions(rows, samples)[0]) == ["id", "domain", "question", "video", "answer"]
    assert with_questions([{"id": "b"}, {"other": 1}], samples) == [{"id": "b"}, {"other": 1}]


@pytest.mark.parametrize("outputs", [torch.zeros(2), None, [1, 2], {"id": 1}])
def test_other_predictions_are_refused(outputs, tmp_path):
    with pytest.raises(TypeError, match="list of dicts"):
        RunFolder(tmp_path, "").on_predict_batch_end(trainer_of(), None, outputs, None, 0)


def test_plain_makes_json_of_tensors():
    value = {"a": torch.tensor(1.5), 2: (torch.tensor([1, 2]), "x", None)}
    assert plain(value) == {"a": 1.5, "2": [[1, 2], "x", None]}
