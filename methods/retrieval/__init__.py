"""Text and video brought together: similarities from coarse to fine, their normalisation, and search by them."""

from fulgurite.methods.retrieval.clip4clip import Clip4Clip
from fulgurite.methods.retrieval.coarse_to_fine import coarse_to_fine_similarity
from fulgurite.methods.retrieval.features import TextFeatures, TextTokens, VideoFeatures, VideoTokens
from fulgurite.methods.retrieval.head import RetrievalHead, TowerFacts
from fulgurite.methods.retrieval.isa import interactive_similarity
from fulgurite.methods.retrieval.patch_selection import PatchSelector, perturbed_topk
from fulgurite.methods.retrieval.sinkhorn import sinkhorn_bias
from fulgurite.methods.retrieval.two_stage import two_stage_search
from fulgurite.methods.retrieval.ucofia import Ucofia
from fulgurite.methods.retrieval.xclip import XClip

__all__ = [
    "Clip4Clip",
    "PatchSelector",
    "RetrievalHead",
    "TextFeatures",
    "TextTokens",
    "TowerFacts",
    "Ucofia",
    "VideoFeatures",
    "VideoTokens",
    "XClip",
    "coarse_to_fine_similarity",
    "interactive_similarity",
    "perturbed_topk",
    "sinkhorn_bias",
    "two_stage_search",
]
