"""Which papers a method names in its own code."""

from __future__ import annotations

import re
import sys

ARXIV = re.compile(r"arXiv \d{4}\.\d{4,5}")


def papers_of(*methods: object) -> list[str]:
    """``arXiv 2306.01708`` and the like in the docstring of each class, or else of its file; each once."""
    return list(dict.fromkeys(paper for method in methods for paper in named_by(method)))


def named_by(method: object) -> list[str]:
    """The papers of one method."""
    kind = type(method)
    for text in (kind.__doc__, sys.modules[kind.__module__].__doc__):
        if found := ARXIV.findall(text or ""):
            return found
    return []
