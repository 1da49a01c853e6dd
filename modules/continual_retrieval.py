"""Continual video-text retrieval with dynamic adapter merging (DAM, arXiv 2403.08755) in both towers.

Domains arrive one after the other. At the end of a stage the live adapters are copied into the frozen set of that
stage. Two routers see what the frozen towers make of captions and of videos; at test time, when no domain is known,
they mix the sets for each caption and for each video. All captions are ranked against the videos of all domains.

Legend: T texts, V videos, F frames, K + 1 adapter sets: the initial one and one per stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from fulgurite.backbones.base import masked_mean
from fulgurite.backbones.video_text import VideoTextBackbone
from fulgurite.methods.adapters.bank import Placement
from fulgurite.methods.retrieval.features import TextFeatures, VideoFeatures
from fulgurite.methods.retrieval.head import RetrievalHead
from fulgurite.methods.retrieval.losses import PairLoss
from fulgurite.methods.routing.base import Router
from fulgurite.methods.routing.centroid import CentroidRouter
from fulgurite.methods.schedules import Schedule
from fulgurite.methods.sharding import reshard
from fulgurite.modules.adapted import INITIAL
from fulgurite.modules.evaluation import evaluation_mode
from fulgurite.modules.modes import MODE_NAMES, Mode, mode_weights
from fulgurite.modules.optimization import ParamGroup
from fulgurite.modules.retrieval_evaluation import Shelf
from fulgurite.modules.stage_sets import StageSets
from fulgurite.modules.video_text_retrieval import Embedded, VideoTextRetrieval
from fulgurite.samples import Batch, DataInfo, Stage, first_stages

RETRIEVAL_MODES: tuple[Mode, ...] = ("dynamic", "router", "average", "oracle", "last", "zero_shot")


class ContinualRetrieval(StageSets, VideoTextRetrieval):
    """Adapters per domain in both towers, two routers, and merging per caption and per video.

    A head that trains is one for all stages, and forgets; so by default it does not.

    Args:
        backbone: gives tokens of captions and videos.
        head: what is compared of them, and how.
        adapters: what trains beside the frozen backbone, and where. Their kinds must define mixing.
        router: gives mixing weights of captions; default is DAM's (top 2, temperature 0.01).
        video_router: the same for videos.
        mode: how validation embeds.
        modes: what ``test`` compares after the last stage; None for all of them.
        start_from: a new stage starts from the previous stage's adapters, or from those before any stage.
        train_head: see `VideoTextRetrieval`.
        loss: see `VideoTextRetrieval`.
        selection_seed: see `VideoTextRetrieval`.
        optimizer: see `VideoTextRetrieval`.
        schedule: see `VideoTextRetrieval`.
        param_groups: see `VideoTextRetrieval`.

    Raises:
        ValueError: a mode that retrieval does not have, or ``mode`` is not among ``modes``.
    """

    saved_parts = ("bank", "head", "router", "video_router")
    forward_methods = (*VideoTextRetrieval.forward_methods, "routing", "embed_mixed")

    def __init__(
        self,
        backbone: VideoTextBackbone,
        head: RetrievalHead,
        adapters: list[Placement],
        router: Router | None = None,
        video_router: Router | None = None,
        mode: Mode = "dynamic",
        modes: list[Mode] | None = None,
        start_from: Literal["previous", "initial"] = "previous",
        train_head: bool = False,
        loss: PairLoss | None = None,
        selection_seed: int = 0,
        optimizer: OptimizerCallable | None = None,
        schedule: Schedule | None = None,
        param_groups: list[ParamGroup] | None = None,
    ) -> None:
        super().__init__(
            backbone,
            head,
            adapters,
            train_head=train_head,
            loss=loss,
            selection_seed=selection_seed,
            optimizer=optimizer,
            schedule=schedule,
            param_groups=param_groups,
        )
        self.router = CentroidRouter() if router is None else router
        self.video_router = CentroidRouter() if video_router is None else video_router
        self.mode, self.modes, self.start_from = mode, list(modes or RETRIEVAL_MODES), start_from
        unknown = [each for each in (mode, *self.modes) if each not in RETRIEVAL_MODES]
        if unknown or mode not in self.modes:
            raise ValueError(
                f"mode {mode!r} and modes={self.modes}: choose of {RETRIEVAL_MODES}, the one of the others"
            )

    def build(self, info: DataInfo, stages: Sequence[Stage]) -> None:
        """The routers."""
        for router in (self.router, self.video_router):
            router.build(self.backbone.tower_facts().width, [stage.name for stage in stages])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step of the live set; in a stage's first epoch the routers also see the batch."""
        if self.in_first_epoch:
            with torch.no_grad(), evaluation_mode(self):
                texts, videos = self.routing(batch)
            self.teach([self.router], (texts,), batch["counted"][batch["owner"]])
            self.teach([self.video_router], (videos,), batch["counted"])
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        """At a stage's end its set takes the live values; checkpoints of this epoch are written after this."""
        super().on_train_epoch_end()
        if self.ends_stage:
            reshard(self)
            self.bank.copy("live", self.stages[self.stage].name)

    def routing(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(T, D) and (V, D), of captions and videos, by the frozen towers with the adapters before any stage."""
        return self.routing_of_captions(batch), self.routing_of_videos(batch)

    def routing_of_captions(self, batch: Batch) -> Tensor:
        """(T, D), see `routing`."""
        with self.bank.use(INITIAL):
            return self.backbone.text_tokens(batch).sentence

    def routing_of_videos(self, batch: Batch) -> Tensor:
        """(V, D), see `routing`."""
        with self.bank.use(INITIAL):
            videos = self.backbone.video_tokens(batch)
        return masked_mean(videos.tokens[:, :, 0], videos.mask)

    def mixed_captions(self, batch: Batch, weights: Tensor) -> TextFeatures:
        """What is compared of captions, by adapters mixed with weights (T, K + 1)."""
        with self.bank.use(weights, self.columns()):
            texts = self.backbone.text_tokens(batch)
        return self.head.embed_text(texts)

    def mixed_videos(self, batch: Batch, weights: Tensor) -> VideoFeatures:
        """What is compared of videos, by adapters mixed with weights (V, K + 1)."""
        frames = batch["frame_mask"].shape[1]
        with self.bank.use(weights.repeat_interleave(frames, dim=0), self.columns()):
            videos = self.backbone.video_tokens(batch)
        return self.head.embed_video(videos)

    def embed_mixed(self, batch: Batch, of_texts: Tensor, of_videos: Tensor) -> Embedded:
        """`embed` by mixed adapters, with weights of captions and of videos."""
        return self.mixed_captions(batch, of_texts), self.mixed_videos(batch, of_videos)

    def embed_captions(self, batch: Batch) -> TextFeatures:
        """By the configured mode; their domains are not known, so the oracle has no stage for them."""
        features = self.routing_of_captions(batch)
        return self.mixed_captions(batch, self.weights_of(self.router, features))

    def embed_videos(self, batch: Batch) -> VideoFeatures:
        """By the configured mode; see `embed_captions`."""
        features = self.routing_of_videos(batch)
        return self.mixed_videos(batch, self.weights_of(self.video_router, features))

    def weights_of(self, router: Router, features: Tensor) -> Tensor:
        """(B, K + 1) of samples of unknown domains, by the configured mode after the stages trained so far."""
        nowhere = torch.zeros(len(features), dtype=torch.long, device=features.device)
        return mode_weights(self.mode, self.stage + 1, len(self.stages), [router], features, nowhere)

    def embed_in(self, modes: Sequence[Mode], batch: Batch) -> dict[Mode, Embedded]:
        """What is compared, by each mode, after the stages trained so far."""
        stage, last = self.stage + 1, len(self.stages)
        texts, videos = self.routing(batch)
        numbers = first_stages(self.info.domains, self.stages)
        known = {domain: i for i, domain in enumerate(self.info.domains)}
        domains = torch.tensor([known.get(domain, -1) for domain in batch["domain"]], device=self.device)
        own = self.own_stages(numbers, domains)
        found = {}
        for mode in modes:
            of_texts = mode_weights(mode, stage, last, [self.router], texts, own[batch["owner"]])
            of_videos = mode_weights(mode, stage, last, [self.video_router], videos, own)
            found[mode] = self.embed_mixed(batch, of_texts, of_videos)
        return found

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Keep the features of a batch, by the configured mode."""
        self.shelf.add(*self.embed_in([self.mode], batch)[self.mode], batch)

    def scores(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Recalls by the configured mode; see `Scored`."""
        shelf = Shelf()
        for batch in batches:
            shelf.add(*self.embed_in([self.mode], batch)[self.mode], batch)
        return self.figures(self.ranking(shelf))

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Keep the features of a batch, by the configured mode."""
        self.shelf.add(*self.embed_in([self.mode], batch)[self.mode], batch)
        return []

    def on_test_start(self) -> None:
        """Each test begins with nothing."""
        self.shelves = {mode: Shelf() for mode in self.modes}

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Keep the features of a batch, by every mode."""
        for mode, embedded in self.embed_in(self.modes, batch).items():
            self.shelves[mode].add(*embedded, batch)

    def on_test_epoch_end(self) -> None:
        """Log ``test/<mode>/...`` of every mode, and ``test/...`` of the configured one."""
        rankings = {mode: self.ranking(shelf) for mode, shelf in self.shelves.items()}
        figures = {mode: self.figures(ranking) for mode, ranking in rankings.items()}
        for mode, each in figures.items():
            self.log_figures(f"test/{mode}", each)
        self.log_figures("test", figures[self.mode])
        variants = {f"{MODE_NAMES[mode]}{' *' if mode == self.mode else ''}": each for mode, each in figures.items()}
        self.test_results = self.results_of(variants, rankings[self.mode])
        self.test_answers: list[dict[str, Any]] = rankings[self.mode].answers()
        del self.shelves
