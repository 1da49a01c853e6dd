"""What deletion and extraction ask of a model that writes behind a prefix: its lens, answers by token, and samples.

The model is a `CausalBackbone`, which writes behind ``prefix(batch)``, padded on the left. So the logits of
``backbone(batch, answer_ids(...))`` (R, T, V) are those of the answer tokens, and the last prompt position of every row
is the T-th from the end.

Legend: R rows, L text tokens, T answer tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fulgurite.backbones.base import FrozenBackbone
from fulgurite.backbones.generation import IGNORED, encoded_pictures, padded
from fulgurite.methods.random import uniform
from fulgurite.methods.structure import Tower
from fulgurite.samples import Batch, DataError

if TYPE_CHECKING:
    from fulgurite.backbones.causal import CausalBackbone

BEHIND_HEAD = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")  # of configurations
BEFORE = ":"  # what prompts end with


def decoder_tower(backbone: FrozenBackbone) -> Tower:
    """The one stack of blocks that writes.

    Raises:
        LookupError: the model writes by no such stack, or by one that reads the memory of an encoder.
    """
    found = [tower for tower in backbone.spec.towers if tower.name == "decoder" and tower.memory is None]
    if not found or found[0].final_norm is None or backbone.spec.head is None:
        raise LookupError(
            f"{type(backbone).__name__} is no decoder alone with a norm and an output layer behind it: its hidden "
            "states say nothing about words. Choose Llava or LlavaPort for model.init_args.backbone"
        )
    return found[0]


def decoder_blocks(backbone: FrozenBackbone) -> list[nn.Module]:
    """The blocks that write, in their order. Raises LookupError as `decoder_tower`."""
    return [backbone.get_submodule(name) for name in backbone.spec.block_names(backbone, decoder_tower(backbone).name)]


def lens_parts(backbone: FrozenBackbone) -> tuple[nn.Module, nn.Module]:
    """Final norm and output layer, by which the state of any block reads as words.

    Raises:
        LookupError: as `decoder_tower`; or the model changes its logits once more behind the output layer.
    """
    norm, head = decoder_tower(backbone).final_norm, backbone.spec.head
    settings = backbone.language.config.get_text_config()
    changed = [name for name in BEHIND_HEAD if getattr(settings, name, None) not in (None, 1, 1.0)]
    if changed:
        raise LookupError(
            f"{type(backbone).__name__}: its configuration has {', '.join(changed)}, by which logits are changed "
            "behind the output layer, so that hidden states do not read as words; choose another model"
        )
    return backbone.get_submodule(norm), backbone.get_submodule(head)


def with_features(backbone: CausalBackbone, batch: Batch) -> Batch:
    """The batch with features in the place of pixels, so that later passes do not encode its pictures again."""
    if "pixels" not in batch:
        return batch
    real = batch["picture"] >= 0
    features = encoded_pictures(backbone.encoder, backbone.visual, batch["pixels"], real)
    return {**{name: value for name, value in batch.items() if name != "pixels"}, "features": features}


def continuation_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text where it follows a prompt and a space, whichever token holds the space.

    Raises:
        DataError: the tokenizer joins a text with what is before it.
    """
    start = tokenizer(BEFORE, add_special_tokens=False)["input_ids"]
    rows = tokenizer([f"{BEFORE} {text.strip()}" for text in texts], add_special_tokens=False)["input_ids"]
    joined = next((text for text, ids in zip(texts, rows) if ids[: len(start)] != start), None)
    if joined is not None:
        raise DataError(f"the tokenizer has no tokens of {joined!r} apart from those of the prompt before it")
    return [ids[len(start) :] for ids in rows]


def answer_ids(backbone: CausalBackbone, texts: Sequence[str]) -> Tensor:
    """Labels (R, T) long of answers, without the token that ends a text, `IGNORED` behind the shorter ones.

    Raises:
        DataError: an answer has no tokens.
    """
    rows = continuation_ids(backbone.tokenizer, texts)
    empty = next((text for text, ids in zip(texts, rows) if not text.strip() or not ids), None)
    if empty is not None:
        raise DataError(f"the answer {empty!r} has no tokens: give every item an answer that can be written")
    return padded(rows, IGNORED)


class GumbelNoise:
    """Makes the likeliest token a sample: argmax of logits / temperature + Gumbel noise is distributed as softmax.

    Each row has a stream of noise of its own, 48 bits a number, so what is drawn for it does not depend on which other
    rows there are.

    Args:
        seeds: of the rows.
        temperature: above 0.
    """

    def __init__(self, seeds: Sequence[int], temperature: float) -> None:
        self.seeds, self.temperature = tuple(seeds), temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(R, V) noisy scores of the tokens that follow those already written, ``input_ids`` (R, t)."""
        step, size = input_ids.shape[1], scores.shape[1]
        noise = torch.stack([gumbel(seed, step, size) for seed in self.seeds])
        return scores / self.temperature + noise.to(scores)


def gumbel(seed: int, step: int, count: int) -> Tensor:
    """(count,) float64 noise of one step of a row."""
    high, low = uniform(seed, "sampling", 0, "", 2 * count, start=2 * count * step).double().view(2, count)
    return -(-(high + (low + 2**-25) * 2**-24).log()).log()


@torch.no_grad()
def sampled_ids(
    backbone: CausalBackbone, batch: Batch, seeds: Sequence[int], temperature: float = 1.0, max_new_tokens: int = 20
) -> Tensor:
    """Samples of what the model writes, (R, T) long, padded behind the end as in `generate_ids`.

    Args:
        backbone: itself.
        batch: of R rows.
        seeds: one per row; the same seed and row give the same text in whatever batch.
        temperature: of the softmax; 1 samples from the model's own distribution.
        max_new_tokens: tokens after which it stops.

    Raises:
        ValueError: not as many seeds as rows, or a temperature that is not above 0.
    """
    rows = len(batch["text"])
    if len(seeds) != rows:
        raise ValueError(f"{len(seeds)} seeds for {rows} rows: give one per row")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0; for the likeliest text use generate")
    noise = GumbelNoise(seeds, temperature)
    return backbone.continued(batch, max_new_tokens=max_new_tokens, logits_processor=[noise])
