"""Random numbers of a place do not depend on how they are asked for."""

import pytest
import torch

from fulgurite.methods.random import chosen, uniform

PLACE = (3, "dare", 1, "block.weight")


def test_any_piece_is_the_piece_of_the_whole():
    whole, mask = uniform(*PLACE, 2000), chosen(0.3, *PLACE, 2000)
    for start in (0, 1, 3, 7, 8, 9, 31, 32, 33, 250, 999):
        for count in (0, 1, 8, 13, 500):
            assert torch.equal(uniform(*PLACE, count, start), whole[start : start + count])
            assert torch.equal(chosen(0.3, *PLACE, count, start), mask[start : start + count])


@pytest.mark.parametrize("probability", [0.0, 1e-4, 0.1, 1 / 3, 0.5, 0.9999, 1.0])
def test_as_many_are_chosen_as_should_be_and_independently(probability):
    count = 2**20
    mask = chosen(probability, *PLACE, count)
    deviation = (count * probability * (1 - probability)) ** 0.5
    assert abs(float(mask.sum()) - count * probability) <= 4 * deviation
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    following = float((mask[1:] * mask[:-1]).sum())
    assert abs(following - count * probability**2) <= 4 * deviation + 2


def test_the_rare_entries_that_a_byte_does_not_decide_are_even():
    # Of the entries whose byte is on the edge, 1 / 256, the share that is kept is what is left of the probability.
    low, middle, high = (chosen(p / 256, *PLACE, 2**20) for p in (64, 64.25, 65))
    assert ((low <= middle) & (middle <= high)).all()
    edge, kept = float((high - low).sum()), float((middle - low).sum())
    assert abs(edge - 2**12) < 4 * 2**6
    assert abs(kept - edge / 4) < 4 * (edge * 3 / 16) ** 0.5


def test_every_part_of_the_place_counts():
    places = [
        PLACE,
        (4, *PLACE[1:]),
        (3, "della", 1, "block.weight"),
        (3, "dare", 2, "block.weight"),
        (*PLACE[:3], "b"),
    ]
    draws = [uniform(*place, 50) for place in places]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


def test_they_are_uniform():
    numbers = uniform(*PLACE, 400_000).double()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = torch.histc(numbers, 20, 0, 1)
    assert ((counts - 20_000).abs() < 5 * 20_000**0.5).all()
    assert abs(torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1]) < 0.01
