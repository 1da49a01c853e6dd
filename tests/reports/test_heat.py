import math

import pytest

from fulgurite.reports.canvas import INK
from fulgurite.reports.heat import dots_figure, heat_figure, limit_of, shortened, shown
from fulgurite.reports.images import png_bytes

LAYERS = [f"vision_tower.vision_model.encoder.layers.{i}" for i in range(50)]
NAMES = [f"{i}  expert_with_a_rather_long_name_{i}" for i in range(8)]
PAIRS = [f"{i}–{j}" for i in range(8) for j in range(i + 1, 8)]


def test_a_signed_scale_is_symmetric_and_a_share_begins_at_zero():
    signed = heat_figure([[0.3, -0.1]], ["a"], ["1", "2"], "t", "m", "signed")
    share = heat_figure([[0.3, 0.1]], ["a"], ["1", "2"], "t", "m", "share")
    assert signed.axes[0].images[0].get_clim() == (-0.5, 0.5)
    assert share.axes[0].images[0].get_clim() == (0.0, 0.5)
    colours = [figure.axes[0].images[0].cmap(0.5) for figure in (signed, share)]
    assert min(colours[0][:3]) > 0.9 > min(colours[1][:3])  # zero is pale
    for figure in (signed, share):
        assert len(figure.axes) == 2  # the picture and its colour bar


@pytest.mark.parametrize(("value", "limit"), [(0.0, 0.1), (0.1, 0.1), (-0.11, 0.2), (0.9, 1.0), (1.0, 1.0)])
def test_the_limit_is_a_round_number_that_nothing_is_beyond(value, limit):
    assert limit_of([0.01, value, math.nan]) == limit


def test_narrow_matrices_have_values_and_what_has_none_is_hatched():
    axes = heat_figure([[0.25, math.nan, -0.001]], ["a"], ["1", "2", "3"], "t", "m", "signed").axes[0]
    assert [(t.get_position(), t.get_text()) for t in axes.texts] == [((0, 0), "0.25"), ((2, 0), "0.00")]
    assert [c.get_hatch() for c in axes.collections] == ["////"]
    wide = heat_figure([[0.5] * 28], ["a"], PAIRS, "t", "m", "signed").axes[0]
    assert not wide.texts


def test_a_matrix_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="'t' is not 1 rows by 2 columns"):
        heat_figure([[0.5]], ["a"], ["1", "2"], "t", "m", "signed")


def test_numbers_and_names_for_reading():
    assert [shown(value) for value in (0.126, -0.126, -0.001)] == ["0.13", "−0.13", "0.00"]
    assert shortened("blocks.3") == "blocks.3"
    assert shortened(LAYERS[11]) == "…vision_model.encoder.layers.11"
    assert shortened("x" * 50) == "…" + "x" * 37


def test_dots_are_on_a_logarithmic_scale_where_values_are_far_apart():
    near = dots_figure({"a": [0.1, 0.2]}, ["x", "y"], "t", "m").axes[0]
    far = dots_figure({"a": [0.1, 20.0], "merged": [0.0, 1.0]}, ["x", "y"], "t", "m", "merged").axes[0]
    assert (near.get_xscale(), far.get_xscale()) == ("linear", "log")
    assert near.get_xlim()[0] == 0
    merged = far.lines[1]
    assert math.isnan(merged.get_xdata()[0])  # no change, no mark
    assert merged.get_xdata()[1] == 1
    assert merged.get_color() == INK


def test_no_two_of_sixteen_series_look_alike():
    axes = dots_figure({str(i): [0.1] for i in range(16)}, ["x"], "t", "m").axes[0]
    assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == 16


def test_a_model_without_any_change_is_drawn():
    png_bytes(dots_figure({"a": [0.0, math.nan]}, ["x", "y"], "t", "m"))


def ticks(axis):
    """Labels inside the view; matplotlib has more."""
    low, high = sorted(axis.get_view_interval())
    return [
        tick.label2 if tick.label2.get_visible() else tick.label1
        for tick in axis.get_major_ticks()
        if low <= tick.get_loc() <= high
    ]


LONG = "a note that is longer than the picture is wide, with prices in it: $5 and $6" * 2
CROWDED = {
    "values": lambda: heat_figure([[-0.9] * 6] * 20, LAYERS[:20], PAIRS[:6], "Cosine", "cosine", "signed", LONG),
    "colours": lambda: heat_figure([[-0.9] * 28] * 20, LAYERS[:20], PAIRS, "Cosine", "cosine", "signed", "note"),
    "small": lambda: heat_figure([[0.1] * 2] * 2, NAMES[:2], ["1", "2"], "Sign conflicts", "share", "share"),
    "dots": lambda: dots_figure({name: [0.01] * 20 for name in NAMES}, LAYERS[:20], "Size", "norm", None, LONG),
    "few rows": lambda: dots_figure({name: [0.01] for name in NAMES}, LAYERS[:1], "Size", "norm", None, LONG),
}


@pytest.mark.parametrize("case", CROWDED)
def test_nothing_overlaps_or_is_cut_in_a_crowded_picture(case):
    figure = CROWDED[case]()
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    width, height = figure.canvas.get_width_height()
    texts = [*figure.texts]
    for axes in figure.axes:
        if axes.axison:
            texts += [*axes.texts, *ticks(axes.xaxis), *ticks(axes.yaxis), axes.xaxis.label, axes._left_title]
    boxes = [t.get_window_extent(renderer).extents for t in texts if t.get_text() and t.get_visible()]
    for i, (left, low, right, high) in enumerate(boxes):
        assert min(left, low, width - right, height - high) >= 0
        for other_left, other_low, other_right, other_high in boxes[i + 1 :]:
            # Line boxes are taller than the letters in them; a fifth of a line is air.
            air = 0.2 * min(high - low, other_high - other_low)
            beside = min(right, other_right) <= max(left, other_left)
            assert beside or min(high, other_high) - max(low, other_low) <= air
