"""The manifest: the JSON file that makes a folder a checkpoint, and says what every byte of it should be.

It is written last. Its own last entry, ``digest``, covers all bytes of the manifest before that entry, so a
change in the manifest is found as surely as one in a tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from fulgurite.checkpoints.atomic import naming, reading, resolve
from fulgurite.checkpoints.digest import FileRecord, algorithm_of, digest_of_bytes
from fulgurite.checkpoints.errors import (
    CheckpointError,
    DamagedError,
    MismatchError,
    MissingError,
    RefusedError,
)
from fulgurite.checkpoints.signed import body_of, open_signed, sign
from fulgurite.checkpoints.tensorfile import TensorRecord
from fulgurite.checkpoints.treejson import join, split

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
_FREE = ("structure", "settings", "metrics", "facts")
Kind = Literal["delta", "self-contained"]


@dataclass
class Manifest:
    """What a checkpoint folder holds and where it comes from.

    Args:
        kind: ``"delta"`` stands on ``base``; ``"self-contained"`` needs nothing else.
        base: ``{"source": name or path, "digest": fingerprint}`` of the frozen weights under a delta, else
            None.
        files: every file of the folder but the manifest.
        tensors: file name to tensor name to record, in the order of the saved dict.
        structure: how modules must be rebuilt before weights load (pruned, quantized, merged), as data.
        parents: the checkpoints that this one was made from, ``{"path", "digest"}`` each.
        settings: what it was made with.
        metrics: scores at the time of writing.
        facts: anything else worth reading without opening tensors (epoch, step, digest of the data).
        created: time of writing, ISO 8601 in UTC with microseconds.
        format_version: of this layout; a reader refuses any other.
    """

    kind: Kind = "self-contained"
    base: dict[str, str] | None = None
    files: dict[str, FileRecord] = field(default_factory=dict)
    tensors: dict[str, dict[str, TensorRecord]] = field(default_factory=dict)
    structure: dict[str, Any] = field(default_factory=dict)
    parents: list[dict[str, str]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="microseconds"))
    format_version: int = FORMAT_VERSION

    def check(self) -> None:
        """Raise `RefusedError` for a value that a manifest cannot hold, or entries in conflict."""
        if problem := _problem(json.loads(_body(self).removesuffix(b",") + b"\n}")):
            raise RefusedError(f"manifest: {problem}")

    @property
    def digest(self) -> str:
        """One digest for the whole checkpoint: its lineage entry in the checkpoints made from it."""
        return digest_of_bytes(_body(self))

    def require_base(self, digest: str, where: str) -> None:
        """Raise `MismatchError` if this is a delta over other weights than those with ``digest``.

        ``where`` names the checkpoint in the text.
        """
        recorded = (self.base or {}).get("digest")
        if self.kind == "delta" and recorded != digest:
            source = (self.base or {}).get("source")
            raise MismatchError(
                f"{where} is a delta over {source} with digest {recorded}, but the backbone of this run has "
                f"digest {digest}. Load the backbone that the checkpoint was trained on."
            )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest`` into a folder that is being built."""
    path = folder / MANIFEST_NAME
    with naming(path):
        path.write_bytes(sign(_body(manifest)))


def read_manifest(path: str | Path) -> Manifest:
    """Read and check the manifest of the checkpoint folder ``path``.

    Raises `MissingError` if the folder is no checkpoint, `DamagedError` if a byte of the manifest changed,
    and `CheckpointError` for another format version or an entry that leaves the folder.
    """
    file = resolve(path) / MANIFEST_NAME
    if not file.is_file():
        raise MissingError(_missing(Path(path)))
    with reading(file):
        data = file.read_bytes()
    value = open_signed(file, data, "A manifest must not be edited by hand.")
    version = value.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format version {version!r}; this version of fulgurite reads {FORMAT_VERSION}. "
            f"Use the version of fulgurite that wrote it."
        )
    if problem := _problem(value):
        raise CheckpointError(f"{file}: {problem}. The file was not written by fulgurite; do not use it.")
    value["files"] = {name: FileRecord(**record) for name, record in value["files"].items()}
    value["tensors"] = {
        file_name: {name: TensorRecord(**record) for name, record in records.items()}
        for file_name, records in value["tensors"].items()
    }
    try:
        value |= {name: join(value[name], {}) for name in _FREE}
    except (DamagedError, RecursionError) as error:
        raise DamagedError(f"{file} is damaged: {error}") from error
    return Manifest(**value)


def _body(manifest: Manifest) -> bytes:
    value = asdict(manifest)
    for name in _FREE:
        value[name], tensors = split(value[name], name)
        if tensors:
            raise RefusedError(f"{next(iter(tensors))} is a tensor; the manifest takes numbers and text only")
    return body_of(value)


def _missing(path: Path) -> str:
    if path.is_file():
        return f"{path} is a file; a checkpoint of fulgurite is a folder with a {MANIFEST_NAME} in it."
    if path.is_dir():
        return f"{path} is no checkpoint: it has no {MANIFEST_NAME}."
    return f"no checkpoint at {path}: the folder does not exist."


def _problem(value: Mapping[str, Any]) -> str | None:
    """What is wrong with the decoded manifest, or None."""
    expected: dict[str, type | tuple[type, ...]] = {
        "kind": str,
        "base": (dict, type(None)),
        "files": dict,
        "tensors": dict,
        "structure": dict,
        "parents": list,
        "settings": dict,
        "metrics": dict,
        "facts": dict,
        "created": str,
        "format_version": int,
    }
    if set(value) != set(expected):
        return f"its entries are {sorted(value)}, expected {sorted(expected)}"
    for name, kinds in expected.items():
        if not isinstance(value[name], kinds):
            return f"its entry {name!r} is a {type(value[name]).__name__}"
    if value["kind"] not in get_args(Kind):
        return f"its kind is {value['kind']!r}, expected one of {get_args(Kind)}"
    if (value["kind"] == "delta") != (value["base"] is not None):
        return f"its kind is {value['kind']!r} but its base is {value['base']!r}; only a delta has a base"
    if value["base"] is not None and set(value["base"]) != {"source", "digest"}:
        return f"its base has the entries {sorted(value['base'])}, expected 'source' and 'digest'"
    return _problem_of_files(value["files"]) or _problem_of_tensors(value["tensors"], value["files"])


def _problem_of_files(files: Mapping[str, Any]) -> str | None:
    for name, record in files.items():
        if not is_inside(name):
            return f"the file name {name!r} leaves the folder"
        if not isinstance(record, dict) or set(record) != {"bytes", "digest"}:
            return f"the record of file {name!r} is {record!r}"
        if type(record["bytes"]) is not int or not _is_digest(record["digest"]):
            return f"the record of file {name!r} is {record!r}"
    return None


def _problem_of_tensors(tensors: Mapping[str, Any], files: Mapping[str, Any]) -> str | None:
    for name in files:
        if name.endswith(".safetensors") and name not in tensors:
            return f"it has no records of the tensors in {name!r}"
    for file, records in tensors.items():
        if file not in files or not isinstance(records, dict):
            return f"it has tensors of {file!r}, which is not among its files"
        for name, record in records.items():
            if not isinstance(record, dict) or set(record) != {"dtype", "shape", "digest"}:
                return f"the record of tensor {name!r} in {file!r} is {record!r}"
            sizes = record["shape"]
            if not isinstance(sizes, list) or any(type(size) is not int or size < 0 for size in sizes):
                return f"the shape of tensor {name!r} in {file!r} is {sizes!r}"
            if not isinstance(record["dtype"], str) or not _is_digest(record["digest"]):
                return f"the record of tensor {name!r} in {file!r} is {record!r}"
    return None


def is_inside(name: str) -> bool:
    """Whether ``name`` is a plain relative path that stays in its folder and is not the manifest."""
    parts = name.split("/")
    return name != MANIFEST_NAME and "\\" not in name and "\0" not in name and not {"", ".", ".."} & set(parts)


def _is_digest(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(algorithm_of(value))
    except ValueError:
        return False
