"""N:M patterns: of every M consecutive inputs of a row, at most N weights are kept."""

from __future__ import annotations

import re


def kept_of(pattern: str) -> tuple[int, int]:
    """("2:4") -> (2, 4): kept weights, and of how many.

    Raises:
        ValueError: it is not written N:M with 1 <= N <= M.
    """
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    kept, total = map(int, found.groups()) if found else (0, 0)
    if not 1 <= kept <= total:
        raise ValueError(f"pattern={pattern!r}: expected N:M with N of every M weights kept, as in 2:4")
    return kept, total
