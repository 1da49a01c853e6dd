"""The greedy soup against its published recipe."""

import pytest

from fulgurite.methods.merging.soup import greedy_soup


def test_greedy_soup_is_the_published_recipe():
    def score(models):
        return sum(models) / len(models)

    assert greedy_soup([5, 5, 3, 6], score) == ([5, 5, 6], 16 / 3)
    with pytest.raises(ValueError, match="no models"):
        greedy_soup([], score)
