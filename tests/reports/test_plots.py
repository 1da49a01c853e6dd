import math

import matplotlib
import pytest

from fulgurite.reports.images import png_bytes
from fulgurite.reports.plots import (
    Panel,
    bars_figure,
    confusion_figure,
    lines_figure,
    matrices_figure,
    matrix_figure,
)

MATRIX = [[0.1, 0.204], [0.9, math.nan], [0.5, 1.0]]
ROWS, COLUMNS = ["zero-shot", "after a", "after b"], ["a", "b"]


def cell_texts(axes):
    return {t.get_position(): t.get_text() for t in axes.texts}


def test_cells_hold_percent_and_nan_stays_blank():
    figure = matrix_figure(MATRIX, ROWS, COLUMNS, "dynamic")
    assert cell_texts(figure.axes[0]) == {
        (0, 0): "10.0",
        (1, 0): "20.4",
        (0, 1): "90.0",
        (0, 2): "50.0",
        (1, 2): "100.0",
    }
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ROWS


def test_the_line_runs_above_the_first_trained_row_of_every_column():
    (line,) = matrix_figure(MATRIX, ROWS, COLUMNS, "m", trained_from=[1, None]).axes[0].lines
    assert list(zip(*line.get_data())) == [(-0.5, 0.5), (0.5, 0.5), (0.5, 2.5), (1.5, 2.5)]


def test_panels_share_one_colour_scale():
    figure = matrices_figure([Panel("m", MATRIX), Panel("n", [[0.0, 0.3]] * 3)], ROWS, COLUMNS)
    scales = {axes.images[0].get_clim() for axes in figure.axes}
    assert scales == {(0.0, 1.0)}


def test_matrix_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="'m' is not 3 rows by 3 columns"):
        matrix_figure(MATRIX, ROWS, ["a", "b", "c"], "m")


def test_confusion_shows_shares_of_the_row_and_counts():
    texts = cell_texts(confusion_figure([[3, 1], [0, 0]], ["a", "b"]).axes[0])
    assert {text for (x, y), text in texts.items() if y < 0.5} == {"75 %", "3", "25 %", "1"}
    assert len(texts) == 4


def test_nothing_overlaps_in_a_crowded_picture():
    names = [f"domain_{i}_name" for i in range(7)]
    rows = ["zero-shot", *(f"after {n}" for n in names)]
    matrix = [[0.5 + 0.001 * i for i in range(7)] for _ in rows]
    lines = lines_figure([Panel("m", matrix)], rows, names, [i + 1 for i in range(7)])
    matrices = matrices_figure([Panel("m", matrix), Panel("n", matrix)], rows, names, None, "title", "subtitle")
    for figure in (lines, matrices):
        renderer = figure.canvas.get_renderer()
        figure.draw(renderer)
        width, height = figure.canvas.get_width_height()
        axes = figure.axes[0]
        labels = [*axes.texts, *(axes.get_xticklabels() if figure is matrices else [])]
        boxes = [t.get_window_extent(renderer) for t in labels if t.get_text()]
        for i, box in enumerate(boxes):
            assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= 0
            for other in boxes[i + 1 :]:
                # Line boxes are taller than the letters in them; a tenth of a line is air.
                assert min(box.x1, other.x1) <= max(box.x0, other.x0) or (
                    min(box.y1, other.y1) - max(box.y0, other.y0) <= 0.1 * box.height
                )


def test_pictures_are_reproducible_and_leave_pyplot_alone():
    def draw() -> bytes:
        return png_bytes(bars_figure(["a", "b"], [0.5, math.nan], [0.1, math.nan], 0, [[0.4, 0.6], []]))

    before = dict(matplotlib.rcParams)
    assert draw() == draw()
    assert draw().startswith(b"\x89PNG")
    assert dict(matplotlib.rcParams) == before
