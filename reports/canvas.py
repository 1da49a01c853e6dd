"""What all figures are drawn on, and their colours; positions and sizes are in inches from the lower left corner.

Colours are safe for the common kinds of colour blindness (Okabe and Ito for lines; for matrices one scale from light to
dark, and one with two ends where there is a sign).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, RULE = "#1d2328", "#5a646c", "#dcd9d1"
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4d4d4d", "#8a6d00")
SHADES = ("#f6f4ec", "#cfe2df", "#7db7bb", "#2b7f8d", "#0b3f4d")
MARKERS = "osD^vPX*"
CHARACTER = 0.082
ENDS = ("#7f3b08", "#d9822b", "#f7d9b0", "#f6f4ec", "#bfdcd9", "#3d8d99", "#0b3f4d")


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def new_axes(figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
    """Axes whose lower left corner is at (x, y)."""
    total = figure.get_figwidth(), figure.get_figheight()
    return figure.add_axes((x / total[0], y / total[1], width / total[0], height / total[1]))


def put_text(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    """Text at (x, y), in the style of `matplotlib.text.Text`."""
    figure.text(x / figure.get_figwidth(), y / figure.get_figheight(), text, **style)
