"""Models of other libraries that lie compressed in this package's own layout, whole again.

Such a folder holds the library's configuration and tokenizer, the tensors of `methods.quantization.storage` in
``weights.safetensors``, and what they are in its manifest.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from fulgurite.backbones.foreign_models import library_of, model_of
from fulgurite.backbones.rotated_models import rotated_model
from fulgurite.checkpoints import MissingError, read_manifest
from fulgurite.checkpoints.atomic import resolve
from fulgurite.methods.quantization.rotation_record import ROTATION, RotationRecord
from fulgurite.methods.quantization.storage import load_dense


def load_model(path: str | Path) -> nn.Module:
    """The model of its library with dense weights, those that quantization left, in evaluation mode.

    One that was rotated has the norms and the head that this left, and rotates the inputs of layers as it says.

    Args:
        path: what ``fulgurite quantize --format own`` wrote; every byte is checked.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    folder = resolve(path)
    library = library_of(folder) if folder.is_dir() else None
    if library is None:
        raise MissingError(f"{path} holds no configuration of another library's model: fulgurite.load loads our own")
    tensors, rotation = load_dense(path), read_manifest(path).facts.get(ROTATION)
    if rotation is None:
        return model_of(library, tensors, folder, None)
    return rotated_model(library, tensors, folder, RotationRecord.from_data(rotation))
