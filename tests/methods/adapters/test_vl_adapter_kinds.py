"""The kinds of VL-Adapter: parameter counts, sharing, explicit Kronecker products, a hyper-network written out."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

from fulgurite.methods.adapters.bank import AdapterBank, Placement
from fulgurite.methods.adapters.base import FoldError, SpanSite
from fulgurite.methods.adapters.bias import Bias
from fulgurite.methods.adapters.bottleneck import Bottleneck
from fulgurite.methods.adapters.compacter import Compacter, PHMLinear
from fulgurite.methods.adapters.hyperformer import Hyperformer
from fulgurite.methods.adapters.ia3 import IA3, IA3Input
from fulgurite.methods.adapters.lora import LoRA
from fulgurite.methods.adapters.low_rank import LowRankAdapter
from fulgurite.methods.adapters.per_task import PerTask
from fulgurite.methods.adapters.sharing import Shared
from fulgurite.methods.adapters.tasks import tasks_of
from fulgurite.methods.structure import ModelSpec

TASKS = ["vqa", "gqa", "nlvr2", "caption"]
D, B = 24, 6  # width, and inner width at reduction 4
bottleneck = partial(Bottleneck, reduction=4, activation="gelu_new", init="official")
compacter = partial(Compacter, reduction=4, division=2, init="official")
LINEAR = nn.Linear(D, D)
SITES = [SpanSite(f"{stack}.{i}.{kind}", LINEAR, kind) for stack in ("enc", "dec") for i in range(2) for kind in "sf"]


def count(adapter):
    return sum(p.numel() for p in adapter.parameters())


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shake(module):
    """Random values everywhere."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return module


PLAIN = 2 * D * B + D + B
PHM = 2 * 2**3 + 2 * D * B // 2 + D + B
COUNTS = {
    "bottleneck": (bottleneck(LINEAR), PLAIN),
    "norms": (bottleneck(LINEAR, norm_before=True, norm_after=True), PLAIN + 4 * D),
    "parallel": (bottleneck(nn.Linear(10, D), parallel=True), B * (10 + 1) + D * (B + 1)),
    "multiple": (PerTask(LINEAR, bottleneck, TASKS), 4 * PLAIN),
    "half-shared up": (PerTask(LINEAR, bottleneck, TASKS, ["up"]), 4 * PLAIN - 3 * D * (B + 1)),
    "half-shared down": (PerTask(LINEAR, bottleneck, TASKS, ["down"]), 4 * PLAIN - 3 * B * (D + 1)),
    "compacter": (compacter(LINEAR), PHM),
    "compacter, factorised": (compacter(LINEAR, rank=1), 2 * 2**3 + 2 * (D + B) + D + B),
    "compacter, one rule": (compacter(LINEAR, one_rule=True), PHM - 2**3),
    "compacter, rule of the tasks": (
        PerTask(LINEAR, partial(compacter, one_rule=True), TASKS, ["rule"]),
        4 * (PHM - 2 * 2**3) + 2**3,
    ),
    "compacter, rule of the model": (
        Shared(SITES, partial(PerTask, kind=partial(compacter, one_rule=True), tasks=TASKS, shared=["rule"]), ["rule"]),
        8 * 4 * (PHM - 2 * 2**3) + 2**3,
    ),
    "low rank": (LowRankAdapter(LINEAR, 4, 3), 2 * 3 * (D + B) + D + B),
    "ia3": (IA3(nn.Linear(10, D)), D),
    "ia3, input": (IA3Input(nn.Linear(10, D)), 10),
    "bias": (Bias(nn.Linear(10, D)), D),
    "bias, new": (Bias(nn.Linear(10, D, bias=False), new=True), D),
    "bias, new of a norm": (Bias(nn.RMSNorm(D), new=True), D),
    "lora": (LoRA(nn.Linear(10, D), 3), 3 * (10 + D)),
    "hyperformer": (
        Hyperformer(SITES, TASKS, 4, embedding=7, hidden=5, projected=3),
        4 * 7 + 2 * (5 * (2 * 7 + 1) + 3 * (5 + 1) + 2 * 3 + 2 * 7 + 2 * 4 * (2 * D * B + D + B)),
    ),
    "hyperformer, one network": (
        Hyperformer(SITES, TASKS, 4, embedding=7, hidden=5, projected=3, one_network=True),
        4 * 7 + 2 * (5 * (3 * 7 + 1) + 3 * (5 + 1) + 2 * 3 + (2 + 2) * 7 + 4 * (2 * D * B + D + B)),
    ),
}


@pytest.mark.parametrize("case", COUNTS)
def test_parameters_are_counted_by_the_formula(case):
    adapter, expected = COUNTS[case]
    assert count(adapter) == expected
    assert sum(t.numel() for t in adapter.state_dict().values()) == expected  # what is shared is stored once


def test_the_published_counts_at_bart_base():
    """768 features, 12 + 18 sites, four tasks; 1,632,000 more are the visual embedding and the norms."""
    blocks = {"encoder": ["self", "ff"], "decoder": ["self", "cross", "ff"]}
    with torch.device("meta"):
        linear = nn.Linear(768, 768)
        sites = [
            SpanSite(f"{stack}.layers.{i}.{kind}", linear, kind)
            for stack in blocks
            for kind in blocks[stack]
            for i in range(6)
        ]
        of_site = partial(Bottleneck, reduction=8)
        phm = partial(Compacter, reduction=8, division=2)
        rows = {
            6_081_600: 30 * count(of_site(linear)),
            19_430_400: 30 * count(PerTask(linear, of_site, TASKS)),
            12_725_760: 30 * count(PerTask(linear, of_site, TASKS, ["up"])),
            12_786_240: 30 * count(PerTask(linear, of_site, TASKS, ["down"])),
            3_870_240: 30 * count(phm(linear)),
            10_584_960: 30 * count(PerTask(linear, phm, TASKS)),
            8_579_088: count(Hyperformer(sites, TASKS, 8, projected=8)),
        }
        several, single = 36 * count(PerTask(linear, partial(LoRA, rank=128), TASKS)), 36 * count(LoRA(linear, 128))
    assert all(trained == found + 1_632_000 for trained, found in rows.items())
    assert several - single == 30_020_352 - 8_786_688


@pytest.mark.parametrize(("part", "other"), [("down", "up"), ("up", "down")])
def test_half_shared_adapters_have_one_matrix_in_common(part, other):
    adapter = PerTask(LINEAR, bottleneck, TASKS, [part])
    for twin in (adapter, copy.deepcopy(adapter).double()):
        first, *others = twin.adapters.values()
        for each in others:
            assert getattr(each, part).weight is getattr(first, part).weight
            assert getattr(each, other).weight is not getattr(first, other).weight
            assert not torch.equal(getattr(each, other).weight, getattr(first, other).weight)
    assert len(adapter.state_dict()) == 2 + 4 * 2


def test_a_task_s_parameters_change_no_other_task():
    adapter, y, index = shake(PerTask(LINEAR, bottleneck, TASKS)), noise(5, 3, D), torch.tensor([0, 1, 0, 3, 2])
    with tasks_of(index):
        before = adapter(y, y)
        for parameter in adapter.adapters["vqa"].parameters():
            parameter.data += 1
        after = adapter(y, y)
    changed = (before != after).flatten(1).any(1)
    assert changed.tolist() == (index == 0).tolist()
    single = shake(bottleneck(LINEAR))
    with tasks_of(torch.zeros_like(index)):
        expected = single(y, y)
    with tasks_of(index):
        assert torch.equal(single(y, y), expected)


def test_a_mixed_batch_equals_its_tasks_one_by_one_and_beams_follow():
    adapter, y, index = shake(PerTask(LINEAR, bottleneck, TASKS, ["down"])), noise(4, 3, D), torch.tensor([2, 0, 2, 1])
    expected = torch.cat([adapter.adapters[TASKS[i]](row[None], row[None]) for i, row in zip(index, y)])
    with tasks_of(index):
        torch.testing.assert_close(adapter(y, y), expected)
        beams = y.repeat_interleave(3, 0)
        torch.testing.assert_close(adapter(beams, beams), expected.repeat_interleave(3, 0))
    with pytest.raises(ValueError, match=r"tasks \['vqa', .* need to know the task of each sample"):
        adapter(y, y)


def kron(layer):
    """H, entry by entry: H[a K + k, c P + p] = sum_i A_i[a, c] W_i[k, p]."""
    blocks = layer.blocks if layer.rank is None else torch.stack([left @ r for left, r in zip(layer.left, layer.right)])
    n, height, width = blocks.shape
    out = torch.zeros(n * height, n * width, dtype=blocks.dtype)
    for row in range(n * height):
        for column in range(n * width):
            a, k, c, p = row // height, row % height, column // width, column % width
            out[row, column] = sum(layer.rule.weight[i, a, c] * blocks[i, k, p] for i in range(n))
    return out


@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize(("enters", "leaves"), [(12, 6), (6, 12)])
@pytest.mark.parametrize("rows", [1, 40])
def test_a_phm_layer_is_its_kronecker_products(rank, enters, leaves, rows):
    """With few rows, with many, and with the matrix kept in evaluation; gradients too."""
    layer = shake(PHMLinear(enters, leaves, 3, rank)).double()
    x = noise(2, rows, enters).double().requires_grad_()
    expected = x @ kron(layer) + layer.bias
    inputs = [x, *layer.parameters()]
    expected_grads = torch.autograd.grad(expected.square().sum(), inputs)
    for found in (layer(x), layer.products(x)):
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), inputs), expected_grads)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(layer.eval()(x), expected)


def test_a_phm_layer_of_one_division_is_a_plain_linear_layer():
    layer = shake(PHMLinear(8, 4, 1))
    layer.rule.weight.data.fill_(1)
    x = noise(3, 8)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.blocks[0].T, layer.bias))


def test_what_is_kept_in_evaluation_follows_the_parameters():
    layer, x = shake(PHMLinear(8, 4, 2)).eval(), noise(3, 8)
    hyper = shake(Hyperformer(SITES, TASKS, 4, 7, 5, 3)).eval()
    with torch.no_grad():
        before, weights = layer(x), hyper.weights(1, 2)
        assert hyper.weights(1, 2) is weights
        assert hyper.weights(1, 1) is not weights
        layer.blocks.mul_(2)
        hyper.networks[0].first.bias.add_(1)
        torch.testing.assert_close(layer(x) - layer.bias, 2 * (before - layer.bias))
        assert not torch.equal(hyper.weights(1, 2).down, weights.down)
        layer.load_state_dict({**layer.state_dict(), "blocks": torch.zeros(2, 4, 2)})
        torch.testing.assert_close(layer(x), layer.bias.expand(3, 4))
        assert copy.deepcopy(layer)(x).shape == (3, 4)


def test_a_phm_layer_puts_its_matrix_together_for_many_rows_alone_and_once_in_evaluation(monkeypatch):
    made, own = [], PHMLinear.weight.fget
    monkeypatch.setattr(PHMLinear, "weight", property(lambda layer: made.append(layer) or own(layer)))
    layer = shake(PHMLinear(64, 32, 2))
    layer(noise(31, 64))  # 31 rows keep 2 x 32 products each, and the matrix has 64 x 32 numbers
    assert made == []
    layer(noise(32, 64))
    assert len(made) == 1
    with torch.no_grad():
        layer.eval()(noise(1, 64)), layer(noise(99, 64))
    assert len(made) == 2


def test_a_hyperformer_makes_the_weights_of_a_task_at_a_site_once_a_step_and_once_in_evaluation():
    adapter, made = shake(Hyperformer(SITES, TASKS, 4, 7, 5, 3)), []
    for network in adapter.networks:
        network.register_forward_hook(lambda *call: made.append(call))

    def step():
        made.clear()
        with tasks_of(torch.tensor([1, 0, 1])):
            for index in range(len(SITES)):
                adapter(index, (y := noise(3, 2, D),), {}, y)
        return len(made)

    assert [step(), step()] == [2 * len(SITES)] * 2
    with torch.no_grad():
        adapter.eval()
        assert [step(), step()] == [2 * len(SITES), 0]


def test_a_step_of_one_task_leaves_the_embeddings_of_others_where_they_are():
    adapter = shake(Hyperformer(SITES, TASKS, 4, 7, 5, 3))
    optimizer, places = torch.optim.AdamW(adapter.parameters(), lr=0.1), []
    for task in (0, 1, 1):
        optimizer.zero_grad()
        with tasks_of(torch.tensor([task] * 3)):
            adapter(0, (y := noise(3, 2, D),), {}, y).square().sum().backward()
        optimizer.step()
        places.append([embedding.detach().clone() for embedding in adapter.task_embeddings])
    first, second, third = places
    assert torch.equal(first[0], third[0])
    assert torch.equal(first[2], third[2])
    assert not torch.equal(first[1], second[1])
    assert not torch.equal(second[1], third[1])


def test_compacter_starts_as_published():
    torch.manual_seed(0)
    wide = Compacter(nn.Linear(512, 512), 2, 2, init="official")
    assert math.isclose(float(wide.down.rule.weight.detach().std()), 0.01, rel_tol=0.6)
    bound = math.sqrt(2) * math.sqrt(6 / (256 + 128))
    assert bound * 0.99 < wide.up.blocks.max() <= bound
    assert not wide.up.bias.any()
    assert not Compacter(512, 2, 2, rank=1).up.right.any()


@pytest.mark.parametrize("one", [False, True])
def test_a_hyperformer_written_out_for_one_site(one):
    adapter = shake(Hyperformer(SITES, TASKS, 4, embedding=7, hidden=5, projected=3, one_network=one))
    y = noise(4, 3, D)
    index, task = 5, 2  # dec.0.f: second stack, first layer, second kind
    network, gelu = adapter.networks[1], nn.functional.gelu
    embeddings = [adapter.task_embeddings[task], network.layers[0], *([network.kind_embeddings[1]] if one else [])]
    z = network.second.weight @ torch.relu(network.first.weight @ torch.cat(embeddings) + network.first.bias)
    z = z + network.second.bias
    z = (z - z.mean()) / (z.var(unbiased=False) + 1e-6).sqrt() * network.norm.weight + network.norm.bias
    made = network.generators[0 if one else 1]
    down, up = ((part.weight @ z + part.bias) for part in (made.down, made.up))
    down_bias, up_bias = ((part.weight @ z + part.bias) for part in (made.down_bias, made.up_bias))
    hidden = gelu(y @ down.view(B, D).T + down_bias, approximate="tanh")
    expected = y + hidden @ up.view(D, B).T + up_bias
    with tasks_of(torch.full((4,), task)):
        torch.testing.assert_close(adapter(index, (y,), {}, y), expected)
    with tasks_of(torch.tensor([task, 0, task, 1])):
        found = adapter(index, (y,), {}, y)
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])
    assert not torch.allclose(found[1], expected[1])


def test_a_hyperformer_refuses_sites_it_cannot_tell_apart():
    with pytest.raises(ValueError, match=r"'norm' has no number"):
        Hyperformer([SpanSite("norm", LINEAR, "f")], TASKS)
    twice = [SpanSite("enc.0.a", LINEAR, "f"), SpanSite("enc.0.b", LINEAR, "f")]
    with pytest.raises(ValueError, match=r"'enc\.0\.a' and 'enc\.0\.b' are both at 'f' of layer 0"):
        Hyperformer(twice, TASKS)
    wider = [SpanSite("enc.0.a", LINEAR, "s"), SpanSite("enc.0.b", nn.Linear(D, 30), "f")]
    with pytest.raises(ValueError, match=r"'enc\.0\.b' has width 30, and its generators are made for 24"):
        Hyperformer(wider, TASKS, one_network=True)
    Hyperformer(wider, TASKS)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: PerTask(LINEAR, bottleneck, []), "must name at least one task"),
        (lambda: PerTask(LINEAR, bottleneck, ["a", "a"]), "none twice"),
        (lambda: PerTask(LINEAR, bottleneck, ["keys"]), "reserved"),
        (lambda: PerTask(LINEAR, bottleneck, TASKS, ["norm_before"]), r"no part 'norm_before'.*'down', 'up'"),
        (lambda: PerTask(SITES, partial(Hyperformer, tasks=TASKS), TASKS), "not Hyperformer"),
        (
            lambda: Shared([*SITES, SpanSite("x", nn.Linear(D, 30), "s")], bottleneck, ["up"]),
            "share it among sites of one",
        ),
        (lambda: PHMLinear(9, 6, 2), "division=2 must divide the sizes of the layer, 9 and 6"),
        (lambda: Compacter(24, 4, 2, rank=0), "rank=0"),
        (lambda: LowRankAdapter(24, 4, 0), "rank=0"),
        (lambda: Bottleneck(24, activation="selu"), "activation='selu' is not one of"),
        (lambda: Bottleneck(24, init="zero"), "init='zero'"),
        (lambda: Bias(nn.Linear(2, 2, bias=False)), "Linear has none"),
        (lambda: Bias(nn.Embedding(3, 2), new=True), "Embedding has none"),
    ],
)
def test_options_that_cannot_be_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_a_new_bias_is_added_to_what_leaves_the_site():
    site, x = nn.Linear(10, D, bias=False), noise(3, 10)
    adapter = shake(Bias(site, new=True))
    torch.testing.assert_close(adapter(x, site(x)), nn.functional.linear(x, site.weight, adapter.delta))
    with pytest.raises(FoldError):
        adapter.folded(site)


def test_a_bank_says_which_tasks_its_kinds_route_by():
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
    spec = ModelSpec(towers=(), points={"first": ("0", 1), "second": ("1", 1)})

    def bank(*tasks):
        points = ["first", "second"]
        return AdapterBank(
            model,
            [Placement([p], partial(PerTask, kind=bottleneck, tasks=t)) for p, t in zip(points, tasks)],
            spec=spec,
        )

    assert bank(TASKS, TASKS).tasks == tuple(TASKS)
    assert AdapterBank(model, [Placement(["first"], bottleneck)], spec=spec).tasks == ()
    with pytest.raises(ValueError, match="the same tasks in the same order"):
        bank(TASKS, TASKS[:2]).tasks  # noqa: B018
    report = str(bank(TASKS, TASKS).report())
    assert "Bottleneck for each of 4 tasks at 1 site (first)" in report
