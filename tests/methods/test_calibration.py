import logging

import pytest
import torch

from fulgurite.methods.calibration import first_batches, num_examples, rows_of
from fulgurite.methods.ranks import ALONE


def test_the_first_batches_that_hold_as_many_examples(on_ranks, caplog):
    batches = [torch.zeros(size, 2) for size in (3, 2, 4, 1)]
    assert [number for number, _ in first_batches(batches, 5, ALONE)] == [0, 1]
    assert [number for number, _ in first_batches(batches, 6, ALONE)] == [0, 1, 2]
    assert [number for number, _ in first_batches(batches, None, ALONE)] == [0, 1, 2, 3]
    for samples in (3, 5, 9, None):
        parts = on_ranks(2, lambda ranks, n=samples: [i for i, _ in first_batches(batches[ranks.rank :: 2], n, ranks)])
        assert sorted(parts[0] + parts[1]) == [number for number, _ in first_batches(batches, samples, ALONE)]
        assert all(number % 2 == rank for rank in range(2) for number in parts[rank])
    with caplog.at_level(logging.WARNING):
        assert len(first_batches(batches, 11, ALONE)) == 4
    assert "11 samples were asked for, and 10 are there" in caplog.text
    with pytest.raises(ValueError, match="no calibration data"):
        first_batches([], 1, ALONE)


def test_examples_of_batches():
    batch = {"ids": torch.arange(6).view(3, 2), "more": (torch.arange(3), ["a", "b", "c"]), "width": 7}
    assert num_examples(batch) == 3
    rows = list(rows_of(batch))
    assert [row["ids"].tolist() for row in rows] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert [row["more"][1] for row in rows] == [["a"], ["b"], ["c"]]
    assert rows[1]["more"][0].tolist() == [1]
    assert rows[2]["width"] == 7
    with pytest.raises(ValueError, match="a batch of 3 examples holds a tensor of \\(2,\\): give batches of one"):
        list(rows_of({**batch, "other": torch.zeros(2)}))
    with pytest.raises(ValueError, match="examples of a set cannot be counted"):
        num_examples({1})
