"""Where things are in a model, by the library that it is of and by its family."""

from __future__ import annotations

from torch import nn

from fulgurite.backbones import encoder_specs, language_specs, picture_specs
from fulgurite.backbones.timm_specs import TIMM, open_clip_spec, timm_spec
from fulgurite.methods.structure import ModelSpec


def spec_of(model: nn.Module) -> ModelSpec:
    """The spec of a model of transformers, timm or open_clip.

    Raises:
        ValueError: a family that has none, with those that have one; or a model that is built differently.
    """
    libraries = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    if "transformers" in libraries:
        spec = transformers_spec(model)
    elif "timm" in libraries:
        spec = timm_spec(model)
    elif "open_clip" in libraries:
        spec = open_clip_spec(model)
    else:
        raise ValueError(
            f"{type(model).__name__} is of no library whose models have a spec; those of transformers are "
            f"{', '.join(families())}, those of timm {', '.join(TIMM)}, and open_clip's models of pictures and text"
        )
    try:
        spec.all_block_names(model)
    except LookupError as error:
        raise ValueError(f"{type(model).__name__} is not built as its family: {error}") from error
    return spec


def transformers_spec(model: nn.Module) -> ModelSpec:
    """The spec of a model of transformers. Raises as `spec_of`."""
    kind = model.config.model_type
    if kind in language_specs.FAMILIES:
        return language_specs.language_spec(model)
    found = encoder_specs.FAMILIES.get(kind) or picture_specs.FAMILIES.get(kind)
    if found is None:
        raise ValueError(f"model_type {kind!r} has no spec; those that have one are {', '.join(families())}")
    return found(model.config, root_of(model))


def families() -> list[str]:
    """Model types of transformers that have a spec."""
    return sorted({*language_specs.FAMILIES, *encoder_specs.FAMILIES, *picture_specs.FAMILIES})


def root_of(model: nn.Module) -> str:
    """What comes before the names of the bare model's modules: nothing, where ``model`` is it."""
    base = model.base_model_prefix
    return f"{base}." if hasattr(model, base) else ""
