"""Names in published checkpoints of UCoFiA, X-CLIP and CLIP4Clip, and how such a file was made, which its shapes tell.

All three store one flat state: CLIP under ``clip.``, and beside it what is learned on top.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from fulgurite.methods.retrieval.clip4clip import Clip4Clip
from fulgurite.methods.retrieval.head import RetrievalHead
from fulgurite.methods.retrieval.ucofia import Ucofia
from fulgurite.methods.retrieval.xclip import XClip

TEMPORAL = {r"frame_position_embeddings\.weight": "video_vector.encoder.positions"} | {
    r"transformerClip\.resblocks\.(\d+\..+)": r"video_vector.encoder.blocks.\1"
}
NAMES: dict[type[RetrievalHead], dict[str, str]] = {
    Clip4Clip: TEMPORAL,
    XClip: TEMPORAL
    | {
        "global_mat_weight": "sentence_projection",
        "local_mat_weight": "word_projection",
        "word_logit_weight": "video_word_matrix",
        "frame_logit_weight": "frame_sentence_matrix",
        "word_mat_weight": "word_matrix",
        "word_mat_weight2": "word_matrix_2",
        "frame_mat_weight": "frame_matrix",
        "frame_mat_weight2": "frame_matrix_2",
    },
    Ucofia: TEMPORAL
    | {
        "global_mat_weight": "sentence_projection",
        "global_mat_weight_1": "video_projection",
        "frame_logit_weight": "frame_matrix.weight",
        "local_mat_weight": "word_projection",
        "local_mat_weight1": "patch_projection",
        "word_mat_weight": "word_matrix.weight",
        "word_mat_weight2": "word_matrix_2.weight",
        "pixel_mat_weight": "patch_matrix.weight",
        "pixel_mat_weight2": "patch_matrix_2.weight",
        r"visual_token_selector\.score_predictor\.in_conv\.0\.(weight|bias)": r"patch_selector.norm.\1",
        r"visual_token_selector\.score_predictor\.in_conv\.1\.weight": "patch_selector.token.weight",
        r"visual_token_selector\.score_predictor\.out_conv\.0\.weight": "patch_selector.joint.weight",
        r"visual_token_selector\.score_predictor\.out_conv\.2\.weight": "patch_selector.score.weight",
    },
}
# Made by the published code and used nowhere in it.
NEVER_USED: dict[type[RetrievalHead], frozenset[str]] = {
    Clip4Clip: frozenset(),
    XClip: frozenset(),
    Ucofia: frozenset({"word_logit_weight", "frame_mat_weight", "frame_mat_weight2", "word_mat_weight_for_pixel"}),
}
# The attention of blocks with patch shift is wrapped in a saved training run, and bare in a file made for evaluation.
WRAPPED = re.compile(r"(visual\.transformer\.resblocks\.(\d+)\.attn\.)net\.(.+)")


def head_name(name: str, head: RetrievalHead) -> str | None:
    """What the tensor ``name`` of a file is called in ``head``; None where it is not of the head."""
    for pattern, own in NAMES[type(head)].items():
        if match := re.fullmatch(pattern, name):
            return match.expand(own)
    return None


def is_never_used(name: str, head: RetrievalHead) -> bool:
    """Whether the published code makes the tensor ``name`` and uses it nowhere.

    Its evaluation has no matrix for patches: that is ``visual_local_matrix: false``.
    """
    without = isinstance(head, Ucofia) and not head.visual_local_matrix and name == "local_mat_weight1"
    return without or name in NEVER_USED[type(head)]


def options_of(state: Mapping[str, Tensor]) -> tuple[type[RetrievalHead], dict[str, object]]:
    """The head that a file was made with, and the options that its names and shapes tell."""
    kind = Ucofia if "pixel_mat_weight" in state else XClip if "global_mat_weight" in state else Clip4Clip
    layers = {name.split(".")[2] for name in state if name.startswith("transformerClip.resblocks.")}
    options: dict[str, object] = {"temporal": "transformer" if layers else "mean"}
    if layers:
        options["temporal_layers"] = len(layers)
    for option, name in (("max_frames", "frame_logit_weight"), ("max_words", "word_mat_weight")):
        if name in state:
            options[option] = len(state[name])
    if kind is Ucofia:
        options["isa"] = "full"
        if "max_frames" in options:
            options["top_k"] = len(state["pixel_mat_weight"]) // options["max_frames"] - 1
        norm = state.get("visual_token_selector.score_predictor.in_conv.0.weight")
        width = state.get("global_mat_weight")
        if norm is not None and width is not None:
            options["selector"] = "frame" if len(norm) == len(width) else "video"
    return kind, options
