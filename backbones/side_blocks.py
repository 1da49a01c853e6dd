"""Side blocks of a ladder, family by family: a library's own block with every width divided.

Heads and layers stay as many as they are. See `side_calls` for masks and caches.

Legend: B batch, S positions, D width, r reduction.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fulgurite.backbones.side_calls import (
    ConfiguredBlocks,
    divided,
    whole_norm,
    with_memory,
)
from fulgurite.backbones.side_t5 import T5Blocks
from fulgurite.backbones.side_timm import TimmBlocks
from fulgurite.methods.adapters.ladder_selection import Part, Together
from fulgurite.methods.adapters.ladder_stack import SideBlocks, SideCall


def side_blocks_of(block: nn.Module) -> SideBlocks:
    """How blocks like ``block`` are made small.

    Raises:
        ValueError: a family that has no side blocks.
    """
    for cls in type(block).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__](block)
    raise ValueError(f"a {type(block).__name__} cannot be made small; those that can are {', '.join(sorted(FAMILIES))}")


class BartBlocks(ConfiguredBlocks):
    """Encoder and decoder layers of BART, whose norms come after the sums."""

    def __init__(self, block: nn.Module) -> None:
        self.has_memory = hasattr(block, "encoder_attn")
        side = "decoder" if self.has_memory else "encoder"
        config = block.self_attn.config
        heads = getattr(config, f"{side}_attention_heads")
        super().__init__(block, config, ("d_model", f"{side}_ffn_dim"), heads)
        self.dropout = config.dropout

    def parts_of(self, block: nn.Module) -> list[Part]:
        """As `ConfiguredBlocks.parts_of`."""
        parts: list[Part] = []
        for attention in ("self_attn", *(("encoder_attn",) if self.has_memory else ())):
            inner = tuple(f"{attention}.{name}_proj" for name in "qkv")
            memory = inner[1:] if attention == "encoder_attn" else ()
            parts += [
                Together(inner, from_memory=memory, heads=block.self_attn.num_heads),
                Together((f"{attention}.out_proj",), writes=True),
                whole_norm(f"{attention}_layer_norm"),
            ]
        return [*parts, Together(("fc1",)), Together(("fc2",), writes=True), whole_norm("final_layer_norm")]

    def run(self, side: nn.Module, state: Tensor, call: SideCall) -> Tensor:
        """As `SideBlocks.run`."""
        if self.has_memory:
            call = with_memory(call, self.kind, state.dtype)
        return super().run(side, state, call)


class LlamaBlocks(ConfiguredBlocks):
    """Decoder layers with RMSNorm, rotary positions, gated hidden units, grouped key and value heads."""

    def __init__(self, block: nn.Module) -> None:
        config = copy.deepcopy(block.self_attn.config)
        config.head_dim = block.self_attn.head_dim
        super().__init__(block, config, ("hidden_size", "intermediate_size", "head_dim"))
        self.norm_kind = type(block.input_layernorm)

    def parts_of(self, block: nn.Module) -> list[Part]:
        """As `ConfiguredBlocks.parts_of`."""
        heads, groups = self.config.num_key_value_heads, block.self_attn.num_key_value_groups
        return [
            whole_norm("input_layernorm"),
            Together(tuple(f"self_attn.{name}_proj" for name in "qkv"), heads=heads, groups=groups),
            Together(("self_attn.o_proj",), writes=True),
            whole_norm("post_attention_layernorm"),
            Together(("mlp.gate_proj", "mlp.up_proj")),
            Together(("mlp.down_proj",), writes=True),
        ]

    def norm(self, reduction: int) -> nn.Module:
        """As `SideBlocks.norm`."""
        return self.norm_kind(self.width // reduction, eps=self.config.rms_norm_eps)

    def run(self, side: nn.Module, state: Tensor, call: SideCall) -> Tensor:
        """As `SideBlocks.run`; a head of D/r dimensions turns as every r-th pair of the backbone's does."""
        cos, sin = call.kwargs["position_embeddings"]
        step = cos.shape[-1] // side.self_attn.head_dim
        kwargs = {**call.kwargs, "position_embeddings": (cos[..., ::step], sin[..., ::step])}
        return super().run(side, state, replace(call, kwargs=kwargs))

    def small(self, reduction: int) -> Any:
        """As `ConfiguredBlocks.small`; the pairs that positions turn must divide too."""
        divided("head_dim / 2", self.config.head_dim // 2, reduction)
        return super().small(reduction)


class BertBlocks(ConfiguredBlocks):
    """Layers of BERT, whose norms come after the sums."""

    def __init__(self, block: nn.Module) -> None:
        config = block.attention.self.config
        if block.is_decoder:
            raise ValueError("side blocks of a BERT that decodes are not defined; take one that encodes")
        super().__init__(block, config, ("hidden_size", "intermediate_size"), config.num_attention_heads)
        self.dropout = config.hidden_dropout_prob

    def parts_of(self, block: nn.Module) -> list[Part]:
        """As `ConfiguredBlocks.parts_of`."""
        inner = tuple(f"attention.self.{name}" for name in ("query", "key", "value"))
        return [
            Together(inner, heads=self.config.num_attention_heads),
            Together(("attention.output.dense",), writes=True),
            whole_norm("attention.output.LayerNorm"),
            Together(("intermediate.dense",)),
            Together(("output.dense",), writes=True),
            whole_norm("output.LayerNorm"),
        ]


class ViTBlocks(ConfiguredBlocks):
    """Layers of transformers' ViT."""

    def __init__(self, block: nn.Module) -> None:
        config = block.attention.config
        super().__init__(block, config, ("hidden_size", "intermediate_size"), config.num_attention_heads)

    def parts_of(self, block: nn.Module) -> list[Part]:
        """As `ConfiguredBlocks.parts_of`."""
        return [
            whole_norm("layernorm_before"),
            Together(tuple(f"attention.{name}_proj" for name in "qkv"), heads=self.config.num_attention_heads),
            Together(("attention.o_proj",), writes=True),
            whole_norm("layernorm_after"),
            Together(("mlp.fc1",)),
            Together(("mlp.fc2",), writes=True),
        ]

    def make(self, number: int, cache_index: int, reduction: int, first: bool) -> nn.Module:
        """As `SideBlocks.make`."""
        return self.kind(self.small(reduction))

    def norm(self, reduction: int) -> nn.Module:
        """As `SideBlocks.norm`."""
        return nn.LayerNorm(self.width // reduction, eps=self.config.layer_norm_eps)


FAMILIES: dict[str, Callable[[nn.Module], SideBlocks]] = {
    "T5Block": T5Blocks,
    "BartEncoderLayer": BartBlocks,
    "BartDecoderLayer": BartBlocks,
    "LlamaDecoderLayer": LlamaBlocks,
    "MistralDecoderLayer": LlamaBlocks,
    "Qwen2DecoderLayer": LlamaBlocks,
    "Qwen3DecoderLayer": LlamaBlocks,
    "BertLayer": BertBlocks,
    "ViTLayer": ViTBlocks,
    "Block": TimmBlocks,
}
