"""Weights in a few bits: grids, rounding to them, GPTQ, and the layouts in which integers are stored."""

__all__ = ["gptq", "grid", "packing", "quantized_weight", "rtn"]
