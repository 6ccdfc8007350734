"""Figures: sample grids, learning curves, confusion matrices; and their way to pixels and files.

The only module that imports matplotlib, and of it only the object-oriented part: no pyplot, no
choice of a backend. The style is matplotlib's process-wide state, so it is set under a lock for as
long as a figure is built or drawn, and put back.
"""

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

DPI = 128  # a power of two: pixels / DPI * DPI is exact, so a figure has the pixels it asks for
ROWS, COLUMNS = 5, 6

# Okabe and Ito, "Color Universal Design" (2008): told apart with any common colour blindness.
BLUE, GREEN, ORANGE = "#0072b2", "#009e73", "#d55e00"
INK, DISCREET = "#1a1a1a", "#666666"
TITLE, TEXT, SMALL = 12.0, 10.0, 9.0  # points; legible at half size

# Errors and hits have a hue each, so that a strong diagonal can't drown the errors.
ERRORS = LinearSegmentedColormap.from_list("errors", ["#f5f5f5", "#f6b26b", ORANGE, "#7a2e00"])
HITS = LinearSegmentedColormap.from_list("hits", ["#f5f5f5", "#a6cfe8"])

STYLE: Any = {
    "axes.edgecolor": "#999999",
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
_lock = threading.Lock()


@contextmanager
def _style() -> Iterator[None]:
    with _lock, matplotlib.rc_context(STYLE):
        yield


class _Pixels(Artist):
    """RGBA pixels [H, W, 4] of the figure, as they are.

    `imshow` and `figimage` resample even where a pixel is a pixel: three times the time.
    """

    def __init__(self, rgba: npt.NDArray[np.uint8]) -> None:
        super().__init__()
        self._rgba = rgba

    def draw(self, renderer: Any) -> None:
        context = renderer.new_gc()
        renderer.draw_image(context, 0, 0, self._rgba[::-1])  # from the bottom row, as y goes up
        context.restore()


def _figure(width: int, height: int, title: str, caption: str = "") -> Figure:
    """A figure of so many pixels, with its title and a line under it."""
    figure = Figure(figsize=(width / DPI, height / DPI))
    FigureCanvasAgg(figure)
    for text, size, colour, top in ((title, TITLE, INK, 9), (caption, SMALL, DISCREET, 36)):
        if text:
            figure.text(8 / width, 1 - top / height, text, fontsize=size, color=colour, va="top")
    return figure


def _width(text: str, size: float) -> float:
    """The width in pixels of one line of text of `size` points."""
    font = FontProperties(family=STYLE["font.family"], size=size)
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, False)
    return float(width) * DPI / 72


def _short(text: str, length: int = 16) -> str:
    """One line of at most `length` characters."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def grid(
    images: npt.NDArray[np.uint8],
    labels: Sequence[str],
    predicted: Sequence[str] | None = None,
    confidence: Sequence[float] | None = None,
    *,
    title: str,
) -> Figure:
    """Images in reading order, up to 5 rows of 6, each under its label.

    images [N, H, W] with N from 1 to 30; labels, predicted and confidence (0 to 1) have N entries.
    An image whose prediction differs from its label is framed and titled "✗ label → predicted".
    Raises ValueError for other shapes. Painted as one mosaic, many times faster than an axes for
    each image: it is wanted after every epoch.
    """
    count, limit = len(images), ROWS * COLUMNS
    if images.ndim != 3 or images.dtype != np.uint8 or not images.size or count > limit:
        raise ValueError(f"images: {images.dtype} {images.shape}, not uint8 [1..{limit}, H, W]")
    for name, given in (("labels", labels), ("predicted", predicted), ("confidence", confidence)):
        if given is not None and len(given) != count:
            raise ValueError(f"{name}: {len(given)} for {count} images")

    texts = [[_short(label)] for label in labels]  # the lines over each image
    wrong, caption, names = [False] * count, "", [*labels]
    if predicted is not None:
        wrong = [a != b for a, b in zip(labels, predicted, strict=True)]
        names += predicted
        caption = f"{count - sum(wrong)} of {count} right" + "; ✗ true → predicted" * any(wrong)
        for lines, name, is_wrong in zip(texts, predicted, wrong, strict=True):
            if is_wrong:
                lines[:] = [f"✗ {lines[0]}", f"→ {_short(name)}"]
    if confidence is not None:
        caption = f"{caption}, confidence" if caption else "confidence"
        for lines, value in zip(texts, confidence, strict=True):
            lines.append(f"{lines.pop()}  {value:.0%}" if len(lines) > 1 else f"{value:.0%}")
    if max(map(len, names)) <= 3:  # short enough for one line
        texts = [["  ".join(lines).replace("  →", " →")] for lines in texts]

    # About 140 pixels wide, each pixel of the image a whole number of the figure's if it can be.
    _, high, wide = images.shape
    scale = max(1, 140 // wide) if wide <= 200 else 140 / wide
    rows, columns = ((np.arange(math.ceil(n * scale)) / scale).astype(int) for n in (high, wide))
    tiles = images[:, rows][:, :, columns]
    _, high, wide = tiles.shape
    strip = 14 + 20 * max(map(len, texts))
    top = 56 if caption else 32
    across = min(COLUMNS, count)
    title = _short(title, 72)
    needed = (across * (wide + 10) - 10, _width(title, TITLE), _width(caption, SMALL))
    width = 16 + math.ceil(max(needed))
    height = top + math.ceil(count / across) * (strip + high) + 10
    widest = max(_width(line, TEXT) for line in {line for lines in texts for line in lines})
    size = TEXT * min(1.0, (wide + 4) / max(widest, 1.0))
    mosaic = np.full((height, width, 4), 255, np.uint8)
    frame = np.round(np.array(to_rgb(ORANGE)) * 255)
    with _style():
        figure = _figure(width, height, title, caption)
        figure.add_artist(_Pixels(mosaic))
        for i, tile in enumerate(tiles):
            y, x = top + i // across * (strip + high) + strip, 8 + i % across * (wide + 10)
            colour = ORANGE if wrong[i] else INK if predicted is None else DISCREET
            if wrong[i]:
                mosaic[y - 4 : y + high + 4, x - 4 : x + wide + 4, :3] = frame
            mosaic[y : y + high, x : x + wide, :3] = tile[..., None]
            place = ((x + wide / 2) / width, 1 - (y - 10) / height)
            figure.text(*place, "\n".join(texts[i]), fontsize=size, color=colour, ha="center")
    return figure


def curves(
    history: Mapping[str, Sequence[tuple[int, float]]],
    best_epoch: int | None,
    title: str,
    test_accuracy: float | None = None,
) -> Figure:
    """Loss and accuracy (0 to 1, shown in percent) of training and validation by epoch.

    history holds (epoch, value) under train/loss, val/loss, train/accuracy and val/accuracy; any
    may be missing. A value that isn't finite is a gap. Loss is on a log axis where it spans more
    than a decade and a half.
    """
    with _style():
        figure = _figure(1080, 480, _short(title, 72))
        figure.set_layout_engine("constrained", w_pad=0.08, rect=(0, 0, 1, 0.92))
        shown: dict[str, Line2D] = {}
        for name, axes in zip(("loss", "accuracy"), figure.subplots(1, 2), strict=True):
            _draw_curves(axes, name, history)
            if best_epoch is not None:
                best = dict(history.get("val/accuracy", ())).get(best_epoch, math.nan)
                label = f"best epoch {best_epoch}" + f": {best:.2%}" * math.isfinite(best)
                axes.axvline(best_epoch, color=INK, linestyle=":", linewidth=1.3, label=label)
            if name == "accuracy" and test_accuracy is not None and math.isfinite(test_accuracy):
                style: Any = {"color": GREEN, "linestyle": "--", "linewidth": 1.3}
                axes.axhline(test_accuracy, label=f"test {test_accuracy:.2%}", **style)
            shown |= {str(line.get_label()): line for line in axes.lines}
        if shown:  # under the panels, where it can't hide a curve
            figure.legend(shown.values(), shown, loc="outside lower center", ncols=len(shown))
    return figure


def _draw_curves(axes: Axes, name: str, history: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    axes.set(title=name, xlabel="epoch")
    axes.grid(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    finite: list[float] = []
    for split, legend, colour, marker in (
        ("train", "training", BLUE, "o"),
        ("val", "validation", ORANGE, "s"),
    ):
        points = history.get(f"{split}/{name}", ())
        # Beyond float32, where a diverged run's sums may be, an axis overflows: a gap as well.
        values = [value if abs(value) < 1e38 else math.nan for _, value in points]
        kept = [value for value in values if not math.isnan(value)]
        finite += kept
        if kept:  # a point alone between gaps has no line to be seen by
            style: Any = {"marker": marker if len(kept) <= 30 else "", "markersize": 5}
            axes.plot([epoch for epoch, _ in points], values, color=colour, label=legend, **style)
    # The same epochs in both panels, those without a finite value too.
    epochs = [epoch for points in history.values() for epoch, _ in points] or [1]
    room = max(0.5, 0.02 * (max(epochs) - min(epochs)))
    axes.set_xlim(min(epochs) - room, max(epochs) + room)
    if not finite:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center")
        return
    if name == "accuracy":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.5g}%"))
        return
    decades = math.log10(max(finite)) - math.log10(min(finite)) if min(finite) > 0 else 0.0
    if decades > 1.5:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.7g}"))


def confusion(counts: npt.NDArray[np.integer[Any]], classes: Sequence[str], title: str) -> Figure:
    """How often each true class (row) was taken for each class (column): counts [C, C].

    A cell's shade is its share of the row: errors in orange, by the cube root, so that 1 in 1000
    is seen already; the diagonal in pale blue. Shades mean the same in every figure. A number is
    left out where it doesn't fit and, from 20 classes on, for errors below 1 % of the row. At the
    right edge is the row's recall. Raises ValueError if the shapes don't fit.
    """
    number = len(classes)
    if not number or counts.shape != (number, number):
        raise ValueError(f"counts: {counts.shape} for {number} classes, not [C, C]")
    totals, hits = counts.sum(1), counts.diagonal()
    share = counts / np.maximum(totals, 1)[:, None]
    diagonal = np.eye(number, dtype=bool)
    colours = np.where(diagonal[..., None], HITS(share), ERRORS(np.cbrt(share)))
    title = _short(title, 72)
    caption = f"{hits.sum() / max(1, totals.sum()):.2%} right, {hits.sum()} of {totals.sum()}"
    caption += "; shade: share of the true class"

    # In pixels: a cell, then around the matrix what the text needs.
    cell = min(64, max(22, 800 // number))
    size, count_size = min(TEXT, 0.4 * cell), min(TEXT, 0.27 * cell)
    names = [_short(name) for name in classes]
    widest, line = max(_width(name, size) for name in names), size * DPI / 72
    angle, below = (0, line) if widest < 0.9 * cell else (90, widest)
    if angle and cell >= 40:
        angle, below = 45, 0.71 * (widest + line)
    left, top, side = widest + 48, 84, cell * number
    matrix = left + side + _width("100.0%", size) + 6
    width = 16 + math.ceil(max(matrix, _width(title, TITLE), _width(caption, SMALL)))
    height = math.ceil(top + side + below + 46)
    fits = 0.96 * cell / _width("0", count_size)  # digits
    with _style():
        figure = _figure(width, height, title, caption)
        bottom = 1 - (top + side) / height
        axes = figure.add_axes((left / width, bottom, side / width, side / height))
        centres = np.arange(number)
        axes.pcolormesh(centres, centres, colours, edgecolors="white", linewidth=0.5)
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=size, labelcolor=INK)
        axes.set(xlabel="predicted", ylabel="true")
        axes.set_yticks(centres, names)
        axes.set_xticks(centres, names, rotation=angle, rotation_mode="anchor")
        for label in axes.get_xticklabels():
            label.set(ha="right" if angle else "center", va="center" if angle == 90 else "top")
        middle: Any = {"va": "center_baseline"}
        worth = (counts > 0) & (diagonal | (share >= 0.01) | (number < 20))
        for row, column in np.argwhere(worth):
            text = str(counts[row, column])
            if len(text) <= fits:
                colour = "white" if colours[row, column, 2] < 0.25 else INK
                place: Any = {"fontsize": count_size, "ha": "center", "color": colour}
                axes.text(column, row, text, **place, **middle)
        edge = number - 0.5 + 10 / cell
        aside: Any = {"fontsize": size, "color": DISCREET}
        axes.text(edge, -0.5 - 6 / cell, "recall", **aside)
        for row in range(number):
            recall = f"{share[row, row]:.1%}" if totals[row] else "-"
            axes.text(edge, row, recall, **aside, **middle)
    return figure


def pixels(figure: Figure) -> npt.NDArray[np.uint8]:
    """The figure as RGB, uint8 [H, W, 3]."""
    canvas: Any = FigureCanvasAgg(figure)
    with _style():
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save(figure: Figure, path: str | Path) -> None:
    """Writes a .png, .svg or .pdf, the same bytes for the same figure: no date, no version.

    Raises ValueError for any other suffix.
    """
    # What matplotlib writes into each format of its own accord.
    stamps = {".png": "Software", ".svg": "Date", ".pdf": "CreationDate"}
    suffix = Path(path).suffix.lower()
    if suffix not in stamps:
        raise ValueError(f"{path}: a figure is saved as {', '.join(stamps)}")
    with _style():
        figure.savefig(path, metadata={stamps[suffix]: None})
