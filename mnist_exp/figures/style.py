"""The look that all figures share, their canvas, and their way to files and pixels.

Only the object-oriented part of matplotlib is used: no pyplot, no choice of a backend. The style is
matplotlib's process-wide state, so it is set under a lock for as long as a figure is built or
drawn, and put back.
"""

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
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.textpath import text_to_path
from matplotlib.transforms import Bbox

FONT = "DejaVu Sans"  # comes with matplotlib: the same picture on every machine
CHARACTERS = frozenset(get_font(findfont(FONT)).get_charmap())  # matplotlib warns of others
DPI = 128  # a power of two: pixels / DPI * DPI is exact, so a figure has the pixels it asks for
EDGE = 8  # pixels between a figure's content and its left or right edge

# Okabe and Ito, "Color Universal Design" (2008): told apart with any common colour blindness.
BLUE, GREEN, ORANGE = "#0072b2", "#009e73", "#d55e00"
INK, DISCREET = "#1a1a1a", "#666666"
TITLE, TEXT, SMALL = 12.0, 10.0, 9.0  # points; legible at half size
# Pale yellow to dark blue: its lightness alone orders it, whatever hues are seen.
RANKED = matplotlib.colormaps["YlGnBu"]

Floats = npt.NDArray[np.floating[Any]]
Bytes = npt.NDArray[np.uint8]

STYLE: Any = {
    "axes.edgecolor": "#999999",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": TEXT,
    "figure.dpi": DPI,
    "figure.facecolor": "white",
    "font.family": FONT,
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
    """Set the style of all figures for a block, or for the function that this decorates."""
    with _lock, matplotlib.rc_context(STYLE):
        yield


class PixelFigure(Figure):
    """A figure that is laid out in pixels from its top left corner.

    Its content, of which width and height are given, is under a title, which is cut after `longest`
    characters, and a caption, if there is one. It is as much wider than the content as these need.
    """

    def __init__(
        self, content: tuple[float, float], title: str, caption: str = "", longest: int = 72
    ) -> None:
        title, caption = shorten(title, longest), shorten(caption, 110)
        self.top = 56 if caption else 32  # where the content begins
        wide = max(content[0], text_width(title, TITLE), text_width(caption, SMALL))
        self.width, self.height = 2 * EDGE + math.ceil(wide), self.top + math.ceil(content[1])
        super().__init__(figsize=(self.width / DPI, self.height / DPI))
        self._rgba: Bytes | None = None
        for text, size, colour, y in ((title, TITLE, INK, 9), (caption, SMALL, DISCREET, 36)):
            if text:
                self.write(EDGE, y, text, size, colour, va="top")

    def write(self, x: float, y: float, text: str, size: float, colour: str, **more: Any) -> None:
        """Write a text of `size` points at a place in pixels; `more` is for `Figure.text`."""
        x, y = x / self.width, 1 - y / self.height
        self.text(x, y, text, fontsize=size, color=colour, **more)

    def place_axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Return new axes, placed in pixels."""
        left, bottom = left / self.width, 1 - (top + height) / self.height
        return self.add_axes((left, bottom, width / self.width, height / self.height))

    def paste(self, image: Bytes, x: int, y: int, frame: str = "", border: int = 0) -> None:
        """Paint an image at a place, pixel by pixel: many times faster than axes for each image.

        It is grey [H, W], RGB or RGBA [H, W, C]. The frame is a colour, the border its width.
        """
        if self._rgba is None:
            self._rgba = np.full((self.height, self.width, 4), 255, np.uint8)
            self.add_artist(_Pixels(self._rgba))
        image = image[..., None] if image.ndim == 2 else image
        high, wide, channels = image.shape
        if frame:
            box = slice(y - border, y + high + border), slice(x - border, x + wide + border)
            self._rgba[box] = np.round(to_rgba_array(frame) * 255)
        self._rgba[y : y + high, x : x + wide, : max(3, channels)] = image

    # Without pyplot, a notebook would show nothing; with it, IPython would draw in another style,
    # and take a figure without axes for an empty one. A bundle goes before what it has for a class.
    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, bytes]:
        file = io.BytesIO()
        _write(self, file, "png")
        return {"image/png": file.getvalue()}


class _Pixels(Artist):
    """RGBA pixels [H, W, 4] of a whole figure, drawn as they are at its own resolution.

    `imshow` and `figimage` resample even where a pixel is a pixel: three times the time.
    """

    def __init__(self, rgba: Bytes) -> None:
        super().__init__()
        self._rgba = rgba

    def get_window_extent(self, renderer: Any = None) -> Bbox:
        figure: Any = self.get_figure(root=True)
        return Bbox(figure.transFigure.transform([(0, 0), (1, 1)]))

    def draw(self, renderer: Any) -> None:
        figure: Any = self.get_figure(root=True)
        # 1, also in a file of vectors, unless another resolution is asked for.
        scale = figure.dpi * renderer.get_image_magnification() / DPI
        rgba = self._rgba if math.isclose(scale, 1) else resample(self._rgba[None], scale)[0]
        context = renderer.new_gc()
        # From the bottom row, as y goes up; not at 0 in a file that is cut to what is drawn.
        renderer.draw_image(context, *self.get_window_extent().p0, rgba[::-1])
        context.restore()


def resample(images: npt.NDArray[Any], scale: float) -> npt.NDArray[Any]:
    """Return images [N, H, W, ...] as [N, H * scale, W * scale, ...], rounded up, by nearest."""
    sides = images.shape[1:3]
    rows, columns = ((np.arange(math.ceil(n * scale)) / scale).astype(int) for n in sides)
    tiles: npt.NDArray[Any] = images[:, rows.clip(max=sides[0] - 1)]
    return tiles.take(columns.clip(max=sides[1] - 1), axis=2)


def text_width(text: str, size: float) -> float:
    """Return the width in pixels of one line of text of `size` points."""
    font = FontProperties(family=FONT, size=size)
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, False)
    return float(width) * DPI / 72


def shorten(text: str, length: int = 16) -> str:
    """Return one line of at most `length` characters, all of which can be seen in the font."""
    shown = (
        c if c.isprintable() and ord(c) in CHARACTERS else "\ufffd" for c in " ".join(text.split())
    )
    text = "".join(shown)
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def percent_tick(value: float, _: object = None) -> str:
    """Return the label of a tick: a share in percent, with as many digits as it has."""
    return f"{100 * value:.5g}%"


def lowest_worth_showing(results: Floats) -> float:
    """Return the lowest result of a sweep that gets room in a figure; higher is better.

    One cell at chance level must not drown the differences among the good ones: left out is what is
    more than four times as far below the best as the median. Half a percentage point is shown in
    any case, so that mere noise is not painted as a difference.
    """
    best, median = float(results.max()), float(np.median(results))
    return min(max(float(results.min()), best - 4 * (best - median)), best - 0.005)


def pixels(figure: Figure) -> Bytes:
    """Return the figure as RGB [H, W, 3]."""
    canvas: Any = FigureCanvasAgg(figure)
    with styled():
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save(figure: Figure, path: str | Path) -> None:
    """Write a .png, .svg or .pdf, the same bytes for the same figure: no date, no version.

    Raises:
        ValueError: the path has another suffix.
    """
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in STAMPS:
        allowed = ", ".join(f".{kind}" for kind in STAMPS)
        raise ValueError(f"{path}: suffix {Path(path).suffix!r}, a figure is saved as {allowed}")
    _write(figure, path, kind)


def _write(figure: Figure, file: str | Path | io.BytesIO, kind: str) -> None:
    with styled():
        figure.savefig(file, format=kind, metadata={STAMPS[kind]: None})
