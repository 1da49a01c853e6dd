"""Sections on compressed models, checked against figures computed by hand."""

import re

from fulgurite.methods.compression import LayerReport
from fulgurite.reports.compression import (
    Point,
    compression_sections,
    family_of,
    tradeoff_figure,
    tradeoff_section,
)


def report(block, kind, sparsity, bits=None, kept=0.0, tower="text", shape=(4, 8)):
    name = f"{tower}.{block}.{kind}"
    return LayerReport(name, tower, f"{tower}.{block}", shape, sparsity, bits, kept, 0.01 * (block + 1), None, 0.5)


def cells(html, first):
    row = next(row for row in re.findall(r"<tr.*?</tr>", html, re.DOTALL) if re.search(rf">{first}</t[hd]>", row))
    return [re.sub(r"<.*?>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)]


def test_a_row_per_tower_weighs_layers_by_their_size():
    layers = [
        report(0, "up", 0.5, shape=(4, 8)),
        report(1, "up", 0.25, shape=(8, 12)),
        report(0, "up", 0.0, bits=4, kept=0.25, tower="video", shape=(4, 16)),
    ]
    (section,) = compression_sections("pruned", layers)
    # (32 * 0.5 + 96 * 0.25) / 128, and 4 * 0.75 + 32 * 0.25
    assert cells(section.html, "text")[1:5] == ["2", "128", "31.2 %", "16.00"]
    assert cells(section.html, "video")[1:5] == ["1", "64", "0.0 %", "11.00"]
    # (128 * 0.3125 + 64 * 0) / 192, and (128 * 16 + 64 * 11) / 192
    assert cells(section.html, "all")[1:5] == ["3", "192", "20.8 %", "14.33"]


def test_pictures_are_of_what_differs_between_layers():
    alike = [report(block, kind, 0.5) for block in range(3) for kind in ("up", "down")]
    (section,) = compression_sections("pruned", alike)
    assert section.html.count("<img") == 1  # errors
    uneven = [report(block, kind, 0.1 * block, bits=2 + block) for block in range(3) for kind in ("up", "down")]
    (section,) = compression_sections("both", uneven, {"text.0": 2.0, "text.1": 1.0})
    assert section.html.count("<img") == 4
    for layer in uneven:
        assert layer.name in section.html


def test_names_are_escaped():
    (section,) = compression_sections("pruned", [report(0, "<b>up", 0.5)])
    assert "<b>up" not in section.html


def test_models_of_one_family_are_joined_in_order_of_size():
    points = [Point("gptq 4 bits", 4, 60.0), Point("gptq 2 bits", 2, 40.0), Point("rtn 4 bits", 4, 55.0)]
    section = tradeoff_section(points, "bits per weight", "accuracy, %")
    rows = re.findall(r"(gptq|rtn) (\d) bits", section.html)
    assert rows == [("gptq", "2"), ("gptq", "4"), ("rtn", "4")]
    assert {family_of(point.name) for point in points} == {"gptq", "rtn"}
    assert family_of("wanda 50 %") == "wanda"
    assert family_of("dense") == "dense"


def test_a_model_alone_in_its_family_keeps_its_whole_name():
    points = [Point("LST /8", 1.0, 2.0), Point("rtn 4", 2.0, 3.0), Point("rtn 3", 1.0, 1.0)]
    (axes,) = tradeoff_figure(points, "size", "score", "title").axes
    assert [line.get_label() for line in axes.lines] == ["LST /8", "rtn"]
