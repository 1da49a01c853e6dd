"""The interface between a frozen pretrained model and what is trained beside it."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from fulgurite.backbones.parts import Part
from fulgurite.methods.recomputation import recompute as recompute_in
from fulgurite.methods.structure import ModelSpec
from fulgurite.samples import Batch, Collator

StateDict = dict[str, Tensor]


@dataclass
class QAOutput:
    """Result of one forward pass of a video question answering backbone.

    Args:
        logits: (B, A) scores of the answers given to `VideoQABackbone.set_answers`.
        routing: parts of the routing feature, each (B, N_i), from the same pass.
    """

    logits: Tensor
    routing: tuple[Tensor, ...]


class FrozenBackbone(nn.Module, ABC):
    """A frozen pretrained model, whatever its task.

    A subclass fills `spec` and `source`, the name or path of its pretrained weights, in its constructor and calls
    `freeze` last. Parameter names are those of the pretrained
    model and never change: adapters attach through hooks.

    Attributes:
        derived: names of the buffers that are computed from the weights, and so change with them.
        never_tuned: patterns of parameters that full fine-tuning leaves frozen.
        called_apart: names of modules inside blocks that are also called outside of these.

    Args:
        train_dropout: ``"official"`` keeps the pretrained model's dropout active while training, as the
            published code does; ``"off"`` runs it in evaluation mode always.
        recompute: while training keep only what goes into each block, and compute what is inside again in the backward
            pass: less memory for one more forward pass, and the same numbers.
    """

    spec: ModelSpec
    source: str
    derived: tuple[str, ...] = ()
    never_tuned: tuple[str, ...] = ()
    called_apart: tuple[str, ...] = ()

    def __init__(self, train_dropout: Literal["official", "off"] = "off", recompute: bool = False) -> None:
        super().__init__()
        self.train_dropout, self.recompute = train_dropout, recompute

    def freeze(self) -> None:
        """No gradients anywhere, evaluation mode; and the blocks of `spec` recompute, if they are to."""
        self.requires_grad_(False)
        self.train(False)
        if self.recompute:
            recompute_in(map(self.get_submodule, self.spec.all_block_names(self)))

    def unfreeze(self, never: Sequence[str] | None = None) -> None:
        """Let everything train but the parameters whose names a pattern of ``never`` matches in full.

        Args:
            never: None takes `never_tuned`.

        Raises:
            LookupError: a pattern matches no parameter.
        """
        patterns, found = self.never_tuned if never is None else never, set()
        for name, parameter in self.named_parameters():
            matching = {pattern for pattern in patterns if re.fullmatch(pattern, name)}
            found |= matching
            parameter.requires_grad_(not matching)
        unused = [pattern for pattern in patterns if pattern not in found]
        if unused:
            raise LookupError(f"model.init_args.frozen: {unused} match no parameter of the backbone")

    def train(self, mode: bool = True) -> FrozenBackbone:
        """Switch dropout on only where ``train_dropout`` asks for it."""
        return super().train(mode and self.train_dropout == "official")

    @abstractmethod
    def collator(self, stage: str) -> Collator:
        """A collator that makes this backbone's batches; ``stage`` is Lightning's (fit, validate, test, predict)."""

    def refresh(self) -> None:
        """Compute anew what is derived from the weights, after they have changed; nothing unless a subclass does."""
        return

    def feature_extractor(self) -> Any:
        """What a feature cache computes per video for this backbone (``encoder``, ``sampling``); None for nothing."""
        return None

    def initial_adapters(self) -> Mapping[str, StateDict] | None:
        """Adapters that came with the pretrained weights, by site; None where there are none."""
        return None

    def parts(self) -> tuple[Part, ...]:
        """Models of other libraries inside this backbone, which can be exported; none unless a subclass says so."""
        return ()

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Digest of the frozen weights, recorded in every checkpoint that stands on them."""


class VideoQABackbone(FrozenBackbone):
    """A frozen video-language model that scores a fixed list of answers."""

    answers: tuple[str, ...] = ()

    @abstractmethod
    def set_answers(self, answers: Sequence[str]) -> None:
        """Build the frozen embeddings of the answer vocabulary. Its order is the order of the logits."""

    def refresh(self) -> None:
        """Embed the answers anew; no adapters may be active."""
        if self.answers:
            self.set_answers(self.answers)

    @abstractmethod
    def forward(self, batch: Batch) -> QAOutput:
        """Score the answers for one batch with whatever adapters are attached."""

    def pass_blocks(self, batch: Batch) -> None:
        """Run every block of the towers on a batch, each of them once; all of the model unless a subclass does less."""
        self(batch)

    @abstractmethod
    def token_masks(self, batch: Batch) -> dict[str, Tensor]:
        """By full patterns of names of linear layers, (B, S), nonzero for the real ones of S tokens in their inputs.

        Layers that no pattern names see no padding.
        """

    @property
    @abstractmethod
    def routing_widths(self) -> tuple[int, ...]:
        """Widths N_i of the parts of the routing feature."""


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``x`` (B, S, D) over the positions where ``mask`` (B, S) is True. Returns (B, D)."""
    weight = mask.unsqueeze(-1).to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)
