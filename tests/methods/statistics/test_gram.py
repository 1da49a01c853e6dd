"""Gram matrices against the products of inputs that are written down by hand."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fulgurite.methods.statistics.gram import GramStatistics, full_precision, gram_of, token_shares

QKV = tuple(rf"blocks\.\d+\.{name}" for name in "qkv")


class Block(nn.Module):
    """Three layers that read one input, and two that do not."""

    def __init__(self, width, turned):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.up = Conv1D(9, width) if turned else nn.Linear(width, 9)
        self.down = nn.Linear(9, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        h = self.norm(x)
        x = x + self.q(h) * self.k(h).tanh() + self.v(input=h)
        return x + self.down(self.up(x).relu())


class Model(nn.Module):
    def __init__(self, turned=False):
        super().__init__()
        self.blocks = nn.ModuleList(Block(6, turned) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def batch():
    """Tokens (8, 5, 6) and a mask (8, 5) with different lengths."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([5, 3, 1, 4, 5, 2, 5, 3])
    return torch.randn(8, 5, 6, generator=generator), (torch.arange(5) < lengths[:, None]).long()


def inputs_of(model, x):
    """Input of every layer, caught by hooks of another kind."""
    seen = {}
    hooks = [
        module.register_forward_hook(
            lambda _, args, kwargs, out, n=name: seen.update({n: args[0] if args else kwargs["input"]}),
            with_kwargs=True,
        )
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return seen


def measured(model, x, mask=None, weights=None, split=8, **options):
    grams = GramStatistics(
        model, options.pop("pattern", r"blocks\..*\.(q|k|v|up|down)"), options.pop("expected", 10), **options
    )
    cut = lambda t: [None] * 8 if t is None else t.split(split)  # noqa: E731
    for part, m, w in zip(x.split(split), cut(mask), cut(weights)):
        with grams.watch(m, w):
            model(part)
    return grams


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_it_is_the_sum_over_real_tokens(masked, weighted, model, batch):
    x, mask = batch
    mask = mask if masked else None
    weights = torch.rand(8, 5, generator=torch.Generator().manual_seed(2)) if weighted else None
    means = measured(model, x, mask, weights).means()
    for name, seen in inputs_of(model, x).items():
        if name == "head":
            continue
        total, size = torch.zeros(seen.shape[-1], seen.shape[-1], dtype=torch.float64), 0.0
        for b in range(8):
            for s in range(5):
                w = (1.0 if mask is None else mask[b, s].item()) * (1.0 if weights is None else weights[b, s].item())
                total += w * torch.outer(seen[b, s].double(), seen[b, s].double())
                size += w
        torch.testing.assert_close(means[name], total / size, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("split", [1, 3])
def test_batches_do_not_count(dtype, split, model, batch):
    x, mask = batch
    whole, parts = (measured(model, x, mask, split=s, dtype=dtype).means() for s in (8, split))
    for name, gram in whole.items():
        assert (gram - parts[name]).abs().max() < 1e-6 * gram.abs().max()


def test_padding_may_hold_anything(model, batch):
    x, mask = batch
    clean = measured(model, x, mask).means()
    dirty = x.masked_fill(mask[..., None] == 0, torch.nan)
    again = measured(model, dirty, mask).means()
    as_weights = measured(model, dirty, None, mask.float()).means()
    for name in clean:
        assert torch.equal(clean[name], again[name])
        assert torch.equal(clean[name], as_weights[name])


def test_energies_are_the_diagonal(model, batch):
    x, mask = batch
    grams = measured(model, x, mask)
    energies = measured(model, x, mask, diagonal=True)
    assert {total.dim() for total in energies.sums.values()} == {1}
    for name, gram in grams.means().items():
        torch.testing.assert_close(energies.means()[name], gram.diagonal(), rtol=1e-12, atol=0)
        torch.testing.assert_close(energies.energies()[name], grams.energies()[name], rtol=1e-12, atol=0)


def test_layers_that_share_an_input_share_one_gram(model, batch):
    x, mask = batch
    apart, together = measured(model, x, mask), measured(model, x, mask, shared=[QKV])
    assert len(apart.sums) == 10
    assert sorted(together.sums) == sorted(f"blocks.{i}.{n}" for i in range(2) for n in ("q", "up", "down"))
    for name, gram in apart.means().items():
        assert torch.equal(gram, together.means()[name])
    some = measured(model, x, mask, shared=[QKV], pattern=r"blocks\.1\.[kv]", expected=2)
    assert list(some.sums) == ["blocks.1.k"]


def test_layers_that_only_claim_to_share_are_found(model, batch):
    with pytest.raises(ValueError, match=r"share no input: their values differ"):
        measured(model, batch[0], shared=[(r"blocks\.\d+\.q", r"blocks\.\d+\.up")])
    with pytest.raises(ValueError, match="share no input: widths 6, 9"):
        measured(model, batch[0], shared=[(r"blocks\.\d+\.q", r"blocks\.\d+\.down")])
    with pytest.raises(LookupError, match="different numbers"):
        measured(model, batch[0], shared=[(r"blocks\.\d+\.q", "head")])


def test_both_orientations_have_the_width_of_the_input(batch):
    torch.manual_seed(0)
    model = Model(turned=True)
    grams = measured(model, *batch)
    assert grams.transposed == {"blocks.0.up", "blocks.1.up"}
    seen = inputs_of(model, batch[0])["blocks.1.up"][batch[1] != 0].double()
    torch.testing.assert_close(grams.means()["blocks.1.up"], seen.T @ seen / len(seen), rtol=1e-6, atol=1e-8)


def test_other_shapes_of_input(model, batch):
    x, mask = batch
    x, mask = torch.cat([x, torch.full_like(x[:1], torch.nan)]), torch.cat([mask, torch.zeros_like(mask[:1])])
    head = measured(model, x, mask, pattern="head", expected=1, split=9).means()["head"]
    pooled = inputs_of(model, x[:8])["head"].double()  # the ninth example is padding throughout
    torch.testing.assert_close(head, pooled.T @ pooled / 8, rtol=1e-6, atol=1e-8)
    x, mask = batch
    expected = gram_of(x[mask != 0], None, torch.float64)
    for shaped, given in ((x.reshape(4, 2, 5, 6), mask.reshape(4, 10)), (x.reshape(-1, 6), mask)):
        grams = GramStatistics(model, "head", 1)
        grams.update("head", shaped, given)
        torch.testing.assert_close(grams.sums["head"], expected)
    with pytest.raises(ValueError, match="does not fit"):  # tokens before examples, as some modules have them
        grams.update("head", x.transpose(0, 1), mask)


def test_reduced_precision_outside_changes_nothing(model, batch):
    x, mask = batch
    exact = GramStatistics(model, "head", 1, dtype=torch.float32)
    exact.update("head", x, mask)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            low = GramStatistics(model, "head", 1, dtype=torch.float32)
            low.update("head", x, mask)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(low.sums["head"], exact.sums["head"])


@pytest.mark.parametrize("newer", [True, False])
def test_float32_products_are_in_float32(newer):
    before = torch.get_float32_matmul_precision()
    if newer:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    else:
        torch.set_float32_matmul_precision("high")
    try:
        with full_precision():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision(before)


def test_many_rows_are_taken_in_pieces(monkeypatch):
    rows = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(1000, generator=torch.Generator().manual_seed(1))
    whole = gram_of(rows, weights, torch.float64)
    monkeypatch.setattr("fulgurite.methods.statistics.gram.ROWS_AT_ONCE", 64)
    torch.testing.assert_close(gram_of(rows, weights, torch.float64), whole, rtol=1e-12, atol=1e-12)


def test_token_shares_sum_to_the_number_of_real_tokens(batch):
    mask = batch[1]
    importance = torch.rand(8, 5, generator=torch.Generator().manual_seed(3))
    importance[4] = 0
    shares = token_shares(importance, mask)
    torch.testing.assert_close(shares.sum(1), mask.sum(1).float())
    torch.testing.assert_close(shares, token_shares(7 * importance, mask))
    assert torch.equal(shares[4], mask[4].float())
    assert torch.equal(token_shares(torch.full((8, 5), 3.0), mask), mask.float())
    assert not shares[mask == 0].any()


def test_hooks_are_gone_and_the_model_is_as_before(model, batch):
    before = model(batch[0])
    grams = measured(model, *batch)
    state = grams.state_dict()
    assert torch.equal(model(batch[0]), before)
    assert all(torch.equal(state["sums"][n], total) for n, total in grams.sums.items())
    with pytest.raises(RuntimeError), grams.watch():
        model(batch[0][..., :3])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_does_not_fit_is_refused(model, batch):
    x, mask = batch
    with pytest.raises(LookupError, match="matches 10 modules, expected 9"):
        measured(model, x, expected=9)
    with pytest.raises(ValueError, match=r"blocks.0.norm: LayerNorm is no linear layer"):
        measured(model, x, pattern=r"blocks\.\d\.norm", expected=2)
    with pytest.raises(ValueError, match=r"blocks.0.q: a mask of \(8, 4\) does not fit an input of \(8, 5, 6\)"):
        measured(model, x, mask[:, :4])
    with pytest.raises(ValueError, match=r"head: a weights of \(8, 5\).*per layer name"):
        measured(model, x, weights=mask.float(), pattern="head", expected=1)
    with pytest.raises(ValueError, match="negative token weights"):
        measured(model, x, weights=-mask.float())
    with pytest.raises(ValueError, match=r"no input was seen by \['head'\]"):
        GramStatistics(model, "head", 1).means()
    with pytest.raises(ValueError, match=r"float32 or torch\.float64"):
        GramStatistics(model, "head", 1, dtype=torch.bfloat16)
    grams = GramStatistics(model, "head|blocks.0.q", 2)
    with grams.watch(mask={"blocks.0.q": mask}):
        model(x)
    assert grams.counts["head"] == 8
    assert grams.counts["blocks.0.q"] == mask.sum()
