"""Continual video question answering with dynamic adapter merging (DAM, arXiv 2403.08755).

Domains arrive one after the other inside one ``trainer.fit``. One *live* adapter set trains; at the end of a stage it
is copied into the frozen set of that stage, and goes on from there (or from the start) with fresh optimizer state. A
router sees the frozen model's features of every training sample. At test time the domain is unknown: the router's
weights merge the sets per sample.

Legend: B batch, T stages, N domains, A answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torchmetrics.classification import MulticlassConfusionMatrix

from fulgurite.backbones.base import VideoQABackbone
from fulgurite.methods.adapters.bank import Placement
from fulgurite.methods.routing.base import Router
from fulgurite.methods.routing.centroid import CentroidRouter
from fulgurite.methods.schedules import Schedule
from fulgurite.methods.sharding import reshard
from fulgurite.metrics.answer_counts import mean_of_known
from fulgurite.metrics.continual_accuracy import continual_scores
from fulgurite.modules.adapted import INITIAL
from fulgurite.modules.evaluation import evaluation_mode
from fulgurite.modules.modes import MODE_NAMES, MODES, Mode, logits_of_rows, mode_weights
from fulgurite.modules.optimization import ParamGroup
from fulgurite.modules.stage_sets import StageSets
from fulgurite.modules.video_qa import VideoQA
from fulgurite.reports.page import Section
from fulgurite.reports.video_qa import ContinualTest, sections_of_continual
from fulgurite.samples import Batch, DataError, DataInfo, Sample, Stage, first_stages

BEST = "best"


class ContinualVideoQA(StageSets, VideoQA):
    """Adapters per domain, a router, and per-sample merging.

    Args:
        backbone: frozen video-language model.
        adapters: what trains, and where.
        router: gives mixing weights from features of the frozen model; default is DAM's (top 2, temperature 0.01).
        second_router: a router evaluated beside the first one as mode ``second_router``; it changes nothing else.
        mode: how the model answers in validation and prediction.
        modes: what ``test`` evaluates, each after every stage.
        start_from: a new stage starts from the previous stage's adapters, or from those before any stage.
        selection: what a stage keeps: its ``last`` epoch, or the epoch where the live set alone has the ``best``
            validation accuracy on the stage's domains (strictly greater, as published; needs the DataModule to
            validate every epoch). The validation at the end of a stage reports what is kept.
        optimizer: see `VideoQA`.
        schedule: see `VideoQA`.
        param_groups: see `VideoQA`.
    """

    saved_parts = ("bank", "router", "second_router")

    def __init__(
        self,
        backbone: VideoQABackbone,
        adapters: list[Placement],
        router: Router | None = None,
        second_router: Router | None = None,
        mode: Mode = "dynamic",
        modes: list[Mode] | None = None,
        start_from: Literal["previous", "initial"] = "previous",
        selection: Literal["last", "best"] = "last",
        optimizer: OptimizerCallable | None = None,
        schedule: Schedule | None = None,
        param_groups: list[ParamGroup] | None = None,
    ) -> None:
        super().__init__(backbone, adapters, optimizer, schedule, param_groups)
        self.router = router if router is not None else CentroidRouter()
        self.second_router = second_router
        self.mode, self.start_from, self.selection = mode, start_from, selection
        self.modes = modes or [m for m in MODES if m != "second_router" or second_router is not None]
        if "second_router" in [*self.modes, mode] and second_router is None:
            raise ValueError("mode second_router needs model.init_args.second_router")
        if mode not in self.modes:
            raise ValueError(f"mode {mode!r} is not among modes={self.modes}, so `test` could not report it: add it")

    @property
    def routers(self) -> list[Router]:
        """The router and, where given, the second one."""
        return [self.router] if self.second_router is None else [self.router, self.second_router]

    def set_names(self, stages: Sequence[Stage]) -> list[str]:
        """As in the base, and the candidate of the stage where the best epoch is kept."""
        names = super().set_names(stages)
        if self.selection == BEST and BEST in names:
            raise ValueError(f"stage names must not be {BEST} where the best epoch is kept; got {names[1:]}")
        return [*names, BEST] if self.selection == BEST else names

    def setup(self, stage: str) -> None:
        """As in the base; keeping the best epoch needs a validation of every epoch."""
        super().setup(stage)
        if (
            stage == "fit"
            and self.selection == BEST
            and getattr(self.trainer.datamodule, "validate", "") == "stage_end"
        ):
            raise DataError(
                "selection: best compares the epochs of a stage: set the DataModule's validate: every_epoch, or "
                "model.init_args.selection: last"
            )

    def build(self, info: DataInfo, stages: Sequence[Stage]) -> None:
        """As in the base, and the routers."""
        super().build(info, stages)
        for router in self.routers:
            router.build(sum(self.backbone.routing_widths), [s.name for s in stages])
        self.own_stage = first_stages(info.domains, stages)
        self.best_accuracy = -1.0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step of the live set; in a stage's first epoch the routers also see the batch."""
        if self.in_first_epoch:
            self.update_routers(batch)
        return super().training_step(batch, batch_idx)

    @torch.no_grad()
    def update_routers(self, batch: Batch) -> None:
        """Features of the frozen model, all ranks' samples on every rank, into the stage's centroid."""
        with evaluation_mode(self):
            parts = self(batch, INITIAL).routing
        self.teach(self.routers, parts, batch["counted"])

    def validation_logits(self, batch: Batch) -> dict[str, Tensor]:
        """Also, where the best epoch is kept, those of the live set alone (``live``) and, at the end of a stage, those
        with the best earlier epoch in the live set's place (``best``)."""
        logits = super().validation_logits(batch)
        if self.selection == BEST and self.val_rows_kept:
            logits["live"] = self(batch).logits
            if self.ends_stage and self.best_accuracy >= 0:
                logits[BEST] = self.evaluation_logits(batch, BEST)
        return logits

    def kept_row(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Keep the live set where it is the stage's best so far; the row is that of what the stage keeps."""
        if "live" in rows:
            columns = [i for i, stage in enumerate(self.own_stage) if stage == self.stage + 1]
            own = mean_of_known(rows["live"][columns])
            if own != own:
                raise ValueError(
                    f"selection: best saw no validation question of stage {self.stages[self.stage].name!r}: raise "
                    "trainer.limit_val_batches, give its domains validation questions, or set "
                    "model.init_args.selection: last"
                )
            if own > self.best_accuracy:
                self.best_accuracy = own
                reshard(self)
                self.bank.copy("live", BEST)
                return rows["now"]
        return rows.get(BEST, rows["now"])

    def on_train_epoch_end(self) -> None:
        """At a stage's end its set takes the live values; checkpoints of this epoch are written after this."""
        super().on_train_epoch_end()
        if not self.ends_stage:
            return
        reshard(self)
        if self.selection == BEST:
            if self.best_accuracy < 0:
                raise ValueError(
                    f"selection: best had no validation in stage {self.stages[self.stage].name!r}: set the "
                    "DataModule's validate: every_epoch, or model.init_args.selection: last"
                )
            self.bank.copy(BEST, "live")
            self.best_accuracy = -1.0
        self.bank.copy("live", self.stages[self.stage].name)

    def rows(self, batch: Batch, wanted: Sequence[tuple[Mode, int]]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Weights (R, B, T + 1) of the wanted (mode, stage) rows, and the samples' routing features."""
        features = self(batch, INITIAL).routing
        own = self.own_stages_of(batch)
        rows = [mode_weights(m, t, len(self.stages), self.routers, features, own) for m, t in wanted]
        return torch.stack(rows), features

    def own_stages_of(self, batch: Batch) -> Tensor:
        """(B,) the stage (1..T) that trains each sample's domain, 0 where none does."""
        return self.own_stages(first_stages(self.evaluated.domains, self.stages), self.targets(batch).domains)

    def mixed_logits(self, batch: Batch, rows: Tensor, current: str = "live") -> Tensor:
        """(R, B, A) scores of the rows of weights, with the set ``current`` as the present stage's."""
        columns = self.columns(current)
        sharded = isinstance(self, FSDPModule)
        return logits_of_rows(
            lambda part, weights: self(part, weights, columns).logits,
            batch,
            rows,
            chunk=max(len(batch["id"]), 1),
            agree=self.most_over_ranks if sharded else lambda n: n,
        )

    def most_over_ranks(self, number: int) -> int:
        """Largest of the ranks' numbers."""
        value = torch.tensor(float(number), device=self.device)
        return int(self.trainer.strategy.reduce(value, reduce_op="max"))

    def evaluation_logits(self, batch: Batch, current: str = "live") -> Tensor:
        """Scores in the configured mode after the stages trained so far."""
        rows, _ = self.rows(batch, [(self.mode, self.stage + 1)])
        return self.mixed_logits(batch, rows, current)[0]

    def on_test_start(self) -> None:
        """Counts per mode over the stages, a confusion matrix per router, the answers themselves."""
        super().on_test_start()
        self.test_counts = torch.nn.ModuleDict({m: self.new_counts(self.stage + 1) for m in self.modes})
        size = max(len(self.stages), 2)
        self.confusion = torch.nn.ModuleList(MulticlassConfusionMatrix(size) for _ in self.routers).to(self.device)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Every mode after every trained stage, each distinct mixture computed once."""
        last = self.stage + 1
        wanted = [(m, t) for m in self.modes for t in range(last + 1)]
        rows, features = self.rows(batch, wanted)
        logits = dict(zip(wanted, self.mixed_logits(batch, rows)))
        targets = self.targets(batch)
        for (mode, stage), each in logits.items():
            self.test_counts[mode].update(stage, each, targets)
        own = self.own_stages_of(batch)
        routed = targets.use & (own > 0) & (own <= last)
        for confusion, router in zip(self.confusion, self.routers) if last > 0 else ():
            confusion.update(router(features, num_models=last).argmax(-1)[routed], own[routed] - 1)
        kept = self.keep_answers(batch, {mode: each for (mode, stage), each in logits.items() if stage == last})
        weights = rows[wanted.index((self.mode, last))][batch["counted"]]
        for row, each in zip(kept, weights.tolist()):
            row["weights"] = self.named_weights(each)

    def on_test_epoch_end(self) -> None:
        """Log ``test/<mode>/...`` for every mode and ``test/accuracy`` and details of the configured one."""
        last = self.stage + 1
        trained = first_stages(self.evaluated.domains, self.stages[:last])
        results = {m: counts.results() for m, counts in self.test_counts.items()}
        scores = {m: continual_scores(r["matrix"], trained) for m, r in results.items()}
        confusion = [c.compute() for c in self.confusion]
        self.test_results = {
            "modes": {m: {n: v.tolist() for n, v in r.items()} | scores[m] for m, r in results.items()},
            "confusion": [c.tolist() for c in confusion],
            "domains": list(self.evaluated.domains),
            "kinds": list(self.evaluated.kinds),
            "mode": self.mode,
        }
        for mode, result in results.items():
            for name, value in scores[mode].items():
                self.log(f"test/{mode}/{name}", value)
            for name, value in zip(self.evaluated.domains, result["matrix"][-1].tolist()):
                if value == value:
                    self.log(f"test/{mode}/accuracy/{name}", value)
        self.log("test/accuracy", mean_of_known(results[self.mode]["matrix"][-1]))
        self.log_details(results[self.mode])
        for name, counts in zip(("router", "second_router"), confusion):
            if counts.sum() > 0:
                self.log(f"test/{name}_accuracy", (counts.trace() / counts.sum()).item())

    def report_sections(self, samples: Sequence[Sample]) -> list[Section]:
        """What the report shows of the last test."""
        return sections_of_continual(
            ContinualTest(self.test_results, self.test_answers, samples, self.stages, MODE_NAMES)
        )

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Answers with probabilities and the mixing weights by domain, for every counted sample."""
        rows, _ = self.rows(batch, [(self.mode, self.stage + 1)])
        answers = self.answer_rows(batch, self.mixed_logits(batch, rows)[0])
        for row, weights in zip(answers, rows[0][batch["counted"]].tolist()):
            row["weights"] = self.named_weights(weights)
        return answers

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also the best accuracy of the stage so far."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["fulgurite"]["best_accuracy"] = self.best_accuracy

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Also the best accuracy of the stage so far."""
        super().restore(facts)
        self.best_accuracy = facts.get("best_accuracy", -1.0)
