"""Fold the scale and shift of norms into the linear layers that read them (SliceGPT, QuaRot, RSQ: arXiv 2503.01820).

    RMSNorm      W <- W diag(g),     then g = 1
    LayerNorm    W <- W diag(g), b <- b + W beta, and whatever is added to the residual stream is centred, so that the
                 norm is x / sqrt(mean(x^2) + eps)

The model computes what it did before, and its residual stream may then be rotated. Folding is done in float64.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from fulgurite.methods.statistics.gram import input_width
from fulgurite.methods.structure import ModelSpec, any_sites

NormKind = Literal["rms", "rms_plus_one", "layer"]


class UnitRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), in float32 or wider."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@torch.no_grad()
def untie_head(model: nn.Module, spec: ModelSpec) -> bool:
    """Give the head a weight of its own, where it shares that of an embedding; whether it did."""
    if spec.head is None:
        return False
    head = model.get_submodule(spec.head)
    owners = [name for name, module in model.named_modules() if getattr(module, "weight", None) is head.weight]
    if owners == [spec.head]:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    return True


@torch.no_grad()
def fuse_norms(model: nn.Module, spec: ModelSpec, centre_all_embeddings: bool = False) -> dict[str, NormKind]:
    """Fold all norms of ``spec.norm_linear_pairs``, in place, and untie the head. Logits stay what they are.

    Args:
        model: before normalised: its residual stream passes through no norm.
        spec: with ``norm_linear_pairs``, and ``writers`` of its towers.
        centre_all_embeddings: centre the rows of the embeddings of RMSNorm models too, which changes what they compute;
            as the published code does.

    Returns:
        norm -> what it was. A LayerNorm is now a `UnitRMSNorm`; any other is the same module, without effect.

    Raises:
        LookupError: a pattern matches nothing.
        ValueError: a module that is no such norm, a linear layer that reads two, a linear layer in a block that
            neither reads a norm nor writes to the stream, or both kinds of norms on streams of one width.
    """
    kinds = kinds_of_norms(model, spec)
    untie_head(model, spec)
    readers = readers_of_norms(model, spec)
    layer_widths = {model.get_submodule(name).weight.numel() for name, kind in kinds.items() if kind == "layer"}
    for name, linears in readers.items():
        norm = model.get_submodule(name)
        gain = norm.weight.double() + (1 if kinds[name] == "rms_plus_one" else 0)
        shift = norm.bias.double() if kinds[name] == "layer" and norm.bias is not None else None
        for linear in linears:
            absorb(linear, model.get_submodule(linear), gain, shift)
        neutralize(model, name, kinds[name])
    for tower in spec.towers:
        if tower.width in layer_widths or centre_all_embeddings:
            for name, module in writers(model, spec, tower.name):
                if tower.width in layer_widths or isinstance(module, nn.Embedding):
                    centre(name, module)
    return kinds


def kinds_of_norms(model: nn.Module, spec: ModelSpec) -> dict[str, NormKind]:
    """What every norm is that `fuse_norms` would fold, found possible. Nothing changes. Raises as `fuse_norms`."""
    readers = readers_of_norms(model, spec)
    kinds = {name: norm_kind(name, model.get_submodule(name)) for name in readers}
    layer_widths = {model.get_submodule(name).weight.numel() for name, kind in kinds.items() if kind == "layer"}
    if mixed := [n for n, k in kinds.items() if k != "layer" and model.get_submodule(n).weight.numel() in layer_widths]:
        raise ValueError(f"{mixed[0]} is no LayerNorm, but others of its width are")
    check_complete(model, spec, readers)
    return kinds


def readers_of_norms(model: nn.Module, spec: ModelSpec) -> dict[str, list[str]]:
    """Norm -> linear layers that read it; see `ModelSpec.norm_linear_pairs`."""
    blocks = spec.all_block_names(model)
    readers: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    for norm_pattern, linear_pattern in spec.norm_linear_pairs:
        linears = any_sites(model, linear_pattern)
        for norm in any_sites(model, norm_pattern):
            block = next((f"{name}." for name in blocks if norm.startswith(f"{name}.")), "")
            own = [linear for linear in linears if linear.startswith(block)]
            if not own:
                raise LookupError(f"no linear layer {linear_pattern!r} reads {norm}")
            for linear in own:
                if owner.setdefault(linear, norm) != norm:
                    raise ValueError(f"{linear} reads {owner[linear]} and {norm}: it can absorb only one")
            readers[norm] = [*readers.get(norm, []), *(each for each in own if each not in readers.get(norm, []))]
    if not readers:
        raise ValueError("this model's spec has no norm_linear_pairs: they say which norms can be folded")
    return readers


def writers(model: nn.Module, spec: ModelSpec, tower_name: str) -> Iterator[tuple[str, nn.Module]]:
    """Embeddings and linear layers that add to a tower's stream; those that share a weight, once."""
    tower = next(tower for tower in spec.towers if tower.name == tower_name)
    patterns = [re.escape(tower.embedding)] if tower.embedding is not None else []
    seen: set[int] = set()
    for pattern in (*patterns, *tower.writers):
        for name in any_sites(model, pattern):
            module = model.get_submodule(name)
            if id(module.weight) not in seen:
                seen.add(id(module.weight))
                yield name, module


def check_complete(model: nn.Module, spec: ModelSpec, readers: dict[str, list[str]]) -> None:
    """Raise ValueError where a linear layer of a block is left out by the spec."""
    known = {linear for linears in readers.values() for linear in linears}
    for tower in spec.towers:
        known |= {name for name, _ in writers(model, spec, tower.name)}
    for block in spec.all_block_names(model):
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            if is_linear(module) and name not in known:
                raise ValueError(f"{name} is neither read from a norm nor among the writers of the model's spec")


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer of any kind."""
    try:
        input_width(module)
    except ValueError:
        return False
    return True


def norm_kind(name: str, norm: nn.Module) -> NormKind:
    """What a norm computes, found by trying it.

    Raises:
        ValueError: none of the three.
    """
    weight = getattr(norm, "weight", None)
    if isinstance(norm, nn.LayerNorm):
        if weight is None:
            raise ValueError(f"{name}: a LayerNorm without weights cannot be folded")
        return "layer"
    if isinstance(weight, Tensor) and weight.dim() == 1:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(4, len(weight), generator=generator).to(weight.device, weight.dtype)
        found, plain = norm(x).double(), UnitRMSNorm(eps_of(name, norm))(x.double())
        # Some libraries compute in float32 whatever the type is.
        tolerance = 16 * max(torch.finfo(kind).eps for kind in (weight.dtype, torch.float32))
        for kind, gain in (("rms", weight.double()), ("rms_plus_one", weight.double() + 1)):
            if torch.allclose(found, plain * gain, rtol=tolerance, atol=tolerance):
                return kind
    raise ValueError(f"{name}: {type(norm).__name__} is neither a LayerNorm nor x / rms(x) times its weight")


def eps_of(name: str, norm: nn.Module) -> float:
    """The eps of a norm, under the names that libraries give it."""
    for attribute in ("eps", "variance_epsilon", "epsilon"):
        value = getattr(norm, attribute, None)
        if isinstance(value, float):
            return value
    raise ValueError(f"{name}: {type(norm).__name__} has no eps")


def matrix_of(name: str, module: nn.Module) -> Tensor:
    """A view of a linear layer's weight as (out, in), or of an embedding's transposed, (D, rows): outputs first.

    Raises:
        ValueError: neither.
    """
    if isinstance(module, nn.Embedding):
        return module.weight.data.T
    try:
        _, transposed = input_width(module)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return module.weight.data.T if transposed else module.weight.data


def absorb(name: str, linear: nn.Module, gain: Tensor, shift: Tensor | None) -> None:
    """W <- W diag(g), b <- b + W beta; a layer without b gets one."""
    matrix = matrix_of(name, linear)
    wide = matrix.double()
    if shift is not None and shift.any():
        added = wide @ shift
        if linear.bias is None:
            linear.bias = nn.Parameter(added.to(matrix.dtype), requires_grad=linear.weight.requires_grad)
        else:
            linear.bias.copy_(linear.bias.double() + added)
    matrix.copy_(wide * gain)


def neutralize(model: nn.Module, name: str, kind: NormKind) -> None:
    """Make a norm x / sqrt(mean(x^2) + eps)."""
    norm = model.get_submodule(name)
    if kind == "layer":
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, UnitRMSNorm(norm.eps))
    else:
        norm.weight.fill_(1 if kind == "rms" else 0)


def centre(name: str, module: nn.Module) -> None:
    """Take the mean over outputs away, so that what it adds to the stream has mean 0."""
    matrix = matrix_of(name, module)
    wide = matrix.double()
    matrix.copy_(wide - wide.mean(0, keepdim=True))
    if getattr(module, "bias", None) is not None:
        module.bias.copy_(module.bias.double() - module.bias.double().mean())
