"""Folders in the layout of another library, published all or nothing, with a manifest of digests beside its files.

The other library passes over the manifest; `verify` and `open_source` use it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from fulgurite.checkpoints.atomic import fault, publish_folder, reading
from fulgurite.checkpoints.card import CARD_NAME, card
from fulgurite.checkpoints.digest import FileRecord, digest_of_bytes, digest_of_file, digest_of_tensor
from fulgurite.checkpoints.errors import RefusedError, WriteError
from fulgurite.checkpoints.manifest import MANIFEST_NAME, Manifest, write_manifest
from fulgurite.checkpoints.tensorfile import TensorRecord, dtype_name, map_file

# What a model folder holds beside its weights: configurations, tokenizers, processors, chat templates.
COMPANIONS = (".json", ".txt", ".model", ".jinja", ".tiktoken")
LICENCES = ("LICENSE", "LICENCE", "NOTICE")
OUR_OWN = (MANIFEST_NAME, "digests.json", "state.json")


def require_new(out: Path) -> None:
    """Raise `RefusedError` where ``out`` is there already and is more than an empty folder."""
    if out.is_symlink() or out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise RefusedError(f"{out} is there already and not an empty folder: name a new one, nothing is replaced")


def require_space(out: Path, num_bytes: int) -> None:
    """Raise `WriteError` where the disk of ``out`` has less than ``num_bytes`` left."""
    folder = next(parent for parent in out.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise WriteError(
            f"cannot write {out}: about {num_bytes:,} bytes are needed, {free:,} are free. Free some space, or write "
            "elsewhere."
        )


@contextmanager
def foreign_folder(out: str | Path, manifest: Manifest, replace: bool = False) -> Iterator[Path]:
    """Give a folder to fill with another library's files; at the end they get card and digests, and all is published.

    The block may load the folder and compare it, and raise: then nothing is left. With ``replace``, what is at ``out``
    is replaced once the new folder is complete.

    Raises:
        RefusedError: ``out`` is there already.
        WriteError: the operating system refused.
    """
    if not replace:
        require_new(Path(out))
    with publish_folder(out) as folder:
        yield folder
        record_files(folder, manifest)
        text = card(manifest, Path(out).name).encode()
        (folder / CARD_NAME).write_bytes(text)
        for path in folder.rglob("*.safetensors"):  # which other writers make readable for their owner alone
            path.chmod((folder / CARD_NAME).stat().st_mode)
        manifest.files[CARD_NAME] = FileRecord(len(text), digest_of_bytes(text))
        fault("before_manifest")
        write_manifest(folder, manifest)


def record_files(folder: Path, manifest: Manifest) -> None:
    """Put the digests of all files of ``folder``, and of their tensors, into ``manifest``."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or path.name == MANIFEST_NAME:
            continue
        with reading(path):
            manifest.files[name] = FileRecord(path.stat().st_size, digest_of_file(path))
        if path.suffix == ".safetensors":
            manifest.tensors[name] = {key: _record(tensor) for key, tensor in map_file(path).items()}


def companions(folder: str | Path) -> list[Path]:
    """Files of a model folder that belong to the model and hold no weights: configurations, tokenizer, processor."""
    return [
        path
        for path in sorted(Path(folder).iterdir())
        if path.is_file()
        and (path.suffix in COMPANIONS or path.stem.upper() in LICENCES)
        and path.name not in OUR_OWN
        and not path.name.endswith(".index.json")
        and not path.name.startswith(".")
    ]


def copy_files(files: list[Path], folder: Path) -> None:
    """Copy ``files`` into ``folder``."""
    for path in files:
        with reading(path):
            shutil.copyfile(path, folder / path.name)


def _record(tensor: Tensor) -> TensorRecord:
    return TensorRecord(dtype_name(tensor.dtype), list(tensor.shape), digest_of_tensor(tensor))
