"""Where things are in vision transformers of timm, and in open_clip's models of pictures and text and their towers."""

from __future__ import annotations

from torch import nn

from fulgurite.backbones import encoder_specs
from fulgurite.backbones.picture_specs import joined
from fulgurite.methods.structure import ModelSpec, Tower

TIMM = ("Beit", "Eva", "VisionTransformer", "VisionTransformerRelPos")  # and their subclasses
SHARED = (("attn.q_proj", "attn.k_proj", "attn.v_proj"), ("mlp.fc1_g", "mlp.fc1_x"))


def timm_spec(model: nn.Module, root: str = "") -> ModelSpec:
    """A plain stack of attention blocks.

    Args:
        model: of timm.
        root: what comes before ``blocks`` in the names of modules, as ``visual.trunk.``.

    Raises:
        ValueError: a model of another kind.
    """
    if not {cls.__name__ for cls in type(model).__mro__} & set(TIMM):
        raise ValueError(f"timm's {type(model).__name__} has no spec; those that have one are {', '.join(TIMM)}")
    block = rf"{root}blocks.".replace(".", r"\.") + r"\d+"
    inner = {name for name, _ in model.blocks[0].named_modules()}
    groups = [group for group in SHARED if inner.issuperset(group)]
    return ModelSpec(
        towers=(Tower("vision", block, len(model.blocks), model.embed_dim),),
        shared_inputs=tuple(tuple(block + rf".{name}".replace(".", r"\.") for name in group) for group in groups),
    )


def open_clip_spec(model: nn.Module) -> ModelSpec:
    """A tower for pictures and one for text, which do not read each other; of a tower for pictures, it alone.

    Raises:
        ValueError: one of them is of a kind that has no spec, or reads the other.
    """
    if hasattr(model, "text_decoder"):
        raise ValueError(f"open_clip's {type(model).__name__} has no spec: its decoder's blocks lie in two lists")
    if not hasattr(model, "visual"):
        return picture_tower_spec(model, "")
    return joined(picture_tower_spec(model.visual, "visual."), text_spec(model))


def picture_tower_spec(visual: nn.Module, root: str) -> ModelSpec:
    """The tower for pictures, whose modules' names begin with ``root``."""
    if hasattr(visual, "trunk"):
        return timm_spec(visual.trunk, f"{root}trunk.")
    if hasattr(visual, "transformer"):
        return resblocks("vision", visual.transformer, f"{root}transformer")
    raise ValueError(f"open_clip's {type(visual).__name__} has no spec: it is no stack of attention blocks")


def text_spec(model: nn.Module) -> ModelSpec:
    """The tower for text; it may be one of transformers."""
    if not hasattr(model, "text"):
        return resblocks("text", model.transformer, "transformer")
    inner = model.text.transformer
    if hasattr(inner, "resblocks"):
        return resblocks("text", inner, "text.transformer")
    kind = inner.config.model_type
    if kind not in encoder_specs.FAMILIES:
        raise ValueError(
            f"text tower of model_type {kind!r}: it has no spec; those that have one are open_clip's own, "
            f"{', '.join(encoder_specs.FAMILIES)}"
        )
    return encoder_specs.FAMILIES[kind](inner.config, "text.transformer.")


def resblocks(name: str, transformer: nn.Module, root: str) -> ModelSpec:
    """One tower of open_clip's own blocks."""
    block = rf"{root}.resblocks.".replace(".", r"\.") + r"\d+"
    return ModelSpec(towers=(Tower(name, block, len(transformer.resblocks), transformer.width),))
