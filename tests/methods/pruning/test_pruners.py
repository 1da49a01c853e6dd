"""What every pruner keeps to, and what each does of its own, on single matrices."""

import pytest
import torch

from fulgurite.methods.pruning.magnitude import Magnitude
from fulgurite.methods.pruning.sparsegpt import SparseGpt
from fulgurite.methods.pruning.wanda import Wanda
from fulgurite.methods.quantization.grid import GridSettings, fit_groups

ALL_PRUNERS = (Magnitude, Wanda, SparseGpt)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment_of(pruner, columns):
    rows = draw(40, columns, seed=9)
    gram = rows.T @ rows / 40
    return {"nothing": None, "energies": gram.diagonal(), "grams": gram}[pruner.needs]


def compressed(pruner, weights):
    pruner.begin(weights)
    return {name: pruner.compress(name, each, moment_of(pruner, each.shape[1])) for name, each in weights.items()}


WEIGHTS = {"blocks.0.fc1": draw(6, 8), "blocks.0.fc2": draw(8, 12, seed=1)}


@pytest.mark.parametrize("kind", ALL_PRUNERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_tell_the_zeros_and_arguments_stay(kind, dtype):
    weights = {name: each.to(dtype) for name, each in WEIGHTS.items()}
    before = {name: each.clone() for name, each in weights.items()}
    for name, result in compressed(kind(0.5), weights).items():
        assert torch.equal(weights[name], before[name])
        assert (result.weight.dtype, result.weight.shape) == (dtype, before[name].shape)
        assert torch.equal(result.weight != 0, result.mask)
        assert result.quantized is None
        assert (~result.mask).sum() == result.mask.numel() // 2


@pytest.mark.parametrize("kind", [Magnitude, Wanda])
@pytest.mark.parametrize("options", [{"sparsity": 0.3}, {"pattern": "2:4"}])
def test_what_is_kept_keeps_its_bits(kind, options):
    for name, result in compressed(kind(**options), WEIGHTS).items():
        assert result.weight[result.mask].numpy().tobytes() == WEIGHTS[name][result.mask].numpy().tobytes()


@pytest.mark.parametrize("kind", ALL_PRUNERS)
@pytest.mark.parametrize(("pattern", "kept", "run"), [("2:4", 2, 4), ("1:4", 1, 4), ("4:8", 4, 8)])
def test_n_of_every_m_are_kept(kind, pattern, kept, run):
    weights = {"a": draw(6, 16)}
    (result,) = compressed(kind(pattern=pattern), weights).values()
    assert (result.weight.view(-1, run) != 0).sum(1).eq(kept).all()


@pytest.mark.parametrize("kind", ALL_PRUNERS)
def test_sparsities_by_name_and_by_allocation(kind):
    def shares(pruner):
        return {name: int((~r.mask).sum()) / r.mask.numel() for name, r in compressed(pruner, WEIGHTS).items()}

    by_name = kind(0.5, sparsities={r".*\.fc1": 0.25, r"blocks\..*": 0.75})
    assert shares(by_name) == {"blocks.0.fc1": 0.25, "blocks.0.fc2": 0.75}  # the first that matches
    allocated = kind(0.5)
    allocated.assign({"blocks.0.fc1": 0.75, "blocks.0.fc2": 0.25})
    assert shares(allocated) == {"blocks.0.fc1": 0.75, "blocks.0.fc2": 0.25}
    allocated.assign({"blocks.0.fc1": 0.75})
    with pytest.raises(ValueError, match=r"no sparsity for 1 layers, first blocks\.0\.fc2"):
        allocated.begin(WEIGHTS)
    with pytest.raises(ValueError, match="'none' matches none of 2 layers, as blocks"):
        kind(0.5, sparsities={"none": 0.2}).begin(WEIGHTS)


@pytest.mark.parametrize("kind", ALL_PRUNERS)
def test_settings_that_contradict_are_refused(kind):
    for options, text in (
        ({}, "give one of the two"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "give one of the two"),
        ({"pattern": "2:4", "sparsities": {"a": 0.1}}, "leave out sparsities"),
        ({"sparsity": 1.5}, r"1\.5 is outside"),
        ({"sparsity": 0.5, "sparsities": {"a": -0.1}}, r"-0\.1 is outside"),
        ({"pattern": "four"}, "four"),
    ):
        with pytest.raises(ValueError, match=text):
            kind(**options)


def test_own_settings_that_contradict_are_refused():
    with pytest.raises(ValueError, match="ranks all matrices together"):
        Magnitude(0.5, scope="global", sparsities={"a": 0.1})
    with pytest.raises(ValueError, match="ranks all matrices together"):
        Magnitude(pattern="2:4", scope="global")
    with pytest.raises(ValueError, match="leave out selection='matrix'"):
        Wanda(pattern="2:4", selection="matrix")
    with pytest.raises(ValueError, match="block_size"):
        SparseGpt(0.5, block_size=0)
    with pytest.raises(ValueError, match="bits"):
        SparseGpt(0.5, bits=0)


def test_magnitude_of_all_matrices_together_prunes_the_smallest_of_all():
    weights = {"a": draw(4, 6), "b": draw(5, 6, seed=1) * 0.1}
    results = compressed(Magnitude(0.5, scope="global"), weights)
    everything = torch.cat([each.abs().flatten() for each in weights.values()])
    limit = everything.sort().values[round(0.5 * 54)]
    for name, result in results.items():
        assert torch.equal(result.mask, weights[name].abs() >= limit)


def test_wanda_ranks_by_its_inputs():
    weight, energies = draw(6, 8), draw(8, seed=3).square()
    scores = weight.abs() * energies.sqrt()
    rows = Wanda(0.5)
    rows.begin({"a": weight})
    expected = scores > scores.sort(1).values[:, 3:4]
    assert torch.equal(rows.compress("a", weight, energies).mask, expected)
    assert torch.equal(rows.compress("a", weight, 100 * energies).mask, expected)  # on any scale
    assert not torch.equal(rows.compress("a", weight, torch.ones(8)).mask, expected)
    matrix = Wanda(0.5, selection="matrix").compress("a", weight, energies)
    assert torch.equal(matrix.mask, scores > scores.flatten().sort().values[23])


def test_sparsegpt_puts_what_it_keeps_on_grids_of_the_dense_weights():
    pruner = SparseGpt(0.5, bits=4, group_size=4, scheme="symmetric")
    for name, result in compressed(pruner, WEIGHTS).items():
        scale, zero = fit_groups(WEIGHTS[name], 4, GridSettings(4, "symmetric", False, torch.float32))
        levels = result.weight / scale.repeat_interleave(4, 1) + zero.repeat_interleave(4, 1)
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
        assert levels.min() > -0.1
        assert levels.max() < 15.1
        assert not result.weight[~result.mask].any()
