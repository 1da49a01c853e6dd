import pytest
import torch

from fulgurite.methods.inverse_factor import checked_gram, damped_factor


def gram_of(size, seed=0, rows=None, dtype=torch.float64):
    x = torch.randn(rows or 3 * size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (x.T @ x).to(dtype)


@pytest.mark.parametrize("size", [1, 2, 63, 130, 301])
def test_the_factor_is_the_upper_cholesky_factor_of_the_inverse(size):
    gram = gram_of(size)
    factor = damped_factor(gram, None, 0.0, torch.float64)
    expected = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    assert factor.damping == 0
    assert torch.equal(factor.upper, factor.upper.triu())
    torch.testing.assert_close(factor.upper, expected, rtol=1e-9, atol=1e-12)


def test_in_float32_it_is_as_close_as_cholesky_inverse_cholesky():
    gram = gram_of(200)
    exact = damped_factor(gram, None, 0.01, torch.float64).upper
    fast = damped_factor(gram, None, 0.01, torch.float32).upper.double()
    single = gram.float() + 0.01 * gram.diagonal().mean().float() * torch.eye(200)
    plain = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(single)), upper=True).double()
    assert (fast - exact).norm() < 2 * (plain - exact).norm()
    assert (fast - exact).norm() < 1e-5 * exact.norm()


def test_order_damping_and_dead_columns_are_those_of_the_definition():
    gram = gram_of(7)
    gram[3], gram[:, 3] = 0, 0
    before = gram.clone()
    order = torch.tensor([4, 3, 0, 6, 5, 1, 2])
    factor = damped_factor(gram, order, 0.1, torch.float64)
    plain = gram.clone()
    plain[3, 3] = 1
    plain += 0.1 * plain.diagonal().mean() * torch.eye(7, dtype=plain.dtype)
    plain = plain[order][:, order]
    torch.testing.assert_close(factor.upper.T @ factor.upper, torch.linalg.inv(plain))
    assert torch.equal(gram, before)


def test_a_failure_is_retried_with_doubled_damping_and_told():
    vectors = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    gram = vectors @ torch.diag(torch.tensor([9.0, 5, 4, 3, 2, -0.2], dtype=torch.float64)) @ vectors.T
    # The mean of the diagonal is 3.8: 0.05 of it is too little, 0.08 enough.
    with pytest.warns(RuntimeWarning, match=r"percdamp=0.001; 0.08 was used"):
        factor = damped_factor(gram, None, 0.001, torch.float64)
    assert factor.damping == 0.08
    damped = gram + 0.08 * 3.8 * torch.eye(6, dtype=gram.dtype)
    torch.testing.assert_close(factor.upper.T @ factor.upper, torch.linalg.inv(damped))


def test_a_matrix_that_nothing_helps_gives_the_identity_and_a_warning():
    gram = torch.tensor([[1.0, 40.0], [40.0, 1.0]])
    with pytest.warns(RuntimeWarning, match=r"not positive definite even with percdamp=5.12"):
        factor = damped_factor(gram, None, 0.01, torch.float32)
    assert factor.damping is None
    assert torch.equal(factor.upper, torch.eye(2))


def test_too_few_samples_are_enough_with_damping():
    factor = damped_factor(gram_of(40, rows=5), None, 0.01, torch.float32)
    assert factor.damping == 0.01


@pytest.mark.parametrize(
    ("gram", "percdamp", "message"),
    [
        (torch.eye(4), 0.01, "for a weight of 5 columns"),
        (torch.eye(5).fill_diagonal_(float("nan")), 0.01, "NaN or infinite"),
        (-torch.eye(5), 0.01, "negative"),
        (torch.eye(5), -1.0, "percdamp=-1"),
        (torch.eye(5), float("inf"), "percdamp=inf"),
    ],
)
def test_bad_input_is_one_error(gram, percdamp, message):
    with pytest.raises(ValueError, match=message):
        checked_gram(gram, 5, percdamp)
