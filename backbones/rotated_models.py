"""Language models of transformers that are rotated: which can be, which their library loads, and from files again.

What is rotated within the weights alone is a model of its library, whose norms have weights of 1. What works at run
time or lost its norms' parameters is rebuilt from the record of the rotation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fulgurite.backbones.foreign_models import model_of
from fulgurite.backbones.language_specs import FAMILIES
from fulgurite.backbones.library_models import LibraryModel
from fulgurite.backbones.reload import Stored
from fulgurite.methods.quantization.rotation import Rotate
from fulgurite.methods.quantization.rotation_record import RotationRecord, named_as_before, restore

TIED = "tie_word_embeddings"
OPTION = re.compile(r"\b(heads|feed_forward|fallback)='?(\w+)'?")


def require_rotatable(opened: LibraryModel, rotation: Rotate, path: Path, stored: Stored) -> None:
    """Refuse a rotation, before anything changes.

    Args:
        opened: the model.
        rotation: of it.
        path: of its files.
        stored: the layout of the result; unless it is ``own``, the rotated model must be one of its library.

    Raises:
        ValueError: the model cannot be rotated, was pruned, or would be none of its library.
    """
    kind = type(opened.model).__name__
    if not (opened.is_language_model and opened.spec.norm_linear_pairs):
        raise ValueError(
            f"--rotation: {kind} of {path} cannot be rotated: rotated are language models whose blocks start with "
            f"norms, {', '.join(sorted(FAMILIES))}; leave it out"
        )
    if opened.masks:
        raise ValueError(
            f"--rotation: {path} is pruned, and rotated weights are no longer 0: leave it out, or take the model that "
            "was pruned"
        )
    try:
        plan = rotation.plan(opened.model, opened.spec)
    except ValueError as error:
        raise ValueError(f"--rotation: {kind} of {path}: {OPTION.sub(as_typed, str(error))}") from error
    if stored != "own":
        require_of_library(opened.model, plan)


def as_typed(option: re.Match[str]) -> str:
    """An argument of `Rotate` as it is given to a command."""
    name, value = option.groups()
    return f"--rotation.{name} {value.lower()}"


def require_of_library(model: Any, plan: RotationRecord) -> None:
    """Refuse a rotation that leaves no model of its library.

    Args:
        model: of transformers, not yet rotated.
        plan: of the rotation.

    Raises:
        ValueError: names the option to change.
    """
    kind, config = type(model).__name__, model.config
    layer = next((name for name, was in plan.fused.items() if was == "layer"), None)
    if layer is not None:
        raise ValueError(
            f"--rotation: {kind} has LayerNorms, as {layer}, which become others that transformers does not know: give "
            "--format own"
        )
    if type(config).from_dict({**config.to_dict(), TIED: False}).tie_word_embeddings:
        raise ValueError(f"--rotation unties the head, which transformers ties in every {kind}: give --format own")
    if plan.online:
        raise ValueError(
            f"--rotation rotates inputs of {len(plan.online)} layers at run time, which transformers does not: set "
            "--rotation.heads merged --rotation.feed_forward false, or give --format own"
        )


def rotate_model(opened: LibraryModel, rotation: Rotate) -> RotationRecord:
    """Rotate a model in place; its configuration says then that the head is not tied."""
    record = rotation.apply(opened.model, opened.spec)
    opened.model.config.tie_word_embeddings = False
    return record


def rotated_model(library: str, tensors: Mapping[str, Tensor], folder: Path, record: RotationRecord) -> nn.Module:
    """The rotated model with the values of ``tensors``, in evaluation mode.

    Args:
        library: ``hf``.
        tensors: all of its tensors, dense.
        folder: with the configuration of the model before.
        record: of the rotation.

    Raises:
        CheckpointError: other tensors than those of the model.
    """
    model = model_of(library, named_as_before(tensors, record), folder, None)
    restore(model, record, tensors)
    model.config.tie_word_embeddings = False
    return model.eval()
