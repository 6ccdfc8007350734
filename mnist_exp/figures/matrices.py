"""Figures of matrices: the confusion matrix, and the heat map of a sweep."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mnist_exp.figures.style import (
    DISCREET,
    DPI,
    INK,
    ORANGE,
    RANKED,
    SMALL,
    TEXT,
    TITLE,
    Floats,
    canvas,
    lowest_worth_showing,
    percent,
    shorten,
    styled,
    text_width,
)
from mnist_exp.formatting import rounded_percent, shortest_number

# Errors and hits have a hue each, so that a strong diagonal can't drown the errors.
ERRORS = LinearSegmentedColormap.from_list("errors", ["#f5f5f5", "#f6b26b", ORANGE, "#7a2e00"])
HITS = LinearSegmentedColormap.from_list("hits", ["#f5f5f5", "#a6cfe8"])


def confusion_matrix(
    counts: npt.NDArray[np.integer[Any]], classes: Sequence[str], title: str
) -> Figure:
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
    title = shorten(title, 72)
    caption = f"{hits.sum() / max(1, totals.sum()):.2%} right, {hits.sum()} of {totals.sum()}"

    # In pixels: a cell, then around the matrix what the text needs.
    cell = min(72, max(22, 800 // number))
    has_shares = cell >= 60
    caption += "; " + "count and " * has_shares + "shade: " * (not has_shares)
    caption += "share of the true class"
    size, count_size = min(TEXT, 0.4 * cell), min(TEXT, 0.27 * cell)
    names = [shorten(name) for name in classes]
    widest, line = max(text_width(name, size) for name in names), size * DPI / 72
    angle, below = (0, line) if widest < 0.9 * cell else (90, widest)
    if angle and cell >= 40:
        angle, below = 45, 0.71 * (widest + line)
    left, top, side = widest + 48, 84, cell * number
    matrix = left + side + text_width(">99.9%", size) + 6
    width = 16 + math.ceil(max(matrix, text_width(title, TITLE), text_width(caption, SMALL)))
    height = math.ceil(top + side + below + 46)
    fits = 0.96 * cell / text_width("0", count_size)  # digits
    with styled():
        figure = canvas(width, height, title, caption)
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
                    axes.text(
                        column, row + 0.2, rounded_percent(share[row, column]), **place, **middle
                    )
        edge = number - 0.5 + 10 / cell
        aside: Any = {"fontsize": size, "color": DISCREET}
        axes.text(edge, -0.5 - 6 / cell, "recall", **aside)
        for row in range(number):
            recall = rounded_percent(share[row, row]) if totals[row] else "-"
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
    low, high = lowest_worth_showing(results), results.max()
    caption += "; outlined: chosen" * (chosen is not None)
    caption += "; hatched: no result" * (not finite.all())
    title, caption = shorten(title, 72), shorten(caption.removeprefix("; "), 110)

    # In pixels: the sides of the map and its smallest cell, then around it what the text needs.
    sides, rooms = [], []
    for edges, name, most in ((x_edges, x_name, 88), (y_edges, y_name, 60)):
        span = edges[-1]  # in smallest distances of two values
        sides.append(max(200.0, span * min(most, max(22, 960 / span)), text_width(name, TEXT) - 40))
        rooms.append(sides[-1] / span)
    (across, up), (wide, tall) = sides, rooms
    lines = {line for text in texts.values() for line in text.split("\n")}
    widest = max((text_width(line, TEXT) for line in lines), default=1.0)
    deepest = (2 if any("\n" in text for text in texts.values()) else 1) * 1.25 * TEXT * DPI / 72
    size = TEXT * min(1.0, 0.92 * wide / widest, 0.92 * tall / deepest)
    x_names, y_names = ([shortest_number(value) for value in values] for _, values in (x, y))
    x_size, y_size = (min(TEXT, 0.4 * room) for room in rooms)
    widths = np.array([text_width(name, x_size) for name in x_names])
    apart = (widths[1:] + widths[:-1]) / 2 + 8 < np.diff(x_ticks) * wide
    angle, below = (0, 18) if apart.all() else (90, widths.max())
    left, top = max(text_width(name, y_size) for name in y_names) + 48, 84 if caption else 60
    needed = left + across + 150, text_width(title, TITLE), text_width(caption, SMALL)
    width, height = 16 + math.ceil(max(needed)), math.ceil(top + up + below + 50)
    with styled():
        figure = canvas(width, height, title, caption)
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
        figure.colorbar(mesh, bar, extend=extend, extendfrac=0.05, format=percent)
        bar.set_ylabel("validation accuracy")
    return figure


def _swept(name: str, values: Sequence[float]) -> tuple[Floats, Floats, str]:
    """Ticks [N] and edges [N + 1] of the cells of ascending values, and the name of the axis.

    From 0 on, in units of the smallest distance of two ticks.
    """
    numbers = np.asarray(values, float)
    if not numbers.size or not np.isfinite(numbers).all() or (np.diff(numbers) <= 0).any():
        raise ValueError(f"{name}: {values} are no ascending numbers")
    name, gaps = shorten(name, 40), np.diff(numbers)
    if gaps.size and numbers[0] > 0:
        gaps = max(gaps, np.diff(np.log10(numbers)), key=lambda some: some.min() / some.mean())
    if gaps.size and gaps.min() < 0.4 * gaps.mean():
        name, gaps = f"{name} (not to scale)", np.ones_like(gaps)
    gaps = gaps / gaps.min(initial=math.inf)
    around = np.pad(gaps, 1, "edge") if gaps.size else np.ones(2)
    ticks = around[0] / 2 + np.cumsum(np.r_[0, gaps])
    return ticks, np.cumsum(np.r_[0, (around[1:] + around[:-1]) / 2]), name
