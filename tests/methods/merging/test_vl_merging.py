"""Branches of one state dict against the formulas written out, and a model of blocks with and without branches."""

import copy

import pytest
import torch
from torch import nn

from fulgurite.methods.merging.vl_merging import (
    BranchArithmetic,
    InterpolateBranches,
    Layout,
    RegMeanBranches,
    branch_arithmetic,
)

D = 4
SHALLOW, DEEP = ("v", "l"), ("v", "l", "vl")


class Linears(nn.Module):
    def __init__(self, **sizes):
        super().__init__()
        for name, (width, out) in sizes.items():
            setattr(self, name, nn.Linear(width, out))


def block(branches):
    """A block's tensors by the official names; ``branches`` None is the block without them."""
    made = {
        "attn": lambda: Linears(qkv=(D, 3 * D), proj=(D, D)),
        "mlp": lambda: Linears(fc1=(D, 2 * D), fc2=(2 * D, D)),
        "norm1": lambda: nn.LayerNorm(D),
        "norm2": lambda: nn.LayerNorm(D),
    }
    out = nn.ModuleDict(
        {n: make() if branches is None else nn.ModuleDict({b: make() for b in branches}) for n, make in made.items()}
    )
    out.register_parameter("gamma_1", nn.Parameter(torch.rand(D)))
    return out


def model(depth, branches):
    """``depth`` blocks, the last one deep."""
    tower = nn.Module()
    tower.blocks = nn.ModuleList(block(branches and (DEEP if i == depth - 1 else SHALLOW)) for i in range(depth))
    tower.norm = nn.LayerNorm(D)
    out = nn.Module()
    out.transformer, out.token_type_embeddings = tower, nn.Embedding(2, D)
    return out


def noise(module, seed):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(t.shape, generator=generator) for n, t in module.state_dict().items()}


@pytest.fixture(params=[2, 13])
def depth(request):
    return request.param


@pytest.fixture
def state(depth):
    return noise(model(depth, True), 1)


@pytest.fixture
def seed(depth):
    return noise(model(depth, None), 2)


@pytest.fixture
def grams(state):
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name, tensor in state.items():
        if tensor.dim() == 2 and "blocks" in name:
            layer = name.removesuffix(".weight").removesuffix(".qkv")
            x = torch.randn(40, tensor.shape[1], generator=generator, dtype=torch.float64)
            found[layer] = (x[:, :, None] * x[:, None]).sum(0)
    return found


def named(depth, branch, module="attn", tail="qkv.weight", block=0):
    return f"transformer.blocks.{block % depth}.{module}.{branch}.{tail}"


QKV = "transformer.blocks.{}.attn.qkv.weight"
SEVERAL = [("attn", "qkv.weight"), ("attn", "proj.bias"), ("mlp", "fc2.weight"), ("norm2", "weight")]


def all_mergers(state, seed, grams, layout=None):
    layout = layout or Layout()
    return {
        "interpolation": InterpolateBranches(layout=layout)(state),
        "sum": BranchArithmetic(0.5, layout=layout)(state, seed),
        "sequential": BranchArithmetic(0.5, "sequential", layout=layout)(state, seed),
        "regmean": RegMeanBranches(layout=layout)(state, grams),
    }


def test_the_result_is_a_model_without_branches_and_inputs_stay(depth, state, seed, grams):
    before = copy.deepcopy((state, seed, grams))
    plain = model(depth, None)
    for merged in all_mergers(state, seed, grams).values():
        plain.load_state_dict(merged)
        assert sum(t.numel() for t in merged.values()) == sum(p.numel() for p in plain.parameters())
        for name in ("transformer.norm.weight", "token_type_embeddings.weight", "transformer.blocks.1.gamma_1"):
            assert torch.equal(merged[name], state[name])
            assert merged[name].data_ptr() != state[name].data_ptr()
    for now, then in zip((state, seed, grams), before):
        assert all(torch.equal(now[n], then[n]) for n in then)


def test_equal_branches_come_back(depth, state, grams):
    plain = noise(model(depth, None), 5)
    same = {}
    for name in state:
        parts = name.split(".")
        same[name] = plain[".".join(p for p in parts if p not in DEEP)].clone()
    for merged in all_mergers(same, plain, grams).values():
        for name, tensor in plain.items():
            torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0])
def test_interpolation_of_two_and_three(ratio, depth, state):
    merged = InterpolateBranches(ratio)(state)
    for module, tail in SEVERAL:
        v, t = (state[named(depth, b, module, tail)] for b in SHALLOW)
        own = merged[f"transformer.blocks.0.{module}.{tail}"]
        torch.testing.assert_close(own, ratio * v + (1 - ratio) * t)
        if ratio in (0, 1):
            assert torch.equal(own, v if ratio else t)
        v, t, vl = (state[named(depth, b, module, tail, -1)] for b in DEEP)
        own = merged[f"transformer.blocks.{depth - 1}.{module}.{tail}"]
        torch.testing.assert_close(own, (2 * ratio * v + 2 * (1 - ratio) * t + vl) / 3)


def test_interpolation_with_weights_of_its_own(depth, state):
    merged = InterpolateBranches(weights={"v": 1, "l": 3, "vl": 4})(state)
    v, t = (state[named(depth, b)] for b in SHALLOW)
    torch.testing.assert_close(merged[QKV.format(0)], (v + 3 * t) / 4)
    v, t, vl = (state[named(depth, b, block=-1)] for b in DEEP)
    torch.testing.assert_close(merged[QKV.format(depth - 1)], (v + 3 * t + 4 * vl) / 8)
    with pytest.raises(ValueError, match=r"no weight for the branches \['vl'\]"):
        InterpolateBranches(weights={"v": 1, "l": 1})(state)
    with pytest.raises(ValueError, match="all 0"):
        InterpolateBranches(weights={"v": 0, "l": 0, "vl": 1})(state)
    with pytest.raises(ValueError, match="not be negative"):
        InterpolateBranches(weights={"v": -1, "l": 2})
    with pytest.raises(ValueError, match="from 0 to 1"):
        InterpolateBranches(1.5)


@pytest.mark.parametrize("lam", [0.0, 0.75, 1.0])
def test_arithmetic_by_both_rules(lam, depth, state, seed):
    merged, sequential = (BranchArithmetic(lam, rule)(state, seed) for rule in ("sum", "sequential"))
    for module, tail in SEVERAL:
        name = f"transformer.blocks.0.{module}.{tail}"
        start, (v, t) = seed[name], (state[named(depth, b, module, tail)] for b in SHALLOW)
        torch.testing.assert_close(merged[name], start + lam * (v - start + t - start))
        torch.testing.assert_close(sequential[name], (1 - lam) ** 2 * start + lam * (1 - lam) * v + lam * t)
        name = f"transformer.blocks.{depth - 1}.{module}.{tail}"
        start, (v, t, vl) = seed[name], (state[named(depth, b, module, tail, -1)] for b in DEEP)
        torch.testing.assert_close(merged[name], start + lam * (v + t + vl - 3 * start), rtol=1e-5, atol=1e-5)
        rest = 1 - lam
        expected = rest**3 * start + lam * rest**2 * v + lam * rest * t + lam * vl
        torch.testing.assert_close(sequential[name], expected)


def test_arithmetic_at_a_half_is_interpolation_and_order_is_nothing(depth, state, seed):
    half, even = BranchArithmetic(0.5)(state, seed), InterpolateBranches(0.5)(state)
    torch.testing.assert_close(half[QKV.format(0)], even[QKV.format(0)])
    turned = dict(reversed(state.items()))
    for rule in ("sum", "sequential"):
        one, two = BranchArithmetic(0.75, rule)(state, seed), BranchArithmetic(0.75, rule)(turned, seed)
        assert all(torch.allclose(one[n], two[n], atol=1e-5) for n in one)
    start, only = torch.zeros(3), {"vl": torch.ones(3)}
    assert torch.equal(branch_arithmetic(start, only, 0.5, "sum"), only["vl"] / 2)
    assert torch.equal(branch_arithmetic(start, only, 0.5, "sequential"), only["vl"])


@pytest.mark.parametrize("offdiag", [1.0, 0.9, 0.0])
def test_regmean_is_the_minimum(offdiag, depth, state, grams):
    merged = RegMeanBranches(offdiag, ridge=0.0)(state, grams)
    for module, tail, layer in (("attn", "qkv.weight", ""), ("mlp", "fc2.weight", ".fc2")):
        w = merged[f"transformer.blocks.{depth - 1}.{module}.{tail}"].double().requires_grad_()
        loss = 0
        for branch in DEEP:
            gram = grams[f"transformer.blocks.{depth - 1}.{module}.{branch}{layer}"]
            gram = offdiag * gram + (1 - offdiag) * gram.diagonal().diag()
            apart = w - state[named(depth, branch, module, tail, -1)].double()
            loss = loss + torch.trace(apart @ gram @ apart.T)
        loss.backward()
        assert w.grad.abs().max() < 1e-3 * loss.item()
    for module, tail in (("attn", "proj.bias"), ("norm2", "weight")):
        expected = torch.stack([state[named(depth, b, module, tail)] for b in SHALLOW]).mean(0)
        torch.testing.assert_close(merged[f"transformer.blocks.0.{module}.{tail}"], expected)


def test_regmean_of_scaled_equal_and_weighted_grams(depth, state, grams):
    merged = RegMeanBranches(0.9)(state, grams)
    scaled = RegMeanBranches(0.9)(state, {n: 7 * g for n, g in grams.items()})
    assert all(torch.allclose(merged[n], scaled[n], rtol=1e-5, atol=1e-6) for n in merged)
    equal = {n: grams[n.replace(".l", ".v").replace(".vl", ".v")] for n in grams if ".vl" not in n}
    only = {n: t for n, t in state.items() if f"blocks.{depth - 1}." not in n}
    even = RegMeanBranches(0.9)(only, equal)
    torch.testing.assert_close(even[QKV.format(0)], InterpolateBranches()(state)[QKV.format(0)], rtol=1e-5, atol=1e-5)
    heavy = RegMeanBranches(weights={"v": 1e9})(only, grams)
    torch.testing.assert_close(heavy[QKV.format(0)], state[named(depth, "v")], rtol=1e-4, atol=1e-4)


def test_what_the_task_uses(depth, state, seed, grams):
    last = QKV.format(depth - 1)
    v, t, vl = (state[named(depth, b, block=-1)] for b in DEEP)
    pairs = Layout(used_by="nlvr2")
    assert torch.equal(InterpolateBranches(layout=pairs)(state)[last], vl)
    assert torch.equal(BranchArithmetic(0.5, "sequential", pairs)(state, seed)[last], vl)
    assert torch.equal(
        RegMeanBranches(layout=pairs)(state, {n: g for n, g in grams.items() if ".vl" not in n})[last], vl
    )
    apart = Layout(used_by="retrieval")
    torch.testing.assert_close(InterpolateBranches(0.3, layout=apart)(state)[last], 0.3 * v + 0.7 * t)
    first, both = QKV.format(0), [state[named(depth, b)] for b in SHALLOW]
    torch.testing.assert_close(InterpolateBranches(layout=pairs)(state)[first], sum(both) / 2)
    only = {n: t for n, t in state.items() if ".v." not in n and ".l." not in n}
    with pytest.raises(ValueError, match="retrieval uses branches other than vl"):
        InterpolateBranches(layout=apart)(only)


def test_partly_shared_blocks_and_other_layouts():
    state = {"b.0.attn.v.w": torch.ones(2), "b.0.attn.l.w": torch.zeros(2), "b.0.mlp.fc1.weight": torch.full((2,), 5.0)}
    merged = InterpolateBranches(0.25)(state)
    assert list(merged) == ["b.0.attn.w", "b.0.mlp.fc1.weight"]
    assert merged["b.0.attn.w"].tolist() == [0.25, 0.25]
    layout = Layout(pattern=r"(?P<head>layer\d+)\.experts\.(?P<branch>\w+)\.(?P<tail>.+)")
    state = {f"layer7.experts.{name}.w": torch.full((2,), float(i)) for i, name in enumerate(("a", "b", "c", "d"))}
    merged = InterpolateBranches(weights=dict.fromkeys("abcd", 1.0), layout=layout)(state)
    assert merged["layer7.w"].tolist() == [1.5, 1.5]


def test_types_and_bad_input(depth, state, seed, grams):
    low = {n: t.bfloat16() for n, t in state.items()}
    merged = RegMeanBranches()(low, grams)
    assert {t.dtype for t in merged.values()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="no tensor has branches"):
        InterpolateBranches()(seed)
    with pytest.raises(ValueError, match=r"both with and without branches: \['transformer.blocks.0.attn.qkv.weight'\]"):
        InterpolateBranches()({**state, QKV.format(0): seed[QKV.format(0)]})
    with pytest.raises(ValueError, match="different shapes"):
        InterpolateBranches()({**state, named(depth, "v"): torch.zeros(3, 3)})
    with pytest.raises(ValueError, match=r"attn\.l\.qkv\.weight holds NaN"):
        InterpolateBranches()({**state, named(depth, "l"): torch.full((12, 4), torch.nan)})
    missing = {n: t for n, t in seed.items() if n != QKV.format(0)}
    with pytest.raises(ValueError, match=r"1 tensors of the seed[\s\S]*missing"):
        BranchArithmetic()(state, missing)
    fewer = {n: g for n, g in grams.items() if n != "transformer.blocks.0.mlp.l.fc1"}
    with pytest.raises(ValueError, match=r"1 matrices have no Gram: \['transformer.blocks.0.mlp.l.fc1.weight'\]"):
        RegMeanBranches()(state, fewer)
