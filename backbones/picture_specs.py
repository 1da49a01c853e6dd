"""Where things are in vision transformers of transformers, and in its models of pictures and text.

Their norms could be folded, but pictures come in by convolutions, which no rotation here reaches: no pairs are named.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fulgurite.methods.structure import ModelSpec, Tower

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def vit_spec(config: PretrainedConfig, root: str) -> ModelSpec:
    """ViT.

    Args:
        config: of the model.
        root: what comes before ``layers`` in the names of modules, as ``vit.``, or nothing.
    """
    return tower_spec("vision", config, f"{root}layers", "attention")


def clip_spec(config: PretrainedConfig, root: str) -> ModelSpec:
    """CLIP and SigLIP; arguments as of `vit_spec`. The towers do not read each other."""
    return joined(
        tower_spec("vision", config.vision_config, f"{root}vision_model.encoder.layers", "self_attn"),
        tower_spec("text", config.text_config, f"{root}text_model.encoder.layers", "self_attn"),
    )


def clip_vision_spec(config: PretrainedConfig, root: str) -> ModelSpec:
    """The tower for pictures alone; arguments as of `vit_spec`."""
    return tower_spec("vision", config, f"{root}encoder.layers", "self_attn")


def clip_text_spec(config: PretrainedConfig, root: str) -> ModelSpec:
    """The tower for text alone; arguments as of `vit_spec`."""
    return tower_spec("text", config, f"{root}encoder.layers", "self_attn")


def tower_spec(name: str, config: PretrainedConfig, stack: str, attention: str) -> ModelSpec:
    """One tower.

    Args:
        name: of the tower.
        config: of the tower.
        stack: name of the list of its blocks.
        attention: name of the attention in a block.
    """
    block = stack.replace(".", r"\.") + r"\.\d+"
    return ModelSpec(
        towers=(Tower(name, block, config.num_hidden_layers, config.hidden_size),),
        shared_inputs=(tuple(rf"{block}\.{attention}\.{part}_proj" for part in "qkv"),),
    )


def joined(*specs: ModelSpec) -> ModelSpec:
    """The towers of ``specs``, one after the other, in one model."""
    return ModelSpec(
        towers=tuple(tower for spec in specs for tower in spec.towers),
        shared_inputs=tuple(group for spec in specs for group in spec.shared_inputs),
        position_readers=tuple(pattern for spec in specs for pattern in spec.position_readers),
    )


FAMILIES: dict[str, Callable[[PretrainedConfig, str], ModelSpec]] = {
    "vit": vit_spec,
    "clip": clip_spec,
    "clip_vision_model": clip_vision_spec,
    "clip_text_model": clip_text_spec,
    "siglip": clip_spec,
    "siglip_vision_model": clip_vision_spec,
    "siglip_text_model": clip_text_spec,
}
