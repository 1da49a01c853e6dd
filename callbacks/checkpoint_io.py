"""Lightning checkpoints as verified folders."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from torch import Tensor

from fulgurite.checkpoints import (
    CheckpointError,
    DamagedError,
    load_document,
    load_tensors,
    naming_another,
    read_manifest,
    remove,
    save_checkpoint_folder,
)
from fulgurite.checkpoints.shards import Stored
from fulgurite.checkpoints.store import sharded_tensors
from fulgurite.methods.quantization.storage import COMPRESSED, dense

MANIFEST_KEY = "fulgurite"
METRICS_KEY = "fulgurite_metrics"
_FIELDS = ("kind", "base", "structure", "parents", "settings", "metrics")


class DigestCheckpointIO(CheckpointIO):
    """Saves a Lightning checkpoint as a folder with a digest of every tensor; loading checks them all.

    ``weights.safetensors`` holds ``checkpoint["state_dict"]``; ``state.json`` and ``state.safetensors``
    everything else (loops, callbacks, optimizers, schedules, hyper-parameters). Compressed weights, which steps write,
    come back whole. What a module puts under
    ``checkpoint["fulgurite"]`` in its ``on_save_checkpoint`` becomes the manifest: ``kind``, ``base``,
    ``structure``, ``parents``, ``settings``, ``metrics``, and any other entry under ``facts``. Without it the
    checkpoint counts as self-contained, its settings are the hyper-parameters.

    Values that JSON and tensors cannot hold are refused with their key path. Called on rank 0 only for
    saving, on every rank for loading. Pass it as ``Trainer(plugins=[DigestCheckpointIO()])``.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Publish ``checkpoint`` as the folder ``path``; what was there goes once the new one is complete.

        Raises:
            CheckpointError: a value that cannot be stored, or a write that the operating system refused.
            TypeError: ``storage_options`` is given; there are none.
        """
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} takes no storage_options, got {storage_options!r}")
        save_checkpoint_folder(path, *stored_form(checkpoint), **manifest_fields(checkpoint))

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable | torch.device | str | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """The checkpoint as it was saved, on the CPU, after every byte has been checked.

        ``map_location`` and ``weights_only`` change nothing: tensors are mapped from the file, and nothing
        else than plain values can be in it. Raises `CheckpointError`; about damage, it names the newest good
        checkpoint beside this one.
        """
        return self.read(path)

    def read(self, path: str | Path, lazy: bool = False) -> dict[str, Any]:
        """As `load_checkpoint`; with ``lazy``, tensors stored in slices stay in their files as `Stored`."""
        with naming_another(path):
            manifest = read_manifest(path)
            checkpoint = load_document(path, "state", lazy)
            slices = sharded_tensors(path, "weights")
            if lazy and slices:
                plain = (name for name in manifest.tensors["weights.safetensors"])
                weights = {**load_tensors(path, "weights", plain), **{name: Stored(slices, name) for name in slices}}
            else:
                weights = dense(load_tensors(path, "weights"), manifest.facts.get(COMPRESSED, {}))
        try:
            checkpoint["state_dict"] = _put_tensors(checkpoint["state_dict"], weights)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedError(f"{path}/state.json describes no state_dict: {error!r}") from error
        if read_manifest(path).digest != manifest.digest:
            raise CheckpointError(f"{path} was replaced by another process while it was read; load it again")
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete the folder at once: no reader meets half of it."""
        remove(path)


def stored_form(checkpoint: Mapping[str, Any]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensor files and documents of a Lightning checkpoint, as arguments of `save_checkpoint_folder`."""
    state = dict(checkpoint)
    weights, state["state_dict"] = _take_tensors(state.get("state_dict", {}))
    return {"weights": weights}, {"state": state}


def manifest_fields(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's entries for a Lightning checkpoint, as arguments of `save_checkpoint_folder`."""
    given = dict(checkpoint.get(MANIFEST_KEY, {}))
    fields = {name: given.pop(name) for name in _FIELDS if name in given}
    fields.setdefault("settings", checkpoint.get("hyper_parameters", {}))
    fields.setdefault("metrics", checkpoint.get(METRICS_KEY, {}))
    facts = {name: checkpoint[name] for name in ("epoch", "global_step") if name in checkpoint}
    return {**fields, "facts": facts | given}


def _take_tensors(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a state dict, and what makes it whole again: order, other values, module versions."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    rest = {
        "order": None if len(tensors) == len(state) else list(state),
        "values": {name: value for name, value in state.items() if name not in tensors},
        # torch writes version 1 for every module that does not say otherwise, and reads a missing one alike.
        "versions": {
            name: dict(entry) for name, entry in getattr(state, "_metadata", {}).items() if entry.get("version", 1) != 1
        },
    }
    return tensors, rest


def _put_tensors(rest: Mapping[str, Any], tensors: dict[str, Tensor]) -> OrderedDict[str, Any]:
    values = {**tensors, **rest["values"]}
    state = OrderedDict((name, values[name]) for name in rest["order"] or values)
    state._metadata = OrderedDict(rest["versions"])
    return state
