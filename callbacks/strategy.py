"""FSDP2 and tensor parallelism with the same checkpoints as every other strategy."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch import strategies
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fulgurite.callbacks.checkpoint_io import DigestCheckpointIO, manifest_fields, stored_form
from fulgurite.callbacks.shard_writer import write_shards
from fulgurite.checkpoints.shards import Stored
from fulgurite.methods.sharding import reshard
from fulgurite.modules.sharding import distribute


class ModelParallelStrategy(strategies.ModelParallelStrategy):
    """Lightning's strategy of this name, with checkpoints that any strategy and number of ranks can load.

    A delta over a frozen backbone (see `AdaptedModule`) is small: all ranks take part in gathering it and its optimizer
    state, rank 0 holds and writes them. Anything else is full fine-tuning: every rank writes the slices that it holds,
    into one folder on a file system that all ranks share. On loading every rank reads one tensor at a time and keeps
    its own slice, without communication.

    Args:
        data_parallel_size: ranks that share the parameters and split the data; ``"auto"`` is all of them
            divided by ``tensor_parallel_size``.
        tensor_parallel_size: ranks that split single layers; the module's ``configure_model`` must do it.
        process_group_backend: ``"nccl"`` on GPUs and ``"gloo"`` on CPUs unless given.
        timeout: after which a collective that not all ranks have joined fails.
    """

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: int = 1,
        process_group_backend: str | None = None,
        timeout: timedelta = default_pg_timeout,
    ) -> None:
        super().__init__(data_parallel_size, tensor_parallel_size, False, process_group_backend, timeout)

    def setup_environment(self) -> None:
        """Fix the size of the data-parallel group once the number of ranks is known."""
        if self._data_parallel_size == "auto":
            self._data_parallel_size = self.num_nodes * self.num_processes // self._tensor_parallel_size
        super().setup_environment()

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """`DigestCheckpointIO` unless the trainer was given another plugin."""
        if self._checkpoint_io is None:
            self._checkpoint_io = DigestCheckpointIO()
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands the optimizer states over after the module has seen the checkpoint."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state, with sharded tensors as they are."""
        reshard(self.lightning_module)
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """State of ``optimizer`` by index of parameter, with sharded tensors as they are."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        return optimizer.state_dict()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write the folder; all ranks must call it, and the path is that of rank 0."""
        path = self.broadcast(filepath)
        fields = manifest_fields(checkpoint)
        if fields.get("kind") != "delta" and isinstance(self.checkpoint_io, DigestCheckpointIO):
            write_shards(path, *stored_form(checkpoint), fields)
            return
        sharded = ("state_dict", "optimizer_states")
        whole = checkpoint | {k: gather(checkpoint[k], self.is_global_zero) for k in sharded if k in checkpoint}
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(whole, path, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """The checkpoint, on every rank; whole tensors are mapped from the file, slices stay in theirs."""
        path = self.broadcast(checkpoint_path)
        if isinstance(self.checkpoint_io, DigestCheckpointIO):
            return self.checkpoint_io.read(path, lazy=True)
        return self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Give every rank its slices of ``checkpoint["state_dict"]``; strictness as in torch."""
        module = self.lightning_module
        reshard(module)
        targets = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        state = checkpoint["state_dict"].copy()
        for name, value in state.items():
            state[name] = distribute(value, targets.get(name), name)
        module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give every rank its slices of the optimizer states."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                index: {
                    key: distribute(value, parameters[index], f"optimizer state {index}/{key}")
                    if isinstance(value, Stored) or (isinstance(value, Tensor) and value.dim() > 0)
                    else value
                    for key, value in entry.items()
                }
                for index, entry in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


@torch.no_grad()
def gather(value: Any, keep: bool) -> Any:
    """``value`` with every sharded tensor made whole, copied to the CPU where ``keep``, else emptied.

    A collective: all ranks must call it with values of the same form.
    """
    if isinstance(value, DTensor):
        whole = value.full_tensor()
        return whole.cpu() if keep else whole.new_empty(0)
    if isinstance(value, dict):
        gathered = value.copy()
        gathered.update({key: gather(item, keep) for key, item in value.items()})
        return gathered
    if isinstance(value, (list, tuple)):
        return type(value)(gather(item, keep) for item in value)
    return value
