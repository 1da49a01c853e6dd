"""Which papers a method names in its own code."""

from __future__ import annotations

import re
import sys

ARXIV = re.compile(r"arXiv \d{4}\.\d{4,5}")


def papers_of(method: object) -> list[str]:
    """``arXiv 2306.01708`` and the like in the docstring of the class, or else of its file."""
    kind = type(method)
    for text in (kind.__doc__, sys.modules[kind.__module__].__doc__):
        if found := ARXIV.findall(text or ""):
            return list(dict.fromkeys(found))
    return []
