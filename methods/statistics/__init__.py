"""Statistics of a model on data, for compression and data-driven merging: moments of inputs and of gradients."""

__all__ = ["absolute_gradients", "base", "fisher", "gram", "noise", "zeroth_order"]
