"""The configuration of compressed-tensors: what that package makes of it, and what is refused before any work."""

import pytest
import torch
from torch import nn

from fulgurite.methods.quantization.compressed_tensors import quantization_config, require_fits, scheme_of
from fulgurite.methods.quantization.gptq import Gptq, gptq
from fulgurite.methods.quantization.packing import to_compressed_tensors
from fulgurite.methods.quantization.rtn import Rtn, quantize_rtn


def weight(rows=24, columns=48):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [16, 48, 128, "channel", "tensor"])
def test_the_package_reads_the_same_weight(bits, group_size):
    package = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor

    result = quantize_rtn(weight(), bits, group_size, "symmetric")
    config = package.quantization.QuantizationConfig.model_validate(
        quantization_config({"layer": scheme_of(result.quantized)}, [])
    )
    (scheme,) = config.config_groups.values()
    packed = BaseCompressor.get_value_from_registry(config.format)
    found = packed.decompress(to_compressed_tensors(result.quantized), scheme)["weight"]
    assert torch.equal(found, result.weight)


def test_layers_of_one_way_share_a_group():
    four, eight = ({"num_bits": bits, "group_size": 16} for bits in (4, 8))
    single = quantization_config({"a": four, "b": dict(four)}, ["head"])
    assert single["config_groups"] == {"group_0": {"targets": ["Linear"], "weights": four}}
    assert single["ignore"] == ["head"]
    several = quantization_config({"a": four, "b": eight, "c": dict(four)}, [])
    assert [group["targets"] for group in several["config_groups"].values()] == [["a", "c"], ["b"]]


def test_scattered_groups_and_stored_zeros_have_no_place():
    gram = torch.diag(torch.rand(48, generator=torch.Generator().manual_seed(1)))
    scattered = gptq(weight(), gram, 4, 16, "symmetric", order="activation", groups="fresh").quantized
    zeros = quantize_rtn(weight(), 4, 16, "asymmetric").quantized
    for quantized in (scattered, zeros):
        with pytest.raises(ValueError, match="have no place"):
            scheme_of(quantized)


def test_what_does_not_fit_is_refused_with_a_way_out():
    layer = nn.Linear(48, 24)
    refused = {
        "stored zeros": Rtn(4, scheme="asymmetric"),
        "use groups='static'": Gptq(4, groups="fresh"),
        "a: bits=3": Rtn(3),
        "a: group_size=32 does not divide its 48 columns.* as 24": Rtn(4, 32),
        "a: scale_dtype='float16'.* float32": Rtn(4, scale_dtype="float16"),
        "a: bits=6": Rtn(4, bits_by_name={"a": 6}),
    }
    for message, quantizer in refused.items():
        with pytest.raises(ValueError, match=message):
            require_fits(quantizer, {"a": layer})
    with pytest.raises(ValueError, match="a is a Bilinear"):
        require_fits(Rtn(4), {"a": nn.Bilinear(2, 2, 2)})
    for fitting in (
        Rtn(4, 16),
        Rtn(4, 64),
        Rtn(8, "channel"),
        Gptq(2, "tensor", order="none"),
        Rtn(3, bits_by_name={"a": 16}),
    ):
        require_fits(fitting, {"a": layer})
