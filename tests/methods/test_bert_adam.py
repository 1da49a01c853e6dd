"""`BertAdam` against a plain loop over numbers, and resumed from its state."""

import math

import pytest
import torch

from fulgurite.methods.optimizers import BertAdam

SIZES = {"large": 40.0, "small": 1e-3}  # of the gradients: clipped, and not


def gradients(step):
    generator = torch.Generator().manual_seed(step)
    return [
        scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape, scale in (((4, 3), SIZES["large"]), ((5,), SIZES["small"]))
    ]


def parameters():
    generator = torch.Generator().manual_seed(100)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in ((4, 3), (5,))
    ]


def optimizer_of(tensors, **options):
    groups = [{"params": tensors[:1]}, {"params": tensors[1:], "lr": 1e-2, "weight_decay": 0.0}]
    return BertAdam(groups, lr=1e-3, **options)


def run(optimizer, tensors, steps):
    for step in steps:
        for tensor, gradient in zip(tensors, gradients(step)):
            tensor.grad = gradient
        optimizer.step()


def plain_loop(values, pick, lr, decay, limit, steps):
    """One tensor as a list of numbers."""
    means, squares = [0.0] * len(values), [0.0] * len(values)
    for step in range(steps):
        gradient = gradients(step)[pick].flatten().tolist()
        norm = math.sqrt(sum(g * g for g in gradient))
        factor = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
        for i, g in enumerate(g * factor for g in gradient):
            means[i] = 0.9 * means[i] + 0.1 * g
            squares[i] = 0.98 * squares[i] + 0.02 * g * g
            values[i] -= lr * (means[i] / (math.sqrt(squares[i]) + 1e-6) + decay * values[i])
    return values


@pytest.mark.parametrize("limit", [1.0, 0.5, None])
def test_updates_are_those_of_a_plain_loop(limit):
    tensors = parameters()
    start = [tensor.flatten().tolist() for tensor in tensors]
    run(optimizer_of(tensors, max_grad_norm=limit), tensors, range(8))
    expected = [plain_loop(start[0], 0, 1e-3, 0.2, limit, 8), plain_loop(start[1], 1, 1e-2, 0.0, limit, 8)]
    for tensor, values in zip(tensors, expected):
        torch.testing.assert_close(
            tensor.detach().flatten(), torch.tensor(values, dtype=torch.float64), rtol=1e-12, atol=0
        )


def test_the_first_update_has_no_bias_corrected():
    tensor = torch.zeros(3, requires_grad=True)
    tensor.grad = torch.tensor([0.3, -0.2, 0.1])
    BertAdam([tensor], lr=0.1).step()
    expected = -0.1 * 0.1 / math.sqrt(0.02) * torch.tensor([1.0, -1.0, 1.0])
    torch.testing.assert_close(tensor.detach(), expected, rtol=1e-4, atol=0)  # eps counts


def test_gradients_stay_as_they_are_and_tensors_without_one_too():
    tensors = parameters()
    before = [tensor.detach().clone() for tensor in tensors]
    tensors[0].grad = gradients(0)[0]
    optimizer_of(tensors).step()
    assert torch.equal(tensors[0].grad, gradients(0)[0])
    assert not torch.equal(tensors[0], before[0])
    assert torch.equal(tensors[1], before[1])


def test_resumed_it_goes_on_bit_for_bit():
    whole, halves = parameters(), parameters()
    run(optimizer_of(whole), whole, range(6))
    first = optimizer_of(halves)
    run(first, halves, range(3))
    second = optimizer_of(halves)
    second.load_state_dict(first.state_dict())
    run(second, halves, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, halves))


@pytest.mark.parametrize(
    "options",
    [{"lr": -1.0}, {"eps": -1e-6}, {"weight_decay": -0.1}, {"betas": (0.9, 1.0)}, {"max_grad_norm": 0.0}],
    ids=lambda options: next(iter(options)),
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        BertAdam([torch.zeros(1, requires_grad=True)], **{"lr": 1e-3, **options})
