"""Rows of results from all ranks on the one that writes them."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def gather_rows(rows: list[Any]) -> list[Any]:
    """The rows of all ranks in order of rank, on rank 0; nothing on the others. A collective where there are ranks.

    Rank 0 holds all rows, twice for a moment; the others hold their own.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(rows, parts)
    return [row for part in parts or [] for row in part]
