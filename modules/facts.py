"""Data facts in a checkpoint, and how two sets of them differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fulgurite.samples import DataInfo, Stage


def stage_names(stages: Sequence[Stage]) -> list[str]:
    """Names alone; lengths may differ between runs."""
    return [s.name for s in stages]


def read_facts(facts: Mapping[str, Any]) -> tuple[DataInfo, tuple[Stage, ...]]:
    """Data facts and stages as `VideoQA.on_save_checkpoint` recorded them."""
    info = DataInfo(**{k: tuple(v) for k, v in facts["info"].items()})
    return info, tuple(Stage(**{**s, "domains": tuple(s["domains"])}) for s in facts["stages"])


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
