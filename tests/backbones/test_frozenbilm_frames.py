"""FrozenBiLM on frames that an encoder of its own reads."""

import pytest
from torch import nn

from fulgurite.backbones.frames import FrameEncoder, FrameTransform
from fulgurite.backbones.frozenbilm import FrozenBiLM

WIDTH = 6
CONFIG = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "attention_head_size": 8,
    "intermediate_size": 32,
    "position_buckets": 8,
    "max_position_embeddings": 32,
}


class ToyEncoder(FrameEncoder):
    def __init__(self, grid):
        super().__init__(8, grid, "stretch")
        self.model, self.name = nn.Conv2d(3, WIDTH, 4, 4), "toy"
        self.transform = FrameTransform(8, (0.0,) * 3, (1.0,) * 3)
        self.freeze()

    def feature_map(self, pixels):
        return self.model(pixels)

    def pooled(self, pixels):
        return self.model(pixels).mean((2, 3))


def test_frame_encoder_names_the_features_it_makes():
    encoder = ToyEncoder(grid=0)
    backbone = FrozenBiLM(pretrained=False, config=CONFIG, max_tokens=8, frame_encoder=encoder)
    assert (backbone.features, backbone.routing_widths) == ("toy", (WIDTH, 16))
    assert backbone.deberta.embeddings.linear_video.in_features == WIDTH
    extractor = backbone.feature_extractor()
    assert extractor.encoder is encoder
    assert extractor.sampling.rule == "per_second"
    plain = FrozenBiLM(pretrained=False, config=CONFIG, feature_dim=WIDTH, max_tokens=8)
    assert plain.feature_extractor() is None
    with pytest.raises(ValueError, match="4 tokens per frame"):
        FrozenBiLM(pretrained=False, config=CONFIG, max_tokens=8, frame_encoder=ToyEncoder(grid=2))
