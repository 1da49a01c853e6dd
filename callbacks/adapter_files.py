"""Adapter sets as folders: peft's layout where it has the kind, ours elsewhere; and peft's folders as sets."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as pl
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from fulgurite.callbacks.strategy import gather
from fulgurite.checkpoints import save_checkpoint_folder
from fulgurite.checkpoints.atomic import publish_folder, write_json
from fulgurite.checkpoints.errors import DamagedError, MissingError
from fulgurite.checkpoints.tensorfile import write_tensors
from fulgurite.methods.adapters.bank import AdapterBank
from fulgurite.methods.adapters.lora import LoRA
from fulgurite.methods.adapters.peft_format import from_peft, to_peft
from fulgurite.methods.adapters.replace import Replace
from fulgurite.modules.video_qa import INITIAL, VideoQA

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_peft_folder(
    bank: AdapterBank, name: str, folder: str | Path, base_model: str | None = None, root: str = ""
) -> None:
    """Publish the set ``name`` as a folder for `peft.PeftModel.from_pretrained`, all or nothing.

    Arguments and errors are those of `to_peft`; the operating system's refusal is a `WriteError`.
    """
    _publish(Path(folder), *to_peft(bank, name, base_model, root))


def _publish(folder: Path, config: dict, tensors: dict[str, Tensor]) -> None:
    with publish_folder(folder) as temporary:
        write_json(temporary / CONFIG, config)
        write_tensors(temporary / WEIGHTS, tensors)


def read_peft_folder(
    bank: AdapterBank, name: str, folder: str | Path, base_model: str | None = None, root: str = ""
) -> None:
    """Fill the set ``name`` from a folder that peft, or `write_peft_folder`, wrote.

    Raises:
        MissingError: one of the two files is not there.
        DamagedError: a file cannot be read.
        ValueError: the adapters do not fit the set; see `from_peft`.
    """
    folder = Path(folder)
    for path in (folder / CONFIG, folder / WEIGHTS):
        if not path.is_file():
            raise MissingError(f"no {path.name} in {folder}: is it a folder of peft adapters in safetensors?")
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except ValueError as error:
        raise DamagedError(f"{folder / CONFIG} is no JSON: {error}") from error
    try:
        tensors = load((folder / WEIGHTS).read_bytes())
    except SafetensorError as error:
        raise DamagedError(f"{folder / WEIGHTS} is no safetensors file: {error}") from error
    from_peft(bank, name, config, tensors, base_model, root)


class AdapterFolders(pl.Callback):
    """Writes ``adapters/<name>/`` of the run: the start (``initial``) and what every stage that has begun learned.

    Hook: ``on_train_end``, so also where a run stops early. A set of `LoRA` (and `Replace`) is in peft's layout; other
    kinds are a checkpoint folder with tensors ``<site>.<tensor>``. All ranks gather, rank 0 writes. Nothing is stored
    in checkpoints; a resumed run writes the same folders again.
    """

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the start and every stage so far; the current stage's values are in the live set."""
        if not isinstance(pl_module, VideoQA) or trainer.fast_dev_run:
            return
        bank = pl_module.bank
        pl_module.reshard()
        stages = [s.name for s in pl_module.stages]
        sets = {INITIAL: INITIAL} | {name: name for name in stages[: pl_module.stage] if name in bank.names}
        if pl_module.stage >= 0:
            sets[stages[pl_module.stage]] = bank.live
        for stage, name in sets.items():
            folder = Path(trainer.default_root_dir) / "adapters" / stage
            adapters = bank.sets[name].values()
            if any(isinstance(a, LoRA) for a in adapters) and all(isinstance(a, LoRA | Replace) for a in adapters):
                config, tensors = to_peft(bank, name)
                tensors = gather(tensors, trainer.is_global_zero)
                if trainer.is_global_zero:
                    _publish(folder, config, tensors)
                continue
            state = {key.replace("/", "."): value.detach() for key, value in bank.sets[name].state_dict().items()}
            state = gather(state, trainer.is_global_zero)
            if trainer.is_global_zero:
                base = {"source": type(pl_module.backbone).__name__, "digest": pl_module.base_digest}
                save_checkpoint_folder(folder, {"adapters": state}, kind="delta", base=base, facts={"set": stage})
