"""Merging LoRA adapters that lie in folders of `peft` into a folder of `peft`.

Adapters are small beside their models: all of them are in memory at once, and what the merger takes comes on top.
Rank-stabilised and plain scales may be mixed: both are read as the s of s B A, and the result has plain ones. Whatever
changes a weight in another way (DoRA, biases, saved modules) is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fulgurite.checkpoints import (
    MANIFEST_NAME,
    DamagedError,
    Manifest,
    MissingError,
    RefusedError,
    load_document,
    load_tensors,
    read_manifest,
)
from fulgurite.checkpoints.atomic import reading, resolve
from fulgurite.checkpoints.companions import ADAPTER_CONFIG
from fulgurite.checkpoints.digest import digest_of_file
from fulgurite.checkpoints.foreign import require_new, require_space
from fulgurite.checkpoints.store import encode, new_manifest, write_checkpoint
from fulgurite.checkpoints.tensorfile import check_file, map_file
from fulgurite.methods.merging.job import Merged
from fulgurite.methods.merging.knots import MergeKnOTS
from fulgurite.methods.merging.lora import Factors, LoRAFactors, MergeLoRA, exact_sum
from fulgurite.methods.merging.lora_io import factors_from_peft, factors_to_peft
from fulgurite.methods.merging.writing import card_of

CONFIG, WEIGHTS = ADAPTER_CONFIG, "adapter_model.safetensors"
SAME = 1e-6  # relative change below which an adapter is another one


@dataclass(frozen=True)
class AdapterFolder:
    """One adapter on disk.

    Args:
        path: of the folder.
        config: peft's.
        factors: by the names of the layers.
        base: ``source`` and ``digest`` of the model below; the digest is ``unknown`` in folders of peft's own.
        digest: of the folder's manifest, or of its weights.
    """

    path: Path
    config: dict[str, Any]
    factors: LoRAFactors
    base: dict[str, str]
    digest: str

    @property
    def num_bytes(self) -> int:
        """Of all factors."""
        tensors = [tensor for f in self.factors.values() for tensor in (f.down, f.up)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def open_adapter(path: str | Path) -> AdapterFolder:
    """Read a folder that peft or fulgurite has written; a manifest is verified.

    Raises:
        MissingError: one of the two files is not there.
        DamagedError: a file is not what it should be.
        ValueError: an adapter that is more than s B A; see `factors_from_peft`.
    """
    path = Path(path)
    folder = resolve(path)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise MissingError(f"no {name} in {path}: adapters are merged from folders of peft, in safetensors")
    if (folder / MANIFEST_NAME).is_file():
        manifest = read_manifest(path)
        config, tensors = load_document(path, CONFIG), load_tensors(path, WEIGHTS)
        base, digest = manifest.base, manifest.digest
    else:
        with reading(folder / CONFIG):
            text = (folder / CONFIG).read_bytes()
        try:
            config = dict(json.loads(text))
        except (ValueError, TypeError, RecursionError) as error:
            raise DamagedError(f"{folder / CONFIG} is no configuration of peft: {error}") from error
        tensors, digest, base = map_file(folder / WEIGHTS), digest_of_file(folder / WEIGHTS), None
    try:
        factors = factors_from_peft(config, tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    unknown = {"source": str(config.get("base_model_name_or_path")), "digest": "unknown"}
    return AdapterFolder(path, config, factors, base or unknown, digest)


def open_adapters(paths: Sequence[str | Path], out: str | Path) -> list[AdapterFolder]:
    """Adapters that may be merged into the folder ``out``.

    Raises:
        ValueError: they stand on different models or have different tasks, or see `open_adapter`.
        CheckpointError: one is damaged or missing, or ``out`` cannot be written.
    """
    require_new(Path(out))
    adapters = [open_adapter(path) for path in paths]
    for what, of in (
        ("models", [a.config.get("base_model_name_or_path") for a in adapters]),
        ("tasks", [a.config.get("task_type") for a in adapters]),
        ("weights of their model", [a.base["digest"] for a in adapters if a.base["digest"] != "unknown"]),
    ):
        if len(set(of)) > 1:
            shown = ", ".join(f"{value!r}" for value in dict.fromkeys(of))
            raise ValueError(f"the adapters have different {what}: {shown}; a sum of their changes has no meaning")
    require_space(Path(out), sum(adapter.num_bytes for adapter in adapters))
    return adapters


def merge_adapters(
    adapters: Sequence[AdapterFolder],
    out: str | Path,
    merger: MergeLoRA | MergeKnOTS,
    weights: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    settings: dict[str, Any] | None = None,
) -> Merged:
    """Merge adapters into a folder that peft loads, all or nothing.

    Args:
        adapters: from `open_adapters`.
        out: a folder that is not there yet, or empty.
        merger: what merges.
        weights: one number per adapter, 1 for each by default.
        dtype: of the factors; those of the first adapter by default.
        settings: for the manifest.

    Returns:
        by layer, how far the change of its weight is from that of the first adapter, relative to it.

    Raises:
        ValueError: the adapters do not fit together.
        CheckpointError: the result is one of the adapters though the settings say otherwise, or it cannot be written;
            nothing is left.
    """
    weights = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    factors = merger([adapter.factors for adapter in adapters], weights)
    if dtype is not None:
        factors = {site: Factors(f.down.to(dtype), f.up.to(dtype), f.scale) for site, f in factors.items()}
    done = Merged(Path(out), distances(factors, adapters[0].factors))
    done.equal_to += [
        str(adapter.path) for adapter in adapters if max(distances(factors, adapter.factors).values()) < SAME
    ]
    if done.equal_to and sum(weight != 0 for weight in weights) > 1:
        raise RefusedError(
            f"the merge equals {' and '.join(done.equal_to)}: the adapters are the same, or settings idle"
        )
    config, tensors = factors_to_peft(factors, adapters[0].config)
    known = [adapter.base for adapter in adapters if adapter.base["digest"] != "unknown"]
    manifest = new_manifest(
        "delta",
        (known or [adapters[0].base])[0],
        parents=[{"path": str(adapter.path), "digest": adapter.digest} for adapter in adapters],
        settings={**(settings or {}), "merger": type(merger).__name__, "weights": weights},
        facts={"change": done.change},
    )
    states = {Path(WEIGHTS).stem: {name: tensor.contiguous() for name, tensor in tensors.items()}}

    def describe(folder: Path, own: Manifest) -> dict[str, bytes]:
        check_file(folder / WEIGHTS, own.files[WEIGHTS])
        return card_of(own, done.path)

    write_checkpoint(done.path, manifest, *encode(states, {CONFIG: config}), describe=describe)
    return done


def distances(factors: LoRAFactors, others: LoRAFactors) -> dict[str, float]:
    """|dW - dW'| / |dW'| by layer, of adapters dW and dW'; infinite where dW' is not there, or 0 and dW is not."""
    out = {}
    for site, f in factors.items():
        own = as_double(f)
        other = as_double(others[site]) if site in others else None
        moved = norm(own) if other is None else norm(exact_sum([own, other], [1, -1]))
        size = 0.0 if other is None else norm(other)
        out[site] = moved / size if size else (math.inf if moved else 0.0)
    return out


def as_double(factors: Factors) -> Factors:
    """Matrices in float64."""
    return Factors(factors.down.detach().flatten(1).double(), factors.up.detach().flatten(1).double(), factors.scale)


def norm(factors: Factors) -> float:
    """|s B A| (Frobenius) from the products of its factors, which are small."""
    left: Tensor = factors.up.T @ factors.up
    return abs(factors.scale) * math.sqrt(max(float((left * (factors.down @ factors.down.T)).sum()), 0.0))
