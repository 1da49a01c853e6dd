"""Weights by name and depth against merges of single tensors at those weights."""

import re

import pytest
import torch

from fulgurite.methods.merging.layerwise import Layerwise, depths
from fulgurite.methods.merging.linear import Average, TaskArithmetic
from fulgurite.methods.merging.slerp import Slerp


def stack(seed, layers=5):
    generator = torch.Generator().manual_seed(seed)
    names = ["embed", *(f"blocks.{n}.{p}" for n in range(layers) for p in ("attn", "mlp.experts.1")), "head"]
    return {name: torch.randn(3, 4, generator=generator) for name in names}


def test_layers_are_swapped_to_the_bit():
    a, b = stack(0), stack(1)
    merged = Layerwise(Average(), [(r"blocks\.[123]\.", [0, 1])])([a, b], weights=[1, 0])
    for name in a:
        middle = name.startswith(("blocks.1", "blocks.2", "blocks.3"))
        assert torch.equal(merged[name], (b if middle else a)[name])


def test_the_first_rule_holds_and_the_rest_has_the_weights_of_the_call():
    base, a, b = stack(0), stack(1), stack(2)
    rules = [("attn", [1.0, 0.0]), (r"blocks\.4", [0.0, 2.0])]
    merged = Layerwise(TaskArithmetic(0.5), rules)([a, b], base, [3.0, 4.0])
    expected = {"blocks.4.attn": (1, 0), "blocks.4.mlp.experts.1": (0, 2), "blocks.0.mlp.experts.1": (3, 4)}
    for name, weights in expected.items():
        single = TaskArithmetic(0.5)([{name: a[name]}, {name: b[name]}], {name: base[name]}, weights)
        assert torch.equal(merged[name], single[name])


def test_a_gradient_is_straight_between_its_points():
    a, b = stack(0), stack(1)
    rules = [("attn", [[1.0, 0.0, 0.5], 0.0]), ("attn|head", [0.25, 0])]
    with pytest.raises(LookupError, match="'nothing'"):
        Layerwise(Average(normalize=False), [*rules, ("nothing", [1, 1])])([a, b])
    merged = Layerwise(Average(normalize=False), rules)([a, b])
    for layer, weight in enumerate((1.0, 0.5, 0.0, 0.25, 0.5)):
        torch.testing.assert_close(merged[f"blocks.{layer}.attn"], weight * a[f"blocks.{layer}.attn"])
    torch.testing.assert_close(merged["head"], 0.25 * a["head"])


def test_gradients_of_slerp_are_its_share():
    a, b = stack(0), stack(1)
    merged = Layerwise(Slerp(), [("attn", [[1, 0.5, 0], [0, 0.5, 1]])])([a, b])
    assert torch.equal(merged["blocks.0.attn"], a["blocks.0.attn"])
    assert torch.equal(merged["blocks.4.attn"], b["blocks.4.attn"])
    for name, t in (("blocks.1.attn", 0.25), ("blocks.1.mlp.experts.1", 0.5)):
        assert torch.equal(merged[name], Slerp(t)([{name: a[name]}, {name: b[name]}])[name])


def test_depth_is_of_the_first_number_in_its_own_stack():
    names = ["vision.blocks.2.w", "vision.blocks.0.experts.7.w", "text.layers.4.w", "text.layers.1.w", "norm1.w", "3.w"]
    assert depths(names) == {
        "vision.blocks.2.w": 1.0,
        "vision.blocks.0.experts.7.w": 0.0,
        "text.layers.4.w": 1.0,
        "text.layers.1.w": 0.25,
        "3.w": 1.0,
    }
    assert depths(["blocks.0.w"]) == {"blocks.0.w": 0.0}


def test_statistics_follow_their_rule(base, experts):
    merged = Layerwise(TaskArithmetic(), [(r"^bn\.", [0, 0, 1]), ("embed", [1, 1, 1])])(experts, base)
    assert torch.equal(merged["bn.running_var"], experts[2]["bn.running_var"])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("(", [1, 1])], "not a regular expression"),
        ([("attn", [[], 1])], "without a value"),
        ([("attn", [1, 1, 1])], "3 weights for 2 models"),
        ([("embed|head", [[1, 0], 1])], "no tensor is left for: 'embed|head'"),
        ([("blocks", [1, 1]), ("attn", [1, 0])], "no tensor is left for: 'attn'"),
    ],
)
def test_rules_that_cannot_hold_are_refused(rules, message):
    with pytest.raises((ValueError, LookupError), match=re.escape(message)):
        Layerwise(Average(), rules)([stack(0), stack(1)])
