"""Which entries of a model a sparse mask trains: the highest scores of all its tensors together (arXiv 2111.09839).

Positions count through the concatenation of all tensors; equal scores go to the lowest position.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fulgurite.methods.exact_masks import largest_of_all


def position_type(total: int) -> torch.dtype:
    """The smallest integer type that counts through ``total`` entries."""
    return torch.int32 if total <= 2**31 else torch.int64


def matching(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """Names that some full pattern matches.

    Raises:
        LookupError: a pattern matches none.
    """
    found: set[str] = set()
    for pattern in patterns:
        some = {name for name in names if re.fullmatch(pattern, name)}
        if not some:
            raise LookupError(f"whole: pattern {pattern!r} matches none of {len(names)} tensors, as {names[0]!r}")
        found |= some
    return found


def num_chosen(total: int, density: float, heads: int) -> int:
    """int(P rho), the entries of a mask, of which ``heads`` are those of tensors that train whole.

    Raises:
        ValueError: a density outside (0, 1], or one that has no room for the heads or leaves nothing to train.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density={density}: expected 0 < density <= 1")
    count = int(total * density)
    if count < max(heads, 1):
        raise ValueError(
            f"density={density} of {total} parameters are {count}, and the tensors that train whole have {heads}: they "
            f"count too, so set density to {max(heads, 1) / total:.6g} or more"
        )
    return count


def chosen_positions(
    scores: Mapping[str, Tensor], sizes: Mapping[str, int], count: int, whole: frozenset[str] | set[str] = frozenset()
) -> Tensor:
    """(count,) sorted positions of all entries of ``whole`` tensors and of the highest scores of the others.

    By the threshold that a histogram gives, without a sort. Asks for every tensor's scores three times; memory: one
    tensor's scores and mask, and the positions.

    Args:
        scores: name -> scores of a tensor, in any shape; not negative.
        sizes: name -> entries, in the order in which positions count through the tensors.
        count: of all positions, at least the entries of ``whole``.
        whole: names of tensors of which every entry is chosen.

    Raises:
        LookupError: a tensor has no scores, or scores are of none.
        ValueError: scores of another size, or negative or NaN ones.
    """
    asked = [name for name in sizes if name not in whole]
    missing, unknown = [n for n in asked if n not in scores], [n for n in scores if n not in sizes]
    if missing or unknown:
        raise LookupError(f"scores must be those of the masked tensors: missing {missing[:5]}, unknown {unknown[:5]}")
    rest = {name: sizes[name] for name in asked}
    found = largest_of_all(scores.__getitem__, rest, count - sum(sizes[name] for name in whole))
    parts, offset, dtype = [], 0, position_type(sum(sizes.values()))
    masks = iter(found)
    for name, size in sizes.items():
        if name in whole:
            inside = torch.arange(size)
        else:
            inside = next(masks)[1].flatten().nonzero().squeeze(1)
        parts.append((inside + offset).to(dtype))
        offset += size
    device = max((part.device for part in parts), key=lambda device: device.type != "cpu")
    return torch.cat([part.to(device) for part in parts])


def common_entries(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Where the positions that two sorted lists have in common stand in each: two (N,) indices."""
    if not len(old) or not len(new):
        none = torch.zeros(0, dtype=torch.int64, device=old.device)
        return none, none
    place = torch.searchsorted(old, new).clamp_(max=len(old) - 1)
    kept = (old[place] == new).nonzero().squeeze(1)
    return place[kept], kept
