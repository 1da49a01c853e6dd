"""Routers: from features of a sample under the frozen backbone to weights over experts."""

__all__ = ["base", "centroid"]
