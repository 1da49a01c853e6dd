"""Statistics of a model on data, for compression and data-driven merging: moments of inputs and of gradients."""

__all__ = ["base", "fisher", "gram"]
