"""Text and video brought together: similarities from coarse to fine, their normalisation, and search by them."""

from fulgurite.methods.retrieval.clip4clip import Clip4Clip
from fulgurite.methods.retrieval.features import TextFeatures, TextTokens, VideoFeatures, VideoTokens
from fulgurite.methods.retrieval.head import RetrievalHead
from fulgurite.methods.retrieval.ucofia import Ucofia
from fulgurite.methods.retrieval.xclip import XClip

__all__ = [
    "Clip4Clip",
    "RetrievalHead",
    "TextFeatures",
    "TextTokens",
    "Ucofia",
    "VideoFeatures",
    "VideoTokens",
    "XClip",
]
