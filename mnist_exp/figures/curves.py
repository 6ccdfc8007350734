"""Figures of curves: loss and accuracy of a run and of a sweep, and the reliability diagram."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from mnist_exp.figures.style import (
    BLUE,
    DISCREET,
    GREEN,
    INK,
    ORANGE,
    RANKED,
    SMALL,
    TEXT,
    Floats,
    canvas,
    lowest_worth_showing,
    percent,
    shorten,
    styled,
    text_width,
)

# Okabe and Ito's but the yellow, too pale for a line on white; at most this many cells have a hue.
HUES = (BLUE, ORANGE, GREEN, "#cc79a7", "#e69f00", "#56b4e9", INK, "#999999")
# In turn: thin lines of two hues that few can tell apart (green and pink, say) differ in this.
DASHES = ("-", "--", "-.")

Points = Sequence[tuple[int, float]]  # (epoch, value)
History = Mapping[str, Points]


def learning_curves(
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
    with styled():
        figure = canvas(1080, 480, shorten(title, 72))
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
        axes.yaxis.set_major_formatter(percent)
        return
    decades = math.log10(max(values)) - math.log10(min(values)) if min(values) > 0 else 0.0
    if decades > 1.5:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.7g}")


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
    names = [shorten(label, 64) + " (chosen)" * (label == chosen) for label in named]
    lines = [Line2D([], [], **styles[label]) for label in named]
    if many:
        names.append(f"{len(cells) - len(named)} others, paler by rank")
        lines.append(Line2D([], [], color=RANKED(0.5), linewidth=1.2))
    across = max(1, int(1040 // (60 + max((text_width(name, TEXT) for name in names), default=0))))
    height = 456 + 24 * math.ceil(len(names) / across)
    with styled():
        figure = canvas(1080, height, shorten(title, 72))
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
    worth = last >= lowest_worth_showing(last) if finite else ()
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


def reliability_diagram(
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
    title = shorten(title, 48)
    caption = f"expected calibration error {ece:.2%}, {counts.sum()} images"
    widest = max((text_width(str(count), SMALL) for count in counts), default=0.0)
    turned = widest > 470 / bins - 4  # wider than a bar, in pixels
    with styled():
        figure = canvas(560, 760, title, caption)
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
            axis.set_major_formatter(percent)
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
