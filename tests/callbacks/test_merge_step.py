"""Which checkpoints of a run a merging step takes: the last, the best, and those of a greedy soup."""

from pathlib import Path

import pytest
import torch

from fulgurite.callbacks.merge_step import Checkpoints, MergeAtCheckpoint
from fulgurite.callbacks.steps import Context, NotReady
from fulgurite.checkpoints import MissingError, load_tensors, read_manifest, save_checkpoint_folder, verify
from fulgurite.methods.merging.linear import Average
from fulgurite.methods.merging.model_stock import ModelStock


def checkpoints(folder, values, metrics=None):
    """Self-contained checkpoints of one number each, at steps 1, 2, ..; ``last`` is still that of the step before."""
    paths = []
    for step, value in enumerate(values, 1):
        scores = {} if metrics is None else {"val/accuracy": metrics[step - 1]}
        for name in (f"step={step}", "last")[: 1 + (step < len(values))]:
            save_checkpoint_folder(
                folder / name,
                {"weights": {"w": torch.full((2,), float(value))}},
                {"state": {"state_dict": {"order": None, "values": {}, "versions": {}}}},
                metrics=scores,
                facts={"global_step": step},
            )
        paths.append(folder / f"step={step}")
    return paths


def test_the_last_few_are_one_per_step_up_to_the_boundary(tmp_path):
    paths = checkpoints(tmp_path / "checkpoints", [1, 2, 4, 8])
    step = MergeAtCheckpoint(Average(), Checkpoints(last=2))
    assert step.inputs([paths[2]], Context(tmp_path / "out")) == paths[1:3]
    assert step.inputs([paths[3]], Context(tmp_path / "out")) == paths[2:]
    with pytest.raises(NotReady, match="1 of the 2 checkpoints"):
        step.inputs([paths[0]], Context(tmp_path / "out"))
    stock = MergeAtCheckpoint(ModelStock(), Checkpoints(last=2), base="before")
    assert stock.inputs([paths[3]], Context(tmp_path / "out")) == paths[1:]


@pytest.mark.parametrize(("mode", "expected"), [("max", (1, 3)), ("min", (0, 2))])
def test_the_best_few_are_merged_in_order_of_time(tmp_path, mode, expected):
    paths = checkpoints(tmp_path / "checkpoints", [1, 2, 4, 8], [0.1, 0.9, 0.2, 0.5])
    step = MergeAtCheckpoint(Average(), Checkpoints(best=2, mode=mode))
    assert step.inputs([paths[3]], Context(tmp_path / "out")) == [paths[i] for i in expected]


def test_a_soup_keeps_what_does_not_lower_the_score(tmp_path):
    paths = checkpoints(tmp_path / "checkpoints", [1, 2, 4, 8], [0.1, 0.9, 0.2, 0.5])
    seen = []

    def evaluator(path, split):
        value = load_tensors(path)["w"][0].item()
        seen.append(value)
        return {"accuracy": -abs(value - 3)}  # best where the mean is 3

    context = Context(tmp_path / "out", evaluator=evaluator)
    MergeAtCheckpoint(Average(), Checkpoints(best=4, greedy=True))([paths[3]], context)
    # From 2: with 8 it is 5, worse; with 4 it is 3, better; with 1 it is 7/3, worse.
    assert seen == pytest.approx([2, 5, 3, 7 / 3])
    assert load_tensors(tmp_path / "out")["w"].tolist() == [3, 3]
    assert [Path(p["path"]).name for p in read_manifest(tmp_path / "out").parents] == ["step=2", "step=3"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "out"]
    assert verify(tmp_path / "out").ok


def test_a_soup_needs_a_score_of_every_ingredient(tmp_path):
    paths = checkpoints(tmp_path / "checkpoints", [1, 2])
    step = MergeAtCheckpoint(Average(), Checkpoints(last=2, greedy=True))
    with pytest.raises(MissingError, match="step=1 has no val/accuracy"):
        step([paths[1]], Context(tmp_path / "out"))


def test_a_metric_that_no_checkpoint_has_is_an_error(tmp_path):
    paths = checkpoints(tmp_path / "checkpoints", [1, 2], [0.1, 0.2])
    step = MergeAtCheckpoint(Average(), Checkpoints(best=2, monitor="val/acuracy"))
    with pytest.raises(MissingError, match="has the metric 'val/acuracy'; it has val/accuracy"):
        step([paths[1]], Context(tmp_path / "out"))


def test_a_soup_that_fails_leaves_no_trial(tmp_path):
    paths = checkpoints(tmp_path / "checkpoints", [1, 2], [0.1, 0.9])

    def evaluator(path, split):
        raise ArithmeticError("no score today")

    with pytest.raises(ArithmeticError, match="no score"):
        MergeAtCheckpoint(Average(), Checkpoints(best=2, greedy=True))(
            [paths[1]], Context(tmp_path / "out", evaluator=evaluator)
        )
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoints"]


def test_a_metric_that_is_not_finite_is_not_the_best(tmp_path):
    paths = checkpoints(tmp_path / "checkpoints", [1, 2, 4], [0.1, 0.2, float("nan")])
    step = MergeAtCheckpoint(Average(), Checkpoints(best=2))
    assert step.inputs([paths[2]], Context(tmp_path / "out")) == paths[:2]
