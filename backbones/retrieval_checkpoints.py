"""Published checkpoints of UCoFiA, X-CLIP and CLIP4Clip (``pytorch_model.bin.<epoch>``), read into towers and head.

Strict: every tensor is used or known as one that the published code never uses, and every tensor of the model is in the
file. (The published code reads its own files without either, and so loses the attention of two trained blocks, whose
names it changes after reading, and the selector of patches, where it was trained by its other copy.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from fulgurite.backbones.base import StateDict
from fulgurite.backbones.frozenbilm_checkpoint import state_mismatches
from fulgurite.backbones.open_clip_video_text import OpenClipVideoText
from fulgurite.backbones.retrieval_names import NAMES, WRAPPED, head_name, is_never_used, options_of
from fulgurite.backbones.video_text import VideoTextBackbone
from fulgurite.checkpoints.errors import MismatchError
from fulgurite.checkpoints.unpickle import load_pickle
from fulgurite.methods.retrieval.head import RetrievalHead
from fulgurite.methods.retrieval.ucofia import Ucofia

CLIP = "clip."
BLOCK = re.compile(r"visual\.transformer\.resblocks\.(\d+)\.")
SHIFTED = (10, 11)  # blocks of the tower for pictures, in UCoFiA
ELSEWHERE = {  # parts of published variants that no head here has
    "cross.": "tightTransf, which reads text and video together",
    "similarity_dense.": "tightTransf, which reads text and video together",
    "lstm_visual.": "seqLSTM",
    "clip.visual.conv2.": "linear_patch 3d",
}


@dataclass(frozen=True)
class RetrievalWeights:
    """Content of one published checkpoint.

    Args:
        towers: under open_clip's names, in the precision of the file; CLIP is half there.
        head: under the head's names.
        shifted: blocks of the tower for pictures that the file names as having patch shift.
        never_used: names in the file that the published code makes and uses nowhere.
        unknown: all other names in the file.
        options: what the file was made with, by option of the head.
        kind: the class of head that it was made with.
    """

    towers: StateDict
    head: StateDict
    shifted: tuple[int, ...]
    never_used: tuple[str, ...]
    unknown: tuple[str, ...]
    options: Mapping[str, object]
    kind: type[RetrievalHead]


def read_retrieval_checkpoint(path: str | Path, head: RetrievalHead) -> RetrievalWeights:
    """Split the published checkpoint ``path`` by owner. Values and dtypes stay as they are.

    Args:
        path: a state as ``torch.save`` writes it; nothing in it is run.
        head: whose names are used.

    Raises:
        CheckpointError: the file is absent, damaged, or asks for code to be run.
        MismatchError: it is no state of names and tensors with CLIP among them, it names a tensor twice, it is of a
            published variant that no head here is, or the head is none of the published ones.
    """
    state = load_pickle(path)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise MismatchError(f"{path} is no published retrieval checkpoint: expected names and tensors")
    if not any(name.startswith(CLIP) for name in state):
        raise MismatchError(f"{path} is no published retrieval checkpoint: it has no tensors {CLIP}...")
    for prefix, variant in ELSEWHERE.items():
        if any(name.startswith(prefix) for name in state):
            raise MismatchError(f"{path} has {prefix}..., parts of {variant}, which no head here has")
    if type(head) not in NAMES:
        known = ", ".join(kind.__name__ for kind in NAMES)
        raise MismatchError(f"{path}: {type(head).__name__} has no published checkpoints; set head to one of {known}")
    towers, own, shifted, never_used, unknown = {}, {}, set(), [], []
    for name, tensor in state.items():
        if name.startswith(CLIP):
            inner = name.removeprefix(CLIP)
            if match := WRAPPED.fullmatch(inner):
                inner, block = match[1] + match[3], int(match[2])
                shifted.add(block)
            if inner in towers:
                raise MismatchError(f"{path} has {CLIP}{inner} twice, once by the name {name}: which one is trained?")
            towers[inner] = tensor
        elif is_never_used(name, head):
            never_used.append(name)
        elif renamed := head_name(name, head):
            own[renamed] = tensor
        else:
            unknown.append(name)
    if "logit_scale" in towers:
        own["logit_scale"] = towers["logit_scale"].reshape(1)
    kind, options = options_of(state)
    return RetrievalWeights(towers, own, tuple(sorted(shifted)), tuple(never_used), tuple(unknown), options, kind)


def load_retrieval_checkpoint(path: str | Path, backbone: VideoTextBackbone, head: RetrievalHead) -> RetrievalWeights:
    """Fill towers and head from a published checkpoint, both in their own precision, or neither.

    Args:
        path: see `read_retrieval_checkpoint`.
        backbone: built by open_clip; afterwards its `source` is the file.
        head: built, with the options that the file was made with.

    Returns:
        What the file holds.

    Raises:
        CheckpointError: as by `read_retrieval_checkpoint`.
        MismatchError: anything is missing, unknown or of another shape; all is listed, with the options to change. Or
            the towers would compute something else from the same tensors.
    """
    if not isinstance(backbone, OpenClipVideoText):
        raise MismatchError(
            f"{path} holds CLIP's towers, which {type(backbone).__name__} has not: set backbone to OpenClipVideoText"
        )
    weights = read_retrieval_checkpoint(path, head)
    lines = [f"{name}: in the file, not in the model" for name in weights.unknown]
    lines += [f"head.{line}" for line in state_mismatches(weights.head, head.state_dict())]
    lines += [f"backbone.{line}" for line in state_mismatches(weights.towers, backbone.model.state_dict())]
    if lines:
        listed = "\n  ".join(lines)
        raise MismatchError(
            f"{len(lines)} tensors of {path} do not fit this model:\n  {listed}\n{_advice(weights, head)}"
        )
    _require_same_towers(path, weights, backbone)
    head.load_state_dict(weights.head)
    backbone.model.load_state_dict(weights.towers)
    backbone.source = str(path)
    backbone.refresh()
    return weights


def _require_same_towers(path: str | Path, weights: RetrievalWeights, backbone: OpenClipVideoText) -> None:
    """Raise MismatchError where the published towers compute something else than these from the same tensors."""
    if any(isinstance(module, nn.GELU) for module in backbone.model.modules()):
        raise MismatchError(
            f"{path} was trained with QuickGELU in its towers: set model.init_args.backbone.init_args.model to a "
            f"-quickgelu one, or quick_gelu: true in its configuration"
        )
    blocks = {int(match[1]) for name in weights.towers if (match := BLOCK.match(name))}
    published = blocks.intersection(SHIFTED) if weights.kind is Ucofia else ()
    expected = weights.shifted or tuple(sorted(published))
    if backbone.shifted != expected:
        raise MismatchError(
            f"{path} was trained with patch shift in the blocks {list(expected)}, the backbone has it in "
            f"{list(backbone.shifted)}: set model.init_args.backbone.init_args.patch_shift to the former"
        )


def _advice(weights: RetrievalWeights, head: RetrievalHead) -> str:
    """What to set so that a file fits."""
    if type(head) is not weights.kind:
        return f"The file was made with {weights.kind.__name__}: set model.init_args.head to it."
    differing = {k: v for k, v in weights.options.items() if getattr(head, k) != v}
    if not differing:
        return (
            "The file tells of no other options of the head: set model.init_args.backbone.init_args.model to the CLIP "
            "that it was made with, and leave levels and visual_local_matrix of the head as published."
        )
    told = ", ".join(f"{name}: {value}" for name, value in differing.items())
    return f"The file was made with other options: set in model.init_args.head.init_args {told}."
