"""What a checkpoint says of its data and tensors, and how that differs from what is there."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from fulgurite.checkpoints import MismatchError
from fulgurite.samples import DataInfo, Sample, Stage


def stage_names(stages: Sequence[Stage]) -> list[str]:
    """Names alone; lengths may differ between runs."""
    return [s.name for s in stages]


def check_epochs(trained: Sequence[Stage], now: Sequence[Stage], stage: int) -> None:
    """Refuse to go on where the epochs of a stage that has begun are not those it was trained with.

    Another number would let the run fall back into a finished stage and overwrite what it learned.
    """
    before, after = ([s.epochs for s in stages[: stage + 1]] for stages in (trained, now))
    if before != after:
        raise MismatchError(
            f"the checkpoint's stages so far have {before} epochs, this run's have {after}: resume with the "
            "checkpoint's epochs_per_domain, or start a new run from its weights (--init_from)"
        )


def read_facts(facts: Mapping[str, Any]) -> tuple[DataInfo, tuple[Stage, ...]]:
    """Data facts and stages as `VideoQA.on_save_checkpoint` recorded them."""
    if "info" not in facts or "stages" not in facts:
        raise MismatchError(
            "the checkpoint holds no data facts: it was not written by a video question answering module"
        )
    info = DataInfo(**{k: tuple(v) for k, v in facts["info"].items()})
    return info, tuple(Stage(**{**s, "domains": tuple(s["domains"])}) for s in facts["stages"])


def evaluated_facts(model: DataInfo, data: DataInfo) -> DataInfo:
    """The columns of an evaluation: domains and kinds of the data, those that the model knows first and in its order.

    Answers stay the model's.
    """
    return replace(
        model, domains=_known_first(model.domains, data.domains), kinds=_known_first(model.kinds, data.kinds)
    )


def _known_first(known: Sequence[str], given: Sequence[str]) -> tuple[str, ...]:
    return (*(name for name in known if name in given), *(name for name in given if name not in known))


def unknown_answers(samples: Sequence[Sample], known: Container[str]) -> int:
    """How many samples with answers have none among the ``known``."""
    return sum(bool(s.answers) and not any(answer in known for answer in s.answers) for s in samples)


def describe_difference(old: DataInfo, new: DataInfo, old_stages: Sequence[Stage], new_stages: Sequence[Stage]) -> str:
    """Which data facts differ, in one line each."""
    lines = ["the data is not what this model was built for:"]
    pairs: dict[str, Callable[[DataInfo], tuple[str, ...]]] = {
        "answers": lambda i: i.answers,
        "domains": lambda i: i.domains,
        "kinds": lambda i: i.kinds,
    }
    for name, get in pairs.items():
        a, b = get(old), get(new)
        if a != b:
            gone, added = sorted(set(a) - set(b))[:3], sorted(set(b) - set(a))[:3]
            lines.append(f"  {name}: {len(a)} built, {len(b)} given; missing {gone}, new {added}, order counts")
    if stage_names(old_stages) != stage_names(new_stages):
        lines.append(f"  stages: {stage_names(old_stages)} built, {stage_names(new_stages)} given")
    return "\n".join(lines + ["Use the DataModule settings of the checkpoint's config.yaml."])


def require_same_tensors(
    model: Mapping[str, Tensor], file: Mapping[str, Tensor], listed: int = 12, option: str = "adapters"
) -> None:
    """Raise `MismatchError` with all that is missing, unknown, or of another shape. ``option`` is to change."""
    wrong = [f"  {n}  not in the file" for n in model if n not in file]
    wrong += [f"  {n}  not in this model" for n in file if n not in model]
    wrong += [
        f"  {n}  file {tuple(file[n].shape)}  model {tuple(model[n].shape)}"
        for n in model
        if n in file and file[n].shape != model[n].shape
    ]
    if wrong:
        more = [f"  ... and {len(wrong) - listed} more"] if len(wrong) > listed else []
        shown = "\n".join([*wrong[:listed], *more])
        raise MismatchError(
            f"{len(wrong)} tensors of the checkpoint do not fit this model:\n{shown}\n"
            f"Set model.init_args.{option} to what the checkpoint was made with (see its config.yaml)."
        )
