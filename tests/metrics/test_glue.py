"""Figures of GLUE against counts and correlations written out."""

import math

import numpy as np
import pytest
import torch

from fulgurite.metrics.glue import FIGURES, GlueScores

RIGHT = [0, 1, 1, 0, 1, 0, 1, 1, 0]
SAID = ["0", "1", "0", "1", "1", "0", "yes", "2", ""]  # the last three are no labels of a binary task


def test_f1_and_accuracy_count_what_is_no_label_as_wrong():
    scores = GlueScores("mrpc")
    scores.update(SAID, [str(label) for label in RIGHT])
    f1 = (
        100 * 2 * 2 / (2 * 2 + 2 + 3)
    )  # two rightly 1; two wrongly 1, one of them no label; three wrongly 0, two no label
    assert scores.compute()["f1"].item() == pytest.approx(f1)
    assert scores.compute()["accuracy"].item() == pytest.approx(100 * 4 / 9)
    assert scores.compute()["average"].item() == pytest.approx((f1 + 400 / 9) / 2)


def test_matthews_is_the_correlation_of_two_binary_columns():
    rng = np.random.default_rng(0)
    said, right = rng.integers(0, 2, 50), rng.integers(0, 2, 50)
    scores = GlueScores("cola")
    scores.update(torch.from_numpy(said), torch.from_numpy(right))
    assert scores.compute()["matthews"].item() == pytest.approx(100 * np.corrcoef(said, right)[0, 1], abs=1e-4)


def ranks(values):
    """From 1 on; equal values share the mean of theirs."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) + 1) / 2 for value in values]


def test_correlations_of_scores_with_ties_and_texts_that_are_no_score():
    right = [0.0, 2.5, 2.5, 5.0, 3.8, 1.2]
    said = ["0.2", "2.4", "3.0", "5.0", "nan", "score"]
    scores = GlueScores("stsb")
    scores.update(said, [str(value) for value in right])
    numbers = [0.2, 2.4, 3.0, 5.0, -1.0, -1.0]
    figures = scores.compute()
    assert figures["pearson"].item() == pytest.approx(100 * np.corrcoef(numbers, right)[0, 1], abs=1e-4)
    expected = 100 * np.corrcoef(ranks(numbers), ranks(right))[0, 1]
    assert figures["spearman"].item() == pytest.approx(expected, abs=1e-4)


def test_a_correlation_that_is_not_defined_is_zero():
    scores = GlueScores("stsb")
    scores.update(["1.0"] * 3, ["1.0", "2.0", "3.0"])
    assert {name: value.item() for name, value in scores.compute().items()} == dict.fromkeys(
        ("pearson", "spearman", "average"), 0.0
    )


@pytest.mark.parametrize("task", FIGURES)
def test_repeats_are_left_out_and_parts_join(task):
    whole, parts = GlueScores(task), GlueScores(task)
    said, right = ["1", "0", "1", "1", "0"], ["1", "0", "0", "1", "1"]
    whole.update(said, right)
    parts.update([*said[:2], "0"], [*right[:2], "1"], torch.tensor([True, True, False]))
    parts.update(["1"], ["1"], torch.tensor([False]))
    parts.update(said[2:], right[2:])
    assert parts.compute() == whole.compute()
    assert set(whole.compute()) == {*FIGURES[task], "average"}
    assert all(math.isnan(value) for value in GlueScores(task).compute().values())


def test_a_task_that_is_none_and_a_label_that_is_none_are_named():
    with pytest.raises(ValueError, match="task='boolq': choose one of"):
        GlueScores("boolq")
    with pytest.raises(ValueError, match="rte: a label of"):
        GlueScores("rte").update(["0"], ["entailment"])
