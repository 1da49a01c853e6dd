import pytest
import torch

from fulgurite.methods.column_solver import column_order
from fulgurite.methods.quantization.gptq import gptq
from fulgurite.methods.quantization.grid import GridSettings, fit_grid
from fulgurite.methods.quantization.rtn import quantize_rtn

SCHEMES = ["asymmetric", "symmetric", "symmetric_gptq", "symmetric_quarot"]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer(rows=6, columns=29, seed=0, dtype=torch.float64):
    """A weight and the Gram matrix of correlated inputs, of which each column has its own energy."""
    x = draw(5 * columns, columns, seed=seed + 1) @ (torch.eye(columns) + 0.3 * draw(columns, columns, seed=seed + 2))
    x *= torch.linspace(0.5, 2, columns)[torch.randperm(columns, generator=torch.Generator().manual_seed(seed))]
    return draw(rows, columns, seed=seed, dtype=dtype), (x.T @ x / len(x)).to(dtype)


def slow_gptq(weight, gram, bits, order, groups, fitted, kept=None, percdamp=0.01, block=None):
    """Optimal brain surgery in float64, a matrix inverse per column: no Cholesky factor, no blocks, no transposition.

    ``groups`` holds the group of every column in the solver's order. ``block`` is there for stale reads alone.
    """
    settings = GridSettings(bits)
    weight, gram = weight.clone(), gram.clone()
    original = weight.clone()
    gram += percdamp * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    out, grids, loss, left = weight.clone(), {}, 0.0, list(order)
    block_start = weight.clone()
    for place, column in enumerate(order):
        if block and place % block == 0:
            block_start = weight.clone()
        group = groups[place]
        if group not in grids:
            members = [order[i] for i in range(len(order)) if groups[i] == group]
            source = {"fresh": weight, "stale": block_start, "static": original}[fitted]
            grids[group] = fit_grid(source[:, members], settings, None if kept is None else kept[:, members])
        scale, zero = grids[group]
        value = weight[:, column]
        rounded = ((value / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero) * scale
        if kept is not None:
            rounded = torch.where(kept[:, column], value, rounded)
        inverse = torch.linalg.inv(gram[left][:, left])
        error = value - rounded
        loss += (error**2 / inverse[0, 0]).sum().item() / 2
        out[:, column] = rounded
        weight[:, left] -= error[:, None] * inverse[0] / inverse[0, 0]
        left = left[1:]
    return out, loss


def order_of(gram, order, size):
    """The solver's order of columns and the group of each, by sorting lists."""
    columns = list(range(len(gram)))
    energy = gram.diagonal().tolist()
    if order == "activation":
        return sorted(columns, key=lambda j: -energy[j])
    if order == "group_aware":
        runs = [columns[start : start + size] for start in range(0, len(columns), size)]
        runs = [sorted(run, key=lambda j: -energy[j]) for run in runs]
        return [j for run in sorted(runs, key=lambda run: -energy[run[0]]) for j in run]
    return columns


@pytest.mark.parametrize("with_kept", [False, True])
@pytest.mark.parametrize("groups", ["fresh", "stale", "static"])
@pytest.mark.parametrize("order", ["none", "activation", "group_aware"])
@pytest.mark.parametrize("size", [7, 24])
def test_it_is_optimal_brain_surgery_column_by_column(order, groups, with_kept, size):
    weight, gram = layer()
    kept = draw(6, 29, seed=9) > 1.2 if with_kept else None
    columns = order_of(gram, order, size)
    if order == "activation" and groups != "static":
        group = [place // size for place in range(29)]
    else:
        group = [column // size for column in columns]
    expected, loss = slow_gptq(weight, gram, 3, columns, group, groups, kept, block=10)
    found = gptq(weight, gram, 3, size, order=order, groups=groups, kept=kept, block_size=10)
    torch.testing.assert_close(found.weight, expected, rtol=1e-8, atol=1e-9)
    assert found.loss == pytest.approx(loss, rel=1e-8)
    assert [found.quantized.group_index[column].item() for column in columns] == group
    torch.testing.assert_close(found.quantized.dequantize(), found.weight, rtol=0, atol=0)


def test_groups_whose_first_column_lies_inside_a_block_and_last_beyond_it_are_read_fresh():
    weight, gram = layer(columns=40)
    expected, _ = slow_gptq(weight, gram, 2, range(40), [j // 15 for j in range(40)], "fresh")
    torch.testing.assert_close(gptq(weight, gram, 2, 15, block_size=18).weight, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "options", [{}, {"group_size": 16}, {"group_size": 12, "groups": "static"}, {"group_size": "tensor"}]
)
@pytest.mark.parametrize("order", ["none", "activation"])
def test_the_block_size_changes_nothing(options, order):
    weight, gram = layer(12, 70, dtype=torch.float32)
    whole = gptq(weight, gram, 4, order=order, block_size=70, **options)
    for block_size in (1, 16, 33, 128):
        found = gptq(weight, gram, 4, order=order, block_size=block_size, **options)
        assert torch.equal(found.quantized.integers, whole.quantized.integers)
        torch.testing.assert_close(found.weight, whole.weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("group_size", ["channel", "tensor", 5])
@pytest.mark.parametrize("order", ["none", "activation", "group_aware"])
def test_a_diagonal_gram_gives_rounding_to_nearest(scheme, group_size, order):
    weight, gram = layer(dtype=torch.float32)
    options = {"group_size": group_size, "scheme": scheme, "clip_search": True, "scale_dtype": torch.float16}
    groups = "static" if order == "activation" else "fresh"
    found = gptq(weight, torch.diag(gram.diagonal()), 3, order=order, groups=groups, **options)
    expected = quantize_rtn(weight, 3, **options)
    assert torch.equal(found.weight, expected.weight)
    assert torch.equal(found.quantized.integers, expected.quantized.integers)


def test_endless_damping_gives_rounding_to_nearest():
    weight, gram = layer(dtype=torch.float32)
    assert torch.equal(gptq(weight, gram, 3, percdamp=1e9).weight, quantize_rtn(weight, 3).weight)
    assert not torch.equal(gptq(weight, gram, 3).weight, quantize_rtn(weight, 3).weight)


def test_a_gram_that_cannot_be_factored_gives_rounding_to_nearest_and_a_warning():
    weight, gram = layer(columns=5)
    gram[0, 1] = gram[1, 0] = 1e3
    with pytest.warns(RuntimeWarning, match="no column is compensated for"):
        found = gptq(weight, gram, 3)
    assert found.damping is None
    assert torch.equal(found.weight, quantize_rtn(weight, 3).weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types_unchanged_inputs_and_the_identity_at_16_bits(dtype):
    weight, gram = layer(dtype=dtype)
    gram = gram.float()
    inputs = weight.clone(), gram.clone()
    assert torch.equal(gptq(weight, gram, 16).weight, weight)
    found = gptq(weight, gram, 4, 8, order="activation", scale_dtype=torch.bfloat16)
    assert found.weight.dtype == dtype
    assert found.quantized.scale.dtype == torch.bfloat16
    assert torch.equal(found.quantized.dequantize(dtype), found.weight)
    assert torch.equal(weight, inputs[0])
    assert torch.equal(gram, inputs[1])


def test_permuted_inputs_permute_the_result_of_an_ordered_solve():
    weight, gram = layer()
    shuffle = torch.randperm(29, generator=torch.Generator().manual_seed(4))
    for options in ({}, {"group_size": 8}):
        found = gptq(weight, gram, 3, order="activation", **options)
        moved = gptq(weight[:, shuffle], gram[shuffle][:, shuffle], 3, order="activation", **options)
        torch.testing.assert_close(moved.weight, found.weight[:, shuffle])


@pytest.mark.parametrize("order", ["none", "activation"])
def test_the_loss_is_half_the_error_of_the_outputs(order):
    weight, gram = layer()
    found = gptq(weight, gram, 3, 8, order=order)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(29, dtype=gram.dtype)
    change = weight - found.weight
    assert torch.trace(change @ damped @ change.T).item() == pytest.approx(2 * found.loss, rel=1e-9)


def test_it_loses_less_than_rounding_to_nearest_on_the_same_grid():
    ratios = []
    for seed in range(12):
        weight, gram = layer(seed=seed)
        errors = [
            torch.trace(change @ gram @ change.T)
            for change in (weight - solve.weight for solve in (gptq(weight, gram, 3), quantize_rtn(weight, 3)))
        ]
        ratios.append((errors[0] / errors[1]).item())
    assert max(ratios) <= 1
    assert sum(ratios) / len(ratios) < 0.7


def test_any_factor_of_the_gram_gives_the_same():
    weight, gram = layer(dtype=torch.float32)
    assert torch.equal(gptq(weight, 1024 * gram, 3, 8).weight, gptq(weight, gram, 3, 8).weight)


def test_dead_columns_become_zero_and_nothing_else_notices():
    weight, gram = layer()
    gram[4], gram[:, 4] = 0, 0
    weight[:, 4] = 0.02  # within the range of its row, so that the grid does not depend on it
    found = gptq(weight, gram, 3, group_size=29, groups="static", order="activation")
    assert not found.weight[:, 4].any()
    changed = weight.clone()
    changed[:, 4] = 0.01
    others = [j for j in range(29) if j != 4]
    again = gptq(changed, gram, 3, group_size=29, groups="static", order="activation")
    torch.testing.assert_close(again.weight[:, others], found.weight[:, others])


def test_dead_columns_are_ordered_as_if_their_energy_were_one():
    energy = torch.tensor([0.5, 0.0, 3.0, 2.0, 0.0])
    groups = torch.tensor([0, 0, 1, 1, 2])
    assert column_order(energy, "activation", groups).tolist() == [2, 3, 1, 4, 0]
    assert column_order(energy, "group_aware", groups).tolist() == [2, 3, 1, 0, 4]


@pytest.mark.parametrize("order", ["none", "activation", "group_aware"])
def test_kept_weights_take_compensation_and_cause_no_error(order):
    weight, gram = layer()
    none, everything = torch.zeros(6, 29, dtype=torch.bool), torch.ones(6, 29, dtype=torch.bool)
    plain = gptq(weight, gram, 2, 8, order=order)
    assert torch.equal(gptq(weight, gram, 2, 8, order=order, kept=none).weight, plain.weight)
    assert torch.equal(gptq(weight, gram, 2, 8, order=order, kept=everything).weight, weight)
    some = draw(6, 29, seed=3) > 1.5
    found = gptq(weight, gram, 2, 8, order=order, kept=some)
    quantized = found.quantized
    index = quantized.group_index.long()
    level = found.weight / quantized.scale[:, index] + quantized.zero[:, index]
    on_grid = (level - level.round()).abs() < 1e-9
    assert torch.equal(~on_grid, some)
    assert not torch.equal(found.weight[some], weight[some])
    assert torch.equal(quantized.kept_values, found.weight[some])
    assert torch.equal(quantized.integers[some], quantized.zero[:, index][some])
    assert found.loss < plain.loss


def test_kept_weights_of_dead_columns_stay_unless_asked():
    weight, gram = layer()
    gram[4], gram[:, 4] = 0, 0
    kept = torch.zeros(6, 29, dtype=torch.bool)
    kept[2, 4] = True
    found = gptq(weight, gram, 2, kept=kept).weight[:, 4]
    assert found[2] == weight[2, 4]
    assert found.count_nonzero() == 1
    assert not gptq(weight, gram, 2, kept=kept, zero_dead_kept=True).weight[:, 4].any()


def test_every_row_has_at_most_as_many_levels_as_its_grid():
    weight, gram = layer(columns=60)
    for row in gptq(weight, gram, 3).weight:
        assert len(row.unique()) <= 8


def test_weights_of_tokens_enter_through_the_gram_alone():
    weight, _ = layer(columns=12)
    x = draw(60, 12, seed=8)
    keep = torch.arange(60) % 3 != 0
    weighted = x.T @ (x * keep[:, None])
    torch.testing.assert_close(gptq(weight, weighted, 3).weight, gptq(weight, x[keep].T @ x[keep], 3).weight)


def test_bad_input_is_one_error():
    weight, gram = layer()
    for options, message in (
        ({"bits": 9}, "bits=9"),
        ({"bits": 4, "order": "falling"}, "order='falling'"),
        ({"bits": 4, "groups": "lazy"}, "groups='lazy'"),
        ({"bits": 4, "block_size": 0}, "block_size=0"),
        ({"bits": 4, "group_size": -1}, "group_size=-1"),
        ({"bits": 4, "kept": torch.ones(6, 28, dtype=torch.bool)}, "kept"),
    ):
        with pytest.raises(ValueError, match=message):
            gptq(weight, gram, **options)
    with pytest.raises(ValueError, match="29 columns"):
        gptq(weight, gram[:5, :5], 4)


@pytest.mark.parametrize("order", ["none", "activation"])
@pytest.mark.parametrize("groups", ["fresh", "static"])
def test_pruned_weights_stay_zero_and_the_others_make_up_for_it(order, groups):
    source = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 48, generator=source)
    x = torch.randn(200, 48, generator=source) @ torch.randn(48, 48, generator=source)
    gram, pruned = x.T @ x, torch.rand(24, 48, generator=source) < 0.5
    weight = weight.masked_fill(pruned, 0)
    settings = {"bits": 3, "group_size": 16, "order": order, "groups": groups}
    result = gptq(weight, gram, **settings, pruned=pruned)
    assert not result.weight[pruned].any()

    def error(found):
        return (x @ (found - weight).T).square().sum()

    plain = gptq(weight, gram, **settings)
    assert plain.weight[pruned].any()
    assert error(result.weight) < error(plain.weight.masked_fill(pruned, 0))
    assert torch.equal(gptq(weight, gram, **settings, pruned=torch.zeros_like(pruned)).weight, plain.weight)
    kept = torch.ones_like(pruned)
    assert torch.equal(gptq(weight, gram, **settings, kept=kept, pruned=pruned).quantized.kept, ~pruned)


def test_a_dead_column_does_not_stretch_the_grid_of_its_group():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(5, 8, generator=generator), torch.randn(40, 8, generator=generator)
    weight[:, 2], x[:, 2] = 100.0, 0.0
    found = gptq(weight, x.T @ x, 4, 4, groups="static").quantized
    without = weight.clone()
    without[:, 2] = 0
    expected = gptq(without, x.T @ x, 4, 4, groups="static").quantized
    assert torch.equal(found.scale, expected.scale)
    assert found.scale.max() < 1


def test_a_row_has_at_most_its_levels_and_what_it_keeps():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 64, generator=generator), torch.randn(200, 64, generator=generator)
    kept = torch.rand(6, 64, generator=generator) < 0.1
    found = gptq(weight, x.T @ x, 2, kept=kept)
    for row, own in zip(found.weight, kept):
        assert len(row.unique()) <= 4 + int(own.sum())
        assert len(row[~own].unique()) <= 4
