"""Weights set to zero: which ones, how many of each layer, and what the others do about it."""
