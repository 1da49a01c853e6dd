"""LLaVA in the layout that transformers writes: vision tower, projector of two layers, Llama or Vicuna.

    prefix = [E(text before) ; projector(tower(picture)) ; E(text behind)]     padded on the left

The picture's states stand where the template has ``<image>``. Names of tensors are those of transformers, so the layer
that UnLOK-VQA edits is ``language\\.model\\.language_model\\.layers\\.7\\.mlp\\.down_proj``.
Sources: Liu et al., arXiv 2304.08485 and 2310.03744; the question's line is that of UnLOK-VQA (arXiv 2505.01456).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fulgurite.backbones.causal import CausalBackbone, check_template
from fulgurite.backbones.generation_collator import GenerationCollator, VisualInput
from fulgurite.backbones.llava_pictures import TowerFeatures
from fulgurite.backbones.sources import resolve_source

MARK = "<image>"
PROJECTOR = "language.model.multi_modal_projector"
TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: <image>\n{} ASSISTANT:"
)
INSTRUCTION = "Answer the question in one word\n Question: {} Answer:"


class LlavaPort(CausalBackbone):
    """A model that ``LlavaForConditionalGeneration.from_pretrained`` reads, with its own tokenizer and image processor.

    Full fine-tuning leaves the vision tower frozen, as the published model does. Frames of a video and several pictures
    stand one after the other in the one place.

    Args:
        model: folder, hub name or ``package:NAME/path``.
        pretrained: False gives random weights of ``config``.
        config: with ``pretrained: false``, fields of ``LlavaConfig`` (``text_config``, ``vision_config``, ...).
        tokenizer: where the tokenizer is, if not with ``model``; one without ``<image>`` gets it as its last token.
        num_frames: frames that are read of a video.
        template: text around the instruction, which takes the place of ``{}``, with one ``<image>``.
        instruction: text around the question, which takes the place of ``{}``; a plain ``{}`` leaves it as it is.
        max_tokens: longest text in tokens, without the picture's; a longer one is an error.
        dtype: of the weights.
        init_seed: seed of the weights with ``pretrained: false``.
        checkpoint: run or checkpoint folder that trained this backbone itself; its weights take the place of all.
        train_dropout: see `FrozenBackbone`.
        recompute: see `FrozenBackbone`.

    Raises:
        ValueError: options that exclude each other, or a template without a place.
        CheckpointError: ``checkpoint`` is none, is damaged, or is of another model; see `fill_from_run`.
    """

    never_tuned = (r"language\.model\.vision_tower\..*",)

    def __init__(
        self,
        model: str = "llava-hf/llava-1.5-7b-hf",
        pretrained: bool = True,
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        num_frames: int = 4,
        template: str = TEMPLATE,
        instruction: str = INSTRUCTION,
        max_tokens: int = 256,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        init_seed: int = 0,
        checkpoint: Path | None = None,
        train_dropout: Literal["official", "off"] = "off",
        recompute: bool = False,
    ) -> None:
        super().__init__(train_dropout, recompute)
        from transformers import AutoImageProcessor, CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration

        if pretrained and config:
            raise ValueError("config changes the model's shape: set pretrained: false with it")
        unknown = sorted(set(config or {}) - LlavaConfig().to_dict().keys())
        if unknown:
            raise ValueError(
                f"config: {unknown} are no fields of LlavaConfig; those of its parts go below text_config and "
                "vision_config, as in configs/tiny/llava_port.yaml"
            )
        check_template(template, "template", meaning="where the instruction goes")
        check_template(template, "template", MARK, "where the picture goes")
        check_template(instruction, "instruction")
        self.tokenizer_source = model if tokenizer is None else tokenizer
        self.template, self.max_tokens = template.replace("{}", instruction), max_tokens
        numbers = getattr(torch, dtype)
        if pretrained:
            source = resolve_source(model)
            self.language = LlavaForConditionalGeneration.from_pretrained(source, dtype=numbers)
            processor = AutoImageProcessor.from_pretrained(source)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(init_seed)
                self.language = LlavaForConditionalGeneration(LlavaConfig(**(config or {}))).to(numbers)
            side = self.language.config.vision_config.image_size
            processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        settings = self.language.config
        self.language.eval()
        self.encoder = TowerFeatures(
            self.language.model.vision_tower,
            processor,
            settings.vision_feature_layer,
            settings.vision_feature_select_strategy,
        )
        self.visual = VisualInput.of(self.encoder, None, num_frames)
        self.complete(model, checkpoint, PROJECTOR)

    @property
    def picture_token(self) -> int:
        """The id that stands for a picture."""
        return self.language.config.image_token_id

    def fitted(self, tokenizer: Any) -> Any:
        """With ``<image>``. Raises ValueError where the model has another number for that."""
        if MARK not in tokenizer.get_vocab():
            tokenizer.add_tokens([MARK], special_tokens=True)
        found = tokenizer.convert_tokens_to_ids(MARK)
        if found != self.picture_token:
            raise ValueError(
                f"the tokenizer of {self.tokenizer_source} has {MARK} as {found}, the model as {self.picture_token}: "
                "choose the model's own tokenizer, or set config.image_token_index"
            )
        return tokenizer

    def collator(self, stage: str) -> GenerationCollator:
        """The same batches in every stage."""
        return GenerationCollator(
            self.tokenizer, self.visual, self.max_tokens, "error", self.template, orders=None, reserved=MARK
        )

    def projected(self, features: Tensor) -> Tensor:
        """As in the base."""
        return self.language.model.multi_modal_projector(features)

    def place_of_pictures(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """As in the base: where the template has its mark."""
        marks = text == self.picture_token
        return marks.long().argmax(dim=1, keepdim=True), ~marks
