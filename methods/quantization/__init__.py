"""Weights in a few bits: grids, rounding to them, GPTQ, rotations, importance, and the layouts of integers."""

__all__ = [
    "attention_mass",
    "base",
    "bit_allocation",
    "gptq",
    "grid",
    "hadamard",
    "hadamard_matrices",
    "norm_fusing",
    "packing",
    "quantized_weight",
    "rotation",
    "rtn",
    "storage",
    "task_circuit",
    "token_importance",
]
