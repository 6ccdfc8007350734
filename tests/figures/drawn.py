"""What tests of figures draw, and what they find in a picture."""

import numpy as np
from matplotlib.colors import to_rgb

from mnist_exp.figures.style import ORANGE

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
    (place,) = [(y, x) for y, x in places.tolist() if np.array_equal(windows[y, x], tile)]
    return place


def has_orange(picture: np.ndarray) -> np.ndarray:
    orange = np.round(np.array(to_rgb(ORANGE)) * 255).astype(np.uint8)
    return np.asarray(np.all(picture == orange, axis=-1))


def ink_at_edges(picture: np.ndarray) -> bool:
    """Whether anything touches the outermost pixels of the figure: text that is cut off would."""
    edges = picture[0], picture[-1], picture[:, 0], picture[:, -1]
    return any((edge != 255).any() for edge in edges)


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


def counts(classes: int, each: int = 400) -> np.ndarray:
    generator = np.random.default_rng(0)
    wrong = generator.multinomial(each // 10, np.full(classes, 1 / classes), classes)
    return np.asarray(wrong + (each - each // 10) * np.eye(classes, dtype=int))
