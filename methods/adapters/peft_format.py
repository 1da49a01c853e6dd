"""LoRA sets in the layout of the `peft` library: its adapter_config.json and the tensors of its weight file.

`LoRA` sites become peft's LoRA layers, `Replace` sites its ``modules_to_save``. Other kinds have no place
there. Pure functions of dictionaries; files are the caller's.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fulgurite.methods.adapters.bank import AdapterBank
from fulgurite.methods.adapters.base import Adapter
from fulgurite.methods.adapters.lora import LoRA
from fulgurite.methods.adapters.replace import Replace

PREFIX = "base_model.model."
# Options of peft that change what a LoRA layer computes, with the value under which it is plain LoRA.
_PLAIN = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "use_qalora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
}


def to_peft(
    bank: AdapterBank,
    name: str,
    base_model: str | None = None,
    root: str = "",
    sites: Container[str] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One set as peft's (configuration, tensors); the tensors are those of the set, not copies.

    Args:
        bank: holds the set; all its kinds must be `LoRA` or `Replace`.
        name: of the set.
        base_model: what peft records as the model's name or path.
        root: module that peft wraps, e.g. ``"text"`` when sites are ``text.encoder...``; all when empty.
        sites: only these sites, by their full names; all when None.

    Raises:
        ValueError: a kind that peft does not know, a site outside ``root``, or settings that it cannot hold.
    """
    adapters = dict(_named(bank, name, root, sites))
    lora = {site: adapter for site, adapter in adapters.items() if isinstance(adapter, LoRA)}
    if not lora:
        raise ValueError(f"no LoRA adapter in the set {name!r}; peft's layout holds LoRA")
    first = next(iter(lora.values()))
    for option in ("dropout", "rslora"):
        values = {getattr(adapter, option) for adapter in lora.values()}
        if len(values) > 1:
            raise ValueError(f"peft's layout has one {option} for all layers, this set has {sorted(values)}")
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.rslora,
        "use_dora": False,
        "bias": "none",
        # One expression that is matched in full: a list of names would also match modules whose names end so.
        "target_modules": "|".join(re.escape(site) for site in lora),
        "rank_pattern": {f"^{re.escape(s)}": a.rank for s, a in lora.items() if a.rank != first.rank},
        "alpha_pattern": {f"^{re.escape(s)}": a.alpha for s, a in lora.items() if a.alpha != first.alpha},
        "modules_to_save": [site for site in adapters if site not in lora] or None,
    }
    return config, {key: tensor.detach() for key, tensor in _tensors(adapters)}


@torch.no_grad()
def from_peft(
    bank: AdapterBank,
    name: str,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    base_model: str | None = None,
    root: str = "",
) -> None:
    """Fill a set in place from peft's configuration and tensors.

    Raises:
        ValueError: base model, sites, ranks, scales, shapes, or options of peft differ; all differences are
            listed, and nothing is changed.
    """
    adapters = dict(_named(bank, name, root))
    own = dict(_tensors(adapters))
    problems = [
        f"{option}: file {config[option]!r}, here {plain!r}"
        for option, plain in _PLAIN.items()
        if config.get(option, plain) != plain
    ]
    found_base = config.get("base_model_name_or_path")
    if base_model is not None and found_base != base_model:
        problems.append(f"base model: file {found_base!r}, here {base_model!r}")
    for site, adapter in adapters.items():
        if isinstance(adapter, LoRA) and f"{PREFIX}{site}.lora_A.weight" in state:
            problems += _differences(site, adapter, config)
    for key in sorted(own.keys() | state.keys()):
        file, here = (tuple(t[key].shape) if key in t else "missing" for t in (state, own))
        if file != here:
            problems.append(f"{key.removeprefix(PREFIX)}: file {file}, here {here}")
    if problems:
        shown = "\n  ".join(problems[:20])
        raise ValueError(f"{len(problems)} things in peft's files do not fit the set {name!r}:\n  {shown}")
    for key, tensor in own.items():
        tensor.copy_(state[key])


def _differences(site: str, adapter: LoRA, config: Mapping[str, Any]) -> Iterator[str]:
    """How one layer of ``config`` computes differently from ``adapter``."""
    settings = {
        "rank": (_of_site(config.get("rank_pattern"), site, config.get("r", 8)), adapter.rank),
        "alpha": (_of_site(config.get("alpha_pattern"), site, config.get("lora_alpha", 8)), adapter.alpha),
        "rslora": (config.get("use_rslora", False), adapter.rslora),
    }
    return (f"{site} {key}: file {file}, here {here}" for key, (file, here) in settings.items() if file != here)


def _of_site(pattern: Mapping[str, float] | None, site: str, default: float) -> float:
    """peft's rule: the first pattern that matches an end of the name, beginning at a dot."""
    for expression, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({expression})$", site):
            return value
    return default


def _named(
    bank: AdapterBank, name: str, root: str, sites: Container[str] | None = None
) -> Iterator[tuple[str, Adapter]]:
    """(site relative to ``root``, adapter) for all sites of a set, or for some."""
    prefix = f"{root}." if root else ""
    for site, adapter in bank.adapters_of(name).items():
        if sites is not None and site not in sites:
            continue
        if not site.startswith(prefix):
            raise ValueError(f"the site {site!r} lies outside root={root!r}")
        if not isinstance(adapter, (LoRA, Replace)):
            raise ValueError(f"peft's layout holds LoRA and replaced modules, not {type(adapter).__name__} ({site!r})")
        yield site.removeprefix(prefix), adapter


def _tensors(adapters: Mapping[str, Adapter]) -> Iterator[tuple[str, Tensor]]:
    """The sets' tensors under the names of peft's weight file."""
    for site, adapter in adapters.items():
        if isinstance(adapter, LoRA):
            yield f"{PREFIX}{site}.lora_A.weight", adapter.down.weight
            yield f"{PREFIX}{site}.lora_B.weight", adapter.up.weight
        else:
            for key, tensor in adapter.module.state_dict().items():
                yield f"{PREFIX}{site}.{key}", tensor
