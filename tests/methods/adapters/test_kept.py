"""Results of parameters, kept while these stay as they are."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fulgurite.methods.adapters.kept import Kept


@pytest.fixture
def layer():
    return nn.Linear(2, 2)


def asks(layer, kept):
    """How many times the sum of a layer's parameters is taken, and a function that asks for it."""
    made = []

    def ask(key="sum"):
        parameters = list(layer.parameters())
        result = kept.get(key, parameters, lambda: made.append(key) or sum(p.sum() for p in parameters))
        return len(made), result

    return ask


@torch.no_grad()
def test_a_result_is_made_anew_where_a_parameter_changes_or_moves(layer):
    kept = Kept()
    ask = asks(layer, kept)
    assert [ask()[0], ask()[0], ask("other")[0], ask()[0]] == [1, 1, 2, 2]
    before = ask()[1]
    layer.bias.add_(1)
    count, after = ask()
    assert count == 3
    torch.testing.assert_close(after, before + 2)
    layer.double()
    assert ask()[0] == 4
    assert ask()[1].dtype == torch.float64
    kept.clear()
    assert ask()[0] == 5


def test_autocast_has_results_of_its_own(layer):
    ask = asks(layer, Kept())
    for enabled, expected in ((False, 1), (True, 2), (True, 2), (False, 3)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert ask()[0] == expected


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda kept: pickle.loads(pickle.dumps(kept))])
def test_copies_are_empty(clone, layer):
    kept = Kept()
    asks(layer, kept)()
    assert asks(layer, clone(kept))()[0] == 1
    assert asks(layer, kept)()[0] == 0
