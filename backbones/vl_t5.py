"""VL-T5: T5 that reads pictures and text, and writes the answer.

    h_0 = drop([prompt ; E(ids) ; vis])
    h_(i+1) = Block_i(h_i; bias)          the relative bias of text and text; zero for every pair with a visual token
    logits = head(d^-0.5 Decoder(norm(h_n)))

Source: Cho et al. (2021), arXiv 2102.02779, with the inputs of the released code of VL-Adapter (arXiv 2112.06825).

Legend: B batch, L text positions with prompts, V visual tokens, S positions that the blocks read, D width, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.backbones.seq2seq import VisionLanguageSeq2Seq
from fulgurite.backbones.seq2seq_specs import t5_spec

# The configuration of t5-base, for models without files.
T5_BASE = {
    "vocab_size": 32128,
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 3072,
    "num_layers": 12,
    "num_decoder_layers": 12,
    "num_heads": 12,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}


class VLT5(VisionLanguageSeq2Seq):
    """See `VisionLanguageSeq2Seq` for the arguments.

    Args:
        model: the published size is that of t5-base.
        extra_tokens: see there; the published table of 32,200 rows has 72 more than T5's.
    """

    base_config = T5_BASE
    visual_home = "encoder.visual_embedding."

    def __init__(self, model: str = "google-t5/t5-base", extra_tokens: int = 72, **options: Any) -> None:
        super().__init__(model=model, extra_tokens=extra_tokens, **options)

    def new_language_model(self, config: dict[str, Any]) -> nn.Module:
        """As in the base."""
        from transformers import T5Config, T5ForConditionalGeneration

        return T5ForConditionalGeneration(T5Config(**config))

    def read_language_model(self, source: str) -> nn.Module:
        """As in the base."""
        from transformers import T5ForConditionalGeneration

        return T5ForConditionalGeneration.from_pretrained(source)

    def norm(self, width: int) -> nn.Module:
        """T5's norm by the root of the mean square."""
        from transformers.models.t5.modeling_t5 import T5LayerNorm

        return T5LayerNorm(width, eps=self.language.config.layer_norm_epsilon)

    @property
    def visual_std(self) -> float:
        """Of T5's feed-forward matrices; the published projection starts by torch's default, which is near."""
        return self.language.config.d_model**-0.5

    @property
    def decoder(self) -> nn.Module:
        """As in the base."""
        return self.language.decoder

    @property
    def decoder_blocks(self) -> nn.ModuleList:
        """As in the base."""
        return self.decoder.block

    def embed(self, text: Tensor) -> Tensor:
        """Tokens."""
        return self.language.encoder.embed_tokens(text)

    def run_encoder(self, text: Tensor, visual: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor]:
        """As in the base."""
        from transformers.masking_utils import create_bidirectional_mask

        encoder = self.language.encoder
        states = text if visual is None else torch.cat([text, visual.to(text.dtype)], dim=1)
        states, mask = self.embedded(encoder.dropout(states), mask, text.shape[1])
        bias = self.position_bias(text.shape[1], states.shape[1])
        attention = create_bidirectional_mask(config=encoder.config, inputs_embeds=states, attention_mask=mask)
        for block in encoder.block:
            states = block(states, attention, bias)[0]
        return encoder.dropout(encoder.final_layer_norm(states)), mask

    def position_bias(self, text_length: int, length: int) -> Tensor:
        """(1, H, S, S) of the encoder: the relative bias among the first L positions, zero elsewhere."""
        attention = self.language.encoder.block[0].layer[0].SelfAttention
        others = length - text_length
        return F.pad(attention.compute_bias(text_length, text_length), (0, others, 0, others))

    def build_spec(self) -> None:
        """As in the base."""
        self.spec = t5_spec(self.language.config, self.visual_parts)
        self.called_apart = ("language.encoder.block.0.layer.0.SelfAttention.relative_attention_bias",)
