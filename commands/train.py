"""fit, validate, test and predict: Lightning's command line with one parser per command and this project's options.

Order of precedence, lowest first: defaults of the signatures, the config stored in the run of the checkpoint (only
when no ``--config`` is given), ``--config`` files from left to right, the rest of the command line.
"""

from __future__ import annotations

import sys
from typing import Any

import jsonargparse
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from fulgurite import __version__
from fulgurite.commands import yaml_loader
from fulgurite.commands.errors import DONE, INTERRUPTED, TERMINATED, ConfigError
from fulgurite.commands.explain import explain
from fulgurite.commands.invocation import Invocation
from fulgurite.commands.names import import_named

ALLOWED = ("fulgurite", "torch.nn", "torch.optim", "torch.utils.data", "torchmetrics", "lightning.pytorch")

EPILOG = (
    "Class paths may come from "
    + ", ".join(ALLOWED)
    + ". --allow PREFIX (only on the command line, repeatable) adds "
    "a package or module; the working folder is then on the import path."
)

PARSER_MODE = "strict_yaml"

METHOD_ARGUMENTS_SKIPPED = {
    "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
    "validate": {"model", "dataloaders", "datamodule"},
    "test": {"model", "dataloaders", "datamodule"},
    "predict": {"model", "dataloaders", "datamodule", "return_predictions"},
}


def run(command: str, argv: list[str]) -> int:
    """Parse, build and run one of the four Trainer commands; returns the exit code.

    Raises:
        ConfigError: the command line, a config or a constructor's argument is wrong.
    """
    invocation = Invocation.of(command, argv)
    jsonargparse.set_loader(PARSER_MODE, yaml_loader.load_text, (ConfigError,))
    allow_imports(invocation.allow)
    import_named([invocation.words, *invocation.documents])
    try:
        cli = TrainCLI(invocation)
    except SystemExit as ended:  # --help and --print_config
        return int(ended.code or 0)
    return execute(cli)


def allow_imports(extra: tuple[str, ...]) -> None:
    """Let class paths come from ``ALLOWED`` and ``extra`` only; anything else is refused before its import."""
    for prefix in extra:
        if not all(part.isidentifier() for part in prefix.split(".")):
            raise ConfigError(
                f"--allow {prefix[:80]!r}: expected a package or module, such as my_project.models"
            )
    jsonargparse.set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[*ALLOWED, *extra])


def execute(cli: TrainCLI) -> int:
    """Run the Trainer; signals become exit codes."""
    trainer = cli.trainer
    try:
        getattr(trainer, cli.invocation.command)(**cli.method_arguments())
        if trainer.received_sigterm:
            return TERMINATED
    except SIGTERMException:
        return TERMINATED
    except SystemExit as ended:
        if trainer.interrupted and ended.code == 1:
            return INTERRUPTED
        raise
    return DONE


class TrainCLI(LightningCLI):
    """LightningCLI for one command: parses, builds module, data and trainer, and leaves the running to ``execute``."""

    def __init__(self, invocation: Invocation) -> None:
        self.invocation = invocation
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=42,
            auto_configure_optimizers=False,
            run=False,
            parser_kwargs={
                "parser_mode": PARSER_MODE,
                "exit_on_error": False,
                "prog": f"fulgurite {invocation.command}",
                "description": getattr(Trainer, invocation.command).__doc__.strip().splitlines()[0],
                "epilog": EPILOG,
                "dump_header": [f"fulgurite {__version__}"],
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The Trainer method's own arguments (``ckpt_path``, ``weights_only``) and this project's options."""
        skip = METHOD_ARGUMENTS_SKIPPED[self.invocation.command]
        self.method_names = parser.add_method_arguments(Trainer, self.invocation.command, skip=skip)
        parser.add_argument(
            "--experiment", type=str | None, default=None, help="default: name of the first config"
        )
        parser.add_argument("--runs", type=str, default="runs", help="folder of all runs")

    def parse_arguments(self, parser: LightningArgumentParser, args: None) -> None:
        """Parse the invocation's arguments instead of ``sys.argv``, so that ``main(argv)`` works in process."""
        try:
            self.config = parser.parse_args(self.invocation.arguments)
        except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
            raise explain(error, parser, self.invocation) from error

    def instantiate_classes(self) -> None:
        """Build data, module and trainer; what their constructors refuse is bad config."""
        try:
            super().instantiate_classes()
        except (ValueError, LookupError, TypeError, MisconfigurationException) as error:
            raise ConfigError(f"{error}") from error

    def method_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the Trainer method."""
        chosen = {name: self.config_init[name] for name in self.method_names}
        return {**chosen, "model": self.model, "datamodule": self.datamodule}
