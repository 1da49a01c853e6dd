"""Side blocks of timm's vision transformers.

Legend: B batch, S positions, D width, r reduction.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from fulgurite.backbones.side_calls import arguments, divided, whole_norm
from fulgurite.methods.adapters.ladder_selection import Norm, Part, Together
from fulgurite.methods.adapters.ladder_stack import SideCall


class TimmBlocks:
    """Pre-norm blocks with one layer for queries, keys and values; their sizes are read off the block itself.

    Raises:
        ValueError: a block that is built differently.
    """

    dropout = 0.0

    def __init__(self, block: nn.Module) -> None:
        attention, mlp = block.attn, block.mlp
        plain = isinstance(getattr(attention, "qkv", None), nn.Linear) and isinstance(
            getattr(mlp, "fc2", None), nn.Linear
        )
        # Everything else in them must be what `make` builds again.
        if not plain or any(
            n not in KNOWN for n, m in block.named_modules() if n and list(m.parameters(recurse=False))
        ):
            raise ValueError("a side block is defined for timm's plain attention block, with attn.qkv and mlp.fc1, fc2")
        self.kind, self.width, self.hidden = type(block), attention.qkv.in_features, mlp.fc2.in_features
        self.heads, self.norm_kind, self.eps = attention.num_heads, type(block.norm1), block.norm1.eps
        self.options = {
            "qkv_bias": attention.qkv.bias is not None,
            "proj_bias": attention.proj.bias is not None,
            "init_values": getattr(block.ls1, "init_values", None),
            "act_layer": type(mlp.act),
            "norm_layer": partial(self.norm_kind, eps=self.eps),
        }
        self.parts: list[Part] = [
            whole_norm("norm1"),
            Together(("attn.qkv",), heads=self.heads, fused=3),
            Together(("attn.proj",), writes=True),
            Norm(("ls1.gamma",)),
            whole_norm("norm2"),
            Together(("mlp.fc1",)),
            Together(("mlp.fc2",), writes=True),
            Norm(("ls2.gamma",)),
        ]

    def make(self, number: int, cache_index: int, reduction: int, first: bool) -> nn.Module:
        """As `SideBlocks.make`.

        Raises:
            ValueError: the width of a head or the hidden width is no multiple of the reduction.
        """
        width = divided(f"width / {self.heads} heads", self.width // self.heads, reduction) * self.heads
        hidden = divided("the hidden width", self.hidden, reduction)
        # timm takes the integer part of width * ratio.
        return self.kind(width, self.heads, mlp_ratio=(hidden + 0.5) / width, **self.options)

    def norm(self, reduction: int) -> nn.Module:
        """As `SideBlocks.norm`."""
        return self.norm_kind(self.width // reduction, eps=self.eps)

    def run(self, side: nn.Module, state: Tensor, call: SideCall) -> Tensor:
        """As `SideBlocks.run`."""
        return side(**{**arguments(self.kind, call), "x": state})


KNOWN = {"norm1", "attn.qkv", "attn.proj", "ls1", "norm2", "mlp.fc1", "mlp.fc2", "ls2"}
