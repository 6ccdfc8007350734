import subprocess
import sys
import threading
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from mnist_exp import plots

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
    assert texts["2"] == (1, 0)  # column dog, row cat
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


def test_confusion_refuses_a_table_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"\(3, 3\) for 10 classes"):
        plots.confusion(np.zeros((3, 3), int), DIGITS, "x")


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
    with pytest.raises(ValueError, match=r"\.png, \.svg, \.pdf"):
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
        "import sys, numpy as np; from mnist_exp import plots;"
        "plots.pixels(plots.grid(np.zeros((1, 4, 4), np.uint8), ['1'], title='x'));"
        "plots.pixels(plots.curves({}, 1, 'x'));"
        "assert not {'matplotlib.pyplot', 'torch', 'mlflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
