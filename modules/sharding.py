"""FSDP2 units: how a module is cut into them, and how values are brought back to slices."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from fulgurite.methods.structure import ModelSpec


def shard_blocks(module: nn.Module, backbone: nn.Module, spec: ModelSpec, mesh: DeviceMesh) -> None:
    """Make every block of the backbone's towers a unit, and the rest of ``module`` the root unit."""
    backbone.to(memory_format=torch.contiguous_format)  # FSDP2 takes no channels-last weights
    for tower in spec.towers:
        for name in spec.block_names(backbone, tower.name):
            fully_shard(backbone.get_submodule(name), mesh=mesh)
    fully_shard(module, mesh=mesh)


def reshard(module: nn.Module) -> None:
    """Put every FSDP2 unit back to slices, to read and write values in place.

    After a forward pass without gradients some units still hold whole parameters.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
