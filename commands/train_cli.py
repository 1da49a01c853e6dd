"""The LightningCLI of one command: its options, and the building of data, module and trainer."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import yaml
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from fulgurite import __version__
from fulgurite.callbacks.agreement import RanksAgree
from fulgurite.callbacks.checkpoint_io import DigestCheckpointIO
from fulgurite.callbacks.finite import FiniteCheck
from fulgurite.callbacks.gradients import AccumulatedGradients
from fulgurite.callbacks.init_from import InitialWeights
from fulgurite.callbacks.interruption import Interruption
from fulgurite.callbacks.metrics_csv import MetricsCSV
from fulgurite.callbacks.publish import PublishedCheckpoint
from fulgurite.callbacks.rng import RandomStates
from fulgurite.callbacks.run_folder import RunFolder
from fulgurite.checkpoints import new_run
from fulgurite.commands.building import Building, build
from fulgurite.commands.differences import differences
from fulgurite.commands.errors import ConfigError
from fulgurite.commands.explain import explain
from fulgurite.commands.imports import EPILOG, PARSER_MODE
from fulgurite.commands.invocation import Invocation, values_of
from fulgurite.commands.overrides import dropped, refuse_into_lists
from fulgurite.commands.runs import (
    Plan,
    checkpoint_at,
    evaluation_folder,
    experiment_folder,
    experiment_of,
    names_in,
    remove_unused,
)

FOLDER_VARIABLE = "FULGURITE_FOLDER"  # how the first process tells the processes that it starts
SUMMARIES = {
    "fit": "Train a module; everything that it leaves lies in one run folder.",
    "validate": "Evaluate on the validation questions.",
    "test": "Evaluate on the test questions.",
    "predict": "Answer questions and write predictions.jsonl.",
}
FIT_OPTIONS: tuple[tuple[str, Any, Any, str], ...] = (
    ("test_after_fit", bool, False, "run test with the trained module at the end"),
    ("init_from", str | None, None, "checkpoint or run to take weights from, and nothing else"),
    (
        "resume",
        str | None,
        None,
        "auto (newest run of the experiment, or --run), none, a run or a checkpoint",
    ),
    (
        "resume_from_older",
        bool,
        False,
        "where --resume finds the newest checkpoint damaged: go on from the newest good",
    ),
    ("run", str | None, None, "run folder; default: <runs>/<experiment>/<time>"),
    ("non_finite", Literal["stop", "skip"], "stop", "what a step with NaN or infinite loss or gradients does"),
)
NOT_OPTIONS = {
    "model",
    "datamodule",
    "dataloaders",
    "train_dataloaders",
    "val_dataloaders",
    "return_predictions",
}
# Options of one call rather than of the experiment: the config in the run folder does not repeat them.
OF_ONE_CALL = ("config", "ckpt_path", "weights_only", "verbose", "resume", "resume_from_older", "run")


def refuse_options_of_fit(invocation: Invocation) -> None:
    """Refuse what the other commands would pass over, and evaluate a fresh module instead.

    Only where it is typed, and a ``run`` or ``resume`` of a config, which no run's own config has: what a run was told
    stands in its config, and is no question of an evaluation. Raises ``ConfigError``.
    """
    for name, *_ in FIT_OPTIONS:
        typed = values_of(invocation.typed, f"--{name}")
        written = name in ("run", "resume") and invocation.option(name) not in (None, "none")
        if typed or (written and not invocation.option("ckpt_path")):
            raise ConfigError(
                f"{name}: an option of fit; give {invocation.command} the run or checkpoint as --ckpt_path"
            )


class TrainParser(LightningArgumentParser):
    """A parser that builds everything through ``building``, Lightning's instantiators of module and data included."""

    building: Building

    def add_instantiator(self, instantiator: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """As in the base; ``building`` hears of what fails."""
        super().add_instantiator(self.building.through(instantiator), *args, **kwargs)


class TrainCLI(LightningCLI):
    """Parses one command and builds data, module and trainer; running them is left to the caller.

    Attributes:
        folder: where the command writes.
        before: names of what was there before; None where the folder is the command's own.
    """

    def __init__(self, invocation: Invocation, plan: Plan) -> None:
        self.invocation = invocation
        self.plan = plan
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=None,
            trainer_defaults={"enable_model_summary": False},
            seed_everything_default=42,
            parser_kwargs={
                "prog": f"fulgurite {invocation.command}",
                "description": SUMMARIES[invocation.command],
                "epilog": EPILOG,
                "dump_header": [f"fulgurite {__version__}"],
                "parser_mode": PARSER_MODE,
                "exit_on_error": False,
                "allow_abbrev": False,
            },
            subclass_mode_model=True,
            subclass_mode_data=True,
            run=False,
            auto_configure_optimizers=False,
            parser_class=TrainParser,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Lightning's arguments of the Trainer method, and this project's own."""
        self.method_names = parser.add_method_arguments(Trainer, self.invocation.command, skip=NOT_OPTIONS)
        if "verbose" in self.method_names:
            parser.set_defaults(verbose=False)  # Lightning's own table; `Report` prints this project's
        parser.add_lightning_class_args(PublishedCheckpoint, "checkpoint")
        parser.add_argument("--experiment", type=str | None, help="name; default: that of the first config")
        parser.add_argument("--runs", type=str, default="runs", help="folder of all runs")
        # A run's config holds what fit was told; the other commands accept it, and do not show it in their
        # help.
        hidden = self.invocation.command != "fit"
        for name, kind, default, text in FIT_OPTIONS:
            shown = jsonargparse.SUPPRESS if hidden else text
            parser.add_argument(f"--{name}", type=kind, default=default, help=shown)

    def parse_arguments(self, parser: LightningArgumentParser, args: None) -> None:
        """Parse the invocation's arguments, not ``sys.argv``, so that ``main(argv)`` works in process."""
        refuse_into_lists(self.invocation)
        try:
            self.config = parser.parse_args(self.invocation.arguments)
        except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
            raise explain(error, parser, self.invocation) from error
        self.config.experiment = experiment_of(self.invocation)
        parser.building = Building(self.config, self.invocation)
        for line in dropped(self.invocation, yaml.safe_load(self.written())):
            rank_zero_info(line)
        if self.plan.made_with is not None:
            for line in differences(self.plan.made_with, self.written(), self.invocation):
                rank_zero_info(line)

    def before_instantiate_classes(self) -> None:
        """Whatever is neither module nor data is built through the same `Building`."""
        self.parser.add_instantiator(build, object)

    def instantiate_classes(self) -> None:
        """Build data, module and trainer; what their constructors refuse is bad config."""
        with self.parser.building:
            super().instantiate_classes()

    def method_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the Trainer method."""
        chosen = {name: self.config_init[name] for name in self.method_names}
        if self.plan.checkpoint is not None:
            # Absolute: a folder that is called `last` is a word to Lightning.
            chosen["ckpt_path"] = str(self.plan.checkpoint.absolute())
        if self.invocation.command == "predict":
            chosen["return_predictions"] = False
        return {**chosen, "model": self.model, "datamodule": self.datamodule}

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with this project's loggers, callbacks and checkpoint format, in the run folder."""
        settings = dict(self.config_init.trainer)
        callbacks = self._callbacks(as_list(settings["callbacks"]))
        self.folder, self.before = self._new_folder()
        if settings["logger"] in (None, True):
            settings["logger"] = self._loggers() if self.invocation.command == "fit" else False
        for name, value in self._data_options().items():
            if settings[name] == inspect.signature(Trainer).parameters[name].default:
                settings[name] = value
        settings["default_root_dir"] = str(self.folder)
        settings["plugins"] = as_list(settings["plugins"])
        if not any(isinstance(plugin, CheckpointIO) for plugin in settings["plugins"]):
            settings["plugins"].append(DigestCheckpointIO())
        callbacks.insert(0, RunFolder(self.folder, self.written()))
        if settings["enable_checkpointing"] is not False and not settings["fast_dev_run"]:
            callbacks.append(self.config_init.checkpoint)
        try:
            return self._instantiate_trainer({**settings, **kwargs, "callbacks": callbacks}, [])
        except (ValueError, LookupError, TypeError, MisconfigurationException) as error:
            self.remove_unused_folder()
            raise ConfigError(f"trainer, refused by Trainer: {error}") from error

    def _callbacks(self, users: list[Callback]) -> list[Callback]:
        """The user's callbacks, and this project's of the classes of which the user has given none.

        Raises ``ConfigError`` for two of one of these classes, for a `RunFolder`, and for an ``init_from`` of nothing.
        """
        # Not needed to parse or to show the help.
        from fulgurite.callbacks.adapter_files import AdapterFolders
        from fulgurite.callbacks.boundary import Boundary
        from fulgurite.callbacks.parameter_report import ParameterReport
        from fulgurite.callbacks.report import Report
        from fulgurite.commands.loading import load

        first: list[Callback] = [RandomStates(), AccumulatedGradients(), Interruption()]
        last = [Report(self.config.experiment)] if self.invocation.command != "predict" else []
        if self.invocation.command == "fit":
            last += [RanksAgree(), FiniteCheck(self.config.non_finite), AdapterFolders(), ParameterReport()]
        theirs = {type(own): [c for c in users if isinstance(c, type(own))] for own in (*first, *last)}
        if any(isinstance(c, RunFolder) for c in users):
            raise ConfigError("trainer.callbacks: RunFolder is always there; leave it out, and set --run or --runs")
        twice = next((kind.__name__ for kind, given in theirs.items() if len(given) > 1), None)
        if twice is not None:
            raise ConfigError(f"trainer.callbacks: {twice} is there more than once; give one")
        if theirs.get(FiniteCheck) and self.invocation.source_of("non_finite") == "command line":
            rank_zero_info(f"--non_finite {self.config.non_finite}: not used, trainer.callbacks has a FiniteCheck")
        first, last = ([own for own in some if not theirs[type(own)]] for some in (first, last))
        callbacks = [*first, *users, *last]
        for callback in callbacks:
            if isinstance(callback, RanksAgree):
                callback.config = self.written()
            if isinstance(callback, Boundary):
                callback.builder = functools.partial(load, allow=self.invocation.allow)
        if self.config.init_from is not None and self.plan.checkpoint is None and self.invocation.command == "fit":
            callbacks.append(InitialWeights(checkpoint_at(self.config.init_from, "--init_from")))
        return callbacks

    def _data_options(self) -> dict[str, Any]:
        options = getattr(self.datamodule, "trainer_options", None)
        return {} if options is None else options()

    def written(self) -> str:
        """The complete config as YAML, without what belongs to this call alone."""
        config = self.config.clone()
        for name in OF_ONE_CALL:
            config.pop(name, None)
        return self.parser.dump(config, skip_none=False, skip_link_targets=False, format="yaml")

    def remove_unused_folder(self) -> None:
        """For a command that failed before it began; the process that made the folder removes it."""
        if rank_zero_only.rank == 0:
            remove_unused(self.folder, self.before)

    def _new_folder(self) -> tuple[Path, set[str] | None]:
        """The run, or ``evaluations/<command>-<time>`` of the run that is evaluated, and what is in it so far."""
        if FOLDER_VARIABLE in os.environ and "LOCAL_RANK" in os.environ:
            folder = Path(os.environ[FOLDER_VARIABLE])
            return folder, names_in(folder)
        experiment = experiment_folder(self.invocation)
        if self.invocation.command != "fit":
            return evaluation_folder(self.plan.run or experiment, self.invocation.command), None
        if self.plan.run is not None:
            return self.plan.run, names_in(self.plan.run)
        if self.invocation.option("resume") == "auto":
            rank_zero_info("--resume auto: nothing to continue, a new run starts")
        if rank_zero_only.rank != 0 or self.config_init.trainer.fast_dev_run:
            return experiment, names_in(experiment)  # replaced by the folder of rank 0, or never written to
        return new_run(experiment.parent, experiment.name), None

    def _loggers(self) -> list[Logger]:
        from fulgurite.callbacks.events import Events

        return [Events(self.folder, name="", version=""), MetricsCSV(self.folder)]


def as_list(value: Any) -> list:
    """None as no element, one value as one element."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
