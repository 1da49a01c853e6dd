"""``merge --mergekit FILE``: an existing configuration of mergekit, from its text to a job."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulgurite.commands.yaml_loader import load_file

if TYPE_CHECKING:
    from torch import Tensor

    from fulgurite.checkpoints.sources import Source
    from fulgurite.methods.merging.job import Job
    from fulgurite.methods.merging.mergekit_recipe import Recipe


def prepared(file: Path, out: Path, threads: int | None, max_shard_bytes: int) -> tuple[Job, list[str]]:
    """The merge that a configuration asks for, and remarks on parameters without effect. Writes nothing.

    Raises:
        ValueError: with all that is wrong or not supported.
        CheckpointError: a model is damaged or missing, or the result cannot be written.
    """
    import torch

    from fulgurite.checkpoints.companions import Changes
    from fulgurite.checkpoints.foreign import require_new
    from fulgurite.checkpoints.sources import open_source
    from fulgurite.methods.merging.job import companion_folder, job_of, single_type
    from fulgurite.methods.merging.mergekit import check, planned, promoted
    from fulgurite.methods.merging.mergekit_recipe import listed, read_recipe

    require_new(out)
    value = load_file(file)
    recipe, problems = read_recipe(value)
    more, remarks = check(recipe)
    folders = located(recipe)
    problems += [*more, *(f"{n}: no such folder, and not in the cache of the hub" for n, p in folders.items() if not p)]
    if problems:
        raise ValueError(listed(problems, f"in {file} are wrong or not supported"))
    sources = {name: open_source(folder) for name, folder in folders.items() if name in merged_models(recipe)}
    rows, states = vocabulary_rows(recipe, folders, sources)
    labels = {name: f"{name} ({source.path})" for name, source in sources.items()}
    plan, merger, weights, layers = planned(recipe, states, labels)
    dtype = None if recipe.dtype is None else getattr(torch, recipe.dtype)
    dtypes = {name: dtype or own for name, own in promoted(plan).items()}
    order = [sources[name] for name in recipe.models if name in sources]
    job = job_of(
        out,
        plan,
        merger,
        weights,
        {"merger": recipe.method, "mergekit": value},
        dtypes,
        threads,
        order,
        order[0],
        companion_folder(order[:1], None),
        Changes(single_type(dtypes), rows, layers),
        max_shard_bytes,
        None if recipe.tokenizer is None else folders[recipe.tokenizer],
    )
    return job, remarks


def merged_models(recipe: Recipe) -> set[str]:
    """Models whose weights are merged; the others give their tokenizer alone."""
    return {source.model for part in recipe.slices for source in part.sources}


def located(recipe: Recipe) -> dict[str, Path | None]:
    """The folder or file of every model: its path, or where the cache of the hub has it; None where it is missing."""
    return {name: Path(name) if Path(name).exists() else cached(name) for name in recipe.models}


def cached(name: str) -> Path | None:
    """The folder of a hub model that was downloaded before."""
    home = os.environ.get("HF_HOME", str(Path.home() / ".cache" / "huggingface"))
    folder = Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")) / f"models--{name.replace('/', '--')}"
    commit = folder / "refs" / "main"
    path = folder / "snapshots" / commit.read_text().strip() if commit.is_file() else None
    return path if path is not None and path.is_dir() else None


def vocabulary_rows(
    recipe: Recipe, folders: Mapping[str, Path | None], sources: Mapping[str, Source]
) -> tuple[tuple[int, frozenset[int]] | None, dict[str, dict[str, Tensor]]]:
    """Rows of the vocabulary under the tokenizer that is asked for, with those before, and all tensors cut to them.

    mergekit arranges the rows of every model in the order of that tokenizer. Here its tokens must have the same rows
    in all models, so that only rows behind them, of no token, are left out.

    Raises:
        ValueError: tokens have other numbers in another model, or nothing tells which they have.
    """
    from fulgurite.checkpoints.companions import vocabulary_of
    from fulgurite.methods.merging.mergekit_recipe import listed

    states = {name: dict(source.tensors) for name, source in sources.items()}
    if recipe.tokenizer is None:
        return None, states
    sizes, vocabularies, problems = {}, {}, []
    for name in dict.fromkeys([recipe.tokenizer, *sources]):
        sizes[name], vocabularies[name] = vocabulary_of(folders[name])
        if not vocabularies[name] or sizes[name] is None:
            problems.append(f"{name}: no tokenizer.json, or no vocab_size in config.json, so tokens cannot be compared")
    tokens = vocabularies[recipe.tokenizer]
    for name, own in vocabularies.items():
        differ = [token for token, number in tokens.items() if own and own.get(token) != number]
        if differ:
            problems.append(
                f"{name}: {len(differ)} tokens of {recipe.tokenizer} have other numbers, or none, such as {differ[0]!r}"
            )
    if problems:
        raise ValueError(listed(problems, "in the tokenizers are wrong or not supported: rows are not rearranged"))
    rows = max(tokens.values()) + 1
    short = [f"{name}: {size} rows" for name, size in sizes.items() if name in sources and size < rows]
    if short:
        raise ValueError(
            listed(short, f"are too few for the tokens of {recipe.tokenizer}, which need {rows}: no rows are added")
        )
    for name, state in states.items():
        names = [key for key, t in state.items() if is_vocabulary(key) and t.dim() and len(t) == sizes[name]]
        state |= {key: state[key][:rows] for key in names}
    before = frozenset(size for size in sizes.values() if size is not None)
    return (None if before == {rows} else (rows, before)), states


def is_vocabulary(name: str) -> bool:
    """Whether a tensor of no layer, with as many rows as there are tokens, has a row for each of them."""
    from fulgurite.methods.merging.layerwise import LAYER

    return LAYER.match(name) is None and "norm" not in name.lower()


def conflicts(options: Any) -> list[str]:
    """Options that the configuration itself decides."""
    usual = dict.fromkeys(("sources", "base", "merger", "weights", "dtype", "like", "donor"))
    return [f"--{name}" for name, value in {**usual, "rows": "error", "strict": True}.items() if options[name] != value]
