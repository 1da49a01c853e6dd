"""A backbone's weights out of a run of this package that trained the backbone itself."""

from __future__ import annotations

from pathlib import Path

import torch

from fulgurite.backbones.base import FrozenBackbone
from fulgurite.backbones.frozenbilm_checkpoint import state_mismatches
from fulgurite.checkpoints import MismatchError, MissingError, newest_checkpoint, read_manifest
from fulgurite.checkpoints.atomic import resolve
from fulgurite.checkpoints.manifest import MANIFEST_NAME
from fulgurite.checkpoints.structure import MODULES
from fulgurite.methods.quantization.storage import load_dense

HOME = "backbone."
ADAPTERS = "bank.sets."
MAX_LISTED = 10


def checkpoint_folder(path: Path) -> Path:
    """The checkpoint ``path``, or the newest of the run ``path``. Raises MissingError where there is none."""
    if (resolve(path) / MANIFEST_NAME).is_file():
        return path
    newest = newest_checkpoint(path)
    if newest is None:
        raise MissingError(
            f"backbone.init_args.checkpoint={path}: expected a checkpoint folder, or the folder of a run with one"
        )
    return newest


@torch.no_grad()
def fill_from_run(backbone: FrozenBackbone, path: Path) -> None:
    """Put the backbone of a self-contained checkpoint, every byte of it verified, in the place of the own one.

    Args:
        backbone: whose parameters and buffers are written.
        path: a checkpoint folder, or the folder of a run, of which the newest checkpoint is taken.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        MismatchError: it is a delta, holds adapters or rebuilt modules, or has tensors of other names or shapes;
            nothing is changed then.
    """
    folder = checkpoint_folder(Path(path))
    manifest = read_manifest(folder)
    if manifest.kind != "self-contained":
        raise MismatchError(
            f"{folder} is a delta over {(manifest.base or {}).get('source')} and holds no backbone: train the backbone "
            "itself (model.init_args.adapters: null), or give the delta to --ckpt_path or --init_from"
        )
    if manifest.structure.get(MODULES):
        raise MismatchError(
            f"{folder} has {len(manifest.structure[MODULES])} modules that its backbone's class does not make, as "
            "after pruning of whole units: take the checkpoint that it was made from"
        )
    tensors = load_dense(folder)
    adapters = [name for name in tensors if name.startswith(ADAPTERS)]
    if adapters:
        raise MismatchError(
            f"{folder} has {len(adapters)} tensors of adapters beside its backbone, without which it is another model: "
            "take a run that trained the backbone itself (model.init_args.adapters: null)"
        )
    given = {name.removeprefix(HOME): tensor for name, tensor in tensors.items() if name.startswith(HOME)}
    given = {name: tensor for name, tensor in given.items() if name not in backbone.derived}
    own = backbone.state_dict()
    if lines := state_mismatches(given, own):
        listed = "\n  ".join(lines[:MAX_LISTED])
        raise MismatchError(
            f"{len(lines)} tensors of {folder} do not fit this {type(backbone).__name__}:\n  {listed}\n"
            "Set model.init_args.backbone to what the run was made with (see its config.yaml)."
        )
    for name, tensor in own.items():
        tensor.copy_(given[name])
    backbone.refresh()
