from html.parser import HTMLParser

import torch

from fulgurite.reports import Section, render_page
from fulgurite.reports.images import img_tag, thumbnail_tag
from fulgurite.reports.plots import matrix_figure
from fulgurite.reports.tables import html_table

HOSTILE = "<script>alert('x')</script>&\"$title ${title}"
VOID = {"meta", "img", "br", "link", "input"}


class Reader(HTMLParser):
    """Collects tags and text, and checks that every tag is closed by its own end tag."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def test_texts_from_data_are_shown_as_they_are_and_run_nothing():
    table = html_table([HOSTILE], [[HOSTILE]])
    page = render_page(HOSTILE, HOSTILE, [Section(HOSTILE, table)], {HOSTILE: HOSTILE, "long": f"{HOSTILE}\nmore"})
    reader = read(page)
    assert not [tag for tag, _ in reader.tags if tag == "script"]
    # title, h1, subtitle, contents, heading, two cells, label and value
    assert sum(text == HOSTILE for text in reader.text) == 9
    assert f"{HOSTILE}\nmore" in reader.text


def test_the_page_needs_no_other_file():
    figure = matrix_figure([[0.5]], ["zero-shot"], ["a"], "m")
    thumbnail = thumbnail_tag(torch.zeros(3, 120, 160, dtype=torch.uint8), "frame 0")
    reader = read(render_page("t", "s", [Section("Pictures", img_tag(figure, "m") + thumbnail)], {}))
    assert sum(tag == "img" for tag, _ in reader.tags) == 2
    for tag, attributes in reader.tags:
        assert tag not in ("script", "link", "iframe", "object")
        assert not [name for name in attributes if name.startswith("on")]
        if "src" in attributes:
            assert attributes["src"].startswith("data:image/")
        if "href" in attributes:
            assert attributes["href"].startswith("#")
    assert "url(" not in "".join(str(a) for _, a in reader.tags)


def test_contents_follow_the_order_and_lead_to_the_sections():
    sections = [Section("Same", "1", order=2), Section("Same", "2", order=1), Section("Überblick", "3")]
    reader = read(render_page("t", "s", sections, {}))
    targets = [a["href"][1:] for tag, a in reader.tags if tag == "a"]
    assert targets == [a["id"] for tag, a in reader.tags if tag == "section"]
    assert len(set(targets)) == 4
    assert [t.strip() for t in reader.text if t.strip() in ("1", "2", "3")] == ["3", "2", "1"]
