"""The LightningCLI of one command: its options, and the building of data, module and trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import jsonargparse
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from fulgurite import __version__
from fulgurite.commands.differences import differences
from fulgurite.commands.errors import ConfigError, shorten
from fulgurite.commands.explain import explain
from fulgurite.commands.invocation import Invocation
from fulgurite.commands.runs import Plan, experiment_of

ALLOWED = ("fulgurite", "torch.nn", "torch.optim", "torch.utils.data", "torchmetrics", "lightning.pytorch")
PARSER_MODE = "strict_yaml"
EPILOG = f"""\
Class paths may come from {", ".join(ALLOWED)}. --allow PREFIX (on the command line only, repeatable) adds a package
or module, and the working folder to the import path. Classes of fulgurite have short names: the class name alone."""

SUMMARIES = {
    "fit": "Train a module; everything that it leaves lies in one run folder.",
    "validate": "Evaluate on the validation questions.",
    "test": "Evaluate on the test questions.",
    "predict": "Answer questions and write predictions.jsonl.",
}
_NOT_OPTIONS = {
    "model",
    "datamodule",
    "dataloaders",
    "train_dataloaders",
    "val_dataloaders",
    "return_predictions",
}
# Options of one call rather than of the experiment: a stored config never repeats them.
_OF_THIS_CALL = ("config", "ckpt_path", "resume", "run")


class TrainCLI(LightningCLI):
    """Parses one command and builds data, module and trainer; running them is left to the caller."""

    def __init__(self, invocation: Invocation, plan: Plan, folder: Path) -> None:
        self.invocation = invocation
        self.plan = plan
        self.folder = folder
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
            },
            subclass_mode_model=True,
            subclass_mode_data=True,
            run=False,
            auto_configure_optimizers=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Lightning's arguments of the Trainer method, and this project's own."""
        self.method_names = parser.add_method_arguments(Trainer, self.invocation.command, skip=_NOT_OPTIONS)
        evaluates = self.invocation.command != "fit"
        parser.add_argument(
            "--experiment", type=str | None, help="name of the experiment; default: of the config"
        )
        parser.add_argument("--runs", type=str, default="runs", help="folder of all runs")
        # A run's config holds what fit was told; the other commands accept it there, and leave it out of their help.
        for name, kind, default, text in FIT_OPTIONS:
            parser.add_argument(
                f"--{name}", type=kind, default=default, help=jsonargparse.SUPPRESS if evaluates else text
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: None) -> None:
        """Parse the invocation's arguments instead of ``sys.argv``, so that ``main(argv)`` works in process."""
        try:
            self.config = parser.parse_args(self.invocation.arguments)
        except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
            raise explain(error, parser, self.invocation) from error
        self.config.experiment = experiment_of(self.invocation)
        if self.plan.run is not None and self.plan.checkpoint is not None:
            for line in differences(self.plan.run / "config.yaml", self._written(), self.invocation):
                rank_zero_info(line)

    def instantiate_classes(self) -> None:
        """Build data, module and trainer; what their constructors refuse is bad config."""
        try:
            super().instantiate_classes()
        except (ValueError, LookupError, TypeError, MisconfigurationException) as error:
            raise ConfigError(shorten(f"{error}")) from error

    def method_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the Trainer method."""
        chosen = {name: self.config_init[name] for name in self.method_names}
        if self.plan.checkpoint is not None:
            chosen["ckpt_path"] = str(self.plan.checkpoint)
        if self.invocation.command == "predict":
            chosen["return_predictions"] = False
        return {**chosen, "model": self.model, "datamodule": self.datamodule}

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with this project's loggers and callbacks, and the run folder as its root."""
        from fulgurite.callbacks.metrics_csv import MetricsCSV
        from fulgurite.callbacks.run_folder import RunFolder

        settings = self.config_init.trainer
        if settings.logger in (None, True):
            kwargs["logger"] = self.invocation.command == "fit" and [
                self._tensorboard(),
                MetricsCSV(self.folder),
            ]
        kwargs["default_root_dir"] = str(self.folder)
        ours = [RunFolder(self.folder, self._written())]
        return super().instantiate_trainer(**kwargs, callbacks=[*ours, *_as_list(settings.callbacks)])

    def _tensorboard(self) -> object:
        from lightning.pytorch.loggers import TensorBoardLogger

        return TensorBoardLogger(self.folder, name="", version="")

    def _written(self) -> str:
        """The complete config as YAML, without what belongs to this call alone."""
        config = self.config.clone()
        for name in _OF_THIS_CALL:
            config.pop(name, None)
        return self.parser.dump(config, skip_none=False, skip_link_targets=False, format="yaml")


FIT_OPTIONS: list[tuple[str, Any, Any, str]] = [
    ("test_after_fit", bool, False, "run test with the trained module at the end"),
    ("init_from", str | None, None, "checkpoint or run to take weights from, and nothing else"),
    (
        "resume",
        str | None,
        None,
        "auto: continue the newest run of the experiment, or --run; or a run or checkpoint",
    ),
    ("run", str | None, None, "run folder; default: <runs>/<experiment>/<time>"),
]


def _as_list(value: Any) -> list:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
