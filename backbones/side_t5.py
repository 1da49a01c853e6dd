"""Side blocks of T5 (also v1.1, with gated hidden units), both stacks.

The first side block of a stack owns a table of relative positions [buckets, heads], whose bias all side blocks of the
stack share. Where the side stream has visual positions behind the text, the bias is that of text and text, and zero
for every pair with a visual position.

Legend: B batch, H heads, S positions of the side stream, K positions of keys, L of the text, M of the encoder's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.backbones.side_calls import ConfiguredBlocks, additive, arguments, cache_of, cover, whole_norm
from fulgurite.methods.adapters.ladder_selection import Part, Together
from fulgurite.methods.adapters.ladder_stack import SideCall


class T5Blocks(ConfiguredBlocks):
    """Blocks of T5's encoder or decoder."""

    def __init__(self, block: nn.Module) -> None:
        attention = block.layer[0].SelfAttention
        self.has_memory = len(block.layer) == 3
        super().__init__(block, attention.config, ("d_model", "d_kv", "d_ff"))
        self.dropout = attention.config.dropout_rate
        self.norm_kind = type(block.layer[0].layer_norm)

    def parts_of(self, block: nn.Module) -> list[Part]:
        """As `ConfiguredBlocks.parts_of`."""
        parts: list[Part] = []
        names = ("SelfAttention", "EncDecAttention")[: 1 + self.has_memory]
        for number, name in enumerate(names):
            inner = tuple(f"layer.{number}.{name}.{each}" for each in "qkv")
            parts += [
                whole_norm(f"layer.{number}.layer_norm"),
                Together(inner, from_memory=inner[1:] if number else (), heads=self.config.num_heads),
                Together((f"layer.{number}.{name}.o",), writes=True),
            ]
        dense = f"layer.{len(names)}.DenseReluDense"
        halves = ("wi_0", "wi_1") if self.config.is_gated_act else ("wi",)
        return [
            *parts,
            whole_norm(f"layer.{len(names)}.layer_norm"),
            Together(tuple(f"{dense}.{half}" for half in halves)),
            Together((f"{dense}.wo",), writes=True),
        ]

    def make(self, number: int, cache_index: int, reduction: int, first: bool) -> nn.Module:
        """As `SideBlocks.make`."""
        side = self.kind(self.small(reduction), has_relative_attention_bias=first, layer_idx=cache_index)
        # The bias that is handed in holds the mask, causality included.
        side.layer[0].SelfAttention.is_causal = False
        return side

    def norm(self, reduction: int) -> nn.Module:
        """As `SideBlocks.norm`."""
        return self.norm_kind(self.width // reduction, eps=self.config.layer_norm_epsilon)

    def run(self, side: nn.Module, state: Tensor, call: SideCall) -> Tensor:
        """As `SideBlocks.run`."""
        given = arguments(self.kind, call)
        cover(given, [side.layer[0].SelfAttention.layer_idx] if self.has_memory else [])
        if "bias" not in call.shared:
            call.shared["bias"] = self.bias(side, state, call, given)
        given |= {"hidden_states": state, "attention_mask": None, "position_bias": call.shared["bias"]}
        if self.has_memory:
            if "cross" not in call.shared:
                call.shared["cross"] = self.cross_bias(call, given, state.dtype)
            given["encoder_hidden_states"] = call.memory
            given |= {"encoder_attention_mask": None, "encoder_decoder_position_bias": call.shared["cross"]}
        return side(**given)[0]

    def bias(self, side: nn.Module, state: Tensor, call: SideCall, given: dict[str, Any]) -> Tensor:
        """The self-attention's bias and mask in one, (1 or B, H, S, K)."""
        attention, positions = side.layer[0].SelfAttention, state.shape[1]
        if self.has_memory:
            cache = cache_of(given)
            past = 0 if cache is None else cache.get_seq_length(attention.layer_idx)
            bias = attention.compute_bias(positions, past + positions, state.device, past)
        else:
            text = positions if call.text_length is None else call.text_length
            others = positions - text
            bias = F.pad(attention.compute_bias(text, text, state.device), (0, others, 0, others))
        mask = given.get("attention_mask") if call.mask is None else call.mask[:, None, None]
        if mask is None and self.has_memory and positions > 1:
            mask = torch.ones(positions, bias.shape[3], dtype=torch.bool, device=state.device)
            mask = mask.tril(bias.shape[3] - positions)
        bias = bias.to(state.dtype)
        return bias if mask is None else bias + additive(mask, state.dtype)

    def cross_bias(self, call: SideCall, given: dict[str, Any], dtype: torch.dtype) -> Tensor:
        """The cross-attention's mask, (B or 1, 1, 1 or S, M)."""
        mask = given.get("encoder_attention_mask") if call.memory_mask is None else call.memory_mask[:, None, None]
        if mask is None:
            return call.memory.new_zeros(1, 1, 1, call.memory.shape[1], dtype=dtype)
        return additive(mask, dtype)
