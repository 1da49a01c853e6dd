"""What every kind of adapter and every mixture must hold. A new kind is tested by adding it to ALL_KINDS."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fulgurite.methods.adapters.bank import AdapterBank, Placement
from fulgurite.methods.adapters.bias import Bias
from fulgurite.methods.adapters.bottleneck import Bottleneck
from fulgurite.methods.adapters.compacter import Compacter, PHMLinear
from fulgurite.methods.adapters.delta import WeightDelta
from fulgurite.methods.adapters.hyperformer import Hyperformer
from fulgurite.methods.adapters.ia3 import IA3, IA3Input
from fulgurite.methods.adapters.lora import LoRA
from fulgurite.methods.adapters.low_rank import LowRankAdapter
from fulgurite.methods.adapters.per_task import PerTask
from fulgurite.methods.adapters.replace import Replace
from fulgurite.methods.adapters.sharing import Shared
from fulgurite.methods.adapters.tasks import tasks_of
from fulgurite.methods.structure import ModelSpec

TASKS = ["a", "b"]
normed = partial(Bottleneck, reduction=2, norm_before=True, norm_after=True)
compacter = partial(Compacter, reduction=3, division=2)

# name -> (kind, point of `Toy`)
ALL_KINDS = {
    "bottleneck": (partial(Bottleneck, reduction=3), "linear"),
    "bottleneck_gelu_scaled": (partial(Bottleneck, reduction=2, scale=0.5, activation="gelu"), "linear"),
    "bottleneck_gelu_new_normed": (partial(normed, activation="gelu_new"), "linear"),
    "bottleneck_parallel": (partial(Bottleneck, reduction=2, parallel=True, norm_before=True), "linear"),
    "compacter": (compacter, "linear"),
    "compacter_factorized": (partial(compacter, rank=2, one_rule=True), "linear"),
    "low_rank": (partial(LowRankAdapter, reduction=3, rank=2), "linear"),
    "hyperformer": (partial(Hyperformer, tasks=TASKS, reduction=3, embedding=6, hidden=5, projected=4), "equal_widths"),
    "ia3": (IA3, "linear"),
    "ia3_input": (IA3Input, "linear"),
    "bias_linear": (Bias, "linear"),
    "bias_norm": (Bias, "norm"),
    "bias_conv": (Bias, "conv"),
    "per_task": (partial(PerTask, kind=partial(Bottleneck, reduction=3), tasks=TASKS), "linear"),
    "per_task_half_shared": (partial(PerTask, kind=normed, tasks=TASKS, shared=["up", "norm_before"]), "linear"),
    "per_task_lora": (partial(PerTask, kind=partial(LoRA, rank=2), tasks=TASKS), "linear"),
    "per_task_compacter": (
        partial(PerTask, kind=partial(compacter, one_rule=True), tasks=TASKS, shared=["rule"]),
        "linear",
    ),
    "per_task_replace": (partial(PerTask, kind=Replace, tasks=TASKS), "norm"),
    "shared_compacter": (partial(Shared, kind=partial(compacter, one_rule=True), parts=["rule"]), "linear"),
    "shared_per_task": (
        partial(
            Shared,
            kind=partial(PerTask, kind=partial(compacter, one_rule=True), tasks=TASKS, shared=["rule"]),
            parts=["rule"],
        ),
        "linear",
    ),
    "lora": (partial(LoRA, rank=3), "linear"),
    "rslora": (partial(LoRA, rank=3, rslora=True, alpha=2.0), "linear"),
    "delta": (WeightDelta, "linear"),
    "replace_linear": (Replace, "linear"),
    "replace_layer_norm": (Replace, "norm"),
    "replace_rms_norm": (Replace, "rms"),
    "replace_conv": (Replace, "conv"),
}
MIXING = [name for name in ALL_KINDS if name not in ("replace_conv", "hyperformer")]
SETS = ["a", "b", "c"]
B, S, D = 6, 5, 12


def task_of(x: Tensor) -> Tensor:
    """A sample's task by its first values: x (B, S, D) -> (B,)."""
    return (x[:, 0] > 0).sum(1) % len(TASKS)


class Toy(nn.Module):
    """(B, S, D) -> (B, S, D) through every kind of site. A sample's first values say of which task it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(D, 2 * D), nn.Linear(2 * D, D)])
        self.norms = nn.ModuleList([nn.LayerNorm(D), nn.LayerNorm(D)])
        self.rms, self.conv = nn.RMSNorm(D), nn.Conv1d(D, D, 3, padding=1)
        points = {"linear": (r"layers\.[01]", 2), "norm": (r"norms\.0", 1), "rms": ("rms", 1), "conv": ("conv", 1)}
        self.spec = ModelSpec(towers=(), points=points | {"equal_widths": (r"norms\.\d", 2)})
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with tasks_of(task_of(x)):
            x = self.norms[0](x + self.layers[1](self.layers[0](x).tanh()))
            return self.rms(self.norms[1](x) + self.conv(x.mT).mT)


def build(kind: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Toy, AdapterBank]:
    """A toy with a bank of three random sets, and a fresh live one."""
    torch.manual_seed(seed)
    model = Toy()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    make, point = ALL_KINDS[kind]
    bank = AdapterBank(model, [Placement([point], make)], SETS)
    for name in SETS:
        for parameter in bank.parameters_of(name):
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.to(dtype)
    return model, bank.to(dtype)


def merged(bank: AdapterBank, row: Tensor) -> dict[str, list[Tensor]]:
    """Parameters of the average of the sets, by hand."""
    sets = [bank.parameters_of(name) for name in SETS]
    return [sum(weight * t[i] for weight, t in zip(row, sets)) for i in range(len(sets[0]))]


def slow(model: Toy, bank: AdapterBank, x: Tensor, weights: Tensor) -> Tensor:
    """Sample by sample: put the average into a copy of the live set and run the copy of the model."""
    owner = copy.deepcopy(nn.ModuleList([model, bank]))
    outputs = []
    for sample, row in zip(x, weights):
        for parameter, value in zip(owner[1].parameters_of("live"), merged(bank, row)):
            parameter.data.copy_(value)
        outputs.append(owner[0](sample[None]))
    return torch.cat(outputs)


def adapters_at(bank: AdapterBank, name: str) -> dict[str, nn.Module]:
    """The adapters of a set that make products, by site; those of tasks as {site: {task: adapter}}."""
    found = {}
    for site, adapter in bank.adapters_of(name).items():
        each = zip(["layers.0", "layers.1"], adapter.each) if isinstance(adapter, Shared) else [(site, adapter)]
        for place, inner in each:
            found[place] = dict(inner.adapters) if isinstance(inner, PerTask) else dict.fromkeys(TASKS, inner)
    return found


def matrix(layer: nn.Module) -> Tensor:
    """A map's matrix (O, I), explicitly."""
    if not isinstance(layer, PHMLinear):
        return (layer.left @ layer.right).T
    blocks = layer.blocks if layer.rank is None else [left @ right for left, right in zip(layer.left, layer.right)]
    return sum(torch.kron(a, w) for a, w in zip(layer.rule.weight, blocks)).T


def slow_products(model: Toy, bank: AdapterBank, x: Tensor, weights: Tensor) -> Tensor:
    """Kinds whose matrices are products: a plain bottleneck with the average of the explicit matrices, per sample."""
    outputs = []
    for sample, row in zip(x, weights):
        task = TASKS[task_of(sample[None])]
        plain = Toy().to(x.dtype)
        plain.load_state_dict(model.state_dict())
        twin = AdapterBank(plain, [Placement(["linear"], partial(Bottleneck, reduction=3, activation="gelu_new"))])
        twin.to(x.dtype)
        for site, adapter in twin.adapters_of("live").items():
            sets = [adapters_at(bank, name)[site][task] for name in SETS]
            for part in ("down", "up"):
                layers = [getattr(each, part) for each in sets]
                getattr(adapter, part).weight.data = sum(w * matrix(layer) for w, layer in zip(row, layers))
                getattr(adapter, part).bias.data = sum(w * layer.bias for w, layer in zip(row, layers))
        outputs.append(plain(sample[None]))
    return torch.cat(outputs).detach()


def reference_of(kind: str):
    """The slow form of a kind's mixing."""
    if "lora" in kind:
        return slow_lora
    return slow_products if "compacter" in kind or "low_rank" in kind or kind == "shared_per_task" else slow


def slow_lora(model: Toy, bank: AdapterBank, x: Tensor, weights: Tensor) -> Tensor:
    """LoRA mixes weight changes, so the slow form writes W + s sum_i p_i B_i A_i into plain layers."""
    outputs = []
    for sample, row in zip(x, weights):
        plain = Toy().to(x.dtype)
        plain.load_state_dict(model.state_dict())
        task = TASKS[task_of(sample[None])]
        for site in bank.sites:
            for weight, name in zip(row, SETS):
                adapter = adapters_at(bank, name)[site][task]
                change = adapter.up.weight @ adapter.down.weight
                plain.get_submodule(site).weight.data += weight * adapter.scale * change
        outputs.append(plain(sample[None]))
    return torch.cat(outputs)


def weights_of(batch: int = B) -> Tensor:
    """Rows of every sort: spread, top-2, one-hot, and equal rows that are neighbours or not."""
    rows = [[0.2, 0.5, 0.3], [0.0, 0.7, 0.3], [0.0, 0.7, 0.3], [1.0, 0, 0], [0.2, 0.5, 0.3], [0.6, 0, 0.4]]
    return torch.tensor(rows, dtype=torch.float64)[:batch]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(B, S, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_fresh_adapter_leaves_the_backbone_bit_for_bit(kind, dtype, x):
    model, bank = build(kind, dtype)
    x = x.to(dtype)
    with bank.use(None):
        bare = model(x)
    assert torch.equal(model(x), bare)
    with bank.use("a"):
        assert not torch.equal(model(x), bare)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_only_the_live_set_trains(kind, x):
    model, bank = build(kind)
    model(x).sum().backward()
    assert all(p.grad is not None for p in bank.parameters_of("live"))
    others = [p for name in SETS for p in bank.parameters_of(name)] + list(model.parameters())
    assert all(p.grad is None and not p.requires_grad for p in others)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_copy_and_reset_work_in_place(kind, x):
    model, bank = build(kind)
    live = bank.parameters_of("live")
    start = [p.detach().clone() for p in live]
    bank.copy("a", "live")
    with bank.use("a"):
        expected = model(x)
    assert torch.equal(model(x), expected)
    assert all(new is old for new, old in zip(bank.parameters_of("live"), live))
    bank.reset("live", torch.Generator().manual_seed(3))
    first = [p.detach().clone() for p in live]
    bank.reset("live", torch.Generator().manual_seed(3))
    assert all(torch.equal(p, q) for p, q in zip(live, first))
    with bank.use(None):
        bare = model(x)
    assert torch.equal(model(x), bare)
    assert [p.shape for p in live] == [p.shape for p in start]


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_an_index_gives_every_sample_its_set(kind, x):
    model, bank = build(kind)
    index = torch.tensor([2, 0, 0, 1, 2, 1])
    with bank.use(index):
        chosen = model(x)
    for number, name in enumerate(SETS):
        with bank.use(name):
            torch.testing.assert_close(chosen[index == number], model(x)[index == number], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", MIXING)
@pytest.mark.parametrize("grad", [False, True])
def test_mixing_equals_the_slow_reference(kind, grad, x):
    model, bank = build(kind)
    weights = weights_of()
    with torch.set_grad_enabled(grad), bank.use(weights):
        mixed = model(x)
    torch.testing.assert_close(mixed, reference_of(kind)(model, bank, x, weights), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", MIXING)
def test_float32_and_autocast_mixing_stay_close(kind, x):
    model, bank = build(kind, torch.float32)
    weights, x = weights_of().float(), x.float()
    reference = reference_of(kind)(model, bank, x, weights)
    with torch.no_grad(), bank.use(weights):
        torch.testing.assert_close(model(x), reference, rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x)
    assert (half - reference).abs().max() < 0.1


@pytest.mark.parametrize("kind", MIXING)
def test_gradients_of_mixing_are_exact(kind, x):
    """Against finite differences, for input, weights, and all experts, the unused ones included."""
    model, bank = build(kind)
    x, weights = x[:4, :2].clone().requires_grad_(), weights_of(4).requires_grad_()
    experts = [p for name in SETS for p in bank.parameters_of(name)]
    for parameter in experts:
        parameter.requires_grad_()

    def run(x: Tensor, weights: Tensor, *_: Tensor) -> Tensor:
        with bank.use(weights):
            return model(x)

    assert torch.autograd.gradcheck(run, (x, weights, *experts), atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("kind", MIXING)
def test_one_hot_rows_equal_the_single_set(kind, x):
    model, bank = build(kind, torch.float32)
    x = x.float()
    with torch.no_grad():
        for number, name in enumerate(SETS):
            with bank.use(name):
                single = model(x)
            with bank.use(torch.eye(3)[[number] * B]):
                assert torch.equal(model(x), single)
            with bank.use(torch.ones(B, 1), [name]):
                assert torch.equal(model(x), single)


@pytest.mark.parametrize("kind", MIXING)
def test_mixing_laws(kind, x):
    """Order of experts, equal experts, and batch mates do not matter."""
    model, bank = build(kind)
    weights = weights_of()
    order = [2, 0, 1]
    with torch.no_grad():
        with bank.use(weights):
            mixed = model(x)
        with bank.use(weights[:, order], [SETS[i] for i in order]):
            torch.testing.assert_close(model(x), mixed, rtol=0, atol=1e-12)
        for sample in range(B):
            with bank.use(weights[sample : sample + 1]):
                alone = model(x[sample : sample + 1])
            torch.testing.assert_close(alone[0], mixed[sample], rtol=0, atol=1e-12)
        for name in ("b", "c"):
            bank.copy("a", name)
        with bank.use(weights):
            mixed = model(x)
        with bank.use("a"):
            torch.testing.assert_close(mixed, model(x), rtol=0, atol=1e-12)


def test_a_kind_without_mixing_refuses_by_name(x):
    model, bank = build("replace_conv")
    with (
        pytest.raises(ValueError, match=r"(?s)Replace.*Conv1d.*'conv' does not define mixing"),
        bank.use(weights_of()),
    ):
        model(x)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_state_dict_holds_the_sets_only_and_loads_into_another_bank(kind, x):
    model, bank = build(kind)
    other_model, other = build(kind, seed=9)
    assert {key.split(".")[1] for key in bank.state_dict()} == {*SETS, "live"}
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(bank.state_dict())
    for name in SETS:
        with bank.use(name), other.use(name):
            assert torch.equal(model(x), other_model(x))
