"""``statistics``: measure what data-driven mergers weigh a model by, on training samples of its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import jsonargparse

from fulgurite.commands.errors import DONE, ConfigError
from fulgurite.commands.imports import PARSER_MODE, imports_allowed
from fulgurite.commands.invocation import Invocation
from fulgurite.commands.options import parsed

DESCRIPTION = """Measure the inputs of linear layers (gram, for RegMean) or the Fisher information (fisher, for Fisher)
of a trained module on training samples, and write them for fulgurite merge --statistics. A call that was cut short
goes on where it stopped."""


def run(command: str, argv: list[str]) -> int:
    """Measure; returns the exit code.

    Raises:
        ConfigError: an option is wrong, or there are no such samples.
        CheckpointError: the source is damaged, or the result cannot be written.
    """
    options, allow = parsed(argv, parser_of)
    return measure(options, allow)


def parser_of() -> jsonargparse.ArgumentParser:
    """Options of the command."""
    parser = jsonargparse.ArgumentParser(
        prog="fulgurite statistics",
        description=DESCRIPTION,
        exit_on_error=False,
        parser_mode=PARSER_MODE,
        allow_abbrev=False,
    )
    parser.add_argument("source", type=str, help="run, checkpoint or artefact")
    parser.add_argument("--kind", type=Literal["gram", "fisher"], required=True, help="what is measured")
    parser.add_argument("--out", type=str, required=True, help="folder to make; must not be there yet, or be empty")
    parser.add_argument("--samples", type=int, default=256, help="training samples")
    parser.add_argument("--seed", type=int, default=0, help="of their choice, and of drawn labels")
    parser.add_argument(
        "--max_exact", type=int, default=64, help="most answers of an exact Fisher; else labels are drawn"
    )
    parser.add_argument("--draws", type=int, default=1, help="labels per sample where they are drawn")
    parser.add_argument("--set", type=str | None, default=None, help="adapter set; default: the live one")
    parser.add_argument(
        "--domains", type=list[str] | None, default=None, help="of the samples; default: those of the source's stage"
    )
    parser.add_argument("--config", type=str | None, default=None, help="record with the data; default: the run's own")
    parser.add_argument("--device", type=str, default="auto", help="as cuda:1; auto takes a GPU if any")
    parser.add_argument("--allow", type=str | None, default=None, help="prefix that class paths may come from")
    return parser


def measure(options: Any, allow: tuple[str, ...]) -> int:
    """Do it, and say what lies where."""
    from fulgurite.callbacks import merge_statistics as boundary
    from fulgurite.callbacks.merge_step import holds_sets
    from fulgurite.callbacks.steps import Context
    from fulgurite.checkpoints import read_manifest
    from fulgurite.checkpoints.foreign import require_new
    from fulgurite.commands.features import device_named
    from fulgurite.commands.loading import load
    from fulgurite.commands.runs import checkpoint_at
    from fulgurite.methods.adapters.bank import LIVE

    out = Path(options.out)
    require_new(out)
    path = checkpoint_at(options.source, "statistics")
    calibration = boundary.Calibration(options.samples, options.seed, options.max_exact, options.draws)
    manifest = read_manifest(path)
    adapters = (options.set or LIVE) if holds_sets(manifest) else None
    if options.set is not None and adapters is None:
        raise ConfigError(f"--set {options.set}: {path} holds a whole model and no adapter sets; leave it out")
    context = Context(out, builder=lambda folder: load(folder, allow), device=device_named(options.device))
    builder = boundary.OneModule(context)
    module = builder.of(path)
    if adapters is not None and adapters not in module.bank.names:
        raise ConfigError(f"--set {adapters}: {path} has the adapter sets {module.bank.names}")
    domains = options.domains or boundary.own_domains(path, adapters)
    context = Context(out, data=data_of(path, options.config, allow, module))
    expert = boundary.Expert(out.name, path, adapters, None if domains is None else tuple(domains))
    found = boundary.measure(options.kind, expert, calibration, context, out, builder)
    print(f"{out}: {options.kind} of {path} on {found['samples']} samples of {', '.join(found['domains'])}")
    return DONE


def data_of(path: Path, config: str | None, allow: tuple[str, ...], module: Any) -> Any:
    """The DataModule that a checkpoint's run was trained on, or that of ``config``, with the module's collator."""
    from fulgurite.commands.names import import_named
    from fulgurite.commands.record import RecordCLI
    from fulgurite.commands.runs import run_of
    from fulgurite.datamodules.base import FulguriteDataModule

    run = run_of(path)
    if config is None and run is None:
        raise ConfigError(f"{path} lies in no run that says what its data are: name a record by --config")
    record = str(run / "config.yaml") if config is None else config
    words = [word for name in allow for word in ("--allow", name)]
    invocation = Invocation.of("fit", ["--config", record, *words])
    with imports_allowed(allow):
        import_named(invocation.typed, invocation.documents)
        data = RecordCLI(invocation).datamodule
    if not isinstance(data, FulguriteDataModule):
        raise ConfigError(f"{record}: {type(data).__name__} gives no samples to measure on")
    data.prepare_data()
    ask = getattr(module, "feature_extractor", None)
    data.attach(module.collator("validate"), None if ask is None else ask())
    data.setup("fit")
    return data
