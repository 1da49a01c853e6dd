"""The attention that a block pays to its own tokens, taken while it runs; see `attention_mass`.

Whatever the family of the model, queries and keys are those that its `scaled_dot_product_attention` is called with:
after rotary positions, with its mask, scale and groups of heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from fulgurite.methods.block_calls import HIDDEN
from fulgurite.methods.layer_walk import Block, watching
from fulgurite.methods.quantization.attention_mass import attention_mass


class AttentionCalls(TorchFunctionMode):
    """Adds up the attention mass of all calls that are made inside, but those that are to be passed over.

    Args:
        mask: (B, S), nonzero for real tokens.
    """

    def __init__(self, mask: Tensor | None) -> None:
        super().__init__()
        self.mask, self.mass, self.skipped = mask, None, False

    def skip(self) -> None:
        """Pass over the next call."""
        self.skipped = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at a call, and make it."""
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            if not self.skipped:
                self.take(*args, **kwargs)
            self.skipped = False
        return func(*args, **kwargs)

    def take(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        """Add the mass of one call."""
        if query.dim() != 4:
            raise ValueError(f"attention is given queries of {tuple(query.shape)}, expected (B, heads, tokens, width)")
        mask = None if self.mask is None else self.mask.to(query.device)
        mass = attention_mass(query, key, scale, mask, is_causal, attn_mask)
        self.mass = mass if self.mass is None else self.mass + mass


def attention_of(block: Block, masks: Sequence[Tensor | None], foreign: Sequence[str]) -> list[Tensor]:
    """(B, S) the attention that the tokens of every batch receive from each other in a block.

    Args:
        block: of the walk.
        masks: (B, S) of every batch, nonzero for real tokens; None without padding.
        foreign: layers that read other tokens; the attention that follows them is paid to those.

    Raises:
        ValueError: the block makes no call of `scaled_dot_product_attention`, or one that is not over its tokens.
    """
    layers = {name: block.walk.model.get_submodule(name) for name in foreign}
    outputs, found = block.outputs(), []
    for x, mask in zip(block.inputs, masks):
        calls = AttentionCalls(mask)
        with watching(layers, lambda *_, calls=calls: calls.skip()), calls:
            next(outputs)
        if calls.mass is None:
            raise ValueError(
                "it never calls torch.nn.functional.scaled_dot_product_attention on its own tokens: load the model "
                "with attn_implementation='sdpa', or choose another kind of token importance than 'attention'"
            )
        if calls.mass.numel() * x.shape[-1] != x.numel():
            raise ValueError(f"attention over {tuple(calls.mass.shape)} tokens, but hidden states {tuple(x.shape)}")
        found.append(calls.mass.to(x.device))
    return found


def readers(block: Block) -> tuple[list[str], list[str]]:
    """The layers that read the block's own tokens, and those that read another tower's, by the first batch."""
    layers, foreign, others = block.linears(), [], set()

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = block.calls[0]
        given = [*zip(call.args, args), *((call.kwargs[name], value) for name, value in kwargs.items())]
        for stored, value in given:
            if stored is not HIDDEN:
                others.update(tensor.data_ptr() for tensor in floats_in(value))

    def note(name: str, x: Tensor) -> None:
        if x.data_ptr() in others:
            foreign.append(name)

    hook = block.module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with watching(layers, note):
            next(block.outputs(), None)
    finally:
        hook.remove()
    return [name for name in layers if name not in foreign], foreign


def floats_in(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in a tree of tuples, lists and dicts."""
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from floats_in(item)
