"""Frames of a video related to each other before they are pooled: seqTransf of CLIP4Clip (arXiv 2104.08860).

    z = x + positions[:F];   z = z + attention(LN_1(z));   z = z + W_2 quickgelu(W_1 LN_2(z)), every block;   y = z + x

Missing frames are never attended to. The blocks start as the first ones of CLIP's tower for text.

Legend: V videos, F frames, D width, H attention heads.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fulgurite.methods.retrieval.head import TowerFacts

EPSILON = 1e-12  # of the published layer norm, which is not CLIP's
UNSEEN = -1e6  # added to the attention to a missing frame
_TEXT_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        return x * torch.sigmoid(1.702 * x)


class TemporalBlock(nn.Module):
    """A block of CLIP, its norms first; parameters are named as in CLIP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=EPSILON)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width, eps=EPSILON)
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": QuickGELU(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, unseen: Tensor) -> Tensor:
        """(V, F, D); ``unseen`` (V, F) is added to the attention to every frame."""
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, key_padding_mask=unseen, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class TemporalEncoder(nn.Module):
    """What a video's frames say in the light of each other.

    Args:
        width: D.
        heads: H.
        layers: blocks.
        positions: most frames of a video.
    """

    def __init__(self, width: int, heads: int, layers: int = 4, positions: int = 12) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(positions, width))
        self.blocks = nn.ModuleList(TemporalBlock(width, heads) for _ in range(layers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """CLIP's own random start; biases of the two linear layers are those of `torch.nn.Linear`, as there."""
        width, layers = self.positions.shape[1], len(self.blocks)
        into_sum = width**-0.5 * (2 * layers) ** -0.5
        nn.init.normal_(self.positions, std=0.01)
        for block in self.blocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=into_sum)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=into_sum)

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        """Relate the frames of each video.

        Args:
            frames: (V, F, D).
            mask: (V, F) True for frames that the video has.

        Returns:
            (V, F, D); what stands for missing frames means nothing.

        Raises:
            ValueError: there are more frames than positions.
        """
        count = frames.shape[1]
        if count > len(self.positions):
            raise ValueError(
                f"a video of {count} frames: the temporal encoder has {len(self.positions)} positions; "
                f"take fewer frames, or set temporal: mean"
            )
        related = frames + self.positions[:count]
        unseen = torch.zeros(mask.shape, dtype=frames.dtype, device=frames.device).masked_fill(~mask, UNSEEN)
        for block in self.blocks:
            related = block(related, unseen)
        return related + frames


def encoder_from_text(towers: TowerFacts, layers: int, max_frames: int) -> TemporalEncoder:
    """A temporal encoder that starts as the first blocks and the positions of the tower for text.

    Where `TowerFacts.text_blocks` is empty it starts at random (`TemporalEncoder.reset_parameters`), with
    ``max_frames`` positions.

    Raises:
        ValueError: the tower has fewer positions or blocks, or they are not CLIP's; all that does not fit is listed.
    """
    if not towers.text_blocks:
        return TemporalEncoder(towers.width, towers.heads, layers, max_frames)
    start = _renamed(towers.text_blocks, layers)
    found = {int(name.split(".")[1]) for name in start if name.startswith("blocks.")}
    if len(found) < layers:
        raise ValueError(
            f"temporal_layers={layers}, and the tower for text has {len(found)} blocks to start from: set "
            f"temporal_layers to at most that"
        )
    if max_frames > len(start["positions"]):
        raise ValueError(
            f"max_frames={max_frames}, and the tower for text has {len(start['positions'])} positions to start from: "
            f"set max_frames to at most that, or temporal: mean"
        )
    encoder = TemporalEncoder(towers.width, towers.heads, layers, len(start["positions"]))
    own = encoder.state_dict()
    wrong = [name for name in own.keys() | start.keys() if _shape(own, name) != _shape(start, name)]
    if wrong:
        listed = ", ".join(f"{name} {_shape(start, name)} for {_shape(own, name)}" for name in sorted(wrong))
        raise ValueError(f"the tower for text is not built of CLIP's blocks: {listed}; set temporal: mean")
    encoder.load_state_dict(start)
    return encoder


def _renamed(text_blocks: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The tensors of the first ``layers`` blocks, and the positions, under the names of a `TemporalEncoder`."""
    renamed = {"positions": text_blocks["positional_embedding"]}
    for name, tensor in text_blocks.items():
        match = _TEXT_BLOCK.fullmatch(name)
        if match and int(match[1]) < layers:
            renamed[f"blocks.{match[1]}.{match[2]}"] = tensor
    return renamed


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None
