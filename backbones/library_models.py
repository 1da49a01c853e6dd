"""A library's model out of its files, with what compression asks of it: where its blocks are, and how data run in it.

B windows or pictures, S tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fulgurite.backbones.dual_encoders import (
    caption_inputs,
    is_dual_encoder,
    masks_of_captions,
    pair_loss,
    tokenizer_of,
)
from fulgurite.backbones.foreign_models import CONFIG, OPEN_CLIP_CONFIG, QUANTIZED, library_of, model_of, read_config
from fulgurite.backbones.specs import spec_of
from fulgurite.checkpoints import MissingError, RefusedError
from fulgurite.checkpoints.sources import Source
from fulgurite.checkpoints.tensorfile import map_file
from fulgurite.methods.quantization.rotation_record import ROTATION
from fulgurite.methods.quantization.storage import COMPRESSED, masks_of
from fulgurite.methods.structure import ModelSpec

if TYPE_CHECKING:
    from PIL.Image import Image

PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # of an image processor alone, of a whole processor
COUNT_FROM_PADDING = ("roberta", "xlm-roberta")  # whose first position is the one behind that of padding
MASKS = "masks.safetensors"  # of a pruned model, beside weights that its library reads


@dataclass
class LibraryModel:
    """One model, in evaluation mode.

    Args:
        library: ``hf``, ``timm`` or ``open_clip``.
        model: itself.
        spec: where its blocks are.
        folder: with its configuration, tokenizer and processor.
        masks: (out, in) bool, by name of the tensor, of what was pruned before.
        pruned: facts of those tensors, as `methods.quantization.storage` has them.
    """

    library: str
    model: Any
    spec: ModelSpec
    folder: Path
    masks: dict[str, Tensor]
    pruned: dict[str, dict] = field(default_factory=dict)

    @property
    def configuration(self) -> dict[str, Any]:
        """What its library builds it by."""
        return read_config(self.folder / (OPEN_CLIP_CONFIG if self.library == "open_clip" else CONFIG))

    @property
    def reads(self) -> str:
        """What it is measured on: ``text`` or ``pictures``; of models of both, the tower for pictures."""
        arguments = inspect.signature(self.model.forward).parameters
        return "text" if self.library == "hf" and "pixel_values" not in arguments else "pictures"

    @property
    def is_language_model(self) -> bool:
        """Whether it reads text and gives logits of what comes next."""
        return self.reads == "text" and self.model.can_generate()

    @property
    def reads_pairs(self) -> bool:
        """Whether it has a tower for pictures and one for captions, and so a loss of pairs."""
        return is_dual_encoder(self.spec)

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text by the folder's own tokenizer.

        Raises:
            MissingError: it has none.
        """
        return list(tokenizer_of(self.folder)(text, verbose=False)["input_ids"])

    @property
    def longest(self) -> int | None:
        """Tokens that a window may have; None where the configuration names no limit."""
        config = self.model.config
        limit = getattr(config, "max_position_embeddings", None)
        return limit - config.pad_token_id - 1 if config.model_type in COUNT_FROM_PADDING else limit

    def text_inputs(self, windows: Tensor) -> dict[str, Tensor]:
        """Arguments of a forward pass on windows (B, S).

        Of a sequence-to-sequence model the first half of a window is read and the second one answered.
        """
        if not getattr(self.model.config, "is_encoder_decoder", False):
            return {"input_ids": windows}
        half = windows.shape[1] // 2
        return {"input_ids": windows[:, :half], "labels": windows[:, half:].contiguous()}

    def picture_inputs(self, pictures: Sequence[Image]) -> dict[str, Tensor]:
        """Arguments of a forward pass on pictures, prepared as the model's own files say.

        Raises:
            MissingError: they do not say it.
        """
        if self.library == "timm":
            from timm.data import create_transform, resolve_model_data_config

            prepare = create_transform(**resolve_model_data_config(self.model), is_training=False)
            return {"x": torch.stack([prepare(picture) for picture in pictures])}
        if self.library == "open_clip":
            from open_clip.transform import PreprocessCfg, image_transform_v2

            prepare = image_transform_v2(PreprocessCfg(**self.model.visual.preprocess_cfg), is_train=False)
            return {"image": torch.stack([prepare(picture) for picture in pictures])}
        from transformers import AutoImageProcessor

        if not any((self.folder / name).is_file() for name in PROCESSORS):
            raise MissingError(f"{self.folder} has no {' or '.join(PROCESSORS)}, which says how pictures are prepared")
        prepare = AutoImageProcessor.from_pretrained(self.folder)
        return {"pixel_values": prepare(images=list(pictures), return_tensors="pt")["pixel_values"]}

    def pair_inputs(self, pictures: Sequence[Image], captions: Mapping[str, str]) -> dict[str, Tensor]:
        """Arguments of a forward pass on pictures and, by where each stands, their captions; see `caption_inputs`.

        Raises:
            MissingError: the model's files do not say how they are prepared.
            DataError: a caption is too long.
        """
        return self.picture_inputs(pictures) | caption_inputs(self.library, self.model, self.folder, captions)

    def token_masks(self, inputs: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """(B, S) nonzero for the tokens of captions that count, for those of the layers ``names`` that see captions."""
        if not is_pairs(inputs):
            return {}
        return masks_of_captions(self.library, self.model, self.spec, inputs, names)

    def given(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs on the model's device."""
        device = next(self.model.parameters()).device
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    def forward(self, inputs: Mapping[str, Tensor]) -> Any:
        """What the model gives, on its own device, without a cache; without captions, of its tower for pictures."""
        given = self.given(inputs)
        if self.library == "open_clip":
            return self.model(**given) if is_pairs(given) else self.model.encode_image(given["image"])
        if "pixel_values" in given and not is_pairs(given) and hasattr(self.model, "get_image_features"):
            return self.model.get_image_features(**given)
        cache = {"use_cache": False} if self.is_language_model else {}
        return self.model(**given, **cache)

    def scored(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) of `text_inputs`, and the tokens (B, T) that they should have predicted."""
        logits = self.forward(inputs).logits
        if "labels" in inputs:
            return logits, inputs["labels"].to(logits.device)
        return logits[:, :-1], inputs["input_ids"][:, 1:].to(logits.device)

    def loss(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Mean negative log-likelihood of a token of `text_inputs`; the `pair_loss` of `pair_inputs`."""
        if is_pairs(inputs):
            return pair_loss(self.library, self.model, self.given(inputs))
        logits, targets = self.scored(inputs)
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def state(self) -> dict[str, Tensor]:
        """Its tensors on the CPU, one that is tied under its first name alone."""
        own = {name: tensor.cpu() for name, tensor in self.model.state_dict().items()}
        if self.library != "hf":
            return own
        first = {name for name, _ in self.model.named_parameters()}
        tied = {name for name, _ in self.model.named_parameters(remove_duplicate=False)} - first
        return {name: tensor for name, tensor in own.items() if name not in tied}


def is_pairs(inputs: Mapping[str, Tensor]) -> bool:
    """Whether they hold captions beside pictures."""
    return {"pixel_values", "input_ids"} <= inputs.keys() or {"image", "text"} <= inputs.keys()


def open_library_model(source: Source, like: Path | None = None) -> LibraryModel:
    """The model of a folder, or of a file with ``like``, the folder of its configuration.

    Raises:
        RefusedError: it is quantized or rotated already.
        MissingError: nothing says how it is built.
        ValueError: nothing is known of its structure.
    """
    folder = like or source.path
    library = library_of(folder) if folder.is_dir() else None
    if library is None:
        raise MissingError(
            f"{folder}: no config.json or open_clip_config.json of a known library lies there: name a model folder, or "
            "give --like FOLDER, which holds the configuration"
        )
    facts = {} if source.manifest is None else source.manifest.facts.get(COMPRESSED, {})
    config = read_config(folder / CONFIG) if library == "hf" else {}
    if QUANTIZED in config or any(about["bits"] is not None for about in facts.values()):
        raise RefusedError(f"{source.path} is quantized already: take the model that it was made from")
    if source.manifest is not None and ROTATION in source.manifest.facts:
        raise RefusedError(f"{source.path} is rotated already: take the model that it was made from")
    model = model_of(library, source.tensors, folder, None)
    masks = masks_of(map_file(source.path / MASKS), facts) if facts else {}
    return LibraryModel(library, model, spec_of(model), folder, masks, facts)


def other_linears(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """Names of the linear layers that are none of ``layers``."""
    chosen = set(layers)
    return [n for n, module in model.named_modules() if isinstance(module, nn.Linear) and n not in chosen]
