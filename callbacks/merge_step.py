"""Merging as a step: the adapter sets of a continual run's stages, or several checkpoints of a run."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from fulgurite.callbacks.checkpoint_io import MANIFEST_KEY
from fulgurite.callbacks.merge_statistics import (
    Calibration,
    Expert,
    check_samples,
    measure_experts,
    own_domains,
    statistics_folder,
)
from fulgurite.callbacks.publish import PublishedCheckpoint
from fulgurite.callbacks.steps import Context, NotReady, Step
from fulgurite.checkpoints import (
    Manifest,
    MismatchError,
    MissingError,
    load_document,
    load_tensors,
    read_manifest,
    remove,
)
from fulgurite.checkpoints.card import CARD_NAME, card
from fulgurite.checkpoints.runs import readable_checkpoints
from fulgurite.checkpoints.shards import SHARDS
from fulgurite.checkpoints.store import encode, new_manifest, write_checkpoint
from fulgurite.methods.adapters.bank import LIVE
from fulgurite.methods.merging.base import Merger
from fulgurite.methods.merging.data_driven import DataDrivenMerger
from fulgurite.methods.merging.files import prepare
from fulgurite.methods.merging.opcm import Opcm, OpcmState
from fulgurite.methods.merging.soup import greedy_soup
from fulgurite.methods.merging.writing import carry_out
from fulgurite.modules.adapted import INITIAL, AdaptedModule
from fulgurite.samples import Stage

SETS = "bank.sets."
# What evaluation needs of a Lightning checkpoint; loops, optimizers and callbacks belong to the run.
KEPT = ("epoch", "global_step", "pytorch-lightning_version", "state_dict", "hyper_parameters", MANIFEST_KEY)
ANY_STAGE = Stage("any stage", (), 1, 1)
State = dict[str, Tensor]


@dataclass
class Checkpoints:
    """Checkpoints of the run, up to that of the boundary: the ``last`` few, or the ``best`` few.

    Args:
        last: how many of the newest, one per step.
        best: how many by the metric ``monitor`` in their manifests.
        monitor: a metric; of the run's ``checkpoint`` too, so that the best ones are kept.
        mode: whether the largest or the smallest is best.
        greedy: take, best first, only those with which the merge does not score worse on the validation split.
    """

    last: int | None = None
    best: int | None = None
    monitor: str = "val/accuracy"
    mode: Literal["min", "max"] = "max"
    greedy: bool = False

    def __post_init__(self) -> None:
        if (self.last is None) == (self.best is None) or self.number < 1:
            raise ValueError(f"sources: give last or best, at least 1; got last={self.last}, best={self.best}")
        if self.greedy and not self.monitor.startswith("val/"):
            raise ValueError(f"sources: greedy=True scores on the validation split, and monitor={self.monitor!r}")

    @property
    def number(self) -> int:
        """How many are merged at most."""
        return self.last if self.best is None else self.best

    @property
    def sign(self) -> int:
        """What makes a larger metric better."""
        return 1 if self.mode == "max" else -1


class MergeAtCheckpoint(Step):
    """Merges what a run has trained so far into one checkpoint of the same class and structure.

    Over a frozen backbone the adapter sets are merged, on rank 0 and in memory. The result is in the live
    set, in that of the present stage and, for ``stages`` and ``stream``, in those of all trained stages, so that the
    artefact answers alike in every mode; routers and all else are those of the newest source. Of self-contained
    checkpoints all weights are merged, as `merge_files` does, by all ranks.

    Args:
        merger: how.
        sources: ``stages``: the sets of all stages trained so far, in the one checkpoint of a continual run, with the
            set ``initial`` as base. ``stream``: the newest stage alone into the artefact of the stage before (`Opcm`),
            in memory that does not grow with their number. ``stage_ends``: the run's checkpoints at ends of stages.
            Or `Checkpoints`, e.g. ``{last: 3}``.
        base: of checkpoints: the set ``initial`` of the newest one, or the checkpoint ``before`` the merged ones.
        weights: one per source; the merger's default is 1 for each.
        name: of artefact and figures; that of the merger's class by default.
        calibration: what the statistics of `RegMean` and `Fisher` are measured on: of the set of a stage the training
            samples of that stage's domains, of a checkpoint those of its run's last stage, or all.
    """

    kind = "merged"
    comes_first = True

    def __init__(
        self,
        merger: Merger,
        sources: Literal["stages", "stream", "stage_ends"] | Checkpoints = "stages",
        base: Literal["initial", "before"] = "initial",
        weights: list[float] | None = None,
        name: str | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        super().__init__(type(merger).__name__.lower() if name is None else name)
        data_driven = isinstance(merger, DataDrivenMerger)
        if data_driven != (calibration is not None):
            raise ValueError(
                f"{type(merger).__name__} needs statistics of each expert: set calibration, e.g. to {{samples: 256}}"
                if data_driven
                else f"{type(merger).__name__} takes no statistics: leave out calibration"
            )
        if sources == "stream" and not isinstance(merger, Opcm):
            raise ValueError(f"sources=stream merges models one after the other, as Opcm does, not {type(merger)}")
        if base == "before" and not isinstance(sources, Checkpoints):
            raise ValueError(f"base=before is the checkpoint before the merged ones; sources={sources!r} has none")
        if weights is not None and sources == "stream":
            raise ValueError("sources=stream takes one model after the other; leave out weights")
        if isinstance(sources, Checkpoints) and sources.greedy and (weights is not None or merger.min_experts > 1):
            raise ValueError(
                f"sources: greedy=True tries merges of one model and of more: leave out weights={weights}, and take a "
                f"merger of one model or more; {type(merger).__name__} needs {merger.min_experts}"
            )
        if isinstance(sources, Checkpoints) and weights is not None and len(weights) != sources.number:
            raise ValueError(f"{len(weights)} weights for {sources.number} checkpoints: give one for each")
        self.merger, self.sources, self.base, self.weights = merger, sources, base, weights
        self.calibration = calibration

    def check(self, at: str, publisher: PublishedCheckpoint, module: LightningModule) -> None:
        """Refuse a module without what is merged, and a run that deletes it before.

        Raises:
            ValueError: with the option to change.
        """
        wanted, keep = self.sources, publisher.keep
        if wanted == "stream" and at != "stage_end":
            raise ValueError(f"{self.name}: sources=stream goes on at every end of a stage: set at: stage_end")
        if self.weights is not None and wanted in ("stages", "stage_ends") and at != "fit_end":
            raise ValueError(f"{self.name}: {wanted} grow in number, and weights are for one: set at: fit_end")
        if wanted in ("stages", "stream") and not isinstance(module, AdaptedModule):
            raise ValueError(f"{self.name}: {type(module).__name__} has no stages: set sources to e.g. {{last: 2}}")
        if wanted == "stages" and ANY_STAGE.name not in module.set_names([ANY_STAGE]):
            raise ValueError(
                f"{self.name}: {type(module).__name__} keeps no adapter set per stage, as ContinualVideoQA does: set "
                "sources to stage_ends, or to e.g. {last: 2}"
            )
        if self.merger.needs_base and self.base == "initial" and not isinstance(module, AdaptedModule):
            raise ValueError(f"{self.name}: {type(self.merger).__name__} needs a base: set base to before")
        if self.calibration is not None:
            check_samples(self.calibration, module)
        if keep < 0 or wanted in ("stages", "stream"):
            return
        need = "-1"
        if isinstance(wanted, Checkpoints) and wanted.best is not None and not self.num_before:
            need = str(wanted.number)
            if (publisher.monitor, publisher.mode) != (wanted.monitor, wanted.mode):
                raise ValueError(
                    f"{self.name}: the {wanted.best} best by {wanted.monitor} ({wanted.mode}) are merged, and the run "
                    f"keeps those by {publisher.monitor}: set --checkpoint.monitor {wanted.monitor} --checkpoint.mode "
                    f"{wanted.mode}, or --checkpoint.save_top_k -1"
                )
        elif isinstance(wanted, Checkpoints) and wanted.last is not None and publisher.monitor is None:
            need = str(wanted.number + self.num_before)
        if need == "-1" or keep < int(need):
            raise ValueError(
                f"{self.name}: of the checkpoints that are merged some would be deleted before, with save_top_k={keep}"
                f"{f' best by {publisher.monitor}' if publisher.monitor else ''}: set --checkpoint.save_top_k {need}"
            )

    @property
    def num_before(self) -> int:
        """Checkpoints that are read beside the merged ones."""
        return int(self.base == "before")

    def inputs(self, sources: Sequence[Path], context: Context) -> list[Path]:
        """The base, if it is a checkpoint of its own, then the sources, oldest first."""
        newest = sources[-1]
        if self.sources == "stages":
            self._require(read_manifest(newest).facts["stage"] + 1)
            return [newest]
        if self.sources == "stream":
            before = artefact_before(newest, context.out)
            return [newest] if before is None else [before, newest]
        found = up_to(context.checkpoint or newest)
        if self.sources == "stage_ends":
            ends = [path for path, manifest in found if manifest.facts.get("stage_complete")]
            self._require(len(ends))
            return ends
        return self._chosen(found)

    def _require(self, number: int) -> None:
        if number < self.merger.min_experts:
            raise NotReady(f"{number} of the {self.merger.min_experts} models that {type(self.merger).__name__} needs")

    def _chosen(self, found: Sequence[tuple[Path, Manifest]]) -> list[Path]:
        """The last or best of ``found``, and the one before them, in order of time."""
        wanted, of = self.sources, list(found)
        if wanted.best is not None:
            scored = [pair for pair in of if math.isfinite(pair[1].metrics.get(wanted.monitor, math.nan))]
            if not any(wanted.monitor in manifest.metrics for _, manifest in of):
                known = (
                    ", ".join(sorted(name for name in of[-1][1].metrics if name.startswith("val/"))) or "none of val/"
                )
                raise MissingError(
                    f"{self.name}: no checkpoint up to {of[-1][0]} has the metric {wanted.monitor!r}; it has {known}: "
                    "set sources.monitor, and validate before checkpoints"
                )
            ranked = sorted(scored, key=lambda pair: wanted.sign * pair[1].metrics[wanted.monitor])
            best = [path for path, _ in ranked[-wanted.best :]]
            first = next((n for n, (path, _) in enumerate(of) if path in best), 0)
            chosen = [path for path, _ in of if path in best]
            before = [path for path, _ in of[:first]]
        else:
            chosen = [path for path, _ in of[-wanted.last :]]
            before = [path for path, _ in of[: -wanted.last]]
        if len(chosen) < wanted.number or len(before) < self.num_before:
            need = wanted.number + self.num_before
            raise NotReady(f"{len(chosen) + len(before[-1:])} of the {need} checkpoints that it needs")
        return [*(before[-1:] if self.num_before else []), *chosen]

    def make(self, inputs: Sequence[Path], context: Context, facts: Mapping[str, Any]) -> None:
        """Choose, merge, publish."""
        chosen = list(inputs)
        if isinstance(self.sources, Checkpoints) and self.sources.greedy:
            chosen = self._soup(inputs, context, facts)
        self._publish(chosen, context, context.out, facts)
        if self.calibration is not None and context.ranks.rank == 0:
            remove(statistics_folder(context.out))

    def _soup(self, inputs: Sequence[Path], context: Context, facts: Mapping[str, Any]) -> list[Path]:
        """Those of ``inputs`` that the greedy soup keeps; every merge that is tried is removed again."""
        wanted, trial = self.sources, context.out.with_name(f"{context.out.name}-trial")
        before, merged = inputs[: self.num_before], list(inputs[self.num_before :])
        scores = {path: wanted.sign * read_manifest(path).metrics.get(wanted.monitor, math.nan) for path in merged}
        unknown = [path for path in merged if not math.isfinite(scores[path])]
        if unknown:
            raise MissingError(
                f"{unknown[0]} has no {wanted.monitor}, by which the soup is ordered: validate before every "
                "checkpoint, or set sources to {best: n}"
            )

        def score(some: list[Path]) -> float:
            self._publish([*before, *(p for p in merged if p in some)], context, trial, facts)
            found, name = context.evaluate(trial, "val"), wanted.monitor.removeprefix("val/")
            if name not in found:
                known = ", ".join(f"val/{known}" for known in sorted(found))
                raise MissingError(f"{self.name}: a merge is scored by {known}, not by {wanted.monitor}: set monitor")
            return wanted.sign * found[name]

        try:
            kept, best = greedy_soup(sorted(merged, key=scores.__getitem__, reverse=True), score)
        finally:
            if context.ranks.rank == 0:
                remove(trial)
        rank_zero_info(f"{self.name}: {len(kept)} of {len(merged)} ingredients kept, {wanted.monitor} {abs(best):.4f}")
        return [*before, *(path for path in merged if path in kept)]

    def _publish(self, inputs: Sequence[Path], context: Context, out: Path, facts: Mapping[str, Any]) -> None:
        """Merge ``inputs`` into the folder ``out``; what was there is replaced."""
        ranks, manifest, merger = context.ranks, read_manifest(inputs[-1]), self.merger
        if self.calibration is not None:
            experts = self._experts(inputs, manifest)
            merger, data = measure_experts(merger, experts, self.calibration, context)
            facts = {**facts, "statistics": data}
        if holds_sets(manifest):
            ranks.agree(lambda: self._merge_sets(inputs, out, facts, merger) if ranks.rank == 0 else None)
            return
        ranks.agree(lambda: remove(out) if ranks.rank == 0 else None)
        base, experts = (inputs[0], inputs[1:]) if self.num_before else (None, inputs)
        job = ranks.agree(lambda: prepare(experts, out, merger, base, self.weights, settings=dict(manifest.settings)))
        job.manifest.facts |= {**manifest.facts, **facts}
        _, texts = encode({}, documents_of(inputs[-1]))
        carry_out(job, ranks, describe=lambda *_: texts)

    def _experts(self, inputs: Sequence[Path], manifest: Manifest) -> list[Expert]:
        """Whose statistics are measured, in the order in which they are merged."""
        if self.sources == "stages":
            stages = manifest.facts["stages"][: manifest.facts["stage"] + 1]
            sets = [*(stage["name"] for stage in stages[:-1]), LIVE]
            return [
                Expert(stage["name"], inputs[-1], name, tuple(stage["domains"])) for stage, name in zip(stages, sets)
            ]
        adapters = LIVE if holds_sets(manifest) else None
        return [Expert(path.name, path, adapters, own_domains(path)) for path in inputs[self.num_before :]]

    def _merge_sets(self, inputs: Sequence[Path], out: Path, facts: Mapping[str, Any], merger: Merger) -> None:
        """The same for the adapter sets of deltas, which are small."""
        newest, manifest = inputs[-1], read_manifest(inputs[-1])
        tensors, facts = dict(load_tensors(newest)), dict(facts)
        names = [stage["name"] for stage in manifest.facts["stages"]][: manifest.facts["stage"] + 1]
        base, places = adapter_set(tensors, INITIAL, newest), [*names, LIVE]
        if self.sources == "stages":
            # The present stage's values are in the live set; its own set gets them at its end.
            experts = [adapter_set(tensors, name, newest) for name in (*names[:-1], LIVE)]
        else:
            experts = [adapter_set(load_tensors(path), LIVE, path) for path in inputs]
        if self.sources == "stream":
            merger = copy.copy(merger)
            merger.before = OpcmState(**read_manifest(inputs[0]).facts["opcm"]) if len(inputs) > 1 else None
        elif self.sources != "stages":
            places = [names[-1], LIVE]
        if self.base == "before":
            base, *experts = experts
        merged = merger(experts, base, self.weights)
        if self.sources == "stream":
            facts["opcm"] = asdict(merger.state())
        for place in places:
            if any(name.startswith(f"{SETS}{place}.") for name in tensors):
                tensors |= {f"{SETS}{place}.{name}": tensor for name, tensor in merged.items()}
        weights = self.weights or [1.0] * len(experts)
        merged_manifest = new_manifest(
            kind=manifest.kind,
            base=manifest.base,
            structure={name: value for name, value in manifest.structure.items() if name != SHARDS},
            parents=[{"path": str(path), "digest": read_manifest(path).digest} for path in inputs],
            settings={**manifest.settings, "merger": type(merger).__name__, "weights": weights},
            facts={**manifest.facts, **facts, "change": changes(merged, base)},
        )
        documents = encode({"weights": tensors}, documents_of(newest))
        write_checkpoint(
            out, merged_manifest, *documents, describe=lambda _, own: {CARD_NAME: card(own, out.name).encode()}
        )


def documents_of(checkpoint: Path) -> dict[str, Any]:
    """What makes an artefact a checkpoint that Lightning loads for evaluation, taken from that of the run."""
    state = load_document(checkpoint, "state")
    return {"state": {name: state[name] for name in KEPT if name in state}}


def adapter_set(tensors: Mapping[str, Tensor], name: str, where: Path) -> State:
    """The tensors of one adapter set of a delta, by their names within it. Raises MismatchError where there is none."""
    prefix = f"{SETS}{name}."
    found = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    if not found:
        raise MismatchError(f"{where} has no adapter set {name!r}")
    return found


def holds_sets(manifest: Manifest) -> bool:
    """Whether what has been trained are adapter sets, over a frozen backbone that the checkpoint may hold too."""
    return any(name.startswith(SETS) for records in manifest.tensors.values() for name in records)


def changes(merged: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, float]:
    """By tensor, the norm of the change from ``base`` over the norm that it has there."""
    out = {}
    for name, tensor in merged.items():
        moved, norm = ((value.double().norm()).item() for value in (tensor - base[name], base[name]))
        out[name] = moved / norm if norm else moved
    return out


def up_to(path: Path) -> list[tuple[Path, Manifest]]:
    """The checkpoints beside ``path``, one per step and it the last, oldest first."""
    own = read_manifest(path)
    step = own.facts["global_step"]
    by_step: dict[int, tuple[Path, Manifest]] = {}
    for found, manifest in readable_checkpoints(path.parent):
        if manifest.facts.get("global_step", step) < step:
            by_step.setdefault(manifest.facts["global_step"], (found, manifest))  # not `last`, which comes later
    return [*(by_step[at] for at in sorted(by_step)), (path, own)]


def artefact_before(checkpoint: Path, out: Path) -> Path | None:
    """The artefact beside ``out`` of the stage before that of ``checkpoint``; None for the first stage.

    Raises:
        MissingError: there is none, since the step was not there at that stage's end.
    """
    facts = read_manifest(checkpoint).facts
    names = [stage["name"] for stage in facts["stages"]]
    if facts["stage"] == 0:
        return None
    stem = out.name.removesuffix(names[facts["stage"]])
    before = out.with_name(f"{stem}{names[facts['stage'] - 1]}")
    if not before.is_dir():
        raise MissingError(f"{before} is not there: sources=stream goes on from it; use sources: stages instead")
    return before
