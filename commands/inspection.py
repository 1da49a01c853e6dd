"""``inspect PATH``: print what checkpoints hold and where they came from, from their manifests alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fulgurite.commands.errors import DONE, ConfigError
from fulgurite.commands.plain import PlainParser
from fulgurite.commands.tables import console, plain_table, size_text

if TYPE_CHECKING:
    from fulgurite.checkpoints import Manifest

STATE = "state.safetensors"  # of optimizer and loops, no part of the model
WEIGHTS = "weights"
SHARD = "shard-"
Entry = tuple[Path, "Manifest"]


def run(command: str, argv: list[str]) -> int:
    """Print tables for a person, or JSON for a machine. Tensors are not read; ``verify`` checks them."""
    parser = PlainParser(
        prog="fulgurite inspect", description="Print what checkpoints, runs, adapters, feature stores and indexes hold."
    )
    parser.add_argument("path", type=Path, help="checkpoint, adapters, run, folder of runs, feature store, or index")
    parser.add_argument("--tensors", action="store_true", help="list every tensor of a checkpoint")
    parser.add_argument("--settings", action="store_true", help="print the settings that a checkpoint was made with")
    parser.add_argument(
        "--json", action="store_true", help="one object for a checkpoint, a list of them for any other folder"
    )
    options = parser.parse_args(argv)
    from fulgurite.checkpoints import digested_folders, read_manifest
    from fulgurite.checkpoints.runs import CHECKPOINTS

    entries = [(folder, read_manifest(folder)) for folder in digested_folders(options.path)]
    if not entries:
        there = "holds no folder with a manifest.json" if options.path.exists() else "no such folder"
        raise ConfigError(f"{options.path}: {there}; give a run, a checkpoint, adapters or a feature store")
    single = entries[0][0] == options.path
    if options.json:
        described = [describe(*entry) for entry in entries]
        print(json.dumps(described[0] if single else described, indent=2, ensure_ascii=False))
        return DONE
    if not single:
        print_overview(options.path, entries)
        print_metrics("metrics at the end of the run", final_metrics(options.path))
    shown = entries if single else [entry for entry in entries if entry[0].parent.name == CHECKPOINTS]
    if shown:
        print_details(*max(shown, key=lambda entry: entry[1].created), options.tensors, options.settings)
    return DONE


def describe(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """The manifest as it is stored, with its path and the size of each set of the model."""
    from fulgurite.checkpoints import MANIFEST_NAME
    from fulgurite.checkpoints.atomic import resolve

    stored = json.loads((resolve(folder) / MANIFEST_NAME).read_bytes())
    return {"path": str(folder), "sets": sets_of(manifest), **stored}


def sets_of(manifest: Manifest) -> dict[str, dict[str, int]]:
    """``tensors``, ``parameters`` and ``bytes`` of each adapter set and of each other part of the model."""
    sizes: dict[str, dict[str, int]] = {}
    for name, shape, dtype in model_tensors(manifest):
        head = name.split(".")
        part = head[2] if head[:2] == ["bank", "sets"] else manifest.facts.get("set", head[0])
        row = sizes.setdefault(part, {"tensors": 0, "parameters": 0, "bytes": 0})
        row["tensors"] += 1
        row["parameters"] += math.prod(shape)
        row["bytes"] += math.prod(shape) * _itemsize(dtype)
    return sizes


def model_tensors(manifest: Manifest) -> Iterator[tuple[str, list[int], str]]:
    """Name, whole shape and type of every tensor of the model, each once where its slices lie in several files."""
    from fulgurite.checkpoints.shards import SHARDS

    sliced = manifest.structure.get(SHARDS)
    kinds: dict[str, str] = {}
    for file, records in manifest.tensors.items():
        if sliced is not None and file.startswith(SHARD):
            kinds |= {name: record.dtype for name, record in records.items()}
        elif file != STATE:
            yield from ((name, record.shape, record.dtype) for name, record in records.items())
    for name, entry in (sliced or {}).get(WEIGHTS, {}).items():
        yield name, entry["shape"], kinds[f"{WEIGHTS}/{name}"]


def print_overview(root: Path, entries: Iterable[Entry]) -> None:
    """One row per checkpoint; the shards of a feature store are one row."""
    table = plain_table(str(root), "folder", "kind", "stage", "epoch", "step", "size", "metrics", "written")
    for parent, group in groupby(entries, key=_shared_parent):
        rows = list(group)
        if parent is not None:
            tensors = sum(len(records) for _, m in rows for records in m.tensors.values())
            settings = rows[0][1].settings.get("index", rows[0][1].settings)
            made = ", ".join(str(settings[key]) for key in ("name", "dtype") if key in settings)
            videos = sum(m.facts.get("videos", 0) for _, m in rows) or tensors
            name, kind = _relative(parent, root), f"features of {videos} videos in {len(rows)} shards"
            size, written = sum(map(_bytes, (m for _, m in rows))), max(m.created for _, m in rows)
            table.add_row(name, kind, "", "", "", size_text(size), made, _when(written))
            continue
        for folder, manifest in rows:
            facts = manifest.facts
            table.add_row(
                _relative(folder, root),
                facts.get("holds", manifest.kind),
                stage_text(facts),
                str(facts.get("epoch", "")),
                str(facts.get("global_step", "")),
                size_text(_bytes(manifest)),
                ", ".join(f"{name} {_number(value)}" for name, value in _headline(manifest.metrics).items()),
                _when(manifest.created),
            )
    console().print(table)


def print_details(folder: Path, manifest: Manifest, every_tensor: bool, settings: bool) -> None:
    """Tables of one checkpoint: where it comes from, its sets, its files, its metrics."""
    out = console()
    origin = plain_table(str(folder), "", "")
    for name, value in origin_rows(manifest):
        origin.add_row(name, value)
    out.print(origin)
    if manifest.parents:
        made_from = plain_table("made from", "", "was", "by", "digest")
        for row in lineage_rows(folder, manifest):
            made_from.add_row(*row)
        out.print(made_from)
    whole = manifest.facts.get("parameters", {}).get("model")
    sets = plain_table("sets and other parts", "part", "tensors", "parameters", "of the model", "size")
    for name, row in sets_of(manifest).items():
        share = f"{row['parameters'] / whole:.2%}" if whole else ""
        sets.add_row(name, str(row["tensors"]), f"{row['parameters']:,}", share, size_text(row["bytes"]))
    out.print(sets)
    files = plain_table("files", "file", "size", "tensors", "digest")
    for name, record in manifest.files.items():
        files.add_row(name, size_text(record.bytes), str(len(manifest.tensors.get(name, ())) or ""), record.digest)
    out.print(files)
    print_metrics("metrics", manifest.metrics)
    if every_tensor:
        tensors = plain_table("tensors", "tensor", "type", "shape", "file")
        for file, records in manifest.tensors.items():
            for name, tensor in records.items():
                tensors.add_row(name, tensor.dtype, str(tensor.shape), file)
        out.print(tensors)
    if settings:
        out.print(yaml.safe_dump(manifest.settings, sort_keys=False), markup=False, highlight=False)


def final_metrics(run: Path) -> dict[str, Any]:
    """What ``metrics.json`` of a run says; nothing where the folder is no run, or has not ended."""
    file = run / "metrics.json"
    try:
        return json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"{file} is damaged: {error}; see fulgurite verify {run}") from error


def print_metrics(title: str, metrics: Mapping[str, Any]) -> None:
    """A row per metric, accuracies first; nothing where there are none."""
    if metrics:
        table = plain_table(title, "name", "value")
        for name, value in _headline(metrics, len(metrics)).items():
            table.add_row(name, _number(value))
        console().print(table)


def origin_rows(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """What a checkpoint is and what it was made from, by name; only what the manifest knows."""
    from fulgurite.checkpoints.card import method_of, step_of
    from fulgurite.checkpoints.shards import SHARDS

    facts, base = manifest.facts, manifest.base
    yield "kind", manifest.kind
    if base is not None:
        yield "base", f"{base['source']}  {base['digest']}"
    yield "digest", manifest.digest
    yield "written", _when(manifest.created)
    module = manifest.settings.get("model")
    if isinstance(module, dict) and "class_path" in module:
        yield "module", str(module["class_path"])
    if stage_text(facts):
        yield "stage", stage_text(facts)
    for key, name in (("set", "set"), ("epoch", "epoch"), ("global_step", "step")):
        if key in facts:
            yield name, str(facts[key])
    if "info" in facts:
        info = facts["info"]
        yield "data", f"{len(info['answers'])} answers; domains {', '.join(info['domains'])}"
        yield "data digest", str(facts.get("info_digest", "not recorded"))
    if "parameters" in facts:
        trained, model = facts["parameters"]["trained"], facts["parameters"]["model"]
        yield "trained", f"{trained:,} of {model:,} parameters ({trained / max(model, 1):.2%})"
    if SHARDS in manifest.structure:
        yield SHARDS, f"{sum(file.startswith(SHARD) for file in manifest.files)} files"
    if step_of(manifest) is not None:
        yield "made by", f"{step_of(manifest)} {method_of(manifest) or ''}".strip()
    if isinstance(facts.get("totals"), dict):
        yield "totals", ", ".join(f"{name} {_number(value)}" for name, value in facts["totals"].items())
    for key, value in manifest.structure.items():
        if key != SHARDS:
            yield "structure", f"{key}: {json.dumps(value, ensure_ascii=False, default=str)}"
    yield "size", size_text(_bytes(manifest))
    yield "software", ", ".join(f"{name} {version}" for name, version in facts.get("software", {}).items())


def lineage_rows(folder: Path, manifest: Manifest) -> Iterator[tuple[str, str, str, str]]:
    """Path, part, method and digest of all that a checkpoint was made from; parents below their child, set in."""
    from fulgurite.checkpoints.card import method_of, step_of
    from fulgurite.checkpoints.lineage import Node, lineage_of

    def rows(node: Node, depth: int) -> Iterator[tuple[str, str, str, str]]:
        for parent in node.parents:
            known = parent.manifest
            method = None if known is None or step_of(known) is None else f"{step_of(known)} {method_of(known) or ''}"
            made_by = method or ("training" if known is not None and "model" in known.settings else "")
            state = "" if parent.state in ("known", "file") else f" ({parent.state})"
            yield f"{'  ' * depth}{parent.path}{state}", parent.part, made_by.strip(), parent.digest
            yield from rows(parent, depth + 1)

    return rows(lineage_of(manifest, folder), 0)


def stage_text(facts: Mapping[str, Any]) -> str:
    """As ``2 of 5: ivqa``; empty where there are no stages, ``before the first`` where none has begun."""
    if "stages" not in facts or "stage" not in facts:
        return ""
    stages, stage = facts["stages"], facts["stage"]
    return f"{stage + 1} of {len(stages)}: {stages[stage]['name']}" if stage >= 0 else "before the first"


def _headline(metrics: Mapping[str, Any], most: int = 2) -> dict[str, Any]:
    """At most so many of the metrics: accuracies before others, those of the whole before those of parts."""
    order = sorted(metrics, key=lambda name: ("accuracy" not in name, name.count("/"), len(name), name))
    return {name: metrics[name] for name in order[:most]}


def _shared_parent(entry: Entry) -> Path | None:
    folder = entry[0]
    return folder.parent if folder.name.startswith(SHARD) else None


def _bytes(manifest: Manifest) -> int:
    return sum(record.bytes for record in manifest.files.values())


def _itemsize(dtype: str) -> int:
    from fulgurite.checkpoints.tensorfile import dtype_of

    return dtype_of(dtype).itemsize


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _when(created: str) -> str:
    return created[:19].replace("T", " ") + " UTC"


def _relative(folder: Path, root: Path) -> str:
    return "." if folder == root else str(folder.relative_to(root))
