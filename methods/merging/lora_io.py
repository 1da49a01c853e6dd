"""LoRA factors from and to a set of an `AdapterBank`, and the two parts of peft's folders. Pure functions.

Read adapters, merge them with `lora.MergeLoRA`, and put the result back::

    merged = MergeLoRA("svd")([factors_of(bank, name) for name in ("first", "second")])
    fill_set(bank, "live", merged)
    config, tensors = factors_to_peft(merged)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fulgurite.methods.adapters.bank import AdapterBank
from fulgurite.methods.adapters.lora import LoRA
from fulgurite.methods.adapters.peft_format import _PLAIN, PREFIX, _of_site
from fulgurite.methods.merging.lora import Factors, LoRAFactors

# Starts of peft's names for initialisations that also changed the weights of the model that carries the adapter.
MOVED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
KEY = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight")


def factors_of(bank: AdapterBank, name: str) -> dict[str, Factors]:
    """The factors of a set by the names of its sites; the tensors are those of the set, not copies.

    Raises:
        ValueError: the set holds something other than LoRA.
    """
    adapters = bank.adapters_of(name)
    others = {site: type(adapter).__name__ for site, adapter in adapters.items() if not isinstance(adapter, LoRA)}
    if others:
        raise ValueError(f"LoRA factors are merged, but the set {name!r} also holds {others}")
    return {site: Factors(a.down.weight.detach(), a.up.weight.detach(), a.scale) for site, a in adapters.items()}


def fill_set(bank: AdapterBank, name: str, factors: LoRAFactors) -> None:
    """Give a set the changes of ``factors``, in place; other sites stay as they are.

    The scales of the set are its own: A is multiplied by their ratio. Where the set has a higher rank, zeros follow.

    Raises:
        ValueError: a site that the set lacks, of another kind or shape, or of a lower rank; nothing is changed then.
    """
    own = bank.adapters_of(name)
    tensors, problems = {}, []
    for site, f in factors.items():
        adapter = own.get(site)
        if not isinstance(adapter, LoRA):
            problems.append(f"{site}: no LoRA there")
        elif f.rank > adapter.rank:
            problems.append(f"{site}: rank {f.rank} into {adapter.rank}; merge with form='svd', rank={adapter.rank}")
        else:
            down = f.down if f.scale == adapter.scale else f.down * (f.scale / adapter.scale)
            more = adapter.rank - f.rank
            tensors[site] = {"down.weight": F.pad(down, (0, 0, 0, more)), "up.weight": F.pad(f.up, (0, more))}
    if problems:
        shown = "\n  ".join(problems[:20])
        raise ValueError(f"{len(problems)} sites do not fit the set {name!r}:\n  {shown}")
    bank.load_sites(name, tensors)


def factors_from_peft(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """The factors of peft's configuration and tensors, without a model.

    Raises:
        ValueError: not plain LoRA (DoRA, biases, saved modules, ...), an initialisation that moved the base's weights,
            a factor without its partner, or a rank that the configuration does not name. Lists all.
    """
    problems = [
        f"{option}={config[option]!r}: its change of the weight is not s B A"
        for option, plain in _PLAIN.items()
        if config.get(option, plain) != plain
    ]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(MOVED_BASE):
        problems.append(f"init_lora_weights={start!r} moved the base's weights; convert it to LoRA with peft first")
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            problems.append(f"{key}: not a factor of LoRA")
        else:
            found.setdefault(match[1], {})[match[2]] = tensor
    factors = {}
    for site, parts in found.items():
        rank = _of_site(config.get("rank_pattern"), site, config.get("r", 8))
        if len(parts) < 2:
            problems.append(f"{site}: only lora_{next(iter(parts))}")
        elif len(parts["A"]) != rank:
            problems.append(f"{site}: rank {len(parts['A'])}, in the configuration {rank}")
        else:
            alpha = _of_site(config.get("alpha_pattern"), site, config.get("lora_alpha", 8))
            divisor = math.sqrt(rank) if config.get("use_rslora") else rank
            factors[site] = Factors(parts["A"], parts["B"], alpha / divisor)
    if problems:
        shown = "\n  ".join(problems[:20])
        raise ValueError(f"{len(problems)} things in peft's files cannot be merged as LoRA:\n  {shown}")
    return factors


def factors_to_peft(
    factors: LoRAFactors, like: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """peft's (configuration, tensors) of one adapter.

    Args:
        factors: at least one site. Scales are written as lora_alpha = s r, so rank-stabilised ones stay as they are.
        like: configuration to take the rest from, such as the name of the base model and the task.
    """
    first = next(iter(factors.values()))
    alphas = {site: f.scale * f.rank for site, f in factors.items()}
    alpha = first.scale * first.rank
    config = {
        "task_type": None,
        "base_model_name_or_path": None,
        **(like or {}),
        **_PLAIN,
        "inference_mode": True,
        "init_lora_weights": True,
        "r": first.rank,
        "lora_alpha": alpha,
        "use_rslora": False,
        # One expression that is matched in full: a list of names would also match modules whose names end so.
        "target_modules": "|".join(re.escape(site) for site in factors),
        "rank_pattern": {f"^{re.escape(s)}": f.rank for s, f in factors.items() if f.rank != first.rank},
        "alpha_pattern": {f"^{re.escape(s)}": a for s, a in alphas.items() if a != alpha},
        **dict.fromkeys(("layers_to_transform", "layers_pattern", "exclude_modules")),  # refused beside an expression
        "modules_to_save": None,
    }
    tensors = {}
    for site, f in factors.items():
        tensors[f"{PREFIX}{site}.lora_A.weight"] = f.down
        tensors[f"{PREFIX}{site}.lora_B.weight"] = f.up
    return config, tensors
