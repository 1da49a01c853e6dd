"""What ``prune`` and ``quantize`` share: their options, and which of two kinds of models they are given.

A model of another library lies in files and is calibrated with text (`compress_model`). A checkpoint of a run is
calibrated with its run's own training data, and becomes what the step of the same name makes of it within a fit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonargparse

from fulgurite.commands.building import Building, build
from fulgurite.commands.errors import DONE, ConfigError
from fulgurite.commands.explain import explain
from fulgurite.commands.imports import PARSER_MODE, imports_allowed
from fulgurite.commands.invocation import Invocation
from fulgurite.commands.names import import_named
from fulgurite.commands.options import with_flags

if TYPE_CHECKING:
    from fulgurite.callbacks.compress_data import CalibrationSamples
    from fulgurite.callbacks.compress_step import CompressAtCheckpoint
    from fulgurite.callbacks.steps import Context

Allow = tuple[str, ...]
FLAGS = ("--dry_run", "--report")
SAMPLES = 128
DATA = ("text", "pictures", "pairs")
OF_WINDOWS = ("length", "evaluate", "evaluate_samples")
OF_ROTATION = ("rotation", "rolled_copies")
OF_FILES = (*DATA, "batch_size", *OF_WINDOWS, "format", "like", "max_shard_size", "report", *OF_ROTATION)
DEFAULT_LENGTH, DEFAULT_SHARDS, DEFAULT_FORMAT = 2048, "50GB", "compressed-tensors"
# Of options that are not None where they are not given.
DEFAULTS = {
    "samples": SAMPLES,
    "seed": 0,
    "length": DEFAULT_LENGTH,
    "max_shard_size": DEFAULT_SHARDS,
    "format": DEFAULT_FORMAT,
    "report": False,
    "rolled_copies": 1,
}
ACTS_ON = {"evaluate_samples": ("evaluate",), "length": ("text", "evaluate"), "rolled_copies": ("text",)}
OF_MEASURING = ("samples", "seed", "batch_size", "record")


def run(
    verb: str,
    argv: list[str],
    add_method: Callable[[jsonargparse.ArgumentParser], None],
    step_of: Callable[[Any, bool], CompressAtCheckpoint],
) -> int:
    """Compress, or with ``--dry_run`` say what would be done; returns the exit code.

    Args:
        verb: ``prune`` or ``quantize``.
        argv: what follows it.
        add_method: adds the verb's own options to a parser.
        step_of: the step that a fit would take, of the options and of whether text is given; raises `ConfigError`.

    Raises:
        ConfigError, ValueError: an option is wrong, or does not fit the model.
        CheckpointError, DataError: a file is damaged or missing, or the result cannot be written.
    """
    invocation = Invocation.of(verb, with_flags(argv, FLAGS))
    with imports_allowed(invocation.allow):
        import_named(invocation.typed, invocation.documents)
        parser = common_parser(verb)
        add_method(parser)
        try:
            options = parser.parse_args(list(invocation.arguments))
        except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
            raise explain(error, parser, invocation) from error
        with Building(options, invocation) as building:
            built = parser.instantiate(options, instantiators=[(building.through(build), object, True)])
    return compress(verb, step_of, built, invocation.allow)


def common_parser(verb: str) -> jsonargparse.ArgumentParser:
    """Options of both commands."""
    parser = jsonargparse.ArgumentParser(
        prog=f"fulgurite {verb}",
        description=f"{verb.capitalize()} the linear layers in the blocks of a model, block by block. The result is a "
        "checkpoint folder and a folder of the model's library too, loaded in a fresh process and compared with the "
        "live model before it is there. A call that was cut short goes on after the last whole block.",
        exit_on_error=False,
        parser_mode=PARSER_MODE,
        allow_abbrev=False,
    )
    parser.add_argument("model", type=str, help="model folder of another library, or run, checkpoint or artefact")
    parser.add_argument("--config", action="config", help="YAML file with these options")
    parser.add_argument("--out", type=str, required=True, help="folder to make; must not be there yet, or be empty")
    parser.add_argument("--layers", type=str | None, default=None, help="full pattern of their names; default: all")
    parser.add_argument("--towers", type=list[str] | None, default=None, help="whose blocks; default: all")
    parser.add_argument(
        "--samples", type=int, default=SAMPLES, help="windows, pictures, pairs, or training samples of a run"
    )
    parser.add_argument("--seed", type=int, default=0, help="of their choice")
    texts = list[str] | str | None
    parser.add_argument("--text", type=texts, default=None, help="files to calibrate with: text, or jsonl with 'text'")
    parser.add_argument("--pictures", type=str | None, default=None, help="folder to calibrate an image model with")
    parser.add_argument(
        "--pairs",
        type=str | None,
        default=None,
        help='jsonl with {"image": "a.jpg", "text": "a dog"} to calibrate both towers of CLIP and its kin with; '
        "tokenizers of open_clip cut captions that are longer than the context, others are refused",
    )
    parser.add_argument(
        "--batch_size",
        type=int | None,
        default=None,
        help="windows, pictures or pairs that run together, and share a loss; default: windows of 2048 tokens, or 16",
    )
    parser.add_argument("--length", type=int, default=DEFAULT_LENGTH, help="tokens of a window of text")
    parser.add_argument("--evaluate", type=texts, default=None, help="files to measure perplexity on, before and after")
    parser.add_argument("--evaluate_samples", type=int | None, default=None, help="first windows of it; default: all")
    parser.add_argument("--like", type=str | None, default=None, help="folder with the configuration of a bare file")
    parser.add_argument("--max_shard_size", type=str, default=DEFAULT_SHARDS, help="of one file of weights")
    parser.add_argument("--record", type=str | None, default=None, help="config of a run with its data; default: own")
    parser.add_argument("--device", type=str, default="auto", help="as cuda:1; auto takes a GPU if any")
    parser.add_argument("--report", type=bool, default=False, help="add layers.csv and report.html, on every layer")
    parser.add_argument("--dry_run", type=bool, default=False, help="say what would be done; write nothing")
    parser.add_argument("--allow", type=str | None, default=None, help="prefix that class paths may come from")
    return parser


def compress(verb: str, step_of: Callable[[Any, bool], CompressAtCheckpoint], options: Any, allow: Allow) -> int:
    """Do it with whatever the model is."""
    from fulgurite.checkpoints import MANIFEST_NAME, read_manifest
    from fulgurite.checkpoints.atomic import resolve
    from fulgurite.checkpoints.foreign import require_new, require_space
    from fulgurite.commands.runs import checkpoint_at, is_run

    out, path = Path(options.out), Path(options.model)
    for name in ("samples", "batch_size", "evaluate_samples"):
        if options[name] is not None and options[name] < 1:
            raise ConfigError(f"--{name} {options[name]}: must be at least 1")
    require_new(out)
    if is_run(path):
        path = checkpoint_at(options.model, verb)
    if (resolve(path) / MANIFEST_NAME).is_file() and read_manifest(path).settings.get("model"):
        refuse_options_of_files(path, options)
        step = step_of(options, True)
        refuse_idle_options(step, options)
        return compress_checkpoint(verb, path, step, options, allow)
    from fulgurite.backbones.library_models import open_library_model
    from fulgurite.checkpoints.sources import open_source
    from fulgurite.commands import compress_model
    from fulgurite.methods.packed_attention import exposed_attention

    if options.record is not None:
        raise ConfigError(f"--record {options.record}: {path} is no checkpoint of a run; give --text")
    step = step_of(options, bool(data_given(options)))
    refuse_idle_options(step, options)
    source = open_source(path)
    opened = open_library_model(source, None if options.like is None else Path(options.like))
    with exposed_attention(opened.model, opened.spec.inside_blocks):
        job = compress_model.prepared(source, opened, step, verb, options)
        require_space(out, job.rough_size)
        if options.dry_run:
            return compress_model.preview(job, out)
        return compress_model.carry_out(job, out, options.report, options.max_shard_size)


def data_given(options: Any) -> str | None:
    """The option that names data to calibrate with, if any. Raises ConfigError for more than one."""
    given = [name for name in DATA if options[name] is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(f'--{name}' for name in given)}: a model is calibrated with one of them")
    return given[0] if given else None


def calibration_of(options: Any, with_data: bool, measured: bool, optional: bool = False) -> CalibrationSamples | None:
    """What a step measures on; nothing where nothing is measured.

    Args:
        options: of the command.
        with_data: whether there are data: text, or the run's own.
        measured: whether the method needs some.
        optional: whether it uses some where there are any.

    Raises:
        ConfigError: text is missing, or of no use.
    """
    from fulgurite.callbacks.compress_data import CalibrationSamples

    if measured and not with_data:
        raise ConfigError(
            "this method measures a model on data: give --text FILE, --pictures FOLDER or --pairs FILE, what it reads"
        )
    if (given := data_given(options)) and not (measured or optional):
        raise ConfigError(f"this method needs no data: leave out --{given}")
    return CalibrationSamples(options.samples, options.seed) if with_data and (measured or optional) else None


def compress_checkpoint(verb: str, path: Path, step: CompressAtCheckpoint, options: Any, allow: Allow) -> int:
    """Compress a checkpoint of ours by the step that a fit would take."""
    from fulgurite.callbacks.compress_step import require_compressible
    from fulgurite.callbacks.steps import Context
    from fulgurite.commands.features import device_named
    from fulgurite.commands.loading import load
    from fulgurite.commands.statistics import data_of

    out = Path(options.out)
    module = load(path, allow)
    require_compressible(module, str(path))
    data = None if step.calibration is None else data_of(path, options.record, allow, module)
    context = Context(out, builder=lambda _: module, data=data, device=device_named(options.device))
    if options.dry_run:
        require_possible(module, step, path, context)
        given = "no data" if data is None else f"{options.samples} samples of {type(data).__name__}"
        print(f"{out}: {verb} {path} by {type(step.compressor).__name__}, with {given}")
        return DONE
    step([path], context)
    return show_checkpoint(verb, out)


def refuse_options_of_files(path: Path, options: Any) -> None:
    """Raise ConfigError where an option speaks of another library's model."""
    if given := given_of(OF_FILES, options):
        raise ConfigError(
            f"{', '.join(given)}: {path} is a checkpoint of a run, calibrated with "
            "its run's own data and evaluated by `fulgurite test --ckpt_path`; leave it out"
        )


def refuse_idle_options(step: CompressAtCheckpoint, options: Any) -> None:
    """Raise ConfigError where an option would change nothing, for lack of what it acts on."""
    for name, others in ACTS_ON.items():
        if given_of([name], options) and all(options[other] is None for other in others):
            wanted = " or ".join(f"--{other}" for other in others)
            raise ConfigError(f"--{name} {options[name]}: there is no {wanted} that it acts on; leave it out")
    if step.calibration is None and (given := given_of(OF_MEASURING, options)):
        raise ConfigError(f"{', '.join(given)}: this method measures nothing on data; leave it out")


def given_of(names: Iterable[str], options: Any) -> list[str]:
    """Those of the options that are not as they are by default, as they are typed."""
    return [f"--{name}" for name in names if options.get(name, DEFAULTS.get(name)) != DEFAULTS.get(name)]


def require_possible(module: Any, step: CompressAtCheckpoint, path: Path, context: Context) -> None:
    """Refuse what the step would refuse before it measures anything: layers, towers, samples."""
    from fulgurite.callbacks.compress_data import walk_over
    from fulgurite.callbacks.compressed_state import tensor_names
    from fulgurite.methods.compression import matrices
    from fulgurite.methods.packed_attention import exposed_attention

    if step.calibration is not None:
        context.calibration(step.calibration.samples, step.calibration.seed)
    with exposed_attention(module.get_submodule(module.compressible_part), module.blocks_spec().inside_blocks):
        weights = matrices(walk_over(module, [], context, step.towers), step.layers)
        step.prepare(copy.copy(step.compressor), tensor_names(module, weights), path)


def show_checkpoint(verb: str, out: Path) -> int:
    """Print what has become of the layers of a checkpoint."""
    from fulgurite.callbacks.compress_step import LAYERS
    from fulgurite.checkpoints import read_manifest
    from fulgurite.commands.compress_output import show_layers
    from fulgurite.methods.compression import LayerReport

    show_layers([LayerReport.from_data(each) for each in read_manifest(out).facts[LAYERS]])
    print(f"{verb}d: {out}")
    return DONE
