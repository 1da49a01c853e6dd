"""Vision-language tasks that are answered by writing, with adapters beside a frozen backbone (arXiv 2112.06825).

Which loss a task has, how it is written and what it is judged by is in `generation_tasks`. A batch may hold one task or
several; kinds of adapters that route by task get each sample's from the batch.

Legend: B samples, T target tokens, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from fulgurite.backbones.generation import GenerativeBackbone
from fulgurite.methods.adapters.bank import Placement
from fulgurite.methods.adapters.tasks import tasks_of
from fulgurite.methods.generation_losses import IGNORED, token_means
from fulgurite.methods.ranks import Ranks
from fulgurite.methods.schedules import Schedule
from fulgurite.metrics.caption_words import Tokenizer
from fulgurite.metrics.captions import CaptionScores, Score
from fulgurite.modules.answering import AnsweringModule
from fulgurite.modules.data_start import Inputs
from fulgurite.modules.generation_tasks import (
    CHOICES,
    Prefixes,
    TextCollator,
    first_difference,
    rules_of,
    sampled_answers,
)
from fulgurite.modules.optimization import ParamGroup
from fulgurite.samples import Batch, Collator, DataError


class VisionLanguageGeneration(AnsweringModule):
    """Questions about pictures and videos, and captions, from whatever the DataModule gives.

    Args:
        backbone: frozen model that reads pictures and text, and writes.
        adapters: what trains beside it, and where; None trains the backbone itself.
        frozen: patterns of the backbone's parameters that do not train without adapters; None takes its own.
        task_prefixes: name its task in each text, as in ``vqa: `` before it or, with videos, after it. The published
            runs with an adapter per task have none.
        prefixes: other prefixes by task, as the published ``{gqa: "gpa: "}``.
        answer_seed: of the draw of one answer per sample and epoch.
        num_beams: beams where captions are written.
        caption_tokens: most tokens of a caption.
        answer_tokens: most tokens of an answer.
        caption_scores: what captions are judged by, see `CaptionScores`; None takes those that need no Java.
        caption_words: what words are to these scores; ``"ptb"``, which needs Java, for published figures.
        optimizer: builds the optimizer from parameter groups; None is AdamW. Of another class all options are its own.
        schedule: learning-rate factor within a stage; every stage starts it afresh.
        param_groups: tensors with their own learning rate or weight decay; the rest uses the optimizer's.
    """

    def __init__(
        self,
        backbone: GenerativeBackbone,
        adapters: list[Placement] | None = None,
        frozen: list[str] | None = None,
        task_prefixes: bool = True,
        prefixes: dict[str, str] | None = None,
        answer_seed: int = 0,
        num_beams: int = 5,
        caption_tokens: int = 40,
        answer_tokens: int = 20,
        caption_scores: list[Score] | None = None,
        caption_words: Tokenizer = "plain",
        optimizer: OptimizerCallable | None = None,
        schedule: Schedule | None = None,
        param_groups: list[ParamGroup] | None = None,
    ) -> None:
        super().__init__(backbone, adapters, optimizer, schedule, param_groups, frozen)
        if min(num_beams, caption_tokens, answer_tokens) < 1:
            raise ValueError(
                f"model.init_args: num_beams={num_beams}, caption_tokens={caption_tokens} and "
                f"answer_tokens={answer_tokens} must be at least 1"
            )
        self.put = Prefixes(task_prefixes, prefixes)
        self.answer_seed = answer_seed
        scores = ("CIDEr", "BLEU", "ROUGE-L") if caption_scores is None else caption_scores
        self.caption_metric = functools.partial(CaptionScores, scores, caption_words)
        self.searches = {"greedy": (1, answer_tokens), "beams": (num_beams, caption_tokens)}

    def collator(self, stage: str) -> Collator:
        """The backbone's, of texts with the prefixes of their tasks."""
        return TextCollator(self.backbone.collator(stage), self.put)

    def configure_model(self) -> None:
        """As in the base; what is called by itself gathers its slices too, and processes write in step."""
        was_sharded = isinstance(self, FSDPModule)
        super().configure_model()
        if isinstance(self, FSDPModule) and not was_sharded:
            for name in ("write_ids", "choice_logits"):
                register_fsdp_forward_method(self, name)
            for part in self.backbone.modules():
                if hasattr(part, "generate"):
                    part._is_fsdp_managed_module = True  # by which transformers lets no process stop before the others

    def forward(self, batch: Batch, targets: Tensor) -> Tensor:
        """Logits (B, T, V) of each token of ``targets`` (B, T), from the true ones before it."""
        with tasks_of(self.task_numbers(batch)):
            logits = self.backbone(batch, targets)
        return self.task_gradients.with_all(logits) if torch.is_grad_enabled() and self.shares_tasks else logits

    def targets(self, texts: Sequence[str], tasks: Sequence[str]) -> Tensor:
        """(B, T) of texts that are learned, each cut as its task says, whatever the others of the batch."""
        lengths = [rules_of(task).target_length for task in tasks]
        return self.backbone.target_batch(texts, lengths)["targets"].to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The published loss of each sample's task over the global batch, whatever the number of processes."""
        texts, scores = sampled_answers(batch, self.answer_seed, self.trainer.current_epoch)
        targets = self.targets(texts, batch["task"])
        losses, lengths = token_means(self(batch, targets), targets)
        if self.shares_tasks:
            self.task_gradients.add(self.task_numbers(batch).to(self.device), self.total)
        kinds = [rules_of(task).loss for task in batch["task"]]
        return self.batch_loss(losses, batch, kinds, torch.tensor(scores, device=losses.device), lengths)

    def example_inputs(self, batch: Batch) -> Inputs:
        """Texts, pictures and what is learned of them in the first epoch; see `ByExample`.

        Raises:
            DataError: samples with raw pictures have different numbers of them.
        """
        texts, scores = sampled_answers(batch, self.answer_seed, 0)
        kinds = [rules_of(task).loss for task in batch["task"]]
        inputs = {name: batch[name] for name in ("text", "text_mask", "features", "picture") if name in batch}
        inputs["targets"] = self.targets(texts, batch["task"])
        inputs["weight"] = torch.tensor([s if kind == "scored" else 1.0 for kind, s in zip(kinds, scores)]).to(
            self.device
        )
        if (numbers := self.task_numbers(batch)) is not None:
            inputs["task_number"] = numbers
        if "pixels" in batch:
            each, rest = divmod(len(batch["pixels"]), len(texts))
            if rest:
                raise DataError("adapters that start from data need as many pictures of each sample: set feature_cache")
            inputs["pixels"] = batch["pixels"].unflatten(0, (-1, each))
        return inputs

    def example_losses(self, inputs: Inputs) -> Tensor:
        """(B,) losses as `training_step` weighs them, but for lengths; see `ByExample`."""
        logits, _ = self.example_logits(inputs)
        return token_means(logits, inputs["targets"])[0] * inputs["weight"]

    def example_logits(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """(B, T, V) logits of the target tokens and where there are such (B, T); see `ByExample`."""
        batch = dict(inputs)
        if "pixels" in batch:
            batch["pixels"] = batch["pixels"].flatten(0, 1)
        with tasks_of(batch.pop("task_number", None)):
            logits = self.backbone(batch, batch["targets"])
        return logits, batch["targets"] != IGNORED

    def write_ids(self, batch: Batch, num_beams: int, max_new_tokens: int) -> Tensor:
        """Token ids (B, T) of what the backbone writes with the adapters that are active."""
        with tasks_of(self.task_numbers(batch)):
            return self.backbone.generate_ids(batch, num_beams, max_new_tokens)

    def choice_logits(self, batch: Batch, targets: Tensor, place: int) -> Tensor:
        """(B, V) at one position of ``targets`` (B, T)."""
        return self.forward(batch, targets)[:, place]

    @torch.no_grad()
    def write(self, batch: Batch) -> list[str]:
        """The answers to a batch, each as its task is written. Under several processes a collective."""
        ways = [task if (way := rules_of(task).writes) == "choice" else way for task in batch["task"]]
        asked = list(dict.fromkeys(ways))
        if isinstance(self, FSDPModule):  # every process takes part in every call
            ranks = Ranks(self.trainer.global_rank, self.trainer.world_size)
            asked = sorted({way for each in ranks.gather(asked) for way in each})
        found = {
            way: self.chosen(batch, CHOICES[way]) if way in CHOICES else self.searched(batch, way) for way in asked
        }
        return [found[way][b] for b, way in enumerate(ways)]

    def searched(self, batch: Batch, way: str) -> list[str]:
        """What a search writes."""
        ids = self.write_ids(batch, *self.searches[way])
        return [text.strip() for text in self.backbone.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def chosen(self, batch: Batch, choices: Sequence[str]) -> list[str]:
        """The likelier of some answers, by the logits of the first token that tells them apart (NLVR2)."""
        rows = self.backbone.target_batch(choices)["targets"]
        place = first_difference(rows.tolist())
        targets = rows[:1, : place + 1].expand(len(batch["id"]), -1).to(self.device)
        logits = self.choice_logits(batch, targets, place)[:, rows[:, place].to(self.device)]
        return [choices[best] for best in logits.argmax(-1).tolist()]
