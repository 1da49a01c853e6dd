"""Adapter sets beside a frozen backbone, trained stage by stage: what every such LightningModule shares.

Which sets there are, when a stage begins, and what a checkpoint holds: the *delta* of what trains, over a backbone that
is named by its digest. Once the backbone's weights are no longer those that its source has, as those of a pruned model,
the module is *self-contained*: its checkpoints hold them too, and what is derived from them. So it is from the start
where the backbone itself trains.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim.lr_scheduler import LambdaLR

from fulgurite.backbones.base import FrozenBackbone
from fulgurite.checkpoints import Manifest, MismatchError
from fulgurite.methods.adapters.bank import AdapterBank, Placement
from fulgurite.methods.schedules import Schedule, StagedSchedule, WarmupLinear
from fulgurite.methods.sharding import reshard
from fulgurite.modules.facts import check_epochs, describe_difference, read_facts, require_same_tensors, stage_names
from fulgurite.modules.optimization import (
    ParamGroup,
    apply_options,
    group_options,
    grouped,
    optimizer_facts,
    require_same_optimizer,
    steps_of_stages,
)
from fulgurite.modules.sharding import shard_blocks
from fulgurite.samples import Collator, DataInfo, Stage, stage_of

INITIAL = "initial"
BACKBONE = "backbone."
# Among a checkpoint's facts: it holds the backbone, of this digest, or one that was trained from that of this digest.
BACKBONE_DIGEST = "backbone_digest"


class AdaptedModule(pl.LightningModule, ABC):
    """One live adapter set, a copy of it before training, and the sets that a subclass adds; or a whole backbone.

    A subclass says what a batch is for (the steps), and in `build` what else depends on the data.

    Args:
        backbone: frozen pretrained model.
        adapters: what trains beside the frozen backbone, and where; None trains the backbone itself.
        optimizer: builds the optimizer from parameter groups; None is AdamW. Of another class all options are its own.
        schedule: learning-rate factor within a stage; every stage starts it afresh.
        param_groups: tensors with their own learning rate; the rest uses the optimizer's.
        frozen: patterns of the backbone's parameters that do not train without adapters; None takes its own.

    Raises:
        ValueError: nothing would train, or ``frozen`` is given with adapters.
    """

    saved_parts: tuple[str, ...] = ("bank",)
    saved_buffers: tuple[str, ...] = ()
    shape_option = "adapters"  # that the shapes of what a checkpoint holds depend on

    def __init__(
        self,
        backbone: FrozenBackbone,
        adapters: list[Placement] | None,
        optimizer: OptimizerCallable | None = None,
        schedule: Schedule | None = None,
        param_groups: list[ParamGroup] | None = None,
        frozen: list[str] | None = None,
    ) -> None:
        if adapters is not None and not adapters:
            raise ValueError("model.init_args.adapters is empty: name placements, or null to train the backbone itself")
        if adapters is not None and frozen is not None:
            raise ValueError("model.init_args.frozen is for training the backbone itself: leave it or adapters out")
        super().__init__()
        self.backbone = backbone
        self.bank = AdapterBank(backbone, adapters or [])
        self.tuned = self.self_contained = adapters is None
        if self.tuned:
            backbone.unfreeze(frozen)
        self.optimizer, self.schedule = optimizer or torch.optim.AdamW, schedule or WarmupLinear()
        self.param_groups = param_groups or []
        self.info: DataInfo | None = None
        self.data_info: DataInfo | None = None
        self.stages: tuple[Stage, ...] = ()
        self.stage = -1
        self.stage_complete = False
        self.optimizer_facts: dict[str, Any] = {}
        self.resumed_optimizer: dict[str, Any] | None = None

    def collator(self, stage: str) -> Collator:
        """The backbone's collator; usable without a trainer."""
        return self.backbone.collator(stage)

    def feature_extractor(self) -> Any:
        """What a feature cache computes for this module; None where it needs none."""
        return self.backbone.feature_extractor()

    def set_names(self, stages: Sequence[Stage]) -> list[str]:
        """Names of the adapter sets beside the live one, in column order."""
        return [INITIAL]

    def prepare(self, info: DataInfo, stages: Sequence[Stage]) -> None:
        """Build everything whose shape depends on the data. The same call again does nothing.

        Raises:
            MismatchError: the module is already built for other data.
        """
        if self.info is not None:
            if (info, stage_names(stages)) != (self.info, stage_names(self.stages)):
                raise MismatchError(describe_difference(self.info, info, self.stages, stages))
            self.stages = tuple(stages)
            return
        for name in self.set_names(stages):
            if name not in self.bank.names:
                self.bank.add(name)
        self.load_initial()
        self.base_digest = self.backbone.fingerprint  # before a strategy shards or casts the weights
        self.info, self.stages = info, tuple(stages)
        self.build(info, self.stages)

    @abstractmethod
    def build(self, info: DataInfo, stages: Sequence[Stage]) -> None:
        """What else of the module has a shape that depends on the data; called once for these data."""

    def load_initial(self) -> None:
        """Give ``initial`` and the live set the same start, the backbone's own adapters where it brings some."""
        own = self.backbone.initial_adapters()
        if own is not None:
            self.bank.load_sites("live", own)
        self.bank.copy("live", INITIAL)

    def take_backbone(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the backbone of a self-contained checkpoint in the place of the own one, before `prepare`.

        Raises:
            MismatchError: other names or shapes than the backbone's.
        """
        own = self.backbone.state_dict()
        given = {name.removeprefix(BACKBONE): value for name, value in tensors.items() if name.startswith(BACKBONE)}
        given = {name: value for name, value in given.items() if name not in self.backbone.derived}
        require_same_tensors(own, given, option="backbone")
        self.backbone.load_state_dict(given)
        self.backbone.refresh()
        self.self_contained = True

    def initial_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a new run takes from a checkpoint's tensors: its live set, as the start of this run's sets; all of them
        where the backbone itself trains."""
        if self.tuned:
            return dict(tensors)
        live = {n: t for n, t in tensors.items() if n.startswith("bank.sets.live.")}
        return {**live, **{n.replace(".live.", f".{INITIAL}.", 1): t for n, t in live.items()}}

    def setup(self, stage: str) -> None:
        """Build from the DataModule's facts; a checkpoint's own facts win when one is loaded later.

        Questions without a vocabulary, as `predict` may have, leave all to the checkpoint.
        """
        datamodule = self.trainer.datamodule
        self.data_info = datamodule.info()
        if stage == "fit" or (self.info is None and self.data_info.answers):
            self.prepare(self.data_info, datamodule.stages())

    def configure_model(self) -> None:
        """Shard blocks and root under FSDP2; nothing elsewhere."""
        if self.device_mesh is None or isinstance(self, FSDPModule):
            return
        shard_blocks(self, self.backbone, self.backbone.spec, self.device_mesh["data_parallel"])

    def on_train_start(self) -> None:
        """A resume in the middle of an epoch skips its start. What is configured beats a checkpoint's options."""
        if self.resumed_optimizer is not None:
            apply_options(self.optimizers().optimizer, self.lr_schedulers(), self.optimizer_options)
            self.resumed_optimizer = None
        self.stage_complete = False
        self.enter_stage()

    def on_train_epoch_start(self) -> None:
        """Stages begin at epoch starts, and adapters on a schedule take their values of the epoch."""
        self.stage_complete = False
        self.enter_stage()
        for adapter in self.bank.adapters_of("live").values():
            if hasattr(adapter, "start_epoch"):
                adapter.start_epoch(self.trainer.current_epoch)

    @property
    def ends_stage(self) -> bool:
        """Whether the current epoch is the last one of its stage."""
        return self.trainer.current_epoch + 1 == sum(s.epochs for s in self.stages[: self.stage + 1])

    def on_train_epoch_end(self) -> None:
        """Note the end of a stage; checkpoints of this epoch are written after this, and say so."""
        self.stage_complete = self.ends_stage

    def enter_stage(self) -> None:
        """Fresh optimizer state when a stage begins. Idempotent."""
        stage = stage_of(self.stages, self.trainer.current_epoch)
        if stage == self.stage:
            return
        if self.stage >= 0:
            reshard(self)
            self.begin_stage()
            for optimizer in self.trainer.optimizers:
                optimizer.state.clear()
        self.stage = stage

    def begin_stage(self) -> None:
        """What happens to the live set between two stages: here it simply goes on."""

    def on_fit_start(self) -> None:
        """Epochs beyond the last stage do not exist. Lightning leaves the mode of training to the module."""
        self.train()
        total, asked = sum(s.epochs for s in self.stages), self.trainer.max_epochs
        if asked is None or asked < 0 or asked > total:
            self.trainer.fit_loop.max_epochs = total

    def trained(self) -> dict[str, Tensor]:
        """What the optimizer gets, by the names that `ParamGroup` patterns are searched in: the live set, or
        ``backbone...`` of what trains there."""
        if not self.tuned:
            return dict(self.bank.sets["live"].named_parameters())
        return {f"{BACKBONE}{name}": p for name, p in self.backbone.named_parameters() if p.requires_grad}

    def configure_optimizers(self) -> Any:
        """`trained`, with one schedule over the global step restarted at every stage."""
        named = self.trained()
        optimizer = self.optimizer(grouped(named, self.param_groups))
        staged = StagedSchedule(self.schedule, steps_of_stages(self.stages, self.trainer))
        # A function is left out of checkpoints, an object is not.
        scheduler = LambdaLR(optimizer, lambda step: staged(step))
        facts = optimizer_facts(optimizer, named)
        if self.resumed_optimizer is not None:
            require_same_optimizer(self.resumed_optimizer, facts)
        self.optimizer_facts, self.optimizer_options = facts, group_options(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def state_dict(self, *args: Any, prefix: str = "", keep_vars: bool = False, **kwargs: Any) -> dict[str, Any]:
        """The delta: `saved_parts` and `saved_buffers`; of a self-contained module the backbone too."""
        reshard(self)
        out: dict[str, Any] = {}
        for part in self.saved_parts:
            module = getattr(self, part, None)
            if module is not None:
                module.state_dict(destination=out, prefix=f"{prefix}{part}.", keep_vars=keep_vars)
        for name in self.saved_buffers if self.info is not None else ():
            out[prefix + name] = getattr(self, name) if keep_vars else getattr(self, name).detach()
        if self.self_contained:
            self.backbone.state_dict(destination=out, prefix=f"{prefix}{BACKBONE}", keep_vars=keep_vars)
            out |= {f"{prefix}{BACKBONE}{name}": self.backbone.get_buffer(name) for name in self.backbone.derived}
        return out

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Where ``strict``, over everything that the delta holds; one error lists all differences.

        Raises:
            MismatchError: a tensor is missing, unknown, or of another shape.
        """
        if strict:
            require_same_tensors(self.state_dict(), state_dict, option=self.shape_option)
        # Names and shapes were compared; what is missing is the frozen backbone under a delta. What is derived from the
        # backbone is no part of its own state.
        derived = {f"{BACKBONE}{name}": self.backbone.get_buffer(name) for name in self.backbone.derived}
        with torch.no_grad():
            for name in derived.keys() & state_dict.keys():
                derived[name].copy_(state_dict[name])
        rest = {name: value for name, value in state_dict.items() if name not in derived}
        return super().load_state_dict(rest, strict=False, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record what the weights stand on: backbone digest, data facts, stage."""
        assert self.info is not None
        if self.self_contained:
            stands_on: dict[str, Any] = {"kind": "self-contained", "base": None, BACKBONE_DIGEST: self.base_digest}
        else:
            stands_on = {"kind": "delta", "base": {"source": self.backbone.source, "digest": self.base_digest}}
        checkpoint["fulgurite"] = {
            **checkpoint.get("fulgurite", {}),
            **stands_on,
            "info": asdict(self.info),
            "info_digest": self.info.digest,
            "stages": [asdict(s) for s in self.stages],
            "stage": self.stage,
            "stage_complete": self.stage_complete,
            "optimizer": self.optimizer_facts,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build for the checkpoint's data and refuse another backbone.

        Raises:
            MismatchError: other vocabulary, domains or backbone than the checkpoint's, or no such checkpoint at all.
        """
        facts = checkpoint.get("fulgurite", {})
        info, stages = read_facts(facts)
        if self.trainer.state.fn == "fit":
            check_epochs(stages, self.stages, facts["stage"])
            self.resumed_optimizer = facts["optimizer"]
        elif info != self.info:
            self.forget()
        self.restore(facts)
        Manifest(kind=facts["kind"], base=facts["base"]).require_base(self.base_digest, "the checkpoint")

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Build for the data that a checkpoint's facts describe, at its stage; the tensors come after this.

        Raises:
            MismatchError: the module is already built for other data.
        """
        info, stages = read_facts(facts)
        own = self.stages if self.info is not None else stages
        self.prepare(info, stages)
        self.stages = own
        self.stage = facts["stage"]
        self.self_contained = BACKBONE_DIGEST in facts
        if self.self_contained:
            self.base_digest = facts[BACKBONE_DIGEST]

    def forget(self) -> None:
        """Drop what was built for other data, so that a checkpoint's own facts can be used instead."""
        if isinstance(self, FSDPModule):
            raise MismatchError(
                "this DataModule has other answers or domains than the checkpoint: evaluate on it in one process "
                "or under ddp, where the model can be rebuilt"
            )
        for name in self.set_names(self.stages):
            if name != INITIAL and name in self.bank.names:
                self.bank.remove(name)
        self.info = None
