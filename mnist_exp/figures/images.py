"""Figures of images: a grid of samples, the weights of a first layer, photos and predictions."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from PIL import Image

from mnist_exp.figures import style
from mnist_exp.figures.style import INK, ORANGE, TEXT, Bytes, Floats, PixelFigure, text_width
from mnist_exp.formatting import rounded_percent

ROWS, COLUMNS = 5, 6  # of a sample grid
UNITS = 64  # of a first layer

# The sign of a number is a hue and its magnitude a shade.
BELOW, ABOVE = ("#003350", style.BLUE), (ORANGE, "#6b2a00")
SIGNED = LinearSegmentedColormap.from_list("signed", [*BELOW, "#f5f5f5", *ABOVE])


class PredictedPhoto(NamedTuple):
    """A photo, what the network gets of it, and what it takes it for."""

    name: str
    original: Bytes  # [H, W, 3]
    preprocessed: Bytes  # [h, w]
    ranking: Sequence[tuple[str, float]]  # up to three classes and probabilities, the best first


@style.styled()
def sample_grid(
    images: Bytes,
    labels: Sequence[str],
    predicted: Sequence[str] | None = None,
    confidence: Sequence[float] | None = None,
    *,
    title: str,
    note: str = "",
    second_lines: Sequence[str] | None = None,
) -> Figure:
    """Return a figure of images in reading order, up to 5 rows of 6, each under its label.

    Args:
        images: Grey, uint8 [N, H, W], N from 1 to 30.
        labels: The true class of each image.
        predicted: The predicted class of each; a wrong one is framed and says "✗ true → predicted".
        confidence: The probability of each prediction, 0 to 1.
        title: The title of the figure.
        note: A line of text for the figure as a whole.
        second_lines: Another line of text over each image.
    """
    count = len(images)
    wrong = [a != b for a, b in zip(labels, predicted or labels, strict=True)]
    texts = _sample_texts(labels, predicted or labels, confidence)
    if second_lines is not None:
        texts = [f"{a}\n{style.shorten(b, 18)}" for a, b in zip(texts, second_lines, strict=True)]
    notes = [note] if note else []
    if predicted is not None:
        notes.append(f"{count - sum(wrong)} of {count} right")
    if any(wrong):
        notes[-1] += "; ✗ true → predicted"
    if confidence is not None:
        notes.append("confidence")

    # About 140 pixels wide, if that is not too tall, each pixel of the image a whole number of the
    # figure's if it can be.
    height, width = images.shape[1:]
    tiles = style.resample(images, min(_scale(width, 140), _scale(height, 280)))
    high, wide = tiles.shape[1:3]
    column = max(wide, 100)  # narrower, and its text could not be read
    strip = 14 + 20 * max(1 + text.count("\n") for text in texts)
    widest = max(text_width(line, TEXT) for line in {*"\n".join(texts).split("\n")})
    size = TEXT * min(1.0, (column + 4) / max(widest, 1.0))
    across, pitch = min(COLUMNS, count), (column + 10, strip + high)
    content = across * pitch[0] - 10, math.ceil(count / across) * pitch[1] + 10
    figure = PixelFigure(content, title, ", ".join(notes))
    usual = INK if predicted is None else style.DISCREET
    for i, (x, y) in enumerate(_corners(count, across, pitch, figure.top)):
        left = x + (column - wide) // 2
        frame = ORANGE if wrong[i] else ""
        figure.paste(tiles[i], left, y + strip, frame, border=4)
        colour = frame or usual
        figure.write(x + column / 2, y + strip - 10, texts[i], size, colour, ha="center")
    return figure


def _sample_texts(
    labels: Sequence[str], predicted: Sequence[str], confidence: Sequence[float] | None
) -> list[str]:
    """Return what stands over each image: one line where all names are short enough."""
    separator = " " if max(map(len, [*labels, *predicted])) <= 3 else "\n"
    texts = []
    for i, (label, prediction) in enumerate(zip(labels, predicted, strict=True)):
        text, is_wrong = style.shorten(label), label != prediction
        if is_wrong:
            text = f"✗ {text}{separator}→ {style.shorten(prediction)}"
        if confidence is not None:
            text += "  " if is_wrong or separator == " " else "\n"
            text += f"{confidence[i]:.0%}"
        texts.append(text)
    return texts


@style.styled()
def weights_figure(weights: Floats, title: str) -> Figure:
    """Return a figure of the weights of a first layer, an image for each unit or filter.

    Of weights [N, H, W] the first 64 images are shown, 8 in a row at most. A colour means the same
    weight in all of them: 0 is nearly white, and the scale ends at the greatest magnitude shown. A
    weight that is not finite is black.
    """
    shown = weights[:UNITS]
    caption = f"the first {UNITS} of {len(weights)}" if len(weights) > UNITS else ""
    most = float(np.abs(shown[np.isfinite(shown)]).max(initial=0.0)) or 1.0
    shades = ScalarMappable(Normalize(-most, most), SIGNED.with_extremes(bad="black"))

    # As square as goes with the fewest gaps in the last row.
    count = len(shown)
    across = min(range(math.ceil(math.sqrt(count)), 9), key=lambda columns: -count % columns)
    scale = _scale(max(shown.shape[1:]), min(168, 900 // across))
    tiles = style.resample(np.ma.masked_invalid(shown.astype(np.float64)), scale)
    pitch = tiles.shape[2] + 6, tiles.shape[1] + 6
    side = max(math.ceil(count / across) * pitch[1] - 6, 96)  # of the colour bar too
    width = across * pitch[0] + 68 + text_width(f"{-most:.2g}", TEXT)
    figure = PixelFigure((width, side + 26), title, caption)
    for tile, place in zip(tiles, _corners(count, across, pitch, figure.top + 12), strict=True):
        figure.paste(shades.to_rgba(tile, bytes=True), *place)
    left = style.EDGE + across * pitch[0] + 10
    bar = figure.place_axes(left, figure.top + 12, 14, min(side, 240))
    figure.colorbar(shades, bar, ticks=[-most, 0, most], format=lambda value, _: f"{value:.2g}")
    bar.set_ylabel("weight", labelpad=0)
    return figure


@style.styled()
def predictions_figure(photos: Sequence[PredictedPhoto], title: str, total: int = 0) -> Figure:
    """Return a figure of photos beside what the network sees of them, and what it takes them for.

    The most probable class is large, and orange with a question mark where its probability is below
    50 %. `total` is how many photos there are, if these are the first of more.
    """
    total = max(total, len(photos))
    doubtful = [photo.ranking[0][1] < 0.5 for photo in photos]
    notes = ["given → as the network sees it"]
    if any(doubtful):
        notes.append("?: below 50%")
    if len(photos) < total:
        notes.append(f"the first {len(photos)} of {total}")
    classes = [style.shorten(photo.ranking[0][0]) for photo in photos]
    classes = [
        f"{name} ?" if doubt else name for name, doubt in zip(classes, doubtful, strict=True)
    ]
    below = []  # of each photo: the probability, and the next classes
    for (_, share), *others in (photo.ranking for photo in photos):
        lines = [f"{style.shorten(name)}  {rounded_percent(share)}" for name, share in others]
        below.append([rounded_percent(share), *lines])

    # Two boxes and the text beside them; the pairs apart, 3 in a row.
    box, arrow, gap = 112, 26, 10
    large = min(18.0, 18.0 * 150 / max(1.0, *(text_width(name, 18.0) for name in classes)))
    widths = [text_width(line, TEXT) for lines in below for line in lines]
    widths += [text_width(name, large) for name in classes]
    across = min(3, len(photos))
    pitch = 2 * box + arrow + gap + math.ceil(max(widths)) + 28, box + 40
    content = across * pitch[0] - 28, math.ceil(len(photos) / across) * pitch[1]
    figure = PixelFigure(content, title, "; ".join(notes))
    for i, (x, y) in enumerate(_corners(len(photos), across, pitch, figure.top + 30)):
        _paste_boxed(figure, photos[i].original, x, y, box)
        _paste_boxed(figure, photos[i].preprocessed, x + box + arrow, y, box)
        colour, right = ORANGE if doubtful[i] else INK, x + 2 * box + arrow + gap
        figure.write(x, y - 6, style.shorten(photos[i].name, 32), style.SMALL, style.DISCREET)
        figure.write(x + box + 5, y + 64, "→", style.TITLE, style.DISCREET)
        figure.write(right, y + 34, classes[i], large, colour)
        figure.write(right, y + 58, below[i][0], TEXT, colour)
        figure.write(right, y + 110, "\n".join(below[i][1:]), style.SMALL, style.DISCREET)
    return figure


def _scale(side: int, wanted: int) -> float:
    """Return the scale that makes a side about as long as wanted: whole if it can be."""
    return max(1, wanted // side) if side <= 1.43 * wanted else wanted / side


def _corners(
    count: int, across: int, pitch: tuple[int, int], top: int
) -> Iterator[tuple[int, int]]:
    """Yield x and y of so many places in reading order, `across` of them in a row."""
    for i in range(count):
        yield style.EDGE + i % across * pitch[0], top + i // across * pitch[1]


def _paste_boxed(figure: PixelFigure, image: Bytes, x: int, y: int, box: int) -> None:
    """Paint an image into the middle of a box, as large as goes, in a frame: paper may be white."""
    scale = box / max(image.shape[:2])
    if scale >= 1:
        tile = style.resample(image[None], int(scale))[0]
    else:  # each pixel is the mean of those it stands for, so that no thin line is lost
        high, wide = (max(1, round(side * scale)) for side in image.shape[:2])
        tile = np.asarray(Image.fromarray(image).resize((wide, high), Image.Resampling.BOX))
    high, wide = tile.shape[:2]
    figure.paste(tile, x + (box - wide) // 2, y + (box - high) // 2, "#bbbbbb", border=1)
