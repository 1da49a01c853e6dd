"""Video-text retrieval: two towers, a head that compares them, trained to tell pairs apart (UCoFiA, CLIP4Clip, X-CLIP).

Every process embeds its own pairs. Features travel to all processes with their gradients, each process scores its own
texts against all videos, and the rows are put together: so W processes have the loss and the gradients of one process
with the W-fold batch, and share its work. (The published gather gives the towers 1/W of the gradient.)

Legend: B pairs of all processes, b those of this one, T texts, V videos, L levels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from fulgurite.backbones.sources import filled_later
from fulgurite.backbones.video_text import VideoTextBackbone
from fulgurite.backbones.video_text_collator import video_id
from fulgurite.methods.adapters.bank import Placement
from fulgurite.methods.random import digest_of
from fulgurite.methods.ranks import Ranks
from fulgurite.methods.retrieval.features import TextFeatures, VideoFeatures
from fulgurite.methods.retrieval.head import RetrievalHead
from fulgurite.methods.retrieval.losses import PairLoss, SymmetricCrossEntropy
from fulgurite.methods.retrieval.normalizers import NoNormalizer, ScoreNormalizer
from fulgurite.methods.schedules import Schedule
from fulgurite.metrics.retrieval_recall import RetrievalRecall
from fulgurite.modules.adapted import AdaptedModule
from fulgurite.modules.evaluation import moved
from fulgurite.modules.optimization import ParamGroup
from fulgurite.modules.retrieval_evaluation import Direction, Evaluation, Normalizing, Ranking, Shelf
from fulgurite.reports.page import Section
from fulgurite.reports.retrieval import sections_of_retrieval
from fulgurite.samples import Batch, DataError, DataInfo, Sample, Stage

Embedded = tuple[TextFeatures, VideoFeatures]


class VideoTextRetrieval(AdaptedModule):
    """A dual encoder and a head, fine-tuned with all their weights or by adapters.

    Names of trained tensors, for ``param_groups``: ``head...``, and ``backbone...`` where all weights train, or those
    of the live adapter set.

    Args:
        backbone: gives tokens of captions and videos.
        head: what is compared of them, and how.
        adapters: what trains beside the frozen backbone, and where; None trains the backbone itself.
        frozen: patterns of the backbone's parameters that do not train without adapters; None takes the published ones.
        train_head: whether the head trains.
        loss: of the (B, B) scores of a batch.
        checkpoint: file of a published model (UCoFiA, CLIP4Clip, X-CLIP) that backbone and head start from.
        selection_seed: of what is random in the head while training, together with step and sample.
        normalizer: of the scores of a test, beside which the raw ones are reported; None for these alone.
        normalize: directions that are normalised.
        bank_texts: training captions in the bank of a single-query normaliser, for text-to-video.
        bank_videos: training videos in its bank, for video-to-text.
        bank_seed: of the draw of both.
        optimizer: builds the optimizer from parameter groups; None is AdamW. Of another class all options are its own.
        schedule: learning-rate factor within a stage; every stage starts it afresh.
        param_groups: tensors with their own learning rate or weight decay; the rest uses the optimizer's.
    """

    saved_parts = ("bank", "head")
    shape_option = "head"
    forward_methods: tuple[str, ...] = ("embed", "embed_captions", "embed_videos", "levels_of")

    def __init__(
        self,
        backbone: VideoTextBackbone,
        head: RetrievalHead,
        adapters: list[Placement] | None = None,
        frozen: list[str] | None = None,
        train_head: bool = True,
        loss: PairLoss | None = None,
        checkpoint: Path | None = None,
        selection_seed: int = 0,
        normalizer: ScoreNormalizer | None = None,
        normalize: list[Direction] | None = None,
        bank_texts: int = 2048,
        bank_videos: int = 256,
        bank_seed: int = 0,
        optimizer: OptimizerCallable | None = None,
        schedule: Schedule | None = None,
        param_groups: list[ParamGroup] | None = None,
    ) -> None:
        normalize = normalize or ["text_to_video", "video_to_text"]
        if min(bank_texts, bank_videos) < 1:
            raise ValueError(
                f"model.init_args: bank_texts={bank_texts} and bank_videos={bank_videos} must be at least 1"
            )
        if normalizer is not None and normalizer.needs_whole_rows and "video_to_text" in normalize:
            raise ValueError(
                f"{type(normalizer).__name__} needs all candidates of a query at once, and captions come in blocks: "
                "set its dynamic to false, or model.init_args.normalize to [text_to_video]"
            )
        for name, given in backbone.lengths.items():
            most = head.limits.get(name)
            if most is not None and given > most:
                raise ValueError(
                    f"the backbone gives {given} {name}, and the head is made for at most {most}: raise "
                    f"model.init_args.head.init_args.max_{name}, or lower that of the backbone"
                )
        super().__init__(backbone, adapters, optimizer, schedule, param_groups, frozen)
        self.head = head
        self.head.build(backbone.tower_facts())
        if checkpoint is not None and not filled_later():
            from fulgurite.backbones.retrieval_checkpoints import load_retrieval_checkpoint

            load_retrieval_checkpoint(checkpoint, backbone, head)
        self.head.requires_grad_(train_head)
        self.loss = loss or SymmetricCrossEntropy()
        self.selection_seed = selection_seed
        self.normalizer = None if isinstance(normalizer, NoNormalizer) else normalizer
        self.normalize = tuple(normalize)
        self.bank_sizes: dict[str, int] = {"texts": bank_texts, "videos": bank_videos}
        self.bank_seed = bank_seed

    def build(self, info: DataInfo, stages: Sequence[Stage]) -> None:
        """Nothing here has a shape that depends on the data."""

    def setup(self, stage: str) -> None:
        """As in the base, on any data. Raises DataError for a caption that no batch could take."""
        datamodule = self.trainer.datamodule
        self.data_info = datamodule.info()
        for split in {"fit": ("train", "val"), "validate": ("val",)}.get(stage, (stage,)):
            self.backbone.check_captions(datamodule.samples(split))
        if stage == "fit" or self.info is None:
            self.prepare(self.data_info, datamodule.stages())

    def configure_model(self) -> None:
        """As in the base; parts of the module that are called by themselves gather its slices too."""
        super().configure_model()
        if self.device_mesh is not None:
            for name in self.forward_methods:
                register_fsdp_forward_method(self, name)

    def trained(self) -> dict[str, Tensor]:
        """As in the base, and ``head...``."""
        head = {f"head.{name}": p for name, p in self.head.named_parameters() if p.requires_grad}
        return {**super().trained(), **head}

    def initial_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As in the base, and the head."""
        head = {name: tensor for name, tensor in tensors.items() if name.startswith("head.")}
        return {**super().initial_weights(tensors), **head}

    def embed(self, batch: Batch, seeds: Sequence[int] | None = None) -> Embedded:
        """What is compared of the captions and of the videos of a batch."""
        texts = self.head.embed_text(self.backbone.text_tokens(batch))
        return texts, self.head.embed_video(self.backbone.video_tokens(batch), seeds)

    def embed_captions(self, batch: Batch) -> TextFeatures:
        """What is compared of captions alone, see `VideoTextBackbone.caption_batch`."""
        return self.head.embed_text(self.backbone.text_tokens(batch))

    def embed_videos(self, batch: Batch) -> VideoFeatures:
        """What is compared of videos alone."""
        return self.head.embed_video(self.backbone.video_tokens(batch))

    def levels_of(self, texts: TextFeatures, videos: VideoFeatures) -> Tensor:
        """(L, T, V) scores at the levels of the head."""
        return self.head.similarity(texts, videos)

    def forward(self, batch: Batch) -> Tensor:
        """(B, B) scores of this step's pairs, those of all processes, the same on each; rows are texts."""
        texts, videos = self.embed(batch, self.seeds(batch))
        everywhere = self.of_one_length(videos).map(self.gathered)
        return self.gathered(self.levels_of(texts, everywhere).mean(0))

    def of_one_length(self, videos: VideoFeatures) -> VideoFeatures:
        """Padded to the longest of all processes."""
        if self.trainer.world_size == 1:
            return videos
        ranks = Ranks(self.trainer.global_rank, self.trainer.world_size)
        found = ranks.gather(videos.lengths())
        return videos.padded({name: max(each[name] for each in found) for name in found[0]})

    def gathered(self, tensor: Tensor) -> Tensor:
        """The rows of all processes, in order of rank, with gradients that sum over them."""
        if self.trainer.world_size == 1:
            return tensor
        if not tensor.is_floating_point():
            return self.all_gather(tensor).flatten(0, 1)
        return self.all_gather(tensor, sync_grads=True).flatten(0, 1)

    def seeds(self, batch: Batch) -> list[int]:
        """One number per video of a batch, by step and sample alone."""
        step = self.trainer.global_step
        return [
            digest_of(self.selection_seed, "selection", step, f"{domain}/{name}") >> 65
            for domain, name in zip(batch["domain"], batch["id"])
        ]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of the global batch, on every process; repeats that keep processes in step count nowhere."""
        if len(batch["owner"]) != len(batch["counted"]):
            raise DataError("a training sample has several captions: give each caption a sample of its own")
        self.count_cut("train", batch)
        scores = self(batch)
        videos, counted = self.gathered(batch["video_id"]), self.gathered(batch["counted"])
        loss = self.loss(scores, videos[:, None] == videos, counted)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(counted))
        self.log("train/logit_scale", self.head.logit_scale.detach().exp().mean(), batch_size=len(counted))
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Keep the scale within its limit after every step."""
        super().optimizer_step(*args, **kwargs)
        self.head.clamp()

    def on_validation_start(self) -> None:
        """Each validation begins with nothing."""
        self.shelf = Shelf()

    def count_cut(self, stage: str, batch: Batch) -> None:
        """Log how many captions of an epoch were cut, where the backbone cuts them."""
        if "cut" in batch:
            cut = (batch["cut"] & batch["counted"][batch["owner"]]).sum().float()
            self.log(f"{stage}/cut_captions", cut, on_step=False, on_epoch=True, reduce_fx="sum", sync_dist=True)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Keep the features of a batch."""
        self.count_cut("val", batch)
        self.shelf.add(*self.embed(batch), batch)

    def on_validation_epoch_end(self) -> None:
        """Log recalls of the raw scores at all levels, ``val/text_to_video/R@1`` and so on."""
        if not self.trainer.sanity_checking:
            self.log_figures("val", self.figures(self.ranking(self.shelf)))
        del self.shelf

    def on_test_start(self) -> None:
        """Each test begins with nothing, and with the bank where scores are normalised by one."""
        self.shelf = Shelf()
        with self.trainer.precision_plugin.forward_context():  # as a step has it
            self.normalizing = None if self.normalizer is None else self.with_bank(self.normalizer)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Keep the features of a batch."""
        self.count_cut("test", batch)
        self.shelf.add(*self.embed(batch), batch)

    def on_test_epoch_end(self) -> None:
        """Log recalls of the raw scores at all levels, ``test/text_to_video/R@1`` and so on, and of the normalised
        ones, ``test/Sinkhorn/text_to_video/R@1``; keep those of all variants."""
        ranking = self.ranking(self.shelf, self.normalizing)
        variants = {name: self.figures(ranking, name) for name in ranking.counts}
        self.test_results = self.results_of(variants, ranking)
        whole = "+".join(self.head.levels)
        self.log_figures("test", variants[whole])
        if self.normalizer is not None:
            self.log_figures(f"test/{type(self.normalizer).__name__}", variants[f"{whole}+normalized"])
        self.test_answers = ranking.answers()
        del self.shelf, self.normalizing

    def results_of(self, variants: Mapping[str, Mapping[str, float]], ranking: Ranking) -> dict[str, Any]:
        """What a report is made of; see `sections_of_retrieval`."""
        return {
            "variants": variants,
            "levels": list(self.head.levels),
            "normalizer": None if self.normalizer is None else type(self.normalizer).__name__,
            "mode": None if self.normalizer is None else self.normalizer.mode,
            "videos": len(ranking.rows),
            "captions": sum(len(row["captions"]) for row in ranking.rows),
            "domains": sorted({row["domain"] for row in ranking.rows}),
        }

    def report_sections(self, samples: Sequence[Sample]) -> list[Section]:
        """The table of variants, and examples with pictures; see `ReportSource`."""
        return sections_of_retrieval(self.test_results, self.test_answers, samples)

    def scores(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Recalls of the raw scores of the present weights; see `Scored`."""
        shelf = Shelf()
        for batch in batches:
            shelf.add(*self.embed(batch), batch)
        return self.figures(self.ranking(shelf))

    def on_predict_start(self) -> None:
        """Each prediction begins with nothing."""
        self.shelf = Shelf()

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Keep the features of a batch; what is predicted takes all of them, see `predicted`."""
        self.shelf.add(*self.embed(batch), batch)
        return []

    def predicted(self) -> list[dict[str, Any]]:
        """One row per caption of this process: the best videos of the split. All processes call it."""
        return self.evaluation(self.shelf).best()

    @torch.no_grad()
    def ranking(self, shelf: Shelf, normalizing: Normalizing | None = None) -> Ranking:
        """Ranks of what all processes have on their shelves."""
        return self.evaluation(shelf, normalizing).run()

    def evaluation(self, shelf: Shelf, normalizing: Normalizing | None = None) -> Evaluation:
        """Of what all processes have on their shelves."""
        ranks = Ranks(self.trainer.global_rank, self.trainer.world_size)
        if isinstance(self, FSDPModule):
            self.unshard()  # once, together: processes score different numbers of blocks
        return Evaluation(shelf, self.score_block, self.head.levels, ranks, normalizing)

    def score_block(self, texts: TextFeatures, videos: VideoFeatures) -> Tensor:
        """(L, T, V) scores, of features from the CPU and back there."""
        here = (each.map(lambda tensor: tensor.to(self.device)) for each in (texts, videos))
        return self.levels_of(*here).float().cpu()

    def figures(self, ranking: Ranking, variant: str | None = None) -> dict[str, float]:
        """Recalls by name, of one variant (the last one when None), with those of each domain where there are several.

        All processes call it.
        """
        domains = sorted({row["domain"] for row in ranking.rows})
        metric = RetrievalRecall(groups=domains if len(domains) > 1 else ())
        counts = ranking.counts[variant or list(ranking.counts)[-1]]
        metric.update(counts, group=ranking.groups(domains) if len(domains) > 1 else None)
        return {name: float(value) for name, value in metric.to(self.device).compute().items()}

    def log_figures(self, prefix: str, figures: Mapping[str, float]) -> None:
        """Log them; every process calls it with the same."""
        for name, value in figures.items():
            if value == value:
                self.log(f"{prefix}/{name}", value, prog_bar=name == "text_to_video/R@1")

    def with_bank(self, normalizer: ScoreNormalizer) -> Normalizing:
        """The normaliser with the features of its bank, of which each process computes a share.

        Raises:
            DataError: it needs a bank, and the data have no training split.
        """
        if normalizer.mode == "transductive":
            return Normalizing(normalizer, directions=self.normalize)
        data = self.trainer.datamodule
        samples = data.prepared("train")
        if not samples:
            raise DataError(
                f"{type(normalizer).__name__} needs a bank of training captions, and {data.place('train')} has none: "
                "give the data a training split, or leave model.init_args.normalizer out"
            )
        generator = torch.Generator().manual_seed(self.bank_seed)
        drawn = [samples[i] for i in torch.randperm(len(samples), generator=generator).tolist()]
        texts = videos = None
        if "text_to_video" in self.normalize:
            texts = self.bank_of_texts([caption for sample in drawn for caption in sample.captions])
        if "video_to_text" in self.normalize:
            unique = {video_id(sample): sample for sample in drawn}
            videos = self.bank_of_videos(list(unique.values())[: self.bank_sizes["videos"]])
        return Normalizing(normalizer, texts, videos, self.normalize)

    @torch.no_grad()
    def bank_of_texts(self, captions: Sequence[str]) -> TextFeatures:
        """This process's share of the first ``bank_texts`` of the captions."""
        chosen, size = captions[: self.bank_sizes["texts"]], self.trainer.datamodule.eval_batch_size
        rank, world = self.trainer.global_rank, self.trainer.world_size
        own = [*chosen[rank::world], *chosen[:1]][: -(-len(chosen) // world)]  # as many on each process, to be in step
        parts = []
        for start in range(0, len(own), size):
            batch = self.backbone.caption_batch(own[start : start + size])
            texts = self.embed_captions(self.transfer_batch_to_device(batch, self.device, 0))
            parts.append(texts.map(Tensor.cpu))
        return TextFeatures.cat(parts)[: len(chosen[rank::world])]

    @torch.no_grad()
    def bank_of_videos(self, samples: Sequence[Sample]) -> VideoFeatures:
        """This process's share of the videos of ``samples``."""
        shelf = Shelf()
        for batch in moved(self.trainer, self, self.trainer.datamodule.loader("test", samples)):
            shelf.add(*self.embed(batch), batch)
        return shelf.videos
