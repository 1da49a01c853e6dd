"""Sets in the layout of the `peft` library: its adapter_config.json and the tensors of its weight file.

`LoRA` sites become peft's LoRA layers; `IA3` and `IA3Input` sites its IA3 layers, the latter feed-forward ones;
`Replace` sites its ``modules_to_save``. Other kinds have no place there. Pure functions of dictionaries; files are the
caller's.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fulgurite.methods.adapters.bank import AdapterBank
from fulgurite.methods.adapters.base import Adapter
from fulgurite.methods.adapters.ia3 import IA3, IA3Input
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
_PLAIN_IA3 = {"peft_type": "IA3", "fan_in_fan_out": False}


def peft_type(adapters: Mapping[str, Adapter]) -> str | None:
    """peft's name for the kind of a set, LORA or IA3, by its sites' adapters; None where it has none."""
    kinds = {type(adapter) for adapter in adapters.values()} - {Replace}
    if any("@" in site for site in adapters):
        return None
    if kinds == {LoRA}:
        return "LORA"
    return "IA3" if kinds and kinds <= {IA3, IA3Input} else None


def to_peft(
    bank: AdapterBank,
    name: str,
    base_model: str | None = None,
    root: str = "",
    sites: Container[str] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One set as peft's (configuration, tensors); the tensors are those of the set, not copies.

    Args:
        bank: holds the set; its kinds must be `LoRA`, or `IA3` and `IA3Input`, and may be `Replace`.
        name: of the set.
        base_model: what peft records as the model's name or path.
        root: module that peft wraps, e.g. ``"text"`` when sites are ``text.encoder...``; all when empty.
        sites: only these sites, by their full names; all when None.

    Raises:
        ValueError: a kind that peft does not know, a site outside ``root``, or settings that it cannot hold.
    """
    adapters = dict(_named(bank, name, root, sites))
    trained = {site: adapter for site, adapter in adapters.items() if not isinstance(adapter, Replace)}
    if not trained:
        raise ValueError(f"no LoRA or IA3 adapter in the set {name!r}; peft's layout holds such sets")
    config = {
        "peft_type": _type_of(adapters),
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "target_modules": _expression(trained),
        **(_lora_settings if isinstance(next(iter(trained.values())), LoRA) else _ia3_settings)(name, trained),
        "modules_to_save": [site for site in adapters if site not in trained] or None,
    }
    return config, {key: tensor.detach() for key, tensor in _tensors(adapters)}


def _lora_settings(name: str, lora: Mapping[str, LoRA]) -> dict[str, Any]:
    first = next(iter(lora.values()))
    for option in ("dropout", "rslora"):
        values = {getattr(adapter, option) for adapter in lora.values()}
        if len(values) > 1:
            raise ValueError(f"peft's layout has one {option} for all layers, this set has {sorted(values)}")
    return {
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.rslora,
        "use_dora": False,
        "bias": "none",
        "rank_pattern": {f"^{re.escape(s)}": a.rank for s, a in lora.items() if a.rank != first.rank},
        "alpha_pattern": {f"^{re.escape(s)}": a.alpha for s, a in lora.items() if a.alpha != first.alpha},
    }


def _ia3_settings(name: str, factors: Mapping[str, IA3]) -> dict[str, Any]:
    return {"feedforward_modules": _expression(s for s, a in factors.items() if isinstance(a, IA3Input))}


def _expression(sites: Iterable[str]) -> str:
    """One expression that is matched in full: a list of names would also match modules whose names end so."""
    return "|".join(map(re.escape, sites))


def _type_of(adapters: Mapping[str, Adapter]) -> str:
    found = peft_type(adapters)
    if found is None:
        kinds = sorted({adapter.title for adapter in adapters.values()})
        raise ValueError(f"peft's layout holds one kind, once at a layer; this set has {kinds} at {list(adapters)[:4]}")
    return found


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
    plain_options = _PLAIN if _type_of(adapters) == "LORA" else _PLAIN_IA3
    own = dict(_tensors(adapters))
    problems = [
        f"{option}: file {config[option]!r}, here {plain!r}"
        for option, plain in plain_options.items()
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
        if not isinstance(adapter, (LoRA, IA3, Replace)):
            raise ValueError(f"peft's layout holds LoRA, IA3 and replaced modules, not {adapter.title} ({site!r})")
        yield site.removeprefix(prefix), adapter


def _tensors(adapters: Mapping[str, Adapter]) -> Iterator[tuple[str, Tensor]]:
    """The sets' tensors under the names of peft's weight file."""
    for site, adapter in adapters.items():
        if isinstance(adapter, LoRA):
            yield f"{PREFIX}{site}.lora_A.weight", adapter.down.weight
            yield f"{PREFIX}{site}.lora_B.weight", adapter.up.weight
        elif isinstance(adapter, IA3):
            shape = (1, -1) if isinstance(adapter, IA3Input) else (-1, 1)
            yield f"{PREFIX}{site}.ia3_l", adapter.factor.view(shape)
        else:
            for key, tensor in adapter.module.state_dict().items():
                yield f"{PREFIX}{site}.{key}", tensor
