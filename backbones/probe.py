"""Seeded inputs on which two copies of a model of another library are compared."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

ROWS, LENGTH = 2, 7  # samples and text tokens of a probe


def probe(library: str, model: Any, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of a forward pass by argument, the same for the same model.

    Args:
        library: ``hf``, ``timm`` or ``open_clip``.
        model: one of its models.
        seed: of the values.

    Raises:
        ValueError: the model takes something else than texts and pictures.
    """
    generator = torch.Generator().manual_seed(seed)
    if library == "timm":
        channels, *size = model.pretrained_cfg["input_size"]
        fixed = getattr(getattr(model, "patch_embed", None), "img_size", None)
        return {"pixels": torch.randn(ROWS, channels, *(fixed or size), generator=generator)}
    if library == "open_clip":
        size, length = model.visual.image_size, model.context_length
        size = (size, size) if isinstance(size, int) else tuple(size)
        ids = torch.randint(1, model.vocab_size, (ROWS, length), generator=generator)
        return {"image": torch.randn(ROWS, 3, *size, generator=generator), "text": ids}
    return _of_transformers(model, generator)


def _of_transformers(model: Any, generator: torch.Generator) -> dict[str, Tensor]:
    arguments, config = inspect.signature(model.forward).parameters, model.config
    text, vision = getattr(config, "text_config", None) or config, getattr(config, "vision_config", None) or config
    vocabulary, size = getattr(text, "vocab_size", None), getattr(vision, "image_size", None)
    found: dict[str, Tensor] = {}
    # A model that puts pictures in the place of tokens of its own wants them counted; its text alone is compared.
    places_pictures = any(hasattr(config, name) for name in ("image_token_id", "image_token_index"))
    if "pixel_values" in arguments and size is not None and not places_pictures:
        size = (size, size) if isinstance(size, int) else tuple(size)
        channels = getattr(vision, "num_channels", 3)
        found["pixel_values"] = torch.randn(ROWS, channels, *size, generator=generator)
    if "input_ids" in arguments and vocabulary is not None:
        # Special tokens, pictures' among them, lie at the ends of a vocabulary more often than not.
        low = min(8, vocabulary // 4)
        found["input_ids"] = torch.randint(low, max(vocabulary // 2, low + 1), (ROWS, LENGTH), generator=generator)
        mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
        if not getattr(config, "is_encoder_decoder", False):
            mask[-1, -2:] = 0
        found["attention_mask"] = mask
        if "decoder_input_ids" in arguments:
            found["decoder_input_ids"] = found["input_ids"].flip(1)
    if not found:
        raise ValueError(
            f"no inputs are known for {type(model).__name__}, which takes {', '.join(list(arguments)[:8])}: give "
            "some with --probe, a safetensors file with a tensor per argument"
        )
    return found
