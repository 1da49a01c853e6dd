"""Interactive similarity aggregation against a loop over numbers, and its properties."""

import pytest
import torch

from fulgurite.methods.retrieval.isa import identity_diagonals, interactive_similarity, toeplitz


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("temperature", [0.01, 0.3])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_equals_the_loop(isa_of_a_list, size, temperature):
    x, matrix = draw(3, 4, size), torch.eye(9, dtype=torch.float64) + 0.3 * draw(9, 9, seed=1)
    found = interactive_similarity(x, matrix, temperature)
    expected = [[isa_of_a_list(row, matrix, temperature) for row in rows] for rows in x]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)


def test_the_default_temperature_is_the_published_one():
    x, matrix = draw(3, 5), torch.eye(5, dtype=torch.float64)
    assert torch.equal(interactive_similarity(x, matrix), interactive_similarity(x, matrix, 0.01))


def test_masked_entries_have_no_part(isa_of_a_list):
    x, matrix = draw(4, 6), draw(6, 6, seed=1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0], [0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1]]).bool()
    found = interactive_similarity(x, matrix, 0.2, mask)
    expected = [isa_of_a_list(row, matrix, 0.2, kept) for row, kept in zip(x, mask)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    with_others = interactive_similarity(torch.where(mask, x, 50.0), matrix, 0.2, mask)
    torch.testing.assert_close(with_others, found, rtol=1e-12, atol=1e-12)
    one_mask = interactive_similarity(x, matrix, 0.2, mask[2])
    torch.testing.assert_close(one_mask[2], found[2], rtol=1e-12, atol=1e-12)


def test_tends_to_the_mean_and_to_the_largest():
    x, matrix = draw(5, 6), torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(interactive_similarity(x, matrix, 1e4), x.mean(-1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(interactive_similarity(x, matrix, 1e-3), x.amax(-1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0])
def test_lies_between_the_smallest_and_the_largest(spread):
    x, matrix = draw(200, 6, dtype=torch.float32), spread * draw(6, 6, seed=1, dtype=torch.float32)
    found = interactive_similarity(x, matrix)
    assert (found >= x.amin(-1) - 1e-6).all()
    assert (found <= x.amax(-1) + 1e-6).all()


def test_low_precision_is_raised():
    x, matrix = draw(50, 6, dtype=torch.bfloat16), torch.eye(6) + 0.1 * draw(6, 6, seed=1, dtype=torch.float32)
    expected = interactive_similarity(x.float(), matrix)
    assert torch.equal(interactive_similarity(x, matrix), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(interactive_similarity(x, matrix), expected)


def test_gradients():
    x, matrix = draw(3, 4).requires_grad_(), draw(5, 5, seed=1).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 1, 0, 0]]).bool()
    assert torch.autograd.gradcheck(lambda x, m: interactive_similarity(x, m, 0.5, mask), (x, matrix))


def test_too_long():
    with pytest.raises(ValueError, match=r"7 similarities do not fit .* up to 6"):
        interactive_similarity(draw(2, 7), draw(6, 6))


def test_shared_by_relative_position():
    assert torch.equal(toeplitz(identity_diagonals(5)), torch.eye(5))
    diagonals = torch.arange(9.0, requires_grad=True)
    matrix = toeplitz(diagonals)
    assert matrix.shape == (5, 5)
    assert all(matrix[i, j] == diagonals[j - i + 4] for i in range(5) for j in range(5))
    matrix[:3, :3].sum().backward()  # three columns are nine entries on five diagonals
    assert diagonals.grad.tolist() == [0, 0, 1, 2, 3, 2, 1, 0, 0]
