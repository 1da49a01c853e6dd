"""The model card of an artefact: what it is, where it comes from and how it is loaded, from its manifest alone.

Equal manifests give equal bytes. The card is Markdown with the front matter that model hubs read. Whatever comes from
files (paths, names of tensors, settings) stands in code spans and code blocks, where Markdown and HTML mean nothing.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fulgurite.checkpoints.manifest import Manifest

CARD_NAME = "README.md"
STEPS = ("merge", "prune", "quantize", "export")
MADE = {"merge": "merged from", "prune": "pruned from", "quantize": "quantized from", "export": "exported from"}
STATE = "state.safetensors"  # of an optimizer, no part of the model
LOADERS = {
    "transformers": ("from transformers import AutoModel", "model = AutoModel.from_pretrained({})", ""),
    "timm": ("import timm", "model = timm.create_model({}, pretrained=True)", "local-dir:"),
    "open_clip": ("import open_clip", "model, _, preprocess = open_clip.create_model_and_transforms({})", "local-dir:"),
    "fulgurite": ("import fulgurite", "model = fulgurite.load_model({})", ""),
}
SHOWN = 12  # tensors with the largest change
CACHED = re.compile(r"(?:^|/)models--(?:([\w.-]+?)--)?([\w.-]+?)/snapshots/", re.ASCII)
ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")


def card(manifest: Manifest, name: str) -> str:
    """The card as text.

    Args:
        manifest: of the artefact, complete but for the card itself.
        name: what the artefact is called, usually its folder's name.
    """
    sections = [
        ("Made from", sources_text(manifest)),
        ("Method", method_text(manifest)),
        ("Weights", weights_text(manifest)),
        ("Scores", scores_text(manifest.metrics)),
        ("Loading", loading_text(manifest, name)),
        ("Written", written_text(manifest)),
    ]
    body = "".join(f"\n## {title}\n\n{text}\n" for title, text in sections if text)
    return f"{front_matter(manifest)}\n# {heading(name)}\n\n{summary(manifest)}\n{body}"


def front_matter(manifest: Manifest) -> str:
    """What a hub reads; base models are those whose names on the hub are known from the path in its cache."""
    step = step_of(manifest)
    bases = list(dict.fromkeys(filter(None, (hub_name(parent["path"]) for parent in manifest.parents))))
    lines = ["---", "tags:", *(f"- {tag}" for tag in (["fulgurite"] if step is None else [step, "fulgurite"]))]
    if bases:
        lines += ["base_model:", *(f"- {json.dumps(base)}" for base in bases)]
    if bases and step == "merge":
        lines.append("base_model_relation: merge")
    if manifest.facts.get("library") in LOADERS:
        lines.append(f"library_name: {manifest.facts['library']}")
    return "\n".join([*lines, "---", ""])


def summary(manifest: Manifest) -> str:
    """One sentence."""
    step, count = step_of(manifest), len(manifest.parents)
    sources = "one checkpoint" if count == 1 else f"{count} models"
    made = f"A model {MADE[step]} {sources}" if step and count else "A checkpoint"
    method = method_of(manifest)
    return f"{made}{f' by {code(method)}' if method else ''}, made by fulgurite."


def sources_text(manifest: Manifest) -> str:
    """A line per parent: its part, path and digest."""
    parts = parts_of(manifest)
    lines = [f"- {part}: {code(p['path'])}, digest {code(p['digest'])}" for part, p in zip(parts, manifest.parents)]
    if manifest.base is not None:
        lines.append(f"- stands on {code(manifest.base['source'])}, digest {code(manifest.base['digest'])}")
    return "\n".join(lines)


def method_text(manifest: Manifest) -> str:
    """Class, papers and all settings."""
    found = made_by(manifest)
    if found is None:
        return ""
    papers = [str(paper) for paper in manifest.facts.get("papers", [])]
    links = [ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", p) if ARXIV.fullmatch(p) else code(p) for p in papers]
    after = f" ({', '.join(links)})" if links else ""
    # A checkpoint of a run has the settings of the whole run.
    own = ("merger", "weights") if "model" in manifest.settings else set(manifest.settings) - set(STEPS)
    settings = {key: manifest.settings[key] for key in own if key in manifest.settings}
    text = json.dumps({**settings, **found}, indent=2, sort_keys=True, ensure_ascii=False, default=str)
    return f"{code(method_of(manifest))}{after}, with\n\n{block(text.splitlines(), 'json')}"


def weights_text(manifest: Manifest) -> str:
    """Number, types and size of the tensors, and those that changed most."""
    files = {name: records for name, records in manifest.tensors.items() if name != STATE}
    entries: dict[str, int] = {}
    for record in (record for records in files.values() for record in records.values()):
        entries[record.dtype] = entries.get(record.dtype, 0) + math.prod(record.shape)
    kinds = ", ".join(f"{count:,} {dtype}" for dtype, count in sorted(entries.items(), key=lambda i: -i[1]))
    size = sum(manifest.files[name].bytes for name in files)
    text = f"{sum(map(len, files.values())):,} tensors (entries: {kinds}), {size:,} bytes."
    change: Mapping[str, float] = manifest.facts.get("change") or {}
    if not change:
        return text
    ranked = sorted(change.items(), key=lambda item: (-item[1], item[0]))
    rows = [f"{value:10.4g}  {visible(name)}" for name, value in ranked[:SHOWN]]
    if len(ranked) > SHOWN:
        rows.append(f"and {len(ranked) - SHOWN:,} tensors that changed less")
    start = "the base" if "base" in parts_of(manifest) else "the first model"
    return f"{text} Largest change from {start}, norm of the change over norm of the tensor:\n\n{block(rows, 'text')}"


def scores_text(metrics: Mapping[str, Any]) -> str:
    """One line per score, by name."""
    rows = [f"{visible(name)}  {number(value)}" for name, value in sorted(metrics.items())]
    return block(rows, "text") if rows else ""


def loading_text(manifest: Manifest, name: str) -> str:
    """Code that loads it, where ``name`` lies in the working folder."""
    path, library = repr(name), manifest.facts.get("library")
    if library in LOADERS:
        imported, call, prefix = LOADERS[library]
        if library == "transformers" and "loaded_by" in manifest.facts:
            imported, call = (text.replace("AutoModel", manifest.facts["loaded_by"]) for text in (imported, call))
        return block([imported, "", call.format(repr(prefix + name))], "python")
    if "model" in manifest.settings:
        python = block(["import fulgurite", "", f"module = fulgurite.load({path})"], "python")
        return f"{python}\n\n{block([f'fulgurite test --ckpt_path {shlex.quote(visible(name))}'], 'sh')}"
    lines = ["from fulgurite.checkpoints import load_tensors", "", f"tensors = load_tensors({path})"]
    return f"{block(lines, 'python')}\n\nEvery byte is checked against the digests of `manifest.json` first."


def written_text(manifest: Manifest) -> str:
    """When, and with which versions."""
    versions = ", ".join(f"{name} {version}" for name, version in manifest.facts.get("software", {}).items())
    return f"{code(manifest.created)}{f' with {code(versions)}' if versions else ''}"


def step_of(manifest: Manifest) -> str | None:
    """``merge``, ``prune``, ..; None of a checkpoint that no step has made."""
    if "merger" in manifest.settings:
        return "merge"
    return next((step for step in STEPS if step in manifest.settings), None)


def made_by(manifest: Manifest) -> dict[str, Any] | None:
    """``class_path`` and ``init_args`` of what made it, or what is known of them."""
    settings = manifest.settings
    found = next((settings[step] for step in STEPS if isinstance(settings.get(step), dict)), None)
    found = (
        found or manifest.facts.get("step") or ({"class_path": settings["merger"]} if "merger" in settings else None)
    )
    return found if isinstance(found, dict) else None


def method_of(manifest: Manifest) -> str | None:
    """Class name of the method."""
    found = manifest.settings.get("merger") or (made_by(manifest) or {}).get("class_path")
    return None if found is None else str(found).rpartition(".")[2]


def parts_of(manifest: Manifest) -> list[str]:
    """What each parent was: ``base`` or ``expert 1, weight 0.5`` of a merge, else ``source``."""
    weights, parents = manifest.settings.get("weights"), len(manifest.parents)
    if step_of(manifest) != "merge" or not isinstance(weights, list) or parents - len(weights) not in (0, 1):
        return ["source"] * parents
    experts = [f"expert {number}, weight {weight:g}" for number, weight in enumerate(weights, 1)]
    return experts if len(weights) == parents else ["base", *experts]


def library_of(texts: Mapping[str, bytes]) -> str | None:
    """The library that reads a folder with these documents, a fact that a card tells by ``library``."""
    if "open_clip_config.json" in texts:
        return "open_clip"
    if "config.json" not in texts:
        return None
    return "timm" if "architecture" in json.loads(texts["config.json"]) else "transformers"


def hub_name(path: str) -> str | None:
    """``owner/name`` (``name`` of the oldest ones) of a path in the cache of a model hub."""
    match = CACHED.search(path)
    return None if match is None else "/".join(filter(None, match.groups()))


def number(value: Any) -> str:
    """A score for reading."""
    return f"{value:.6g}" if isinstance(value, float) else visible(str(value))


def visible(text: str) -> str:
    """``text`` on one line: what is not printable, or turns the direction of writing, as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def heading(text: str) -> str:
    """Plain text of a heading: punctuation that Markdown could read is escaped."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&$@:])", r"\\\1", visible(text))


def code(text: Any) -> str:
    """A code span, which ends nowhere inside ``text``."""
    shown = visible(str(text)) or " "
    fence = "`" * (longest_run(shown) + 1)
    space = " " if shown.strip() and (shown[0] in "` " or shown[-1] in "` ") else ""
    return f"{fence}{space}{shown}{space}{fence}"


def block(lines: Sequence[str], language: str) -> str:
    """A code block, which ends nowhere inside the lines."""
    shown = [visible(line) for line in lines]
    fence = "`" * max(3, longest_run("\n".join(shown)) + 1)
    return "\n".join([f"{fence}{language}", *shown, fence])


def longest_run(text: str) -> int:
    """Backticks in a row, at most."""
    runs: Iterable[str] = re.findall("`+", text)
    return max(map(len, runs), default=0)
