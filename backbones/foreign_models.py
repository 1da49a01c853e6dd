"""Models of transformers, timm and open_clip from tensors and configuration files, and their folders.

Each library's own code names and writes what it can; weights of timm and open_clip, which are plain state dicts, and
all digests are written through `fulgurite.checkpoints`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fulgurite.checkpoints import DamagedError, MismatchError, MissingError
from fulgurite.checkpoints.foreign import companions, copy_files
from fulgurite.checkpoints.tensorfile import write_tensors

CONFIG, OPEN_CLIP_CONFIG = "config.json", "open_clip_config.json"
QUANTIZED = "quantization_config"  # in the configuration of a model of transformers, where it is
WEIGHTS = {"timm": "model.safetensors", "open_clip": "open_clip_model.safetensors"}


def library_of(folder: Path) -> str | None:
    """The library whose configuration lies in a folder: ``hf``, ``timm`` or ``open_clip``; None without one."""
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return "open_clip"
    if not (folder / CONFIG).is_file():
        return None
    config = read_config(folder / CONFIG)
    return "timm" if "architecture" in config else "hf" if "model_type" in config else None


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `DamagedError` where the file is none."""
    try:
        config = json.loads(path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is no JSON: {error}") from error
    return config


def model_of(library: str, tensors: Mapping[str, Tensor], like: Path | None, architecture: str | None) -> nn.Module:
    """A library's model with the values of ``tensors``, which are named as in its files.

    Args:
        library: ``hf``, ``timm`` or ``open_clip``.
        tensors: all of its tensors.
        like: folder with its configuration.
        architecture: the library's name for it, where there is no such folder.

    Raises:
        MissingError: neither a configuration nor an architecture.
        MismatchError: the model has other tensors.
        ValueError: the library has no such architecture.
    """
    if library == "hf":
        return _of_transformers(tensors, like)
    if like is None and architecture is None:
        raise MissingError(
            f"nothing says how {library} builds the model: give --like FOLDER, which holds its configuration, or "
            f"--architecture NAME, {library}'s name for it"
        )
    make = _of_timm if library == "timm" else _of_open_clip
    model = make(tensors, like, architecture)
    own = model.state_dict()
    lines = [f"{n}: the model lacks it" for n in tensors if n not in own]
    lines += [f"{n}: the files lack it" for n in own if n not in tensors]
    lines += [
        f"{n}: file {tuple(tensors[n].shape)}, model {tuple(own[n].shape)}"
        for n in own
        if n in tensors and tensors[n].shape != own[n].shape
    ]
    require_none(lines, f"{library}'s {architecture or like}")
    model.load_state_dict(dict(tensors))
    return model.eval()


def require_none(lines: list[str], what: str) -> None:
    """Raise `MismatchError` with all ``lines``, if there are any."""
    if lines:
        shown = "\n  ".join(lines[:20])
        raise MismatchError(f"{len(lines)} tensors do not fit {what}:\n  {shown}")


def _of_transformers(tensors: Mapping[str, Tensor], like: Path | None) -> nn.Module:
    import transformers

    if like is None:
        raise MissingError(
            "no config.json lies with the weights: give --like FOLDER, a Hugging Face folder with the configuration "
            "(and tokenizer) of the model"
        )
    transformers.utils.logging.disable_progress_bar()
    kind = read_config(like / CONFIG)["model_type"]
    if kind not in transformers.CONFIG_MAPPING:
        raise MismatchError(f"{like / CONFIG} names the model type {kind!r}, which transformers itself does not have")
    config = transformers.AutoConfig.from_pretrained(like)
    named = (config.architectures or [None])[0]
    cls = getattr(transformers, str(named), None)
    if cls is None:
        raise MismatchError(f"{like / CONFIG} names the architecture {named!r}, which transformers does not have")
    kinds = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    dtype = reduce(torch.promote_types, kinds or {torch.float32})  # transformers loads a model in one type
    model, info = cls.from_pretrained(
        None,
        config=config,
        state_dict=dict(tensors),
        dtype=dtype,
        ignore_mismatched_sizes=True,  # they are refused below, with all others
        output_loading_info=True,
    )
    lines = [f"{n}: the files lack it" for n in sorted(info["missing_keys"])]
    lines += [f"{n}: the model lacks it" for n in sorted(info["unexpected_keys"])]
    lines += [f"{n}: another shape" for n, *_ in sorted(info["mismatched_keys"])]
    require_none(lines, f"transformers' {named} of {like}")
    return model.eval()


def _of_timm(tensors: Mapping[str, Tensor], like: Path | None, architecture: str | None) -> nn.Module:
    import timm

    if like is not None:
        return timm.create_model(f"local-dir:{like}", pretrained=False)
    if not timm.is_model(architecture):
        raise ValueError(f"timm has no model {architecture!r}; near: {timm.list_models(f'*{architecture[:6]}*')[:5]}")
    classifier = timm.get_pretrained_cfg(architecture).classifier
    names = [classifier] if isinstance(classifier, str) else list(classifier or ())
    head = next((tensors[f"{name}.weight"] for name in names if f"{name}.weight" in tensors), None)
    return timm.create_model(architecture, pretrained=False, num_classes=0 if head is None else len(head))


def _of_open_clip(tensors: Mapping[str, Tensor], like: Path | None, architecture: str | None) -> nn.Module:
    import open_clip

    if like is None and open_clip.get_model_config(architecture) is None:
        raise ValueError(f"open_clip has no model {architecture!r}; see open_clip.list_models()")
    name = architecture if like is None else f"local-dir:{like}"
    return open_clip.create_model(name, load_weights=False, pretrained_text=False)


def write_model(
    library: str,
    model: nn.Module,
    folder: Path,
    like: Path | None = None,
    architecture: str | None = None,
    tokenizer: Any = None,
    max_shard_size: str | int = "50GB",
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Fill ``folder`` as the library's own saving does, with the tokenizer and processor files that lie in ``like``.

    Args:
        library: ``hf``, ``timm`` or ``open_clip``.
        model: its model, in the dtype to write.
        folder: an empty folder.
        like: folder with the files of the same model.
        architecture: the library's name of the model, where there is no such folder.
        tokenizer: of transformers; written where ``like`` is not given.
        max_shard_size: of one file, for transformers.
        tensors: what is written in the place of the model's own, for transformers.
    """
    if library == "hf":
        from transformers.utils import logging

        logging.disable_progress_bar()
        model.save_pretrained(
            folder, max_shard_size=max_shard_size, state_dict=None if tensors is None else dict(tensors)
        )
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    else:
        write_tensors(folder / WEIGHTS[library], model.state_dict())
        if like is None:
            _write_config(library, model, folder, architecture)
    if like is not None:
        copy_files([file for file in companions(like) if library != "hf" or file.name != CONFIG], folder)


def _write_config(library: str, model: Any, folder: Path, architecture: str | None) -> None:
    if library == "timm":
        from timm.models._hub import save_config_for_hf

        save_config_for_hf(model, folder / CONFIG)
        return
    import open_clip

    visual = model.visual
    config = {
        "model_cfg": open_clip.get_model_config(architecture),
        "preprocess_cfg": {"mean": visual.image_mean, "std": visual.image_std},
    }
    (folder / OPEN_CLIP_CONFIG).write_text(json.dumps(config, indent=2))
