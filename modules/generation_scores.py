"""What written answers are judged by, task by task."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from fulgurite.metrics.answer_accuracy import AnswerAccuracy
from fulgurite.metrics.captions import CaptionScores
from fulgurite.metrics.glue import GlueScores, correlated
from fulgurite.metrics.vqa_official import VQASoftAccuracy, vqa_credit
from fulgurite.modules.generation_tasks import rules_of
from fulgurite.samples import Batch, DataInfo

HEADLINE = {"vqa": "accuracy", "accuracy": "accuracy", "captions": "CIDEr", "glue": "average"}


class WrittenScores:
    """Figures of the answers to one split, of every task of the data.

    Args:
        info: tasks and kinds of the data.
        device: of the counts.
        captions: makes the metric of captions.
    """

    def __init__(self, info: DataInfo, device: torch.device, captions: Callable[[], Metric] = CaptionScores) -> None:
        self.tasks = info.tasks
        metrics = {task: new_metric(task, info.kinds, captions) for task in info.tasks}
        self.metrics = {task: metric.to(device) for task, metric in metrics.items()}

    def add(self, answers: Sequence[str], batch: Batch) -> None:
        """Judge the answers to a batch; those to samples that do not count are left out.

        Raises:
            LookupError: a sample's task is none of the data's.
        """
        counted = batch["counted"]
        for task in dict.fromkeys(batch["task"]):
            if task not in self.metrics:
                raise LookupError(f"the data have samples of the task {task!r}, but name the tasks {list(self.tasks)}")
            own = counted & torch.tensor([each == task for each in batch["task"]], device=counted.device)
            judge(self.metrics[task], task, answers, batch, own)

    def figures(self) -> dict[str, float]:
        """``<figure>/<task>``, ``<figure>/<task>/<kind>`` by kinds, and ``score``: the mean over tasks of their first
        figure (as the tables of VL-Adapter have it). What nothing was counted of is left out. A collective."""
        found: dict[str, float] = {}
        headline = []
        for task, metric in self.metrics.items():
            values = {name: float(value) for name, value in metric.compute().items()}
            first = values.get(HEADLINE[rules_of(task).judged], math.nan)
            headline += [first] if first == first else []
            for name, value in values.items():
                figure, _, kind = name.partition("/")
                if value == value:
                    found[f"{figure}/{task}/{kind}" if kind else f"{figure}/{task}"] = value
        return {"score": sum(headline) / len(headline), **found} if headline else {}


def new_metric(task: str, kinds: Sequence[str], captions: Callable[[], Metric]) -> Metric:
    """An empty metric of a task."""
    judged = rules_of(task).judged
    if judged == "captions":
        return captions()
    if judged == "glue":
        return GlueScores(task)
    return VQASoftAccuracy(kinds) if judged == "vqa" else AnswerAccuracy(kinds)


def judge(metric: Any, task: str, answers: Sequence[str], batch: Batch, own: Tensor) -> None:
    """Add the answers to those samples of a batch that ``own`` (B,) names."""
    rows, judged = own.nonzero().flatten().tolist(), rules_of(task).judged
    right = batch[{"captions": "captions", "vqa": "human_answers"}.get(judged, "answers")]
    given, of_each = [answers[b] for b in rows], [right[b] for b in rows]
    if judged == "captions":
        metric.update(given, of_each)
    elif judged == "glue":
        metric.update(given, [max(scores, key=scores.__getitem__) for scores in of_each])
    else:
        metric.update(given, of_each, [batch["kind"][b] for b in rows])


def answer_rows(answers: Sequence[str], batch: Batch) -> list[dict[str, Any]]:
    """One row per counted sample: ``id``, ``domain``, ``task``, ``kind``, ``answer``, ``gold`` (what is right, with its
    scores) and ``credit`` from 0 to 1, None where an answer is not judged alone, or nothing is known."""
    rows = []
    for b in batch["counted"].nonzero().flatten().tolist():
        said, task = batch["human_answers"][b], batch["task"][b]
        judged = rules_of(task).judged
        gold: Mapping[str, float] = batch["answers"][b] or dict.fromkeys(batch["captions"][b], 1.0)
        credit: float | None = None
        if judged == "vqa" and said:
            gold = {answer: count / len(said) for answer, count in Counter(said).items()}
            credit = vqa_credit(answers[b], said)
        elif gold and judged != "captions" and not correlated(task):
            credit = float(gold.get(answers[b], 0.0))
        fields = {name: batch[name][b] for name in ("id", "domain", "kind")}
        rows.append({**fields, "task": task, "answer": answers[b], "gold": dict(gold), "credit": credit})
    return rows
