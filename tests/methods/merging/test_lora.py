"""Merged LoRA factors against sums of dense changes, a full SVD, and `peft` itself."""

import copy
import warnings

import pytest
import torch

from fulgurite.methods.merging.lora import Factors, MergeLoRA, exact_sum, truncated

WEIGHTS = [1.0, 0.5, -0.25]
SHAPES = {"q": (10, 12), "v": (6, 10)}  # (out, in)
PRUNING = ["ties", "dare_linear", "dare_ties", "magnitude_prune"]
FORMS = ["cat", "mean", "svd", "factors_linear", *(f"{kind}_{r}" for kind in ("delta", "factors") for r in PRUNING)]


def adapter(seed, rank=4, scale=2.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    return {site: Factors(draw(rank, width), draw(out, rank), scale) for site, (out, width) in SHAPES.items()}


@pytest.fixture
def adapters():
    return [adapter(1), adapter(2, scale=0.5), adapter(3, scale=4.0)]


def merger(form, density=1.0, **settings):
    if form.partition("_")[2] not in ("", "linear"):
        settings["density"] = density
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MergeLoRA(form, **settings)


def dense(f):
    return f.scale * f.up.double() @ f.down.double()


def summed(adapters, site, weights=WEIGHTS):
    return sum(w * dense(a[site]) for a, w in zip(adapters, weights))


@pytest.mark.parametrize("form", FORMS)
def test_one_adapter_at_weight_one_comes_back_to_the_bit(form):
    given = adapter(1, scale=8 / 4**0.5)
    merged = merger(form)([given])
    for site, f in given.items():
        assert torch.equal(merged[site].down, f.down)
        assert torch.equal(merged[site].up, f.up)
        assert merged[site].scale == f.scale
        assert merged[site].down.data_ptr() != f.down.data_ptr()


@pytest.mark.parametrize(
    ("form", "weight"),
    [
        ("cat", 0.5),
        ("svd", 0.5),
        ("mean", 1.0),
        ("delta_ties", 1.0),
        ("delta_dare_ties", 1.0),
        ("delta_magnitude_prune", 0.5),
        ("factors_ties", 1.0),
    ],
)
def test_two_equal_adapters_change_what_one_does(form, weight):
    given = adapter(1)
    for site, f in merger(form)([given, given], [weight, weight]).items():
        torch.testing.assert_close(dense(f), dense(given[site]), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_inputs_stay_and_types_are_the_first_ones(form, adapters):
    low = [{s: Factors(f.down.bfloat16(), f.up.bfloat16(), f.scale) for s, f in a.items()} for a in adapters]
    before = copy.deepcopy(low)
    merged = merger(form, 0.5)(low, WEIGHTS if form != "mean" else None)
    assert all(f.down.dtype == f.up.dtype == torch.bfloat16 for f in merged.values())
    for a, b in zip(low, before):
        assert all(torch.equal(a[s].down, b[s].down) and torch.equal(a[s].up, b[s].up) for s in a)


def test_cat_is_the_exact_sum_and_mean_that_over_the_weights(adapters):
    given = [adapter(1), adapter(2, rank=2), adapter(3, rank=7)]
    merged, mean = MergeLoRA()(given, WEIGHTS), MergeLoRA("mean")(given)
    for site in SHAPES:
        assert merged[site].rank == 13
        torch.testing.assert_close(dense(merged[site]), summed(given, site), rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(dense(mean[site]), summed(given, site, [1 / 3] * 3), rtol=1e-6, atol=1e-5)
        averaged = sum(f[site].up for f in adapters) @ sum(f[site].down for f in adapters) / 9
        ours = MergeLoRA("mean")([{site: a[site]._replace(scale=1.0)} for a in adapters])[site]
        assert not torch.allclose(ours.change(), averaged, atol=0.1)
        shared = [{site: Factors(adapters[0][site].down, a[site].up, 1.0)} for a in adapters]
        expected = sum(a[site].up for a in adapters) @ adapters[0][site].down / 3
        torch.testing.assert_close(MergeLoRA("mean")(shared)[site].change(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [None, 1, 3, 5, 12, 40])
def test_svd_is_the_best_of_its_rank(rank, adapters):
    for site, f in MergeLoRA("svd", rank=rank)(adapters, WEIGHTS).items():
        whole = summed(adapters, site)
        u, s, vh = torch.linalg.svd(whole, full_matrices=False)
        k = rank or 4
        torch.testing.assert_close(dense(f), (u[:, :k] * s[:k]) @ vh[:k], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close((dense(f) - whole).norm(), s[k:].norm(), rtol=1e-3, atol=1e-4)
        assert f.rank <= k
        assert f.scale == 1


def test_no_dense_matrix_is_made_on_the_way_to_a_rank():
    wide = 30_000
    generator = torch.Generator().manual_seed(0)
    given = [{"q": Factors(torch.randn(2, wide, generator=generator), torch.eye(wide, 2), 1.0)} for _ in range(2)]
    merged = MergeLoRA("svd")(given)["q"]  # dense it would be 3.6 GB
    assert merged.rank == 2
    torch.testing.assert_close(
        merged.up @ (merged.down @ torch.ones(wide)), merged.up @ merged.down.sum(1), rtol=1e-5, atol=1e-3
    )
    torch.testing.assert_close(
        merged.up[:2] @ merged.down, given[0]["q"].down + given[1]["q"].down, rtol=1e-4, atol=1e-4
    )


def test_the_order_of_adapters_does_not_matter_and_the_sum_is_linear_in_the_weights(adapters):
    for site in SHAPES:
        turned = MergeLoRA()(adapters[::-1], WEIGHTS[::-1])[site].change()
        once, twice = (MergeLoRA()(adapters, [k * w for w in WEIGHTS])[site].change() for k in (1, 2))
        torch.testing.assert_close(turned, once, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(twice, 2 * once, rtol=1e-5, atol=1e-5)


def test_a_convolution_keeps_its_axes():
    generator = torch.Generator().manual_seed(0)
    given = [
        {"c": Factors(torch.randn(2, 3, 5, 5, generator=generator), torch.randn(6, 2, 1, 1, generator=generator), 1.5)}
        for _ in range(2)
    ]
    expected = sum(1.5 * torch.einsum("or,rihw->oihw", g["c"].up[:, :, 0, 0], g["c"].down) for g in given)
    for form in ("cat", "svd", "delta_ties"):
        merged = merger(form, rank=None if form == "cat" else 4)(given)["c"]
        assert merged.down.shape == (4, 3, 5, 5)
        assert merged.up.shape == (6, 4, 1, 1)
        if form != "delta_ties":
            torch.testing.assert_close(merged.change(), expected, rtol=1e-4, atol=1e-4)


def in_peft(adapters, kind, weights, **options):
    """peft's own combination: site -> (A, B)."""
    from peft import LoraConfig, get_peft_model

    model = torch.nn.ModuleDict({s: torch.nn.Linear(width, out) for s, (out, width) in SHAPES.items()})
    model.config = {"tie_word_embeddings": False}
    wrapped = None
    for number, factors in enumerate(adapters):
        config = LoraConfig(r=4, lora_alpha=4 * factors["q"].scale, target_modules=list(SHAPES))
        if wrapped is None:
            wrapped = get_peft_model(model, config, adapter_name="0")
        else:
            wrapped.add_adapter(str(number), config)
        for site, f in factors.items():
            layer = wrapped.base_model.model[site]
            layer.lora_A[str(number)].weight.data = f.down.clone()
            layer.lora_B[str(number)].weight.data = f.up.clone()
    names = [str(number) for number in range(len(adapters))]
    wrapped.add_weighted_adapter(names, weights, "out", combination_type=kind, **options)
    layers = {site: wrapped.base_model.model[site] for site in SHAPES}
    return {s: (m.lora_A["out"].weight, m.lora_B["out"].weight, m.scaling["out"]) for s, m in layers.items()}


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        ("cat", "cat"),
        ("svd", "svd"),
        ("factors_linear", "linear"),
        ("factors_ties", "ties"),
        ("factors_magnitude_prune", "magnitude_prune"),
        ("delta_ties", "ties_svd"),
        ("delta_magnitude_prune", "magnitude_prune_svd"),
    ],
)
@pytest.mark.parametrize("vote", ["total", "frequency"])
def test_peft_makes_the_same(form, kind, vote, adapters):
    options = {} if kind in ("cat", "svd", "linear") else {"density": 0.4}
    theirs = in_peft(adapters, kind, WEIGHTS, majority_sign_method=vote, **options)
    for site, f in merger(form, 0.4, vote=vote)(adapters, WEIGHTS).items():
        a, b, scale = theirs[site]
        torch.testing.assert_close(f.change(), scale * b @ a, rtol=1e-4, atol=1e-4)
        if form in ("cat", "factors_linear", "factors_ties"):
            torch.testing.assert_close(f.down, a, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_one_error(adapters):
    del adapters[1]["v"]
    adapters[2]["q"] = adapters[2]["q"]._replace(up=torch.full((10, 4), torch.nan))
    with pytest.raises(ValueError, match=r"in 2 things[\s\S]*q: adapter 2 holds NaN[\s\S]*v: not in adapter 1"):
        MergeLoRA()(adapters)
    adapters[2]["q"] = Factors(torch.zeros(4, 9), torch.zeros(10, 4), 1.0)
    with pytest.raises(ValueError, match="another layer's"):
        MergeLoRA(strict=False)(adapters)
    with pytest.raises(ValueError, match="is no A"):
        MergeLoRA()([{"q": Factors(torch.zeros(4, 9), torch.zeros(10, 3), 1.0)}])
    with pytest.raises(ValueError, match="ranks 4 and 2"):
        merger("factors_linear")([adapter(1), adapter(2, rank=2)])
    with pytest.raises(ValueError, match="no adapters"):
        MergeLoRA()([])
    with pytest.raises(ValueError, match="2 weights for 1 adapters"):
        MergeLoRA()(adapters[:1], [1.0, 2.0])
    with pytest.raises(ValueError, match="cancel"):
        MergeLoRA("mean")([adapter(1), adapter(2)], [1.0, -1.0])


def test_a_layer_that_one_lacks_is_no_change_by_option(adapters):
    del adapters[1]["v"]
    merged = MergeLoRA("mean", strict=False)(adapters)
    expected = (dense(adapters[0]["v"]) + dense(adapters[2]["v"])) / 3
    torch.testing.assert_close(dense(merged["v"]), expected, rtol=1e-5, atol=1e-5)


def test_settings_that_a_form_does_not_have_are_refused():
    for settings in ({"form": "cat", "rank": 3}, {"form": "svd", "rank": 0}, {"form": "factors_linear", "rank": 3}):
        with pytest.raises(ValueError, match="rank="):
            MergeLoRA(**settings)
    with pytest.raises(ValueError, match="give density"):
        MergeLoRA("delta_ties")
    for settings in ({"form": "svd", "density": 0.5}, {"form": "delta_ties", "density": 0.0}):
        with pytest.raises(ValueError, match="density="):
            MergeLoRA(**settings)
    with pytest.warns(UserWarning, match="not the sum of the changes"):
        MergeLoRA("factors_linear")


def test_truncating_at_the_whole_rank_is_exact(adapters):
    whole = exact_sum([a["q"] for a in adapters], WEIGHTS)
    torch.testing.assert_close(truncated(whole, 12).change(), whole.change(), rtol=1e-4, atol=1e-4)
