"""Figures: images, learning curves, confusion matrices, sweeps, weights; and their way to files.

A figure shows itself in a notebook as it does in a file. This is the only module that imports
matplotlib, and of it only the object-oriented part: no pyplot, no choice of a backend. The style is
matplotlib's process-wide state, so it is set under a lock for as long as a figure is built or
drawn, and put back.
"""

import functools
import io
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
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox
from PIL import Image

DPI = 128  # a power of two: pixels / DPI * DPI is exact, so a figure has the pixels it asks for
ROWS, COLUMNS = 5, 6  # of a grid
PAIRS = 60  # pictures beside what is seen of them
UNITS = 64  # of a first layer

# Okabe and Ito, "Color Universal Design" (2008): told apart with any common colour blindness.
BLUE, GREEN, ORANGE = "#0072b2", "#009e73", "#d55e00"
INK, DISCREET = "#1a1a1a", "#666666"
TITLE, TEXT, SMALL = 12.0, 10.0, 9.0  # points; legible at half size

# Errors and hits have a hue each, so that a strong diagonal can't drown the errors.
ERRORS = LinearSegmentedColormap.from_list("errors", ["#f5f5f5", "#f6b26b", ORANGE, "#7a2e00"])
HITS = LinearSegmentedColormap.from_list("hits", ["#f5f5f5", "#a6cfe8"])
# Of a number its sign is a hue and its magnitude a shade.
BELOW, ABOVE = ("#003350", BLUE), (ORANGE, "#6b2a00")
SIGNED = LinearSegmentedColormap.from_list("signed", [*BELOW, "#f5f5f5", *ABOVE])

# Pale yellow to dark blue: its lightness alone orders it, whatever hues are seen.
RANKED = matplotlib.colormaps["YlGnBu"]
# Okabe and Ito's but the yellow, too pale for a line on white; at most this many cells have a hue.
HUES = (BLUE, ORANGE, GREEN, "#cc79a7", "#e69f00", "#56b4e9", INK, "#999999")
# In turn: thin lines of two hues that few can tell apart (green and pink, say) differ in this.
DASHES = ("-", "--", "-.")

Points = Sequence[tuple[int, float]]  # (epoch, value)
History = Mapping[str, Points]
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
def _style() -> Iterator[None]:
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


class _Pixels(Artist):
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


def _figure(width: int, height: int, title: str, caption: str = "") -> Figure:
    """A figure of so many pixels, with its title and a line under it."""
    figure = _Figure(figsize=(width / DPI, height / DPI))
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


@functools.cache
def _characters() -> frozenset[int]:
    return frozenset(get_font(findfont(STYLE["font.family"])).get_charmap())


def _short(text: str, length: int = 16) -> str:
    """One line of at most `length` characters that the font has; matplotlib warns of others."""
    text = "".join(c if ord(c) in _characters() else "\ufffd" for c in " ".join(text.split()))
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _percent(value: float, _: object = None) -> str:
    return f"{100 * value:.5g}%"


def _share(value: float) -> str:
    """In percent with one digit; never 0.0% for more than none, nor 100.0% for less than all."""
    if 0 < value < 0.0005:
        return "<0.1%"
    return ">99.9%" if 0.9995 <= value < 1 else f"{value:.1%}"


def _scale(side: int, wanted: int) -> float:
    """How many pixels a pixel gets, so that a side has about as many as wanted: whole if it can."""
    return max(1, wanted // side) if side <= 1.43 * wanted else wanted / side


def _resampled(images: npt.NDArray[Any], scale: float) -> npt.NDArray[Any]:
    """[N, H, W, ...] -> [N, H * scale, W * scale, ...], rounded up; each pixel is the nearest."""
    sides = images.shape[1:3]
    rows, columns = ((np.arange(math.ceil(n * scale)) / scale).astype(int) for n in sides)
    tiles: npt.NDArray[Any] = images[:, rows.clip(max=sides[0] - 1)]
    return tiles.take(columns.clip(max=sides[1] - 1), axis=2)


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
    tiles = _resampled(images, _scale(images.shape[2], 140))
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
    history: History,
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


def _draw_curves(axes: Axes, name: str, history: History) -> None:
    finite: list[float] = []
    for split, legend, colour, marker in (
        ("train", "training", BLUE, "o"),
        ("val", "validation", ORANGE, "s"),
    ):
        points = history.get(f"{split}/{name}", ())
        values = _with_gaps(points)
        kept = [value for value in values if not math.isnan(value)]
        finite += kept
        if kept:  # a point alone between gaps has no line to be seen by
            style: Any = {"marker": marker if len(kept) <= 30 else "", "markersize": 5}
            axes.plot([epoch for epoch, _ in points], values, color=colour, label=legend, **style)
    # The same epochs in both panels, those without a finite value too.
    _set_axes(axes, name, [epoch for points in history.values() for epoch, _ in points], finite)


def _with_gaps(points: Points) -> list[float]:
    """The values, nan for a gap: beyond float32, where a diverged run may be, an axis overflows."""
    return [value if abs(value) < 1e38 else math.nan for _, value in points]


def _set_axes(axes: Axes, title: str, epochs: list[int], values: list[float]) -> None:
    """Title, axes and ticks of a panel of these finite values; epochs may be more than have one."""
    axes.set(title=title, xlabel="epoch")
    axes.grid(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    first, last = min(epochs, default=1), max(epochs, default=1)
    room = max(0.5, 0.02 * (last - first))
    axes.set_xlim(first - room, last + room)
    if not values:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center")
        return
    if title.endswith("accuracy"):
        axes.yaxis.set_major_formatter(_percent)
        return
    decades = math.log10(max(values)) - math.log10(min(values)) if min(values) > 0 else 0.0
    if decades > 1.5:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.7g}")


def _worth_showing(results: Floats) -> float:
    """From which result on, where higher is better, a picture of a sweep makes distinctions.

    All of them, but for those more than four times as far below the best as the median: one cell
    at chance level must not drown the differences among the good ones. At least half a percentage
    point, so that mere noise isn't painted as a difference.
    """
    best, median = float(results.max()), float(np.median(results))
    return min(max(float(results.min()), best - 4 * (best - median)), best - 0.005)


def sweep_curves(cells: Mapping[str, Sequence[History]], chosen: str | None, title: str) -> Figure:
    """Validation loss and accuracy (0 to 1, shown in percent) by epoch of all jobs of a sweep.

    cells holds, best first, the runs (the seeds) under the label of their cell; a run is as the
    history of `curves`. Shown is a cell's mean, within a band of one standard deviation (ddof=1)
    where two runs or more have the epoch; values that aren't finite count as missing. Training
    loss stands in for what no run has. Up to 8 cells have a hue and dashes each; more have a shade
    by rank, the chosen one orange, and only that and the best few are named. Cells that end far
    behind the others get no room: an arrow counts those out of sight. Raises ValueError if chosen
    isn't in cells.
    """
    if chosen is not None and chosen not in cells:
        raise ValueError(f"chosen: {chosen!r} is none of the {len(cells)} cells")
    runs = [run for seeds in cells.values() for run in seeds]
    keys = dict.fromkeys(
        key if any(len(run.get(key, ())) for run in runs) else "train/loss"
        for key in ("val/loss", "val/accuracy")
    )
    many = len(cells) > len(HUES)
    named = [label for rank, label in enumerate(cells) if not many or rank < 4 or label == chosen]
    styles: dict[str, dict[str, Any]] = {}
    for rank, label in enumerate(cells):  # the better a cell, the further on top
        # By the root of the rank: the best, which are named, differ most.
        colour = RANKED(1 - 0.75 * math.sqrt(rank / len(cells))) if many else HUES[rank]
        width, dashes = (1.2, "-") if many else (1.8, DASHES[rank % len(DASHES)])
        styles[label] = {"color": colour, "linewidth": width, "linestyle": dashes}
        styles[label]["zorder"] = 3 - rank / len(cells)
        if label == chosen:
            styles[label] |= {"color": ORANGE if many else colour, "linewidth": 3.6, "zorder": 4}
    names = [_short(label, 64) + " (chosen)" * (label == chosen) for label in named]
    lines = [Line2D([], [], **styles[label]) for label in named]
    if many:
        names.append(f"{len(cells) - len(named)} others, paler by rank")
        lines.append(Line2D([], [], color=RANKED(0.5), linewidth=1.2))
    across = max(1, int(1040 // (60 + max((_width(name, TEXT) for name in names), default=0))))
    height = 456 + 24 * math.ceil(len(names) / across)
    with _style():
        figure = _figure(1080, height, _short(title, 72))
        figure.set_layout_engine("constrained", w_pad=0.08, rect=(0, 0, 1, 1 - 38 / height))
        for key, axes in zip(keys, np.ravel(figure.subplots(1, len(keys))), strict=True):
            _draw_sweep(axes, key, cells, styles)
        if names:
            figure.legend(lines, names, loc="outside lower center", ncols=across)
    return figure


def _draw_sweep(
    axes: Axes, key: str, cells: Mapping[str, Sequence[History]], styles: Mapping[str, Any]
) -> None:
    sign = 1 if key.endswith("accuracy") else -1  # times a value: the higher, the better
    every = {label: _over_seeds(runs, key) for label, runs in cells.items()}
    finite = {label: cell[:, np.isfinite(cell[1])] for label, cell in every.items()}
    finite = {label: cell for label, cell in finite.items() if cell.size}
    last = sign * np.array([cell[1, -1] for cell in finite.values()])
    worth = last >= _worth_showing(last) if finite else ()
    shown = [cell for cell, is_worth in zip(finite.values(), worth, strict=True) if is_worth]
    _, means, stds = np.nan_to_num(np.hstack([np.empty((3, 0)), *shown]))
    points = [points for runs in cells.values() for run in runs for points in run.values()]
    title = key.replace("val/", "validation ").replace("train/", "training ")
    _set_axes(axes, title, [epoch for some in points for epoch, _ in some], means.tolist())
    for label in finite:
        epochs, mean, std = every[label]
        # A point alone between gaps has no line to be seen by.
        alone = np.isfinite(mean) & (np.convolve(np.isfinite(mean), [1, 1, 1])[1:-1] == 1)
        marker: Any = {"marker": "o", "markevery": alone.tolist()} if alone.any() else {}
        axes.plot(epochs, mean, label=label, **styles[label], **marker)
        # Below all lines and above the grid; with an edge, a band of a single epoch is seen too.
        band: Any = {"color": styles[label]["color"], "alpha": 0.25, "linewidth": 1, "zorder": 1.8}
        axes.fill_between(epochs, mean - std, mean + std, **band)
    if not shown:
        return
    # On a log axis not down to the bands, which may reach 0.
    lowest = means if axes.get_yscale() == "log" else means - stds
    scale = axes.yaxis.get_transform()
    low, high = scale.transform([lowest.min(), (means + stds).max()])
    room = max(0.05 * (high - low), 1e-3)
    low, high = scale.inverted().transform([low - room, high + room])
    axes.set_ylim(low, high)
    worst = low if sign > 0 else -high
    hidden = sum((sign * cell[1]).max() < worst for cell in finite.values())
    if hidden:
        text, y = (f"↓ {hidden} below", 0.02) if sign > 0 else (f"↑ {hidden} above", 0.94)
        axes.text(0.99, y, text, transform=axes.transAxes, color=DISCREET, ha="right")


def _over_seeds(runs: Sequence[History], key: str) -> Floats:
    """[3, E]: epochs, mean and standard deviation over the runs with a finite value, or nan."""
    epochs = sorted({epoch for run in runs for epoch, _ in run.get(key, ())})
    table = np.full((len(runs), len(epochs)), math.nan)
    for row, run in zip(table, runs, strict=True):
        points = run.get(key, ())
        row[np.searchsorted(epochs, [epoch for epoch, _ in points])] = _with_gaps(points)
    values = np.ma.masked_invalid(table)
    spread = values.std(0, ddof=1)
    return np.stack([epochs, values.mean(0).filled(math.nan), spread.filled(math.nan)])


def confusion(counts: npt.NDArray[np.integer[Any]], classes: Sequence[str], title: str) -> Figure:
    """How often each true class (row) was taken for each class (column): counts [C, C].

    A cell's shade is its share of the row: errors in orange, by the cube root, so that 1 in 1000
    is seen already; the diagonal in pale blue. Shades mean the same in every figure. Up to 13
    classes, the share is also written, under the count. A number is left out where it doesn't fit
    and, from 20 classes on, for errors below 1 % of the row. At the right edge is the row's recall.
    Raises ValueError if the shapes don't fit.
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

    # In pixels: a cell, then around the matrix what the text needs.
    cell = min(72, max(22, 800 // number))
    has_shares = cell >= 60
    caption += "; " + "count and " * has_shares + "shade: " * (not has_shares)
    caption += "share of the true class"
    size, count_size = min(TEXT, 0.4 * cell), min(TEXT, 0.27 * cell)
    names = [_short(name) for name in classes]
    widest, line = max(_width(name, size) for name in names), size * DPI / 72
    angle, below = (0, line) if widest < 0.9 * cell else (90, widest)
    if angle and cell >= 40:
        angle, below = 45, 0.71 * (widest + line)
    left, top, side = widest + 48, 84, cell * number
    matrix = left + side + _width(">99.9%", size) + 6
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
                axes.text(column, row - 0.16 * has_shares, text, **place, **middle)
                if has_shares:
                    place["fontsize"] = 0.85 * count_size
                    axes.text(column, row + 0.2, _share(share[row, column]), **place, **middle)
        edge = number - 0.5 + 10 / cell
        aside: Any = {"fontsize": size, "color": DISCREET}
        axes.text(edge, -0.5 - 6 / cell, "recall", **aside)
        for row in range(number):
            recall = _share(share[row, row]) if totals[row] else "-"
            axes.text(edge, row, recall, **aside, **middle)
    return figure


def heat_map(
    x: tuple[str, Sequence[float]],
    y: tuple[str, Sequence[float]],
    mean: Floats,
    std: Floats | None,
    chosen: tuple[int, int] | None,
    title: str,
    caption: str = "",
) -> Figure:
    """Validation accuracy over two swept numbers, a cell for each pair of their values.

    x and y are (name, values), the values ascending; mean [len(y), len(x)] is from 0 to 1, nan
    where there is no result; std, of the same shape, is written in percentage points where it is
    finite. Row 0 is at the bottom. chosen is the (row, column) to outline. An axis is linear or
    logarithmic, whichever spaces its values more evenly; where neither is legible, the cells are
    equally wide and its label says "not to scale". Colours span the results, but for those far
    below the others. Numbers are left out if they don't fit. Raises ValueError for values that
    don't ascend, and if the shapes don't fit.
    """
    shape = len(y[1]), len(x[1])
    for what, given in (("mean", mean), ("std", std)):
        if given is not None and given.shape != shape:
            raise ValueError(f"{what}: {given.shape}, not {shape} as the values of y and x")
    if chosen is not None and not (0 <= chosen[0] < shape[0] and 0 <= chosen[1] < shape[1]):
        raise ValueError(f"chosen: {chosen} is no (row, column) of {shape}")
    x_ticks, x_edges, x_name = _swept(*x)
    y_ticks, y_edges, y_name = _swept(*y)
    finite = np.isfinite(mean)
    texts = {}
    for row, column in np.argwhere(finite):
        texts[row, column] = f"{mean[row, column]:.2%}"
        if std is not None and np.isfinite(std[row, column]):
            texts[row, column] += f"\n± {100 * std[row, column]:.2f}"
    results = mean[finite] if texts else np.array([0.0, 1.0])
    low, high = _worth_showing(results), results.max()
    caption += "; outlined: chosen" * (chosen is not None)
    caption += "; hatched: no result" * (not finite.all())
    title, caption = _short(title, 72), _short(caption.removeprefix("; "), 110)

    # In pixels: the sides of the map and its smallest cell, then around it what the text needs.
    sides, rooms = [], []
    for edges, name, most in ((x_edges, x_name, 88), (y_edges, y_name, 60)):
        span = edges[-1]  # in smallest distances of two values
        sides.append(max(200.0, span * min(most, max(22, 960 / span)), _width(name, TEXT) - 40))
        rooms.append(sides[-1] / span)
    (across, up), (wide, tall) = sides, rooms
    lines = {line for text in texts.values() for line in text.split("\n")}
    widest = max((_width(line, TEXT) for line in lines), default=1.0)
    deepest = (2 if any("\n" in text for text in texts.values()) else 1) * 1.25 * TEXT * DPI / 72
    size = TEXT * min(1.0, 0.92 * wide / widest, 0.92 * tall / deepest)
    x_names, y_names = ([_number(value) for value in values] for _, values in (x, y))
    x_size, y_size = (min(TEXT, 0.4 * room) for room in rooms)
    widths = np.array([_width(name, x_size) for name in x_names])
    apart = (widths[1:] + widths[:-1]) / 2 + 8 < np.diff(x_ticks) * wide
    angle, below = (0, 18) if apart.all() else (90, widths.max())
    left, top = max(_width(name, y_size) for name in y_names) + 48, 84 if caption else 60
    needed = left + across + 150, _width(title, TITLE), _width(caption, SMALL)
    width, height = 16 + math.ceil(max(needed)), math.ceil(top + up + below + 50)
    with _style():
        figure = _figure(width, height, title, caption)
        bottom = 1 - (top + up) / height
        axes = figure.add_axes((left / width, bottom, across / width, up / height))
        style: Any = {"cmap": RANKED, "vmin": low, "vmax": high, "edgecolors": "white"}
        mesh = axes.pcolormesh(x_edges, y_edges, np.ma.masked_invalid(mean), linewidth=0.5, **style)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=3, labelcolor=INK)
        axes.set_xticks(x_ticks, x_names, rotation=angle, fontsize=x_size)
        axes.set_yticks(y_ticks, y_names, fontsize=y_size)
        axes.set(xlabel=x_name, ylabel=y_name)
        middle: Any = {"ha": "center", "va": "center"}
        for row, column in np.ndindex(shape):
            corner = x_edges[column], y_edges[row]
            extent = x_edges[column + 1] - corner[0], y_edges[row + 1] - corner[1]
            centre = corner[0] + extent[0] / 2, corner[1] + extent[1] / 2
            if not finite[row, column]:
                hatch: Any = {"facecolor": "#f5f5f5", "edgecolor": "#d0d0d0", "hatch": "///"}
                axes.add_patch(Rectangle(corner, *extent, linewidth=0.5, **hatch))
                axes.text(*centre, "\N{EN DASH}", fontsize=TITLE, **middle)
            elif size >= 0.8 * TEXT:
                rgb = np.array(mesh.to_rgba(mean[row, column]))[:3]
                luminance = rgb**2.2 @ (0.2126, 0.7152, 0.0722)  # at 0.2, both contrast alike
                place: Any = {"fontsize": size, "color": "white" if luminance < 0.2 else INK}
                axes.text(*centre, texts[row, column], **place | middle)
            if chosen == (row, column):
                outline: Any = {"fill": False, "edgecolor": ORANGE, "linewidth": 4, "zorder": 3}
                axes.add_patch(Rectangle(corner, *extent, clip_on=False, **outline))
        bar = figure.add_axes(((left + across + 28) / width, bottom, 16 / width, up / height))
        extend = "min" if results.min() < low else "neither"
        figure.colorbar(mesh, bar, extend=extend, extendfrac=0.05, format=_percent)
        bar.set_ylabel("validation accuracy")
    return figure


def _swept(name: str, values: Sequence[float]) -> tuple[Floats, Floats, str]:
    """Ticks [N] and edges [N + 1] of the cells of ascending values, and the name of the axis.

    From 0 on, in units of the smallest distance of two ticks.
    """
    numbers = np.asarray(values, float)
    if not numbers.size or not np.isfinite(numbers).all() or (np.diff(numbers) <= 0).any():
        raise ValueError(f"{name}: {values} are no ascending numbers")
    name, gaps = _short(name, 40), np.diff(numbers)
    if gaps.size and numbers[0] > 0:
        gaps = max(gaps, np.diff(np.log10(numbers)), key=lambda some: some.min() / some.mean())
    if gaps.size and gaps.min() < 0.4 * gaps.mean():
        name, gaps = f"{name} (not to scale)", np.ones_like(gaps)
    gaps = gaps / gaps.min(initial=math.inf)
    around = np.pad(gaps, 1, "edge") if gaps.size else np.ones(2)
    ticks = around[0] / 2 + np.cumsum(np.r_[0, gaps])
    return ticks, np.cumsum(np.r_[0, (around[1:] + around[:-1]) / 2]), name


def _number(value: float) -> str:
    """As short as it goes: 0.01, 64, 1e6; rounded only if it has many digits."""
    for number in (value, float(f"{value:.3g}")):
        plain = np.format_float_positional(number, trim="-")
        power = np.format_float_scientific(number, trim="-", exp_digits=1).replace("e+", "e")
        text = plain if len(plain) <= 6 else min(plain, power, key=len)
        if len(text) <= 8:
            break
    return text


def weights(images: Floats, title: str) -> Figure:
    """The weights of a first layer, an image for each unit or filter, in reading order.

    images [N, H, W] with N from 1 on, of which the first 64 are shown, 8 in a row at most. A colour
    means the same weight in all of them: 0 is nearly white, and the scale ends at the greatest
    magnitude shown. A weight that isn't finite is black. Raises ValueError for other shapes.
    """
    if images.ndim != 3 or not np.issubdtype(images.dtype, np.floating) or not images.size:
        raise ValueError(f"images: {images.dtype} {images.shape}, not float [1.., H, W]")
    shown = images[:UNITS]
    caption = f"the first {UNITS} of {len(images)}" * (len(images) > UNITS)
    title = _short(title, 72)
    most = float(np.abs(shown[np.isfinite(shown)]).max(initial=0.0)) or 1.0

    # In pixels. As square as goes with the fewest gaps in the last row.
    count = len(shown)
    fewest = math.ceil(math.sqrt(count))
    across = min(range(fewest, 9), key=lambda columns: -count % columns)
    scale = _scale(max(shown.shape[1:]), min(168, max(1, 900 // across)))
    tiles = _resampled(np.ma.masked_invalid(shown.astype(np.float64)), scale)
    _, high, wide = tiles.shape
    top, down = 68 if caption else 44, math.ceil(count / across)
    side = max(down * (high + 6) - 6, 96)  # of the colour bar too
    left = 8 + across * (wide + 6)
    needed = (
        left + 76 + _width(f"{-most:.2g}", TEXT),
        16 + _width(title, TITLE),
        16 + _width(caption, SMALL),
    )
    width, height = math.ceil(max(needed)), top + side + 14
    mosaic = np.full((height, width, 4), 255, np.uint8)
    shades = ScalarMappable(Normalize(-most, most), SIGNED.with_extremes(bad="black"))
    for i, tile in enumerate(tiles):
        y, x = top + i // across * (high + 6), 8 + i % across * (wide + 6)
        mosaic[y : y + high, x : x + wide] = shades.to_rgba(tile, bytes=True)
    with _style():
        figure = _figure(width, height, title, caption)
        figure.add_artist(_Pixels(mosaic))
        long = min(side, 240) / height
        bar = figure.add_axes(((left + 10) / width, 1 - top / height - long, 14 / width, long))
        figure.colorbar(shades, bar, ticks=[-most, 0, most], format=lambda at, _: f"{at:.2g}")
        bar.set_ylabel("weight", labelpad=0)
    return figure


def calibration(
    confidence: Floats,
    accuracy: Floats,
    counts: npt.NDArray[np.integer[Any]],
    ece: float,
    title: str,
) -> Figure:
    """Reliability diagram: accuracy by confidence, and how many images have that confidence.

    For equal bins of confidence from 0 to 1, each [bins]: mean confidence, accuracy (0 to 1) and
    how many images there are; where there are none, the others are ignored. ece, the expected
    calibration error, is from 0 to 1. Images are counted on a log axis, as nearly all may be in one
    bin. Raises ValueError for other shapes, and for values of a bin with images beyond 0 to 1.
    Guo, Pleiss, Sun & Weinberger, "On Calibration of Modern Neural Networks" (2017), figure 1.
    """
    bins = len(counts)
    for name, given in (("counts", counts), ("confidence", confidence), ("accuracy", accuracy)):
        if not bins or given.shape != (bins,):
            raise ValueError(f"{name}: {given.shape}, not [bins] as the {bins} counts")
    if counts.min() < 0:
        raise ValueError(f"counts: {counts.min()}, not 0 or more")
    kept = counts > 0
    confidence, accuracy, counts = confidence[kept], accuracy[kept], counts[kept]
    for name, values in (("confidence", confidence), ("accuracy", accuracy)):
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"{name}: {values}, not from 0 to 1")
    centres = (np.flatnonzero(kept) + 0.5) / bins
    title = _short(title, 48)
    caption = f"expected calibration error {ece:.2%}, {counts.sum()} images"
    widest = max((_width(str(count), SMALL) for count in counts), default=0.0)
    turned = widest > 470 / bins - 4  # wider than a bar, in pixels
    with _style():
        figure = _figure(560, 760, title, caption)
        figure.set_layout_engine("constrained", w_pad=0.08, rect=(0, 0, 1, 0.92))
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        wide: Any = {"width": 0.92 / bins, "zorder": 2}
        above.bar(centres, accuracy, color="#a6cfe8", label="accuracy", **wide)
        diamonds: Any = {"marker": "D", "linestyle": "", "clip_on": False, "color": ORANGE}
        above.plot(confidence, confidence, label="mean confidence", zorder=4, **diamonds)
        above.vlines(confidence, accuracy, confidence, ORANGE, zorder=3)
        even: Any = {"color": INK, "linestyle": ":", "linewidth": 1.3, "zorder": 3}
        above.plot([0, 1], [0, 1], label="calibrated", **even)
        above.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), xticks=np.linspace(0, 1, 6))
        above.grid(True)
        for axis in (above.xaxis, above.yaxis):
            axis.set_major_formatter(_percent)
        below.bar(centres, counts, color="#999999", **wide)
        below.set_yscale("log")
        below.yaxis.set_minor_locator(NullLocator())
        top = counts.max(initial=20) ** (2.5 if turned else 1.5)  # room for the numbers
        below.set(xlabel="confidence", ylabel="images (log)", ylim=(top**-0.1, top), yticks=[])
        for x, count in zip(centres, counts, strict=True):
            style: Any = {"fontsize": SMALL, "rotation": 90 * turned, "ha": "center"}
            below.annotate(str(count), (x, count), (0, 3), textcoords="offset points", **style)
        figure.legend(loc="outside lower center", ncols=3)
    return figure


def seen(
    given: Sequence[npt.NDArray[np.uint8]],
    seen: npt.NDArray[np.uint8],
    texts: Sequence[Sequence[tuple[str, float]]],
    title: str,
    names: Sequence[str],
    of: int = 0,
) -> Figure:
    """Pictures beside what the network saw of them, and what it takes them for.

    given: N pictures [H, W, 3] of any size; seen [N, h, w]; texts: for each picture its most
    probable classes, up to three, as (class, probability), the best first: that one is large, and
    orange with a question mark where its probability is below 50 %; names: of the pictures. The
    first 60 are shown; `of`: how many there are, if these are not all. Raises ValueError for other
    shapes, and without a picture.
    """
    total = len(given)
    if seen.ndim != 3 or seen.dtype != np.uint8 or not seen.size or len(seen) != total:
        raise ValueError(f"seen: {seen.dtype} {seen.shape}, not uint8 [{total}, h, w]")
    for i, picture in enumerate(given):
        if picture.dtype != np.uint8 or picture.shape[2:] != (3,) or not picture.size:
            raise ValueError(f"given[{i}]: {picture.dtype} {picture.shape}, not uint8 [H, W, 3]")
    for name, own in (("texts", texts), ("names", names)):
        if len(own) != total:
            raise ValueError(f"{name}: {len(own)} for {total} pictures")
    for i, ranked in enumerate(texts):
        if not 1 <= len(ranked) <= 3:
            raise ValueError(f"texts[{i}]: {len(ranked)} classes, not 1 to 3")
    count, title, of = min(total, PAIRS), _short(title, 72), max(of, total)
    doubtful = [ranked[0][1] < 0.5 for ranked in texts[:count]]
    caption = "given → as the network sees it" + "; ?: below 50%" * any(doubtful)
    caption += f"; the first {count} of {of}" * (count < of)
    # Of each picture the class, large, and under it its probability and the next classes.
    classes = [
        _short(ranked[0][0]) + " ?" * is_doubtful
        for ranked, is_doubtful in zip(texts, doubtful, strict=False)
    ]
    below = [
        [_share(ranked[0][1]), *(f"{_short(name)}  {_share(value)}" for name, value in ranked[1:])]
        for ranked in texts[:count]
    ]

    # In pixels: two boxes and the text beside them, the pairs apart, 3 in a row.
    box, arrow, gap = 112, 26, 10
    large = min(18.0, 18.0 * 150 / max(1.0, *(_width(name, 18.0) for name in classes)))
    room = max(_width(name, large) for name in classes)
    room = math.ceil(max(room, *(_width(line, TEXT) for lines in below for line in lines)))
    step, down = 2 * box + arrow + gap + room + 28, box + 40
    across, top = min(3, count), 86
    needed = across * step - 28, _width(title, TITLE), _width(caption, SMALL)
    width = 16 + math.ceil(max(needed))
    height = top + math.ceil(count / across) * down - 30
    mosaic = np.full((height, width, 4), 255, np.uint8)
    with _style():
        figure = _figure(width, height, title, caption)
        figure.add_artist(_Pixels(mosaic))
        for i in range(count):
            y, x = top + i // across * down, 8 + i % across * step
            _paste(mosaic, _boxed(given[i], box), y, x, box)
            _paste(mosaic, _boxed(seen[i], box)[..., None], y, x + box + arrow, box)
            colour = ORANGE if doubtful[i] else INK
            for text, size, ink, right, lower in (
                (_short(names[i], 32), SMALL, DISCREET, 0, -6),
                ("→", TITLE, DISCREET, box + 5, 64),
                (classes[i], large, colour, 2 * box + arrow + gap, 34),
                (below[i][0], TEXT, colour, 2 * box + arrow + gap, 58),
                ("\n".join(below[i][1:]), SMALL, DISCREET, 2 * box + arrow + gap, 110),
            ):
                place = (x + right) / width, 1 - (y + lower) / height
                figure.text(*place, text, fontsize=size, color=ink)
    return figure


def _boxed(picture: npt.NDArray[np.uint8], box: int) -> npt.NDArray[np.uint8]:
    """[H, W, ...] as large as the box allows: pixels repeated, or averaged if it is larger."""
    scale = box / max(picture.shape[:2])
    if scale >= 1:
        tile: npt.NDArray[np.uint8] = _resampled(picture[None], int(scale))[0]
        return tile
    high, wide = (max(1, round(side * scale)) for side in picture.shape[:2])
    return np.asarray(Image.fromarray(picture).resize((wide, high), Image.Resampling.BOX))


def _paste(
    mosaic: npt.NDArray[np.uint8], tile: npt.NDArray[np.uint8], y: int, x: int, box: int
) -> None:
    """Paints a tile [h, w, 1 or 3] into the middle of a box, in a frame: paper may be white."""
    high, wide = tile.shape[:2]
    y, x = y + (box - high) // 2, x + (box - wide) // 2
    mosaic[y - 1 : y + high + 1, x - 1 : x + wide + 1, :3] = 187
    mosaic[y : y + high, x : x + wide, :3] = tile


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
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in STAMPS:
        allowed = ", ".join(f".{kind}" for kind in STAMPS)
        raise ValueError(f"{path}: suffix {Path(path).suffix!r}, a figure is saved as {allowed}")
    _write(figure, path, kind)


def _write(figure: Figure, file: str | Path | io.BytesIO, kind: str) -> None:
    with _style():
        figure.savefig(file, format=kind, metadata={STAMPS[kind]: None})
