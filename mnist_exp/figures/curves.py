"""Figures of curves: loss and accuracy of a run and of a sweep, and the reliability diagram."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from mnist_exp.figures import style
from mnist_exp.figures.style import BLUE, GREEN, INK, ORANGE, Floats, PixelFigure

if TYPE_CHECKING:
    from mnist_exp.training.metrics import Calibration  # which imports torch

# Okabe and Ito's but the yellow, too pale for a line on white; at most this many cells have a hue.
HUES = (BLUE, ORANGE, GREEN, "#cc79a7", "#e69f00", "#56b4e9", INK, "#999999")
BEST = 4  # cells of a larger sweep that have one: the best, beside the chosen
GREY = "#c4c4c4"  # of the others
# In turn: thin lines of two hues that few can tell apart (green and pink, say) differ in this.
DASHES = ("-", "--", "-.")
WIDTH = 1064  # pixels of two panels

Points = Sequence[tuple[int, float]]  # (epoch, value)
History = Mapping[str, Points]
Cells = Mapping[str, Sequence[History]]  # the runs (the seeds) of each cell


@style.styled()
def learning_curves(
    history: History, best_epoch: int | None, title: str, test_accuracy: float | None = None
) -> Figure:
    """Return a figure of loss and accuracy (0 to 1) in training and validation by epoch.

    A value that is not finite is a gap. A loss over more than a decade and a half has a log axis.

    Args:
        history: The points of train/loss, val/loss, train/accuracy and val/accuracy; any may be
            missing.
        best_epoch: The epoch to mark as the best, if validation chose one.
        title: The title of the figure.
        test_accuracy: The accuracy to mark as that of the test set.
    """
    figure = PixelFigure((WIDTH, 448), title)
    figure.set_layout_engine("constrained", w_pad=0.08, rect=(0, 0, 1, 0.92))
    lines: dict[str, Line2D] = {}
    for name, axes in zip(("loss", "accuracy"), figure.subplots(1, 2), strict=True):
        _draw_run(axes, name, history)
        if best_epoch is not None:
            best = dict(history.get("val/accuracy", ())).get(best_epoch, math.nan)
            label = f"best epoch {best_epoch}"
            label += f": {best:.2%}" if math.isfinite(best) else ""
            axes.axvline(best_epoch, color=INK, linestyle=":", linewidth=1.3, label=label)
        if name == "accuracy" and test_accuracy is not None:
            label = f"test {test_accuracy:.2%}"
            axes.axhline(test_accuracy, color=GREEN, linestyle="--", linewidth=1.3, label=label)
        lines |= {str(line.get_label()): line for line in axes.lines}
    if lines:  # under the panels, where it cannot hide a curve
        figure.legend(lines.values(), lines, loc="outside lower center", ncols=len(lines))
    return figure


def _draw_run(axes: Axes, name: str, history: History) -> None:
    finite: list[float] = []
    for split, label, colour, marker in (
        ("train", "training", BLUE, "o"),
        ("val", "validation", ORANGE, "s"),
    ):
        points = history.get(f"{split}/{name}", ())
        values = _with_gaps(points)
        kept = [value for value in values if not math.isnan(value)]
        finite += kept
        if kept:  # a point alone between gaps has no line to be seen by
            more: Any = {"marker": marker if len(kept) <= 30 else "", "markersize": 5}
            axes.plot([epoch for epoch, _ in points], values, color=colour, label=label, **more)
    # The same epochs in both panels, those without a finite value too.
    _set_axes(axes, name, [epoch for points in history.values() for epoch, _ in points], finite)


def _with_gaps(points: Points) -> list[float]:
    """Return the values, nan for a gap: beyond float32 a diverged run would overflow an axis."""
    return [value if abs(value) < 1e38 else math.nan for _, value in points]


def _set_axes(axes: Axes, title: str, epochs: list[int], values: list[float]) -> None:
    """Set title, axes and ticks of a panel of these finite values; not all epochs may have one."""
    axes.set(title=title, xlabel="epoch")
    axes.grid(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    first, last = min(epochs, default=1), max(epochs, default=1)
    room = max(0.5, 0.02 * (last - first))
    axes.set_xlim(first - room, last + room)
    if not values:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center")
    elif title.endswith("accuracy"):
        axes.yaxis.set_major_formatter(style.percent_tick)
    else:
        decades = math.log10(max(values)) - math.log10(min(values)) if min(values) > 0 else 0.0
        if decades > 1.5:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.7g}")


@style.styled()
def sweep_curves(cells: Cells, chosen: str | None, title: str) -> Figure:
    """Return a figure of validation loss and accuracy by epoch of all cells of a sweep, best first.

    Each is the mean of its runs, within a band of one standard deviation (ddof=1) where two or more
    have the epoch; values that are not finite count as missing. Training loss stands in for what no
    run has. Up to 8 cells have a colour and dashes each. Of more, the best few and the chosen one
    have, and the others are grey, without bands. Cells that end far behind the others get no room:
    an arrow counts those out of sight.

    Args:
        cells: The metrics by epoch of each cell's runs, by the name of the cell, the best first.
        chosen: The name of the chosen cell.
        title: The title of the figure.
    """
    histories = [history for runs in cells.values() for history in runs]
    keys = dict.fromkeys(
        key if any(len(history.get(key, ())) for history in histories) else "train/loss"
        for key in ("val/loss", "val/accuracy")
    )
    styles = _cell_styles(list(cells), chosen)
    return _draw_panels(list(keys), cells, styles, _sweep_legend(styles, chosen), title)


@style.styled()
def comparison_curves(cells: Cells, colours: Mapping[str, str], title: str) -> Figure:
    """Return a figure of validation accuracy and the losses by epoch of a few runs or cells.

    They are drawn as in `sweep_curves`, but all of them get room.

    Args:
        cells: The metrics by epoch of the runs of each, by its name, in the order of the legend.
        colours: Their colours by name; those that are not in here have hues that none in here has.
        title: The title of the figure.
    """
    known = {key for runs in cells.values() for history in runs for key in history}
    keys = [key for key in ("val/accuracy", "train/loss", "val/loss") if key in known]
    free = itertools.cycle([hue for hue in HUES if hue not in colours.values()] or HUES)
    styles: dict[str, dict[str, Any]] = {}
    lines, names = [], []
    for i, label in enumerate(cells):
        colour = colours.get(label) or next(free)
        # another turn of the hues begins with other dashes
        dashes = DASHES[(i % len(HUES) + i // len(HUES)) % len(DASHES)]
        styles[label] = {"color": colour, "linestyle": dashes, "linewidth": 1.8, "zorder": 3}
        lines.append(Line2D([], [], **styles[label]))
        names.append(style.shorten(label, 64))
    return _draw_panels(
        keys or ["train/loss"], cells, styles, (lines, names), title, all_of_it=True
    )


def _draw_panels(
    keys: Sequence[str],
    cells: Cells,
    styles: Mapping[str, Any],
    legend: tuple[list[Line2D], list[str]],
    title: str,
    all_of_it: bool = False,
) -> Figure:
    """Return a figure with a panel for each metric, and a legend under them.

    Args:
        keys: The metrics.
        cells: As for `sweep_curves`.
        styles: The options of each cell's line.
        legend: Lines and their names.
        title: The title of the figure.
        all_of_it: Cells that end far behind the others get room as well.
    """
    lines, names = legend
    width = WIDTH if len(keys) < 3 else WIDTH * 3 // 2
    widest = max(style.text_width(name, style.TEXT) for name in names)
    across = max(1, int((width - 24) // (60 + widest)))
    figure = PixelFigure((width, 424 + 24 * math.ceil(len(names) / across)), title)
    rect = (0, 0, 1, 1 - 38 / figure.height)
    figure.set_layout_engine("constrained", w_pad=0.08, rect=rect)
    for key, axes in zip(keys, np.ravel(figure.subplots(1, len(keys))), strict=True):
        _draw_cells(axes, key, cells, styles, all_of_it)
    figure.legend(lines, names, loc="outside lower center", ncols=across)
    return figure


def _sweep_legend(styles: Mapping[str, Any], chosen: str | None) -> tuple[list[Line2D], list[str]]:
    """Return the lines and names of the cells that have a colour, and of the others together."""
    named = [label for label, options in styles.items() if options["color"] != GREY]
    lines = [Line2D([], [], **styles[label]) for label in named]
    names = [style.shorten(label, 64) + (" (chosen)" if label == chosen else "") for label in named]
    if len(named) < len(styles):
        names.append(f"{len(styles) - len(named)} more")
        lines.append(Line2D([], [], color=GREY, linewidth=1.2))
    return lines, names


def cell_colours(labels: Sequence[str], chosen: str | None) -> dict[str, str]:
    """Return the colours of the cells of a sweep by their names, of those that have one.

    The chosen cell is orange, as its frame in a heat map is. The others have the hues that are left
    in the order of their rank: all of them where there are enough hues, and else the best few.

    Args:
        labels: The names of all cells, the best first.
        chosen: The name of the chosen cell.
    """
    hues = [hue for hue in HUES if hue != ORANGE] if chosen in labels else list(HUES)
    coloured = labels if len(labels) <= len(HUES) else labels[:BEST]
    others = [label for label in coloured if label != chosen]
    colours = dict(zip(others, hues, strict=False))
    return {label: ORANGE if label == chosen else colours[label] for label in labels
            if label == chosen or label in colours}  # fmt: skip


def _cell_styles(labels: Sequence[str], chosen: str | None) -> dict[str, dict[str, Any]]:
    """Return the options of each cell's line; the better a cell, the further on top."""
    styles: dict[str, dict[str, Any]] = {}
    colours = cell_colours(labels, chosen)
    for rank, label in enumerate(labels):
        on_top = 1 - rank / len(labels)
        if label in colours:
            dashes = DASHES[list(colours).index(label) % len(DASHES)]
            styles[label] = {"color": colours[label], "linewidth": 1.8, "linestyle": dashes}
            styles[label]["zorder"] = 3 + on_top / 2
        else:
            # thinner the more there are: they must not become an area
            width = max(0.4, min(1.0, 40 / len(labels)))
            styles[label] = {"color": GREY, "linewidth": width, "zorder": 2 + on_top / 2}
        if label == chosen:
            styles[label] |= {"linewidth": 3.6, "zorder": 4}
    return styles


def _draw_cells(
    axes: Axes, key: str, cells: Cells, styles: Mapping[str, Any], all_of_it: bool
) -> None:
    """Draw one metric of all cells over their epochs, each line with its style.

    `all_of_it`: cells that end far behind the others get room as well.
    """
    histories = [history for runs in cells.values() for history in runs]
    # all of them, whether or not they have a value here
    epochs = [epoch for history in histories for points in history.values() for epoch, _ in points]
    sign = 1 if key.endswith("accuracy") else -1  # times a value: the higher, the better
    every = {label: _over_seeds(runs, key) for label, runs in cells.items()}
    finite = [cell[:, np.isfinite(cell[1])] for cell in every.values()]
    finite = [cell for cell in finite if cell.size]
    last = sign * np.array([cell[1, -1] for cell in finite])
    lowest = style.lowest_worth_showing(last) if finite and not all_of_it else -math.inf
    shown = [cell for cell in finite if sign * cell[1, -1] >= lowest]
    _, means, stds = np.nan_to_num(np.hstack([np.empty((3, 0)), *shown]))
    title = key.replace("val/", "validation ").replace("train/", "training ")
    _set_axes(axes, title, epochs, means.tolist())
    for label, (at, mean, std) in every.items():
        if np.isfinite(mean).any():
            # A point alone between gaps has no line to be seen by.
            alone = np.isfinite(mean) & (np.convolve(np.isfinite(mean), [1, 1, 1])[1:-1] == 1)
            more: Any = {"marker": "o", "markevery": alone.tolist()} if alone.any() else {}
            axes.plot(at, mean, label=label, **styles[label], **more)
            if styles[label]["color"] == GREY:
                continue  # the bands of many would be a fog
            # Below all lines and above the grid; with an edge, that of a single epoch is seen too.
            band: Any = {"color": styles[label]["color"], "alpha": 0.25, "linewidth": 1}
            axes.fill_between(at, mean - std, mean + std, zorder=1.8, **band)
    if not shown:
        return
    # On a log axis not down to the bands, which may reach 0.
    bottoms = means if axes.get_yscale() == "log" else means - stds
    scale = axes.yaxis.get_transform()
    low, high = scale.transform([bottoms.min(), (means + stds).max()])
    room = max(0.05 * (high - low), 1e-3)
    low, high = scale.inverted().transform([low - room, high + room])
    axes.set_ylim(low, high)
    worst = low if sign > 0 else -high
    hidden = sum((sign * cell[1]).max() < worst for cell in finite)
    if hidden:
        text, y = (f"↓ {hidden} below", 0.02) if sign > 0 else (f"↑ {hidden} above", 0.94)
        axes.text(0.99, y, text, transform=axes.transAxes, color=style.DISCREET, ha="right")


def _over_seeds(runs: Sequence[History], key: str) -> Floats:
    """Return epochs, means and deviations [3, E] over the runs with a finite value, or nan."""
    epochs = sorted({epoch for history in runs for epoch, _ in history.get(key, ())})
    table = np.full((len(runs), len(epochs)), math.nan)
    for row, history in zip(table, runs, strict=True):
        points = history.get(key, ())
        row[np.searchsorted(epochs, [epoch for epoch, _ in points])] = _with_gaps(points)
    values = np.ma.masked_invalid(table)
    spread = values.std(0, ddof=1)
    return np.stack([epochs, values.mean(0).filled(math.nan), spread.filled(math.nan)])


@style.styled()
def reliability_diagram(calibration: "Calibration", title: str) -> Figure:
    """Return a figure of accuracy by confidence, and of how many images have that confidence.

    Bins without images are left out. Images are counted on a log axis, as nearly all may be in one
    bin. Guo, Pleiss, Sun & Weinberger, "On Calibration of Modern Neural Networks" (2017),
    figure 1.
    """
    bins, kept = len(calibration.counts), calibration.counts > 0
    confidence, accuracy = calibration.confidence[kept], calibration.accuracy[kept]
    counts = calibration.counts[kept]
    centres = (np.flatnonzero(kept) + 0.5) / bins
    caption = f"expected calibration error {calibration.error:.2%}, {counts.sum()} images"
    figure = PixelFigure((544, 704), title, caption, longest=48)
    figure.set_layout_engine("constrained", w_pad=0.08, rect=(0, 0, 1, 0.92))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    bar: Any = {"width": 0.92 / bins, "zorder": 2}
    above.bar(centres, accuracy, color="#a6cfe8", label="accuracy", **bar)
    diamonds: Any = {"marker": "D", "linestyle": "", "clip_on": False, "color": ORANGE}
    above.plot(confidence, confidence, label="mean confidence", zorder=4, **diamonds)
    above.vlines(confidence, accuracy, confidence, ORANGE, zorder=3)
    diagonal: Any = {"color": INK, "linestyle": ":", "linewidth": 1.3, "zorder": 3}
    above.plot([0, 1], [0, 1], label="calibrated", **diagonal)
    above.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), xticks=np.linspace(0, 1, 6))
    above.grid(True)
    for axis in (above.xaxis, above.yaxis):
        axis.set_major_formatter(style.percent_tick)
    below.bar(centres, counts, color="#999999", **bar)
    below.set_yscale("log")
    below.yaxis.set_minor_locator(NullLocator())
    top = counts.max(initial=20) ** 2.5  # room for the numbers
    below.set(xlabel="confidence", ylabel="images (log)", ylim=(top**-0.1, top), yticks=[])
    number: Any = {"fontsize": style.SMALL, "rotation": 90, "ha": "center"}
    for x, count in zip(centres, counts, strict=True):
        below.annotate(str(count), (x, count), (0, 3), textcoords="offset points", **number)
    figure.legend(loc="outside lower center", ncols=3)
    return figure
