"""Adapter sets as folders that the `peft` library reads, and its folders as adapter sets."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load

from fulgurite.checkpoints.atomic import publish_folder, write_json
from fulgurite.checkpoints.errors import DamagedError, MissingError
from fulgurite.checkpoints.tensorfile import write_tensors
from fulgurite.methods.adapters.bank import AdapterBank
from fulgurite.methods.adapters.peft_format import from_peft, to_peft

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_peft_folder(
    bank: AdapterBank, name: str, folder: str | Path, base_model: str | None = None, root: str = ""
) -> None:
    """Publish the set ``name`` as a folder for `peft.PeftModel.from_pretrained`, all or nothing.

    Arguments and errors are those of `to_peft`; the operating system's refusal is a `WriteError`.
    """
    config, tensors = to_peft(bank, name, base_model, root)
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
