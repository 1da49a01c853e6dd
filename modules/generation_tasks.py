"""What is particular to a task that is answered by writing: its prefix, loss, way of writing and measure.

The rules are those of VL-Adapter (arXiv 2112.06825) and of LST (arXiv 2206.06522) for GLUE.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fulgurite.methods.generation_losses import LossKind
from fulgurite.methods.random import digest_of
from fulgurite.samples import Batch, Collator, DataError, Sample


@dataclass(frozen=True)
class TaskRules:
    """How one task is put, trained and judged.

    Args:
        prefix: names the task in the text; None is the task's own name.
        prefix_last: the prefix follows the text.
        loss: see `methods.generation_losses`.
        target_length: tokens to which targets are cut in training; None takes all.
        writes: ``"greedy"``, by ``"beams"``, or ``"choice"``: the likelier of the data's answers where they first
            differ.
        judged: by what people answered (``"vqa"``), by being accepted (``"accuracy"``), as ``"captions"``, or by the
            figures of its task in ``"glue"``.
    """

    prefix: str | None = None
    prefix_last: bool = False
    loss: LossKind = "samples"
    target_length: int | None = None
    writes: Literal["greedy", "beams", "choice"] = "greedy"
    judged: Literal["vqa", "accuracy", "captions", "glue"] = "accuracy"


VIDEO_CAPTIONS = TaskRules(prefix_last=True, target_length=20, writes="beams", judged="captions")
RULES: dict[str, TaskRules] = {
    "vqa": TaskRules(loss="scored", target_length=10, judged="vqa"),
    "gqa": TaskRules(),
    "nlvr2": TaskRules(prefix="nlvr: ", writes="choice"),
    "caption": TaskRules(loss="tokens", target_length=40, writes="beams", judged="captions"),
    "tvqa": TaskRules(prefix_last=True, target_length=20),
    "how2qa": TaskRules(prefix_last=True, target_length=20),
    "tvc": VIDEO_CAPTIONS,
    "yc2c": VIDEO_CAPTIONS,
}
GLUE = ("cola", "sst2", "mrpc", "stsb", "rte", "wnli", "qqp", "mnli", "qnli")
RULES |= {task: TaskRules(prefix=f"{task} ", judged="glue") for task in GLUE}
CHOICES = {"nlvr2": ("true", "false")}


def rules_of(task: str) -> TaskRules:
    """Those of a task; of one without any of its own, sampled answers, written greedily and met to the letter."""
    return RULES.get(task, TaskRules())


class Prefixes:
    """The words that name a sample's task to the model.

    Args:
        use: False leaves them all out.
        others: in place of the usual ones, by task.
    """

    def __init__(self, use: bool, others: Mapping[str, str] | None) -> None:
        self.use, self.others = use, dict(others or {})

    def __call__(self, sample: Sample) -> Sample:
        """The sample with its text as the model reads it."""
        if not self.use:
            return sample
        rules, text = rules_of(sample.task), sample.question or ""
        prefix = self.others.get(sample.task, f"{sample.task}: " if rules.prefix is None else rules.prefix)
        return replace(sample, question=f"{text} {prefix}" if rules.prefix_last and text else f"{prefix}{text}")


@dataclass(frozen=True)
class TextCollator:
    """A collator that reads samples whose text has been put into words first.

    Args:
        collator: the backbone's.
        text: gives the sample with its text as the model reads it.
    """

    collator: Collator
    text: Callable[[Sample], Sample]

    @property
    def needs(self) -> tuple[str, ...]:
        """Those of the backbone's."""
        return tuple(self.collator.needs)

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """The batch."""
        return self.collator([self.text(sample) for sample in samples])


def sampled_answers(batch: Batch, seed: int, epoch: int) -> tuple[list[str], list[float]]:
    """One answer of each sample of a batch, and its score: drawn anew in every epoch, in proportion to the scores.

    A draw depends on (seed, epoch, sample) alone. Captions are drawn alike. Where the scores sum to 0 the answer is
    empty with score 0, as published.

    Raises:
        DataError: a sample has neither answers nor captions.
    """
    texts, scores = [], []
    for b, name in enumerate(batch["id"]):
        options: dict[str, float] = batch["answers"][b] or dict.fromkeys(batch["captions"][b], 1.0)
        if not options:
            raise DataError(f"sample {name!r} has neither answers nor captions to learn: leave it out of training")
        place = f"{batch['domain'][b]}/{name}"
        share = (digest_of(seed, "answer", epoch, place) >> 75) / 2**53  # in [0, 1)
        answer = chosen(options, share)
        texts.append(answer or "")
        scores.append(0.0 if answer is None else options[answer])
    return texts, scores


def chosen(options: Mapping[str, float], share: float) -> str | None:
    """The option in which ``share`` of the sum of all scores lies; None where that is 0."""
    reached, wanted = 0.0, share * sum(options.values())
    last = None
    for option, score in options.items():
        reached += score
        if score > 0:
            last = option
            if wanted < reached:
                break
    return last


def first_difference(rows: Sequence[Sequence[int]]) -> int:
    """The first position in which all of ``rows`` of token ids differ from each other.

    Raises:
        DataError: there is none before one of them ends.
    """
    for place, ids in enumerate(zip(*rows)):
        if len(set(ids)) == len(rows):
            return place
        if len(set(ids)) > 1:
            break
    raise DataError(f"choices with the tokens {[list(row) for row in rows]} are not told apart by one token")
