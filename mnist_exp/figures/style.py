"""The style that all figures share, their canvas, and their way to files and pixels.

A figure shows itself in a notebook as it does in a file. Of matplotlib only the object-oriented
part is used: no pyplot, no choice of a backend. The style is matplotlib's process-wide state, so it
is set under a lock for as long as a figure is built or drawn, and put back.
"""

import functools
import io
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.textpath import text_to_path
from matplotlib.transforms import Bbox

DPI = 128  # a power of two: pixels / DPI * DPI is exact, so a figure has the pixels it asks for

# Okabe and Ito, "Color Universal Design" (2008): told apart with any common colour blindness.
BLUE, GREEN, ORANGE = "#0072b2", "#009e73", "#d55e00"
INK, DISCREET = "#1a1a1a", "#666666"
TITLE, TEXT, SMALL = 12.0, 10.0, 9.0  # points; legible at half size

# Pale yellow to dark blue: its lightness alone orders it, whatever hues are seen.
RANKED = matplotlib.colormaps["YlGnBu"]

Floats = npt.NDArray[np.floating[Any]]

STYLE: Any = {
    "axes.edgecolor": "#999999",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": TEXT,
    "figure.dpi": DPI,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "font.size": TEXT,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "pdf.fonttype": 42,  # TrueType, embedded: text stays text
    "savefig.dpi": "figure",
    "svg.fonttype": "path",  # the same in a viewer without the font
    "svg.hashsalt": "mnist-exp",  # ids inside an svg are random otherwise
    "text.color": INK,
    "text.hinting": "none",  # a third faster, and no uglier at this DPI
    "text.parse_math": False,  # a class may be named "$"
    "xtick.color": DISCREET,
    "ytick.color": DISCREET,
}
# What matplotlib writes of its own accord into each kind of file: it differs from day to day.
STAMPS = {"png": "Software", "svg": "Date", "pdf": "CreationDate"}
_lock = threading.Lock()


@contextmanager
def styled() -> Iterator[None]:
    with _lock, matplotlib.rc_context(STYLE):
        yield


class _Figure(Figure):
    """Shown where it is the value of a notebook's cell, as a PNG with the bytes of its file.

    Without pyplot nothing would be shown; with it, IPython would draw in another style, and would
    take a figure without axes for an empty one. A bundle goes before what it has for each class.
    """

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, bytes]:
        file = io.BytesIO()
        _write(self, file, "png")
        return {"image/png": file.getvalue()}


class Pixels(Artist):
    """RGBA pixels [H, W, 4] of the whole figure, as they are at its own resolution.

    `imshow` and `figimage` resample even where a pixel is a pixel: three times the time.
    """

    def __init__(self, rgba: npt.NDArray[np.uint8]) -> None:
        super().__init__()
        self._rgba = rgba

    def get_window_extent(self, renderer: Any = None) -> Bbox:
        figure = self.get_figure(root=True)
        assert figure is not None  # it has been added to one
        return Bbox(figure.transFigure.transform([(0, 0), (1, 1)]))

    def draw(self, renderer: Any) -> None:
        figure = self.get_figure(root=True)
        assert figure is not None
        # 1, also in a file of vectors, unless another resolution is asked for.
        scale = figure.dpi * renderer.get_image_magnification() / DPI
        rgba = self._rgba if math.isclose(scale, 1) else _resampled(self._rgba[None], scale)[0]
        context = renderer.new_gc()
        # From the bottom row, as y goes up; not at 0 in a file that is cut to what is drawn.
        renderer.draw_image(context, *self.get_window_extent().p0, rgba[::-1])
        context.restore()


def canvas(width: int, height: int, title: str, caption: str = "") -> Figure:
    """A figure of so many pixels, with its title and a line under it."""
    figure = _Figure(figsize=(width / DPI, height / DPI))
    FigureCanvasAgg(figure)
    for text, size, colour, top in ((title, TITLE, INK, 9), (caption, SMALL, DISCREET, 36)):
        if text:
            figure.text(8 / width, 1 - top / height, text, fontsize=size, color=colour, va="top")
    return figure


def text_width(text: str, size: float) -> float:
    """The width in pixels of one line of text of `size` points."""
    font = FontProperties(family=STYLE["font.family"], size=size)
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, False)
    return float(width) * DPI / 72


@functools.cache
def _characters() -> frozenset[int]:
    return frozenset(get_font(findfont(STYLE["font.family"])).get_charmap())


def shorten(text: str, length: int = 16) -> str:
    """One line of at most `length` characters that the font has; matplotlib warns of others."""
    text = "".join(c if ord(c) in _characters() else "\ufffd" for c in " ".join(text.split()))
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def percent(value: float, _: object = None) -> str:
    return f"{100 * value:.5g}%"


def _scale(side: int, wanted: int) -> float:
    """How many pixels a pixel gets, so that a side has about as many as wanted: whole if it can."""
    return max(1, wanted // side) if side <= 1.43 * wanted else wanted / side


def _resampled(images: npt.NDArray[Any], scale: float) -> npt.NDArray[Any]:
    """[N, H, W, ...] -> [N, H * scale, W * scale, ...], rounded up; each pixel is the nearest."""
    sides = images.shape[1:3]
    rows, columns = ((np.arange(math.ceil(n * scale)) / scale).astype(int) for n in sides)
    tiles: npt.NDArray[Any] = images[:, rows.clip(max=sides[0] - 1)]
    return tiles.take(columns.clip(max=sides[1] - 1), axis=2)


def lowest_worth_showing(results: Floats) -> float:
    """From which result on, where higher is better, a picture of a sweep makes distinctions.

    All of them, but for those more than four times as far below the best as the median: one cell
    at chance level must not drown the differences among the good ones. At least half a percentage
    point, so that mere noise isn't painted as a difference.
    """
    best, median = float(results.max()), float(np.median(results))
    return min(max(float(results.min()), best - 4 * (best - median)), best - 0.005)


def pixels(figure: Figure) -> npt.NDArray[np.uint8]:
    """The figure as RGB, uint8 [H, W, 3]."""
    canvas: Any = FigureCanvasAgg(figure)
    with styled():
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save(figure: Figure, path: str | Path) -> None:
    """Writes a .png, .svg or .pdf, the same bytes for the same figure: no date, no version.

    Raises ValueError for any other suffix.
    """
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in STAMPS:
        allowed = ", ".join(f".{kind}" for kind in STAMPS)
        raise ValueError(f"{path}: suffix {Path(path).suffix!r}, a figure is saved as {allowed}")
    _write(figure, path, kind)


def _write(figure: Figure, file: str | Path | io.BytesIO, kind: str) -> None:
    with styled():
        figure.savefig(file, format=kind, metadata={STAMPS[kind]: None})
