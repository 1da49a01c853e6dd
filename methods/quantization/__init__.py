"""Weights in a few bits: grids, rounding to them, GPTQ, rotations, importance, and the layouts of integers."""

__all__ = [
    "attention_calls",
    "attention_mass",
    "base",
    "bit_allocation",
    "bit_budget",
    "compressed_tensors",
    "gptq",
    "grid",
    "hadamard",
    "hadamard_matrices",
    "norm_fusing",
    "packing",
    "quantized_weight",
    "rotation",
    "rsq",
    "rtn",
    "storage",
    "tacq",
    "task_circuit",
    "token_importance",
]
