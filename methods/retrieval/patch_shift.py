"""Patches that change places between neighbouring frames on their way into attention (TS2-Net, arXiv 2207.07852).

Of the N tokens of a frame and step = N // 7, positions 1, 1 + step, .. come from the frame before, and positions 4,
4 + step, .. from the frame after; the first and the last frame, which lack one, keep their own. All are read from the
unshifted tokens. Where both rules name a position (step 1 or 3) the second holds, as in the published code.

Only what attention takes in is shifted, so the place is the output of the norm before it; the residual is not.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

SHARES = 7
# Frames of a video by id of the shift. A context variable, so that what is computed again in the backward pass sees it.
_FRAMES: contextvars.ContextVar[Mapping[int, int]] = contextvars.ContextVar(
    "fulgurite_frames", default=MappingProxyType({})
)


def shift_patches(x: Tensor, frames: int) -> Tensor:
    """Shift patches between the frames of each video.

    Args:
        x: (V * F, N, D), video by video.
        frames: F.

    Raises:
        ValueError: the rows are not whole videos, or a frame has fewer than 7 tokens.
    """
    rows, tokens, width = x.shape
    if frames < 1 or rows % frames:
        raise ValueError(f"patch shift: {rows} frames are not whole videos of {frames}")
    if tokens < SHARES:
        raise ValueError(
            f"patch shift: a frame has {tokens} tokens and needs {SHARES} or more; use smaller patches, or shift none"
        )
    step = tokens // SHARES
    own = x.reshape(-1, frames, tokens, width)
    shifted = own.clone()
    shifted[:, 1:, 1::step] = own[:, :-1, 1::step]
    shifted[:, :-1, 4::step] = own[:, 1:, 4::step]
    return shifted.view(rows, tokens, width)


class PatchShift:
    """A forward hook that shifts the output of a module, within `frames`; elsewhere the output passes unchanged.

        shift = PatchShift()
        shift.attach(block.ln_1 for block in blocks[10:12])
        with shift.frames(12):
            tower(frames)                       # 12 frames of each video, video by video
        tower(pictures)

    A copy of a model, by `copy.deepcopy` or pickle, has a copy of the hook; keep both in one object to have the hook
    that belongs. What `recomputation.recomputed` runs again in the backward pass lies within `frames` again.
    """

    def attach(self, modules: Iterable[nn.Module]) -> None:
        """Hook these modules, whose outputs are (V * F, N, D). No name of a parameter changes."""
        for module in modules:
            module.register_forward_hook(self)

    @contextmanager
    def frames(self, count: int) -> Iterator[None]:
        """All that runs within belongs to videos of so many frames each."""
        token = _FRAMES.set(MappingProxyType({**_FRAMES.get(), id(self): count}))
        try:
            yield
        finally:
            _FRAMES.reset(token)

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """As a hook: the shifted output, or the same outside of `frames`."""
        count = _FRAMES.get().get(id(self))
        return output if count is None else shift_patches(output, count)
