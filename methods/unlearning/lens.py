"""The logit lens: what the model would say next if it stopped after a layer (nostalgebraist, 2020).

    P_l = softmax(W_U Norm_f(h_l))       l = 0 the embeddings, L the last block

States are taken where blocks put them out, before the final norm, so that the norm is applied exactly once to each of
them and P_L is the model's own distribution. The library's list of hidden states holds a normalised last entry; the
published attacks normalise that again, which ``double_norm`` repeats.

Legend: n rows, S layers, L blocks, T positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.methods.block_calls import Enough, first_tensor, hidden_of

FEW, MANY = 5, 32  # rows between which the output matrix is read fastest as the left factor of the product
PARTS = 4


def check_layers(layers: Sequence[int], num_blocks: int, option: str) -> None:
    """Raise ValueError where a layer is not between 0 (the embeddings) and the last block."""
    wrong = [layer for layer in layers if not 0 <= layer <= num_blocks]
    if wrong:
        raise ValueError(
            f"{option}={list(layers)}: there is no layer {', '.join(map(str, wrong))}; this model has 0 (the "
            f"embeddings) to {num_blocks} (its last block)"
        )


def layer_states(
    blocks: Sequence[nn.Module], layers: Sequence[int], positions: slice, run: Callable[[], Any], stop: bool = False
) -> tuple[dict[int, Tensor], Any]:
    """Hidden states of some layers in one forward pass, and what the pass returned.

    Args:
        blocks: in their order.
        layers: 0 for what enters the first block, l for what leaves block l.
        positions: of the sequence, e.g. ``slice(-1, None)``; others are not kept.
        run: the pass.
        stop: end it after the last of the layers; it then returned None.

    Returns:
        (n, T, D) by layer, T the number of positions.
    """
    found: dict[int, Tensor] = {}
    last = max(layers)

    def keep(layer: int, states: Tensor) -> None:
        if layer in found:
            raise ValueError(f"layer {layer} is passed twice by one batch, so it has no one state")
        found[layer] = states[:, positions]
        if stop and layer == last:
            raise Enough

    hooks = [
        blocks[layer - 1].register_forward_hook(
            lambda module, args, output, layer=layer: keep(layer, hidden_of(output, f"block {layer}"))
        )
        for layer in set(layers) - {0}
    ]
    if 0 in layers:
        hooks.append(
            blocks[0].register_forward_pre_hook(
                lambda module, args, kwargs: keep(0, first_tensor(args, kwargs)), with_kwargs=True
            )
        )
    result = None
    try:
        result = run()
    except Enough:
        if not stop:
            raise
    finally:
        for hook in hooks:
            hook.remove()
    missing = sorted(set(layers) - found.keys())
    if missing:
        raise ValueError(f"layers {missing} were not reached by the forward pass")
    return found, result


class LogitLens:
    """Reads hidden states as distributions over the vocabulary, in float32 whatever the model's type.

    Args:
        norm: the final norm.
        head: the output layer.
        num_blocks: L.
        double_norm: normalise the last layer twice, as the published attacks do.
    """

    def __init__(self, norm: nn.Module, head: nn.Module, num_blocks: int, double_norm: bool = False) -> None:
        self.norm, self.head, self.num_blocks, self.double_norm = norm, head, num_blocks, double_norm

    def logits(self, states: Mapping[int, Tensor]) -> Tensor:
        """(S, n, V) float32 of (n, D) states by layer, in the order of the mapping."""
        rows = [self._normed(layer, state) for layer, state in states.items()]
        logits = self._product(torch.cat(rows))
        return logits.float().unflatten(0, (len(rows), -1))

    def log_probabilities(self, states: Mapping[int, Tensor]) -> Tensor:
        """(S, n, V) float32, with gradients where the states have some."""
        return F.log_softmax(self.logits(states), dim=-1)

    @torch.no_grad()
    def probabilities(self, states: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """(n, V) float32 by layer. The output matrix is read once for all; nothing is held but the result."""
        logits = self.logits(states)
        # Each row is read before it is written, and is not needed afterwards.
        return dict(zip(states, torch.softmax(logits, dim=-1, out=logits)))

    def _normed(self, layer: int, state: Tensor) -> Tensor:
        state = self.norm(state)
        return self.norm(state) if self.double_norm and layer == self.num_blocks else state

    def _product(self, rows: Tensor) -> Tensor:
        plain = type(self.head) is nn.Linear and type(self.head.weight) is nn.Parameter and self.head.bias is None
        if not plain or not FEW <= len(rows) <= MANY or rows.is_cuda or torch.is_grad_enabled():
            return self.head(rows)
        # Part by part, since the product comes out the other way round and is copied.
        out = rows.new_empty(len(rows), len(self.head.weight))
        for part, place in zip(self.head.weight.chunk(PARTS), out.chunk(PARTS, dim=1)):
            place.copy_((part @ rows.t()).t())
        return out
