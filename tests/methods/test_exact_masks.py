import pytest
import torch

from fulgurite.methods.exact_masks import largest_of_all, smallest_of, smallest_of_all, smallest_of_rows
from fulgurite.methods.selection import SMALL


def with_ties(*shape, seed=0):
    return torch.randint(0, 7, shape, generator=torch.Generator().manual_seed(seed)) / 4


def sorted_choice(flat, count, largest=False):
    """A stable sort, ascending or descending."""
    mask = torch.zeros(flat.numel(), dtype=torch.bool)
    mask[flat.argsort(descending=largest, stable=True)[:count]] = True
    return mask


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("scale", [1, 60], ids=["kthvalue", "histogram"])
def test_choice_among_tensors_is_that_of_a_stable_sort_of_all(largest, scale):
    tensors = {"b": with_ties(7 * scale, 5), "a": with_ties(3, scale, seed=1), "c": with_ties(9, 5 * scale, seed=2)}
    sizes = {name: tensor.numel() for name, tensor in tensors.items()}
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    chosen_of_all = largest_of_all if largest else smallest_of_all
    for count in (0, 1, len(flat) // 3, len(flat) - 1, len(flat)):
        found = dict(chosen_of_all(tensors.__getitem__, sizes, count))
        assert list(found) == list(tensors)
        expected = sorted_choice(flat, count, largest)
        assert torch.equal(torch.cat([mask.flatten() for mask in found.values()]), expected)


@pytest.mark.parametrize("size", [100, SMALL + 1001])
def test_distinct_scores_of_one_tensor(size):
    scores = torch.rand(size, generator=torch.Generator().manual_seed(3))
    for count in (0, 1, size // 2, size):
        assert torch.equal(smallest_of(scores, count), sorted_choice(scores, count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("ties", [False, True])
def test_rows_are_those_of_a_stable_sort(dtype, ties, monkeypatch):
    monkeypatch.setattr("fulgurite.methods.exact_masks.ROWS_PIECE", 64)
    scores = with_ties(13, 24) if ties else torch.rand(13, 24, generator=torch.Generator().manual_seed(4))
    scores = scores.to(dtype)
    for count in (0, 1, 11, 24):
        expected = torch.stack([sorted_choice(row, count) for row in scores])
        assert torch.equal(smallest_of_rows(scores, count), expected)
    counts = torch.arange(13)
    expected = torch.stack([sorted_choice(row, int(count)) for row, count in zip(scores, counts)])
    assert torch.equal(smallest_of_rows(scores, counts), expected)


def test_what_cannot_be_chosen_is_refused():
    with pytest.raises(ValueError, match="negative or NaN"):
        smallest_of(torch.tensor([1.0, float("nan")]), 1)
    with pytest.raises(ValueError, match="negative or NaN"):
        smallest_of_rows(-torch.ones(2, 2), 1)
    with pytest.raises(ValueError, match="5 of 4"):
        smallest_of(torch.ones(4), 5)
    with pytest.raises(ValueError, match="w: 4 scores, expected 3"):
        list(smallest_of_all(lambda name: torch.ones(4), {"w": 3}, 1))
