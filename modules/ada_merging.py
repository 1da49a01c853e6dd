"""AdaMerging: coefficients of task vectors, fitted to pictures without labels (arXiv 2310.02575).

    theta(lambda) = theta_0 + sum_i lambda_{i,l} tau_i          l: parameter tensor, or none ("task")
    loss = sum_i mean_x H(softmax(head_i(f(x; theta(lambda)))))   one batch of every task a step

Only the T x L coefficients get gradients; encoder, task vectors and heads are frozen. Coefficients lie in [0, 1] and
start at 0.3, where the model is that of task arithmetic. Running statistics of normalisation are the experts' mean.
AdaMerging++ takes the task vectors that TIES has trimmed and elected.

Legend: B batch, T experts, L parameter tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Adam, Optimizer

from fulgurite.backbones.frames import FrameEncoder
from fulgurite.checkpoints import (
    MismatchError,
    MissingError,
    load_tensors,
    naming_another,
    newest_checkpoint,
    read_manifest,
    save_checkpoint_folder,
)
from fulgurite.checkpoints.manifest import MANIFEST_NAME, Manifest
from fulgurite.checkpoints.runs import ARTEFACTS
from fulgurite.methods.merging.base import STATISTIC, average
from fulgurite.methods.merging.elected import elected_task_vectors
from fulgurite.methods.ranks import Ranks
from fulgurite.modules.classification import Classes, Classifier, PictureCollator, classes_in
from fulgurite.samples import Batch, Collator

ENCODER, ARTEFACT = "encoder.", "merged-ada_merging"


class AdaMerging(Classifier):
    """A fitted merger of image classifiers that were fine-tuned from one pretrained encoder.

    The result is the artefact ``artefacts/merged-ada_merging`` of the run: encoder and all heads, self-contained, with
    the coefficients in its manifest. Checkpoints hold the coefficients alone. Memory: T + 3 encoders.

    Args:
        encoder: the pretrained encoder that the experts began with, ``grid: 0``.
        experts: runs or checkpoints of `ImageClassifier`, each with heads of its own.
        level: one coefficient per expert and parameter tensor (``layer``), or one per expert (``task``).
        initial: start of every coefficient.
        clamp: keep coefficients in [0, 1] where they are used, as published.
        density: for AdaMerging++ the share of task vectors that TIES keeps, 0.2 there; None takes them as they are.
        optimizer: of the coefficients; None is Adam.

    Raises:
        ValueError: fewer than two experts, or an ``initial`` outside [0, 1] with ``clamp``.
    """

    base_state: dict[str, Tensor]

    def __init__(
        self,
        encoder: FrameEncoder,
        experts: list[str],
        level: Literal["layer", "task"] = "layer",
        initial: float = 0.3,
        clamp: bool = True,
        density: float | None = None,
        optimizer: OptimizerCallable | None = None,
    ) -> None:
        super().__init__(encoder)
        if len(experts) < 2:
            raise ValueError(f"experts={experts}: two or more are merged")
        if clamp and not 0 <= initial <= 1:
            raise ValueError(f"initial={initial} is outside [0, 1], where clamp keeps coefficients")
        self.paths = [Path(path) for path in experts]
        self.level, self.clamp, self.density, self.optimizer = level, clamp, density, optimizer or Adam
        self.names = [name for name, _ in self.encoder.named_parameters()]
        columns = len(self.names) if level == "layer" else 1
        self.coefficients = nn.Parameter(torch.full((len(experts), columns), float(initial)))
        self.parents: list[dict[str, str]] = []

    def prepare(self) -> None:
        """Read the experts: task vectors, mean running statistics, heads. The same call again does nothing.

        Raises:
            CheckpointError: an expert is missing or damaged, or is no classifier of this encoder.
        """
        if self.parents:
            return
        folders = [checkpoint_of(path) for path in self.paths]
        manifests = [read_manifest(folder) for folder in folders]
        states = [read_expert(folder) for folder in folders]
        require_experts(self.encoder, self.pretrained, folders, manifests, states)
        encoders = [of_encoder(state) for state in states]
        self.build_heads(joined(folders, manifests))
        own = {name: t for state in states for name, t in state.items() if name.startswith("heads.")}
        self.heads.load_state_dict({name.removeprefix("heads."): tensor for name, tensor in own.items()})
        self.heads.requires_grad_(False)
        self.take_task_vectors(encoders)
        for name, buffer in self.encoder.named_buffers():
            if STATISTIC.search(name):
                buffer.copy_(average([state[name].to(buffer) for state in encoders], [1.0] * len(encoders)))
        self.parents = [{"path": str(f), "digest": m.digest} for f, m in zip(folders, manifests)]
        self.expert_settings = dict(manifests[0].settings)

    def take_task_vectors(self, encoders: Sequence[Mapping[str, Tensor]]) -> None:
        """tau as one buffer (T, ..) per parameter, which no checkpoint holds."""
        base = {name: p.detach() for name, p in self.encoder.named_parameters()}
        experts = [{name: state[name].to(base[name]) for name in self.names} for state in encoders]
        if self.density is None:
            taus = [{name: expert[name] - base[name] for name in self.names} for expert in experts]
        else:
            taus = elected_task_vectors(experts, base, self.density)
        for number, name in enumerate(self.names):
            self.register_buffer(f"tau_{number}", torch.stack([tau[name] for tau in taus]), persistent=False)

    def collator(self, stage: str) -> Collator:
        """As in the base; a fit needs no labels."""
        return PictureCollator(self.encoder.transform, labelled=stage in ("validate", "test"))

    def used_coefficients(self) -> Tensor:
        """(T, L) coefficients as they are used."""
        used = self.coefficients.clamp(0, 1) if self.clamp else self.coefficients
        return used.expand(-1, len(self.names))

    def merged_parameters(self) -> dict[str, Tensor]:
        """theta(lambda), with gradients to the coefficients."""
        used, own = self.used_coefficients(), dict(self.encoder.named_parameters())
        return {
            name: own[name] + torch.tensordot(used[:, number], getattr(self, f"tau_{number}"), dims=1)
            for number, name in enumerate(self.names)
        }

    def features(self, pixels: Tensor) -> Tensor:
        """Those of the merged encoder."""
        return functional_call(self.encoder, self.merged_parameters(), (pixels,)).squeeze(1)

    def setup(self, stage: str) -> None:
        """Read the experts, before a strategy wraps the module.

        Raises:
            DataError: a data set that no expert has a head for.
        """
        self.prepare()
        self.require_heads(self.trainer.datamodule.info().domains)

    def training_step(self, batch: Batch | dict[str, Batch], batch_idx: int) -> Tensor:
        """Sum over the tasks of the mean entropy of what their own heads say; labels are not looked at.

        Takes one batch of every task, as `UnlabelledTasks` gives them, or a mixed one.
        """
        parts = [batch] if "pixels" in batch else list(batch.values())
        features = self.features(torch.cat([part["pixels"] for part in parts]))
        counted = torch.cat([part["counted"] for part in parts])
        domains = [domain for part in parts for domain in part["domain"]]
        loss = torch.zeros((), device=self.device)
        for name, head in self.heads.items():
            own = torch.tensor([domain == name for domain in domains], device=self.device)
            mean = self.global_mean(entropy(head(features)), counted & own)
            self.log(f"train/entropy/{name}", mean.detach(), batch_size=len(domains), sync_dist=True)
            loss = loss + mean
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(domains), sync_dist=True)
        return loss

    def configure_optimizers(self) -> Optimizer:
        """The coefficients alone."""
        return self.optimizer([self.coefficients])

    def on_train_end(self) -> None:
        """Write the artefact; rank 0 does, the others wait, and fail where it does."""
        trainer = self.trainer
        if trainer.fast_dev_run:
            return
        folder = Path(trainer.default_root_dir) / ARTEFACTS / ARTEFACT
        ranks = Ranks(trainer.global_rank, trainer.world_size)
        adapted_to = getattr(trainer.datamodule, "adapt_to", "train")
        ranks.agree(lambda: self.write(folder, adapted_to, trainer.global_step) if ranks.rank == 0 else None)
        rank_zero_info(f"merged {len(self.paths)} classifiers: {folder}")

    @torch.no_grad()
    def merged_state(self) -> dict[str, Tensor]:
        """Encoder and heads with the names of an `ImageClassifier`."""
        encoder = {**self.encoder.state_dict(), **self.merged_parameters()}
        heads = {f"heads.{name}": tensor for name, tensor in self.heads.state_dict().items()}
        return {**{f"{ENCODER}{name}": tensor.detach().cpu() for name, tensor in encoder.items()}, **heads}

    def write(self, folder: Path, adapted_to: str, steps: int) -> None:
        """Publish the merged classifier as a checkpoint folder, with lineage and coefficients."""
        used = self.used_coefficients().detach().cpu()
        facts = {
            "classes": {domain: list(labels) for domain, labels in self.classes.items()},
            "pretrained": self.pretrained,
            "merger": type(self).__name__,
            "level": self.level,
            "density": self.density,
            "adapted_to": f"{adapted_to} pictures, without their labels",
            "steps": steps,
            "coefficients": dict(zip(self.names, used.T.tolist())) if self.level == "layer" else used[:, 0].tolist(),
        }
        model = self.expert_settings.get("model")
        settings = {} if model is None else {"model": model}
        save_checkpoint_folder(
            folder, {"weights": self.merged_state()}, parents=self.parents, settings=settings, facts=facts
        )

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:
        """The coefficients alone."""
        whole = super().state_dict(*args, prefix=prefix, **kwargs)
        return {name: value for name, value in whole.items() if name == f"{prefix}coefficients"}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Raises `MismatchError` where it holds anything but coefficients of these shapes."""
        shapes = {name: tuple(value.shape) for name, value in state_dict.items()}
        if shapes != {"coefficients": tuple(self.coefficients.shape)}:
            raise MismatchError(f"the checkpoint holds {shapes}, not coefficients {tuple(self.coefficients.shape)}")
        # Name and shape were compared; what is missing are the experts, which come from their own files.
        return super().load_state_dict(dict(state_dict), strict=False, assign=assign)

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Read the experts that the checkpoint stands on. Raises `MismatchError` where they are others by now."""
        self.prepare()
        if [parent["digest"] for parent in self.parents] != facts.get("experts"):
            raise MismatchError("the checkpoint's coefficients are of other experts than model.init_args.experts")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record what the coefficients are of."""
        checkpoint["fulgurite"] = {
            **checkpoint.get("fulgurite", {}),
            "kind": "delta",
            "base": self.pretrained,
            "parents": self.parents,
            "experts": [parent["digest"] for parent in self.parents],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse coefficients of other experts."""
        self.restore(checkpoint.get("fulgurite", {}))


def entropy(logits: Tensor) -> Tensor:
    """(B, C) to (B,): - sum_c p_c log p_c of the softmax."""
    logs = logits.float().log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def checkpoint_of(path: Path) -> Path:
    """The checkpoint folder ``path``, or the newest of the run ``path``. Raises `MissingError` where there is none."""
    if (path / MANIFEST_NAME).is_file():
        return path
    found = newest_checkpoint(path)
    if found is None:
        raise MissingError(f"experts: no checkpoint at {path}, and no run with checkpoints")
    return found


def read_expert(folder: Path) -> dict[str, Tensor]:
    """All tensors of an expert, verified."""
    with naming_another(folder):
        return load_tensors(folder)


def of_encoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's tensors by their names in it."""
    return {name.removeprefix(ENCODER): t for name, t in state.items() if name.startswith(ENCODER)}


def require_experts(
    encoder: nn.Module,
    pretrained: Mapping[str, str],
    folders: Sequence[Path],
    manifests: Sequence[Manifest],
    states: Sequence[Mapping[str, Tensor]],
) -> None:
    """Raise `MismatchError` for an expert of another pretrained encoder, or with other tensors."""
    own = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    for folder, manifest, state in zip(folders, manifests, states):
        began = manifest.facts.get("pretrained")
        if began is not None and began["digest"] != pretrained["digest"]:
            raise MismatchError(
                f"{folder} was fine-tuned from {began['source']} with digest {began['digest']}, and the encoder of "
                f"this run is {pretrained['source']} with {pretrained['digest']}: give the experts' encoder"
            )
        found = {name: tuple(tensor.shape) for name, tensor in of_encoder(state).items()}
        wrong = sorted(name for name in own.keys() | found.keys() if own.get(name) != found.get(name))
        if wrong:
            raise MismatchError(f"{folder} does not fit the encoder in {len(wrong)} tensors, the first is {wrong[0]}")


def joined(folders: Sequence[Path], manifests: Sequence[Manifest]) -> Classes:
    """The classes of all experts. Raises `MismatchError` where two have a head for the same domain."""
    out: Classes = {}
    for folder, manifest in zip(folders, manifests):
        classes = classes_in(manifest.facts)
        twice = sorted(out.keys() & classes.keys())
        if twice:
            raise MismatchError(f"{folder}: another expert has a head for {twice} too; give one expert per domain")
        out |= classes
    return out
