"""Run by test_boundary_ranks.py in each of two processes: fits with and without boundaries, and one that fails."""

import os
import sys
from pathlib import Path

from fulgurite.checkpoints import WriteError
from fulgurite.checkpoints.atomic import inject_faults
from fulgurite.cli import main


def full_disk(run):
    """A disk that is full once a merge is written."""

    def hook(point):
        if point == "before_manifest" and any((run / "artefacts").glob(".merged-*.tmp-*")):
            raise WriteError("the disk of this test is full")

    return hook


if __name__ == "__main__":
    root, plain, merging = map(Path, sys.argv[1:])
    short = (
        "--trainer.num_sanity_val_steps",
        "0",
        "--trainer.devices",
        "2",
        "--data.init_args.epochs_per_domain",
        "1",
        "--trainer.max_epochs",
        "2",
    )
    codes = []
    for strategy in ("ddp", "fsdp2"):
        for name, configs in (("plain", [plain]), ("merging", [plain, merging])):
            named = [word for config in configs for word in ("--config", str(config))]
            argv = ["fit", *named, *short, "--trainer.strategy", strategy, "--run", str(root / f"{strategy}-{name}")]
            codes.append(main(argv))
    run = root / "full"
    with inject_faults(full_disk(run)):
        codes.append(main([*argv[:-1], str(run)]))
    (root / f"codes-{os.environ['LOCAL_RANK']}").write_text(" ".join(map(str, codes)))
