from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from matplotlib.transforms import Bbox

from mnist_exp.figures.curves import (
    BEST,
    GREY,
    HUES,
    cell_colours,
    comparison_curves,
    learning_curves,
    reliability_diagram,
    sweep_curves,
)
from mnist_exp.figures.style import ORANGE, pixels
from mnist_exp.training.metrics import Calibration
from tests.figures.drawn import INF, NAN, ODD_NAMES, history, ink_at_edges

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"lr": [(1, 0.1)]},
        {"train/loss": [(1, 0.0)]},
        {"train/loss": []},
        history(1),
        history(100),
        {"train/loss": [(1, NAN), (2, NAN)], "val/accuracy": [(1, NAN)]},
        {"train/loss": [(1, 2.3), (2, INF), (3, 1.7e308), (4, NAN), (5, 1e-300), (6, -INF)]},
        {"train/loss": [(1, -1.0), (2, 900.0)], "val/accuracy": [(1, 0.1), (2, 0.1)]},
    ],
)
@pytest.mark.parametrize(("best", "test_accuracy"), [(None, None), (1, 0.98)])
def test_curves_draws_what_there_is(
    values: dict[str, list[tuple[int, float]]], best: int | None, test_accuracy: float | None
) -> None:
    figure = learning_curves(values, best, "A long title " * 20, test_accuracy)
    assert not ink_at_edges(pixels(figure))
    for axes in figure.axes:
        assert all(tick == round(tick) for tick in axes.get_xticks())


def test_curves_leaves_gaps_and_shows_lone_points() -> None:
    figure = learning_curves({"train/loss": [(1, 2.0), (2, INF), (3, 1.0)]}, None, "x")
    line = figure.axes[0].lines[0]
    assert np.array_equal(line.get_ydata(), [2.0, NAN, 1.0], equal_nan=True)
    assert line.get_marker() == "o"


@pytest.mark.parametrize(("low", "scale"), [(0.2, "linear"), (0.001, "log")])
def test_loss_is_logarithmic_where_it_spans_decades(low: float, scale: str) -> None:
    assert learning_curves(history(50, low), None, "x").axes[0].get_yscale() == scale


def test_curves_names_best_epoch_and_test_accuracy() -> None:
    values = {"val/accuracy": [(1, 0.5), (2, 0.9712), (3, 0.9)]}
    figure = learning_curves(values, 2, "x", 0.9666)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["best epoch 2: 97.12%", "validation", "test 96.66%"]


Curves = dict[str, list[tuple[int, float]]]


def sweep(cells: int, seeds: int, epochs: int) -> dict[str, list[Curves]]:
    """The better, the earlier."""
    found = {}
    for cell in range(cells):
        runs = []
        for seed in range(seeds):
            values = history(epochs, 0.1 + 0.01 * cell + 0.002 * seed)
            del values["train/accuracy"]
            runs.append(values)
        found[f"lr={cell} batch_size=64"] = runs
    return found


@pytest.mark.parametrize(
    "cells",
    [
        {"a": [{}], "b": [{"val/loss": []}]},
        {"a": [{"val/accuracy": [(1, NAN)]}, {"train/loss": [(1, 1.7e308), (2, INF)]}]},
        {"a": [{"val/loss": [(1, 0.0), (2, -1.0), (3, 1e30)]}], "b": [{"val/loss": [(1, 1.0)]}]},
        {name: [history(3)] for name in ODD_NAMES[:8]},
        {"a" * 200: [history(3)], "b" * 70: [history(2)]},
        sweep(2, 1, 100),
        sweep(16, 5, 1),
        sweep(30, 2, 10),
    ],
)
def test_sweep_curves_draws_what_there_is(cells: dict[str, list[Any]]) -> None:
    *_, chosen = cells
    assert not ink_at_edges(pixels(sweep_curves(cells, chosen, "A long title " * 20)))


def test_sweep_curves_show_mean_and_deviation_over_seeds() -> None:
    first = {"val/accuracy": [(1, 0.5), (2, 0.6), (3, NAN), (4, 0.9)]}
    second = {"val/accuracy": [(1, 0.7), (2, INF), (3, NAN)]}
    axes = sweep_curves({"a": [first, second]}, None, "x").axes[1]
    assert axes.get_title(loc="left") == "validation accuracy"
    (line,), (band,) = axes.lines, axes.collections
    assert np.allclose(line.get_ydata(), [0.6, 0.6, NAN, 0.9], equal_nan=True)
    corners = np.concatenate([path.vertices for path in band.get_paths()])
    assert set(corners[:, 0]) == {1}  # the only epoch of two runs
    assert np.allclose(
        [corners[:, 1].min(), corners[:, 1].max()], [0.6 - 0.02**0.5, 0.6 + 0.02**0.5]
    )


@pytest.mark.parametrize("many", [1, 9])
def test_sweep_curves_show_lone_points(many: int) -> None:
    values = {"val/loss": [(1, 2.0), (2, NAN), (3, 1.0), (4, 0.9)], "val/accuracy": [(1, 0.9)]}
    figure = sweep_curves({str(cell): [values] for cell in range(many)}, None, "x")
    for axes, alone in zip(figure.axes, ([True, False, False, False], [True]), strict=True):
        assert len(axes.lines) == many
        for line in axes.lines:
            assert (line.get_marker(), line.get_markevery()) == ("o", alone)


@pytest.mark.parametrize("count", [3, 20])
def test_the_chosen_cell_is_thickest_and_on_top(count: int) -> None:
    cells = sweep(count, 2, 5)
    chosen = list(cells)[1]
    for axes in sweep_curves(cells, chosen, "x").axes:
        lines = {line.get_label(): line for line in axes.lines}
        others = [line for label, line in lines.items() if label != chosen]
        assert lines[chosen].get_linewidth() > max(line.get_linewidth() for line in others)
        assert lines[chosen].get_zorder() > max(line.get_zorder() for line in others)
        assert lines[chosen].get_color() == ORANGE  # as in a heat map
        assert max(band.get_zorder() for band in axes.collections) < others[-1].get_zorder()


@pytest.mark.parametrize("count", [1, 4, 8, 9, 16, 48, 200])
def test_the_best_few_and_the_chosen_have_a_colour_of_their_own(count: int) -> None:
    cells = sweep(count, 2, 3)
    best = list(cells)[: count if count <= len(HUES) else BEST]
    for chosen in {next(iter(cells)), list(cells)[-1]}:
        coloured = {*best, chosen}
        for axes in sweep_curves(cells, chosen, "x").axes:
            colours = {str(line.get_label()): line.get_color() for line in axes.lines}
            assert {label for label in colours if colours[label] != GREY} == coloured
            assert len({colours[label] for label in coloured}) == len(coloured)
            assert len(axes.collections) == len(coloured)  # bands
            order = {str(line.get_label()): line.get_zorder() for line in axes.lines}
            grey = [order[label] for label in cells if label not in coloured]
            assert max(grey, default=0) < min(order[label] for label in coloured)


def test_the_chosen_cell_is_orange_and_the_others_have_the_hues_by_rank() -> None:
    assert cell_colours(["a", "b"], None) == {"a": HUES[0], "b": HUES[1]}
    assert cell_colours(["a", "b"], "a") == {"a": ORANGE, "b": HUES[0]}
    assert cell_colours(["a", "b"], "of another sweep") == {"a": HUES[0], "b": HUES[1]}


def test_compared_curves_have_given_colours_and_else_the_next_hues() -> None:
    cells = sweep(3, 2, 4)
    first, second, third = cells
    figure = comparison_curves(cells, {second: HUES[0]}, "x")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["validation accuracy", "training loss", "validation loss"]
    for axes in figure.axes:
        colours = {str(line.get_label()): line.get_color() for line in axes.lines}
        assert colours == {first: HUES[1], second: HUES[0], third: HUES[2]}
        assert len(axes.collections) == 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(cells)
    assert not ink_at_edges(pixels(figure))


def test_all_compared_curves_are_in_sight() -> None:
    ends = {"a": 0.98, "b": 0.97, "c": 0.979, "failed": 0.1}
    cells = {name: [{"val/accuracy": [(1, 0.1), (2, end)]}] for name, end in ends.items()}
    (axes,) = comparison_curves(cells, {}, "x").axes
    assert axes.get_ylim()[0] < 0.1 and not axes.texts


def test_more_compared_curves_than_hues_differ_in_dashes() -> None:
    cells = sweep(2 * len(HUES), 1, 3)
    lines = comparison_curves(cells, {}, "x").axes[0].lines
    assert len({(str(line.get_color()), line.get_linestyle()) for line in lines}) == len(cells)


def test_a_comparison_without_any_epoch_says_so() -> None:
    (axes,) = comparison_curves({"a": [{}], "b": [{}]}, {}, "x").axes
    assert [text.get_text() for text in axes.texts] == ["no finite value"]


def test_legend_names_all_cells_or_the_best_and_the_chosen() -> None:
    def legend(count: int, chosen: int) -> list[str]:
        cells = sweep(count, 1, 2)
        figure = sweep_curves(cells, list(cells)[chosen], "x")
        return [text.get_text() for text in figure.legends[0].get_texts()]

    few = [f"lr={cell} batch_size=64" for cell in range(8)]
    assert legend(8, 0) == [few[0] + " (chosen)", *few[1:]]
    assert legend(20, 6) == [*few[:4], few[6] + " (chosen)", "15 more"]


@pytest.mark.parametrize("failed", [0.1, 0.95])
def test_failed_cells_do_not_drown_the_others(failed: float) -> None:
    rising = [[(1, 0.97), (2, 0.98 - cell / 1000)] for cell in range(7)]
    cells = {str(i): [{"val/accuracy": points}] for i, points in enumerate(rising)}
    cells["failed"] = [{"val/accuracy": [(1, 0.1), (2, failed)], "val/loss": [(1, 1e9)]}]
    cells["0"][0]["val/loss"] = cells["1"][0]["val/loss"] = [(1, 0.5)]
    loss, accuracy = sweep_curves(cells, "0", "x").axes
    assert 0.96 < accuracy.get_ylim()[0] < 0.97
    assert 0.98 < accuracy.get_ylim()[1] < 0.99
    assert [text.get_text() for text in accuracy.texts] == ["↓ 1 below"]
    assert loss.get_ylim()[1] < 1
    assert loss.get_yscale() == "linear"
    assert [text.get_text() for text in loss.texts] == ["↑ 1 above"]


def test_room_is_made_for_the_band() -> None:
    cells = {"a": [{"val/accuracy": [(1, 0.8)]}, {"val/accuracy": [(1, 0.9)]}]}
    low, high = sweep_curves(cells, None, "x").axes[1].get_ylim()
    assert low < 0.85 - 0.05 * 2**0.5 < 0.85 + 0.05 * 2**0.5 < high


@pytest.mark.parametrize(
    ("missing", "titles"),
    [
        ([], ["validation loss", "validation accuracy"]),
        (["val/loss"], ["training loss", "validation accuracy"]),
        (["val/accuracy"], ["validation loss", "training loss"]),
        (["val/loss", "val/accuracy"], ["training loss"]),
    ],
)
def test_training_loss_stands_in_for_missing_validation(
    missing: list[str], titles: list[str]
) -> None:
    values = {name: points for name, points in history(3).items() if name not in missing}
    figure = sweep_curves({"a": [values]}, "a", "x")
    assert [axes.get_title(loc="left") for axes in figure.axes] == titles
    assert all(len(axes.lines) == 1 for axes in figure.axes)


@pytest.mark.parametrize(("low", "scale"), [(0.2, "linear"), (0.001, "log")])
def test_loss_of_a_sweep_is_logarithmic_where_it_spans_decades(low: float, scale: str) -> None:
    axes = sweep_curves({"a": [history(9, low), history(9, low / 9)]}, None, "x").axes[0]
    assert axes.get_yscale() == scale
    means = np.asarray(axes.lines[0].get_ydata()).tolist()
    assert axes.get_ylim()[0] < min(means) < max(means) < axes.get_ylim()[1]


def test_few_cells_of_a_sweep_differ_in_more_than_hue() -> None:
    lines = sweep_curves(sweep(8, 1, 5), None, "x").axes[0].lines
    dashes = [line.get_linestyle() for line in lines]
    assert all(a != b for a, b in pairwise(dashes))
    assert dashes[2] != dashes[3]  # green and pink, alike to one who sees no green


CONFIDENCE = np.array([NAN, 0.3, 0.55, 0.97])
ACCURACY = np.array([NAN, 0.5, 0.4, 0.99])


def test_calibration_draws_what_was_given_but_for_empty_bins() -> None:
    figure = reliability_diagram(Calibration(CONFIDENCE, ACCURACY, np.array([0, 2, 30, 9968])), "x")
    above, below = figure.axes
    uppers: list[Any] = list(above.patches)
    lowers: list[Any] = list(below.patches)
    assert [bar.get_height() for bar in uppers] == [0.5, 0.4, 0.99]
    assert [bar.get_height() for bar in lowers] == [2, 30, 9968]
    for bars in (uppers, lowers):
        assert np.allclose(
            [bar.get_x() + bar.get_width() / 2 for bar in bars], [3 / 8, 5 / 8, 7 / 8]
        )
    points, even = above.lines
    assert np.array_equal(points.get_xydata(), np.stack([CONFIDENCE[1:]] * 2, 1))
    assert np.array_equal(even.get_xydata(), [[0, 0], [1, 1]])
    gaps = [np.asarray(path.vertices).tolist() for path in above.collections[0].get_paths()]
    triples = zip(CONFIDENCE[1:], ACCURACY[1:], strict=True)
    assert gaps == [[[x, y], [x, x]] for x, y in triples]
    assert [text.get_text() for text in below.texts] == ["2", "30", "9968"]
    assert figure.texts[1].get_text() == "expected calibration error 2.04%, 10000 images"


@pytest.mark.parametrize("bins", [1, 2, 10, 15, 30])
@pytest.mark.parametrize("most", [0, 1, 60000, 1234567])
def test_a_bin_of_few_images_is_seen_beside_one_of_nearly_all(bins: int, most: int) -> None:
    sizes = np.ones(bins, int)
    sizes[-1] = most
    share = (np.arange(bins) + 0.5) / bins
    figure = reliability_diagram(Calibration(share, share, sizes), "A long title " * 20)
    assert not ink_at_edges(pixels(figure))
    _, below = figure.axes
    for bar in below.patches:
        inside = Bbox.intersection(bar.get_window_extent(), below.bbox)
        assert inside is not None and inside.height > 5
    for text in below.texts:
        extent = text.get_window_extent()
        assert below.bbox.y0 < extent.y0 < extent.y1 < below.bbox.y1
    if bins <= 15:
        extents = [text.get_window_extent() for text in below.texts]
        assert all(a.x1 < b.x0 for a, b in pairwise(extents))
