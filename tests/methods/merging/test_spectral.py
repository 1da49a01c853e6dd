"""Polar factors and singular triplets from Gram matrices against the SVD in float64."""

import pytest
import torch

from fulgurite.methods.merging.spectral import is_conditioned, newton_schulz, polar, triplets


def matrix(rows, columns, condition=3.0, seed=0, dtype=torch.float32):
    """A matrix whose singular values fall from 1 to 1 / condition."""
    generator = torch.Generator().manual_seed(seed)
    num = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, num, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, num, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(0, -torch.tensor(condition).log10(), num, dtype=torch.float64)
    return ((left * values) @ right.T).to(dtype), left, values, right


@pytest.mark.parametrize("solver", ["svd", "eigh", "newton_schulz"])
@pytest.mark.parametrize("shape", [(40, 40), (90, 30), (30, 90), (1, 7), (7, 1)])
@pytest.mark.parametrize("condition", [1.0, 5.0, 1000.0])
def test_polar_factor_is_that_of_the_svd(solver, shape, condition):
    given, left, values, right = matrix(*shape, condition)
    factor, nuclear = polar(given, solver)
    # The polar factor itself moves by the condition number times what float32 rounds off the matrix.
    tolerance = 1e-5 if condition < 100 else 1e-7 * condition
    torch.testing.assert_close(factor.double(), left @ right.T, rtol=0, atol=tolerance)
    assert nuclear == pytest.approx(float(values.sum()), rel=1e-5)


@pytest.mark.parametrize("solver", ["eigh", "newton_schulz"])
def test_a_singular_matrix_still_has_an_orthogonal_factor(solver):
    given = matrix(60, 20)[0]
    given[:, 15:] = given[:, :5]
    factor, _ = polar(given, solver)
    torch.testing.assert_close(factor.T @ factor, torch.eye(20), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(40, 40), (90, 30), (30, 90)])
@pytest.mark.parametrize("condition", [5.0, 3000.0])
@pytest.mark.parametrize("num", [0, 1, 9, 30])
def test_triplets_are_the_largest(shape, condition, num):
    given, left, values, right = matrix(*shape, condition)
    u, s, v = triplets(given, num)
    assert u.shape == (shape[0], num)
    assert v.shape == (shape[1], num)
    torch.testing.assert_close(s.double(), values[:num], rtol=1e-5, atol=1e-6)
    expected = (left[:, :num] * values[:num]) @ right[:, :num].T
    torch.testing.assert_close(((u * s) @ v.T).double(), expected, rtol=0, atol=1e-5)


def test_double_stays_exact():
    given, left, _, right = matrix(50, 20, 100.0, dtype=torch.float64)
    torch.testing.assert_close(polar(given)[0], left @ right.T, atol=1e-11, rtol=0)


@pytest.mark.parametrize(("condition", "expected"), [(9.0, True), (11.0, False)])
def test_conditioning_is_told_by_the_eigenvalues(condition, expected):
    given = matrix(60, 60, condition, dtype=torch.float64)[0]
    assert is_conditioned(given.T @ given, 1e-2) == expected


def test_newton_schulz_that_does_not_converge_is_an_error():
    with pytest.raises(ArithmeticError, match="does not converge"):
        newton_schulz(torch.diag(torch.tensor([1.0, -1.0])))
