"""The Fisher information against closed forms, and gradients taken one example and label at a time."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fulgurite.methods.statistics.fisher import FisherStatistics


def small(classes=4, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, classes))


def logits(model, batch):
    return model(batch)


def nll(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


@pytest.fixture
def x():
    return torch.randn(11, 6, generator=torch.Generator().manual_seed(1))


def measured(model, data, function=logits, split=11, **options):
    fisher = FisherStatistics(model, function, **options)
    if isinstance(data, dict):
        for start in range(0, 11, split):
            fisher.update({name: t[start : start + split] for name, t in data.items()})
    else:
        for part in data.split(split):
            fisher.update(part)
    return fisher


def gradient_of(model, value):
    grads = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    return {name: g.double() for (name, _), g in zip(model.named_parameters(), grads)}


def slow(model, x, power):
    """mean_x sum_y p_y |d log p_y / d theta|^power, by a backward pass per example and label."""
    model = model.eval()
    out = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for example in x:
        log_p = model(example[None]).log_softmax(-1)[0]
        for label in log_p:
            for name, g in gradient_of(model, label).items():
                out[name] += label.exp().item() * g.abs() ** power / len(x)
    return out


def close(found, expected, tolerance=1e-6):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert (found[name].double() - value.double()).abs().max() <= tolerance * value.abs().max(), name


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize(("moment", "power"), [("square", 2), ("absolute", 1)])
@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_it_is_the_exact_expectation_over_labels(vectorize, moment, power, chunk, x):
    model = small()
    found = measured(model, x, moment=moment, chunk=chunk, vectorize=vectorize)
    assert model.training
    assert model[2].training
    assert all(p.grad is None for p in model.parameters())
    close(found.means(), slow(model, x, power))


def test_of_logistic_regression_in_closed_form(x):
    """F(W_cj) = mean_x x_j^2 p_c (1 - p_c), since the variance of a label's indicator is p (1 - p)."""
    model = nn.Linear(6, 3)
    p = model(x).softmax(-1).double()
    expected = {
        "weight": (p * (1 - p)).T @ x.double().square() / len(x),
        "bias": (p * (1 - p)).mean(0),
    }
    close(measured(model, x).means(), expected)


@pytest.mark.parametrize("options", [{}, {"moment": "absolute"}, {"max_exact": 2, "samples": 3}])
@pytest.mark.parametrize("split", [1, 4])
def test_batches_do_not_count(options, split, x):
    if "samples" in options:
        options = {**options, "generator": torch.Generator().manual_seed(9)}
    model = small()
    whole = measured(model, x, **options)
    if "samples" in options:
        options["generator"].manual_seed(9)
    close(measured(model, x, split=split, **options).means(), whole.means())


@pytest.mark.parametrize("vectorize", [True, False])
def test_empirical_takes_the_given_labels(vectorize, x):
    y = torch.arange(11) % 4
    model = small()
    found = measured(model, {"x": x, "y": y}, nll, kind="empirical", vectorize=vectorize, split=4).means()
    expected = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for example, label in zip(x, y):
        for name, g in gradient_of(model, nll(model.eval(), {"x": example[None], "y": label[None]}).sum()).items():
            expected[name] += g**2 / 11
    close(found, expected)


def test_the_batch_summed_surrogate_is_another_number(x):
    model = small()
    found = measured(model, x, kind="batch_summed", split=6).means()
    expected = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for part in x.split(6):
        log_p = model.eval()(part).log_softmax(-1)
        for name, g in gradient_of(model, (log_p.exp().sqrt().detach() * log_p).sum()).items():
            expected[name] += g**2 / 11
    close(found, expected)
    exact = measured(model, x).means()
    assert not torch.allclose(found["0.weight"], exact["0.weight"], rtol=0.1)


@pytest.mark.parametrize("vectorize", [True, False])
def test_drawn_labels_tend_to_the_expectation(vectorize, x):
    model = small()
    exact = measured(model, x[:2]).means()
    generator = torch.Generator().manual_seed(0)
    options = {"max_exact": 1, "samples": 4000, "chunk": 500, "generator": generator}
    found = measured(model, x[:2], vectorize=vectorize, **(options if vectorize else {**options, "samples": 1200}))
    close(found.means(), exact, 0.1)


def sequences(model, batch):
    return model(batch["x"]), batch["mask"]


@pytest.mark.parametrize("vectorize", [True, False])
def test_labels_of_a_sequence_are_drawn_at_every_real_position(vectorize):
    """The gradient of a sequence is a sum over positions; all C^T sequences weighted by probability are the limit."""
    model = small(classes=2)
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    expected = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for example, real in zip(x, mask):
        log_p = model.eval()(example[real != 0]).log_softmax(-1)
        for labels in itertools.product(range(2), repeat=len(log_p)):
            value = log_p[range(len(log_p)), list(labels)].sum()
            for name, g in gradient_of(model, value).items():
                expected[name] += value.exp().item() * g**2 / 2
    draw = {"samples": 3000 if vectorize else 1000, "chunk": 3000, "vectorize": vectorize}
    found = measured(model, {"x": x, "mask": mask}, sequences, generator=torch.Generator().manual_seed(1), **draw)
    close(found.means(), expected, 0.1)
    longer = {"x": torch.cat([x, x[:, :1]], 1), "mask": torch.cat([mask, torch.zeros(2, 1)], 1)}
    draw["samples"] = 5
    short = measured(model, {"x": x, "mask": mask}, sequences, generator=torch.Generator().manual_seed(1), **draw)
    long = measured(model, longer, sequences, generator=torch.Generator().manual_seed(1), **draw)
    close(long.means(), short.means())


def test_draws_depend_on_seed_and_index_alone(x):
    model = small()
    make = lambda seed: FisherStatistics(  # noqa: E731
        model, logits, max_exact=1, generator=torch.Generator().manual_seed(seed)
    )
    whole, halves, other = make(3), make(3), make(4)
    whole.update(x)
    halves.update(x[1::2], torch.arange(1, 11, 2))
    halves.update(x[::2], torch.arange(0, 11, 2))
    other.update(x)
    close(halves.means(), whole.means())
    assert not torch.allclose(other.means()["3.bias"], whole.means()["3.bias"])


def test_equal_examples_are_drawn_apart(x):
    model = small()
    same = x[:1].expand(400, -1)
    found = measured(model, same, split=400, max_exact=1, chunk=100, generator=torch.Generator().manual_seed(0))
    close(found.means(), measured(model, x[:1]).means(), 0.3)


class Attention(nn.Module):
    """What a text model has: embeddings, attention with padding, tied weights, a norm."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=False)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(2, 2)

    def forward(self, tokens, mask):
        return self.head(self.layers(self.embed(tokens), src_key_padding_mask=mask == 0)[:, 0])


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_of_a_transformer_with_tied_weights(vectorize, frozen):
    torch.manual_seed(0)
    model = Attention().requires_grad_(not frozen)
    tokens = torch.randint(10, (4, 5), generator=torch.Generator().manual_seed(1))
    batch = {"tokens": tokens, "mask": (torch.arange(5) < torch.tensor([5, 3, 4, 2])[:, None]).long(), "note": "kept"}
    call = lambda model, batch: model(batch["tokens"], batch["mask"])  # noqa: E731
    fisher = FisherStatistics(model, call, vectorize=vectorize, chunk=30)
    fisher.update(batch)
    means = fisher.means()
    assert "head.weight" not in means
    assert not means["unused.weight"].any()
    model.requires_grad_(True).eval()
    for name in ("embed.weight", "layers.layers.0.self_attn.in_proj_weight", "layers.layers.1.norm2.bias"):
        expected = torch.zeros_like(model.get_parameter(name), dtype=torch.float64)
        for i in range(4):
            log_p = call(model, {key: value[i : i + 1] for key, value in batch.items()}).log_softmax(-1)[0]
            for label in log_p:
                (g,) = torch.autograd.grad(label, model.get_parameter(name), retain_graph=True)
                expected += label.exp().item() * g.double() ** 2 / 4
        close({name: means[name]}, {name: expected}, 2e-6)


def test_only_chosen_parameters_and_half_precision(x):
    model = small().bfloat16()
    found = measured(model, x.bfloat16(), pattern=r"3\..*", expected=2)
    assert list(found.sums) == ["3.weight", "3.bias"]
    assert {t.dtype for t in found.sums.values()} == {torch.float64}
    exact = slow(model.float(), x.bfloat16().float(), 2)
    close(found.means(), {name: exact[name] for name in found.sums}, 0.05)


def test_what_does_not_fit_is_refused(x):
    model = small()
    with pytest.raises(LookupError, match="matches 0 parameters, expected at least 1"):
        measured(model, x, pattern="4.weigth")
    with pytest.raises(LookupError, match="matches 4 parameters, expected 3"):
        measured(model, x, expected=3)
    with pytest.raises(ValueError, match=r"1 positions of 4 classes \(exact .* max_exact=3\): give a generator"):
        measured(model, x, max_exact=3)
    with pytest.raises(ValueError, match="one loss per example"):
        measured(model, x, kind="empirical")
    with pytest.raises(ValueError, match=r"expected \(1, C\) or \(1, T, C\)"):
        measured(model, x, lambda model, batch: model(batch).sum())
    with pytest.raises(ValueError, match=r"have \[4, 11\] rows"):
        FisherStatistics(model, nll).update({"x": x, "y": torch.zeros(4)})
    with pytest.raises(ValueError, match="3 indices for 11 examples"):
        FisherStatistics(model, logits).update(x, torch.arange(3))
    with pytest.raises(ValueError, match="no example was seen"):
        FisherStatistics(model, logits).means()
    with pytest.raises(ValueError, match="surrogate of squares"):
        FisherStatistics(model, logits, kind="batch_summed", moment="absolute")
    with pytest.raises(ValueError, match="chunk=0"):
        FisherStatistics(model, logits, chunk=0)


def test_sharded_parameters_are_refused(tmp_path):
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    try:
        model = nn.Linear(3, 2)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"2 parameters are sharded \(weight\).*Context.build\(path\)"):
            FisherStatistics(model, lambda own, batch: own(batch))
    finally:
        dist.destroy_process_group()


def test_one_by_one_the_gradients_of_an_example_are_held_once(peak_bytes):
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(16)))
    statistic = FisherStatistics(model, lambda model, x: model(x).sum(1), kind="empirical", vectorize=False)
    copy = 4 * sum(p.numel() for p in model.parameters())
    assert copy < peak_bytes(lambda: statistic.update(torch.ones(3, 64))) < 1.3 * copy
