"""Every token of open_clip's towers for pictures: what stands for the whole picture first, then its patches.

A tower has two parts. The *trunk* gives tokens whose values can be stored where it does not train; the *projection*,
with the norm before it where that is the same for every token, puts each token into the width shared with text.

Legend: N pictures, P patches, C width of the trunk's tokens, D width shared with text, S side in pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.backbones.frames import as_map, square


class PictureTokens(ABC):
    """How one kind of tower gives its tokens. Holds no module, so that none is named twice.

    Args:
        grid: patches are averaged to ``grid`` x ``grid`` cells of the picture, row by row; None keeps all.

    Attributes:
        tail: names in the tower of modules and parameters behind the trunk.
    """

    tail: tuple[str, ...] = ()

    def __init__(self, grid: int | None) -> None:
        if grid is not None and grid < 1:
            raise ValueError(f"grid={grid} must be positive, or null for all patches")
        self.grid = grid

    @abstractmethod
    def trunk(self, tower: nn.Module, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) to (N, 1 + P, C)."""

    @abstractmethod
    def project(self, tower: nn.Module, tokens: Tensor) -> Tensor:
        """(..., C) to (..., D)."""

    def in_trunk(self, name: str) -> bool:
        """Whether a module or tensor of that name in the tower lies before the projection."""
        return not f"{name}.".startswith(tuple(f"{part}." for part in self.tail))

    def norms(self, tower: nn.Module) -> list[nn.Module]:
        """The norm before the attention of every block. Raises ValueError where there are no such blocks."""
        raise ValueError(f"open_clip's {type(tower).__name__} has no blocks of attention")

    def cells(self, patches: Tensor) -> Tensor:
        """Patches (N, P', C), or a map of them (N, C, h, w), as (N, P, C)."""
        if self.grid is not None:
            grid = patches if patches.ndim == 4 else square(patches)
            if self.grid > min(grid.shape[-2:]):
                raise ValueError(f"grid={self.grid} cells per side, but the tower has {tuple(grid.shape[-2:])}")
            patches = F.adaptive_avg_pool2d(grid, self.grid)
        return patches if patches.ndim == 3 else patches.flatten(2).transpose(1, 2)


class ClipPictureTokens(PictureTokens):
    """open_clip's own vision transformer: all tokens of the last block, then its last norm and projection.

    Args:
        tower: of that kind.
        grid: see the base.

    Raises:
        ValueError: it pools by attention.
    """

    def __init__(self, tower: nn.Module, grid: int | None) -> None:
        super().__init__(grid)
        if tower.attn_pool is not None or tower.pool_type not in ("tok", "avg"):
            raise ValueError("a tower for pictures that pools by attention has no token that stands for each patch")
        self.averages = tower.pool_type == "avg"
        self.norm_in_trunk = self.averages and not tower.final_ln_after_pool
        self.tail = ("proj",) if self.norm_in_trunk else ("proj", "ln_post")

    def trunk(self, tower: nn.Module, pixels: Tensor) -> Tensor:
        """As in the base; the first token is the tower's class token, or the average where it pools by that."""
        last = tower.forward_intermediates(
            pixels, indices=1, intermediates_only=True, output_fmt="NLC", output_extra_tokens=True
        )
        whole, patches = last["image_intermediates_prefix"][0], last["image_intermediates"][0]
        if self.norm_in_trunk:
            patches = tower.ln_post(patches)
        if self.averages:
            whole = patches.mean(1, keepdim=True)
        return torch.cat([whole, self.cells(patches)], dim=1)

    def project(self, tower: nn.Module, tokens: Tensor) -> Tensor:
        """As in the base."""
        tokens = tokens if self.norm_in_trunk else tower.ln_post(tokens)
        return tokens if tower.proj is None else tokens @ tower.proj

    def norms(self, tower: nn.Module) -> list[nn.Module]:
        """As in the base."""
        return [block.ln_1 for block in tower.transformer.resblocks]


class TimmPictureTokens(PictureTokens):
    """A model of timm: each patch goes through its head as if it were the whole picture.

    Args:
        tower: open_clip's `TimmModel`; its convolutions are laid out with channels last.
        grid: see the base.

    Raises:
        ValueError: it pools behind the trunk.
    """

    tail = ("head",)

    def __init__(self, tower: nn.Module, grid: int | None) -> None:
        super().__init__(grid)
        if hasattr(tower.head, "pool"):
            raise ValueError("timm_pool of vision_cfg is one of open_clip's own, which fit whole pictures alone")
        classifier = tower.trunk.get_classifier()
        names = [name for name, module in tower.named_modules() if module is classifier]
        self.tail = ("head", *names)
        tower.to(memory_format=torch.channels_last)

    def trunk(self, tower: nn.Module, pixels: Tensor) -> Tensor:
        """As in the base; the first token is what the model pools."""
        model = tower.trunk
        features = model.forward_features(pixels.contiguous(memory_format=torch.channels_last))
        whole = model.forward_head(features, pre_logits=True)
        if features.ndim == 3:
            prefix = getattr(model, "num_prefix_tokens", 0)
            cells = self.cells(features[:, prefix:])
            alone = cells.flatten(0, 1)[:, None].expand(-1, 1 + prefix, -1)  # wherever the head looks, it is there
        else:
            cells = self.cells(as_map(features, model))
            alone = cells.flatten(0, 1)[:, :, None, None]
            alone = alone if as_map(alone, model) is alone else alone.permute(0, 2, 3, 1)
        patches = model.forward_head(alone, pre_logits=True).unflatten(0, cells.shape[:2])
        return torch.cat([whole[:, None], patches], dim=1)

    def project(self, tower: nn.Module, tokens: Tensor) -> Tensor:
        """As in the base."""
        return tower.head(tower.trunk.get_classifier()(tokens))

    def norms(self, tower: nn.Module) -> list[nn.Module]:
        """As in the base."""
        blocks = getattr(tower.trunk, "blocks", ())
        if not all(hasattr(block, "norm1") and hasattr(block, "attn") for block in blocks) or not len(blocks):
            raise ValueError(f"timm's {type(tower.trunk).__name__} has no blocks of attention in a row")
        return [block.norm1 for block in blocks]


class ResNetPictureTokens(PictureTokens):
    """CLIP's ResNet, which pools by attention: a patch is what it would give as the only one to attend to.

    Nothing lies behind its trunk.
    """

    def trunk(self, tower: nn.Module, pixels: Tensor) -> Tensor:
        """As in the base, in the width shared with text."""
        features = tower.stem(pixels)
        for layer in (tower.layer1, tower.layer2, tower.layer3, tower.layer4):
            features = layer(features)
        pool = tower.attnpool
        patches = pool.c_proj(pool.v_proj(self.cells(features)))
        return torch.cat([pool(features)[:, None], patches], dim=1)

    def project(self, tower: nn.Module, tokens: Tensor) -> Tensor:
        """Nothing is left to do."""
        return tokens


def picture_tokens(tower: nn.Module, grid: int | None) -> PictureTokens:
    """What fits a tower of open_clip. Raises ValueError where nothing does."""
    if hasattr(tower, "trunk"):
        return TimmPictureTokens(tower, grid)
    if hasattr(tower, "transformer"):
        return ClipPictureTokens(tower, grid)
    if hasattr(tower, "attnpool"):
        return ResNetPictureTokens(grid)
    raise ValueError(f"open_clip's {type(tower).__name__} gives no tokens of patches")
