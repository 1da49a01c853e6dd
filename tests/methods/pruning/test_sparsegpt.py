import pytest
import torch

from fulgurite.methods.pruning.sparsegpt import sparsegpt
from fulgurite.methods.quantization.rtn import quantize_rtn


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer(rows=6, columns=29, seed=0, dtype=torch.float64):
    x = draw(5 * columns, columns, seed=seed + 1) @ (torch.eye(columns) + 0.3 * draw(columns, columns, seed=seed + 2))
    return draw(rows, columns, seed=seed, dtype=dtype), (x.T @ x / len(x)).to(dtype)


def slow_sparsegpt(weight, gram, choose, grid=None, percdamp=0.01):
    """Optimal brain surgery in float64 with a matrix inverse per column.

    ``choose(column, saliency)`` gives the (out, n) bool of the weights that are pruned from ``column`` on, where
    columns are due to be chosen, and nothing otherwise.
    """
    weight = weight.clone()
    gram = gram + percdamp * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    pivots = torch.stack([torch.linalg.inv(gram[j:, j:])[0, 0] for j in range(len(gram))])
    pruned, out, loss = torch.zeros_like(weight, dtype=torch.bool), weight.clone(), 0.0
    for column in range(len(gram)):
        chosen = choose(column, weight**2 / pivots)
        if chosen is not None:
            pruned[:, column : column + chosen.shape[1]] = chosen
        kept = weight[:, column] if grid is None else grid(column, weight[:, column])
        out[:, column] = torch.where(pruned[:, column], torch.zeros_like(kept), kept)
        inverse = torch.linalg.inv(gram[column:, column:])
        error = weight[:, column] - out[:, column]
        loss += (error**2 / inverse[0, 0]).sum().item() / 2
        weight[:, column:] -= error[:, None] * inverse[0] / inverse[0, 0]
    return out, ~pruned, loss


def by_fraction(sparsity, block, rows, columns):
    """The choice at the start of a block, by sorting a list."""

    def choose(column, saliency):
        if column % block:
            return None
        part = saliency[:, column : min(column + block, columns)]
        count = round(sparsity * rows * (column + part.shape[1])) - round(sparsity * rows * column)
        chosen = torch.zeros(part.numel(), dtype=torch.bool)
        chosen[part.flatten().argsort()[:count]] = True
        return chosen.view_as(part)

    return choose


def by_pattern(kept, run, columns):
    """The choice before a run, by sorting the list of each row."""

    def choose(column, saliency):
        if column % run:
            return None
        part = saliency[:, column : min(column + run, columns)]
        order = [sorted(range(len(row)), key=row.__getitem__) for row in part.tolist()]
        chosen = torch.zeros_like(part, dtype=torch.bool)
        for row, places in enumerate(order):
            chosen[row, places[: max(len(places) - kept, 0)]] = True
        return chosen

    return choose


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.83, 1.0])
@pytest.mark.parametrize("block", [1, 10, 29, 128])
def test_a_fraction_is_pruned_as_by_optimal_brain_surgery(sparsity, block):
    weight, gram = layer()
    expected, mask, loss = slow_sparsegpt(weight, gram, by_fraction(sparsity, block, 6, 29))
    found = sparsegpt(weight, gram, sparsity, block_size=block)
    assert torch.equal(found.mask, mask)
    torch.testing.assert_close(found.weight, expected, rtol=1e-8, atol=1e-9)
    assert found.loss == pytest.approx(loss, rel=1e-8)
    assert (~found.mask).sum() == round(sparsity * weight.numel())
    assert not found.weight[~found.mask].any()


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:3", "3:20", "1:40"])
def test_a_pattern_is_pruned_as_by_optimal_brain_surgery_whatever_the_block(pattern):
    weight, gram = layer()
    kept, run = map(int, pattern.split(":"))
    expected, mask, _ = slow_sparsegpt(weight, gram, by_pattern(kept, run, 29))
    for block in (1, 6, 16, 128):
        found = sparsegpt(weight, gram, pattern=pattern, block_size=block)
        assert torch.equal(found.mask, mask)
        torch.testing.assert_close(found.weight, expected, rtol=1e-8, atol=1e-9)
    counts = [part.sum(1) for part in found.mask.split(run, dim=1)]
    assert all((count == min(kept, part.shape[1])).all() for count, part in zip(counts, mask.split(run, dim=1)))


@pytest.mark.parametrize("choice", [{"sparsity": 0.4}, {"pattern": "2:4"}])
@pytest.mark.parametrize("group_size", ["channel", "tensor", 8])
@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
def test_what_is_kept_lies_on_the_grid_of_the_dense_weights(choice, group_size, scheme):
    weight, gram = layer()
    plain = quantize_rtn(weight, 3, group_size, scheme=scheme).quantized
    scale, zero = (part.double().expand(6, -1)[:, plain.group_index.long()] for part in (plain.scale, plain.zero))

    def grid(column, values):
        s, z = scale[:, column], zero[:, column]
        return ((values / s).round() + z).clamp(0, 7).sub(z) * s

    choose = by_fraction(0.4, 128, 6, 29) if "sparsity" in choice else by_pattern(2, 4, 29)
    expected, mask, loss = slow_sparsegpt(weight, gram, choose, grid)
    found = sparsegpt(weight, gram, **choice, bits=3, group_size=group_size, scheme=scheme)
    torch.testing.assert_close(found.weight, expected, rtol=1e-8, atol=1e-9)
    assert torch.equal(found.mask, mask)
    assert torch.equal(found.quantized.dequantize(), found.weight)
    assert torch.equal(found.quantized.scale, plain.scale)
    assert found.loss == pytest.approx(loss, rel=1e-8)


def test_a_diagonal_gram_gives_magnitudes_times_root_energy_and_changes_nothing_else():
    weight, gram = layer(dtype=torch.float32)
    gram = torch.diag(gram.diagonal())
    found = sparsegpt(weight, gram, 0.5, percdamp=0, block_size=10)
    scores = weight.abs() * gram.diagonal().sqrt()
    for start in range(0, 29, 10):
        part, mask = scores[:, start : start + 10], found.mask[:, start : start + 10]
        assert part[mask].min() > part[~mask].max()
        assert (~mask).sum() == mask.numel() // 2
    assert torch.equal(found.weight, weight * found.mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types_unchanged_inputs_and_the_identity_without_sparsity(dtype):
    weight, gram = layer(dtype=dtype)
    gram = gram.float()
    gram[3], gram[:, 3] = 0, 0
    inputs = weight.clone(), gram.clone()
    for options in ({"sparsity": 0.0}, {"pattern": "4:4"}):
        found = sparsegpt(weight, gram, **options)
        assert torch.equal(found.weight, weight)
        assert found.mask.all()
    found = sparsegpt(weight, gram, 0.5)
    assert found.weight.dtype == dtype
    assert not found.weight[:, 3].any()
    assert torch.equal(weight, inputs[0])
    assert torch.equal(gram, inputs[1])


def test_it_loses_less_than_its_mask_alone_and_magnitude_and_its_loss_is_half_the_error_of_the_outputs():
    for seed in range(8):
        weight, gram = layer(rows=20, seed=seed)
        # Small blocks, as those of a wide layer are: one choice for all columns forgets what compensation will change.
        found = sparsegpt(weight, gram, 0.5, block_size=4)
        change = weight - found.weight
        damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(29, dtype=gram.dtype)
        assert torch.trace(change @ damped @ change.T).item() == pytest.approx(2 * found.loss, rel=1e-8)
        threshold = weight.abs().flatten().kthvalue(290).values
        for lost in (weight * (weight.abs() <= threshold), weight * ~found.mask):
            assert torch.trace(change @ gram @ change.T) < 0.9 * torch.trace(lost @ gram @ lost.T)


def test_a_gram_that_cannot_be_factored_gives_magnitude_and_a_warning():
    weight, gram = layer(columns=6)
    gram[0, 1] = gram[1, 0] = 1e3
    with pytest.warns(RuntimeWarning, match="no column is compensated for"):
        found = sparsegpt(weight, gram, 0.5)
    assert weight[found.mask].abs().min() > weight[~found.mask].abs().max()
    assert torch.equal(found.weight, weight * found.mask)


def test_bad_input_is_one_error():
    weight, gram = layer()
    for options, message in (
        ({}, "expected one of the two"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "expected one of the two"),
        ({"sparsity": 1.1}, r"1\.1"),
        ({"sparsity": float("nan")}, "nan"),
        ({"pattern": "4:2"}, "pattern='4:2'"),
        ({"sparsity": 0.5, "block_size": 0}, "block_size=0"),
        ({"sparsity": 0.5, "bits": 11}, "bits=11"),
    ):
        with pytest.raises(ValueError, match=message):
            sparsegpt(weight, gram, **options)
    with pytest.raises(ValueError, match="29 columns"):
        sparsegpt(weight, gram[:5, :5], 0.5)


def test_endless_damping_is_magnitude_without_updates():
    weight, gram = layer(columns=6)
    found = sparsegpt(weight, gram, 0.5, percdamp=1e12)
    assert weight[found.mask].abs().min() > weight[~found.mask].abs().max()
    torch.testing.assert_close(found.weight, weight * found.mask)
