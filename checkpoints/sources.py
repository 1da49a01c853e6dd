"""Models as files, whoever wrote them: names and mapped tensors, and what is known of their bytes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fulgurite.checkpoints.atomic import reading, resolve
from fulgurite.checkpoints.digest import digest_of_file
from fulgurite.checkpoints.errors import DamagedError, MissingError, RefusedError
from fulgurite.checkpoints.manifest import MANIFEST_NAME, Manifest, is_inside, read_manifest
from fulgurite.checkpoints.store import load_tensors
from fulgurite.checkpoints.tensorfile import map_file

# In a folder of another tool, the first that is there; an index names the shards.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "open_clip_model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.safetensors",
)
REFUSED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class Source:
    """One model on disk.

    Args:
        path: as given.
        tensors: mapped from the files; memory is what is touched.
        manifest: of a checkpoint of fulgurite, None for other files.
        files: the files that hold the tensors.
    """

    path: Path
    tensors: dict[str, Tensor]
    manifest: Manifest | None
    files: tuple[Path, ...]

    @property
    def digest(self) -> str:
        """Of the checkpoint, or of the bytes of the files; reads them."""
        if self.manifest is not None:
            return self.manifest.digest
        return ",".join(digest_of_file(file) for file in self.files)

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def open_source(path: str | Path) -> Source:
    """Open a checkpoint or artefact of fulgurite, a Hugging Face, open_clip or timm folder, or one safetensors file.

    A checkpoint is verified in full first; other files have no digests to verify against.

    Raises:
        MissingError: nothing there, no weights in it, or a shard is missing.
        DamagedError: a file is not what it should be.
        RefusedError: weights in a form that could run code when loaded.
    """
    path = Path(path)
    if (resolve(path) / MANIFEST_NAME).is_file():
        manifest = read_manifest(path)
        names = weights_in(manifest)
        files = tuple(resolve(path) / name for name in manifest.tensors)
        tensors = {key: tensor for name in names for key, tensor in load_tensors(path, name).items()}
        return Source(path, tensors, manifest, files)
    if path.is_file():
        return Source(path, map_file(safe(path)), None, (path,))
    if not path.is_dir():
        raise MissingError(f"no model at {path}: expected a checkpoint, a model folder or a safetensors file")
    found = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
    if found is None:
        others = sorted(path.glob("*.safetensors"))
        if len(others) != 1:
            unsafe = next((name for name in REFUSED if (path / name).is_file()), None)
            if unsafe:
                raise RefusedError(f"{path / unsafe} is a pickle, which can run code: convert it to safetensors first")
            held = f"{len(others)} safetensors files" if others else "no safetensors file"
            raise MissingError(f"{path} has {held} and none of {', '.join(WEIGHT_FILES)}")
        found = others[0]
    if found.suffix == ".safetensors":
        return Source(path, map_file(found), None, (found,))
    return sharded(path, found)


def weights_in(manifest: Manifest) -> list[str]:
    """Names of the files of a checkpoint that hold the model's weights: several where another library's are sharded."""
    if "weights.safetensors" in manifest.files:
        return ["weights.safetensors"]
    if WEIGHT_FILES[0] in manifest.files:
        return sorted(name for name in manifest.tensors if re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name))
    known = [name for name in WEIGHT_FILES if name in manifest.tensors]
    return (known or list(manifest.tensors) or ["weights.safetensors"])[:1]


def safe(path: Path) -> Path:
    """``path``, if its name is that of a safetensors file."""
    if path.suffix != ".safetensors":
        raise RefusedError(f"{path} is no safetensors file, and other formats can run code: convert it first")
    return path


def sharded(path: Path, index: Path) -> Source:
    """A model in several files under a Hugging Face index."""
    with reading(index):
        text = index.read_bytes()
    try:
        shard_of: dict[str, Any] = dict(json.loads(text)["weight_map"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{index} is no index of shards: {error!r}") from error
    tensors: dict[str, Tensor] = {}
    names = sorted({str(name) for name in shard_of.values()})
    for name in names:
        if not is_inside(name) or not (path / name).is_file():
            raise MissingError(f"{index} names the shard {name!r}, which is not in {path}")
        tensors |= map_file(path / name)
    if stray := set(tensors) ^ set(shard_of):
        raise DamagedError(f"{index}: tensor {min(stray)!r} is only in the index or in its shards")
    return Source(path, {name: tensors[name] for name in shard_of}, None, tuple(path / name for name in names))
