"""Weights of another checkpoint as the start of a new run."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from fulgurite.checkpoints import MismatchError, naming_another, read_manifest
from fulgurite.methods.quantization.storage import load_dense
from fulgurite.modules.adapted import BACKBONE_DIGEST, AdaptedModule

MAX_LISTED = 10


class InitialWeights(Callback):
    """Copies the weights of a checkpoint folder into the module, and nothing else: no optimizer, step or
    epoch.

    Hook: ``on_fit_start``, when the module is set up and wrapped, before the first step; a resumed run does
        not have this callback. A module with ``initial_weights(tensors)`` says which of the file's tensors go
        where. Strict over what trains: every tensor must have a place in the module, and every trained
        parameter must be in the file. Frozen parameters may be missing. A backbone in the file, as that of a pruned
        model, takes the place of the module's in ``setup``, before a strategy shards it and before answers are
        embedded. Every rank reads the file.

    Args:
        path: a checkpoint folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the backbone, where the file has one. Raises ``MismatchError`` where it does not fit."""
        if stage != "fit" or not isinstance(pl_module, AdaptedModule):
            return
        with naming_another(self.path):
            if BACKBONE_DIGEST in read_manifest(self.path).facts:
                pl_module.take_backbone(load_dense(self.path))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the weights. Raises ``MismatchError`` with all that does not fit."""
        with naming_another(self.path):
            weights, manifest = load_dense(self.path), read_manifest(self.path)
        if hasattr(pl_module, "base_digest"):
            manifest.require_base(pl_module.base_digest, str(self.path))
        if hasattr(pl_module, "initial_weights"):
            weights = pl_module.initial_weights(weights)
        targets = {**dict(pl_module.named_parameters()), **dict(pl_module.named_buffers())}
        trained = {name for name, parameter in pl_module.named_parameters() if parameter.requires_grad}
        problems = [f"{name}: trained here, not in the file" for name in sorted(trained - weights.keys())]
        for name, value in weights.items():
            if name not in targets:
                problems.append(f"{name}: in the file, not in this module")
            elif value.shape != targets[name].shape:
                problems.append(f"{name}: file {tuple(value.shape)}, module {tuple(targets[name].shape)}")
        if problems:
            shown = "\n  ".join(problems[:MAX_LISTED])
            options = f".{pl_module.shape_option}" if isinstance(pl_module, AdaptedModule) else ""
            raise MismatchError(
                f"init_from {self.path}: {len(problems)} tensors do not fit this module:\n  {shown}\n"
                f"Set model.init_args{options} to what the checkpoint was made with (see its config.yaml)."
            )
        # Every name and shape was compared; only what is frozen may be missing.
        trainer.strategy.load_model_state_dict({"state_dict": weights}, strict=False)
