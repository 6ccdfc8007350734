from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from mnist_exp.figures.images import (
    SIGNED,
    PredictedPhoto,
    predictions_figure,
    sample_grid,
    weights_figure,
)
from mnist_exp.figures.style import ORANGE, pixels
from tests.figures.drawn import DIGITS, INF, NAN, ODD_NAMES, find, has_orange, ink_at_edges, noise

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize(("count", "height", "width"), [(30, 28, 28), (8, 64, 64), (7, 10, 35)])
def test_grid_holds_every_image_in_reading_order(count: int, height: int, width: int) -> None:
    images = noise(count, height, width)
    picture = pixels(sample_grid(images, ["7"] * count, title="Some"))
    scale = 140 // width
    places = [find(picture[..., 1], np.kron(i, np.ones((scale, scale), np.uint8))) for i in images]
    assert places == sorted(places)
    assert len({y for y, _ in places}) == -(-count // 6)
    assert len({x for _, x in places}) == 6


def test_grid_of_nameless_images() -> None:
    assert pixels(sample_grid(noise(2, 1, 900), ["", ""], title="")).size


@pytest.mark.parametrize(("height", "width"), [(300, 700), (2000, 700), (3000, 2), (2, 3000)])
def test_grid_shrinks_large_images(height: int, width: int) -> None:
    picture = pixels(sample_grid(noise(30, height, width), ["7"] * 30, title="Large"))
    assert max(picture.shape) < 1800


@pytest.mark.parametrize(("height", "width"), [(28, 28), (64, 20), (3000, 2)])
def test_grid_has_legible_names_over_narrow_images(height: int, width: int) -> None:
    names = ["Ankle boot"] * 4
    figure = sample_grid(noise(4, height, width), names, ["Sandal"] * 4, [0.5] * 4, title="x")
    sizes = [float(text.get_fontsize()) for text in figure.texts if "Ankle boot" in text.get_text()]
    assert len(sizes) == 4 and min(sizes) > 7


def test_grid_frames_and_names_wrong_predictions_only() -> None:
    images, labels, predicted = noise(12), [*DIGITS, "0", "1"], [*DIGITS, "0", "8"]
    predicted[4] = "9"
    figure = sample_grid(images, labels, predicted, [0.871] * 12, title="Some")
    picture = pixels(figure)
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
    assert not has_orange(pixels(sample_grid(noise(5), labels, labels, title="x"))).any()


@pytest.mark.parametrize("count", [1, 3, 9])
@pytest.mark.parametrize("size", [1, 28, 150])
def test_grid_of_odd_names_is_complete(count: int, size: int) -> None:
    names = ODD_NAMES[:count]
    images, share = noise(count, size, size), [0.5] * count
    figure = sample_grid(images, names, names[::-1], share, title="A long title " * 20)
    assert not ink_at_edges(pixels(figure))


def signed(count: int, height: int = 28, width: int = 28) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, (count, height, width)).astype(np.float32)


def of_weights(picture: np.ndarray, images: np.ndarray, scale: int) -> list[tuple[int, int]]:
    """Where in the picture each image is, in the colours of one scale for all."""
    norm = np.abs(images).max()
    colours = SIGNED((images + norm) / (2 * norm), bytes=True)[..., 1]
    return [find(picture[..., 1], np.kron(i, np.ones((scale, scale), np.uint8))) for i in colours]


@pytest.mark.parametrize(
    ("count", "side", "scale", "across"),
    [(1, 28, 6, 1), (10, 28, 6, 5), (16, 3, 56, 4), (6, 5, 33, 3), (64, 28, 4, 8), (7, 9, 14, 7)],
)
def test_weights_hold_every_image_in_reading_order(
    count: int, side: int, scale: int, across: int
) -> None:
    images = signed(count, side, side)
    places = of_weights(pixels(weights_figure(images, "x")), images, scale)
    assert places == sorted(places)
    assert len({x for _, x in places}) == across


def test_weights_show_the_first_of_many_and_say_so() -> None:
    images = signed(80)
    images[64:] *= 100  # what isn't shown must not dim what is
    figure = weights_figure(images, "x")
    of_weights(pixels(figure), images[:64], 4)
    assert figure.texts[1].get_text() == "the first 64 of 80"
    assert len(weights_figure(images[:64], "x").texts) == 1


def test_opposite_weights_have_opposite_colours_named_by_the_bar() -> None:
    figure = weights_figure(np.array([[[0.25, 0, -0.25]]]), "x")
    picture = pixels(figure).astype(int)
    (bar,) = figure.axes
    assert [label.get_text() for label in bar.get_yticklabels()] == ["-0.25", "0", "0.25"]
    colours = [tuple(SIGNED(at, bytes=True)[:3]) for at in (1.0, 0.5, 0.0)]
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
    picture = pixels(weights_figure(images, title))
    assert not ink_at_edges(picture)
    assert max(picture.shape) < 1300


def test_weights_that_are_not_finite_are_black() -> None:
    picture = pixels(weights_figure(np.array([[[INF, 1.0, -INF, NAN]]]), ""))
    black = (picture[44:80, 8:176] == 0).all(-1).sum(1)
    assert 3 * 42 in black.tolist()


def photos(*sides: tuple[int, int]) -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    return [generator.integers(0, 256, (*side, 3), dtype=np.uint8) for side in sides]


RANKING = [("7", 0.9), ("1", 0.07), ("9", 0.02)]


def figure_of(
    originals: Sequence[np.ndarray],
    preprocessed: np.ndarray,
    rankings: Sequence[Any],
    names: Sequence[str],
    title: str = "x",
    total: int = 0,
) -> Figure:
    photos = zip(names, originals, preprocessed, rankings, strict=True)
    return predictions_figure([PredictedPhoto(*photo) for photo in photos], title, total)


def test_predictions_shows_pairs_in_reading_order() -> None:
    given, small = photos(*[(28, 28)] * 7), noise(7)
    picture = pixels(figure_of(given, small, [RANKING] * 7, "abcdefg"))
    box = np.ones((4, 4), np.uint8)
    for channel in range(3):
        left = [find(picture[..., channel], np.kron(photo[..., channel], box)) for photo in given]
        right = [find(picture[..., channel], np.kron(image, box)) for image in small]
        assert left == sorted(left)
        assert {(b[0] - a[0], b[1] - a[1]) for a, b in zip(left, right, strict=True)} == {(0, 138)}
    assert len({x for _, x in left}) == len({y for y, _ in left}) == 3


def test_predictions_shrinks_a_large_picture_without_losing_thin_lines() -> None:
    photo = np.full((512, 448, 3), 255, np.uint8)
    photo[:, 201:203] = 0
    picture = pixels(figure_of([photo], noise(1), [RANKING], ["a"]))
    box = picture[86:198, 8:120].astype(int)
    framed = np.argwhere((box == 187).all(-1))
    assert np.array_equal(np.unique(framed[:, 1]), [6, 105])  # 98 pixels between: to scale
    line = box[:, 7 + int(202 / 448 * 98)]
    assert (line[1:-1] < 200).all()  # nowhere lost between two pixels


def test_predictions_marks_a_doubtful_class() -> None:
    texts = [RANKING, [("3", 0.41), ("5", 0.3)], [("8", 0.5)]]
    figure = figure_of(photos(*[(20, 20)] * 3), noise(3), texts, ["a.png", "b", "c"])
    lines = {text.get_text(): text for text in figure.texts}
    doubtful = [text for text, line in lines.items() if line.get_color() == ORANGE]
    assert doubtful == ["3 ?", "41.0%"]
    assert {"a.png", "7", "8", "90.0%", "1  7.0%\n9  2.0%", "5  30.0%"} < set(lines)
    sizes = [float(lines[text].get_fontsize()) for text in ("7", "90.0%", "1  7.0%\n9  2.0%")]
    large, medium, small = sizes
    assert large > medium > small
    assert "below 50%" in figure.texts[1].get_text()
    sure = figure_of(photos((20, 20)), noise(1), [RANKING], ["a"])
    assert not has_orange(pixels(sure)).any()
    assert "?" not in sure.texts[1].get_text()


@pytest.mark.parametrize("count", [1, 2, 9, 60])
def test_predictions_is_complete(count: int) -> None:
    sides = [(1, 1), (512, 3), (3, 512), (112, 112), (113, 90), (28, 28), (1000, 800)]
    given = photos(*(sides[i % 7] for i in range(count)))
    texts = [[(ODD_NAMES[(i + j) % 9], 0.4 - j / 9) for j in range(3)] for i in range(count)]
    names = ["a long name " * 20] * count
    figure = figure_of(given, noise(count, 300, 40), texts, names, "A long title " * 20, 61)
    assert not ink_at_edges(pixels(figure))
    assert f"the first {count} of 61" in figure.texts[1].get_text()
    arrows = [t for t in figure.texts if t.get_text() == "→" and t.get_fontsize() == 12]
    assert len(arrows) <= count
