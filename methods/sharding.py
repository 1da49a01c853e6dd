"""Weights of which every process holds a slice (FSDP2): whole ones for a moment, and back to slices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def reshard(module: nn.Module) -> None:
    """Put every FSDP2 unit back to slices, to read and write values in place.

    After a forward pass without gradients some units still hold whole parameters.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether a unit of FSDP2 lies inside."""
    return any(isinstance(part, FSDPModule) for part in model.modules())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; itself where it is no slice. A collective where it is one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def write(target: Tensor, value: Tensor) -> None:
    """Copy ``value``, which every process holds, into ``target``, or this process's slice of it. No communication."""
    if isinstance(target, DTensor):
        mesh = target.device_mesh
        value = value.to(mesh.device_type, target.dtype)
        value = distribute_tensor(value, mesh, target.placements, src_data_rank=None)
    target.copy_(value)


class OnDemand(Mapping[str, Tensor]):
    """Tensors that are made when they are asked for: all processes ask for the same ones in the same order.

    Args:
        makers: what makes each, by name.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self.makers = makers

    def __getitem__(self, name: str) -> Tensor:
        return self.makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)

    def __contains__(self, name: object) -> bool:
        return name in self.makers
