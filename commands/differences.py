"""Where a run's stored config and what the user wrote differ."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from fulgurite.commands.invocation import Invocation
from fulgurite.commands.yaml_loader import load_file

MAX_LINES = 20


def differences(stored: Path, used: str, invocation: Invocation) -> list[str]:
    """One line for each setting of module or data that is not what the checkpoint was made with.

    Args:
        stored: the run's ``config.yaml``.
        used: the complete config now, as YAML.
        invocation: says who set a value.
    """
    before, now = (
        {key: value for part in ("model", "data") for key, value in leaves(document.get(part), part)}
        for document in (load_file(stored), yaml.safe_load(used))
    )
    changed = [key for key in now if key in before and now[key] != before[key]]
    classes = [key.removesuffix("class_path") for key in changed if key.endswith(".class_path")]
    # Below another class, arguments of the same name say nothing about each other.
    shown = [key for key in changed if key.endswith(".class_path") or not key.startswith(tuple(classes))]
    lines = [
        f"{key}: using {_short(now[key])} ({invocation.source_of(key)}), checkpoint was made with {_short(before[key])}"
        for key in shown
    ]
    if len(lines) > MAX_LINES:
        lines[MAX_LINES:] = [f"... and {len(lines) - MAX_LINES} more settings differ from the checkpoint's"]
    return lines


def leaves(value: object, key: str) -> Iterator[tuple[str, object]]:
    """Dotted key and value of every leaf; lists count as leaves."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from leaves(item, f"{key}.{name}")
    else:
        yield key, value


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
