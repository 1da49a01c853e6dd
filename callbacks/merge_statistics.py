"""The statistics that data-driven mergers weigh experts by, measured at a boundary.

Each expert is measured in a second module, whole in every process whatever the strategy, on its own training samples.
The processes share the samples and add up their sums in float64, so that several give what one gives, up to the order
of additions. What is measured lies beside the artefact until that is there: an interrupted boundary goes on in the
middle of an expert, and gives what an uninterrupted one gives.
"""

from __future__ import annotations

import copy
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
from fulgurite.methods.merging.regmean import RegMean
from fulgurite.methods.statistics.base import Statistic
from fulgurite.methods.statistics.fisher import FisherStatistics
from fulgurite.methods.statistics.gram import GramStatistics, input_width
from fulgurite.modules.adapted import AdaptedModule
from fulgurite.modules.calibration import SETS, Calibrated, counted_inputs, masks_by_layer, using
from fulgurite.samples import Batch
from fulgurite.samples.loader import ResumableLoader

SAVE_EVERY_S = 60.0  # least time between two saves of what one process has measured
MEASURED = "measured"
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
    found, facts, builder = [], [], OneModule(context)
    for expert in experts:
        folder = statistics_folder(context.out) / expert.label
        manifest = measure_expert(merger, expert, calibration, context, folder, builder)
        found.append((load_tensors(folder / MEASURED), manifest.facts["transposed"]))
        facts.append(
            {"expert": expert.label, **manifest.facts["data"], "digest": digest_of_json(identity(folder / MEASURED))}
        )
    common = set.intersection(*(set(tensors) for tensors, _ in found))
    if not common:
        raise ValueError(
            f"{type(merger).__name__}: nothing of {experts[0].path} has a {merger.kind} that all experts share"
        )
    merger = copy.copy(merger)
    statistics = [{name: tensor for name, tensor in tensors.items() if name in common} for tensors, _ in found]
    if isinstance(merger, RegMean):
        return merger.use(statistics, transposed=[name for name in found[0][1] if name in common]), facts
    return merger.use(statistics), facts


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


def measure_expert(
    merger: DataDrivenMerger,
    expert: Expert,
    calibration: Calibration,
    context: Context,
    folder: Path,
    builder: OneModule,
) -> Any:
    """Have the statistic of one expert in ``folder``, measured now or before; returns its manifest."""
    ranks = context.ranks
    loader = context.calibration(calibration.samples, calibration.seed, expert.domains)
    samples = loader.dataset.samples
    data = {
        "samples": len(samples),
        "domains": sorted({sample.domain for sample in samples}),
        "data": digest_of_json([[sample.domain, sample.id, sample.question] for sample in samples]),
    }
    about = {"model": identity(expert.path), "adapters": expert.adapters, **data, "kind": merger.kind}
    fingerprint = digest_of_json({**about, "calibration": described(calibration)})
    done = folder / MEASURED
    if not ranks.gather(ranks.rank == 0 and facts_of(done, fingerprint) is not None)[0]:
        # A checkpoint may be published within a validation, whose tensors know no gradients.
        with torch.inference_mode(False), torch.no_grad():
            module = ranks.agree(lambda: builder.of(expert.path))
            statistic = ranks.agree(lambda: statistic_of(merger.kind, module, expert, calibration))
            sampler = loader.batch_sampler
            shares = {"rank": ranks.rank, "ranks": ranks.size, "batch": sampler.global_batch_size}
            own = digest_of_json({"of": fingerprint, **shares})
            partial = folder / f"partial-{ranks.rank}"
            ranks.agree(lambda: go_on(statistic, loader, module, expert, partial, own))
            statistic.reduce(ranks.total)
            ranks.agree(lambda: publish(done, statistic, expert, fingerprint, data) if ranks.rank == 0 else None)
            ranks.agree(lambda: remove(partial))
    manifest = read_manifest(done)
    rank_zero_info(f"{context.out.name}: {merger.kind} of {expert.label} measured on {data['samples']} samples")
    return manifest


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
    return GramStatistics(module, "|".join(map(re.escape, layers)), len(layers), dtype=torch.float64)


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


def go_on(
    statistic: Statistic, loader: ResumableLoader, module: nn.Module, expert: Expert, partial: Path, fingerprint: str
) -> None:
    """Add what of this process's batches is not in ``partial`` yet, and save there every now and then."""
    if (facts := facts_of(partial, fingerprint)) is not None:
        state = {name: stored(partial, name) for name in ("sums", "counts")}
        statistic.load_state_dict({**state, "settings": facts["settings"]})
        if facts["loader"]["count"] >= len(loader.batch_sampler):
            return
        loader.load_state_dict(facts["loader"])
    samples = loader.dataset.samples
    places = {(sample.domain, sample.id): place for place, sample in enumerate(samples)}
    saved = time.monotonic()
    for batch in loader:
        add(statistic, module, batch, expert, places)
        if time.monotonic() - saved >= SAVE_EVERY_S:
            state = statistic.state_dict()
            save_checkpoint_folder(
                partial,
                {"sums": state["sums"], "counts": state["counts"]},
                facts={FINGERPRINT: fingerprint, "settings": state["settings"], "loader": loader.state_dict()},
            )
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


def publish(path: Path, statistic: Statistic, expert: Expert, fingerprint: str, data: Mapping[str, Any]) -> None:
    """Write the finished statistic under the names of the merged tensors."""
    transposed: list[str] = []
    if isinstance(statistic, GramStatistics):
        means = statistic.means(leave_out=statistic.unseen)
        transposed = sorted(name.removeprefix(expert.prefix) for name in statistic.transposed if name in means)
    else:
        means = statistic.means()
    tensors = {name.removeprefix(expert.prefix): tensor.cpu() for name, tensor in means.items()}
    parents = [{"path": str(expert.path), "digest": read_manifest(expert.path).digest}]
    facts = {FINGERPRINT: fingerprint, "transposed": transposed, "data": dict(data)}
    save_checkpoint_folder(path, {"weights": tensors}, parents=parents, facts=facts)


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


def stored(path: Path, name: str) -> dict[str, Tensor]:
    """A mapping of tensors of a partial statistic."""
    return dict(load_tensors(path, name))


def own_domains(checkpoint: Path) -> tuple[str, ...] | None:
    """Domains of the stage in which a checkpoint was written; None where its run had no stages."""
    facts = read_manifest(checkpoint).facts
    return tuple(facts["stages"][facts["stage"]]["domains"]) if facts.get("stages") else None


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
