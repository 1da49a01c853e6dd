"""``merge``: make one model of several that lie in files, without data, model class or trainer."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jsonargparse

from fulgurite.commands import merge_adapters, mergekit
from fulgurite.commands.errors import DONE, ConfigError
from fulgurite.commands.explain import explain
from fulgurite.commands.imports import PARSER_MODE, imports_allowed
from fulgurite.commands.invocation import Invocation, values_of
from fulgurite.commands.merge_output import show_merge, show_plan
from fulgurite.commands.names import class_table, import_named
from fulgurite.commands.options import with_flags
from fulgurite.commands.progress import progress
from fulgurite.commands.tables import console

if TYPE_CHECKING:
    from fulgurite.checkpoints import Manifest
    from fulgurite.methods.merging.job import Job
    from fulgurite.methods.merging.writing import Describe

DESCRIPTION = """Merge models of one architecture that lie in files: checkpoints and artefacts of fulgurite, Hugging
Face, open_clip and timm folders, single safetensors files, or adapters in folders of peft. The result is a checkpoint
folder, and a folder of that library too."""
MERGERS = "fulgurite.methods.merging."
FLAGS = ("--dry_run", "--report")


def run(command: str, argv: list[str]) -> int:
    """Merge, or with ``--dry_run`` say what a merge would do; returns the exit code.

    Raises:
        ConfigError, ValueError: an option is wrong, or the models do not fit together.
        CheckpointError: a source is damaged or missing, or the result cannot be written.
    """
    argv = with_flags(argv, FLAGS)
    invocation = Invocation.of("merge", argv)
    with imports_allowed(invocation.allow):
        import_named(invocation.typed, invocation.documents)
        parser = parser_of()
        try:
            options = parser.parse_args(argv)
        except (jsonargparse.ArgumentError, TypeError, ValueError, LookupError) as error:
            unknown = unknown_merger(argv)
            raise (ConfigError(unknown) if unknown else explain(error, parser, invocation)) from error
        require_task(options)
        try:
            merger = None if options.merger is None else parser.instantiate_classes(options).merger
        except (TypeError, ValueError) as error:
            raise ConfigError(f"merger: {cause_of(error)}") from error
    sources = None if options.sources is None else expanded(one_or_more(options.sources))
    take_statistics(merger, options.statistics, sources or [])
    if sources is not None and merge_adapters.require_adapters(sources, merger):
        return merge_adapters.run(sources, merger, options, settings_of(options))
    job = prepared(sources, merger, options)
    return preview(job) if options.dry_run else merge(job, options.report)


def parser_of() -> jsonargparse.ArgumentParser:
    """Options of the command."""
    from fulgurite.methods.merging.base import Merger
    from fulgurite.methods.merging.knots import MergeKnOTS
    from fulgurite.methods.merging.lora import MergeLoRA

    parser = jsonargparse.ArgumentParser(
        prog="fulgurite merge",
        description=DESCRIPTION,
        exit_on_error=False,
        parser_mode=PARSER_MODE,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with these options")
    parser.add_argument(
        "--sources",
        type=list[str] | str | None,
        default=None,
        help="models to merge, in order, or one glob; globs are expanded",
    )
    parser.add_argument("--mergekit", type=str | None, default=None, help="configuration of mergekit to run instead")
    parser.add_argument("--out", type=str, required=True, help="folder to make; must not be there yet, or be empty")
    parser.add_argument("--base", type=str | None, default=None, help="model that the sources were fine-tuned from")
    parser.add_subclass_arguments((Merger, MergeLoRA, MergeKnOTS), "merger", required=False, help="how to merge")
    parser.add_argument("--weights", type=list[float] | None, default=None, help="one per source; default: 1 for each")
    parser.add_argument(
        "--statistics",
        type=list[str] | None,
        default=None,
        help="of the sources, for RegMean and Fisher; in their order",
    )
    kinds = Literal["float16", "bfloat16", "float32", "float64"]
    parser.add_argument("--dtype", type=kinds | None, default=None, help="of the result; default: the base's")
    parser.add_argument("--rows", type=Literal["error", "common"], default="error", help="other vocabulary sizes")
    parser.add_argument("--strict", type=bool, default=True, help="every tensor must be in every source")
    parser.add_argument("--donor", type=int | None, default=None, help="source of integer entries that differ")
    parser.add_argument("--like", type=str | None, default=None, help="folder with configuration and tokenizer")
    parser.add_argument("--max_shard_size", type=str, default="50GB", help="of one file of weights of such a folder")
    parser.add_argument(
        "--threads",
        type=int | None,
        default=None,
        help="tensors at a time; default: one per core, or 1 where a merger takes them whole",
    )
    parser.add_argument(
        "--report", type=bool, default=False, help="add report.html: how alike the sources' changes are"
    )
    parser.add_argument("--dry_run", type=bool, default=False, help="print plan, memory and disk; write nothing")
    parser.add_argument("--allow", type=str | None, default=None, help="prefix that class paths may come from")
    return parser


def cause_of(error: BaseException) -> BaseException:
    """The error of the class itself, which the parser wraps in what it tried beside it."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__
    return error


def unknown_merger(argv: Sequence[str]) -> str | None:
    """What to say where ``--merger`` names no class of the package."""
    mergers = sorted(name for name, where in class_table().items() if where[0].startswith(MERGERS))
    for value in values_of(argv, "--merger"):
        if value.isidentifier() and value not in mergers:
            near = difflib.get_close_matches(value, mergers, n=3, cutoff=0.5) or mergers
            return f"merger: no class {value[:80]!r}; did you mean {', '.join(near)}?"
    return None


def require_task(options: Any) -> None:
    """Refuse options without which there is nothing to do, or that say it twice."""
    if options.mergekit is None:
        missing = [name for name in ("sources", "merger") if getattr(options, name, None) is None]
        if missing:
            raise ConfigError(f"merge needs {' and '.join(missing)}, or the configuration of --mergekit")
    elif twice := mergekit.conflicts(options):
        raise ConfigError(f"{', '.join(twice)}: the configuration of --mergekit says that; leave it out")


def one_or_more(value: str | list[str]) -> list[str]:
    """What was given, as a list."""
    return [value] if isinstance(value, str) else value


def expanded(patterns: Sequence[str]) -> list[Path]:
    """Paths in order, each glob in the order of its names, and of runs their newest checkpoints.

    Raises:
        ConfigError: a glob that matches nothing.
        CheckpointError: a run without a checkpoint.
    """
    from fulgurite.commands.runs import checkpoint_at, is_run

    paths: list[Path] = []
    for pattern in patterns:
        found = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
        if not found:
            raise ConfigError(f"sources: {pattern} matches nothing")
        paths += [checkpoint_at(path, "sources") if is_run(Path(path)) else Path(path) for path in found]
    return paths


def take_statistics(merger: Any, statistics: list[str] | None, sources: Sequence[Path]) -> None:
    """Give a data-driven merger the stored statistics of the sources.

    Raises:
        ConfigError: it needs some and there are none, or the other way round.
    """
    from fulgurite.checkpoints import MANIFEST_NAME, read_manifest
    from fulgurite.checkpoints.atomic import resolve
    from fulgurite.methods.merging.data_driven import DataDrivenMerger
    from fulgurite.methods.merging.statistic_files import use_statistics

    if isinstance(merger, DataDrivenMerger):
        if statistics is None:
            how = f"make them by fulgurite statistics --kind {merger.kind}"
            raise ConfigError(f"{type(merger).__name__} needs --statistics, one per source: {how}")
        ours = [(resolve(path) / MANIFEST_NAME).is_file() for path in sources]
        digests = [read_manifest(path).digest if own else "none" for path, own in zip(sources, ours)]
        use_statistics(merger, [Path(path) for path in statistics], digests)
    elif statistics is not None:
        name = "the configuration of --mergekit" if merger is None else type(merger).__name__
        raise ConfigError(f"statistics: {name} takes none; leave it out")


def settings_of(options: Any) -> dict[str, Any]:
    """The merger as a manifest records it."""
    own = options.merger
    return {"merge": {"class_path": own.class_path, "init_args": dict(own.get("init_args") or {})}}


def prepared(sources: Sequence[Path] | None, merger: Any, options: Any) -> Job:
    """What the options ask for, found possible."""
    import torch

    from fulgurite.checkpoints.companions import parsed_size
    from fulgurite.methods.merging.files import prepare
    from fulgurite.methods.merging.plan import Matching

    shard_bytes = parsed_size(options.max_shard_size)
    if sources is None:
        job, remarks = mergekit.prepared(Path(options.mergekit), Path(options.out), options.threads, shard_bytes)
        console().print(*remarks, sep="\n", end="\n" if remarks else "")
        return job
    return prepare(
        sources,
        options.out,
        merger,
        options.base,
        options.weights,
        None if options.dtype is None else getattr(torch, options.dtype),
        Matching(options.strict, options.rows, options.donor),
        options.threads,
        settings_of(options),
        options.like,
        shard_bytes,
    )


def merge(job: Job, report: bool = False) -> int:
    """Do it, with a ``report.html`` where wanted, and print what changed most."""
    from fulgurite.methods.merging.writing import carry_out

    with progress(sum(job.plan.sizes.values()), sum(source.num_bytes for source in job.sources)) as seen:
        done = carry_out(job, seen=seen, describe=report_of(job) if report else None)
    start = "base" if job.plan.has_base else "first source"
    show_merge(done.change, start, f"{len(job.sources) - job.plan.has_base} models", done.path)
    return DONE


def report_of(job: Job) -> Describe:
    """Makes ``report.html`` of the weights in a folder.

    Raises:
        ConfigError: there is no tensor that all sources have a part in.
    """
    from fulgurite.checkpoints.lineage import lineage_of
    from fulgurite.checkpoints.tensorfile import map_file
    from fulgurite.methods.merging.diagnostics import comparable, diagnose_plan
    from fulgurite.reports.merging import REPORT_NAME, merge_page

    if not comparable(job.plan):
        raise ConfigError("report: no tensor is merged from all sources, so there is nothing to compare; leave it out")
    names = [str(source.path) for source in job.sources[job.plan.has_base :]]

    def describe(folder: Path, manifest: Manifest) -> dict[str, bytes]:
        merged = {name: tensor for file in job.layout.weights for name, tensor in map_file(folder / file).items()}
        found = diagnose_plan(job.plan, merged)
        page = merge_page(found, names, job.plan.has_base, lineage_of(manifest, job.out))
        return {REPORT_NAME: page.encode()}

    return describe


def preview(job: Job) -> int:
    """Print what a merge would read, hold and write."""
    plan, files = job.plan, {**job.layout.weights, **job.layout.texts}
    show_plan(
        job.manifest.settings["merger"],
        job.out,
        [(str(source.path), len(source.tensors), source.num_bytes) for source in job.sources],
        f"{len(plan.merged):,} tensors are merged, {len(plan.copied):,} copied, {len(plan.tied):,} tied",
        job.held_bytes,
        job.num_bytes,
        ", ".join(files),
    )
    return DONE
