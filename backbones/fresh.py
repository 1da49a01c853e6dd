"""A written folder, loaded in a fresh process by its library and compared with the model that it came from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import save
from torch import Tensor, nn

from fulgurite.backbones import reload
from fulgurite.backbones.reload import Comparison, Stored
from fulgurite.checkpoints import CheckpointError, MismatchError

TOLERANCE = 1e-4  # relative; float32 kernels of another process round alike up to a few 1e-6
TIMEOUT_S = 1800


class DifferenceError(MismatchError):
    """What was written was loaded, and is another model than the live one."""


def compare_fresh(
    library: str,
    folder: Path,
    inputs: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    model_class: str = "",
    base: str = "",
    stored: Stored = "dense",
) -> Comparison:
    """What a new process finds that loads ``folder`` with ``library``, on the CPU and without network.

    Args:
        library: ``hf``, ``timm``, ``open_clip`` or ``peft``.
        folder: complete but for its manifest.
        inputs: of a forward pass, see `reload.outputs`.
        expected: its outputs.
        model_class: of transformers.
        base: model under peft's adapters.
        stored: how the weights lie in the folder.

    Raises:
        MismatchError: the library cannot load the folder; the text ends with what it says.
        CheckpointError: the process was ended, or took too long, so that nothing is known.
    """
    request = {"library": library, "folder": str(folder), "model_class": model_class, "base": base, "stored": stored}
    tensors = {f"input.{n}": t.contiguous() for n, t in inputs.items()}
    tensors |= {f"output.{n}": t.contiguous() for n, t in expected.items()}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(
            [sys.executable, "-P", reload.__file__, json.dumps(request)],
            input=save(tensors),
            capture_output=True,
            env={**os.environ, **offline},
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(f"{library} did not load {folder} within {TIMEOUT_S} s in a fresh process") from error
    if done.returncode < 0:
        raise CheckpointError(
            f"the fresh process that loads what was written by {library} was ended by signal {-done.returncode}, which "
            "is 9 where memory runs out: call again when there is more"
        )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()[-1000:]
        raise MismatchError(f"{library} cannot load what was written, exit code {done.returncode}: {said}")
    return Comparison(**json.loads(done.stdout.decode().strip().splitlines()[-1]))


def require_same(
    found: Comparison, model: nn.Module | None, tokens: Sequence[int] | None, tolerance: float = TOLERANCE
) -> None:
    """Raise `DifferenceError` with all that differs from the live model.

    Args:
        found: by the fresh process.
        model: what was written, for its tensors and which of them are tied; None where outputs alone are compared.
        tokens: ids of `reload.TEXT` by its tokenizer; None where it is not compared.
        tolerance: of each output, relative.
    """
    lines = [f"{name}: the files lack it" for name in found.missing]
    lines += [f"{name}: the model has no use for it" for name in found.unexpected]
    lines += [
        f"output {name}: differs by {error:.2e} of its norm, allowed is {tolerance:.0e}"
        for name, error in found.errors.items()
        if not error <= tolerance
    ]
    if not found.errors:
        lines.append("there was no output to compare")
    if tokens is not None and found.tokens != list(tokens):
        lines.append(f"tokenizer: {found.tokens} for {reload.TEXT!r}, expected {list(tokens)}")
    if model is not None:
        tied, digests = reload.tied_names(model), reload.digests(model)
        if found.tied != tied:
            lines.append(f"tied tensors: {found.tied[:3]}, expected {tied[:3]}")
        names = sorted(digests.keys() | found.digests.keys())
        lines += [f"tensor {name}: other values" for name in names if digests.get(name) != found.digests.get(name)]
    if lines:
        shown = "\n  ".join(lines[:20])
        raise DifferenceError(
            f"what was written is not the model, {len(lines)} differences in a fresh process; nothing was kept:\n"
            f"  {shown}"
        )
