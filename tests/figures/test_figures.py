import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from IPython.core.formatters import DisplayFormatter
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from mnist_exp.figures import plots

pytestmark = pytest.mark.filterwarnings("error")

DIGITS = [str(i) for i in range(10)]
ODD_NAMES = ["Ankle boot", "$", r"$\no{$", "T-shirt/top", "two\nlines", "a" * 60, "", "%s", "→"]
INF, NAN = float("inf"), float("nan")


def noise(count: int, height: int = 28, width: int = 28) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width), dtype=np.uint8)


def find(picture: np.ndarray, tile: np.ndarray) -> tuple[int, int]:
    """Row and column of the one place in picture [H, W] where tile [h, w] is."""
    windows = np.lib.stride_tricks.sliding_window_view(picture, tile.shape)
    places = np.argwhere(windows[:, :, 0, 0] == tile[0, 0])
    for y, x in ((0, -1), (-1, 0), (-1, -1), (tile.shape[0] // 2, tile.shape[1] // 2)):
        places = places[windows[places[:, 0], places[:, 1], y, x] == tile[y, x]]
    places = [(y, x) for y, x in places.tolist() if np.array_equal(windows[y, x], tile)]
    assert len(places) == 1
    return places[0]


def has_orange(picture: np.ndarray) -> np.ndarray:
    orange = np.round(np.array(to_rgb(plots.ORANGE)) * 255).astype(np.uint8)
    return (picture == orange).all(-1)


def ink_at_edges(picture: np.ndarray) -> bool:
    """Whether anything touches the outermost pixels of the figure: text that is cut off would."""
    edges = picture[0], picture[-1], picture[:, 0], picture[:, -1]
    return any((edge != 255).any() for edge in edges)


@pytest.mark.parametrize(("count", "height", "width"), [(30, 28, 28), (8, 64, 64), (7, 10, 35)])
def test_grid_holds_every_image_in_reading_order(count: int, height: int, width: int) -> None:
    images = noise(count, height, width)
    picture = plots.pixels(plots.grid(images, ["7"] * count, title="Some"))
    scale = 140 // width
    places = [find(picture[..., 1], np.kron(i, np.ones((scale, scale), np.uint8))) for i in images]
    assert places == sorted(places)
    assert len({y for y, _ in places}) == -(-count // 6)
    assert len({x for _, x in places}) == 6


def test_grid_of_nameless_images() -> None:
    assert plots.pixels(plots.grid(noise(2, 1, 900), ["", ""], title="")).size


def test_grid_shrinks_large_images() -> None:
    picture = plots.pixels(plots.grid(noise(6, 300, 700), ["7"] * 6, title="Large"))
    assert 800 < picture.shape[1] < 1000


def test_grid_frames_and_names_wrong_predictions_only() -> None:
    images, labels, predicted = noise(12), [*DIGITS, "0", "1"], [*DIGITS, "0", "8"]
    predicted[4] = "9"
    figure = plots.grid(images, labels, predicted, [0.871] * 12, title="Some")
    picture = plots.pixels(figure)
    orange = has_orange(picture)
    for i, image in enumerate(images):
        y, x = find(picture[..., 1], np.kron(image, np.ones((5, 5), np.uint8)))
        around = orange[y - 3 : y + 143, x - 3 : x + 143]
        assert around[0].all() == around[:, -1].all() == (i in (4, 11))
        assert around.any() == (i in (4, 11))
    texts = [text.get_text() for text in figure.texts]
    assert [text for text in texts if text.startswith("✗")] == ["✗ 4 → 9  87%", "✗ 1 → 8  87%"]
    assert "3  87%" in texts
    assert any("10 of 12 right" in text for text in texts)


def test_grid_without_wrong_predictions_has_no_orange() -> None:
    labels = ["7"] * 5
    assert not has_orange(plots.pixels(plots.grid(noise(5), labels, labels, title="x"))).any()


@pytest.mark.parametrize("count", [1, 3, 9])
@pytest.mark.parametrize("size", [1, 28, 150])
def test_grid_of_odd_names_is_complete(count: int, size: int) -> None:
    names = ODD_NAMES[:count]
    images, share = noise(count, size, size), [0.5] * count
    figure = plots.grid(images, names, names[::-1], share, title="A long title " * 20)
    assert not ink_at_edges(plots.pixels(figure))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (noise(0), [], "images"),
        (noise(31), ["1"] * 31, "images"),
        (noise(2).astype(float), ["1"] * 2, "float64"),
        (noise(2)[..., None], ["1"] * 2, "images"),
        (noise(2), ["1"] * 3, "labels: 3 for 2 images"),
    ],
)
def test_grid_refuses(images: np.ndarray, labels: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plots.grid(images, labels, title="x")


def history(epochs: int, low: float = 0.5) -> dict[str, list[tuple[int, float]]]:
    falling = np.geomspace(2.3, low, epochs).tolist()
    loss = list(enumerate(falling, 1))
    accuracy = [(epoch, 1 - value / 3) for epoch, value in loss]
    return {
        "train/loss": loss,
        "val/loss": loss,
        "train/accuracy": accuracy,
        "val/accuracy": accuracy,
    }


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
@pytest.mark.parametrize(("best", "test_accuracy"), [(None, None), (1, 0.98), (2, NAN)])
def test_curves_draws_what_there_is(
    values: dict[str, list[tuple[int, float]]], best: int | None, test_accuracy: float | None
) -> None:
    figure = plots.curves(values, best, "A long title " * 20, test_accuracy)
    assert not ink_at_edges(plots.pixels(figure))
    for axes in figure.axes:
        assert all(tick == round(tick) for tick in axes.get_xticks())


def test_curves_leaves_gaps_and_shows_lone_points() -> None:
    figure = plots.curves({"train/loss": [(1, 2.0), (2, INF), (3, 1.0)]}, None, "x")
    line = figure.axes[0].lines[0]
    assert np.array_equal(line.get_ydata(), [2.0, NAN, 1.0], equal_nan=True)
    assert line.get_marker() == "o"


@pytest.mark.parametrize(("low", "scale"), [(0.2, "linear"), (0.001, "log")])
def test_loss_is_logarithmic_where_it_spans_decades(low: float, scale: str) -> None:
    assert plots.curves(history(50, low), None, "x").axes[0].get_yscale() == scale


def test_curves_names_best_epoch_and_test_accuracy() -> None:
    values = {"val/accuracy": [(1, 0.5), (2, 0.9712), (3, 0.9)]}
    figure = plots.curves(values, 2, "x", 0.9666)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["best epoch 2: 97.12%", "validation", "test 96.66%"]


def counts(classes: int, each: int = 400) -> np.ndarray:
    generator = np.random.default_rng(0)
    wrong = generator.multinomial(each // 10, np.full(classes, 1 / classes), classes)
    return wrong + (each - each // 10) * np.eye(classes, dtype=int)


@pytest.mark.parametrize(
    ("table", "classes"),
    [
        (counts(1), ["only"]),
        (counts(2), ["no", "yes"]),
        (counts(10), DIGITS),
        (counts(9, 123456), ODD_NAMES),
        (np.zeros((10, 10), int), DIGITS),
        (counts(26), [chr(97 + i) for i in range(26)]),
        (counts(47), [f"Ankle boot {i}" for i in range(47)]),
    ],
)
def test_confusion_is_complete(table: np.ndarray, classes: list[str]) -> None:
    assert not ink_at_edges(plots.pixels(plots.confusion(table, classes, "A long title " * 20)))


def test_confusion_has_true_rows_and_predicted_columns() -> None:
    figure = plots.confusion(np.array([[8, 2], [0, 5]]), ["cat", "dog"], "x")
    axes = figure.axes[0]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true", "predicted")
    texts = {text.get_text(): text.get_position() for text in axes.texts}
    assert texts["2"][0] == 1  # column dog
    assert round(texts["2"][1]) == 0  # row cat
    assert texts["80.0%"][1] == 0
    assert texts["100.0%"][1] == 1
    assert "0" not in texts
    on_screen = axes.transData.transform([(0, 0), (1, 0), (0, 1)])
    assert on_screen[1, 0] > on_screen[0, 0]
    assert on_screen[2, 1] < on_screen[0, 1]  # the second row is below the first


def test_rare_errors_are_seen_beside_a_strong_diagonal() -> None:
    table = np.diag([1000] * 10)
    table[3, 5] = 1
    figure = plots.confusion(table, DIGITS, "x")
    axes = figure.axes[0]
    (x, y), (x_none, y_none) = axes.transData.transform([(5.3, 3.3), (5.3, 4.3)]).astype(int)
    picture = plots.pixels(figure).astype(int)[::-1]  # counted from the bottom, as figures are
    assert np.abs(picture[y, x] - picture[y_none, x_none]).max() > 15


@pytest.mark.parametrize(
    ("row", "shares"),
    [
        ([0, 4, 996], ["0.4%", "99.6%"]),
        ([1, 0, 9999], ["<0.1%", ">99.9%"]),  # neither none nor all
        ([0, 0, 5], ["100.0%"]),
    ],
)
def test_confusion_writes_shares_under_counts(row: list[int], shares: list[str]) -> None:
    table = np.zeros((3, 3), int)
    table[2] = row
    axes = plots.confusion(table, DIGITS[:3], "x").axes[0]
    written = [text for text in axes.texts if -0.5 < text.get_position()[0] < 2.5]
    places = {text.get_text(): text.get_position() for text in written}
    assert len(places) == 2 * len(shares)  # nothing where there is none
    for count, share in zip(filter(None, row), shares, strict=True):
        assert places[share][0] == places[str(count)][0] == row.index(count)
        assert places[share][1] > 2 > places[str(count)][1]  # the rows go down
    assert axes.texts[-1].get_text() == shares[-1]  # the recall


@pytest.mark.parametrize(("classes", "has_shares"), [(2, True), (13, True), (14, False)])
def test_confusion_has_no_text_that_does_not_fit(classes: int, has_shares: bool) -> None:
    table = counts(classes, 9999)
    figure = plots.confusion(table, [str(i) for i in range(classes)], "x")
    plots.pixels(figure)
    axes = figure.axes[0]
    inside = [text for text in axes.texts if text.get_position()[0] < classes - 0.5]
    assert any("%" in text.get_text() for text in inside) == has_shares
    assert ("count and share" in figure.texts[1].get_text()) == has_shares
    for text in inside:
        extent, (x, y) = text.get_window_extent(), text.get_position()
        corners = [(round(x) - 0.5, round(y) + 0.5), (round(x) + 0.5, round(y) - 0.5)]
        (left, bottom), (right, top) = axes.transData.transform(corners)
        assert left < extent.x0 < extent.x1 < right
        assert bottom < extent.y0 < extent.y1 < top


def test_confusion_refuses_a_table_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"\(3, 3\) for 10 classes"):
        plots.confusion(np.zeros((3, 3), int), DIGITS, "x")


LRS, SIZES = ("optimizer.lr", [0.01, 0.03, 0.1, 0.3]), ("training.batch_size", [32, 64, 128])


def swept(rows: int, columns: int) -> np.ndarray:
    return np.linspace(0.95, 0.98, rows * columns).reshape(rows, columns)


def ticks(axes: Axes) -> dict[str, float]:
    """The places of the ticks of x, in pixels."""
    places = axes.transData.transform([(x, 0) for x in axes.get_xticks()])[:, 0]
    return dict(zip([label.get_text() for label in axes.get_xticklabels()], places, strict=True))


def boxes(figure: Figure) -> dict[str, tuple[float, float, float, float]]:
    """Left, bottom, right and top in pixels of what is drawn for single cells, by its kind."""
    found = {}
    for patch in figure.axes[0].patches:
        kind = "missing" if patch.get_hatch() else "chosen"
        found[kind] = patch.get_window_extent().extents
    return found


@pytest.mark.parametrize(
    ("x", "y", "missing"),
    [
        (LRS[1], SIZES[1], 0),
        ([*LRS[1], 1e6], SIZES[1], 5),
        ([0.5], SIZES[1], 1),
        (SIZES[1], [1e-5], 3),
        ([0.0], [1.0], 0),
        (np.geomspace(1e-4, 1, 20).tolist(), np.linspace(0.123456789, 0.9, 20).tolist(), 7),
        (list(range(40)), [0, 1e-12, 1e300], 1),
    ],
)
@pytest.mark.parametrize("name", ["lr", "a" * 60])
def test_heat_map_is_complete(x: list[float], y: list[float], missing: int, name: str) -> None:
    mean = swept(len(y), len(x))
    mean.flat[mean.size - missing :] = NAN
    for std, chosen, caption in ((None, None, ""), (mean / 9, (0, 0), "A long caption " * 20)):
        title = "A long title " * 20
        figure = plots.heat_map((name, x), (name, y), mean, std, chosen, title, caption)
        assert not ink_at_edges(plots.pixels(figure))


@pytest.mark.parametrize(
    ("values", "names", "scale"),
    [
        ([0.1, 0.2, 0.3], ["0.1", "0.2", "0.3"], lambda value: value),
        ([0, 0.5, 0.9], ["0", "0.5", "0.9"], lambda value: value),
        ([32, 64, 256], ["32", "64", "256"], np.log),
        ([1e-5, 1e-4, 1e-3, 0.005], ["1e-5", "0.0001", "0.001", "0.005"], np.log),
        ([0.1, 0.1 + 0.2, 1.0], ["0.1", "0.3", "1"], np.log),
        ([65536, 1e6, 1.5e7], ["65536", "1e6", "1.5e7"], np.log),
    ],
)
def test_cells_are_to_scale(values: list[float], names: list[str], scale: np.ufunc) -> None:
    figure = plots.heat_map(("lr", values), SIZES, swept(3, len(values)), None, None, "x")
    places = ticks(figure.axes[0])
    assert list(places) == names
    expected = scale(np.array(values))
    expected = (expected - expected[0]) / (expected[-1] - expected[0])
    got = np.array(list(places.values()))
    assert np.allclose((got - got[0]) / (got[-1] - got[0]), expected)
    assert figure.axes[0].get_xlabel() == "lr"


@pytest.mark.parametrize("values", [[0, 1e-4, 1e-3, 1e-2], [0.01, 0.03, 0.1, 1e6]])
def test_cells_are_equally_wide_where_no_scale_is_legible(values: list[float]) -> None:
    figure = plots.heat_map(("lr", values), SIZES, swept(3, 4), None, None, "x")
    assert np.ptp(np.diff(list(ticks(figure.axes[0]).values()))) < 1e-6
    assert figure.axes[0].get_xlabel() == "lr (not to scale)"


def test_heat_map_outlines_the_chosen_cell_and_marks_the_missing_one() -> None:
    mean = swept(3, 4)
    mean[2, 3] = NAN
    figure = plots.heat_map(LRS, SIZES, mean, None, (0, 2), "x", "one seed")
    axes = figure.axes[0]
    found = boxes(figure)
    (left, bottom, right, top), x = found["chosen"], ticks(axes)
    # Edges halfway between the neighbours, in log(lr); the first row is the lowest.
    assert np.isclose(left, (x["0.03"] + x["0.1"]) / 2)
    assert np.isclose(right, (x["0.1"] + x["0.3"]) / 2)
    assert np.isclose(bottom, axes.bbox.y0)
    assert np.isclose(top, axes.bbox.y0 + axes.bbox.height / 3)
    assert np.allclose(found["missing"][2:], (axes.bbox.x1, axes.bbox.y1))
    texts = {text.get_text(): text.get_position() for text in axes.texts}
    inside = axes.transData.inverted().transform([(left + right) / 2, (bottom + top) / 2])
    assert np.allclose(texts[f"{mean[0, 2]:.2%}"], inside)
    assert "\N{EN DASH}" in texts
    assert len(texts) == 12
    assert figure.texts[1].get_text() == "one seed; outlined: chosen; hatched: no result"


def test_heat_map_writes_the_deviation_where_there_is_one() -> None:
    mean, std = np.array([[0.9712, 0.95]]), np.array([[0.00123, NAN]])
    figure = plots.heat_map(("lr", [1, 2]), ("size", [8]), mean, std, None, "x")
    assert [text.get_text() for text in figure.axes[0].texts] == ["97.12%\n± 0.12", "95.00%"]


@pytest.mark.parametrize("side", [4, 12, 20])
def test_heat_map_has_no_text_that_does_not_fit(side: int) -> None:
    values = list(range(side))
    mean = swept(side, side)
    figure = plots.heat_map(("a", values), ("b", values), mean, mean / 100, None, "x")
    plots.pixels(figure)
    texts = figure.axes[0].texts
    assert len(texts) == (side * side if side <= 12 else 0)
    for text in texts:
        extent = text.get_window_extent()
        assert extent.width < figure.axes[0].bbox.width / side
        assert extent.height < figure.axes[0].bbox.height / side


def test_heat_map_texts_are_readable_on_their_cells() -> None:
    figure = plots.heat_map(("a", range(10)), ("b", range(10)), swept(10, 10), None, None, "x")
    cells = figure.axes[0].collections[0].to_rgba(swept(10, 10)).reshape(100, 4)

    def luminance(colour: object) -> float:
        return np.array(to_rgb(colour)) ** 2.2 @ (0.2126, 0.7152, 0.0722)

    for text, cell in zip(figure.axes[0].texts, cells, strict=True):
        dark, light = sorted([luminance(text.get_color()), luminance(cell[:3])])
        assert (light + 0.05) / (dark + 0.05) > 4  # W3C asks for 3 of large text, 4.5 of small


def test_one_cell_at_chance_does_not_drown_the_others() -> None:
    mean = swept(4, 4)
    mean[3, 3] = 0.1
    figure = plots.heat_map(LRS, ("y", range(4)), mean, None, None, "x")
    low, high = figure.axes[0].collections[0].get_clim()
    assert 0.9 < low <= np.sort(mean.flat)[1]
    assert high == mean.max()


@pytest.mark.parametrize(
    ("x", "shape", "chosen", "message"),
    [
        ([1, 2], (3, 2), None, r"mean: \(3, 2\), not \(1, 2\)"),
        ([1, 2], (1, 2), (1, 0), r"chosen: \(1, 0\)"),
        ([2, 1], (1, 2), None, "optimizer.lr: "),
        ([1, 1], (1, 2), None, "optimizer.lr: "),
        ([1, NAN], (1, 2), None, "optimizer.lr: "),
        ([], (1, 0), None, "optimizer.lr: "),
    ],
)
def test_heat_map_refuses(
    x: list[float], shape: tuple[int, int], chosen: tuple[int, int] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plots.heat_map(("optimizer.lr", x), ("y", [1]), np.ones(shape), None, chosen, "x")


def sweep(cells: int, seeds: int, epochs: int) -> dict[str, list[dict[str, list]]]:
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
        {},
        {"a": []},
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
def test_sweep_curves_draws_what_there_is(cells: dict[str, list]) -> None:
    chosen = next(reversed(cells), None)
    assert not ink_at_edges(plots.pixels(plots.sweep_curves(cells, chosen, "A long title " * 20)))


def test_sweep_curves_show_mean_and_deviation_over_seeds() -> None:
    first = {"val/accuracy": [(1, 0.5), (2, 0.6), (3, NAN), (4, 0.9)]}
    second = {"val/accuracy": [(1, 0.7), (2, INF), (3, NAN)]}
    axes = plots.sweep_curves({"a": [first, second]}, None, "x").axes[1]
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
    figure = plots.sweep_curves({str(cell): [values] for cell in range(many)}, None, "x")
    for axes, alone in zip(figure.axes, ([True, False, False, False], [True]), strict=True):
        assert len(axes.lines) == many
        for line in axes.lines:
            assert (line.get_marker(), line.get_markevery()) == ("o", alone)


@pytest.mark.parametrize("count", [3, 20])
def test_the_chosen_cell_is_thickest_and_on_top(count: int) -> None:
    cells = sweep(count, 2, 5)
    chosen = list(cells)[1]
    for axes in plots.sweep_curves(cells, chosen, "x").axes:
        lines = {line.get_label(): line for line in axes.lines}
        others = [line for label, line in lines.items() if label != chosen]
        assert lines[chosen].get_linewidth() > max(line.get_linewidth() for line in others)
        assert lines[chosen].get_zorder() > max(line.get_zorder() for line in others)
        assert len({str(line.get_color()) for line in axes.lines}) == count
        assert max(band.get_zorder() for band in axes.collections) < others[-1].get_zorder()


def test_legend_names_all_cells_or_the_best_and_the_chosen() -> None:
    def legend(count: int, chosen: int) -> list[str]:
        cells = sweep(count, 1, 2)
        figure = plots.sweep_curves(cells, list(cells)[chosen], "x")
        return [text.get_text() for text in figure.legends[0].get_texts()]

    few = [f"lr={cell} batch_size=64" for cell in range(8)]
    assert legend(8, 0) == [few[0] + " (chosen)", *few[1:]]
    assert legend(20, 6) == [*few[:4], few[6] + " (chosen)", "15 others, paler by rank"]


@pytest.mark.parametrize("failed", [0.1, 0.95])
def test_failed_cells_do_not_drown_the_others(failed: float) -> None:
    accuracy = [[(1, 0.97), (2, 0.98 - cell / 1000)] for cell in range(7)]
    cells = {str(i): [{"val/accuracy": points}] for i, points in enumerate(accuracy)}
    cells["failed"] = [{"val/accuracy": [(1, 0.1), (2, failed)], "val/loss": [(1, 1e9)]}]
    cells["0"][0]["val/loss"] = cells["1"][0]["val/loss"] = [(1, 0.5)]
    loss, accuracy = plots.sweep_curves(cells, "0", "x").axes
    assert 0.96 < accuracy.get_ylim()[0] < 0.97
    assert 0.98 < accuracy.get_ylim()[1] < 0.99
    assert [text.get_text() for text in accuracy.texts] == ["↓ 1 below"]
    assert loss.get_ylim()[1] < 1
    assert loss.get_yscale() == "linear"
    assert [text.get_text() for text in loss.texts] == ["↑ 1 above"]


def test_room_is_made_for_the_band() -> None:
    cells = {"a": [{"val/accuracy": [(1, 0.8)]}, {"val/accuracy": [(1, 0.9)]}]}
    low, high = plots.sweep_curves(cells, None, "x").axes[1].get_ylim()
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
    figure = plots.sweep_curves({"a": [values]}, "a", "x")
    assert [axes.get_title(loc="left") for axes in figure.axes] == titles
    assert all(len(axes.lines) == 1 for axes in figure.axes)


@pytest.mark.parametrize(("low", "scale"), [(0.2, "linear"), (0.001, "log")])
def test_loss_of_a_sweep_is_logarithmic_where_it_spans_decades(low: float, scale: str) -> None:
    axes = plots.sweep_curves({"a": [history(9, low), history(9, low / 9)]}, None, "x").axes[0]
    assert axes.get_yscale() == scale
    means = axes.lines[0].get_ydata()
    assert axes.get_ylim()[0] < min(means) < max(means) < axes.get_ylim()[1]


def test_sweep_curves_refuse_an_unknown_chosen_cell() -> None:
    with pytest.raises(ValueError, match="'b' is none of the 1 cells"):
        plots.sweep_curves({"a": [history(2)]}, "b", "x")


def test_few_cells_of_a_sweep_differ_in_more_than_hue() -> None:
    lines = plots.sweep_curves(sweep(8, 1, 5), None, "x").axes[0].lines
    dashes = [line.get_linestyle() for line in lines]
    assert all(a != b for a, b in pairwise(dashes))
    assert dashes[2] != dashes[3]  # green and pink, alike to one who sees no green


def signed(count: int, height: int = 28, width: int = 28) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, (count, height, width)).astype(np.float32)


def of_weights(picture: np.ndarray, images: np.ndarray, scale: int) -> list[tuple[int, int]]:
    """Where in the picture each image is, in the colours of one scale for all."""
    norm = np.abs(images).max()
    colours = plots.SIGNED((images + norm) / (2 * norm), bytes=True)[..., 1]
    return [find(picture[..., 1], np.kron(i, np.ones((scale, scale), np.uint8))) for i in colours]


@pytest.mark.parametrize(
    ("count", "side", "scale", "across"),
    [(1, 28, 6, 1), (10, 28, 6, 5), (16, 3, 56, 4), (6, 5, 33, 3), (64, 28, 4, 8), (7, 9, 14, 7)],
)
def test_weights_hold_every_image_in_reading_order(
    count: int, side: int, scale: int, across: int
) -> None:
    images = signed(count, side, side)
    places = of_weights(plots.pixels(plots.weights(images, "x")), images, scale)
    assert places == sorted(places)
    assert len({x for _, x in places}) == across


def test_weights_show_the_first_of_many_and_say_so() -> None:
    images = signed(80)
    images[64:] *= 100  # what isn't shown must not dim what is
    figure = plots.weights(images, "x")
    of_weights(plots.pixels(figure), images[:64], 4)
    assert figure.texts[1].get_text() == "the first 64 of 80"
    assert len(plots.weights(images[:64], "x").texts) == 1


def test_opposite_weights_have_opposite_colours_named_by_the_bar() -> None:
    figure = plots.weights(np.array([[[0.25, 0, -0.25]]]), "x")
    picture = plots.pixels(figure).astype(int)
    (bar,) = figure.axes
    assert [label.get_text() for label in bar.get_yticklabels()] == ["-0.25", "0", "0.25"]
    colours = [tuple(plots.SIGNED(at, bytes=True)[:3]) for at in (1.0, 0.5, 0.0)]
    x, y = bar.bbox.x0 + bar.bbox.width / 2, len(picture) - bar.bbox.y0
    ends = picture[[int(y - bar.bbox.height) + 3, int(y) - 3], int(x)]
    assert np.abs(ends - [colours[0], colours[2]]).max() < 30  # orange at the top, blue below
    assert [tuple(pixel) for pixel in picture[60, [36, 92, 148]]] == colours
    assert colours[0][0] > colours[0][2] and colours[2][0] < colours[2][2]


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((3, 5, 5)),
        np.full((2, 4, 4), NAN),
        np.array([[[INF, 1.0, -INF, NAN]]]),
        np.full((1, 2, 2), 65504, np.float16),
        signed(9, 1, 1),
        signed(5, 300, 7),
        signed(3, 7, 300),
        signed(100, 100, 100),
    ],
)
@pytest.mark.parametrize("title", ["", "A long title " * 20])
def test_weights_are_complete(images: np.ndarray, title: str) -> None:
    picture = plots.pixels(plots.weights(images, title))
    assert not ink_at_edges(picture)
    assert max(picture.shape) < 1300


def test_weights_that_are_not_finite_are_black() -> None:
    picture = plots.pixels(plots.weights(np.array([[[INF, 1.0, -INF, NAN]]]), ""))
    black = (picture[44:80, 8:176] == 0).all(-1).sum(1)
    assert 3 * 42 in black.tolist()


@pytest.mark.parametrize(
    ("images", "message"), [(signed(0), "images"), (signed(2)[0], "images"), (noise(2), "uint8")]
)
def test_weights_refuse(images: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plots.weights(images, "x")


CONFIDENCE = np.array([NAN, 0.3, 0.55, 0.97])
ACCURACY = np.array([NAN, 0.5, 0.4, 0.99])


def test_calibration_draws_what_was_given_but_for_empty_bins() -> None:
    figure = plots.calibration(CONFIDENCE, ACCURACY, np.array([0, 2, 30, 9968]), 0.0123, "x")
    above, below = figure.axes
    assert [bar.get_height() for bar in above.patches] == [0.5, 0.4, 0.99]
    assert [bar.get_height() for bar in below.patches] == [2, 30, 9968]
    for bars in (above.patches, below.patches):
        assert np.allclose(
            [bar.get_x() + bar.get_width() / 2 for bar in bars], [3 / 8, 5 / 8, 7 / 8]
        )
    points, even = above.lines
    assert np.array_equal(points.get_xydata(), np.stack([CONFIDENCE[1:]] * 2, 1))
    assert np.array_equal(even.get_xydata(), [[0, 0], [1, 1]])
    gaps = [path.vertices.tolist() for path in above.collections[0].get_paths()]
    triples = zip(CONFIDENCE[1:], ACCURACY[1:], strict=True)
    assert gaps == [[[x, y], [x, x]] for x, y in triples]
    assert [text.get_text() for text in below.texts] == ["2", "30", "9968"]
    assert figure.texts[1].get_text() == "expected calibration error 1.23%, 10000 images"


@pytest.mark.parametrize("bins", [1, 2, 10, 15, 30])
@pytest.mark.parametrize("most", [0, 1, 60000, 1234567])
def test_a_bin_of_few_images_is_seen_beside_one_of_nearly_all(bins: int, most: int) -> None:
    sizes = np.ones(bins, int)
    sizes[-1] = most
    share = (np.arange(bins) + 0.5) / bins
    figure = plots.calibration(share, share, sizes, 0.5, "A long title " * 20)
    assert not ink_at_edges(plots.pixels(figure))
    _, below = figure.axes
    for bar in below.patches:
        assert bar.get_window_extent().intersection(bar.get_window_extent(), below.bbox).height > 5
    for text in below.texts:
        extent = text.get_window_extent()
        assert below.bbox.y0 < extent.y0 < extent.y1 < below.bbox.y1
    if bins <= 15:
        extents = [text.get_window_extent() for text in below.texts]
        assert all(a.x1 < b.x0 for a, b in pairwise(extents))


@pytest.mark.parametrize(
    ("confidence", "accuracy", "counts", "message"),
    [
        (CONFIDENCE, ACCURACY[1:], [1] * 4, r"accuracy: \(3,\), not \[bins\] as the 4"),
        (CONFIDENCE[1:], ACCURACY, [1] * 4, "confidence"),
        (CONFIDENCE[:0], ACCURACY[:0], [], "counts"),
        (CONFIDENCE, ACCURACY, [1] * 4, "confidence: .*nan"),
        (CONFIDENCE, 100 * ACCURACY, [0, 1, 1, 1], "accuracy: .*99"),
        (CONFIDENCE, ACCURACY, [0, -1, 1, 1], "counts: -1"),
    ],
)
def test_calibration_refuses(
    confidence: np.ndarray, accuracy: np.ndarray, counts: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plots.calibration(confidence, accuracy, np.array(counts, int), 0.1, "x")


def photos(*sides: tuple[int, int]) -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    return [generator.integers(0, 256, (*side, 3), dtype=np.uint8) for side in sides]


RANKING = [("7", 0.9), ("1", 0.07), ("9", 0.02)]


def test_seen_shows_pairs_in_reading_order() -> None:
    given, small = photos(*[(28, 28)] * 7), noise(7)
    picture = plots.pixels(plots.seen(given, small, [RANKING] * 7, "x", "abcdefg"))
    box = np.ones((4, 4), np.uint8)
    for channel in range(3):
        left = [find(picture[..., channel], np.kron(photo[..., channel], box)) for photo in given]
        right = [find(picture[..., channel], np.kron(image, box)) for image in small]
        assert left == sorted(left)
        assert {(b[0] - a[0], b[1] - a[1]) for a, b in zip(left, right, strict=True)} == {(0, 138)}
    assert len({x for _, x in left}) == len({y for y, _ in left}) == 3


def test_seen_shrinks_a_large_picture_without_losing_thin_lines() -> None:
    photo = np.full((512, 448, 3), 255, np.uint8)
    photo[:, 201:203] = 0
    picture = plots.pixels(plots.seen([photo], noise(1), [RANKING], "x", ["a"]))
    box = picture[86:198, 8:120].astype(int)
    framed = np.argwhere((box == 187).all(-1))
    assert np.array_equal(np.unique(framed[:, 1]), [6, 105])  # 98 pixels between: to scale
    line = box[:, 7 + int(202 / 448 * 98)]
    assert (line[1:-1] < 200).all()  # nowhere lost between two pixels


def test_seen_marks_a_doubtful_class() -> None:
    texts = [RANKING, [("3", 0.41), ("5", 0.3)], [("8", 0.5)]]
    figure = plots.seen(photos(*[(20, 20)] * 3), noise(3), texts, "x", ["a.png", "b", "c"])
    lines = {text.get_text(): text for text in figure.texts}
    doubtful = [text for text, line in lines.items() if line.get_color() == plots.ORANGE]
    assert doubtful == ["3 ?", "41.0%"]
    assert {"a.png", "7", "8", "90.0%", "1  7.0%\n9  2.0%", "5  30.0%"} < set(lines)
    large = lines["7"].get_fontsize()
    assert large > lines["90.0%"].get_fontsize() > lines["1  7.0%\n9  2.0%"].get_fontsize()
    assert "below 50%" in figure.texts[1].get_text()
    sure = plots.seen(photos((20, 20)), noise(1), [RANKING], "x", ["a"])
    assert not has_orange(plots.pixels(sure)).any()
    assert "?" not in sure.texts[1].get_text()


@pytest.mark.parametrize("count", [1, 2, 9, 61])
def test_seen_is_complete(count: int) -> None:
    sides = [(1, 1), (512, 3), (3, 512), (112, 112), (113, 90), (28, 28), (1000, 800)]
    given = photos(*(sides[i % 7] for i in range(count)))
    texts = [[(ODD_NAMES[(i + j) % 9], 0.4 - j / 9) for j in range(3)] for i in range(count)]
    names = ["a long name " * 20] * count
    figure = plots.seen(given, noise(count, 300, 40), texts, "A long title " * 20, names)
    assert not ink_at_edges(plots.pixels(figure))
    assert ("the first 60 of 61" in figure.texts[1].get_text()) == (count > 60)
    assert sum(text.get_text() == "→" for text in figure.texts if text.get_fontsize() == 12) <= 60


@pytest.mark.parametrize(
    ("given", "small", "texts", "message"),
    [
        ([], noise(0), [], "seen"),
        (photos((4, 4)), noise(2), [RANKING], r"seen: .*not uint8 \[1, h, w\]"),
        (photos((4, 4)), noise(1).astype(float), [RANKING], "float64"),
        ([noise(1)[0]], noise(1), [RANKING], r"given\[0\]: uint8 \(28, 28\)"),
        (photos((4, 0)), noise(1), [RANKING], r"given\[0\]"),
        (photos((4, 4)), noise(1), [], "texts: 0 for 1"),
        (photos((4, 4)), noise(1), [[]], r"texts\[0\]: 0 classes"),
        (photos((4, 4)), noise(1), [RANKING * 2], r"texts\[0\]: 6 classes"),
    ],
)
def test_seen_refuses(given: list, small: np.ndarray, texts: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plots.seen(given, small, texts, "x", [""] * len(given))


@pytest.mark.parametrize("has_pyplot", [False, True])
def test_a_figure_shows_itself_in_a_notebook(has_pyplot: bool, tmp_path: Path) -> None:
    figure = plots.grid(noise(3), ["1", "2", "3"], title="x")
    formatter = DisplayFormatter()
    if has_pyplot:  # which leaves it to IPython to draw figures, and that draws none without axes
        formatter.formatters["image/png"].for_type(Figure, lambda figure: None)
    data, _ = formatter.format(figure)
    plots.save(figure, tmp_path / "a.png")
    assert data["image/png"] == (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize(("dpi", "scale"), [(plots.DPI, 5), (2 * plots.DPI, 10)])
def test_pixels_stay_in_place_in_a_file_that_is_cut_or_finer(
    dpi: int, scale: int, tmp_path: Path
) -> None:
    image, frame = noise(1), 60
    figure = plots.grid(image, ["1"], ["2"], title="x")
    whole = plots.pixels(figure)
    figure.savefig(tmp_path / "a.png", dpi=dpi, bbox_inches="tight", pad_inches=frame / plots.DPI)
    from_file = np.round(imread(tmp_path / "a.png")[..., :3] * 255).astype(np.uint8)
    large = np.kron(image[0], np.ones((scale, scale), np.uint8))
    y, x = find(from_file[..., 1], large)
    more = scale // 5
    y_whole, x_whole = find(whole[..., 1], np.kron(image[0], np.ones((5, 5), np.uint8)))
    assert abs(y - more * (y_whole + frame)) <= more and abs(x - more * (x_whole + frame)) <= more


def test_fonts_go_with_the_file(tmp_path: Path) -> None:
    figure = plots.grid(noise(1), ["7"], ["1"], title="x")
    plots.save(figure, tmp_path / "a.pdf")
    plots.save(figure, tmp_path / "a.svg")
    pdf, svg = ((tmp_path / f"a.{kind}").read_bytes() for kind in ("pdf", "svg"))
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf  # TrueType
    assert b"<text" not in svg and b"<image" in svg


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_files_are_the_same_bytes(suffix: str, tmp_path: Path) -> None:
    for name, labels in (("a", ["1", "2"]), ("b", ["1", "2"]), ("c", ["1", "3"])):
        plots.save(plots.grid(noise(2), labels, title="x"), tmp_path / f"{name}.{suffix}")
    first, same, other = (path.read_bytes() for path in sorted(tmp_path.iterdir()))
    assert first == same != other
    assert b"matplotlib.org" not in first or suffix != "png"


def test_png_has_the_pixels(tmp_path: Path) -> None:
    figure = plots.grid(noise(3), ["1", "2", "3"], ["1", "2", "2"], title="x")
    plots.save(figure, tmp_path / "a.png")
    from_file = imread(tmp_path / "a.png")[..., :3]
    assert np.array_equal(np.round(from_file * 255).astype(np.uint8), plots.pixels(figure))


def test_save_refuses_other_suffixes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'\.jpg', .*\.png, \.svg, \.pdf"):
        plots.save(plots.curves({}, None, "x"), tmp_path / "a.jpg")
    assert not list(tmp_path.iterdir())


def test_style_is_put_back_and_threads_agree() -> None:
    before = dict(matplotlib.rcParams)
    pictures = []

    def draw() -> None:
        pictures.append(plots.pixels(plots.confusion(counts(10), DIGITS, "x")))

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pictures) == 4
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures)
    assert dict(matplotlib.rcParams) == before


def test_pyplot_is_never_imported() -> None:
    program = (
        "import sys, numpy as np; from mnist_exp.figures import plots;"
        "plots.pixels(plots.grid(np.zeros((1, 4, 4), np.uint8), ['1'], title='x'));"
        "plots.pixels(plots.curves({}, 1, 'x'));"
        "assert not {'matplotlib.pyplot', 'torch', 'mlflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def test_a_name_in_a_script_that_the_font_has_not(tmp_path: Path) -> None:
    """Without a warning, which is an error here."""
    figure = plots.grid(noise(2), ["数", "字"], title="識別")
    assert plots.pixels(figure).std() > 0
    plots.save(figure, tmp_path / "a.svg")
