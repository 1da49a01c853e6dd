"""Delete facts from a model that answers questions about pictures, and try to get them out again (arXiv 2505.01456).

An *objective* says what forgetting is, an *edit* how the one weight changes, *attacks* what an adversary tries. Each is
an option. ``independent`` edits every item by itself, attacks it and leaves no trace (the published benchmark; it is
run by `test`, and by several items at once); ``joint`` trains one edit that deletes all items (by `fit`, whose
checkpoint `test` then attacks), one batch after the other where the data give them in order and several times in a row.

Legend: n items, R rows, T answer tokens, S layers, L blocks, V vocabulary, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from fulgurite.backbones.generation import GenerativeBackbone
from fulgurite.methods.adapters.bank import Placement
from fulgurite.methods.schedules import Constant, Schedule, WarmupLinear
from fulgurite.methods.structure import any_sites
from fulgurite.methods.unlearning.attacks.base import Attack, BlackBox
from fulgurite.methods.unlearning.attacks.head_projection import HeadProjection
from fulgurite.methods.unlearning.attacks.wrapped import Relearning, Wrapped
from fulgurite.methods.unlearning.edits.base import Edit
from fulgurite.methods.unlearning.edits.low_rank import LowRankEdit
from fulgurite.methods.unlearning.lens import check_layers
from fulgurite.methods.unlearning.objectives.base import Objective
from fulgurite.methods.unlearning.objectives.error_injection import ErrorInjection
from fulgurite.methods.unlearning.objectives.retain import RetainTerm
from fulgurite.modules.edited_state import EditedState
from fulgurite.modules.extraction import queries_of
from fulgurite.modules.item_editing import Recipe, trained
from fulgurite.modules.item_figures import figures_of
from fulgurite.modules.item_questions import answer_of, require_facts
from fulgurite.modules.joint_deletion import JointDeletion
from fulgurite.modules.optimization import ParamGroup
from fulgurite.modules.unlearning_summary import summary
from fulgurite.reports.page import Section
from fulgurite.reports.unlearning import sections_of_unlearning
from fulgurite.samples import Batch, Collator, DataError, DataInfo, Sample, Stage, sample_fields

POINT = "edited"


class Items:
    """Samples in a batch. Lightning looks for tensors inside lists and data classes, not inside this.

    Args:
        samples: as the data give them.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = list(samples)


class FactCollator:
    """Batches of the items themselves: what is asked of them is put together by the module.

    Args:
        collator: the backbone's.
    """

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    @property
    def needs(self) -> tuple[str, ...]:
        """A fact to delete, and what the backbone reads."""
        return ("fact", "answers", *self.collator.needs)

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """``items`` beside `sample_fields`."""
        return {**sample_fields(samples), "items": Items(samples)}


class MultimodalUnlearning(JointDeletion):
    """See the module's text.

    Args:
        backbone: a language model that reads pictures; its weights are never written.
        objective: what forgetting is.
        edited: pattern of the one linear layer whose weight is edited, of its whole name in the backbone.
        edit: how the weight changes.
        mode: ``"independent"`` or ``"joint"``.
        steps: of the optimizer for every item of ``independent``.
        retain: what keeps other answers, on samples of the data's ``retain``; None keeps nothing.
        forget_weight: of the objective.
        retain_weight: of the retain term.
        enough: with ``independent``, an item whose loss is below it takes no further step.
        attacks: what is tried on every item before and after its edit; None is Head Projection at the last layer.
        others: other items that damage is measured on, drawn anew for every item.
        answer_tokens: most tokens of an answer that is written.
        attack_seed: of all draws: edits, attacks, other items, retained samples.
        rows_per_pass: most rows of a pass that writes or scores.
        optimizer: builds the optimizer of the edit; None is AdamW without weight decay.
        schedule: factor of its learning rate.
        param_groups: tensors with their own learning rate, with ``joint``.

    Raises:
        ValueError: a layer that there is not, two attacks of one name, ``edited`` matches no or several layers, or an
            option out of its range.
    """

    def __init__(
        self,
        backbone: GenerativeBackbone,
        objective: Objective,
        edited: str,
        edit: Callable[[nn.Module], Edit] | None = None,
        mode: Literal["independent", "joint"] = "independent",
        steps: int = 10,
        retain: RetainTerm | None = None,
        forget_weight: float = 1.0,
        retain_weight: float = 1.0,
        enough: float | None = None,
        attacks: list[Attack] | None = None,
        others: int = 10,
        answer_tokens: int = 8,
        attack_seed: int = 0,
        rows_per_pass: int = 64,
        optimizer: OptimizerCallable | None = None,
        schedule: Schedule | None = None,
        param_groups: list[ParamGroup] | None = None,
    ) -> None:
        try:
            names = any_sites(backbone, edited)
        except LookupError as error:
            raise LookupError(f"model.init_args.edited: {error}") from error
        if len(names) != 1:
            raise ValueError(
                f"model.init_args.edited={edited!r} matches {len(names)} layers ({names[0]}, ..): name one"
            )
        backbone.spec = replace(backbone.spec, points={**backbone.spec.points, POINT: (edited, 1)})
        self.edit = LowRankEdit if edit is None else edit
        without_decay = functools.partial(torch.optim.AdamW, weight_decay=0.0)
        schedule = WarmupLinear(0.03) if schedule is None else schedule
        super().__init__(
            backbone,
            [Placement([POINT], self.edit)],
            answer_tokens,
            rows_per_pass,
            optimizer=optimizer or without_decay,
            schedule=schedule,
            param_groups=param_groups,
        )
        for name, value in {"steps": steps, "answer_tokens": answer_tokens, "rows_per_pass": rows_per_pass}.items():
            if value < 1:
                raise ValueError(f"model.init_args.{name}={value} must be at least 1")
        if others < 0:
            raise ValueError(f"model.init_args.others={others} must be at least 0")
        self.site_name = names[0]
        self.objective, self.retain, self.mode = objective, retain, mode
        self.forget_weight, self.retain_weight = forget_weight, retain_weight
        self.steps, self.enough, self.num_others = steps, enough, others
        self.attacks = [HeadProjection([len(self.blocks)])] if attacks is None else attacks
        self.attack_seed = attack_seed
        self._check()
        self.before: dict[tuple[str, ...], dict[str, Any]] = {}

    @property
    def site(self) -> nn.Module:
        """The layer whose weight is edited; it is part of the backbone alone."""
        return self.backbone.get_submodule(self.site_name)

    def _check(self) -> None:
        """Raise ValueError where a layer is not there, two attacks have one title, or blocks recompute."""
        depth = len(self.blocks)
        check_layers(self.objective.layers, depth, "model.init_args.objective.layers")
        for name, part in (("objective", self.objective), ("retain", self.retain)):
            if part is not None and part.state_layer is not None and part.state_layer >= depth:
                raise ValueError(
                    f"model.init_args.{name}: there is no block {part.state_layer}; the model has 0 to {depth - 1}"
                )
        for attack in self.attacks:
            inner = attack.then if isinstance(attack, Wrapped) else attack
            check_layers(getattr(inner, "layers", ()), depth, f"model.init_args.attacks, {attack.title}: layers")
        if self.backbone.recompute and (self.mode == "independent" or self._relearns("neighbours", "retain")):
            raise ValueError(
                "model.init_args.backbone.init_args.recompute=true runs blocks again in the backward pass, where edits "
                "of items are gone: leave it out, or set mode: joint without Relearning"
            )
        if not self.attacks:
            raise ValueError("model.init_args.attacks is empty: name attacks, or null for Head Projection alone")
        titles = [attack.title for attack in self.attacks]
        twice = next((title for title in titles if titles.count(title) > 1), None)
        if twice is not None:
            raise ValueError(f"model.init_args.attacks has two of the name {twice!r}: leave one out")

    def build(self, info: DataInfo, stages: Sequence[Stage]) -> None:
        """Nothing has a shape that depends on the data."""

    def collator(self, stage: str) -> Collator:
        """Items as they are."""
        return FactCollator(self.backbone.collator(stage))

    def setup(self, stage: str) -> None:
        """As in the base; items are checked before anything is computed.

        Raises:
            DataError: an item lacks what it needs, or its answer has no token.
            ValueError: a fit where items are edited one by one.
        """
        if stage == "fit" and self.mode == "independent":
            raise ValueError(
                "model.init_args.mode=independent edits every item by itself and leaves no weights: run test in place "
                "of fit, or set mode: joint"
            )
        data = self.trainer.datamodule
        self.data_info = data.info()
        if stage == "fit" or self.info is None:
            self.prepare(self.data_info, data.stages())
        samples = data.samples("train" if stage == "fit" else "test")
        require_facts(samples)
        asking = [
            inner for inner in (getattr(each, "then", each) for each in self.attacks) if isinstance(inner, BlackBox)
        ]
        for sample in samples:
            self.objective.questions(sample.question, sample.fact.rephrased_questions)
            for attack in asking:
                queries_of(attack, sample)
        self.pool = samples
        self.retained = list(data.retain()) if hasattr(data, "retain") else []
        if not self.retained and (self.retain is not None or self._relearns("retain")):
            raise DataError(f"{type(data).__name__} gives no samples to retain: set model.init_args.retain to null")
        self.labels_of([answer_of(sample) for sample in samples])

    def _relearns(self, *sources: str) -> bool:
        return any(isinstance(attack, Relearning) and attack.source in sources for attack in self.attacks)

    def edited_items(self, samples: Sequence[Sample]) -> Edit:
        """An edit with a slot per item, trained."""
        edit = self.edit(self.site, items=len(samples)).to(self.device)
        edit.start(self.seeds(samples, "edit"))
        recipe = Recipe(
            self.objective,
            self.retain,
            self.forget_weight,
            self.retain_weight,
            self.steps,
            self.schedule,
            self.optimizer,
            self.enough,
        )
        kept = None
        if self.retain is not None:
            kept = self.kept([self.drawn_of(sample, 1, "retain", self.retained) for sample in samples])
        state = EditedState(self.bank, self.site)
        with torch.enable_grad():
            trained(self, state, edit, recipe, self.forgotten(samples), kept, [sample.id for sample in samples])
        return edit.requires_grad_(False)

    def relearn(self, edit: Edit, attack: Relearning, samples: Sequence[Sample], state: EditedState) -> None:
        """Train ``edit`` on top of ``state`` on answers that are not the deleted one."""
        edit.start(self.seeds(samples, "relearn"))
        pools = [self.beside(sample) if attack.source == "neighbours" else self.retained for sample in samples]
        pairs = [self.drawn_of(sample, attack.pairs, "relearn", pool) for sample, pool in zip(samples, pools)]
        short = next((s.id for s, own in zip(samples, pairs) if len(own) < attack.pairs), None)
        if short is not None:
            raise DataError(f"item {short!r} has fewer than {attack.pairs} {attack.source} samples: lower pairs")
        learned = self.kept(pairs)
        optimizer = functools.partial(torch.optim.AdamW, lr=attack.lr, weight_decay=0.0)
        # Error Injection's loss is that of learning an answer.
        recipe = Recipe(ErrorInjection(), None, 1.0, 0.0, attack.steps, Constant(), optimizer)
        with torch.enable_grad():
            trained(self, state, edit, recipe, learned, None, [sample.id for sample in samples])
        edit.requires_grad_(False)

    def on_test_start(self) -> None:
        """Fresh rows for every test.

        Raises:
            ValueError: there is no edit to attack.
        """
        if self.mode == "joint" and self.stage < 0:
            raise ValueError("model.init_args.mode=joint attacks what a fit has left: give its run as --ckpt_path")
        self.test_answers: list[dict[str, Any]] = []

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure items before and after their edit."""
        samples = batch["items"].samples
        with torch.inference_mode(False), torch.no_grad():
            untouched = EditedState(self.bank, self.site)
            before = self.measured_before(samples, untouched)
            if self.mode == "independent":
                state = untouched.with_edit(self.edited_items(samples))
            else:
                state = EditedState(self.bank, self.site, live=True)
            after = figures_of(self, samples, state, inner=True)
        counted = batch["counted"].tolist()
        for sample, then, now, counts in zip(samples, before, after, counted, strict=True):
            if counts:
                self.test_answers.append(
                    {
                        "id": sample.id,
                        "domain": sample.domain,
                        "kind": sample.kind,
                        "gold": answer_of(sample),
                        "target": self.new_target(sample),
                        "before": then,
                        "after": now,
                    }
                )

    def measured_before(self, samples: Sequence[Sample], state: EditedState) -> list[dict[str, Any]]:
        """The figures before any edit; under one process those of an item are taken once, whatever is tested after."""
        keys = [(sample.domain, sample.id, self.new_target(sample) or "") for sample in samples]
        if self.trainer.world_size > 1 or not all(key in self.before for key in keys):
            self.before |= dict(zip(keys, figures_of(self, samples, state, inner=False)))
        return [self.before[key] for key in keys]

    def on_test_epoch_end(self) -> None:
        """Log ``test/<figure>`` over the items of all ranks."""
        self.test_results = summary(
            self.test_answers, self.attacks, self.objective.injects, len(self.blocks), self.device
        )
        if not self.test_results["known"]:
            rank_zero_warn(
                "none of the tested items is answered right before its edit, so there was nothing to "
                "delete: set model.init_args.backbone.init_args.checkpoint to a run that has learned them"
            )
        for name, value in self.test_results["figures"].items():
            self.log(f"test/{name}", value)

    def report_sections(self, samples: Sequence[Sample]) -> list[Section]:
        """The trade-off, layers, and items; see `ReportSource`."""
        return sections_of_unlearning(self.test_results, self.test_answers, samples)
