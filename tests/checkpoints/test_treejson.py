"""A tree split into JSON and tensors, then joined, is the same tree, types included; or it is refused."""

import json
import math
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.checkpoints import DamagedError, RefusedError, join, split


def equal(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return (
            list(a) == list(b) and all(type(x) is type(y) for x, y in zip(a, b)) and all(equal(a[k], b[k]) for k in a)
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    return a == b


def round_trip(value):
    encoded, tensors = split(value)
    return join(json.loads(json.dumps(encoded, allow_nan=False)), tensors)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("$")
keys = st.text(max_size=5) | st.integers() | st.booleans() | st.tuples(st.integers(), st.text(max_size=3))
keys |= st.just("$")
leaves = scalars | st.builds(torch.tensor, st.lists(st.integers(0, 9), max_size=3))
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=3).map(OrderedDict)
    ),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(trees)
def test_round_trip(tree):
    assert equal(round_trip(tree), tree)


def test_plain_values_stay_readable():
    value = {"epoch": 3, "rates": [0.1, 1], "name": "Zürich", "none": None}
    assert split(value) == (value, {})


def test_torch_types_and_paths():
    value = [
        torch.Size([2, 3]),
        torch.bfloat16,
        torch.device("cpu"),
        Path("a/b"),
        -0.0,
        math.inf,
        -math.inf,
        1 << 70,
    ]
    assert equal(round_trip(value), value)


def test_tensors_are_named_by_their_path():
    _, tensors = split({"optimizer": [{"state": {0: {"exp_avg": torch.ones(1)}}}], "a/b": torch.zeros(1)}, "state")
    assert set(tensors) == {"state/optimizer/0/state/0/exp_avg", "state/a/b"}
    value = {"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}}
    assert equal(round_trip(value), value)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (object(), "object"),
        (b"bytes", "bytes"),
        ({1, 2}, "set"),
        (np.float64(1), "float64"),
        (np.int64(1), "int64"),
        (np.zeros(1), "ndarray"),
        (torch.nn.Linear(1, 1), "Linear"),
        (math.sin, "builtin_function"),
        (1j, "complex"),
        (torch.empty(1, device="meta"), "meta"),
        ("\ud800", "Unicode"),
    ],
)
def test_anything_else_is_refused_with_its_path(value, name):
    with pytest.raises(RefusedError, match=rf"callbacks/3/x.*{name}"):
        split({"callbacks": [0, 1, 2, {"x": value}]})


def test_a_value_that_holds_itself():
    loop = []
    loop.append(loop)
    with pytest.raises(RefusedError, match="holds itself"):
        split(loop)


@pytest.mark.parametrize("value", [{"$": 1}, {"$": ["tensor", "gone"]}, {"$": ["exec", "x"]}, {"$": ["float", []]}])
def test_foreign_json_is_damage(value):
    with pytest.raises(DamagedError):
        join(value, {})
