"""What happens when a checkpoint has been published: steps that make new models of it, within the fit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from fulgurite.callbacks.interruption import Interruption
from fulgurite.callbacks.publish import PublishedCheckpoint
from fulgurite.callbacks.steps import Context, NotReady, Step
from fulgurite.callbacks.tradeoff import tradeoff_sections
from fulgurite.checkpoints import read_manifest, verify, write_json
from fulgurite.checkpoints.runs import ARTEFACTS, readable_checkpoints
from fulgurite.datamodules.base import FulguriteDataModule
from fulgurite.methods.compression import LayerReport
from fulgurite.methods.ranks import ALONE, patient_ranks
from fulgurite.modules.adapted import AdaptedModule
from fulgurite.modules.evaluation import Scored, limited, scores_of
from fulgurite.modules.modes import MODE_NAMES
from fulgurite.reports.artefacts import artefacts_section, scores_by_mode
from fulgurite.reports.compression import compression_sections
from fulgurite.reports.page import Section

SCORES = "scores.json"
OUT_OF_COMPETITION = ("oracle", "zero_shot")  # is told the domain; is not trained
Split = Literal["val", "test"]


class Boundary(pl.Callback):
    """Runs steps at published checkpoints, each on what the one before it made; the fit goes on unchanged.

    Hooks: ``on_checkpoint_published``, when the folder is complete on disk, before older ones are deleted;
        ``on_train_end`` for ``fit_end``. The steps read that folder, never the live model. They publish
        ``artefacts/<kind>-<name>-<stage, or step=number>`` of the run. With ``evaluate``, the values of each artefact
        take the place of the module's for a loop over that split, and go again; the scores are logged as
        ``<kind>/<name>/<split>/...`` and stand in ``artefacts/scores.json``, beside the digest of their artefact.
    Stored: how many boundaries there were, and the step of the last. A resumed run begins with what was due at its
        checkpoint; what is there already, intact, is not made again. A signal that ends the run leaves the steps of
        its last checkpoint to the resumed run.
    Ranks: all make the same calls; an error on one ends all. With ``fast_dev_run`` nothing is done.

    Args:
        steps: in order; the first has the checkpoint as its source.
        at: the end of each stage, every published checkpoint, or the end of the fit.
        every: only every so many-th of them.
        evaluate: split, or splits, on which every artefact is scored; none where null.
    """

    def __init__(
        self,
        steps: list[Step],
        at: Literal["stage_end", "checkpoint", "fit_end"] = "stage_end",
        every: int = 1,
        evaluate: Split | list[Split] | None = "val",
    ) -> None:
        if not steps or every < 1:
            raise ValueError(f"steps={steps} must hold at least one step, and every={every} must be at least 1")
        self.steps, self.at, self.every = steps, at, every
        self.splits: list[Split] = [evaluate] if isinstance(evaluate, str) else list(evaluate or [])
        self.builder: Callable[[Path], nn.Module] | None = None
        self.count, self.step = 0, -1
        self.ranks = ALONE
        self._newest: Path | None = None
        self._caught_up = False

    @property
    def state_key(self) -> str:
        """Of this boundary, beside others in the same trainer."""
        return self._generate_state_key(at=self.at, every=self.every, steps=[step.name for step in self.steps])

    def state_dict(self) -> dict[str, Any]:
        """Boundaries so far; the checkpoint that holds this is not among them unless its step is."""
        return {"count": self.count, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.count, self.step = state_dict["count"], state_dict["step"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything is trained."""
        if stage != "fit" or trainer.fast_dev_run:
            return
        self._newest, self._caught_up = None, False
        self.count, self.step = 0, -1
        self.ranks = patient_ranks(trainer.global_rank, trainer.world_size)
        try:
            self._check(trainer, pl_module)
        except ValueError as error:
            raise MisconfigurationException(f"Boundary: {error}") from error

    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        names = [(step.kind, step.name) for each in boundaries_of(trainer) for step in each.steps]
        twice = next((name for kind, name in names if names.count((kind, name)) > 1), None)
        if twice is not None:
            raise ValueError(f"two steps are called {twice!r} and would replace each other's artefacts: name them")
        publishers = [c for c in trainer.callbacks if isinstance(c, PublishedCheckpoint)]
        if not publishers:
            raise ValueError("there are no checkpoints to begin with: set trainer.enable_checkpointing to true")
        if self.at == "stage_end" and not isinstance(pl_module, AdaptedModule):
            raise ValueError(f"{type(pl_module).__name__} has no stages: set at to checkpoint or fit_end")
        for step in self.steps:
            if step.comes_first and step is not self.steps[0]:
                raise ValueError(
                    f"{step.name} reads the run's checkpoints, not what {self.steps[0].name} has made: give it a "
                    "Boundary of its own"
                )
            step.check(self.at, publishers[0], pl_module)
        if self.splits and not (isinstance(trainer.datamodule, FulguriteDataModule) and isinstance(pl_module, Scored)):
            raise ValueError(
                f"{type(pl_module).__name__} on {type(trainer.datamodule).__name__} cannot be scored within a fit, "
                "which takes a module with scores() and a DataModule of this project: set evaluate to null"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the splits that a fit does not read by itself."""
        for split in [] if trainer.fast_dev_run else self.splits:
            trainer.datamodule.within_fit(split)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A resumed run first does what was due at its checkpoint."""
        if trainer.fast_dev_run:
            return
        if self.at == "stage_end":
            require_checkpoints_of_stages(trainer, [stage.epochs for stage in pl_module.stages])
        self._catch_up(trainer, pl_module)

    def on_checkpoint_published(self, trainer: pl.Trainer, pl_module: pl.LightningModule, path: Path) -> None:
        """Do what is due."""
        if any(isinstance(callback, Interruption) and callback.received for callback in trainer.callbacks):
            return
        self._newest = path
        if self.at != "fit_end":
            self._reach(trainer, pl_module, path)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The steps of the end, on the last checkpoint, which is written first."""
        if self.at != "fit_end" or trainer.fast_dev_run:
            return
        publisher = publisher_of(trainer)
        publisher.on_train_end(trainer, pl_module)
        if self._newest is None and trainer.ckpt_path is not None:
            self._newest = own_folder(Path(trainer.ckpt_path))
        if self._newest is None or read_manifest(self._newest).facts["global_step"] != trainer.global_step:
            self._newest = publisher.publish_now(trainer)  # where the run keeps no `last`
        self._run(trainer, pl_module, self._newest)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Where a resumed run had no training left, do what it had left undone; the weights are loaded by now."""
        if self._caught_up or trainer.ckpt_path is None or trainer.fast_dev_run:
            return
        home = pl_module.device
        pl_module.to(trainer.strategy.root_device)
        self._catch_up(trainer, pl_module)
        if self.at == "fit_end":
            self._run(trainer, pl_module, own_folder(Path(trainer.ckpt_path)))
        pl_module.to(home)

    def _catch_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._caught_up = True
        if trainer.ckpt_path is not None and self.at != "fit_end":
            self._reach(trainer, pl_module, own_folder(Path(trainer.ckpt_path)))

    def _reach(self, trainer: pl.Trainer, pl_module: pl.LightningModule, path: Path) -> None:
        """Count the boundary at ``path``, if it is one, and run the steps if it is their turn."""
        facts = read_manifest(path).facts
        if self.at == "stage_end" and not facts.get("stage_complete"):
            return
        if facts["global_step"] != self.step:
            self.count, self.step = self.count + 1, facts["global_step"]
        if self.count % self.every == 0:
            self._run(trainer, pl_module, path)

    def _run(self, trainer: pl.Trainer, pl_module: pl.LightningModule, path: Path) -> None:
        """The chain of steps, from the checkpoint at ``path``."""
        facts, sources = read_manifest(path).facts, [path]
        at = facts["stages"][facts["stage"]]["name"] if self.at == "stage_end" else f"step={facts['global_step']}"
        folder = Path(trainer.default_root_dir, ARTEFACTS)
        with isolate_rng():
            for step in self.steps:
                out = folder / f"{step.kind}-{step.name}-{at}"
                context = self._context(trainer, pl_module, out, path)
                try:
                    sources = [step(sources, context)]
                except NotReady as reason:
                    rank_zero_info(f"{out.name}: not made, there are only {reason}")
                    return
                if not step.scored:
                    continue
                label = f"{step.kind} {step.name}{'' if self.at == 'fit_end' else f', {at}'}"
                self._evaluate(trainer, context, step, {"label": label, "step": facts["global_step"]})

    def report_sections(self, trainer: pl.Trainer) -> list[Section]:
        """From the first boundary: all artefacts with scores, against their sizes, and what became of their layers."""
        boundaries = boundaries_of(trainer)
        if self is not boundaries[0]:
            return []
        names = {(step.kind, step.name) for each in boundaries for step in each.steps}
        folder = Path(trainer.default_root_dir, ARTEFACTS)
        entries = {p: e for p, e in read_scores(folder).items() if (e["kind"], e["name"]) in names}
        if not entries:
            return []
        found = {entry["label"]: entry["scores"] for entry in entries.values()}
        modes = scores_by_mode(trainer.callback_metrics, MODE_NAMES)
        sections = [artefacts_section("Artefacts", modes, found, MODE_NAMES)]
        manifests = {path: read_manifest(folder / path) for path in entries}
        compared = {name: row for name, row in modes.items() if name not in map(MODE_NAMES.get, OUT_OF_COMPETITION)}
        scored = {entry["label"]: (manifests[path], entry) for path, entry in entries.items()}
        sections += tradeoff_sections(trainer.lightning_module, compared, scored)
        for path, entry in entries.items():
            facts = manifests[path].facts
            if layers := [LayerReport.from_data(each) for each in facts.get("layers", [])]:
                sections += compression_sections(entry["label"], layers, facts.get("importance"))
        return sections

    def _context(self, trainer: pl.Trainer, pl_module: pl.LightningModule, out: Path, path: Path) -> Context:
        data = trainer.datamodule

        def evaluator(artefact: Path, split: str) -> dict[str, float]:
            loader = data.within_fit(split)
            return scores_of(trainer, pl_module, artefact, loader, limited(trainer, split, len(loader)))

        return Context(
            out=out,
            ranks=self.ranks,
            checkpoint=path,
            builder=self.builder,
            data=data if isinstance(data, FulguriteDataModule) else None,
            evaluator=evaluator if isinstance(data, FulguriteDataModule) and isinstance(pl_module, Scored) else None,
            device=pl_module.device,
        )

    def _evaluate(self, trainer: pl.Trainer, context: Context, step: Step, about: Mapping[str, Any]) -> None:
        """Score, log and note an artefact, unless that is done."""
        out = context.out
        digest = read_manifest(out).digest
        known = context.ranks.gather(read_scores(out.parent).get(out.name, {}))[0]
        if not self.splits or (known.get("digest") == digest and known.get("splits") == self.splits):
            return
        scores = {f"{split}/{n}": v for split in self.splits for n, v in context.evaluate(out, split).items()}
        for logger in trainer.loggers:
            logger.log_metrics({f"{step.kind}/{step.name}/{n}": v for n, v in scores.items()}, step=about["step"])
        entry = {**about, "kind": step.kind, "name": step.name, "digest": digest, "splits": self.splits}
        context.ranks.agree(lambda: note(out, {**entry, "scores": scores}) if context.ranks.rank == 0 else None)
        rank_zero_info(f"{out.name}: " + ", ".join(f"{n} {v:.4f}" for n, v in scores.items() if n.count("/") == 1))


def boundaries_of(trainer: pl.Trainer) -> list[Boundary]:
    """All boundaries of a run, in order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, Boundary)]


def publisher_of(trainer: pl.Trainer) -> PublishedCheckpoint:
    """What writes the run's checkpoints."""
    return next(callback for callback in trainer.callbacks if isinstance(callback, PublishedCheckpoint))


def require_checkpoints_of_stages(trainer: pl.Trainer, epochs: Sequence[int]) -> None:
    """Refuse a schedule of checkpoints that publishes none at the end of a stage, or one before its sets are copied."""
    publisher = publisher_of(trainer)
    if publisher._every_n_train_steps == 1:
        return
    every, ends = publisher._every_n_epochs, list(accumulate(epochs))
    if every < 1 or any(end % every for end in ends[:-1]):
        raise MisconfigurationException(
            f"Boundary: stages end after epochs {ends}, and no checkpoint is published there: set "
            "--checkpoint.every_n_epochs 1"
        )
    if not publisher._should_save_on_train_epoch_end(trainer):
        raise MisconfigurationException(
            "Boundary: checkpoints are published after validations, when a stage is not over yet: set "
            "--checkpoint.save_on_train_epoch_end true"
        )


def own_folder(path: Path) -> Path:
    """The first sound folder of the same step beside ``path``, which may be ``last`` and be replaced by later steps."""
    step = read_manifest(path).facts["global_step"]
    alike = (p for p, manifest in readable_checkpoints(path.parent) if manifest.facts.get("global_step") == step)
    return next((found for found in alike if found != path and verify(found).ok), path)


def read_scores(artefacts: Path) -> dict[str, Any]:
    """Scores of the artefacts of a run, by the name of their folder."""
    file = artefacts / SCORES
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def note(artefact: Path, entry: Mapping[str, Any]) -> None:
    """Write the scores of one artefact beside it: its own folder is complete, and stays as its manifest says."""
    write_json(artefact.parent / SCORES, {**read_scores(artefact.parent), artefact.name: entry})
