"""``merge`` of adapters: folders of peft in, a folder of peft out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fulgurite.commands.errors import DONE, ConfigError
from fulgurite.commands.merge_output import show_merge, show_plan

# Options of models, with the values under which they ask for nothing.
OF_MODELS = {
    **dict.fromkeys(("base", "like", "donor", "threads")),
    **{"rows": "error", "report": False, "strict": True, "max_shard_size": "50GB"},
}


def require_adapters(sources: Sequence[Path], merger: Any) -> bool:
    """Whether adapters are merged, which takes sources and a merger that both are for them.

    Raises:
        ConfigError: only one of them is.
    """
    from fulgurite.checkpoints.companions import is_adapter
    from fulgurite.methods.merging.knots import MergeKnOTS
    from fulgurite.methods.merging.lora import MergeLoRA

    adapters = [path for path in sources if is_adapter(path)]
    name, for_adapters = type(merger).__name__, isinstance(merger, (MergeLoRA, MergeKnOTS))
    others = [path for path in sources if path not in adapters]
    if for_adapters and others:
        raise ConfigError(f"sources: {name} merges folders of peft, which {others[0]} is not")
    if adapters and not for_adapters:
        raise ConfigError(
            f"sources: {adapters[0]} holds adapters of peft, whose factors {name} would merge one by one, which is no "
            "sum of their changes: take MergeLoRA or MergeKnOTS"
        )
    return for_adapters


def run(sources: Sequence[Path], merger: Any, options: Any, settings: dict[str, Any]) -> int:
    """Merge them, or say what that takes; returns the exit code."""
    import torch

    from fulgurite.methods.merging.peft_files import CONFIG, WEIGHTS, merge_adapters, open_adapters

    given = [f"--{name}" for name, usual in OF_MODELS.items() if options[name] != usual]
    if given:
        raise ConfigError(f"{', '.join(given)}: only for models; leave it out for adapters")
    out = Path(options.out)
    adapters = open_adapters(sources, out)
    if options.dry_run:
        size = sum(adapter.num_bytes for adapter in adapters)
        rows = [(str(adapter.path), 2 * len(adapter.factors), adapter.num_bytes) for adapter in adapters]
        sites = len({site for adapter in adapters for site in adapter.factors})
        plan = f"{sites:,} layers are merged"
        show_plan(type(merger).__name__, out, rows, plan, 2 * size, size, f"{WEIGHTS}, {CONFIG}")
        return DONE
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    done = merge_adapters(adapters, out, merger, options.weights, dtype, settings)
    show_merge(done.change, "first adapter", f"{len(adapters)} adapters", done.path)
    return DONE
