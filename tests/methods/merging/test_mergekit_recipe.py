"""Configurations of mergekit: what is read of them, what is refused, and what a parameter is at a tensor."""

import pytest

from fulgurite.methods.merging.mergekit_recipe import Input, setting_at
from fulgurite.methods.merging.mergekit_recipe import read_recipe as read


def read_recipe(value):
    recipe, problems = read(value)
    assert not problems
    return recipe


NAME = "model.layers.2.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("setting", "t", "expected"),
    [
        (0.3, 0.7, 0.3),
        ("1e-2", 0, 0.01),
        ([0.2], 0.9, 0.2),
        ([0, 1], 0.25, 0.25),
        ([0, 1, 0], 0.75, 0.5),
        ([0, 1, 0], 1, 0),
        ([], 0.5, None),
        ({"filter": "mlp", "value": 1}, 0, None),
        ({"value": [1, 3]}, 0.5, 2),
        ([{"filter": "mlp", "value": 1}, {"filter": "q_proj", "value": [0, 4]}, {"value": 9}], 0.5, 2),
        ([{"filter": "*", "value": 5}, {"value": 9}], 0.5, 5),
    ],
)
def test_a_setting_at_a_tensor(setting, t, expected):
    assert setting_at(setting, NAME, t, float) == (None if expected is None else pytest.approx(expected))


def test_booleans_are_chosen_and_not_mixed():
    assert setting_at([True, False, "true"], NAME, 0.4, bool) is True
    assert setting_at([True, False, "true"], NAME, 0.5, bool) is False
    assert setting_at(1, NAME, 0, bool) is True
    for value, kind in (("some", bool), (0.5, int), ("x", float), (True, float), ([1, 2.5], int)):
        with pytest.raises(ValueError):
            setting_at(value, NAME, 1, kind)


def test_models_with_a_base_that_is_not_among_them():
    recipe = read_recipe(
        {
            "models": [{"model": "a", "parameters": {"weight": 1}}, {"model": {"model": {"path": "b"}}}],
            "merge_method": "ties",
            "base_model": "base",
            "parameters": {"density": 0.5},
            "dtype": "float32",
            "out_dtype": "bfloat16",
        }
    )
    assert recipe.models == ["base", "a", "b"]
    assert recipe.slices[0].sources == (Input("a", None, {"weight": 1}), Input("b"), Input("base"))
    assert (recipe.whole, recipe.dtype, recipe.tokenizer) == (True, "bfloat16", None)
    assert recipe.parameters == ({"density": 0.5},)


def test_slices_and_a_single_module():
    slices = [{"sources": [{"model": "a", "layer_range": [0, 2]}], "parameters": {"scale": 2}}]
    plain = read_recipe({"slices": slices, "merge_method": "passthrough"})
    assert plain.slices[0].sources[0].layers == (0, 2)
    assert not plain.whole
    inner = {"slices": slices, "parameters": {"scale": 3}}
    module = read_recipe({"modules": {"default": inner}, "merge_method": "passthrough", "parameters": {"scale": 4}})
    assert module.slices == plain.slices
    assert module.parameters == ({"scale": 3}, {"scale": 4})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"tokenizer_source": "base", "base_model": "base"}, "base"),
        ({"tokenizer_source": "base"}, "a"),
        ({"tokenizer_source": "b"}, "b"),
        ({"tokenizer": {"source": "b"}}, "b"),
    ],
)
def test_the_tokenizer_of_a_model(given, expected):
    assert read_recipe({"models": [{"model": "a"}], "merge_method": "linear", **given}).tokenizer == expected


def test_all_that_is_not_supported_is_named_at_once():
    wrong = {
        "models": [
            {"model": "a+lora", "weight": 1},
            {"model": "owner/b@main", "parameters": {"weight": [1, {"value": 2}], "density": {"filter": 3}}},
            {"model": {"model": {"path": "c", "revision": "x"}, "lora": "d"}},
            {"model": 3},
        ],
        "dtype": "int8",
        "chat_template": "auto",
        "tokenizer": {"source": "union", "tokens": {"x": 1}},
        "tokenizer_source": "base",
        "name": "mine",
    }
    problems = "\n".join(read(wrong)[1])
    for said in (
        "adapter 'lora'",
        "models[0].weight",
        "revision of 'owner/b@main'",
        "parameters.weight",
        "models[1]",
        "models[2].model.revision",
        "models[2].model.lora",
        "3 names no model",
        "merge_method",
        "dtype",
        "chat_template",
        "union",
        "tokenizer.tokens",
        "tokenizer_source and tokenizer",
        "name: no such option",
    ):
        assert said in problems


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "one of models and slices"),
        ({"models": [{"model": "a"}], "slices": [{"sources": []}]}, "one of models and slices"),
        ({"modules": {"text": {}, "vision": {}}}, "modules"),
        ({"slices": [{"sources": [{"model": "a"}]}]}, "layer_range"),
        ({"slices": [{"sources": [{"model": "a", "layer_range": [2, 2]}]}]}, "layer_range"),
        (
            {"slices": [{"sources": [{"model": m, "layer_range": [0, n]} for m, n in (("a", 2), ("b", 3))]}]},
            "2, 3 layers",
        ),
        ({"slices": [{"sources": [], "residual_weight": 1}]}, "residual_weight"),
        ({"models": [3]}, "no mapping"),
    ],
)
def test_what_is_no_merge(given, said):
    assert said in "\n".join(read({"merge_method": "linear", **given})[1])
