"""An export written, loaded in a fresh process, compared, and only then published."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fulgurite.backbones.foreign_models import write_model
from fulgurite.backbones.fresh import compare_fresh, require_same
from fulgurite.backbones.reload import outputs, relative_error
from fulgurite.checkpoints import Manifest, RefusedError, read_manifest
from fulgurite.checkpoints.atomic import naming, resolve
from fulgurite.checkpoints.foreign import foreign_folder, require_new, require_space
from fulgurite.checkpoints.manifest import MANIFEST_NAME
from fulgurite.checkpoints.sources import open_source
from fulgurite.checkpoints.store import new_manifest
from fulgurite.checkpoints.tensorfile import map_file, write_tensors
from fulgurite.modules.export import AdapterChoice, Prepared, StateDict, Target, prepare_files, prepare_run

ADAPTERS, REST = "fulgurite_adapters.safetensors", "fulgurite_rest.safetensors"
MAX_SHARD_SIZE = "50GB"


def export(
    path: str | Path,
    out: str | Path,
    to: Target,
    build: Callable[[Path], nn.Module],
    sets: str | Mapping[str, float] | None = None,
    part: str | None = None,
    adapters: AdapterChoice = "fold",
    dtype: torch.dtype | None = None,
    like: Path | None = None,
    architecture: str | None = None,
    probe_file: Path | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    facts: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Manifest:
    """Write a checkpoint or artefact as a model of another library, all or nothing.

    Args:
        path: checkpoint or artefact of fulgurite, or a model of the library in files.
        out: a folder that is not there yet, or empty.
        to: the library.
        build: makes the module of a checkpoint, with its weights.
        sets, part, adapters, dtype: see `prepare_run`.
        like, architecture: see `prepare_files`.
        probe_file: safetensors file of the inputs that are compared, a tensor per argument of the forward pass.
        max_shard_size: of one file of weights, such as ``"5GB"``; for transformers.
        facts: more for the manifest.
        replace: what is at ``out``.

    Returns:
        the manifest that lies beside the library's files.

    Raises:
        CheckpointError: damaged, not exportable, or not the same once loaded by the library; nothing is left.
    """
    if not replace:
        require_new(Path(out))
    given = {"sets": sets, "part": part, "adapters": adapters, "like": like, "architecture": architecture}
    prepared = prepare(path, to, build, dtype=dtype, probe_file=probe_file, **given)
    prepared.facts |= facts or {}
    return write(prepared, out, Path(path), dtype, max_shard_size, replace)


def prepare(
    path: str | Path,
    to: Target,
    build: Callable[[Path], nn.Module],
    sets: str | Mapping[str, float] | None = None,
    part: str | None = None,
    adapters: AdapterChoice = "fold",
    dtype: torch.dtype | None = None,
    like: Path | None = None,
    architecture: str | None = None,
    probe_file: Path | None = None,
) -> Prepared:
    """What `export` would write; see there."""
    path = Path(path)
    inputs: StateDict | None = None if probe_file is None else map_file(probe_file)
    manifest = read_manifest(path) if (resolve(path) / MANIFEST_NAME).is_file() else None
    if manifest is not None and manifest.settings.get("model"):
        if like is not None or architecture is not None:
            raise RefusedError(f"{path} says itself how its model is built: leave --like and --architecture out")
        return prepare_run(build(path), to, sets, part, adapters, dtype, inputs)
    if manifest is not None and manifest.kind == "delta":
        raise RefusedError(
            f"{path} holds adapters alone: export the checkpoint of its run, with --set NAME where it has more"
        )
    if sets is not None or part is not None or adapters != "fold":
        raise RefusedError(f"{path} holds plain weights without adapters: leave --set, --part and --adapters out")
    return prepare_files(open_source(path), to, like, architecture, inputs)


def write(
    prepared: Prepared,
    out: str | Path,
    path: Path,
    dtype: torch.dtype | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    replace: bool = False,
) -> Manifest:
    """Write, compare in a fresh process, publish; see `export`."""
    to, model = prepared.to, prepared.model
    if to != "hf" and max_shard_size != MAX_SHARD_SIZE:
        raise RefusedError(f"--max_shard_size {max_shard_size}: {to} reads one file of weights; leave it out")
    require_space(Path(out), num_bytes(prepared, dtype))
    parent = {"path": str(path), "digest": open_source(path).digest}
    options = {"to": to, "dtype": None if dtype is None else str(dtype).removeprefix("torch.")}
    settings = {"class_path": f"{__name__}.export", "init_args": options | {"max_shard_size": max_shard_size}}
    base = None
    if to == "peft":
        base = {"source": prepared.base, "digest": prepared.base_digest}
    manifest = new_manifest(
        "self-contained" if base is None else "delta", base, parents=[parent], settings={"export": settings}
    )
    manifest.facts |= {**prepared.facts, "library": "transformers" if to == "hf" else to}
    with foreign_folder(out, manifest, replace) as folder, naming(folder):
        if to == "peft":
            config, tensors = prepared.peft
            (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
            write_tensors(folder / "adapter_model.safetensors", tensors)
            expected = prepared.expected
        else:
            cast(model, dtype)
            files = (prepared.like, prepared.architecture, prepared.tokenizer, max_shard_size)
            write_model(to, model, folder, *files)
            expected = outputs(to, model.float(), prepared.inputs)
        for name, tensors in ((REST, prepared.rest), (ADAPTERS, prepared.adapters)):
            if tensors:
                write_tensors(folder / name, tensors)
        model_class = type(model).__name__ if to in ("hf", "peft") else ""
        found = compare_fresh(to, folder, prepared.inputs, expected, model_class, prepared.base)
        require_same(found, None if to == "peft" else model, prepared.tokens)
        manifest.facts |= {"reloaded": found.versions, "errors": found.errors}
        if prepared.expected is not None and to != "peft":
            rounding = {n: relative_error(expected[n], live) for n, live in prepared.expected.items()}
            manifest.facts["differs_from_live"] = rounding
    return manifest


def cast(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Give all floating tensors of a model's state dict another type, in place; what it computes anew stays."""
    stored = model.state_dict().keys()
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if dtype is not None and name in stored and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def num_bytes(prepared: Prepared, dtype: torch.dtype | None) -> int:
    """About what an export takes on disk, tokenizer and configuration left out."""
    model: Any = [] if prepared.to == "peft" else [*prepared.model.parameters(), *prepared.model.buffers()]
    tensors = {} if prepared.peft is None else prepared.peft[1]
    kept = [*tensors.values(), *prepared.rest.values(), *prepared.adapters.values()]
    sizes = [t.numel() * (dtype.itemsize if dtype and t.is_floating_point() else t.element_size()) for t in model]
    return sum(sizes) + sum(t.numel() * t.element_size() for t in kept)
