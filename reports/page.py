"""A report page: one HTML file that needs nothing beside it.

Styles are inline, pictures are ``data:`` URLs, there is no script, and the page's own security policy forbids
to load anything else. Whoever makes a section's HTML escapes the data in it; title, subtitle and facts are
escaped here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from string import Template
from typing import Any, Protocol, runtime_checkable

from fulgurite.samples import Sample


@dataclass(frozen=True)
class Section:
    """One part of a report.

    Args:
        title: heading, plain text.
        html: body; data in it is escaped already.
        order: sections are sorted by it, those of equal order stay as given.
        files: pictures or tables to be written beside the page, by file name.
        printed: what the terminal shows of it, a rich renderable; None shows nothing.
    """

    title: str
    html: str
    order: int = 0
    files: Mapping[str, bytes] = field(default_factory=dict)
    printed: Any = None


@runtime_checkable
class ReportSource(Protocol):
    """What can contribute to a report, usually a LightningModule."""

    def report_sections(self, samples: Sequence[Sample]) -> list[Section]:
        """Sections on the evaluation that has just ended.

        Args:
            samples: what was evaluated, for questions and pictures; may be empty.
        """
        ...


def render_page(title: str, subtitle: str, sections: Sequence[Section], facts: Mapping[str, str]) -> str:
    """The whole page as text.

    Args:
        title: of the page.
        subtitle: one line under it.
        sections: in any order; see `Section`.
        facts: versions, seeds and the like, as label and value; long values are folded away.
    """
    parts = sorted(sections, key=lambda s: s.order)
    anchors = _anchors([s.title for s in parts] + ["Run"])
    body = [_section(s.title, s.html, a) for s, a in zip(parts, anchors)]
    body.append(_section("Run", _facts(facts), anchors[-1]))
    links = [f'<li><a href="#{a}">{escape(t)}</a></li>' for t, a in zip([*(s.title for s in parts), "Run"], anchors)]
    template = Template(files("fulgurite.reports").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(title), subtitle=escape(subtitle), contents="".join(links), sections="\n".join(body)
    )


def _section(title: str, body: str, anchor: str) -> str:
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>\n{body}\n</section>'


def _facts(facts: Mapping[str, str]) -> str:
    short = {k: v for k, v in facts.items() if "\n" not in v}
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in short.items())
    folded = "".join(
        f"<details><summary>{escape(k)}</summary><pre>{escape(v)}</pre></details>"
        for k, v in facts.items()
        if k not in short
    )
    return f'<dl class="facts">{rows}</dl>{folded}'


def _anchors(titles: Sequence[str]) -> list[str]:
    found: list[str] = []
    for title in titles:
        base = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        number = 2
        anchor = base
        while anchor in found:
            anchor, number = f"{base}-{number}", number + 1
        found.append(anchor)
    return found
