"""Every option of this project in one text: ``python tests/commands/option_surface.py`` writes ``options.txt``.

The commands' own options with their defaults, and every class that a config can name with its parameters, their types
as written in the source, and their defaults.
"""

import contextlib
import importlib
import inspect
import io
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Literal, get_origin

import jsonargparse
import yaml
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy

from fulgurite.callbacks.publish import PublishedCheckpoint
from fulgurite.cli import main
from fulgurite.commands.differences import leaves
from fulgurite.commands.names import class_table

FILE = Path(__file__).with_name("options.txt")
COMMANDS = ("fit", "validate", "test", "predict")
# What Lightning's own options take; their arguments say which other classes a config can name.
ROOTS = (LightningModule, LightningDataModule, Callback, Logger, Strategy, CheckpointIO)
# Lightning's Trainer is not ours; the defaults that we give it are.
CHANGED = ("trainer.enable_model_summary", "seed_everything")


def surface() -> str:
    """The whole text."""
    own = f"(trainer, model, data, and checkpoint: {path(PublishedCheckpoint)})"
    parts = [f"{command}  {own}\n{''.join(lines(command_options(command)))}" for command in COMMANDS]
    parts += [f"{path(each)}\n{''.join(lines(class_options(each)))}" for each in nameable()]
    return "\n".join(parts)


def lines(options: Iterator[str]) -> Iterator[str]:
    return (f"  {option}\n" for option in options)


def command_options(command: str) -> Iterator[str]:
    """Name, type and default of all but the options of trainer, model and data."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "c.yaml")
        config.write_text("model: {class_path: toy_project.Net}\ndata: {class_path: toy_project.Data}\n")
        complete = printed(command, "--config", str(config), "--allow", "toy_project", "--print_config")
    text = " ".join(printed(command, "--help").split())
    for group, value in yaml.safe_load(complete).items():
        for key, default in leaves(value, group):
            kind = re.search(rf" --{key} .*?\(type: (.*?), default: ", text)
            if key in CHANGED or key.partition(".")[0] not in ("trainer", "model", "data", "checkpoint"):
                yield f"{key}: {kind[1]} = {default!r}" if kind else f"{key} = {default!r}"


def printed(*argv: str) -> str:
    """What a command prints."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert main(list(argv)) == 0
    return text.getvalue()


def nameable() -> list[type]:
    """The package's concrete classes below `ROOTS`, and those of the types that their arguments have."""
    table = {name: module for name, modules in class_table().items() for module in modules}
    classes = {name: getattr(importlib.import_module(module), name) for name, module in table.items()}
    types, found = set(ROOTS), {}
    while True:
        new = {n: c for n, c in classes.items() if n not in found and issubclass(c, tuple(types))}
        if not new:
            break
        found |= new
        texts = [text for each in new.values() for text, _ in parameters(each).values()]
        words = {word for text in texts for word in re.findall(r"\w+", text)}
        # A protocol is what functions give back, and no class that a config names.
        types |= {c for word in words if (c := classes.get(word)) and not getattr(c, "_is_protocol", False)}
    return sorted((c for c in found.values() if not inspect.isabstract(c)), key=path)


def class_options(each: type) -> Iterator[str]:
    """``name: type = default`` of every parameter that the parser accepts for a class of this package."""
    if not getattr(each.__init__, "__module__", "").startswith("fulgurite"):
        return
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(each, "x", fail_untyped=False)
    own = parameters(each)
    for action in parser._actions:
        name = action.dest.partition(".")[2]
        if not name or "." in name:
            continue
        if name in own:
            kind, default = own[name]
            required = default is inspect.Parameter.empty
        else:  # handed on to a class that is no base
            kind, default, required = type_text(action._typehint), action.default, action.required
        yield f"{name}: {kind}" + ("" if required else f" = {shown(default)}")


def parameters(each: type) -> dict[str, tuple[str, object]]:
    """Type as it is written, and default, of the parameters of a class and its bases in this package."""
    found: dict[str, tuple[str, object]] = {}
    for base in each.__mro__:
        if "__init__" in vars(base) and base.__module__.startswith("fulgurite"):
            for parameter in inspect.signature(base.__init__).parameters.values():
                if parameter.annotation is not parameter.empty:
                    text = expanded(type_text(parameter.annotation), sys.modules[base.__module__])
                    found.setdefault(parameter.name, (text, parameter.default))
    return found


def type_text(annotation: object) -> str:
    return annotation.strip("\"'") if isinstance(annotation, str) else inspect.formatannotation(annotation)


def expanded(text: str, module: ModuleType) -> str:
    """A type with the choices of an alias, as ``Mode``, in its place."""
    for word in set(re.findall(r"[A-Z]\w+", text)):
        alias = vars(module).get(word)
        if get_origin(alias) is Literal:
            text = re.sub(rf"\b{word}\b", type_text(alias), text)
    return text


def shown(value: object) -> str:
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(str(value)) if isinstance(value, Path) else repr(value)


def path(each: type) -> str:
    return f"{each.__module__}.{each.__qualname__}"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    FILE.write_text(surface(), encoding="utf-8")
