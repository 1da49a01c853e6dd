"""Dual encoders of open_clip from a name, a folder or a configuration, with weights from where the options say.

Nothing is downloaded unless a tag of open_clip's weights or a hub name is given.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fulgurite.backbones.foreign_models import OPEN_CLIP_CONFIG, read_config
from fulgurite.backbones.frames import FrameTransform, load_weights
from fulgurite.backbones.sources import filled_later, resolve_source

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")  # of weights; those of the first kind that is there count


@dataclass
class DualEncoder:
    """A model of open_clip with what belongs to it.

    Args:
        name: of open_clip, or of the folder or file; ``custom`` for a configuration in YAML.
        model: in float32.
        config: ``embed_dim``, ``vision_cfg`` and ``text_cfg``, as the model was built by them.
        preprocess: ``mean``, ``std`` and ``resize_mode`` of the pictures that its weights were trained on.
    """

    name: str
    model: nn.Module
    config: dict[str, Any]
    preprocess: dict[str, Any]

    def transform(self, fit: Literal["stretch", "crop"] | None) -> FrameTransform:
        """Frames to pixels; without ``fit`` they become square as the weights were trained.

        Raises:
            ValueError: pictures that are not square, or a way to make them so that is not known.
        """
        side = self.model.visual.image_size
        sides = {side} if isinstance(side, int) else set(side)
        if len(sides) > 1:
            raise ValueError(f"{self.name} reads pictures of {tuple(side)}; only square ones are prepared here")
        mode = self.preprocess["resize_mode"]
        ways: dict[str, Literal["stretch", "crop"]] = {"shortest": "crop", "squash": "stretch"}
        if fit is None and mode not in ways:
            raise ValueError(f"{self.name} was trained on pictures resized by {mode!r}: set fit to crop or stretch")
        mean, std = (tuple(float(v) for v in self.preprocess[name]) for name in ("mean", "std"))
        return FrameTransform(sides.pop(), mean, std, fit or ways[mode])


def build_dual_encoder(
    model: str | Mapping[str, Any],
    pretrained: str | None,
    vision_weights: str | None,
    text: str | None,
    seed: int,
) -> DualEncoder:
    """The model; see `OpenClipVideoText` for the arguments. What no weights fill has random values of ``seed``.

    Raises:
        ValueError: an unknown model, weights that do not fit it, or options that contradict each other.
    """
    import open_clip

    name, config, preprocess = read_model(model)
    if "multimodal_cfg" in config:
        raise ValueError(f"model {name} has a decoder besides its two towers: choose one without")
    if vision_weights is not None and pretrained is not None:
        raise ValueError(
            f"pretrained={pretrained!r} brings the tower for pictures: leave vision_weights={vision_weights!r} out"
        )
    file, facts = find_weights(name, pretrained)
    if facts.get("quick_gelu", False) != config.get("quick_gelu", False) and facts:
        right = f"{name}-quickgelu" if facts.get("quick_gelu") else name.removesuffix("-quickgelu")
        raise ValueError(f"the weights {pretrained!r} were trained with another GELU than {name} has: model: {right}")
    _prepare(config, text, load_text=text is not None and pretrained is None and not filled_later())
    arguments = {key: value for key, value in config.items() if key != "custom_text"}
    custom = config.get("custom_text", False) or "hf_model_name" in config["text_cfg"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**copy.deepcopy(arguments))
        trunk = getattr(built.visual, "trunk", None)
        _set_size(built.visual, trunk)
    if vision_weights is not None:
        if trunk is None:
            raise ValueError(f"vision_weights are those of a model of timm, and the tower of {name} is none of its")
        timm_name = config["vision_cfg"]["timm_model_name"]
        if not filled_later():
            load_trunk(trunk, timm_name, Path(resolve_source(vision_weights)))
        preprocess = {**{key: trunk.pretrained_cfg[key] for key in ("mean", "std")}, **preprocess}
    if file is not None:
        try:
            open_clip.load_checkpoint(built, str(file))
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"pretrained: {file} does not hold the weights of {name}: {error}") from error
    defaults = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD, "resize_mode": "shortest"}
    preprocess = {**defaults, **preprocess, **{key: facts[key] for key in defaults if key in facts}}
    return DualEncoder(name, built, config, preprocess)


def read_model(model: str | Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Name, configuration and preparation of pictures of ``model``. Raises ValueError where it is none."""
    import open_clip

    preprocess: dict[str, Any] = {}
    if isinstance(model, Mapping):
        name, config = "custom", json.loads(json.dumps(model))
    else:
        path = Path(resolve_source(model))
        if path.is_dir() or path.is_file():
            whole = read_config(path / OPEN_CLIP_CONFIG if path.is_dir() else path)
            name, config, preprocess = path.stem, whole.get("model_cfg", whole), whole.get("preprocess_cfg", {})
            if (path / "tokenizer_config.json").is_file():
                config["text_cfg"]["hf_tokenizer_name"] = str(path)
        else:
            name, config = model, open_clip.get_model_config(model) if ":" not in model else None
    if config is None:
        near = [each for each in open_clip.list_models() if each.startswith(str(model)[:5])]
        raise ValueError(f"open_clip has no model {model!r}, and there is no such folder or file; near: {near[:5]}")
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - config.keys()
    if missing:
        raise ValueError(f"the configuration of model {name} lacks {sorted(missing)}")
    return name, config, {key: preprocess[key] for key in ("mean", "std", "resize_mode") if key in preprocess}


def find_weights(name: str, pretrained: str | None) -> tuple[Path | None, dict[str, Any]]:
    """The file of all weights, and what open_clip knows of them where they are its own; no file where `filled_later`.

    Raises:
        ValueError: there is no such file, or a folder holds several or none.
    """
    import open_clip

    if pretrained is None:
        return None, {}
    if filled_later():
        return None, open_clip.get_pretrained_cfg(name, pretrained) or {}
    path = Path(resolve_source(pretrained))
    if path.is_file():
        return path, {}
    if path.is_dir():
        files = [[each for each in sorted(path.iterdir()) if each.suffix == suffix] for suffix in SUFFIXES]
        found = next((group for group in files if group), [])
        if len(found) != 1:
            names = [each.name for each in found]
            raise ValueError(f"pretrained: {path} should hold one file of weights, and holds {names}: name the file")
        return found[0], {}
    facts = open_clip.get_pretrained_cfg(name, pretrained)
    if not facts:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ValueError(f"pretrained={pretrained!r} is no file or folder, and no weights of {name}; there are {tags}")
    return Path(open_clip.download_pretrained(facts)), facts


def load_trunk(trunk: nn.Module, name: str, path: Path) -> None:
    """Fill timm's model without its classifier from a file of the whole one. Raises ValueError as `load_weights`."""
    import timm

    whole = timm.create_model(name)
    load_weights(whole, path, name)
    tensors = whole.state_dict()
    wanted = trunk.state_dict()
    unfit = [key for key, own in wanted.items() if key not in tensors or tensors[key].shape != own.shape]
    if unfit:
        raise ValueError(f"{path} does not fit the trunk {name}: {unfit[:5]} are missing or of another shape")
    trunk.load_state_dict({key: tensors[key] for key in wanted})


def _prepare(config: dict[str, Any], text: str | None, load_text: bool) -> None:
    """Say in ``config`` that towers load no weights of their own but those that ``text`` names."""
    vision, words = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    if text is not None:
        words["hf_model_name"] = words["hf_tokenizer_name"] = text
    if "hf_model_name" in words:
        from transformers.utils import logging

        logging.disable_progress_bar()  # the weights are read in a moment
        words["hf_tokenizer_name"] = resolve_source(words.get("hf_tokenizer_name") or words["hf_model_name"])
        words["hf_model_name"] = resolve_source(words["hf_model_name"])
        words["hf_model_pretrained"] = load_text


def _set_size(visual: nn.Module, trunk: nn.Module | None) -> None:
    """Give timm's vision transformers the size of pictures that the configuration says."""
    own = getattr(getattr(trunk, "patch_embed", None), "img_size", None)
    if own is not None and tuple(own) != tuple(visual.image_size):
        visual.set_input_size(tuple(visual.image_size))
