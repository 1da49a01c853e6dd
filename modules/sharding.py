"""FSDP2 units: how a module is cut into them, and how values are brought to slices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from fulgurite.backbones.base import FrozenBackbone
from fulgurite.checkpoints import MismatchError
from fulgurite.checkpoints.shards import Stored
from fulgurite.methods.structure import ModelSpec


def shard_blocks(module: nn.Module, backbone: FrozenBackbone, spec: ModelSpec, mesh: DeviceMesh) -> None:
    """Make every block of the backbone's towers a unit, and the rest of ``module`` the root unit.

    Modules of blocks that the backbone calls apart are units of their own. Frozen scalars, which FSDP2 refuses, stay
    whole.
    """
    backbone.to(memory_format=torch.contiguous_format)  # FSDP2 takes no channels-last weights
    for name in backbone.called_apart:
        fully_shard(backbone.get_submodule(name), mesh=mesh)
    for tower in spec.towers:
        for name in spec.block_names(backbone, tower.name):
            fully_shard(backbone.get_submodule(name), mesh=mesh)
    scalars = {each for each in module.parameters() if each.dim() == 0 and not each.requires_grad}
    fully_shard(module, mesh=mesh, ignored_params=scalars)


@torch.no_grad()
def distribute(value: Any, target: Tensor | None, name: str) -> Any:
    """``value`` cut as ``target`` is, or as it is where ``target`` is whole.

    No communication: every rank has the whole ``value``.
    Raises `MismatchError` if the shapes differ.
    """
    if isinstance(value, Stored):
        value = value.load()
    if not isinstance(target, DTensor):
        return value
    if value.shape != target.shape:
        raise MismatchError(
            f"{name} has shape {tuple(value.shape)} in the checkpoint and {tuple(target.shape)} in this run; "
            f"load it with the settings that it was saved with"
        )
    local = value.to(target.device_mesh.device_type)
    return distribute_tensor(local, target.device_mesh, target.placements, src_data_rank=None)
