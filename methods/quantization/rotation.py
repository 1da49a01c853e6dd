"""Rotate a model, so that no channel stands out, and it computes the same (QuaRot, arXiv 2404.00456; RSQ, 2503.01820).

    stream    x <- x Q: writers W <- Q^T W, b <- Q^T b, embeddings E <- E Q, readers W <- W Q
    values    v <- H_hd v in every head;  o: W <- W (H_heads x H_hd)^T, and its input across heads by H_heads (online)
    hidden    down: W <- W H_ff^T, and its input by H_ff (online)

Q = diag(s) H^T / sqrt(d), or the Q of Gaussian numbers. Norms are folded first (`norm_fusing`). Streams of one width
have one Q. All is done in float64, in place; only seeds and sizes need to be stored.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fulgurite.methods.quantization.hadamard import Fallback, Rotation
from fulgurite.methods.quantization.hadamard_matrices import split_size
from fulgurite.methods.quantization.norm_fusing import fuse_norms, kinds_of_norms, matrix_of, readers_of_norms, writers
from fulgurite.methods.quantization.rotation_record import RotationRecord, install_online
from fulgurite.methods.structure import Attention, ModelSpec, any_sites

Heads = Literal["none", "merged", "online"]
Residual = Literal["hadamard", "gaussian"]


@torch.no_grad()
def rotate(
    model: nn.Module,
    spec: ModelSpec,
    seed: int = 0,
    residual: Residual = "hadamard",
    heads: Heads = "online",
    feed_forward: bool = True,
    fallback: Fallback = "error",
    centre_all_embeddings: bool = False,
) -> RotationRecord:
    """Fold a model's norms and rotate it, in place. Logits stay what they are, up to rounding.

    Memory: two copies of the largest matrix in float64.

    Args:
        model: not yet rotated.
        spec: with ``norm_linear_pairs``, and ``writers``, ``attentions`` and ``feed_forward_outputs`` of its towers.
        seed: of signs or Gaussian numbers; those of a width also depend on the width.
        residual: which Q.
        heads: ``none``; ``merged``, within heads, without work at run time; ``online``, across heads too.
        feed_forward: rotate the hidden units, at run time.
        fallback: what to do where no Hadamard matrix fits; see `Rotation.hadamard`.
        centre_all_embeddings: see `fuse_norms`.

    Raises:
        ValueError: a size that no Hadamard matrix fits, and all that `fuse_norms` refuses.
    """
    before = {name: parameter.numel() for name, parameter in model.named_parameters()}
    record = planned(model, spec, seed, residual, heads, feed_forward, fallback)
    streams = record.streams
    readers = readers_of_norms(model, spec)
    widths = {name: model.get_submodule(name).weight.numel() for name in readers}
    fuse_norms(model, spec, centre_all_embeddings)
    for norm, linears in readers.items():
        for name in linears:
            rotate_inputs(matrix_of(name, model.get_submodule(name)), streams[widths[norm]])
    seen: set[int] = set()
    for tower in spec.towers:
        for name, module in writers(model, spec, tower.name):
            if id(module.weight) not in seen:
                seen.add(id(module.weight))
                rotate_outputs(name, module, streams[tower.width])
        if heads != "none":
            for attention in tower.attentions:
                rotate_heads(model, attention, heads, fallback, seed)
        if feed_forward:
            for name in any_sites(model, tower.feed_forward_outputs):
                rotate_inputs(matrix_of(name, model.get_submodule(name)), record.online[name])
    install_online(model, record)
    after = dict(model.named_parameters())
    added = tuple(name for name in after if name not in before)
    return replace(record, added=added, removed={n: size for n, size in before.items() if n not in after})


def planned(
    model: nn.Module,
    spec: ModelSpec,
    seed: int,
    residual: Residual,
    heads: Heads,
    feed_forward: bool,
    fallback: Fallback,
) -> RotationRecord:
    """What `rotate` would do, found possible; without the names of parameters. Nothing changes. Raises as `rotate`."""
    if heads not in get_args(Heads):
        raise ValueError(f"heads={heads!r}: expected 'none', 'merged' or 'online'")
    streams = {tower.width: stream_rotation(tower.width, seed, residual, fallback) for tower in spec.towers}
    online = online_rotations(model, spec, heads, feed_forward, fallback, seed)
    widths = {model.get_submodule(name).weight.numel() for name in readers_of_norms(model, spec)}
    if unknown := sorted(widths - set(streams)):
        raise ValueError(f"norms of width {unknown}, but the towers have {sorted(streams)}")
    if heads != "none":
        for attention in (attention for tower in spec.towers for attention in tower.attentions):
            check_heads(model, attention)
    return RotationRecord(streams, online, kinds_of_norms(model, spec))


def check_heads(model: nn.Module, attention: Attention) -> None:
    """Raise ValueError where values and outputs have not the heads of the spec, LookupError for a pattern of none."""
    values, outputs = any_sites(model, attention.value), any_sites(model, attention.output)
    if len(values) != len(outputs):
        raise ValueError(f"{len(values)} layers {attention.value!r}, but {len(outputs)} {attention.output!r}")
    for names, side, heads in ((values, 0, attention.num_key_value_heads), (outputs, 1, attention.num_heads)):
        for name in names:
            width = matrix_of(name, model.get_submodule(name)).shape[side]
            if width != heads * attention.head_dim:
                raise ValueError(f"{name} is {width} wide, and the spec says {heads} heads of {attention.head_dim}")


def stream_rotation(width: int, seed: int, residual: str, fallback: Fallback) -> Rotation:
    """Q of a stream."""
    if residual == "gaussian":
        return Rotation(("gaussian",), (width,), seed + width)
    if residual != "hadamard":
        raise ValueError(f"residual={residual!r}: expected 'hadamard' or 'gaussian'")
    return Rotation.hadamard(width, seed + width, fallback)


def unsigned(size: int, fallback: Fallback, seed: int) -> Rotation:
    """A Hadamard matrix without signs, or the fall-back."""
    dense = fallback == "gaussian" and split_size(size) is None
    return Rotation.hadamard(size, seed + size if dense else None, fallback)


def kronecker(outer: Rotation, inner: Rotation) -> Rotation:
    """Of the Kronecker product of two without signs."""
    seeds = {rotation.seed for rotation in (outer, inner) if rotation.seed is not None}
    if len(seeds) > 1:
        raise ValueError(f"no Hadamard matrix fits {outer.size} heads of {inner.size}: choose heads='none'")
    return Rotation(outer.kinds + inner.kinds, outer.sizes + inner.sizes, next(iter(seeds), None))


def identity(size: int) -> Rotation:
    """No rotation."""
    return Rotation(("identity",), (size,))


def online_rotations(
    model: nn.Module, spec: ModelSpec, heads: Heads, feed_forward: bool, fallback: Fallback, seed: int
) -> dict[str, Rotation]:
    """Linear layer -> what its input is rotated by at run time."""
    found = {}
    for tower in spec.towers:
        if heads != "none" and not tower.attentions:
            raise ValueError(f"tower {tower.name!r} has no attentions in the model's spec: choose heads='none'")
        if feed_forward and tower.feed_forward_outputs is None:
            raise ValueError(
                f"tower {tower.name!r} has no feed_forward_outputs in the model's spec: choose feed_forward=False"
            )
        for attention in tower.attentions if heads != "none" else ():
            unsigned(attention.head_dim, fallback, seed)  # raises where none fits
        for attention in tower.attentions if heads == "online" else ():
            across = kronecker(unsigned(attention.num_heads, fallback, seed), identity(attention.head_dim))
            found.update(dict.fromkeys(any_sites(model, attention.output), across))
        if feed_forward:
            for name in any_sites(model, tower.feed_forward_outputs):
                width = matrix_of(name, model.get_submodule(name)).shape[1]
                found[name] = unsigned(width, fallback, seed)
    return found


def rotate_inputs(matrix: Tensor, rotation: Rotation) -> None:
    """W <- W Q of (out, in)."""
    matrix.copy_(rotation(matrix.double()))


def rotate_outputs(name: str, module: nn.Module, rotation: Rotation) -> None:
    """W <- Q^T W and b <- Q^T b; of an embedding E <- E Q."""
    matrix = matrix_of(name, module)
    matrix.copy_(rotation(matrix.double().T.contiguous(), in_place=True).T)
    if getattr(module, "bias", None) is not None:
        module.bias.copy_(rotation(module.bias.double()))


def rotate_heads(model: nn.Module, attention: Attention, heads: Heads, fallback: Fallback, seed: int) -> None:
    """Rotate values within heads; the layer that reads them undoes it, and the rotation across heads."""
    names, outputs = any_sites(model, attention.value), any_sites(model, attention.output)
    within = unsigned(attention.head_dim, fallback, seed)
    across = unsigned(attention.num_heads, fallback, seed) if heads == "online" else identity(attention.num_heads)
    for value, output in zip(names, outputs):
        rotate_outputs(value, model.get_submodule(value), kronecker(identity(attention.num_key_value_heads), within))
        matrix = matrix_of(output, model.get_submodule(output))
        rotate_inputs(matrix, kronecker(identity(attention.num_heads), within))
        rotate_inputs(matrix, kronecker(across, identity(attention.head_dim)))


class Rotate:
    """Rotates a model before it is quantized; the options of `rotate`.

    Args:
        residual: Q of the residual stream: a randomised Hadamard matrix, or that of Gaussian numbers.
        heads: ``none``; ``merged``, within heads, without work at run time; ``online``, across heads too.
        feed_forward: rotate the hidden units, at run time.
        seed: of signs or Gaussian numbers.
        fallback: what to do where no Hadamard matrix fits: ``error``, ``blocks`` of the largest power of 2, or
            ``gaussian``.
        centre_all_embeddings: see `fuse_norms`.
    """

    def __init__(
        self,
        residual: Residual = "hadamard",
        heads: Heads = "online",
        feed_forward: bool = True,
        seed: int = 0,
        fallback: Fallback = "error",
        centre_all_embeddings: bool = False,
    ) -> None:
        for name, value, allowed in (
            ("residual", residual, get_args(Residual)),
            ("heads", heads, get_args(Heads)),
            ("fallback", fallback, get_args(Fallback)),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: expected one of {', '.join(allowed)}")
        self.residual, self.heads, self.feed_forward, self.seed = residual, heads, feed_forward, seed
        self.fallback, self.centre_all_embeddings = fallback, centre_all_embeddings

    def plan(self, model: nn.Module, spec: ModelSpec) -> RotationRecord:
        """What `apply` would do; see `planned`."""
        return planned(model, spec, *self._options)

    def apply(self, model: nn.Module, spec: ModelSpec) -> RotationRecord:
        """Rotate ``model`` in place; see `rotate`. Every rank does the same to its own copy."""
        return rotate(model, spec, *self._options, self.centre_all_embeddings)

    @property
    def _options(self) -> tuple[int, Residual, Heads, bool, Fallback]:
        """Those of `planned`."""
        return self.seed, self.residual, self.heads, self.feed_forward, self.fallback
