"""Figures of matrices: the confusion matrix, and the heat map of a sweep."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mnist_exp.figures import style
from mnist_exp.figures.style import INK, ORANGE, TEXT, Floats, PixelFigure, text_width
from mnist_exp.formatting import rounded_percent, shortest_number

# Errors and hits have a hue each, so that a strong diagonal cannot drown the errors.
ERRORS = LinearSegmentedColormap.from_list("errors", ["#f5f5f5", "#f6b26b", ORANGE, "#7a2e00"])
HITS = LinearSegmentedColormap.from_list("hits", ["#f5f5f5", "#a6cfe8"])

LEAST = 8.8  # points of the names of ticks

_Text = tuple[tuple[int, int], float, str, float]  # its cell, off the middle, itself, its points


class _Axis:
    """One axis of a matrix: values at [N] ticks, whose cells are between [N + 1] edges."""

    def __init__(
        self, label: str, names: Sequence[str], ticks: Floats, edges: Floats, length: float
    ) -> None:
        self.label, self.names, self.ticks, self.edges = label, names, ticks, edges
        self.length, self.unit = length, length / (edges[-1] - edges[0])  # in pixels
        self.size = min(TEXT, max(LEAST, 0.4 * self.unit))  # of the names, in points
        self.widths = np.array([text_width(name, self.size) for name in names])
        self.named = list(range(len(names)))  # the ticks that have their name

    @property
    def line(self) -> float:
        """The height in pixels of a line of names."""
        return float(1.25 * self.size * style.DPI / 72)

    def middle(self, index: int) -> float:
        """Return the place between the edges of a cell."""
        return float(self.edges[index : index + 2].mean())

    def thin(self, first: int) -> None:
        """Leave out names that are written across the axis where they would overlap.

        `first` is a tick whose name stays; from there on, both ways, the next that has room stays.
        """
        places = self.ticks * self.unit
        kept = [first]
        for tick in range(first + 1, len(places)):
            if places[tick] - places[kept[-1]] >= self.line:
                kept.append(tick)
        for tick in range(first - 1, -1, -1):
            if places[kept[0]] - places[tick] >= self.line:
                kept.insert(0, tick)
        self.named = kept


def _draw_matrix(
    figure: PixelFigure, x: _Axis, y: _Axis, cells: Floats, texts: Sequence[_Text], **options: Any
) -> tuple[Axes, QuadMesh]:
    """Draw a matrix with texts in its cells, light or dark, whichever is easier to read there.

    Args:
        figure: The figure that the matrix is placed in.
        x: The axis of the columns.
        y: The axis of the rows.
        cells: Numbers [rows, columns], which the options map to colours, or colours themselves.
        texts: The texts in the cells.
        options: Options of `pcolormesh`.
    """
    axes = figure.place_axes(y.widths.max() + 48, figure.top + 28, x.length, y.length)
    mesh = axes.pcolormesh(x.edges, y.edges, cells, edgecolors="white", linewidth=0.5, **options)
    axes.spines[:].set_visible(False)
    axes.set(xlabel=x.label, ylabel=y.label)
    axes.set_xticks(x.ticks[x.named], [x.names[i] for i in x.named], fontsize=x.size)
    axes.set_yticks(y.ticks[y.named], [y.names[i] for i in y.named], fontsize=y.size)
    axes.tick_params(length=3, labelcolor=INK)
    luminance = mesh.to_rgba(cells)[..., :3] ** 2.2 @ (0.2126, 0.7152, 0.0722)
    for (row, column), shift, text, size in texts:
        place = x.middle(column), y.middle(row) + shift
        colour = "white" if luminance[row, column] < 0.2 else INK  # at 0.2, both contrast alike
        va = "center" if options else "center_baseline"
        axes.text(*place, text, fontsize=size, color=colour, ha="center", va=va)
    return axes, mesh


@style.styled()
def confusion_matrix(
    counts: npt.NDArray[np.integer[Any]], classes: Sequence[str], title: str
) -> Figure:
    """Return a figure of how often each true class (row) was taken for each class (column).

    A cell's shade is its share of the row: errors in orange, by the cube root, so that 1 in 1000 is
    seen already; the diagonal in pale blue. Shades mean the same in every figure. Up to 13 classes,
    the share is also written, under the count. A number is left out where it does not fit and, from
    20 classes on, for errors below 1 % of the row. At the right edge is the row's recall.

    Args:
        counts: The numbers of images, [C, C], rows true, columns predicted.
        classes: The names of the C classes.
        title: The title of the figure.
    """
    number = len(classes)
    totals, hits = counts.sum(1), counts.diagonal()
    shares = counts / np.maximum(totals, 1)[:, None]
    is_hit = np.eye(number, dtype=bool)
    colours = np.where(is_hit[..., None], HITS(shares), ERRORS(np.cbrt(shares)))
    cell = min(72, max(22, 800 // number))  # pixels
    has_shares = cell >= 60
    caption = f"{hits.sum() / max(1, totals.sum()):.2%} right, {hits.sum()} of {totals.sum()}; "
    caption += f"{'count and' if has_shares else 'shade:'} share of the true class"

    names, centres = [style.shorten(name) for name in classes], np.arange(number, dtype=float)
    x, y = (
        _Axis(label, names, centres, np.arange(number + 1) - 0.5, cell * number)
        for label in ("predicted", "true")
    )
    widest, line = x.widths.max(), x.size * style.DPI / 72
    angle, below = (0, line) if widest < 0.9 * cell else (90, widest)
    if angle and cell >= 40:
        angle, below = 45, 0.71 * (widest + line)
    size = min(TEXT, 0.27 * cell)
    fits = 0.96 * cell / text_width("0", size)  # digits
    texts: list[_Text] = []
    for place in np.argwhere((counts > 0) & (is_hit | (shares >= 0.01) | (number < 20))):
        row, column = place.tolist()
        count = str(counts[row, column])
        if len(count) <= fits:
            texts.append(((row, column), -0.16 if has_shares else 0, count, size))
        if len(count) <= fits and has_shares:
            texts.append(((row, column), 0.2, rounded_percent(shares[row, column]), 0.85 * size))
    width = widest + 48 + x.length + text_width(">99.9%", x.size) + 6
    figure = PixelFigure((width, 28 + y.length + below + 46), title, caption)
    axes, _ = _draw_matrix(figure, x, y, colours, texts)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    across, up = "right" if angle else "center", "center" if angle == 90 else "top"
    for label in axes.get_xticklabels():
        label.set(rotation=angle, rotation_mode="anchor", ha=across, va=up)
    edge, aside = number - 0.5 + 10 / cell, {"size": x.size, "color": style.DISCREET}
    axes.text(edge, -0.5 - 6 / cell, "recall", fontdict=aside)
    for row in range(number):
        recall = rounded_percent(shares[row, row]) if totals[row] else "-"
        axes.text(edge, row, recall, fontdict=aside, va="center_baseline")
    return figure


@style.styled()
def heat_map(
    x: tuple[str, Sequence[float]],
    y: tuple[str, Sequence[float]],
    mean: Floats,
    std: Floats,
    chosen: tuple[int, int] | None,
    title: str,
    caption: str = "",
) -> Figure:
    """Return a figure of validation accuracy over two swept numbers, a cell for each pair.

    An axis is linear or logarithmic, whichever spaces its values more evenly; where neither is
    legible, the cells are equally wide and its label says "not to scale". Colours span the results,
    but for those far below the others. Numbers, and names of ticks, are left out where they do not
    fit; those of the chosen cell stay.

    Args:
        x: The name and the ascending values of the columns.
        y: The same of the rows, of which the first is at the bottom.
        mean: The accuracies [rows, columns], 0 to 1; nan where there is no result.
        std: Their deviations; written in percentage points where they are finite.
        chosen: The row and column to outline.
        title: The title of the figure.
        caption: The beginning of the line under it.
    """
    columns, rows, missing = _swept_axis(*x, most=88), _swept_axis(*y, most=60), np.isnan(mean)
    results = mean[~missing]
    low, high = style.lowest_worth_showing(results), results.max()
    notes = [caption] if caption else []
    notes += ["outlined: chosen"] if chosen is not None else []
    notes += ["hatched: no result"] if missing.any() else []

    apart = (columns.widths[1:] + columns.widths[:-1]) / 2 + 8
    is_tight = (apart >= np.diff(columns.ticks) * columns.unit).any()
    row, column = (0, 0) if chosen is None else chosen
    rows.thin(row)
    if is_tight:
        columns.thin(column)
    left, below = rows.widths.max() + 48, columns.widths.max() if is_tight else 18
    content = left + columns.length + 150, 28 + rows.length + below + 50
    figure = PixelFigure(content, title, "; ".join(notes))
    texts, cells = _accuracies(mean, std, columns, rows), np.ma.masked_invalid(mean)
    colours: Any = {"cmap": style.RANKED, "vmin": low, "vmax": high}
    axes, mesh = _draw_matrix(figure, columns, rows, cells, texts, **colours)
    axes.tick_params(axis="x", labelrotation=90 if is_tight else 0)
    blank: Any = {"facecolor": "#f5f5f5", "edgecolor": "#d0d0d0", "hatch": "///", "linewidth": 0.5}
    for row, column in np.argwhere(missing):
        _mark_cell(axes, columns, rows, row, column, **blank)
        place = columns.middle(column), rows.middle(row)
        axes.text(*place, "\N{EN DASH}", fontsize=style.TITLE, ha="center", va="center")
    if chosen is not None:
        cell = min(columns.unit, rows.unit)
        width = min(4.0, max(2.0, 0.15 * cell))  # a cell of a few pixels has to be seen in it
        frame: Any = {"fill": False, "edgecolor": ORANGE, "linewidth": width, "clip_on": False}
        _mark_cell(axes, columns, rows, *chosen, zorder=3, **frame)
    bar = figure.place_axes(left + columns.length + 28, figure.top + 28, 16, rows.length)
    extend = "min" if results.min() < low else "neither"
    figure.colorbar(mesh, bar, extend=extend, extendfrac=0.05, format=style.percent_tick)
    bar.set_ylabel("validation accuracy")
    return figure


def _accuracies(mean: Floats, std: Floats, columns: _Axis, rows: _Axis) -> list[_Text]:
    """Return the results in percent with their deviations, if they fit into their cells."""
    texts = {
        (row, column): f"{mean[row, column]:.2%}" for row, column in np.argwhere(~np.isnan(mean))
    }
    for cell in texts:
        if np.isfinite(std[cell]):
            texts[cell] += f"\n± {100 * std[cell]:.2f}"
    lines = {line for text in texts.values() for line in text.split("\n")}
    width = max(text_width(line, TEXT) for line in lines)
    count = max(1 + text.count("\n") for text in texts.values())
    height = count * 1.25 * TEXT * style.DPI / 72
    size = TEXT * min(1.0, 0.92 * columns.unit / width, 0.92 * rows.unit / height)
    return [(cell, 0, text, size) for cell, text in texts.items()] if size >= 0.8 * TEXT else []


def _mark_cell(axes: Axes, x: _Axis, y: _Axis, row: int, column: int, **options: Any) -> None:
    """Draw a rectangle over a cell."""
    (left, right), (bottom, top) = x.edges[column : column + 2], y.edges[row : row + 2]
    axes.add_patch(Rectangle((left, bottom), right - left, top - bottom, **options))


def _swept_axis(label: str, values: Sequence[float], most: int) -> _Axis:
    """Return the axis of two or more ascending values, the smallest cell at most `most` pixels."""
    numbers = np.asarray(values, float)
    spacings = [np.diff(numbers)]
    if numbers[0] > 0:
        spacings.append(np.diff(np.log10(numbers)))
    gaps = max(spacings, key=_evenness)
    is_to_scale = _evenness(gaps) >= 0.4
    widths = gaps / gaps.min() if is_to_scale else np.ones_like(gaps)
    around = np.pad(widths, 1, "edge")
    ticks = around[0] / 2 + np.cumsum(np.r_[0, widths])
    edges = np.cumsum(np.r_[0, (around[1:] + around[:-1]) / 2])
    span = edges[-1]
    name = style.shorten(label, 40) + ("" if is_to_scale else " (not to scale)")
    length = max(200.0, span * min(most, max(6, 960 / span)), text_width(name, TEXT) - 40)
    return _Axis(name, [shortest_number(value) for value in values], ticks, edges, length)


def _evenness(gaps: Floats) -> float:
    """Return 1 for gaps of one length, and less for others."""
    return float(gaps.min() / gaps.mean())
