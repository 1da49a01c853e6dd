"""Reading of published FrozenBiLM and DAM checkpoints, ``torch.save`` files with ``{"model": state_dict}``.

Adapters stand inside the language model there and beside it here, so a file is split into the backbone's own
tensors, whose names stay, and the tensors of one adapter set under the names of the layers that they follow.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fulgurite.backbones.base import StateDict
from fulgurite.checkpoints.errors import MismatchError
from fulgurite.checkpoints.unpickle import load_pickle

_ADAPTER = re.compile(
    r"(deberta\.encoder\.layer\.\d+\.(?:attention\.)?output)\.adapter\.((?:down|up)\.(?:weight|bias))"
)
# Rebuilt from the run's own answers, or a plain count of positions.
_IGNORED = re.compile(r"answer_embeddings\.weight|answer_bias|deberta\.embeddings\.position_ids|mask_predictions\..*")


@dataclass(frozen=True)
class ImportedWeights:
    """Content of one published checkpoint.

    Args:
        backbone: tensors under the backbone's parameter names, the video projection included. A file of a
            fine-tuned model holds only what was trained.
        adapters: site name -> ``down.weight (R, D)``, ``down.bias (R,)``, ``up.weight (D, R)``, ``up.bias
            (D,)``.
        ignored: names in the file that are not read, such as the embeddings of its own answers.
    """

    backbone: StateDict
    adapters: dict[str, StateDict]
    ignored: tuple[str, ...] = ()


def read_frozenbilm(path: str | Path) -> ImportedWeights:
    """Split the published checkpoint ``path`` by owner. Values and dtypes stay as they are.

    Raises:
        CheckpointError: the file is absent, damaged, or asks for code to be run.
        MismatchError: it is not ``{"model": state_dict}``.
    """
    # The published files also hold the parsed command line, a plain record that runs nothing.
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = load_pickle(path)
    model = content.get("model") if isinstance(content, Mapping) else None
    if not isinstance(model, Mapping) or not all(isinstance(value, Tensor) for value in model.values()):
        raise MismatchError(f"{path} is not a FrozenBiLM checkpoint: expected {{'model': names and tensors}}")
    backbone: StateDict = {}
    adapters: dict[str, StateDict] = {}
    ignored = []
    for name, tensor in model.items():
        if match := _ADAPTER.fullmatch(name):
            adapters.setdefault(f"{match[1]}.dense", {})[match[2]] = tensor
        elif _IGNORED.fullmatch(name):
            ignored.append(name)
        else:
            backbone[name] = tensor
    return ImportedWeights(backbone, adapters, tuple(ignored))


def adapter_mismatches(adapters: Mapping[str, Mapping[str, Tensor]], sites: Mapping[str, nn.Linear]) -> list[str]:
    """One line for each tensor by which ``adapters`` is not one bottleneck per site of ``sites``."""
    lines = [f"{site}: adapter in the file, no such layer in the model" for site in adapters if site not in sites]
    for site, layer in sites.items():
        tensors = adapters.get(site, {})
        width = layer.out_features
        units = tensors["down.bias"].shape[0] if "down.bias" in tensors else "R"
        wanted = {
            "down.weight": (units, width),
            "down.bias": (units,),
            "up.weight": (width, units),
            "up.bias": (width,),
        }
        for name, shape in wanted.items():
            found = tuple(tensors[name].shape) if name in tensors else "missing"
            if found != shape:
                lines.append(f"{site} adapter.{name}: file {found}, model {shape}")
    return lines


def state_mismatches(state: Mapping[str, Tensor], model: Mapping[str, Tensor], optional: str = "") -> list[str]:
    """One line for each name or shape by which ``state`` differs from ``model``.

    Args:
        optional: names that match this pattern in full may be missing.
    """
    lines = [f"{name}: in the file, not in the model" for name in state if name not in model]
    for name, tensor in model.items():
        if name not in state:
            if not re.fullmatch(optional, name):
                lines.append(f"{name}: missing, model {tuple(tensor.shape)}")
        elif state[name].shape != tensor.shape:
            lines.append(f"{name}: file {tuple(state[name].shape)}, model {tuple(tensor.shape)}")
    return lines
