"""Text and video brought together: similarities from coarse to fine, their normalisation, and search by them."""

from fulgurite.methods.retrieval.features import TextFeatures, TextTokens, VideoFeatures, VideoTokens
from fulgurite.methods.retrieval.head import RetrievalHead

__all__ = ["RetrievalHead", "TextFeatures", "TextTokens", "VideoFeatures", "VideoTokens"]
