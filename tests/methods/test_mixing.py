"""The three forms of per-sample mixing against plain layers, one sample at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fulgurite.methods.adapters import mixing
from fulgurite.methods.adapters.mixing import Mixture, mixed_linear

FORMS = ["rows", "batched", "factored"]
WEIGHTS = torch.tensor(
    [
        [0.25, 0.75, 0, 0],
        [0, 0, 1, 0],
        [0.25, 0.75, 0, 0],
        [0.1, 0.2, 0.3, 0.4],
        [0, 0, 0, 0],
        [-0.5, 0, 1.5, 0],
    ],
    dtype=torch.float64,
)


def draw(in_features: int, out_features: int, seed: int = 0) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(6, 2, 3, in_features)] + [(out_features, in_features)] * 4 + [(out_features,)] * 4
    x, *rest = (torch.randn(*s, dtype=torch.float64, generator=generator, requires_grad=True) for s in shapes)
    return x, rest[:4], rest[4:]


def slow(x: Tensor, weights: list[Tensor], biases: list[Tensor] | None, shares: Tensor) -> Tensor:
    outputs = []
    for sample, row in zip(x, shares):
        bias = None if biases is None else sum(p * b for p, b in zip(row, biases))
        outputs.append(F.linear(sample, sum(p * w for p, w in zip(row, weights)), bias))
    return torch.stack(outputs)


@pytest.mark.parametrize("sizes", [(7, 3), (3, 7), (4, 4)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("form", [*FORMS, None])
def test_values_and_all_gradients_equal_the_slow_form(form, with_bias, sizes):
    x, weights, biases = draw(*sizes)
    shares = WEIGHTS.clone().requires_grad_()
    biases = biases if with_bias else None
    inputs = (x, shares, *weights, *(biases or []))
    fast, reference = (
        mixed_linear(x, weights, biases, Mixture.of(shares), form),
        slow(x, weights, biases, shares),
    )
    torch.testing.assert_close(fast, reference, rtol=0, atol=1e-12)
    grad = torch.randn(reference.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for one, other in zip(torch.autograd.grad(fast, inputs, grad), torch.autograd.grad(reference, inputs, grad)):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_go_only_where_they_are_asked_for(form):
    x, weights, biases = draw(5, 3)
    weights = [weights[0], *(w.detach() for w in weights[1:])]
    out = mixed_linear(x.detach(), weights, [b.detach() for b in biases], Mixture.of(WEIGHTS), form)
    (grad,) = torch.autograd.grad(out.sum(), weights[0])
    reference = slow(x.detach(), weights, biases, WEIGHTS).sum()
    torch.testing.assert_close(grad, torch.autograd.grad(reference, weights[0])[0])


def test_equal_rows_are_one_group_and_zero_experts_are_left_out():
    mixture = Mixture.of(WEIGHTS)
    groups = {g.experts: (g.rows if isinstance(g.rows, slice) else g.rows.tolist(), g.weights) for g in mixture.groups}
    assert groups == {
        (1, 0): ([0, 2], (0.75, 0.25)),
        (2,): (slice(1, 2), (1.0,)),
        (3, 2, 1, 0): (slice(3, 4), (0.4, 0.3, 0.2, 0.1)),
        (): (slice(4, 5), ()),
        (2, 0): (slice(5, 6), (1.5, -0.5)),
    }
    assert mixture.used == (0, 1, 2, 3)
    assert Mixture.of(WEIGHTS[:2]).used == (0, 1, 2)
    assert Mixture.of(WEIGHTS[:2].clone().requires_grad_()).used == (0, 1, 2, 3)
    assert not mixture.is_one_hot
    assert Mixture.one_hot(torch.tensor([2, 0]), 4).is_one_hot


def test_experts_without_weight_are_not_read():
    """A NaN in an expert that no sample uses must not show up."""
    x, weights, biases = draw(5, 3)
    for form in FORMS:
        broken = [*weights[:3], torch.full_like(weights[3], float("nan"))]
        with torch.no_grad():
            out = mixed_linear(x[:2], broken, biases, Mixture.of(WEIGHTS[:2]), form)
        assert out.isfinite().all()


def test_the_rows_form_allocates_one_map_and_the_output():
    """32 distinct rows of 50 experts: what is allocated does not grow with either."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(16, 128, generator=generator) for _ in range(50)]
    shares = torch.rand(32, 50, generator=generator)
    x = torch.randn(32, 8, 128, generator=generator)
    mixture = Mixture.of(shares)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        mixed_linear(x, weights, None, mixture)
    allocated = sum(max(event.self_device_memory_usage, event.self_cpu_memory_usage, 0) for event in profile.events())
    assert 4 * 32 * 8 * 16 <= allocated <= 1.2 * 4 * (32 * 8 * 16 + 16 * 128)


def test_an_accelerator_takes_the_form_that_fits_its_shape():
    """`pick_form` reads device and sizes only, so the meta device stands for a GPU."""
    spread = torch.rand(32, 6, generator=torch.Generator().manual_seed(0))
    x = torch.empty(32, 74, 1536, device="meta")
    assert mixing.pick_form(x, 192, Mixture.of(spread)) == "batched"
    assert mixing.pick_form(x, 192, Mixture.of(spread[:1].expand(32, 6))) == "rows"
    assert mixing.pick_form(torch.empty(32, 1, 1536, device="meta"), 192, Mixture.of(spread)) == "factored"
    assert mixing.pick_form(torch.empty(32, 1, 1536), 192, Mixture.of(spread)) == "rows"


def test_autocast_computes_in_its_type_with_exact_looking_gradients():
    x, weights, biases = (t for t in draw(8, 4))
    x, weights = x.detach().float(), [w.detach().float().requires_grad_() for w in weights]
    biases = [b.detach().float() for b in biases]
    for form in FORMS:
        with torch.autocast("cpu", torch.bfloat16):
            out = mixed_linear(x, weights, biases, Mixture.of(WEIGHTS.float()), form)
        assert out.dtype == torch.bfloat16
        grads = torch.autograd.grad(out.float().sum(), weights)
        expected = torch.autograd.grad(slow(x, weights, biases, WEIGHTS.float()).sum(), weights)
        for one, other in zip(grads, expected):
            assert one.dtype == torch.float32
            torch.testing.assert_close(one, other, rtol=0.05, atol=0.2)
