"""`nn.MultiheadAttention` with linear layers for its projections, which hooks and walks can see.

    with exposed_attention(model):
        for done in compressed_blocks(LayerWalk(model, ...), compressor):
            ...                                   # layers `<attention>.in_proj` and `<attention>.out_proj`
    tensor_name(model, "blocks.0.attn.in_proj")   # "blocks.0.attn.in_proj_weight", as in files

The attention of torch (so of open_clip and of `nn.TransformerEncoderLayer`) calls no module: it hands its weights to a
function. Here one that computes the same stands in its place, whose layers share its parameters.

B examples, S tokens, H heads, D width of a head, E = H D.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

IN_PROJ = "in_proj"
SETTINGS = ("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout", "batch_first", "add_zero_attn")


class ExposedAttention(nn.MultiheadAttention):
    """Self-attention over the parameters of another one.

        out_proj(concat_h softmax(q_h k_h^T / sqrt(D) + mask) v_h),    (q, k, v) = in_proj(x)

    Its `state_dict` has the names of the other one's.

    Args:
        attention: the other one; see `refusal` for those that are not served.
        name: of it, for errors.
    """

    def __init__(self, attention: nn.MultiheadAttention, name: str) -> None:
        nn.Module.__init__(self)
        for setting in SETTINGS:
            setattr(self, setting, getattr(attention, setting))
        self.name, self._qkv_same_embed_dim = name, True
        self.bias_k = self.bias_v = None
        width, has_bias = attention.embed_dim, attention.in_proj_bias is not None
        self.in_proj = nn.Linear(width, 3 * width, has_bias, device="meta")
        self.in_proj.weight = attention.in_proj_weight
        self.in_proj.bias = attention.in_proj_bias
        self.out_proj = attention.out_proj
        self.train(attention.training)
        self.register_state_dict_post_hook(original_names)

    @property
    def in_proj_weight(self) -> nn.Parameter:
        """Of queries, keys and values, (3 E, E)."""
        return self.in_proj.weight

    @property
    def in_proj_bias(self) -> nn.Parameter | None:
        """Of queries, keys and values, (3 E,)."""
        return self.in_proj.bias

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `nn.MultiheadAttention`.

        Raises:
            ValueError: queries, keys and values are not one tensor, or ``is_causal`` comes without its mask.
        """
        if query is not key or key is not value:
            raise ValueError(f"{self.name}: keys come from elsewhere than queries: leave this attention as it is")
        if is_causal and attn_mask is None:
            raise ValueError(f"{self.name}: is_causal is a hint about attn_mask, which is not given")
        x = query if query.dim() == 3 else query[None]
        swapped = query.dim() == 3 and not self.batch_first
        x = x.transpose(0, 1) if swapped else x  # rows of layers are in the order of masks (B, S)
        q, k, v = (
            self.in_proj(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        )  # (B, H, S, D)
        bias = None
        for mask in (attn_mask, key_padding_mask):
            if mask is not None:
                added = self._added(mask, mask is key_padding_mask, q)
                bias = added if bias is None else bias + added
        rate, weights = self.dropout if self.training else 0.0, None
        if need_weights:
            scores = q * self.head_dim**-0.5 @ k.mT
            weights = functional.dropout((scores if bias is None else scores + bias).softmax(-1), rate)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if query.dim() == 3 else weights[0]
        else:
            mixed = functional.scaled_dot_product_attention(q, k, v, bias, rate)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        output = output.transpose(0, 1) if swapped else output
        return (output if query.dim() == 3 else output[0]), weights

    def _added(self, mask: Tensor, of_keys: bool, q: Tensor) -> Tensor:
        """What a mask adds to the scores (B, H, S, S); True forbids."""
        if not mask.is_floating_point():
            mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(mask, -torch.inf)
        if of_keys:
            return mask.view(-1, 1, 1, mask.shape[-1])
        return mask.view(-1, self.num_heads, *mask.shape[1:]) if mask.dim() == 3 else mask


def original_names(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Mapping[str, Any]) -> None:
    """Rename the projection's tensors in a `state_dict` to what `nn.MultiheadAttention` calls them."""
    for part in ("weight", "bias"):
        if f"{prefix}{IN_PROJ}.{part}" in state:
            state[f"{prefix}{IN_PROJ}_{part}"] = state.pop(f"{prefix}{IN_PROJ}.{part}")


def refusal(attention: nn.MultiheadAttention) -> str | None:
    """Why an attention cannot be exposed; None where it can."""
    if type(attention) is not nn.MultiheadAttention:
        return f"is a {type(attention).__name__}, whose forward pass is not known here"
    if attention.in_proj_weight is None:
        return f"has separate projections of queries, keys and values (kdim={attention.kdim}, vdim={attention.vdim})"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "adds keys and values of its own (add_bias_kv, add_zero_attn)"
    if attention._forward_hooks or attention._forward_pre_hooks:
        return "has hooks, which would not run"
    return None


@contextmanager
def exposed_attention(model: nn.Module, pattern: str | None = None) -> Iterator[list[str]]:
    """Expose the projections of every `nn.MultiheadAttention` inside ``model``, and hide them again.

    Torch's fused kernels for whole attention layers, which would go around them, are off meanwhile.

    Args:
        model: changed while inside.
        pattern: full pattern of the names of attention modules; all where None.

    Yields:
        Names of the layers ``<attention>.in_proj``.

    Raises:
        ValueError: an attention that cannot be exposed, by name.
    """
    found = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.MultiheadAttention) and name and (pattern is None or re.fullmatch(pattern, name))
    ]
    for name, attention in found:
        if why := refusal(attention):
            raise ValueError(f"{name} {why}: leave it out of the attentions that are exposed")
    stand_ins: dict[nn.Module, ExposedAttention] = {}
    for name, attention in found:
        stand_ins.setdefault(attention, ExposedAttention(attention, name))
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled and not found)
    try:
        for name, attention in found:
            model.set_submodule(name, stand_ins[attention])
        yield [f"{name}.{IN_PROJ}" for name, _ in found]
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
        for name, attention in found:
            attention.train(stand_ins[attention].training)
            model.set_submodule(name, attention)


def tensor_name(model: nn.Module, layer: str) -> str:
    """Name of a linear layer's weight in the model's own `state_dict`, whether its attention is exposed or not."""
    parent, _, leaf = layer.rpartition(".")
    if leaf == IN_PROJ and isinstance(model.get_submodule(parent), nn.MultiheadAttention):
        return f"{parent}.{IN_PROJ}_weight"
    return f"{layer}.weight"
