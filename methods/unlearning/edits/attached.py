"""Edits that are there for a while: no parameter of the model is written, so that leaving restores every bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from fulgurite.methods.unlearning.edits.base import Edit


@contextlib.contextmanager
def attached(site: nn.Module, *edits: Edit) -> Iterator[None]:
    """Within it ``site`` computes with its weight as these edits change it, one after the other."""

    def change(module: nn.Module, args: tuple, output: object) -> object:
        for edit in edits:
            output = edit(args[0], output)
        return output

    hook = site.register_forward_hook(change)
    try:
        yield
    finally:
        hook.remove()
