"""What an artefact holds so that another library loads it: names of its weight files, configuration, tokenizer.

An artefact of models of another library is both: a checkpoint of fulgurite, with a manifest over all its files, and a
folder in that library's layout. Configurations change with the weights: their type, their vocabulary, their layers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fulgurite.checkpoints.atomic import reading, resolve
from fulgurite.checkpoints.card import library_of
from fulgurite.checkpoints.errors import DamagedError, MissingError, RefusedError
from fulgurite.checkpoints.foreign import companions

WEIGHTS = "weights.safetensors"  # of a folder that no other library reads
CONFIGS = {"open_clip_config.json": "open_clip_model.safetensors", "config.json": "model.safetensors"}
ADAPTER_CONFIG = "adapter_config.json"  # of peft
SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.safetensors$)")
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", re.IGNORECASE)
LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
TYPE_KEYS = ("dtype", "torch_dtype")
TOKENIZER = re.compile(
    r"tokenizer.*|.*\.tiktoken|.*\.model|vocab\.(json|txt)|merges\.txt|added_tokens\.json|special_tokens_map\.json|"
    r"chat_template\.\w+"
)


@dataclass(frozen=True)
class Changes:
    """How the weights of an artefact differ from those that a configuration was written for.

    Args:
        dtype: type of the weights, as torch names it; None leaves the configuration's.
        rows: rows that vocabularies have now, and those that they had; None where none was cut.
        layers: number of the layer that each layer was, in order; None where they are as they were.
    """

    dtype: str | None = None
    rows: tuple[int, frozenset[int]] | None = None
    layers: Sequence[int] | None = None


@dataclass(frozen=True)
class Layout:
    """The files of an artefact.

    Args:
        weights: weight file -> names of its tensors.
        texts: every other file but manifest and model card -> its bytes.
    """

    weights: Mapping[str, Sequence[str]]
    texts: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Of the files beside the weights."""
        return sum(map(len, self.texts.values()))


def config_of(folder: Path) -> Path | None:
    """The configuration by which another library knows ``folder`` as a model of its own."""
    return next((folder / name for name in CONFIGS if (folder / name).is_file()), None)


def is_adapter(path: Path) -> bool:
    """Whether ``path`` is a folder of adapters of peft."""
    return (resolve(path) / ADAPTER_CONFIG).is_file()


def weights_name(folder: Path, files: Sequence[Path] = ()) -> str:
    """What the library of ``folder`` calls a single file of weights, as far as ``files``, its present ones, tell."""
    config = config_of(folder)
    if config is None:
        return WEIGHTS
    usual = CONFIGS[config.name]
    own = [SHARD.sub("", file.name) for file in files if file.suffix == ".safetensors"]
    return usual if usual in own or not own else own[0]


def layout_of(
    like: Mapping[str, Tensor],
    folder: Path | None,
    files: Sequence[Path] = (),
    changes: Changes | None = None,
    max_shard_bytes: int | None = None,
    tokenizer: Path | None = None,
) -> Layout:
    """The files of an artefact with tensors of these types and shapes.

    Args:
        like: by name, in order.
        folder: model folder of another library that gives configuration, tokenizer and names; None for none.
        files: weight files of that folder.
        changes: what is written into the configuration.
        max_shard_bytes: of a weight file; more is written in shards under an index.
        tokenizer: folder whose tokenizer takes the place of that of ``folder``.

    Raises:
        RefusedError: the configuration cannot say what has changed.
        MissingError: ``folder`` has no configuration.
    """
    if folder is None:
        return Layout({WEIGHTS: list(like)})
    config = config_of(folder)
    if config is None:
        raise MissingError(f"{folder} has none of {', '.join(CONFIGS)}: name a model folder of another library")
    texts = texts_of(folder)
    if tokenizer is not None:
        texts = {name: text for name, text in texts.items() if not TOKENIZER.fullmatch(name)}
        texts |= {name: text for name, text in texts_of(tokenizer).items() if TOKENIZER.fullmatch(name)}
    texts[config.name] = changed_config(config, texts, changes or Changes())
    name = weights_name(folder, files)
    if max_shard_bytes is None or num_bytes(like) <= max_shard_bytes:
        return Layout({name: list(like)}, texts)
    if (library := library_of(texts)) != "transformers":
        raise RefusedError(f"{library} reads one file of weights: leave out max_shard_size")
    weights = shards(like, name, max_shard_bytes)
    return Layout(weights, texts | {f"{name}.index.json": index_text(like, weights)})


def texts_of(folder: Path) -> dict[str, bytes]:
    """The files beside the weights of a model folder."""
    texts = {}
    for path in companions(folder):
        with reading(path):
            texts[path.name] = path.read_bytes()
    return texts


def num_bytes(like: Mapping[str, Tensor]) -> int:
    """Size of tensors of these types and shapes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in like.values())


def shards(like: Mapping[str, Tensor], name: str, max_bytes: int) -> dict[str, list[str]]:
    """Names of tensors by file, in order; a file has more than ``max_bytes`` only where one tensor has."""
    parts: list[list[str]] = []
    filled = 0
    for key, tensor in like.items():
        size = tensor.numel() * tensor.element_size()
        if not parts or filled + size > max_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(key)
        filled += size
    stem = name.removesuffix(".safetensors")
    return {f"{stem}-{n:05d}-of-{len(parts):05d}.safetensors": part for n, part in enumerate(parts, 1)}


def index_text(like: Mapping[str, Tensor], weights: Mapping[str, Sequence[str]]) -> bytes:
    """The index of shards, as transformers reads it."""
    where = {key: file for file, keys in weights.items() for key in keys}
    index = {"metadata": {"total_size": num_bytes(like)}, "weight_map": {key: where[key] for key in like}}
    return json_text(index)


def json_text(value: Any) -> bytes:
    """Indented JSON."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_config(path: Path, text: bytes) -> dict[str, Any]:
    """A configuration; `DamagedError` where it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise DamagedError(f"{path} is no configuration: it holds a {type(value).__name__}")
    return value


def changed_config(path: Path, texts: Mapping[str, bytes], changes: Changes) -> bytes:
    """The configuration ``path`` with what has changed; its own bytes where nothing has.

    Raises:
        RefusedError: it does not name what has changed, or the tokenizer has tokens that have no row any more.
    """
    value = read_config(path, texts[path.name])
    before = json.dumps(value)
    parts = [value, *(part for part in value.values() if isinstance(part, dict))]
    if changes.dtype is not None:
        for part in parts:
            part |= {key: changes.dtype for key in TYPE_KEYS if isinstance(part.get(key), str)}
        if "model_type" in value and not set(TYPE_KEYS) & value.keys():
            value["dtype"] = changes.dtype
    if changes.rows is not None:
        change_rows(path, parts, changes.rows)
        require_tokens_below(path.parent, texts, changes.rows[0])
    if changes.layers is not None:
        change_layers(path, parts, changes.layers)
    return texts[path.name] if json.dumps(value) == before else json_text(value)


def change_rows(path: Path, parts: Sequence[dict[str, Any]], rows: tuple[int, frozenset[int]]) -> None:
    """Put the new size of the vocabulary in place of an old one."""
    now, before = rows
    named = [part for part in parts if part.get("vocab_size") in before | {now}]
    if not named:
        raise RefusedError(
            f"rows are cut to {now}, from {', '.join(map(str, sorted(before - {now})))}, which is no vocab_size in "
            f"{path}: nothing loads the result; merge models with equal shapes"
        )
    for part in named:
        part["vocab_size"] = now


def change_layers(path: Path, parts: Sequence[dict[str, Any]], layers: Sequence[int]) -> None:
    """Put the new number of layers in place of the old one, and with it every list of types of layers."""
    found = [(part, key) for part in parts for key in LAYER_KEYS if isinstance(part.get(key), int)]
    if len({id(part) for part, _ in found}) != 1:
        raise RefusedError(f"{path} does not say in one place how many layers there are ({', '.join(LAYER_KEYS)})")
    for part, key in found:
        types = part.get("layer_types")
        if isinstance(types, list) and len(types) == part[key]:
            part["layer_types"] = [types[number] for number in layers]
        part[key] = len(layers)


def require_tokens_below(folder: Path, texts: Mapping[str, bytes], rows: int) -> None:
    """Raise `RefusedError` where a token of the folder's tokenizer has no row."""
    found = vocabulary(folder, texts)
    over = [token for token, number in found.items() if number >= rows]
    if over:
        raise RefusedError(
            f"{folder} has {len(over)} tokens, such as {over[0]!r}, beyond the {rows} rows that all models have: take "
            "the tokenizer of another model, with like"
        )


def vocabulary(folder: Path, texts: Mapping[str, bytes]) -> dict[str, int]:
    """Token -> number of a tokenizer.json; empty where there is none."""
    name = "tokenizer.json"
    if name not in texts:
        return {}
    value = read_config(folder / name, texts[name])
    try:
        own = value["model"]["vocab"]
        tokens = own if isinstance(own, dict) else {token: number for number, (token, *_) in enumerate(own)}
        return {**tokens, **{added["content"]: added["id"] for added in value.get("added_tokens", [])}}
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{folder / name} is no tokenizer: {error!r}") from error


def vocabulary_of(folder: Path) -> tuple[int | None, dict[str, int]]:
    """``vocab_size`` of a model folder's configuration, and the numbers of its tokens; None and empty where unknown."""
    if not folder.is_dir():
        return None, {}
    texts, name = texts_of(folder), "config.json"
    value = read_config(folder / name, texts[name]) if name in texts else {}
    parts = [value, *(part for part in value.values() if isinstance(part, dict))]
    sizes = [part["vocab_size"] for part in parts if isinstance(part.get("vocab_size"), int)]
    return (sizes[0] if sizes else None), vocabulary(folder, texts)


def parsed_size(text: str) -> int:
    """Bytes of ``5GB``, ``500MB``, ``4GiB``, as transformers reads them; ValueError for anything else."""
    match = SIZE.fullmatch(text.strip())
    if match is None or not float(match[1]):
        raise ValueError(f"max_shard_size={text!r}: give a size such as 5GB or 500MB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))
