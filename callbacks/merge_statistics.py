"""The statistics that data-driven mergers weigh experts by, measured at a boundary.

Each expert is measured in a second module, whole in every process whatever the strategy, on its own training samples.
The processes share the samples and add up their sums in float64, so that several give what one gives, up to the order
of additions. What is measured lies beside the artefact until that is there: an interrupted boundary goes on in the
middle of an expert, and gives what an uninterrupted one gives.
"""

from __future__ import annotations

import copy
import functools
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from fulgurite.callbacks.steps import Context, described, identity
from fulgurite.checkpoints import (
    MANIFEST_NAME,
    CheckpointError,
    digest_of_json,
    load_tensors,
    read_manifest,
    remove,
    save_checkpoint_folder,
)
from fulgurite.checkpoints.atomic import resolve
from fulgurite.datamodules.base import FulguriteDataModule
from fulgurite.methods.merging.data_driven import DataDrivenMerger
from fulgurite.methods.merging.statistic_files import STATISTICS, use_statistics
from fulgurite.methods.statistics.base import Statistic
from fulgurite.methods.statistics.fisher import FisherStatistics
from fulgurite.methods.statistics.gram import GramStatistics, input_width
from fulgurite.modules.adapted import BACKBONE, AdaptedModule
from fulgurite.modules.calibration import SETS, Calibrated, counted_inputs, masks_by_layer, place_of, using
from fulgurite.samples import Batch
from fulgurite.samples.loader import ResumableLoader

SAVE_EVERY_S = 60.0  # least time between two saves of what one process has measured
FINGERPRINT = "fingerprint"


@dataclass
class Calibration:
    """What statistics are measured on, and how.

    Args:
        samples: training samples per expert, drawn without replacement.
        seed: of the choice of samples, and of the labels that a Fisher draws.
        max_exact: most answers over which a Fisher takes the exact expectation; above, labels are drawn.
        draws: labels per sample where they are drawn.
    """

    samples: int = 256
    seed: int = 0
    max_exact: int = 64
    draws: int = 1

    def __post_init__(self) -> None:
        if min(self.samples, self.draws) < 1 or self.max_exact < 0:
            raise ValueError(
                f"calibration: samples={self.samples} and draws={self.draws} must be at least 1, "
                f"max_exact={self.max_exact} at least 0"
            )


@dataclass(frozen=True)
class Expert:
    """What is measured once.

    Args:
        label: of this expert among all, a plain name.
        path: its checkpoint.
        adapters: the set that is merged, in a checkpoint of adapters; None where all weights are merged.
        domains: of its samples; all where None.
    """

    label: str
    path: Path
    adapters: str | None = None
    domains: tuple[str, ...] | None = None

    @property
    def prefix(self) -> str:
        """What the names of the merged tensors lack of those in the module."""
        return "" if self.adapters is None else f"{SETS}{self.adapters}."


def measure_experts(
    merger: DataDrivenMerger, experts: Sequence[Expert], calibration: Calibration, context: Context
) -> tuple[DataDrivenMerger, list[dict[str, Any]]]:
    """A copy of ``merger`` that uses the statistics of ``experts``, and what their data were. All ranks call it.

    Statistics are restricted to what all experts have one for; the rest is averaged. Memory: one second module per
    process, and the statistic of one expert; those that are finished are read from disk, tensor by tensor.

    Raises:
        LookupError: the context has no builder or no data.
        ValueError: a module cannot be measured, or there are too few samples.
    """
    builder, files, facts = OneModule(context), [], []
    for expert in experts:
        out = statistics_folder(context.out) / expert.label
        data = measure(merger.kind, expert, calibration, context, out, builder, expert.prefix)
        files.append(out)
        facts.append({"expert": expert.label, **data, "digest": digest_of_json(identity(out))})
    return use_statistics(copy.copy(merger), files, shared=True), facts


def statistics_folder(artefact: Path) -> Path:
    """Where the statistics for ``artefact`` lie while it is made."""
    return artefact.with_name(f"{artefact.name}-statistics")


class OneModule:
    """Builds modules of checkpoints, and keeps the last one.

    Args:
        context: says how, and where it shall lie.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.path: Path | None = None
        self.module: nn.Module | None = None

    def of(self, path: Path) -> nn.Module:
        """The module of ``path``. Raises ValueError where it cannot be measured."""
        if path != self.path:
            self.path = self.module = None  # so that there are never two
            module = self.context.build(path).to(self.context.device)
            if not isinstance(module, Calibrated):
                raise ValueError(
                    f"{type(module).__name__} does not say what its inputs and answers are: give it the methods "
                    "calibration_inputs, answer_logits and token_masks of fulgurite.modules.calibration.Calibrated"
                )
            self.path, self.module = path, module
        return self.module


def measure(
    kind: str,
    expert: Expert,
    calibration: Calibration,
    context: Context,
    out: Path,
    builder: OneModule,
    prefix: str = "",
) -> dict[str, Any]:
    """Have the statistic of one expert in the folder ``out``, measured now or before. All ranks call it.

    Args:
        kind: ``gram`` or ``fisher``.
        prefix: of the names in the module, left out of those in the folder.

    Returns:
        number, domains and digest of the samples.
    """
    ranks = context.ranks
    loader = context.calibration(calibration.samples, calibration.seed, expert.domains)
    samples = loader.dataset.samples
    data = {
        "samples": len(samples),
        "domains": sorted({sample.domain for sample in samples}),
        "data": digest_of_json([[sample.domain, sample.id, sample.question] for sample in samples]),
    }
    about = {"model": identity(expert.path), "adapters": expert.adapters, **data, "kind": kind}
    fingerprint = digest_of_json({**about, "calibration": described(calibration)})
    if ranks.gather(ranks.rank == 0 and facts_of(out, fingerprint) is not None)[0]:
        return data
    shares = {"rank": ranks.rank, "ranks": ranks.size, "batch": loader.batch_sampler.global_batch_size}
    partial = Saved(out.with_name(f"{out.name}-partial-{ranks.rank}"), digest_of_json({"of": fingerprint, **shares}))
    # A checkpoint may be published within a validation, whose tensors know no gradients.
    with torch.inference_mode(False), torch.no_grad():
        module = ranks.agree(lambda: builder.of(expert.path))
        statistic = ranks.agree(lambda: statistic_of(kind, module, expert, calibration))
        ranks.agree(lambda: go_on(statistic, loader, module, expert, partial))
        statistic.reduce(ranks.total)
    facts = {FINGERPRINT: fingerprint, "kind": kind, "data": data}
    if ranks.rank == 0:
        settings = {"calibration": described(calibration), "adapters": expert.adapters}
        work = functools.partial(publish, out, statistic, expert.path, prefix, settings, facts)
    ranks.agree(lambda: work() if ranks.rank == 0 else None)
    ranks.agree(lambda: remove(partial.path))
    rank_zero_info(f"{out}: {kind} of {expert.label} on {len(samples)} samples")
    return data


@dataclass(frozen=True)
class Saved:
    """Where one process saves what it has measured so far, and what that must be of to be taken up."""

    path: Path
    fingerprint: str


def statistic_of(kind: str, module: nn.Module, expert: Expert, calibration: Calibration) -> Statistic:
    """An empty statistic of what is merged of an expert, with float64 sums.

    Raises:
        ValueError: there is no linear layer.
    """
    if kind == "fisher":
        return FisherStatistics(
            module,
            lambda own, inputs: answers(own, inputs, expert.adapters),
            pattern=f"{re.escape(expert.prefix)}.*",
            max_exact=calibration.max_exact,
            samples=calibration.draws,
            generator=torch.Generator().manual_seed(calibration.seed),
            vectorize=False,  # the models of other libraries branch on values, which vmap cannot
            dtype=torch.float64,
        )
    layers = linear_layers(module, expert.prefix)
    if not layers:
        raise ValueError(
            f"{expert.path}: nothing that is merged is a linear layer, so there is no Gram: merge by Fisher or Average"
        )
    tables = [name for name in layers if isinstance(module, AdaptedModule) and reads_positions(module, name)]
    pattern = "|".join(map(re.escape, layers))
    return GramStatistics(module, pattern, len(layers), dtype=torch.float64, tables=tables)


def reads_positions(module: AdaptedModule, layer: str) -> bool:
    """Whether a layer, or the site of an adapter's layer, is called with a table of positions too."""
    return module.backbone.spec.reads_positions(place_of(layer).removeprefix(BACKBONE))


def answers(module: nn.Module, inputs: dict[str, Tensor], adapters: str | None) -> Tensor:
    """Logits with one adapter set."""
    with using(module, adapters):
        return module.answer_logits(inputs)


def linear_layers(module: nn.Module, prefix: str) -> list[str]:
    """Names of all layers under ``prefix`` that a Gram can be taken of."""
    found = []
    for name, layer in module.named_modules():
        if name.startswith(prefix):
            try:
                input_width(layer)
            except ValueError:
                continue
            found.append(name)
    return found


def go_on(statistic: Statistic, loader: ResumableLoader, module: nn.Module, expert: Expert, partial: Saved) -> None:
    """Add what of this process's batches was not saved yet, and save now and then."""
    if (facts := facts_of(partial.path, partial.fingerprint)) is not None:
        sums, counts = (load_tensors(partial.path, name) for name in ("sums", "counts"))
        statistic.load_state_dict({"sums": sums, "counts": counts, **facts["of"]})
        if facts["loader"]["count"] >= len(loader.batch_sampler):
            return
        loader.load_state_dict(facts["loader"])
    places = {(sample.domain, sample.id): place for place, sample in enumerate(loader.dataset.samples)}
    saved = time.monotonic()
    for batch in loader:
        add(statistic, module, batch, expert, places)
        if time.monotonic() - saved >= SAVE_EVERY_S:
            state = statistic.state_dict()
            tensors = {name: state.pop(name) for name in ("sums", "counts")}
            facts = {FINGERPRINT: partial.fingerprint, "of": state, "loader": loader.state_dict()}
            save_checkpoint_folder(partial.path, tensors, facts=facts)
            saved = time.monotonic()


def add(
    statistic: Statistic, module: nn.Module, batch: Batch, expert: Expert, places: Mapping[tuple[str, str], int]
) -> None:
    """Add the examples of a batch that count. ``places`` are the numbers of the samples, by which labels are drawn."""
    device = next(module.parameters()).device
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    inputs = counted_inputs(module, moved)
    if not int(batch["counted"].sum()):
        return
    if isinstance(statistic, FisherStatistics):
        names = [key for key, counted in zip(zip(batch["domain"], batch["id"]), batch["counted"].tolist()) if counted]
        statistic.update(inputs, torch.tensor([places[name] for name in names]))
        return
    with statistic.watch(masks_by_layer(module, statistic.modules, inputs)):
        answers(module, inputs, expert.adapters)


def publish(
    out: Path, statistic: Statistic, model: Path, prefix: str, settings: Mapping[str, Any], facts: Mapping[str, Any]
) -> None:
    """Write a finished statistic; names lose ``prefix``."""
    transposed: list[str] = []
    if isinstance(statistic, GramStatistics):
        means = statistic.means(leave_out=statistic.unseen)
        transposed = sorted(name.removeprefix(prefix) for name in statistic.transposed if name in means)
    else:
        means = statistic.means()
    tensors = {name.removeprefix(prefix): tensor.cpu() for name, tensor in means.items()}
    parents = [{"path": str(model), "digest": read_manifest(model).digest}]
    facts = {**facts, "transposed": transposed}
    save_checkpoint_folder(out, {STATISTICS: tensors}, parents=parents, settings=settings, facts=facts)


def facts_of(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """The facts of what was stored at ``path`` under ``fingerprint``; None where there is no such thing, intact."""
    if not (resolve(path) / MANIFEST_NAME).is_file():
        return None
    try:
        facts = read_manifest(path).facts
        return facts if facts.get(FINGERPRINT) == fingerprint else None
    except CheckpointError as error:
        rank_zero_info(f"{error} It is measured again.")
        return None


def own_domains(checkpoint: Path, adapters: str | None = None) -> tuple[str, ...] | None:
    """Domains of the stage of that set, else of that in which a checkpoint was written; None where there are none."""
    facts = read_manifest(checkpoint).facts
    if not facts.get("stages"):
        return None
    named = {stage["name"]: stage for stage in facts["stages"]}
    return tuple(named.get(adapters, facts["stages"][facts["stage"]])["domains"])


def check_samples(calibration: Calibration, module: LightningModule) -> None:
    """Refuse a run in which a stage has fewer training samples than ``calibration`` wants.

    Raises:
        ValueError: with the option to change.
    """
    data = module.trainer.datamodule
    if not isinstance(data, FulguriteDataModule):
        raise ValueError(f"{type(data).__name__} gives no samples to measure on: use a DataModule of this project")
    stages = [stage.domains for stage in data.stages()] if isinstance(module, AdaptedModule) else [data.info().domains]
    for domains in stages:
        available = sum(sample.domain in domains for sample in data.samples("train"))
        if calibration.samples > available:
            raise ValueError(
                f"calibration.samples={calibration.samples}, and {', '.join(domains)} has {available} training "
                f"samples: set calibration.samples to {available} or fewer"
            )
