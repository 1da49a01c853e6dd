"""Weights set to zero: which ones, how many of each layer, and what the others do about it."""

__all__ = [
    "allocation",
    "base",
    "block_importance",
    "ecoflap",
    "global_schedule",
    "gradual",
    "iterative",
    "magnitude",
    "n_m",
    "pattern",
    "sparsegpt",
    "wanda",
]
