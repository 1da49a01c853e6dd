"""FrozenBiLM at its published size has the published number of parameters; nothing is allocated."""

import torch

from fulgurite.backbones.frozenbilm import FrozenBiLM
from fulgurite.methods.adapters.bank import AdapterBank, Placement
from fulgurite.methods.adapters.bottleneck import Bottleneck
from fulgurite.methods.adapters.replace import Replace


def test_published_number_of_trained_parameters():
    with torch.device("meta"):
        backbone = FrozenBiLM(pretrained=False)
        placements = [
            Placement(["attention_output", "feed_forward_output"], Bottleneck),
            Placement(["video_projection"], Replace),
        ]
        bank = AdapterBank(backbone, placements, ())
    assert sum(p.numel() for p in bank.parameters_of("live")) == 29_575_680
    norms = [
        backbone.get_submodule(name)
        for point in backbone.spec.points
        if point.endswith("norm")
        for name in backbone.spec.point_names(backbone, point)
    ]
    assert len(norms) == 52
    assert sum(p.numel() for norm in norms for p in norm.parameters()) == 159_744
