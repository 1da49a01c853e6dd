"""What compression costs and gives: the scores of a run's models against the bytes that they take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fulgurite.checkpoints import Manifest
from fulgurite.checkpoints.card import STATE
from fulgurite.methods.quantization.storage import COMPRESSED
from fulgurite.reports.artefacts import Scores
from fulgurite.reports.compression import Point, tradeoff_section
from fulgurite.reports.page import Section

MEGABYTE = 1e6


def tradeoff_sections(
    module: nn.Module,
    trained: Mapping[str, Scores],
    artefacts: Mapping[str, tuple[Manifest, Mapping[str, Any]]],
) -> list[Section]:
    """Accuracy against size, where something was compressed; nothing else.

    A model takes what its weights take on disk; one that stands on a frozen backbone takes that too. Artefacts are
    those of the newest step, which alone have been trained alike.

    Args:
        module: what was trained, as large as its own checkpoints are with the backbone.
        trained: scores of it, by what they are called.
        artefacts: manifest and entry of scores of each artefact, by what it is called.
    """
    newest = max((entry["step"] for _, entry in artefacts.values()), default=0)
    found = {name: pair for name, pair in artefacts.items() if pair[1]["step"] == newest}
    if not any(manifest.facts.get(COMPRESSED) for manifest, _ in found.values()):
        return []
    split = "test" if any("test/accuracy" in entry["scores"] for _, entry in found.values()) else "val"
    key, whole, backbone = f"{split}/accuracy", num_bytes(module), num_bytes(getattr(module, "backbone", None))
    sizes = {name: stored_bytes(manifest, backbone) for name, (manifest, _) in found.items()}
    scores = {name: entry["scores"] for name, (_, entry) in found.items()}
    points = [
        Point(name, sizes.get(name, whole) / MEGABYTE, round(100 * own[key], 2))  # counted in float32 by some
        for name, own in {**trained, **scores}.items()
        if key in own
    ]
    meanings = ("megabytes of weights", f"{split} accuracy, %")
    return [tradeoff_section(points, *meanings, from_zero=True)] if points else []


def stored_bytes(manifest: Manifest, backbone: int) -> int:
    """Bytes of the weights of a checkpoint, and of the frozen ``backbone`` where they are only what stands on one."""
    files = sum(manifest.files[name].bytes for name in manifest.tensors if name != STATE)
    return files + (0 if manifest.base is None else backbone)


def num_bytes(module: nn.Module | None) -> int:
    """Bytes of all parameters and buffers, of sharded ones whole."""
    tensors = [] if module is None else [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
