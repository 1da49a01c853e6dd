"""``export``: any run or artefact as a model of transformers, open_clip, timm or peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import jsonargparse

from fulgurite.commands.errors import DONE
from fulgurite.commands.imports import PARSER_MODE
from fulgurite.commands.options import parsed
from fulgurite.commands.tables import console, plain_table

DESCRIPTION = """Write a run, checkpoint or artefact as a model that another library loads. What was written is loaded
by that library in a fresh process and compared with the live model; a difference leaves nothing behind."""
DTYPES = Literal["float16", "bfloat16", "float32"]


def run(command: str, argv: list[str]) -> int:
    """Export, or with ``--dry_run`` compare with the live model and say what would be written; returns the exit code.

    Raises:
        ConfigError: an option is wrong.
        CheckpointError: the source is damaged, cannot be exported, or is another model once it is loaded.
    """
    options, allow = parsed(argv, parser_of, ("--dry_run",))
    return export(options, allow)


def parser_of() -> jsonargparse.ArgumentParser:
    """Options of the command."""
    parser = jsonargparse.ArgumentParser(
        prog="fulgurite export",
        description=DESCRIPTION,
        exit_on_error=False,
        parser_mode=PARSER_MODE,
        allow_abbrev=False,
    )
    parser.add_argument("source", type=str, help="run, checkpoint, artefact, or model in files")
    parser.add_argument("--to", type=Literal["hf", "open_clip", "timm", "peft"], required=True, help="the library")
    parser.add_argument("--out", type=str, required=True, help="folder to make; must not be there yet, or be empty")
    parser.add_argument(
        "--set", type=dict[str, float] | str | None, default=None, help="adapter set, or weights of sets"
    )
    parser.add_argument("--part", type=str | None, default=None, help="part of the backbone, where several fit")
    choices = Literal["fold", "separate"]
    parser.add_argument("--adapters", type=choices, default="fold", help="into the weights, or beside them")
    parser.add_argument("--dtype", type=DTYPES | None, default=None, help="of the weights; default: as they are")
    parser.add_argument("--max_shard_size", type=str, default="50GB", help="of one file of weights, with --to hf")
    parser.add_argument("--like", type=str | None, default=None, help="folder with configuration and tokenizer")
    parser.add_argument("--architecture", type=str | None, default=None, help="the library's name of the model")
    parser.add_argument("--probe", type=str | None, default=None, help="safetensors file of inputs to compare on")
    parser.add_argument("--dry_run", type=bool, default=False, help="compare and say what would be written")
    parser.add_argument("--allow", type=str | None, default=None, help="prefix that class paths may come from")
    return parser


def export(options: Any, allow: tuple[str, ...]) -> int:
    """Do it, and print what lies where."""
    import torch

    from fulgurite.checkpoints.foreign import require_new
    from fulgurite.commands.loading import load
    from fulgurite.commands.runs import checkpoint_at, is_run
    from fulgurite.modules.export_files import num_bytes, prepare, write

    out, path = Path(options.out), Path(options.source)
    require_new(out)
    path = checkpoint_at(options.source, "export") if is_run(path) else path
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    prepared = prepare(
        path,
        options.to,
        lambda folder: load(folder, allow),
        options.set,
        options.part,
        options.adapters,
        dtype,
        None if options.like is None else Path(options.like),
        options.architecture,
        None if options.probe is None else Path(options.probe),
    )
    table = plain_table(f"{path} as a model of {options.to}", "what", "")
    table.add_row("model", type(prepared.model).__name__)
    for name in ("part", "sets", "other_parts"):
        if prepared.facts.get(name):
            table.add_row(name.replace("_", " "), str(prepared.facts[name]))
    table.add_row("adapters folded", f"{len(prepared.facts.get('folded', ()))} sites")
    table.add_row("beside the model", ", ".join([*prepared.rest][:6]) or "nothing")
    table.add_row("size", f"{num_bytes(prepared, dtype) / 1e6:,.1f} MB")
    screen = console()
    if options.dry_run:
        screen.print(table)
        return DONE
    manifest = write(prepared, out, path, dtype, options.max_shard_size)
    screen.print(table)
    worst = max(manifest.facts["errors"].values())
    screen.print(f"{out}: loaded by {options.to} in a fresh process, equal to {worst:.1e}", soft_wrap=True)
    return DONE
