"""Figures of images: a grid of samples, the weights of a first layer, photos and predictions."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from PIL import Image

from mnist_exp.figures.style import (
    BLUE,
    DISCREET,
    INK,
    ORANGE,
    SMALL,
    TEXT,
    TITLE,
    Floats,
    Pixels,
    _resampled,
    _scale,
    canvas,
    shorten,
    styled,
    text_width,
)
from mnist_exp.formatting import rounded_percent

ROWS, COLUMNS = 5, 6  # of a grid
PAIRS = 60  # pictures beside what is seen of them
UNITS = 64  # of a first layer

# Of a number its sign is a hue and its magnitude a shade.
BELOW, ABOVE = ("#003350", BLUE), (ORANGE, "#6b2a00")
SIGNED = LinearSegmentedColormap.from_list("signed", [*BELOW, "#f5f5f5", *ABOVE])


def sample_grid(
    images: npt.NDArray[np.uint8],
    labels: Sequence[str],
    predicted: Sequence[str] | None = None,
    confidence: Sequence[float] | None = None,
    *,
    title: str,
) -> Figure:
    """Images in reading order, up to 5 rows of 6, each under its label.

    images [N, H, W] with N from 1 to 30; labels, predicted and confidence (0 to 1) have N entries.
    An image whose prediction differs from its label is framed and titled "✗ label → predicted".
    Raises ValueError for other shapes. Painted as one mosaic, many times faster than an axes for
    each image: it is wanted after every epoch.
    """
    count, limit = len(images), ROWS * COLUMNS
    if images.ndim != 3 or images.dtype != np.uint8 or not images.size or count > limit:
        raise ValueError(f"images: {images.dtype} {images.shape}, not uint8 [1..{limit}, H, W]")
    for name, given in (("labels", labels), ("predicted", predicted), ("confidence", confidence)):
        if given is not None and len(given) != count:
            raise ValueError(f"{name}: {len(given)} for {count} images")

    texts = [[shorten(label)] for label in labels]  # the lines over each image
    wrong, caption, names = [False] * count, "", [*labels]
    if predicted is not None:
        wrong = [a != b for a, b in zip(labels, predicted, strict=True)]
        names += predicted
        caption = f"{count - sum(wrong)} of {count} right" + "; ✗ true → predicted" * any(wrong)
        for lines, name, is_wrong in zip(texts, predicted, wrong, strict=True):
            if is_wrong:
                lines[:] = [f"✗ {lines[0]}", f"→ {shorten(name)}"]
    if confidence is not None:
        caption = f"{caption}, confidence" if caption else "confidence"
        for lines, value in zip(texts, confidence, strict=True):
            lines.append(f"{lines.pop()}  {value:.0%}" if len(lines) > 1 else f"{value:.0%}")
    if max(map(len, names)) <= 3:  # short enough for one line
        texts = [["  ".join(lines).replace("  →", " →")] for lines in texts]

    # About 140 pixels wide, each pixel of the image a whole number of the figure's if it can be.
    tiles = _resampled(images, _scale(images.shape[2], 140))
    _, high, wide = tiles.shape
    strip = 14 + 20 * max(map(len, texts))
    top = 56 if caption else 32
    across = min(COLUMNS, count)
    title = shorten(title, 72)
    needed = (across * (wide + 10) - 10, text_width(title, TITLE), text_width(caption, SMALL))
    width = 16 + math.ceil(max(needed))
    height = top + math.ceil(count / across) * (strip + high) + 10
    widest = max(text_width(line, TEXT) for line in {line for lines in texts for line in lines})
    size = TEXT * min(1.0, (wide + 4) / max(widest, 1.0))
    mosaic = np.full((height, width, 4), 255, np.uint8)
    frame = np.round(np.array(to_rgb(ORANGE)) * 255)
    with styled():
        figure = canvas(width, height, title, caption)
        figure.add_artist(Pixels(mosaic))
        for i, tile in enumerate(tiles):
            y, x = top + i // across * (strip + high) + strip, 8 + i % across * (wide + 10)
            colour = ORANGE if wrong[i] else INK if predicted is None else DISCREET
            if wrong[i]:
                mosaic[y - 4 : y + high + 4, x - 4 : x + wide + 4, :3] = frame
            mosaic[y : y + high, x : x + wide, :3] = tile[..., None]
            place = ((x + wide / 2) / width, 1 - (y - 10) / height)
            figure.text(*place, "\n".join(texts[i]), fontsize=size, color=colour, ha="center")
    return figure


def weights_figure(images: Floats, title: str) -> Figure:
    """The weights of a first layer, an image for each unit or filter, in reading order.

    images [N, H, W] with N from 1 on, of which the first 64 are shown, 8 in a row at most. A colour
    means the same weight in all of them: 0 is nearly white, and the scale ends at the greatest
    magnitude shown. A weight that isn't finite is black. Raises ValueError for other shapes.
    """
    if images.ndim != 3 or not np.issubdtype(images.dtype, np.floating) or not images.size:
        raise ValueError(f"images: {images.dtype} {images.shape}, not float [1.., H, W]")
    shown = images[:UNITS]
    caption = f"the first {UNITS} of {len(images)}" * (len(images) > UNITS)
    title = shorten(title, 72)
    most = float(np.abs(shown[np.isfinite(shown)]).max(initial=0.0)) or 1.0

    # In pixels. As square as goes with the fewest gaps in the last row.
    count = len(shown)
    fewest = math.ceil(math.sqrt(count))
    across = min(range(fewest, 9), key=lambda columns: -count % columns)
    scale = _scale(max(shown.shape[1:]), min(168, max(1, 900 // across)))
    tiles = _resampled(np.ma.masked_invalid(shown.astype(np.float64)), scale)
    _, high, wide = tiles.shape
    top, down = 68 if caption else 44, math.ceil(count / across)
    side = max(down * (high + 6) - 6, 96)  # of the colour bar too
    left = 8 + across * (wide + 6)
    needed = (
        left + 76 + text_width(f"{-most:.2g}", TEXT),
        16 + text_width(title, TITLE),
        16 + text_width(caption, SMALL),
    )
    width, height = math.ceil(max(needed)), top + side + 14
    mosaic = np.full((height, width, 4), 255, np.uint8)
    shades = ScalarMappable(Normalize(-most, most), SIGNED.with_extremes(bad="black"))
    for i, tile in enumerate(tiles):
        y, x = top + i // across * (high + 6), 8 + i % across * (wide + 6)
        mosaic[y : y + high, x : x + wide] = shades.to_rgba(tile, bytes=True)
    with styled():
        figure = canvas(width, height, title, caption)
        figure.add_artist(Pixels(mosaic))
        long = min(side, 240) / height
        bar = figure.add_axes(((left + 10) / width, 1 - top / height - long, 14 / width, long))
        figure.colorbar(shades, bar, ticks=[-most, 0, most], format=lambda at, _: f"{at:.2g}")
        bar.set_ylabel("weight", labelpad=0)
    return figure


def predictions_figure(
    given: Sequence[npt.NDArray[np.uint8]],
    seen: npt.NDArray[np.uint8],
    texts: Sequence[Sequence[tuple[str, float]]],
    title: str,
    names: Sequence[str],
    of: int = 0,
) -> Figure:
    """Pictures beside what the network saw of them, and what it takes them for.

    given: N pictures [H, W, 3] of any size; seen [N, h, w]; texts: for each picture its most
    probable classes, up to three, as (class, probability), the best first: that one is large, and
    orange with a question mark where its probability is below 50 %; names: of the pictures. The
    first 60 are shown; `of`: how many there are, if these are not all. Raises ValueError for other
    shapes, and without a picture.
    """
    total = len(given)
    if seen.ndim != 3 or seen.dtype != np.uint8 or not seen.size or len(seen) != total:
        raise ValueError(f"seen: {seen.dtype} {seen.shape}, not uint8 [{total}, h, w]")
    for i, picture in enumerate(given):
        if picture.dtype != np.uint8 or picture.shape[2:] != (3,) or not picture.size:
            raise ValueError(f"given[{i}]: {picture.dtype} {picture.shape}, not uint8 [H, W, 3]")
    for name, own in (("texts", texts), ("names", names)):
        if len(own) != total:
            raise ValueError(f"{name}: {len(own)} for {total} pictures")
    for i, ranked in enumerate(texts):
        if not 1 <= len(ranked) <= 3:
            raise ValueError(f"texts[{i}]: {len(ranked)} classes, not 1 to 3")
    count, title, of = min(total, PAIRS), shorten(title, 72), max(of, total)
    doubtful = [ranked[0][1] < 0.5 for ranked in texts[:count]]
    caption = "given → as the network sees it" + "; ?: below 50%" * any(doubtful)
    caption += f"; the first {count} of {of}" * (count < of)
    # Of each picture the class, large, and under it its probability and the next classes.
    classes = [
        shorten(ranked[0][0]) + " ?" * is_doubtful
        for ranked, is_doubtful in zip(texts, doubtful, strict=False)
    ]
    below = [
        [
            rounded_percent(ranked[0][1]),
            *(f"{shorten(name)}  {rounded_percent(value)}" for name, value in ranked[1:]),
        ]
        for ranked in texts[:count]
    ]

    # In pixels: two boxes and the text beside them, the pairs apart, 3 in a row.
    box, arrow, gap = 112, 26, 10
    large = min(18.0, 18.0 * 150 / max(1.0, *(text_width(name, 18.0) for name in classes)))
    room = max(text_width(name, large) for name in classes)
    room = math.ceil(max(room, *(text_width(line, TEXT) for lines in below for line in lines)))
    step, down = 2 * box + arrow + gap + room + 28, box + 40
    across, top = min(3, count), 86
    needed = across * step - 28, text_width(title, TITLE), text_width(caption, SMALL)
    width = 16 + math.ceil(max(needed))
    height = top + math.ceil(count / across) * down - 30
    mosaic = np.full((height, width, 4), 255, np.uint8)
    with styled():
        figure = canvas(width, height, title, caption)
        figure.add_artist(Pixels(mosaic))
        for i in range(count):
            y, x = top + i // across * down, 8 + i % across * step
            _paste(mosaic, _boxed(given[i], box), y, x, box)
            _paste(mosaic, _boxed(seen[i], box)[..., None], y, x + box + arrow, box)
            colour = ORANGE if doubtful[i] else INK
            for text, size, ink, right, lower in (
                (shorten(names[i], 32), SMALL, DISCREET, 0, -6),
                ("→", TITLE, DISCREET, box + 5, 64),
                (classes[i], large, colour, 2 * box + arrow + gap, 34),
                (below[i][0], TEXT, colour, 2 * box + arrow + gap, 58),
                ("\n".join(below[i][1:]), SMALL, DISCREET, 2 * box + arrow + gap, 110),
            ):
                place = (x + right) / width, 1 - (y + lower) / height
                figure.text(*place, text, fontsize=size, color=ink)
    return figure


def _boxed(picture: npt.NDArray[np.uint8], box: int) -> npt.NDArray[np.uint8]:
    """[H, W, ...] as large as the box allows: pixels repeated, or averaged if it is larger."""
    scale = box / max(picture.shape[:2])
    if scale >= 1:
        tile: npt.NDArray[np.uint8] = _resampled(picture[None], int(scale))[0]
        return tile
    high, wide = (max(1, round(side * scale)) for side in picture.shape[:2])
    return np.asarray(Image.fromarray(picture).resize((wide, high), Image.Resampling.BOX))


def _paste(
    mosaic: npt.NDArray[np.uint8], tile: npt.NDArray[np.uint8], y: int, x: int, box: int
) -> None:
    """Paints a tile [h, w, 1 or 3] into the middle of a box, in a frame: paper may be white."""
    high, wide = tile.shape[:2]
    y, x = y + (box - high) // 2, x + (box - wide) // 2
    mosaic[y - 1 : y + high + 1, x - 1 : x + wide + 1, :3] = 187
    mosaic[y : y + high, x : x + wide, :3] = tile
