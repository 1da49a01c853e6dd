"""Models with a tower for pictures and one for text that do not read each other: captions, and the loss of pairs.

Those of transformers are CLIP and SigLIP, of open_clip all that have a spec. Captions are padded to the model's context
length. open_clip's tokenizers cut longer ones; those of transformers do not, so longer ones are refused.

B pairs, S tokens, the context length.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fulgurite.checkpoints import MissingError
from fulgurite.methods.contrastive import sigmoid_loss, softmax_loss
from fulgurite.methods.structure import ModelSpec
from fulgurite.samples.errors import DataError

TOWERS = {"vision", "text"}
READ_PADDING = ("siglip",)  # whose towers for text were trained without a mask, whatever their tokenizers give
VOCABULARY = re.compile(r"tokenizer\.json|vocab\.(json|txt)|.*\.(model|tiktoken)")


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of transformers in a folder.

    Raises:
        MissingError: there is none.
    """
    from transformers import AutoTokenizer

    # Without a file transformers makes a tokenizer that knows no word.
    if not any(VOCABULARY.fullmatch(path.name) for path in folder.iterdir()):
        raise MissingError(f"{folder} has no tokenizer: name a folder with one by --like")
    return AutoTokenizer.from_pretrained(folder)


def is_dual_encoder(spec: ModelSpec) -> bool:
    """Whether both towers are there."""
    return {tower.name for tower in spec.towers} == TOWERS and not any(tower.memory for tower in spec.towers)


def caption_inputs(library: str, model: Any, folder: Path, captions: Mapping[str, str]) -> dict[str, Tensor]:
    """(B, S) arguments of a forward pass on captions, by the model's own tokenizer.

    Args:
        library: ``hf`` or ``open_clip``.
        model: one of its dual encoders.
        folder: with its tokenizer.
        captions: where each stands -> itself.

    Raises:
        MissingError: there is no tokenizer.
        DataError: a caption is longer than the context, where the tokenizer does not cut it.
        ValueError: the tokenizer knows more tokens than the model.
    """
    if library == "open_clip":
        found, size = {"text": open_clip_tokenizer(folder)(list(captions.values()))}, model.vocab_size
        ids = found["text"]
    else:
        tokenizer, config = tokenizer_of(folder), model.config.text_config
        length, size = config.max_position_embeddings, config.vocab_size
        for where, ids in zip(captions, tokenizer(list(captions.values()), verbose=False)["input_ids"]):
            if len(ids) > length:
                raise DataError(f"{where}: the caption has {len(ids)} tokens, and the model reads {length}: shorten it")
        padded = tokenizer(list(captions.values()), padding="max_length", max_length=length, return_tensors="pt")
        found = {"input_ids": (ids := padded["input_ids"])}
        if model.config.model_type not in READ_PADDING:
            found["attention_mask"] = padded["attention_mask"]
    if ids.max() >= size:
        raise ValueError(f"the tokenizer of {folder} gives token {int(ids.max())}, and the model has {size}")
    return found


def open_clip_tokenizer(folder: Path) -> Callable[[Sequence[str]], Tensor]:
    """That of a folder of open_clip: captions -> (B, S). Raises MissingError where a file of it is missing."""
    import open_clip

    from fulgurite.backbones.foreign_models import OPEN_CLIP_CONFIG, read_config

    if read_config(folder / OPEN_CLIP_CONFIG)["model_cfg"]["text_cfg"].get("hf_tokenizer_name"):
        tokenizer_of(folder)
    return open_clip.get_tokenizer(f"local-dir:{folder}")


def caption_mask(library: str, model: Any, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """(B, S) nonzero for the tokens that reach a caption's feature; None where all do.

    That is what the tokenizer says for CLIP of transformers. In open_clip's own causal towers nothing reads what
    follows the token that the feature is taken from; in its towers of transformers nothing reads padding.
    """
    if library == "hf":
        return inputs.get("attention_mask")
    ids, tower = inputs["text"], getattr(model, "text", model)
    if hasattr(tower, "config"):
        return ids != tower.config.pad_token_id
    pool = getattr(tower, "pool_type", None) or getattr(tower, "text_pool_type", None)
    if getattr(tower, "attn_mask", None) is None or getattr(tower, "cls_emb", None) is not None:
        return None
    if pool not in ("argmax", "eos"):
        return None
    ends = ids if pool == "argmax" else (ids == getattr(tower, "eos_id", getattr(tower, "text_eos_id", None))).int()
    return torch.arange(ids.shape[1]) <= ends.argmax(-1, keepdim=True)


def masks_of_captions(
    library: str, model: Any, spec: ModelSpec, inputs: Mapping[str, Tensor], names: Sequence[str]
) -> dict[str, Tensor]:
    """`caption_mask` for those of the layers ``names`` that lie in blocks of the tower for text."""
    mask = caption_mask(library, model, inputs)
    blocks = "|".join(rf"(?:{tower.blocks})\..*" for tower in spec.towers if tower.name == "text")
    return {} if mask is None else {name: mask for name in names if re.fullmatch(blocks, name)}


def pair_loss(library: str, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The loss of a batch of pairs, on the model's device: by sigmoids where it has a bias for them."""
    if library == "hf":
        logits = model(**inputs).logits_per_image
    else:
        logits, _ = model.get_logits(inputs["image"], inputs["text"])
    biased = getattr(model, "logit_bias", None) is not None
    return sigmoid_loss(logits.float()) if biased else softmax_loss(logits.float())
