import math

import pytest
import torch

from fulgurite.methods.quantization.grid import GridSettings, fit_grid, fit_groups
from fulgurite.methods.quantization.rtn import quantize_rtn

SCHEMES = ["asymmetric", "symmetric", "symmetric_gptq", "symmetric_quarot"]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def slow_range(low, high, bits, scheme):
    top = 2**bits - 1
    if scheme == "asymmetric":
        scale = (high - low) / top
        return scale, round(-low / scale)
    size = max(-low, high)
    return (size / (2 ** (bits - 1) - 1) if scheme == "symmetric_quarot" else size / (top / 2)), 2 ** (bits - 1)


def slow_round(row, scale, zero, bits):
    return [min(max(round(w / scale) + zero, 0), 2**bits - 1) for w in row]


def slow_row(row, bits, scheme, clip_search):
    """Integers, scale and zero of a row of Python numbers; Python rounds half to even as well."""
    low, high = min(*row, 0.0), max(*row, 0.0)
    best, found = math.inf, None
    for step in range(80 if clip_search else 1):
        scale, zero = slow_range((1 - step / 100) * low, (1 - step / 100) * high, bits, scheme)
        integers = slow_round(row, scale, zero, bits)
        error = sum(abs(scale * (q - zero) - w) ** 2.4 for q, w in zip(integers, row))
        if error < best:
            best, found = error, (integers, scale, zero)
    return found


@pytest.mark.parametrize("clip_search", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_to_nearest_is_that_of_plain_numbers(bits, scheme, clip_search):
    weight = draw(5, 11, dtype=torch.float64)
    weight[1] = weight[1].abs()  # a row without negative weights has the symmetric scale too
    weight[2] = -weight[2].abs()
    found = quantize_rtn(weight, bits, scheme=scheme, clip_search=clip_search).quantized
    for row, values in enumerate(weight.tolist()):
        integers, scale, zero = slow_row(values, bits, scheme, clip_search)
        assert found.integers[row].tolist() == integers
        assert found.zero[row].item() == zero
        assert math.isclose(found.scale[row].item(), scale, rel_tol=1e-12)


def test_a_search_in_pieces_is_the_search_of_the_whole(monkeypatch):
    weight = draw(9, 14)
    whole = quantize_rtn(weight, 3, clip_search=True)
    monkeypatch.setattr("fulgurite.methods.quantization.grid.SEARCHED_AT_ONCE", 30)
    assert torch.equal(quantize_rtn(weight, 3, clip_search=True).weight, whole.weight)


def test_the_clip_search_loses_no_more_than_the_full_range():
    weight = draw(40, 64) ** 3
    full, clipped = (quantize_rtn(weight, 3, clip_search=search).weight for search in (False, True))
    errors = [(rounded - weight).abs().pow(2.4).sum(1) for rounded in (full, clipped)]
    assert (errors[1] <= errors[0]).all()
    assert errors[1].sum() < 0.97 * errors[0].sum()


def test_of_two_ranges_without_loss_the_search_keeps_the_wider():
    # Of -1 alone, the scales 1 and 1/2 both hit it, as -1 and -2 steps.
    found = quantize_rtn(torch.tensor([[-1.0]]), 2, scheme="symmetric_quarot", clip_search=True)
    assert found.quantized.scale.item() == 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_of_zeros_stay_zero(scheme):
    weight = draw(3, 8)
    weight[1] = 0
    for dtype in (None, torch.float16):
        found = quantize_rtn(weight, 4, scheme=scheme, clip_search=True, scale_dtype=dtype)
        assert not found.weight[1].any()
        assert torch.isfinite(found.weight).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_constants_of_the_conventions(scheme):
    rows = torch.tensor([[-3.0, 1.0], [0.0, 0.0]])
    scale, zero = fit_grid(rows, GridSettings(4, scheme))
    expected = {
        "asymmetric": ([4 / 15, 2 / 15], [11, 7]),
        "symmetric": ([6 / 15, torch.finfo(torch.float32).eps], [8, 8]),
        "symmetric_gptq": ([6 / 15, 2 / 15], [8, 8]),
        "symmetric_quarot": ([3 / 7, 1e-5 / 7], [8, 8]),
    }[scheme]
    torch.testing.assert_close(scale, torch.tensor(expected[0]))
    assert zero.tolist() == expected[1]  # of zeros 1 / (2 / 15), which in float32 lies below 7.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("clip_search", [False, True])
def test_weights_are_rounded_with_the_scale_that_is_stored(dtype, clip_search):
    weight = draw(6, 32)
    found = quantize_rtn(weight, 4, group_size=8, scale_dtype=dtype, clip_search=clip_search)
    quantized = found.quantized
    assert quantized.scale.dtype == dtype
    scale, zero = (part.float().repeat_interleave(8, 1) for part in (quantized.scale, quantized.zero))
    assert torch.equal(quantized.integers.float(), (torch.round(weight / scale) + zero).clamp(0, 15))
    assert torch.equal(found.weight, scale * (quantized.integers.float() - zero))


def test_a_zero_stays_on_the_grid_when_the_stored_scale_is_smaller():
    # (high - low) / 255 of these rows is rounded down in bfloat16, so -low / scale passes 255.
    weight = -torch.linspace(1, 2, 41)[:, None].repeat(1, 2)
    quantized = quantize_rtn(weight, 8, scale_dtype=torch.bfloat16).quantized
    assert (torch.round(-weight[:, :1] / quantized.scale.float()) > 255).any()
    assert (quantized.zero == 255).any()
    torch.testing.assert_close(quantized.dequantize(), weight, rtol=5e-3, atol=0)


def test_scales_beyond_the_stored_type_are_refused_and_tiny_ones_are_not_zero():
    with pytest.raises(ValueError, match=r"scale_dtype torch\.bfloat16"):
        quantize_rtn(torch.full((2, 4), 1e6), 2, scale_dtype=torch.float16)
    found = quantize_rtn(torch.full((2, 4), 1e-9), 2, scale_dtype=torch.float16)
    assert torch.isfinite(found.weight).all()
    assert (found.quantized.scale > 0).all()


@pytest.mark.parametrize("group_size", [1, 4, 5, 100, "channel", "tensor"])
def test_groups_are_rows_of_their_own(group_size):
    weight = draw(3, 13)
    found = quantize_rtn(weight, 3, group_size=group_size, clip_search=True)
    if group_size == "tensor":
        expected = quantize_rtn(weight.reshape(1, -1), 3, clip_search=True).weight.view(3, 13)
    else:
        width = 13 if group_size == "channel" else group_size
        expected = torch.cat([quantize_rtn(p, 3, clip_search=True).weight for p in weight.split(width, dim=1)], 1)
    assert torch.equal(found.weight, expected)
    assert torch.equal(found.quantized.dequantize(), expected)


def test_kept_weights_stay_and_do_not_stretch_the_grid():
    weight = draw(4, 9)
    kept = torch.zeros(4, 9, dtype=torch.bool)
    kept[0, 3], kept[1] = True, True
    weight[0, 3] = 50
    found = quantize_rtn(weight, 3, kept=kept)
    assert torch.equal(found.weight[kept], weight[kept])
    others = torch.cat([weight[0, :3], weight[0, 4:]])
    expected = quantize_rtn(torch.cat([others, others.mean()[None]])[None], 3)
    torch.testing.assert_close(found.quantized.scale[0], expected.quantized.scale[0])
    assert torch.equal(found.quantized.integers[1], found.quantized.zero[1].expand(9))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types_and_the_identity_at_16_bits(dtype):
    weight = draw(4, 6, dtype=dtype)
    before = weight.clone()
    assert torch.equal(quantize_rtn(weight, 16).weight, weight)
    found = quantize_rtn(weight, 4)
    assert found.weight.dtype == dtype
    assert found.quantized.scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(found.quantized.dequantize(dtype), found.weight)
    assert torch.equal(weight, before)


def test_bad_input_is_one_error():
    weight = draw(2, 4)
    for options, message in (
        ({"bits": 12}, "bits=12"),
        ({"bits": 0}, "bits=0"),
        ({"bits": 1, "scheme": "symmetric_quarot"}, "bits=1"),
        ({"bits": 4, "scheme": "ternary"}, "scheme='ternary'"),
        ({"bits": 4, "group_size": 0}, "group_size=0"),
        ({"bits": 4, "group_size": "row"}, "group_size='row'"),
        ({"bits": 4, "scale_dtype": torch.int8}, "scale_dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_rtn(weight, **options)
    with pytest.raises(ValueError, match="NaN"):
        quantize_rtn(weight / 0, 4)
    with pytest.raises(ValueError, match="matrix"):
        quantize_rtn(weight[0], 4)
    assert fit_groups(weight, 2, GridSettings(1))[0].shape == (2, 2)


def test_small_scales_of_half_precision_are_those_of_the_range():
    row = torch.linspace(-1e-3, 1e-3, 9)[None]
    settings = GridSettings(8, "asymmetric", scale_dtype=torch.float16)
    scale, _ = fit_grid(row, settings)
    assert scale.item() == torch.tensor(2e-3 / 255).half().float().item()


def test_the_clip_search_finds_what_a_search_of_all_ranges_finds():
    """In float32 on wide rows, where most ranges are passed over."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 128, generator=generator) * torch.randn(64, 128, generator=generator).exp()
    settings = GridSettings(4, "asymmetric", clip_search=True)
    scale, zero = fit_grid(rows, settings)
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    best, expected, expected_zero = torch.full((64,), torch.inf), torch.empty(64), torch.empty(64)
    for step in range(80):
        shrink = 1 - step / 100
        tried = (shrink * high - shrink * low) / 15
        zeros = (-(shrink * low) / tried).round()
        levels = ((rows / tried[:, None]).round() + zeros[:, None]).clamp(0, 15)
        error = ((levels - zeros[:, None]) * tried[:, None] - rows).abs().pow(2.4).sum(1)
        better = error < best
        best[better], expected[better], expected_zero[better] = error[better], tried[better], zeros[better]
    assert torch.equal(scale, expected)
    assert torch.equal(zero, expected_zero)
