"""A checkpoint folder: tensor files and documents under one manifest, written at once, verified when read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fulgurite.checkpoints.atomic import fault, naming, publish_folder, reading, resolve
from fulgurite.checkpoints.digest import DEFAULT, FileRecord, digest_of_bytes
from fulgurite.checkpoints.errors import CheckpointError, DamagedError, MissingError, RefusedError
from fulgurite.checkpoints.manifest import (
    MANIFEST_NAME,
    Kind,
    Manifest,
    is_inside,
    read_manifest,
    write_manifest,
)
from fulgurite.checkpoints.shards import ShardedTensors, Stored
from fulgurite.checkpoints.software import software
from fulgurite.checkpoints.tensorfile import (
    TensorRecord,
    check_bytes,
    check_file,
    check_size,
    check_tensor,
    map_verified,
    read_tensors,
    write_tensors,
)
from fulgurite.checkpoints.treejson import join, split

_SUFFIX = ".safetensors"


def save_checkpoint_folder(
    path: str | Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    documents: Mapping[str, Any] | None = None,
    *,
    kind: Kind = "self-contained",
    base: Mapping[str, str] | None = None,
    structure: Mapping[str, Any] | None = None,
    parents: Iterable[Mapping[str, str]] = (),
    settings: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    algorithm: str = DEFAULT,
) -> Manifest:
    """Publish a checkpoint folder at ``path``; whatever was there is replaced once the new one is complete.

    Args:
        path: the folder. Parent folders are made.
        tensors: file stem to state dict; ``"weights"`` becomes ``weights.safetensors``.
        documents: name to value. ``"state"`` becomes ``state.json`` (numbers, strings, lists, tuples, dicts,
            None); its tensors, if any, go to ``state.safetensors``. A name with a suffix, such as
            ``"README.md"``, takes a string and is written as it is.
        kind, base, structure, parents, settings, metrics, facts: see `Manifest`; the facts get `software`.
        algorithm: of the digests; ``"sha256"`` where an adversary is thought of.

    Raises:
        RefusedError: a value that cannot be stored; nothing is written.
        WriteError: the operating system refused; the old content of ``path`` is untouched.
    """
    fields = {"kind": kind, "base": base, "structure": structure, "parents": parents}
    manifest = new_manifest(**fields, settings=settings, metrics=metrics, facts=facts)
    write_checkpoint(path, manifest, *encode(tensors, documents), algorithm)
    return manifest


def new_manifest(
    kind: Kind = "self-contained",
    base: Mapping[str, str] | None = None,
    structure: Mapping[str, Any] | None = None,
    parents: Iterable[Mapping[str, str]] = (),
    settings: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Manifest:
    """A checked manifest of no files yet; see `save_checkpoint_folder`."""
    manifest = Manifest(
        kind=kind,
        base=None if base is None else dict(base),
        structure=dict(structure or {}),
        parents=[dict(parent) for parent in parents],
        settings=dict(settings or {}),
        metrics=dict(metrics or {}),
        facts={"software": software(), **(facts or {})},
    )
    manifest.check()
    return manifest


def encode(
    tensors: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, Any] | None = None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, bytes]]:
    """State dicts by file stem, those inside documents included, and the bytes of every document by file name."""
    states, texts = {stem: dict(state) for stem, state in tensors.items()}, {}
    for name, value in (documents or {}).items():
        texts[_document_name(name)], inside = _encode(name, value)
        stem = Path(name).stem
        if inside and stem in states:
            raise RefusedError(f"the tensors of document {name!r} would replace those of {stem}{_SUFFIX}")
        if inside:
            states[stem] = inside
    return states, texts


def write_checkpoint(
    path: str | Path,
    manifest: Manifest,
    states: Mapping[str, Mapping[str, Tensor]],
    texts: Mapping[str, bytes],
    algorithm: str = DEFAULT,
    others: Callable[[Path], Mapping[str, tuple[FileRecord, dict[str, TensorRecord]]]] | None = None,
    describe: Callable[[Path, Manifest], Mapping[str, bytes]] | None = None,
) -> None:
    """Publish what `encode` made under ``manifest``, which gets the records of all files.

    ``others`` writes more tensor files into the folder that it is given, and returns their records. ``describe`` makes
    documents (a model card, a report) of the folder and the manifest of all that is in it then.
    """
    with publish_folder(path) as folder:
        for stem, state in states.items():
            name = _checked(stem + _SUFFIX)
            manifest.files[name], manifest.tensors[name] = write_tensors(folder / name, state, algorithm)
        _write_documents(folder, manifest, texts, algorithm)
        for name, (file, records) in (others(folder) if others is not None else {}).items():
            manifest.files[name], manifest.tensors[name] = file, records
        if describe is not None:
            _write_documents(folder, manifest, describe(folder, manifest), algorithm)
        fault("before_manifest")
        write_manifest(folder, manifest)


def _write_documents(folder: Path, manifest: Manifest, texts: Mapping[str, bytes], algorithm: str) -> None:
    for name, data in texts.items():
        manifest.files[_checked(name)] = FileRecord(len(data), digest_of_bytes(data, algorithm))
        with naming(folder / name):
            (folder / name).write_bytes(data)


def load_tensors(
    path: str | Path, file: str = "weights", names: Iterable[str] | None = None, verify: bool = True
) -> dict[str, Tensor]:
    """The tensors of ``<file>.safetensors`` in the checkpoint ``path``, mapped into memory.

    Args:
        path: a checkpoint folder.
        file: stem of the tensor file.
        names: only these; then only their digests are checked, and memory and time are theirs alone.
        verify: compare with the digests of the manifest first.

    Raises:
        MissingError: no such checkpoint, file or tensor.
        DamagedError: changed, missing or extra bytes, naming file and tensor.
    """
    folder, manifest = resolve(path), read_manifest(path)
    stem = file.removesuffix(_SUFFIX)
    name = stem + _SUFFIX
    slices = sharded_tensors(path, stem, verify)
    wanted = None if names is None else list(names)
    if wanted is not None and slices:
        plain = _tensors_of(folder, manifest, name, [n for n in wanted if n not in slices], verify)
        return {n: plain[n] if n in plain else slices[n] for n in wanted}
    plain = _tensors_of(folder, manifest, name, wanted, verify)
    return {**plain, **slices}


def sharded_tensors(path: str | Path, stem: str, verify: bool = True) -> ShardedTensors:
    """What of ``<stem>.safetensors`` is stored in slices, read when it is asked for; empty where nothing is."""
    manifest = read_manifest(path)

    def read(shard: str, inside: str) -> Tensor:
        return _tensors_of(resolve(path), manifest, shard + _SUFFIX, [inside], verify)[inside]

    return ShardedTensors(manifest, stem, read)


def _tensors_of(
    folder: Path, manifest: Manifest, name: str, names: list[str] | None, verify: bool
) -> dict[str, Tensor]:
    """The tensors of the one file ``name``; see `load_tensors`."""
    record = _record(folder, manifest, name)
    check_size(folder / name, record)
    if not verify or names is not None:
        return read_tensors(folder / name, manifest.tensors[name], names, verify)
    try:
        return map_verified(folder / name, record, manifest.tensors[name])
    except DamagedError as error:
        raise DamagedError((_damaged_tensors(folder / name, manifest, name) or [str(error)])[0]) from error


def load_document(path: str | Path, name: str, lazy: bool = False) -> Any:
    """The document ``name`` of the checkpoint ``path``, as it was saved.

    Always verified; errors as `load_tensors`. With ``lazy``, tensors stored in slices come as `Stored`.
    """
    folder, manifest = resolve(path), read_manifest(path)
    name = _document_name(name)
    record = _record(Path(path), manifest, name)
    check_size(folder / name, record)
    with reading(folder / name):
        text = (folder / name).read_bytes()
    check_bytes(folder / name, text, record)
    if not name.endswith(".json"):
        return text.decode()
    beside = Path(name).stem + _SUFFIX
    tensors: dict[str, Any] = {}
    if beside in manifest.files:
        tensors = _tensors_of(folder, manifest, beside, None, True)
        slices = sharded_tensors(path, Path(name).stem)
        tensors |= {n: Stored(slices, n) for n in slices} if lazy else slices
    try:
        return join(json.loads(text), tensors)
    except (ValueError, RecursionError, DamagedError) as error:
        raise DamagedError(f"{folder / name} is no JSON of fulgurite: {error}") from error


@dataclass
class Report:
    """Result of `verify`.

    Args:
        path: the checkpoint.
        manifest: None if it could not be read.
        files: what is wrong with each file, a text per damaged tensor or for the whole file; nothing for a good one.
        extra: files in the folder that the manifest does not list; they are never read.
    """

    path: Path
    manifest: Manifest | None = None
    files: dict[str, list[str]] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """All that is wrong; empty for a good checkpoint."""
        return [problem for problems in self.files.values() for problem in problems]

    @property
    def ok(self) -> bool:
        """Whether every byte is as it was written."""
        return not self.problems


def verify(path: str | Path) -> Report:
    """Check every byte of the checkpoint ``path`` and report all damage by file and tensor, without raising."""
    report, folder = Report(Path(path)), resolve(path)
    try:
        report.manifest = manifest = read_manifest(path)
    except CheckpointError as error:
        report.files[MANIFEST_NAME] = [str(error)]
        return report
    report.files[MANIFEST_NAME] = []
    for name, record in manifest.files.items():
        try:
            check_file(folder / name, record)
            if name in manifest.tensors:
                read_tensors(folder / name, manifest.tensors[name], verify=False)
            report.files[name] = []
        except DamagedError as error:
            report.files[name] = _damaged_tensors(folder / name, manifest, name) or [str(error)]
        except CheckpointError as error:
            report.files[name] = [str(error)]
    known = {MANIFEST_NAME, *manifest.files}
    found = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir())
    report.extra = sorted(set(found) - known)
    return report


def _damaged_tensors(file: Path, manifest: Manifest, name: str) -> list[str]:
    """A text per damaged tensor of a damaged file; empty if it cannot be opened, or the damage is elsewhere."""
    records, problems = manifest.tensors.get(name, {}), []
    try:
        tensors = read_tensors(file, records, verify=False)
    except CheckpointError:
        return []
    for tensor, record in records.items():
        try:
            check_tensor(file, tensor, tensors[tensor], record)
        except DamagedError as error:
            problems.append(str(error))
    return problems


def _record(path: Path, manifest: Manifest, name: str) -> FileRecord:
    if name not in manifest.files:
        raise MissingError(f"{path} has no {name}; it holds {', '.join(sorted(manifest.files)) or 'no files'}.")
    return manifest.files[name]


def _encode(name: str, value: Any) -> tuple[bytes, dict[str, Tensor]]:
    if _document_name(name).endswith(".json"):
        encoded, tensors = split(value, Path(name).stem)
        return json.dumps(encoded, ensure_ascii=False, allow_nan=False).encode() + b"\n", tensors
    if not isinstance(value, str):
        raise RefusedError(f"document {name!r} is a {type(value).__name__}; only .json documents take values")
    return value.encode(), {}


def _document_name(name: str) -> str:
    return _checked(name if Path(name).suffix else name + ".json")


def _checked(name: str) -> str:
    if "/" in name or name.startswith(".") or not is_inside(name):
        raise RefusedError(f"file name {name!r} is not a plain name inside the checkpoint folder")
    return name
