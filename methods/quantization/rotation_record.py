"""What rotating changed in a model beside the values of its weights, as plain data, and done again to another one.

A rotated model is that of its library, but for norms that lost their parameters, a head that is no longer tied and
biases that took the shift of a norm, and rotations of the inputs of some layers at run time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fulgurite.checkpoints import DamagedError
from fulgurite.methods.quantization.hadamard import Rotation
from fulgurite.methods.quantization.norm_fusing import neutralize

ROTATION = "rotation"  # where a manifest has it: the class among its settings, the record among its facts


@dataclass(frozen=True)
class RotationRecord:
    """What was done to a model, as plain values.

    Args:
        streams: width -> rotation of the residual streams of that width.
        online: linear layer -> rotation of its input at run time.
        fused: norm -> what it was.
        added: names of the parameters that the model did not have.
        removed: (D,) parameters that it has no more -> D.
    """

    streams: Mapping[int, Rotation]
    online: Mapping[str, Rotation] = field(default_factory=dict)
    fused: Mapping[str, str] = field(default_factory=dict)
    added: tuple[str, ...] = ()
    removed: Mapping[str, int] = field(default_factory=dict)

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "streams": {str(width): rotation.data() for width, rotation in self.streams.items()},
            "online": {name: rotation.data() for name, rotation in self.online.items()},
            "fused": dict(self.fused),
            "added": list(self.added),
            "removed": dict(self.removed),
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> RotationRecord:
        """From what `data` gave."""
        streams = {int(width): Rotation.from_data(rotation) for width, rotation in data["streams"].items()}
        online = {name: Rotation.from_data(rotation) for name, rotation in data["online"].items()}
        return cls(streams, online, data["fused"], tuple(data["added"]), data["removed"])


def named_as_before(tensors: Mapping[str, Tensor], record: RotationRecord) -> dict[str, Tensor]:
    """The tensors of a rotated model by the names of the model before: what it lost is 0, what it gained is left out.

    Raises:
        DamagedError: what it gained is not there.
    """
    if missing := [name for name in record.added if name not in tensors]:
        raise DamagedError(f"{missing[0]}, which the model has since it was rotated, is missing: it is not whole")
    kind = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)
    lost = {name: torch.zeros(size, dtype=kind) for name, size in record.removed.items()}
    return {name: tensor for name, tensor in tensors.items() if name not in record.added} | lost


def restore(model: nn.Module, record: RotationRecord, tensors: Mapping[str, Tensor]) -> None:
    """Make a model, in place, what the rotated one was, where it has the values of `named_as_before`.

    Args:
        model: as its library builds it.
        record: of the rotation.
        tensors: of the rotated model, by name.
    """
    for name, kind in record.fused.items():
        if kind == "layer":
            neutralize(model, name, kind)
    for name in record.added:
        layer, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(layer), attribute, nn.Parameter(tensors[name].clone()))
    install_online(model, record)


class RotateInput:
    """A hook that rotates the first input of a linear layer. Hooks that are added later see it rotated."""

    def __init__(self, rotation: Rotation) -> None:
        self.rotation = rotation

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """What the module is called with instead."""
        return (self.rotation(args[0]), *args[1:])


def install_online(model: nn.Module, record: RotationRecord) -> list[RemovableHandle]:
    """Rotate inputs at run time, in a model with rotated weights; names and weights stay as they are.

    Raises:
        ValueError: a layer rotates its input already.
    """
    handles = []
    for name, rotation in record.online.items():
        module = model.get_submodule(name)
        if any(isinstance(hook, RotateInput) for hook in module._forward_pre_hooks.values()):
            raise ValueError(f"{name} rotates its input already")
        handles.append(module.register_forward_pre_hook(RotateInput(rotation)))
    return handles
