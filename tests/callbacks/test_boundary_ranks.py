"""Boundaries on two processes: the fit does not feel them, and the artefacts are those of one process."""

import csv
import json
from pathlib import Path

import pytest
import torch

import fulgurite
from fulgurite.callbacks.merge_statistics import Calibration
from fulgurite.callbacks.merge_step import Checkpoints, MergeAtCheckpoint
from fulgurite.callbacks.steps import Context
from fulgurite.checkpoints import load_tensors, verify
from fulgurite.commands.statistics import data_of
from fulgurite.methods.merging.fisher import Fisher
from fulgurite.methods.merging.linear import Average
from fulgurite.methods.merging.regmean import RegMean
from fulgurite.methods.merging.ties import Ties

SCRIPT = Path(__file__).with_name("boundary_ranks.py")
QUESTION = 1 / 6 + 1e-6  # a domain has 6 validation questions
MERGING = """\
trainer:
  callbacks:
    - class_path: Boundary
      init_args:
        evaluate: [val, test]
        steps: [{class_path: MergeAtCheckpoint, init_args: {merger: Average}}]
    - class_path: Boundary
      init_args:
        at: fit_end
        evaluate: null
        steps:
          - class_path: MergeAtCheckpoint
            init_args: {merger: {class_path: Ties, init_args: {density: 0.2}}, sources: {last: 2}}
    - class_path: Boundary
      init_args:
        at: fit_end
        evaluate: null
        steps: [{class_path: MergeAtCheckpoint, init_args: {merger: RegMean, calibration: {samples: 13}}}]
    - class_path: Boundary
      init_args:
        at: fit_end
        evaluate: null
        steps:
          - class_path: MergeAtCheckpoint
            init_args: {merger: Fisher, calibration: {samples: 5, max_exact: 1, draws: 2}}
checkpoint: {save_top_k: 2}
"""


@pytest.fixture(scope="module")
def runs(stream_config, tmp_path_factory, pair):
    """Folder of ``<strategy>-plain``, ``<strategy>-merging`` and ``full``, and what both ranks have said."""
    root = tmp_path_factory.mktemp("ranks")
    plain, merging = root / "plain.yaml", root / "merging.yaml"
    text = stream_config.read_text().replace("dropout: 0.2", "dropout: 0.0")
    plain.write_text(text.replace("test_after_fit: true", "test_after_fit: false"))
    merging.write_text(MERGING)
    return root, pair.run(SCRIPT, root, plain, merging)


def bytes_of(path):
    return {name: tensor.numpy().tobytes() for name, tensor in load_tensors(path).items()}


def rows(run):
    with (run / "metrics.csv").open() as file:
        kept = [{n: v for n, v in row.items() if v and not n.startswith("merged/")} for row in csv.DictReader(file)]
    return [row for row in kept if row.keys() - {"step", "epoch"}]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_fit_does_not_feel_them(strategy, runs):
    plain, merging = (runs[0] / f"{strategy}-{name}" for name in ("plain", "merging"))
    assert rows(plain) == rows(merging)
    assert bytes_of(plain / "checkpoints" / "last") == bytes_of(merging / "checkpoints" / "last")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_artefacts_and_scores_are_those_of_one_process(strategy, runs, tmp_path):
    from fulgurite.cli import main

    run = runs[0] / f"{strategy}-merging"
    (last,) = (run / "checkpoints").glob("*-step=4")
    own = {
        "merged-average-green": MergeAtCheckpoint(Average()),
        "merged-ties-step=4": MergeAtCheckpoint(Ties(density=0.2), Checkpoints(last=2)),
    }
    for name, step in own.items():
        assert verify(run / "artefacts" / name).ok
        step([last], Context(tmp_path / name))
        assert bytes_of(tmp_path / name) == bytes_of(run / "artefacts" / name)
    scores = json.loads((run / "artefacts" / "scores.json").read_text())["merged-average-green"]["scores"]
    one = ("--trainer.devices", "1", "--trainer.strategy", "auto")
    assert main(["test", "--ckpt_path", str(run / "artefacts" / "merged-average-green"), *one]) == 0
    (evaluation,) = (run / "evaluations").iterdir()
    found = json.loads((evaluation / "metrics.json").read_text())
    # Sums of two processes run in another order, which may turn one question at a tie.
    assert scores["test/accuracy"] == pytest.approx(found["test/accuracy"], abs=QUESTION / 3)
    assert [scores[f"test/accuracy/{d}"] for d in ("red", "green")] == pytest.approx(
        [found[f"test/dynamic/accuracy/{d}"] for d in ("red", "green")], abs=QUESTION
    )


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_statistics_are_those_of_one_process(strategy, runs, tmp_path):
    run = runs[0] / f"{strategy}-merging"
    (last,) = (run / "checkpoints").glob("*-step=4")
    own = {
        "merged-regmean-step=4": MergeAtCheckpoint(RegMean(), calibration=Calibration(13)),
        "merged-fisher-step=4": MergeAtCheckpoint(Fisher(), calibration=Calibration(5, max_exact=1, draws=2)),
    }
    data = data_of(last, None, (), fulgurite.load(last))
    for name, step in own.items():
        out = step([last], Context(tmp_path / name, builder=fulgurite.load, data=data))
        one, two = load_tensors(out), load_tensors(run / "artefacts" / name)
        # Batches are cut otherwise, which changes float32 activations by rounding; sums are in float64.
        for key, tensor in one.items():
            torch.testing.assert_close(two[key], tensor, rtol=1e-4, atol=1e-6, equal_nan=True)
        plain = MergeAtCheckpoint(Average())([last], Context(tmp_path / "plain"))
        weight = "bank.sets.live.video_projection.module.weight"
        assert not torch.allclose(load_tensors(plain)[weight], one[weight], rtol=0, atol=1e-5)
        assert not list((run / "artefacts").glob("*-statistics"))


def test_an_error_on_one_rank_ends_both(runs):
    root, texts = runs
    assert [(root / f"codes-{rank}").read_text() for rank in range(2)] == ["0 0 0 0 2"] * 2
    assert all(text.count("the disk of this test is full") == 1 for text in texts)
    assert list((root / "full" / "artefacts").iterdir()) == []
