"""``quantize``: put weights of a model on grids of a few bits, without training."""

from __future__ import annotations

from typing import Literal

import jsonargparse

from fulgurite.commands import compress

FORMATS = Literal["compressed-tensors", "own"]


def run(command: str, argv: list[str]) -> int:
    """Quantize, or with ``--dry_run`` say what would be done; returns the exit code. Raises as `compress.run`."""
    return compress.run("quantize", argv, add_method)


def add_method(parser: jsonargparse.ArgumentParser) -> str:
    """Add the quantizer and the layout."""
    from fulgurite.methods.quantization.base import Quantizer

    parser.add_subclass_arguments(Quantizer, "quantizer", required=True, help="how, and to how many bits, as Gptq")
    parser.add_argument(
        "--format",
        type=FORMATS,
        default=compress.DEFAULT_FORMAT,
        help="that transformers loads, or this package's own for any bits and scheme, for fulgurite.load_model",
    )
    return "quantizer"
