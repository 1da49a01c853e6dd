"""``quantize``: put weights of a model on grids of a few bits, without training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import jsonargparse

from fulgurite.commands import compress

if TYPE_CHECKING:
    from fulgurite.callbacks.quantize_step import QuantizeAtCheckpoint

FORMATS = Literal["compressed-tensors", "own"]


def run(command: str, argv: list[str]) -> int:
    """Quantize, or with ``--dry_run`` say what would be done; returns the exit code. Raises as `compress.run`."""
    return compress.run("quantize", argv, add_method, step_of)


def add_method(parser: jsonargparse.ArgumentParser) -> None:
    """Add the quantizer, what is settled on the whole model before, and the layout."""
    from fulgurite.methods.quantization.base import Quantizer
    from fulgurite.methods.quantization.bit_budget import BitBudget
    from fulgurite.methods.quantization.rotation import Rotate
    from fulgurite.methods.quantization.rsq import TokenImportance
    from fulgurite.methods.quantization.tacq import TaskCircuit

    parser.add_subclass_arguments(Quantizer, "quantizer", required=True, help="how, and to how many bits, as Gptq")
    parser.add_argument(
        "--rotation", type=Rotate | None, default=None, help="turn a language model first (Rotate: QuaRot, RSQ)"
    )
    parser.add_argument(
        "--rolled_copies", type=int, default=1, help="times that a window of text is read, each shifted on (RSQ)"
    )
    parser.add_argument(
        "--importance", type=TokenImportance | None, default=None, help="how much tokens count (TokenImportance, RSQ)"
    )
    parser.add_argument(
        "--budget", type=BitBudget | None, default=None, help="bits of every layer by what it loses (BitBudget)"
    )
    parser.add_argument(
        "--task_circuit",
        type=TaskCircuit | None,
        default=None,
        help="weights to keep as they are (TaskCircuit, TaCQ)",
    )
    parser.add_argument(
        "--format",
        type=FORMATS,
        default=compress.DEFAULT_FORMAT,
        help="that transformers loads, or this package's own for any bits and scheme, for fulgurite.load_model",
    )


def step_of(options: Any, with_data: bool) -> QuantizeAtCheckpoint:
    """The step; see `compress.run`."""
    from fulgurite.callbacks.quantize_step import QuantizeAtCheckpoint

    quantizer, budget, circuit = options.quantizer, options.budget, options.task_circuit
    measured = quantizer.needs != "nothing" or circuit is not None
    calibration = compress.calibration_of(options, with_data, measured, optional=budget is not None)
    settled = {"importance": options.importance, "budget": budget, "task_circuit": circuit}
    return QuantizeAtCheckpoint(quantizer, options.layers, options.towers, calibration, **settled)
