"""VL-BART: BART that reads pictures and text, and writes the answer.

    h_0 = drop([LN_emb([prompt ; s E(ids) + P]) ; vis])         visual tokens have no position and pass no norm
    h_(i+1) = Block_i(h_i)                                       padding masked
    logits = head(Decoder(h_n)) + b

Source: Cho et al. (2021), arXiv 2102.02779, with the inputs of the released code of VL-Adapter (arXiv 2112.06825).

Legend: B batch, L text positions with prompts, V visual tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.backbones.seq2seq import VisionLanguageSeq2Seq
from fulgurite.backbones.seq2seq_specs import bart_spec

# The configuration of facebook/bart-base, for models without files.
BART_BASE = {
    "vocab_size": 50265,
    "max_position_embeddings": 1024,
    "encoder_layers": 6,
    "encoder_ffn_dim": 3072,
    "encoder_attention_heads": 12,
    "decoder_layers": 6,
    "decoder_ffn_dim": 3072,
    "decoder_attention_heads": 12,
    "d_model": 768,
    "activation_function": "gelu",
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
}


class VLBart(VisionLanguageSeq2Seq):
    """See `VisionLanguageSeq2Seq` for the arguments.

    Args:
        model: the published size is that of facebook/bart-base.
        extra_tokens: see there.
    """

    base_config = BART_BASE
    visual_home = "model.encoder.visual_embedding."

    def __init__(self, model: str = "facebook/bart-base", extra_tokens: int = 200, **options: Any) -> None:
        super().__init__(model=model, extra_tokens=extra_tokens, **options)

    def new_language_model(self, config: dict[str, Any]) -> nn.Module:
        """As in the base."""
        from transformers import BartConfig, BartForConditionalGeneration

        return BartForConditionalGeneration(BartConfig(**config))

    def read_language_model(self, source: str) -> nn.Module:
        """As in the base."""
        from transformers import BartForConditionalGeneration

        return BartForConditionalGeneration.from_pretrained(source)

    def norm(self, width: int) -> nn.Module:
        """LayerNorm."""
        return nn.LayerNorm(width)

    @property
    def visual_std(self) -> float:
        """As of all of BART's weights."""
        return self.language.config.init_std

    @property
    def decoder(self) -> nn.Module:
        """As in the base."""
        return self.language.model.decoder

    @property
    def decoder_blocks(self) -> nn.ModuleList:
        """As in the base."""
        return self.decoder.layers

    def embed(self, text: Tensor) -> Tensor:
        """Scaled tokens and positions."""
        encoder = self.language.model.encoder
        return encoder.embed_tokens(text) + encoder.embed_positions(text)

    def run_encoder(self, text: Tensor, visual: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor]:
        """As in the base."""
        from transformers.masking_utils import create_bidirectional_mask

        encoder = self.language.model.encoder
        states = encoder.layernorm_embedding(text)
        if visual is not None:
            states = torch.cat([states, visual.to(states.dtype)], dim=1)
        states = F.dropout(states, encoder.dropout, self.training)
        states, mask = self.embedded(states, mask, text.shape[1])
        attention = create_bidirectional_mask(config=encoder.config, inputs_embeds=states, attention_mask=mask)
        for block in encoder.layers:
            states = block(states, attention)
        return states, mask

    def build_spec(self) -> None:
        """As in the base."""
        self.spec = bart_spec(self.language.config, self.visual_parts)
