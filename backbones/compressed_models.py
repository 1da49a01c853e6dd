"""Models of other libraries that lie compressed in this package's own layout, whole again.

Such a folder holds the library's configuration and tokenizer, the tensors of `methods.quantization.storage` in
``weights.safetensors``, and what they are in its manifest.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from fulgurite.backbones.foreign_models import library_of, model_of
from fulgurite.checkpoints import MissingError
from fulgurite.checkpoints.atomic import resolve
from fulgurite.methods.quantization.storage import load_dense


def load_model(path: str | Path) -> nn.Module:
    """The model of its library with dense weights, those that quantization left, in evaluation mode.

    Args:
        path: what ``fulgurite quantize --format own`` wrote; every byte is checked.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    folder = resolve(path)
    library = library_of(folder) if folder.is_dir() else None
    if library is None:
        raise MissingError(f"{path} holds no configuration of another library's model: fulgurite.load loads our own")
    return model_of(library, load_dense(path), folder, None)
