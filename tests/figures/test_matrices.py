from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from mnist_exp.figures.matrices import confusion_matrix, heat_map
from mnist_exp.figures.style import pixels
from mnist_exp.formatting import shortest_number
from tests.figures.drawn import DIGITS, NAN, ODD_NAMES, counts, ink_at_edges

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize(
    ("table", "classes"),
    [
        (counts(1), ["only"]),
        (counts(2), ["no", "yes"]),
        (counts(10), DIGITS),
        (counts(9, 123456), ODD_NAMES),
        (np.zeros((10, 10), int), DIGITS),
        (counts(26, 12345), [chr(97 + i) for i in range(26)]),
        (counts(47), [f"Ankle boot {i}" for i in range(47)]),
    ],
)
def test_confusion_is_complete(table: np.ndarray, classes: list[str]) -> None:
    assert not ink_at_edges(pixels(confusion_matrix(table, classes, "A long title " * 20)))


def test_confusion_of_one_class_has_a_cell() -> None:
    figure = confusion_matrix(np.array([[400]]), ["only"], "x")
    assert figure.axes[0].get_xlim() == (-0.5, 0.5)
    assert {text.get_text() for text in figure.axes[0].texts} == {"400", "100.0%", "recall"}


def test_confusion_has_true_rows_and_predicted_columns() -> None:
    figure = confusion_matrix(np.array([[8, 2], [0, 5]]), ["cat", "dog"], "x")
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
    figure = confusion_matrix(table, DIGITS, "x")
    axes = figure.axes[0]
    (x, y), (x_none, y_none) = axes.transData.transform([(5.3, 3.3), (5.3, 4.3)]).astype(int)
    picture = pixels(figure).astype(int)[::-1]  # counted from the bottom, as figures are
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
    axes = confusion_matrix(table, DIGITS[:3], "x").axes[0]
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
    figure = confusion_matrix(table, [str(i) for i in range(classes)], "x")
    pixels(figure)
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
        ([0.5, 0.6], SIZES[1], 5),
        (SIZES[1], [0.0, 1e-5], 3),
        (np.geomspace(1e-4, 1, 20).tolist(), np.linspace(0.123456789, 0.9, 20).tolist(), 7),
        (list(range(40)), [0, 1e-12, 1e300], 1),
    ],
)
@pytest.mark.parametrize("name", ["lr", "a" * 60])
def test_heat_map_is_complete(x: list[float], y: list[float], missing: int, name: str) -> None:
    mean = swept(len(y), len(x))
    mean.flat[mean.size - missing :] = NAN
    for std, chosen, caption in (
        (mean * NAN, None, ""),
        (mean / 9, (0, 0), "A long caption " * 20),
    ):
        title = "A long title " * 20
        figure = heat_map((name, x), (name, y), mean, std, chosen, title, caption)
        assert not ink_at_edges(pixels(figure))


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
    mean = swept(3, len(values))
    figure = heat_map(("lr", values), SIZES, mean, mean * NAN, None, "x")
    places = ticks(figure.axes[0])
    assert list(places) == names
    expected = scale(np.array(values))
    expected = (expected - expected[0]) / (expected[-1] - expected[0])
    got = np.array(list(places.values()))
    assert np.allclose((got - got[0]) / (got[-1] - got[0]), expected)
    assert figure.axes[0].get_xlabel() == "lr"


@pytest.mark.parametrize("values", [[0, 1e-4, 1e-3, 1e-2], [0.01, 0.03, 0.1, 1e6]])
def test_cells_are_equally_wide_where_no_scale_is_legible(values: list[float]) -> None:
    figure = heat_map(("lr", values), SIZES, swept(3, 4), swept(3, 4) * NAN, None, "x")
    assert np.ptp(np.diff(list(ticks(figure.axes[0]).values()))) < 1e-6
    assert figure.axes[0].get_xlabel() == "lr (not to scale)"


def test_heat_map_outlines_the_chosen_cell_and_marks_the_missing_one() -> None:
    mean = swept(3, 4)
    mean[2, 3] = NAN
    figure = heat_map(LRS, SIZES, mean, mean * NAN, (0, 2), "x", "one seed")
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
    mean = np.array([[0.9712, 0.95], [0.9, 0.8]])
    std = np.array([[0.00123, NAN], [NAN, 0.0]])
    figure = heat_map(("lr", [1, 2]), ("size", [8, 9]), mean, std, None, "x")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["97.12%\n± 0.12", "95.00%", "90.00%", "80.00%\n± 0.00"]


@pytest.mark.parametrize("side", [4, 12, 20])
def test_heat_map_has_no_text_that_does_not_fit(side: int) -> None:
    values = list(range(side))
    mean = swept(side, side)
    figure = heat_map(("a", values), ("b", values), mean, mean / 100, None, "x")
    pixels(figure)
    texts = figure.axes[0].texts
    assert len(texts) == (side * side if side <= 12 else 0)
    for text in texts:
        extent = text.get_window_extent()
        assert extent.width < figure.axes[0].bbox.width / side
        assert extent.height < figure.axes[0].bbox.height / side


def test_heat_map_texts_are_readable_on_their_cells() -> None:
    mean = swept(10, 10)
    figure = heat_map(("a", range(10)), ("b", range(10)), mean, mean * NAN, None, "x")
    cells = figure.axes[0].collections[0].to_rgba(swept(10, 10)).reshape(100, 4)

    def luminance(colour: Any) -> float:
        return float(np.array(to_rgb(colour)) ** 2.2 @ np.array([0.2126, 0.7152, 0.0722]))

    for text, cell in zip(figure.axes[0].texts, cells, strict=True):
        dark, light = sorted([luminance(text.get_color()), luminance(cell[:3])])
        assert (light + 0.05) / (dark + 0.05) > 4  # W3C asks for 3 of large text, 4.5 of small


def test_one_cell_at_chance_does_not_drown_the_others() -> None:
    mean = swept(4, 4)
    mean[3, 3] = 0.1
    figure = heat_map(LRS, ("y", range(4)), mean, mean * NAN, None, "x")
    low, high = figure.axes[0].collections[0].get_clim()
    assert 0.9 < low <= np.sort(mean.flat)[1]
    assert high == mean.max()


@pytest.mark.parametrize("many", [2, 16, 40, 100, 200])
@pytest.mark.parametrize("base", [1.06, 1.0])
def test_names_of_ticks_do_not_overlap_and_the_chosen_one_stays(many: int, base: float) -> None:
    """Where all of them have room, all are there."""
    values = [base**i if base > 1 else 0.01 * (i + 1) for i in range(many)]
    shape = (2, many)
    for turned in (False, True):
        mean = swept(*shape).T if turned else swept(*shape)
        axes_values: list[Any] = [("lr", values), ("size", [32, 64])]
        x, y = reversed(axes_values) if turned else axes_values
        chosen = (many // 3, 0) if turned else (0, many // 3)
        figure = heat_map(x, y, mean, mean * NAN, chosen, "x")
        canvas = pixels(figure)
        assert canvas.shape[0] < 1600 and canvas.shape[1] < 1600 and not ink_at_edges(canvas)
        axes = figure.axes[0]
        names = axes.get_yticklabels() if turned else axes.get_xticklabels()
        boxes = [name.get_window_extent() for name in names]
        ends = [(box.y0, box.y1) if turned else (box.x0, box.x1) for box in boxes]
        assert all(a[1] <= b[0] for a, b in pairwise(ends))
        texts = [name.get_text() for name in names]
        assert shortest_number(values[many // 3]) in texts
        if many <= 40:
            assert len(texts) == many
