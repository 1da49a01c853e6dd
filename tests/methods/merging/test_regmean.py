"""RegMean against the least-squares problem that it solves."""

import pytest
import torch

from fulgurite.methods.merging.linear import Average
from fulgurite.methods.merging.regmean import RegMean, regression_mean

WEIGHTS = [1.0, 2.0, 0.5]
LAYER = "block.0.mlp"


@pytest.fixture
def inputs():
    """Inputs of one layer (rows, 6) of three experts, with columns of unlike size."""
    generator = torch.Generator().manual_seed(1)
    scale = torch.tensor([0.1, 0.3, 1.0, 2.0, 4.0, 8.0])
    mix = torch.randn(3, 6, 6, generator=generator)
    return [torch.randn(50, 6, generator=generator) @ m * scale for m in mix]


def grams_of(inputs, layer=LAYER):
    return [{layer: x.double().T @ x.double() / len(x)} for x in inputs]


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_it_is_the_stacked_least_squares_solution(weights, experts, inputs):
    merged = RegMean(offdiag=1.0, ridge=0.0).use(grams_of(inputs))(experts, weights=weights)[f"{LAYER}.weight"]
    factors = [((w or 1) / len(x)) ** 0.5 for w, x in zip(weights or [1.0] * 3, inputs)]
    rows = torch.cat([f * x.double() for f, x in zip(factors, inputs)])
    wanted = torch.cat([f * x.double() @ e[f"{LAYER}.weight"].double().T for f, x, e in zip(factors, inputs, experts)])
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    torch.testing.assert_close(merged.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offdiag", [1.0, 0.9, 0.1, 0.0])
def test_the_gradient_of_its_objective_vanishes(offdiag, experts, inputs):
    matrices = [e[f"{LAYER}.weight"].double() for e in experts]
    grams = [x.double().T @ x.double() for x in inputs]
    merged = regression_mean(matrices, grams, WEIGHTS, offdiag, ridge=0.0).requires_grad_()
    scaled = [g * offdiag + torch.diag(g.diagonal()) * (1 - offdiag) for g in grams]

    def objective(matrix):
        changes = [matrix - m for m in matrices]
        return sum(w * torch.trace(c @ g @ c.T) for w, c, g in zip(WEIGHTS, changes, scaled))

    (gradient,) = torch.autograd.grad(objective(merged), merged)
    size = sum(w * (g @ m.T).norm() for w, g, m in zip(WEIGHTS, scaled, matrices))
    assert gradient.norm() < 1e-12 * size
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        moved = merged + 1e-3 * torch.randn(merged.shape, generator=generator, dtype=torch.float64)
        assert objective(moved) > objective(merged)


def test_equal_grams_or_equal_diagonals_alone_average(experts, inputs):
    mean = Average()(experts, weights=WEIGHTS)[f"{LAYER}.weight"]
    gram = grams_of(inputs[:1])[0]
    merged = RegMean().use([gram] * 3)(experts, weights=WEIGHTS)[f"{LAYER}.weight"]
    torch.testing.assert_close(merged, mean, rtol=1e-5, atol=1e-6)
    unit = []
    for x in inputs:
        g = x.T @ x
        unit.append({LAYER: g / (g.diagonal().sqrt()[:, None] * g.diagonal().sqrt())})
    merged = RegMean(offdiag=0.0).use(unit)(experts, weights=WEIGHTS)[f"{LAYER}.weight"]
    torch.testing.assert_close(merged, mean, rtol=1e-5, atol=1e-6)
    kept = RegMean(offdiag=1.0).use(unit)(experts, weights=WEIGHTS)[f"{LAYER}.weight"]
    assert not torch.allclose(kept, mean, atol=1e-2)


@pytest.mark.parametrize("ridge", [1e-8, 0.0])
def test_directions_that_no_input_has_shown_are_averaged(ridge, experts, inputs):
    few = [x[:1] for x in inputs]  # 3 rows for 6 columns
    matrices = [e[f"{LAYER}.weight"].double() for e in experts]
    merged = regression_mean(matrices, [g[LAYER] for g in grams_of(few)], [1.0] * 3, 1.0, ridge)
    for x, matrix in zip(few, matrices):
        torch.testing.assert_close(x.double() @ merged.T, x.double() @ matrix.T, rtol=1e-5, atol=1e-5)
    unseen = torch.linalg.svd(torch.cat(few).double())[2][3:]
    mean = sum(matrices) / 3
    torch.testing.assert_close(unseen @ merged.T, unseen @ mean.T, rtol=1e-5, atol=1e-5)
    for offdiag in (1.0, 0.9):
        nothing = regression_mean(matrices, [torch.zeros(6, 6)] * 3, [1.0] * 3, offdiag, ridge)
        torch.testing.assert_close(nothing, mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [6, 24])
@pytest.mark.parametrize(
    ("dtype", "ridge", "tolerance"),
    [(torch.float64, 0.0, 1e-8), (torch.float64, 1e-8, 1e-5), (torch.float32, 1e-8, 1e-2), (torch.float32, 0.0, 1e-2)],
)
def test_rounding_errors_of_singular_grams_stay_out(width, dtype, ridge, tolerance):
    """Cholesky often passes for them, and gives rounding errors for what no input has shown."""
    generator = torch.Generator().manual_seed(4)
    for _ in range(40):
        matrices = [torch.randn(2, width, generator=generator, dtype=torch.float64) for _ in range(2)]
        x = torch.randn(width // 2, width, generator=generator, dtype=dtype)
        unseen = torch.linalg.svd(x.double())[2][len(x) :]
        merged = regression_mean(matrices, [x.T @ x, 2 * x.T @ x], [1.0, 1.0], ridge=ridge)
        mean = (matrices[0] + matrices[1]) / 2
        torch.testing.assert_close(unseen @ merged.T, unseen @ mean.T, rtol=0, atol=tolerance)


def test_weights_stored_as_in_out_give_the_transposed_result(experts, inputs):
    grams = grams_of(inputs)
    plain = RegMean().use(grams)(experts)[f"{LAYER}.weight"]
    turned = [{**e, f"{LAYER}.weight": e[f"{LAYER}.weight"].T.contiguous()} for e in experts]
    merged = RegMean().use(grams, transposed=[LAYER])(turned)[f"{LAYER}.weight"]
    torch.testing.assert_close(merged.T, plain, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"Gram of \(6, 6\) for a weight of \(6, 8\).*transposed"):
        RegMean().use(grams)(turned)


def test_all_else_is_averaged_and_one_expert_comes_back(experts, inputs):
    merged, mean = RegMean().use(grams_of(inputs))(experts), Average()(experts)
    assert all(torch.equal(merged[n], mean[n]) == (n != f"{LAYER}.weight") for n in mean)
    alone = RegMean().use(grams_of(inputs[:1]))(experts[:1])
    assert all(torch.equal(alone[n], experts[0][n]) for n in alone)


def test_what_does_not_fit_is_refused(experts, inputs):
    grams = grams_of(inputs)
    with pytest.raises(ValueError, match="statistics of 2 models for 3 experts"):
        RegMean().use(grams[:2])(experts)
    with pytest.raises(ValueError, match=r"1 statistics are of tensors that the models lack: \['model.mlp'\]"):
        RegMean().use([{**g, "model.mlp": torch.eye(6)} for g in grams])(experts)
    with pytest.raises(ValueError, match="without diagonal"):
        RegMean().use([{LAYER: g[LAYER].diagonal()} for g in grams])(experts)
    with pytest.raises(ValueError, match=r"Gram of \(2, 2\) for a weight of \(3, 2, 2, 2\)"):
        RegMean().use([{"conv": torch.eye(2)}] * 3)(experts)
    grams[2][LAYER][0, 0] = torch.inf
    with pytest.raises(ValueError, match="expert 2 has entries that are not finite"):
        RegMean().use(grams)(experts)
    with pytest.raises(ValueError, match="offdiag"):
        RegMean(offdiag=1.5)
    with pytest.raises(ValueError, match="ridge"):
        RegMean(ridge=-1.0)
