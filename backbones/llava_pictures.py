"""What a LLaVA of transformers makes of pictures before its projector, as an encoder whose features can be stored.

Legend: N pictures, S side in pixels, P tokens of a picture, f width of features.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fulgurite.checkpoints.digest import digest_of_json, digest_of_state


class ProcessorTransform:
    """Decoded pictures to pixels by an image processor of transformers, as it says itself.

    Args:
        processor: resizes, cuts or pads, and normalises.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, frames: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 to (N, 3, S, S) float32."""
        return self.processor(list(frames), input_data_format="channels_first", return_tensors="pt")["pixel_values"]


class TowerFeatures:
    """States of chosen layers of a vision tower, one beside the other.

    It holds the tower of the model and no copy, and is no module, so that the tower has one name in its backbone.

    Args:
        tower: vision model of transformers.
        processor: makes its pixels.
        layers: numbers of hidden states, 0 the embeddings; negative ones count from the end.
        strategy: ``"default"`` leaves the first token out, ``"full"`` keeps all.
    """

    def __init__(self, tower: nn.Module, processor: Any, layers: int | Sequence[int], strategy: str) -> None:
        self.tower, self.strategy = tower, strategy
        self.layers = (layers,) if isinstance(layers, int) else tuple(layers)
        self.transform = ProcessorTransform(processor)
        size = tower.config.image_size
        self.name = f"{tower.config.model_type}-{size}-layer{','.join(map(str, self.layers))}-{strategy}"
        parameter = next(tower.parameters())
        self.tokens, self.width = self(torch.zeros(1, 3, size, size, device=parameter.device)).shape[1:]

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) to (N, P, f)."""
        dtype = next(self.tower.parameters()).dtype
        states = self.tower(pixels.to(dtype), output_hidden_states=True).hidden_states
        first = 1 if self.strategy == "default" else 0
        return torch.cat([states[layer][:, first:] for layer in self.layers], dim=-1)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all that features depend on besides the picture."""
        return digest_of_json(
            {
                "weights": digest_of_state(self.tower.state_dict()),
                "layers": list(self.layers),
                "strategy": self.strategy,
                "processor": json.loads(self.transform.processor.to_json_string()),
            }
        )

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of the tower."""
        return self.tower.parameters()

    def to(self, device: Any) -> TowerFeatures:
        """Move the tower."""
        self.tower.to(device)
        return self

    def eval(self) -> TowerFeatures:
        """The tower in evaluation mode, in which a frozen backbone has it always."""
        self.tower.eval()
        return self
