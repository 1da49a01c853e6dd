"""What every quantizer keeps to, and what is given it by name, on single matrices."""

import pytest
import torch

from fulgurite.methods.quantization.gptq import Gptq, gptq
from fulgurite.methods.quantization.rtn import Rtn, quantize_rtn

ALL_QUANTIZERS = (Rtn, Gptq)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment_of(quantizer, columns):
    rows = draw(40, columns, seed=9)
    return None if quantizer.needs == "nothing" else rows.T @ rows / 40


WEIGHTS = {"blocks.0.fc1": draw(6, 8), "blocks.0.fc2": draw(8, 12, seed=1)}


def compressed(quantizer, weights=WEIGHTS):
    quantizer.begin(weights)
    return {name: quantizer.compress(name, w, moment_of(quantizer, w.shape[1])) for name, w in weights.items()}


@pytest.mark.parametrize("kind", ALL_QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"bits": 4, "group_size": 4}, {"bits": 2, "scheme": "asymmetric"}])
def test_the_weight_is_what_the_data_say(kind, dtype, options):
    weights = {name: each.to(dtype) for name, each in WEIGHTS.items()}
    before = {name: each.clone() for name, each in weights.items()}
    for name, result in compressed(kind(**{"group_size": "channel", **options}), weights).items():
        assert torch.equal(weights[name], before[name])
        assert (result.weight.dtype, result.weight.shape) == (dtype, before[name].shape)
        assert torch.equal(result.quantized.dequantize(dtype), result.weight)
        assert result.quantized.bits == options["bits"]
        assert result.quantized.integers.max() < 2 ** options["bits"]
        assert result.quantized.scale.dtype == dtype


@pytest.mark.parametrize("kind", ALL_QUANTIZERS)
def test_the_class_is_its_function(kind):
    quantizer = kind(3, 4, "asymmetric", clip_search=True, scale_dtype="float16")
    for name, result in compressed(quantizer).items():
        own = (3, 4, "asymmetric", True, torch.float16)
        if kind is Rtn:
            expected = quantize_rtn(WEIGHTS[name], *own)
        else:
            moment = moment_of(quantizer, WEIGHTS[name].shape[1])
            expected = gptq(WEIGHTS[name], moment, *own, order="activation", groups="static")
        assert torch.equal(result.weight, expected.weight)
        assert result.quantized.scale.dtype == torch.float16


@pytest.mark.parametrize("kind", ALL_QUANTIZERS)
def test_bits_by_name_and_by_allocation(kind):
    def bits(quantizer):
        return [None if r.quantized is None else r.quantized.bits for r in compressed(quantizer).values()]

    assert bits(kind(4, 4, bits_by_name={r".*fc1": 2, r"blocks.*": 8})) == [2, 8]  # the first that matches
    assert bits(kind(4, 4, bits_by_name={r".*fc1": 16})) == [None, 4]
    allocated = kind(4, 4)
    allocated.assign({"blocks.0.fc1": 3, "blocks.0.fc2": 16})
    assert bits(allocated) == [3, None]
    allocated.assign({"blocks.0.fc2": 3})
    with pytest.raises(ValueError, match=r"no bits for 1 layers, first blocks\.0\.fc1"):
        allocated.begin(WEIGHTS)
    with pytest.raises(ValueError, match="'none' matches none of 2 layers, as blocks"):
        kind(bits_by_name={"none": 2}).begin(WEIGHTS)


@pytest.mark.parametrize("kind", ALL_QUANTIZERS)
def test_weights_that_are_kept_stay_off_the_grid(kind):
    masks = {"blocks.0.fc1": torch.zeros(6, 8, dtype=torch.bool)}
    masks["blocks.0.fc1"][2, 0] = True  # a first column, which no other has changed
    weights = {name: each.clone() for name, each in WEIGHTS.items()}
    weights["blocks.0.fc1"][2, 0] = 50.0
    quantizer = kind(4, "channel", **({"order": "none"} if kind is Gptq else {}))
    quantizer.keep(masks)
    results = compressed(quantizer, weights)
    kept = results["blocks.0.fc1"]
    assert kept.weight[2, 0] == 50
    assert kept.quantized.kept.sum() == 1
    assert results["blocks.0.fc2"].quantized.kept is None
    plain = compressed(kind(4, "channel", **({"order": "none"} if kind is Gptq else {})))["blocks.0.fc1"]
    assert kept.quantized.scale[2] <= plain.quantized.scale[2]  # it does not stretch the grid
    assert torch.equal(kept.weight[:2], plain.weight[:2])


@pytest.mark.parametrize("kind", ALL_QUANTIZERS)
def test_what_was_pruned_stays_zero(kind):
    masks = {name: draw(*each.shape, seed=4) > 0 for name, each in WEIGHTS.items()}
    pruned = {name: each * masks[name] for name, each in WEIGHTS.items()}
    quantizer = kind(4, 4)
    quantizer.keep_zeros(masks)
    for name, result in compressed(quantizer, pruned).items():
        assert not result.weight[~masks[name]].any()
        assert result.weight[masks[name]].count_nonzero() > 0.5 * masks[name].sum()


@pytest.mark.parametrize("kind", ALL_QUANTIZERS)
def test_masks_that_do_not_fit_are_refused(kind):
    for give in ("keep", "keep_zeros"):
        for mask in (torch.ones(8, 6, dtype=torch.bool), torch.ones(6, 8)):
            quantizer = kind()
            getattr(quantizer, give)({"blocks.0.fc1": mask})
            with pytest.raises(ValueError, match=r"blocks\.0\.fc1: a mask of .*expected \(6, 8\) in bool"):
                quantizer.begin(WEIGHTS)


@pytest.mark.parametrize("kind", ALL_QUANTIZERS)
def test_settings_out_of_range_are_refused_at_once(kind):
    for options in ({"bits": 0}, {"bits": 9}, {"bits_by_name": {"a": 0}}, {"group_size": 0}, {"scheme": "other"}):
        with pytest.raises(ValueError, match=r"bits|group_size|scheme"):
            kind(**options)
    with pytest.raises(ValueError, match="block_size"):
        Gptq(block_size=0)
