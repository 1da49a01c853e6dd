"""Merges of mergekit's configurations against formulas written out tensor by tensor."""

import pytest
import torch

from fulgurite.methods.merging.base import whole_of
from fulgurite.methods.merging.mergekit import check, planned, promoted
from fulgurite.methods.merging.mergekit_methods import KNOWN, method
from fulgurite.methods.merging.mergekit_recipe import read_recipe as read

LAYERS = 3
METHODS = [
    "linear",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "breadcrumbs",
    "breadcrumbs_ties",
    "sce",
    "ram",
    "ramplus_tl",
    "nearswap",
    "arcee_fusion",
    "slerp",
    "nuslerp",
    "multislerp",
    "karcher",
    "model_stock",
    "passthrough",
]


def model(seed, layers=LAYERS):
    generator = torch.Generator().manual_seed(seed)
    names = ["embed_tokens.weight", "norm.weight", "lm_head.weight"]
    names += [f"layers.{n}.{part}.weight" for n in range(layers) for part in ("self_attn.q", "mlp.up")]
    return {f"model.{name}": torch.randn(4, 3, generator=generator) for name in names}


MODELS = {name: model(seed) for seed, name in enumerate(("base", "a", "b", "c"))}


def read_recipe(value):
    recipe, problems = read(value)
    assert not problems
    return recipe


def merged(value):
    recipe = read_recipe(value)
    if problems := check(recipe)[0]:
        raise ValueError("\n".join(problems))
    plan, merger, _, layers = planned(recipe, MODELS, {name: name for name in MODELS})
    assert merger.begin(plan) is None
    return {
        name: whole_of(merger.merge_one(plan.operands(name, 5), ()), plan.merged[name][0]) for name in plan.order
    }, layers


def models_of(*parameters, names="abc"):
    return [{"model": name, "parameters": own} for name, own in zip(names, parameters)]


def test_parameters_by_name_and_depth():
    conditions = [{"filter": "self_attn", "value": [0.0, 1.0]}, {"filter": "mlp", "value": 0.4}, {"value": 0.7}]
    found, _ = merged(
        {"models": models_of({"weight": 0.5}, {"weight": conditions}), "merge_method": "linear"}
        | {"parameters": {"normalize": False}}
    )
    for name, tensor in found.items():
        layer = [n for n in range(LAYERS) if f".{n}." in name]
        weight = 0.7 if not layer else 0.4 if "mlp" in name else layer[0] / (LAYERS - 1)
        torch.testing.assert_close(tensor, 0.5 * MODELS["a"][name] + weight * MODELS["b"][name])


def test_a_gradient_begins_at_the_embeddings_and_ends_at_the_last_layer():
    found, _ = merged({"models": models_of({"weight": [1, 3]}), "merge_method": "linear", "base_model": "base"} | NORM)
    for name, tensor in found.items():
        layer = [n for n in range(LAYERS) if f".{n}." in name]
        weight = 1 + 2 * layer[0] / (LAYERS - 1) if layer else 1
        torch.testing.assert_close(tensor, weight * MODELS["a"][name] + 10 * MODELS["base"][name])


NORM = {"parameters": {"normalize": False, "weight": 10}}


def test_a_source_counts_before_its_slice_and_that_before_all():
    slices = [
        {
            "sources": [
                {"model": "a", "layer_range": [0, 1], "parameters": {"weight": [{"filter": "mlp", "value": 2}]}},
                {"model": "base", "layer_range": [1, 2]},
            ],
            "parameters": {"weight": [{"filter": "mlp", "value": 3}, {"filter": "self_attn", "value": 4}]},
        }
    ]
    found, layers = merged(
        {"slices": slices, "merge_method": "task_arithmetic", "base_model": "base", "parameters": {"weight": 5}}
    )
    assert layers == [0]
    for name, weight in (("mlp.up", 2), ("self_attn.q", 4)):
        old, new = (MODELS[m][f"model.layers.{n}.{name}.weight"] for m, n in (("base", 1), ("a", 0)))
        torch.testing.assert_close(found[f"model.layers.0.{name}.weight"], old + weight * (new - old))
    old, new = (MODELS[m]["model.norm.weight"] for m in ("base", "a"))
    torch.testing.assert_close(found["model.norm.weight"], old + 5 * (new - old))


def test_slices_are_stacked_with_the_ends_of_their_models():
    parts = (("a", 0, 2), ("b", 1, 3), ("a", 2, 3))
    slices = [{"sources": [{"model": m, "layer_range": [i, j]}]} for m, i, j in parts]
    slices[1]["sources"][0]["parameters"] = {"scale": [{"filter": "mlp", "value": [0.5, 2]}]}
    found, layers = merged({"slices": slices, "merge_method": "passthrough"})
    assert layers == [0, 1, 1, 2, 2]
    assert len(found) == 3 + 2 * 5
    torch.testing.assert_close(found["model.embed_tokens.weight"], MODELS["a"]["model.embed_tokens.weight"])
    torch.testing.assert_close(found["model.lm_head.weight"], MODELS["a"]["model.lm_head.weight"])
    for new, (name, old, scale) in enumerate((("a", 0, 1), ("a", 1, 1), ("b", 1, 0.5), ("b", 2, 2), ("a", 2, 1))):
        own = MODELS[name]
        assert torch.equal(found[f"model.layers.{new}.mlp.up.weight"], scale * own[f"model.layers.{old}.mlp.up.weight"])
        assert torch.equal(
            found[f"model.layers.{new}.self_attn.q.weight"], own[f"model.layers.{old}.self_attn.q.weight"]
        )


def test_what_stands_behind_the_layers_is_that_of_the_last_slice():
    slices = [{"sources": [{"model": m, "layer_range": [0, 1]}]} for m in "ab"]
    found, _ = merged({"slices": slices, "merge_method": "passthrough"})
    assert torch.equal(found["model.embed_tokens.weight"], MODELS["a"]["model.embed_tokens.weight"])
    for name in ("model.norm.weight", "model.lm_head.weight"):
        assert torch.equal(found[name], MODELS["b"][name])


def test_slerp_begins_at_the_base_wherever_that_stands():
    found, _ = merged({"models": models_of({}, {}, names=("a", "base")), **SLERP})
    assert all(torch.equal(tensor, MODELS["base"][name]) for name, tensor in found.items())


SLERP = {"merge_method": "slerp", "base_model": "base", "parameters": {"t": 0}}


def test_densities_differ_between_models_and_layers():
    own = [{"weight": 1, "density": [0, 1]}, {"weight": 1, "density": 0}]
    value = {"models": models_of(*own), "merge_method": "ties", "base_model": "base"}
    found, _ = merged({**value, "parameters": {"normalize": False}})
    name = "model.layers.2.mlp.up.weight"
    assert torch.equal(found["model.layers.0.mlp.up.weight"], MODELS["base"]["model.layers.0.mlp.up.weight"])
    torch.testing.assert_close(found[name], MODELS["a"][name])


def test_a_model_that_has_no_weight_anywhere_does_not_count():
    own = [{"weight": 1}, {"weight": 0}, {"weight": [{"filter": "norm", "value": 1}, {"value": 0}]}]
    recipe = read_recipe({"models": models_of(*own), "merge_method": "ties", "base_model": "base"})
    assert planned(recipe, MODELS, {name: name for name in MODELS})[2] == [1, 0, 1]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_back_one_model_that_is_all_there_is(name):
    """Equal models at weight 1: no threshold, mask, sign or angle can change anything."""
    own = method(name, True)
    count = {"passthrough": 1}.get(name, (own.most or 3) - (own.base != "ignored"))
    same = dict.fromkeys("abc"[:count], MODELS["a"]) | {"base": MODELS["a"]}
    value = {
        "models": [{"model": model, "parameters": {"weight": 1}} for model in "abc"[:count]],
        "merge_method": name,
        "parameters": {"t": 0.3},
    }
    if own.base != "ignored":
        value["base_model"] = "base"
    recipe = read_recipe(value)
    plan, merger, _, _ = planned(recipe, same, {model: model for model in same})
    assert merger.begin(plan) is None
    for tensor in plan.order:
        found = whole_of(merger.merge_one(plan.operands(tensor), ()), plan.merged[tensor][0])
        torch.testing.assert_close(found, MODELS["a"][tensor])


def test_every_parameter_of_every_method_is_known():
    assert {p for name in METHODS for has in (True, False) for p in method(name, has).parameters} <= KNOWN


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"merge_method": "union"}, "'union' is none of"),
        ({"merge_method": "slerp", "base_model": "base"}, "3 models, it takes 2"),
        ({"merge_method": "ties"}, "no base_model"),
        ({"merge_method": "karcher", "models": models_of({}, {}, names="aa")}, "a is named twice"),
        ({"merge_method": "linear", "parameters": {"wieght": 1}}, "wieght: no method"),
        ({"merge_method": "linear"}, "weight is missing for a, as at model"),
        ({"merge_method": "linear", "parameters": {"weight": "much"}}, "weight: could not"),
        ({"merge_method": "multislerp", "parameters": {"weight": 1, "normalize_weights": False}}, "normalize_weights"),
        ({"merge_method": "ties", "base_model": "base", "parameters": {"weight": 1, "rescale": True}}, "rescale"),
        (
            {"merge_method": "della", "base_model": "base", "parameters": {"weight": 1, "density": 0.95}},
            "lower epsilon",
        ),
    ],
)
def test_what_is_wrong_is_named(given, said):
    with pytest.raises(ValueError) as caught:
        merged({"models": models_of({}, {}), **given})
    assert said in str(caught.value)
    assert len(str(caught.value)) < 400


def test_layers_that_are_not_there():
    slices = [{"sources": [{"model": "a", "layer_range": [1, 5]}]}]
    with pytest.raises(ValueError, match="layers up to 5 of a, it has 3"):
        merged({"slices": slices, "merge_method": "passthrough"})
    two = {"encoder.0.weight": torch.ones(2), "decoder.0.weight": torch.ones(2)}
    slices[0]["sources"][0]["layer_range"] = [0, 1]
    with pytest.raises(ValueError, match="not one stack"):
        planned(read_recipe({"slices": slices, "merge_method": "passthrough"}), {"a": two}, {"a": "a"})


def test_parameters_without_effect_are_told():
    recipe = read_recipe({"models": models_of({"weight": 1, "density": 1}), "merge_method": "linear"})
    assert check(recipe)[1] == ["density has no effect on linear"]


def test_types_are_promoted():
    half = {name: tensor.half() for name, tensor in MODELS["a"].items()}
    recipe = read_recipe({"models": models_of({"weight": 1}, {"weight": 1}), "merge_method": "linear"})
    for other, expected in ((torch.bfloat16, torch.float32), (torch.float16, torch.float16)):
        models = {"a": half, "b": {name: tensor.to(other) for name, tensor in MODELS["b"].items()}}
        plan, *_ = planned(recipe, models, {"a": "a", "b": "b"})
        assert set(promoted(plan).values()) == {expected}
