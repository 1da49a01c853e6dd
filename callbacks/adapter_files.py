"""Adapter sets as folders: peft's layout where it has the kind, ours elsewhere; and peft's folders as sets.

`AdapterFolders` writes ``adapters/<name>/`` of every run. In Python::

    module = fulgurite.load("runs/...")                             # the module of a run with LoRA adapters
    read_peft_folder(module.bank, "live", "from/peft/save_pretrained")
    write_peft_folder("mine", *to_peft(module.bank, "live"), base={"source": "bert", "digest": module.base_digest})

and ``peft.PeftModel.from_pretrained(backbone, "mine")`` reads what was written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from fulgurite.callbacks.publish import parameters_of
from fulgurite.callbacks.strategy import gather
from fulgurite.checkpoints import (
    MANIFEST_NAME,
    DamagedError,
    MissingError,
    load_document,
    load_tensors,
    read_manifest,
    save_checkpoint_folder,
)
from fulgurite.methods.adapters.bank import AdapterBank
from fulgurite.methods.adapters.peft_format import from_peft, peft_type, to_peft
from fulgurite.methods.sharding import reshard
from fulgurite.modules.adapted import INITIAL, AdaptedModule

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_peft_folder(
    folder: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    base: Mapping[str, str],
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Publish the results of `to_peft` as a folder for `peft.PeftModel.from_pretrained`, all or nothing.

    A manifest with the digests lies beside peft's two files; peft passes over it.

    Args:
        folder: its path; what is there is replaced.
        config: peft's configuration.
        tensors: peft's tensors.
        base: ``source`` and ``digest`` of the frozen backbone.
        facts: more for the manifest.

    Raises:
        WriteError: the operating system refused.
    """
    stem = Path(WEIGHTS).stem
    save_checkpoint_folder(folder, {stem: tensors}, {CONFIG: dict(config)}, kind="delta", base=base, facts=facts)


def read_peft_folder(
    bank: AdapterBank,
    name: str,
    folder: str | Path,
    base_model: str | None = None,
    root: str = "",
    base_digest: str | None = None,
) -> None:
    """Fill the set ``name`` from a folder that peft, or `write_peft_folder`, wrote.

    Every byte of a folder with a manifest is checked before it is used; peft itself writes none.

    Args:
        bank, name, base_model, root: see `from_peft`.
        folder: holds peft's two files.
        base_digest: fingerprint of the backbone; where given, a manifest must name the same.

    Raises:
        MissingError: one of the two files is not there.
        DamagedError: a file cannot be read, or is not as it was written.
        MismatchError: the folder stands on a backbone with another digest.
        ValueError: the adapters do not fit the set; see `from_peft`.
    """
    folder = Path(folder)
    for path in (folder / CONFIG, folder / WEIGHTS):
        if not path.is_file():
            raise MissingError(f"no {path.name} in {folder}: is it a folder of peft adapters in safetensors?")
    if (folder / MANIFEST_NAME).is_file():
        if base_digest is not None:
            read_manifest(folder).require_base(base_digest, str(folder))
        config, tensors = load_document(folder, CONFIG), load_tensors(folder, WEIGHTS)
    else:
        config, tensors = _read_foreign(folder)
    from_peft(bank, name, config, tensors, base_model, root)


def _read_foreign(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """peft's two files as peft wrote them."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except ValueError as error:
        raise DamagedError(f"{folder / CONFIG} is no JSON: {error}") from error
    try:
        return config, load((folder / WEIGHTS).read_bytes())
    except SafetensorError as error:
        raise DamagedError(f"{folder / WEIGHTS} is no safetensors file: {error}") from error


class AdapterFolders(pl.Callback):
    """Writes ``adapters/<name>/`` of the run: the start (``initial``) and what every stage that has begun learned.

    Hook: ``on_train_end``, so also where a run stops early. A set of `LoRA` or `IA3` (and `Replace`) is in peft's
    layout; other kinds are tensors ``<site>.<tensor>``. Every folder has a manifest with the digests and its base.
    All ranks gather, rank 0 writes. Nothing is stored in checkpoints; a resumed run writes the same folders again.
    """

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the start and every stage so far; the current stage's values are in the live set."""
        if not isinstance(pl_module, AdaptedModule) or trainer.fast_dev_run:
            return
        bank = pl_module.bank
        reshard(pl_module)
        stages = [s.name for s in pl_module.stages]
        sets = {INITIAL: INITIAL} | {name: name for name in stages[: pl_module.stage] if name in bank.names}
        if pl_module.stage >= 0:
            sets[stages[pl_module.stage]] = bank.live
        base = {"source": pl_module.backbone.source, "digest": pl_module.base_digest}
        for stage, name in sets.items():
            folder = Path(trainer.default_root_dir) / "adapters" / stage
            facts = {"set": stage, "global_step": trainer.global_step, "parameters": parameters_of(pl_module)}
            if peft_type(bank.adapters_of(name)) is not None:
                config, tensors = to_peft(bank, name, base["source"])
                tensors = gather(tensors, trainer.is_global_zero)
                if trainer.is_global_zero:
                    write_peft_folder(folder, config, tensors, base, facts)
                continue
            state = {key.replace("/", "."): value.detach() for key, value in bank.sets[name].state_dict().items()}
            state = gather(state, trainer.is_global_zero)
            if trainer.is_global_zero:
                save_checkpoint_folder(folder, {"adapters": state}, kind="delta", base=base, facts=facts)
