"""Two versions of a change sent through the rest of a chain of blocks together, as one batch of twice the size.

A block of the chain is given the hidden states of the one before. What it is given besides is taken from a record of
the unchanged model; whether that was right is seen when the model runs on what was found here (`Replay.without` with
``ahead``): a block that is then asked anything else is simply computed.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fulgurite.methods.block_calls import hidden_of, mapped
from fulgurite.methods.replay import Asked, Replay, tensors_of

log = logging.getLogger(__name__)


class Chain:
    """Blocks that can be run on two versions of their input at once.

    Tried out on the recorded inputs: a block is in the chain if it gives the same for them where the batch has twice
    the size, whatever else is in it.

    Args:
        replay: in which the blocks are recorded.
        names: blocks of a tower in order.
    """

    def __init__(self, replay: Replay, names: Sequence[str]) -> None:
        self.replay, self.next = replay, {}
        for before, name in itertools.pairwise(names):
            if self._doubles(before, name):
                self.next[before] = name
            else:
                log.info("%s runs for each sign alone: in a batch of twice the size it does not give the same", name)

    @torch.no_grad()
    def ahead(self, name: str, outputs: tuple[Any, Any]) -> tuple[dict[str, Asked], dict[str, Asked]]:
        """What the blocks after ``name`` will be asked and answer, for both versions of its output; itself first."""
        clean = self.replay.asked[name][0]
        found = tuple({name: Asked.of(clean.arguments, output)} for output in outputs)
        while name in self.next:
            before, name = name, self.next[name]
            outputs, calls = self._run(before, name, outputs)
            for known, arguments, output in zip(found, calls, outputs):
                known[name] = Asked.of(arguments, output)
        return found

    def _run(self, before: str, name: str, outputs: tuple[Any, Any]) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """Outputs of a block for both outputs of the one before, and what it was given in each."""
        clean = hidden_of(self.replay.asked[before][0].output, before)
        pair = tuple(hidden_of(output, before) for output in outputs)
        arguments, rows = self.replay.asked[name][0].arguments, len(clean)
        twice = mapped(arguments, lambda each: torch.cat(pair) if each is clean else doubled(each, rows))
        output = self.replay.parts[name](*twice[0], **twice[1])
        halves = tuple(mapped(output, lambda each, half=half: halved(each, rows, half)) for half in (0, 1))
        given = tuple(mapped(arguments, lambda each, one=one: one if each is clean else each) for one in pair)
        return halves, given

    @torch.no_grad()
    def _doubles(self, before: str, name: str) -> bool:
        """Whether a block follows another, and gives twice the same for twice the batch."""
        asked = [self.replay.asked[each] for each in (before, name)]
        if any(len(calls) != 1 or not plain(calls[0].output) or not calls[0].holds() for calls in asked):
            return False
        clean, known = (hidden_of(calls[0].output, before) for calls in asked)
        if sum(each is clean for each in tensors_of(asked[1][0].arguments)) != 1 or len(known) != len(clean):
            return False
        # The other half differs, so that a block which mixes examples shows it.
        other = mapped(asked[0][0].output, lambda each: 1.5 * each if each is clean else each)
        try:
            (output, _), _ = self._run(before, name, (asked[0][0].output, other))
        except RuntimeError:  # shapes that do not fit any more
            return False
        near = 0.25 * torch.finfo(known.dtype).eps ** 0.5 * known.abs().max().item()
        return torch.allclose(hidden_of(output, name), known, rtol=0, atol=near)


def plain(value: Any) -> bool:
    """Whether a block's output is a tensor, or plain tuples, lists and dicts of them."""
    if type(value) in (tuple, list):
        return all(map(plain, value))
    if type(value) is dict:
        return all(map(plain, value.values()))
    return value is None or isinstance(value, Tensor)


def doubled(tensor: Tensor, rows: int) -> Tensor:
    """Twice a tensor that has a row for each of ``rows`` examples; any other as it is."""
    return torch.cat([tensor, tensor]) if tensor.dim() > 1 and len(tensor) == rows else tensor


def halved(tensor: Tensor, rows: int, half: int) -> Tensor:
    """One half of a tensor that has a row for each of twice ``rows`` examples; any other as it is."""
    return tensor.chunk(2)[half] if tensor.dim() > 1 and len(tensor) == 2 * rows else tensor
