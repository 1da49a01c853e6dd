"""Run by test_ranks.py in each of two processes: a classifier is fine-tuned, and coefficients are fitted."""

import importlib.util
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import seed_everything


def main(out, *experts):
    spec = importlib.util.spec_from_file_location("kit", Path(__file__).with_name("conftest.py"))
    kit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kit)
    out, two = Path(out), {"devices": 2, "strategy": "ddp"}
    merging = kit.fitted_coefficients(experts, kit.trainer(out, max_epochs=2, **two))
    module, run = kit.classifier(), kit.trainer(out, max_epochs=1, **two)
    run.fit(module, datamodule=kit.Toys("bars", batch_size=8))
    run.test(module, datamodule=kit.Toys("bars", batch_size=8), verbose=False)
    results = {
        "coefficients": merging.coefficients.detach(),
        "weights": {name: parameter.detach() for name, parameter in module.named_parameters()},
        "pictures": module.test_results["pictures"],
        "accuracy": module.test_results["accuracy"],
        "failure": failure_of_writing(merging),
    }
    torch.save(results, out / f"{os.environ['LOCAL_RANK']}.pt")


def failure_of_writing(merging):
    """What a rank says where the first one cannot write the artefact."""

    def refuse(*_):
        raise OSError("no space left")

    merging.write = refuse
    try:
        merging.on_train_end()
    except (OSError, RuntimeError) as error:
        return str(error)
    return ""


if __name__ == "__main__":
    seed_everything(0, verbose=False)
    main(*sys.argv[1:])
