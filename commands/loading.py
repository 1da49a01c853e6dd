"""A trained module back in Python, from any run or checkpoint."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import jsonargparse
import yaml
from lightning.pytorch import LightningModule

from fulgurite.backbones.sources import weights_filled_later
from fulgurite.checkpoints import MANIFEST_NAME, RefusedError, naming_another, read_manifest
from fulgurite.checkpoints.structure import rebuild
from fulgurite.commands.building import Building, build
from fulgurite.commands.explain import explain
from fulgurite.commands.imports import PARSER_MODE, imports_allowed
from fulgurite.commands.invocation import Invocation
from fulgurite.commands.names import import_named
from fulgurite.commands.runs import checkpoint_at
from fulgurite.methods.quantization.storage import load_dense
from fulgurite.modules.adapted import BACKBONE_DIGEST, AdaptedModule


def load(path: str | Path, allow: tuple[str, ...] = ()) -> LightningModule:
    """The module of a checkpoint folder, or of a run's newest checkpoint, with its weights, in evaluation mode.

    The checkpoint's manifest holds the config that it was made with; every byte is verified before it is used.

    Args:
        path: checkpoint folder or run folder.
        allow: packages or modules that class paths may come from, besides the command line's own.

    Raises:
        CheckpointError: damaged, incomplete, or made without a config.
        ConfigError: nothing there, a class path outside the allowed packages, or a setting that is refused.
    """
    folder = checkpoint_at(str(path), "load")
    with naming_another(folder):
        manifest = read_manifest(folder)
    if not (manifest.settings or {}).get("model"):
        if manifest.facts.get("library") is not None:
            by = {"fulgurite": "fulgurite.load_model"}.get(manifest.facts["library"], manifest.facts["library"])
            raise RefusedError(f"{folder}: this is no module of fulgurite, but a model that {by} loads")
        raise RefusedError(f"{folder}: the manifest holds no model settings; it was not written by the command line")
    with imports_allowed(tuple(allow)):
        model = {"model": manifest.settings["model"]}
        import_named((), (model,))
        parser = jsonargparse.ArgumentParser(exit_on_error=False, parser_mode=PARSER_MODE)
        parser.add_subclass_arguments(LightningModule, "model", fail_untyped=False)
        origin = Invocation("load", (), (folder / MANIFEST_NAME,), (model,), tuple(allow), ())
        try:
            parsed = parser.parse_string(yaml.safe_dump(model))
        except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
            raise explain(error, parser, origin) from error
        whole = BACKBONE_DIGEST in manifest.facts
        with Building(parsed, origin) as building, weights_filled_later() if whole else nullcontext():
            module = parser.instantiate(parsed, instantiators=[(building.through(build), object, True)]).model
    rebuild(module, manifest.structure)
    if hasattr(module, "restore"):
        module.restore(manifest.facts)
    if isinstance(module, AdaptedModule):
        manifest.require_base(module.base_digest, str(folder))
    with naming_another(folder):
        module.load_state_dict(load_dense(folder))
    return module.eval()
