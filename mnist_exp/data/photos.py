"""Image files, such as photographs of ink on paper, turned into what MNIST's images look like."""

import math
import re
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, UnidentifiedImageError
from scipy import ndimage

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
AnyArray = NDArray[Any]

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")
MAX_PIXELS = 100_000_000  # a small file can claim more than there is memory for
SIDE = 512  # of the thumbnail that all is done on: a stroke of MNIST's is 50 of its pixels wide
STROKE = 2.4  # pixels in an image of 28 x 28: thinner strokes are rare in MNIST
# By EXIF's orientation. Pillow's exif_transpose would also write what else EXIF says anew, and that
# fails where a camera has got it wrong.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BLANK = "it is blank, or no ink can be told from its background"


class UnreadableImage(Exception):
    """The reason why a file cannot be used; the message does not name the file."""


@dataclass(frozen=True)
class Photo:
    """An image file as it was read, and as the network gets it."""

    original: Bytes  # uint8 [H, W, 3], upright, at most 512 on a side
    preprocessed: Bytes  # uint8 [h, w], as MNIST's images are


def read(path: Path, size: tuple[int, int], raw: bool = False) -> Photo:
    """Read an image file, and make what a network for images of `size` (h, w) gets of it.

    The digit is found, whether dark on light or light on dark, and placed as MNIST's are. With
    `raw`, the image is only made grey and resized. Raises UnreadableImage.
    """
    original = _load(path)
    if raw:
        grey = Image.fromarray(original).convert("L")
        return Photo(original, np.array(grey.resize(size[::-1], Image.Resampling.BICUBIC)))
    return Photo(original, _place(_thicken(_find_ink(*_grey(_sheet(original)))), size))


# ---- from the file to a thumbnail ----------------------------------------------------------------


def _load(path: Path) -> Bytes:
    """Return the image in a file as uint8 [H, W, 3] of at most 512 on a side."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise UnreadableImage("it is a folder")
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise UnreadableImage("it is no file")
        if not status.st_size:
            raise UnreadableImage("it is empty")
        with path.open("rb") as file:
            return _decode(file, status.st_size)
    except FileNotFoundError:
        raise UnreadableImage("there is no such file") from None
    except PermissionError:
        raise UnreadableImage("permission denied") from None
    except (OSError, ValueError) as error:  # a ValueError: no path can have a zero byte
        fault = (isinstance(error, OSError) and error.strerror) or error
        raise UnreadableImage(f"it cannot be read: {fault}") from None


def _decode(file: IO[bytes], length: int) -> Bytes:
    """Return an open image file of `length` bytes as uint8 [H, W, 3] of at most 512 on a side."""
    try:
        # Pillow warns of oddities that it can cope with
        with warnings.catch_warnings(action="ignore"), Image.open(file, formats=FORMATS) as image:
            if (pixels := image.width * image.height) > MAX_PIXELS:
                raise _too_large(pixels)
            return np.array(_over_background(_upright_thumbnail(image)))
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage(
            "it is no image that can be read: PNG, JPEG, BMP, GIF, TIFF or WebP"
        ) from None
    except Image.DecompressionBombError as error:  # Pillow's own bound is higher
        raise _too_large(int(re.findall(r"\d+", str(error))[0])) from None
    except MemoryError:
        raise UnreadableImage("it is too large to be decoded") from None
    except Exception as error:  # a decoder can raise anything
        if isinstance(error, EOFError) or "truncated" in str(error).lower():
            raise UnreadableImage(f"it is cut off after {length:,} bytes, or damaged") from None
        fault = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(f"it is damaged: {fault}") from None


def _too_large(pixels: int) -> UnreadableImage:
    """Return what says that an image has too many pixels."""
    millions, most = math.ceil(pixels / 1e6), MAX_PIXELS // 1_000_000
    return UnreadableImage(f"it has {millions:,} million pixels; at most {most} million")


def _upright_thumbnail(image: Image.Image) -> Image.Image:
    """Return the image as RGBA of at most 512 on a side, turned as its EXIF data say."""
    if image.mode in ("L", "RGB", "CMYK") and "transparency" not in image.info:
        image.thumbnail((SIDE, SIDE))  # at once: a JPEG is then decoded at a size near that
    if image.mode[0] in "IF":
        pixels = Image.fromarray(_eight_bits(np.asarray(image, np.float32))).convert("RGBA")
    else:
        pixels = image.convert("RGBA")
    pixels.thumbnail((SIDE, SIDE))
    # Read only now, as Pillow turns a TIFF itself when it loads it.
    turn = TURNS.get(image.getexif().get(0x0112, 1))
    return pixels if turn is None else pixels.transpose(turn)


def _eight_bits(values: Floats) -> Bytes:
    """Scale from the range the values seem to be meant in: 0 to 1, 255 or 65535; else their own."""
    values = np.nan_to_num(values, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 65535:
        values, high = (values - low) / ((high - low) or 1.0), 1.0
    top = next(most for most in (1, 255, 65535) if high <= most)
    return (values * (255 / top) + 0.5).astype(np.uint8)


def _over_background(image: Image.Image) -> Image.Image:
    """Return an RGBA image as RGB, with paper where it is transparent.

    The paper has the colour of most of the rest where that is ink and paper. Otherwise the rest is
    ink alone, and the paper black or white.
    """
    rgba = np.asarray(image)
    opaque = rgba[rgba[..., 3] >= 128][:, :3]
    background = (255, 255, 255)
    if 0 < len(opaque) < rgba[..., 3].size:
        low, high = np.percentile(opaque.mean(1), (5, 95))
        if high - low > 64:
            red, green, blue = np.median(opaque, 0).astype(int).tolist()
            background = (red, green, blue)
        elif opaque.mean() >= 128:
            background = (0, 0, 0)
    paper = Image.new("RGBA", image.size, background)
    return Image.alpha_composite(paper, image).convert("RGB")


# ---- from the thumbnail to ink -------------------------------------------------------------------


def _sheet(photo: Bytes) -> Bytes:
    """Return the sheet of paper on a dark table in a photograph; all of it, if there is none."""
    grey = photo.mean(2)
    table, white = float(np.median(_edge(grey))), float(np.percentile(grey, 95))
    if table >= 0.5 * white:
        return photo
    labels = _label(grey > table + 0.3 * (white - table))
    sheet = labels == np.bincount(labels[labels > 0]).argmax()
    spans = []
    for axis in (1, 0):
        share = sheet.sum(axis)
        inside = np.flatnonzero(share > 0.5 * share.max())
        spans.append(slice(inside[0], inside[-1] + 1))
    box = sheet[spans[0], spans[1]]
    # neither strokes, which have gaps, nor the light beside a shadow, which goes on to the border
    is_sheet = box.size > 0.3 * sheet.size and box.mean() > 0.8 and _edge(sheet).mean() < 0.1
    return photo[spans[0], spans[1]] if is_sheet else photo


def _edge(values: AnyArray) -> AnyArray:
    """Return the values along the border, [H, W] -> [2 H + 2 W]."""
    return np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])


def _grey(photo: Bytes) -> tuple[Floats, bool]:
    """Return uint8 [H, W, 3] as [H, W] from 0 to 1, and whether its ink is darker than its paper.

    Both follow from the differences between pixels and their surroundings: their main axis gives
    the weights of the channels, so that any ink stands out from any paper; and as strokes are thin,
    the sign of the skewness is theirs. The two sides of a shadow's edge, or of noise, are alike.
    """
    coarse, fine = (_differences(photo, max(photo.shape) / share) for share in (7, 25))
    axis = np.linalg.eigh(coarse.T @ coarse)[1][:, -1]
    weights = np.maximum(axis if axis.sum() >= 0 else -axis, 0)
    weights /= 255 * weights.sum()
    skewness = sum(
        (d**3).mean() / ((d**2).mean() ** 1.5 + 1e-12) for d in (coarse @ weights, fine @ weights)
    )
    return photo @ weights, bool(skewness <= 0)


def _differences(photo: Bytes, radius: float) -> Floats:
    """Subtract the mean of its surroundings from each pixel, uint8 [H, W, 3] -> [H * W, 3]."""
    around = Image.fromarray(photo).filter(ImageFilter.GaussianBlur(radius))
    return (photo.astype(np.float32) - np.asarray(around, np.float32)).reshape(-1, 3)


def _find_ink(grey: Floats, dark: bool) -> Floats:
    """Return the digit [H, W] from 0, paper, to 1, ink, without whatever else stands out."""
    ink, noise = _without_paper(grey, dark)
    stands_out = ink > max(5 * noise, 0.04)
    if stands_out.sum() < max(3, 2e-4 * ink.size):
        raise UnreadableImage(BLANK)
    threshold = _otsu(ink[stands_out])  # between the edges of strokes, or faint lines, and strokes
    reach = 1 + max(ink.shape) // 100
    strokes = _digit(ink > 0.7 * threshold, reach // 2)
    low, full = 2 * noise, float(np.percentile(ink[strokes], 80))
    if full < 8 * noise:  # what is left of shadows and texture reaches 7
        raise UnreadableImage(BLANK)
    ink = np.clip((ink - low) / max(full - low, 1e-3), 0, 1)
    # the edges of strokes, but not the ripples that JPEG leaves beside them
    kept = _within(strokes, 1) | (_within(strokes, reach) & (ink > 0.1))
    return cast(Floats, np.where(kept, ink, 0))


def _without_paper(grey: Floats, dark: bool) -> tuple[Floats, float]:
    """Return the share of ink in each pixel, [H, W], around 0 for paper, and the noise in that."""
    edge = _edge(grey)
    level = float(np.median(edge))
    even = (abs(edge - level) < 0.02).mean() > 0.6 and (abs(grey - level) < 0.02).mean() > 0.3
    if even:  # lit as a scan or a drawing is: strokes may be as thick as they like
        dark = bool(grey.mean() <= level)
        light = grey if dark else 1 - grey
        paper = np.full_like(grey, level if dark else 1 - level)
    else:  # of chalk, the reciprocal: what a shadow divides, it multiplies
        light = grey if dark else np.reciprocal(grey + np.float32(0.1))
        paper = _paper(light)
    ink = (paper - light) / np.maximum(paper, 0.02)  # a share: a shadow dims ink and paper alike
    rest = ink[ink <= 0.75 * np.percentile(ink, 99.9)]  # paper for the most part, even if not all
    if not even:  # noise has lifted the paper
        ink, rest = ink - np.median(rest), rest - np.median(rest)
    noise = 1.5 * float(np.median(abs(rest)))  # a normal distribution's deviation
    return ink.astype(np.float32), noise


def _paper(light: Floats) -> Floats:
    """Return the light of the paper alone, [H, W], by a morphological closing.

    It removes what is darker than both its sides and narrower than a third of the picture, as
    strokes are, and a shadow is not.
    """
    half = max(light.shape) // 6 + 1
    room = 2 * half  # where all is dark: a shadow may go on as it likes
    closed = ndimage.grey_closing(np.pad(light, room), (2 * half + 1, 2 * half + 1))
    return cast(Floats, closed[room:-room, room:-room])


def _otsu(values: Floats) -> float:
    """Return the threshold that leaves the least variance on its two sides (Otsu 1979)."""
    if np.ptp(values) < 1e-3:  # of one shade, there is nothing to divide
        return float(values.min())
    counts, edges = np.histogram(values, 128)
    middles = (edges[:-1] + edges[1:]) / 2
    below, sums = np.cumsum(counts), np.cumsum(counts * middles)
    above = len(values) - below
    means = sums / np.maximum(below, 1), (sums[-1] - sums) / np.maximum(above, 1)
    return float(edges[1 + (below * above * (means[0] - means[1]) ** 2).argmax()])


def _digit(ink: Mask, reach: int) -> Mask:
    """Return the pixels of `ink` that are the digit: its largest part, and what is near or large.

    Pixels belong to one part if they touch once all are widened by `reach`.
    """
    labels = np.where(ink, _label(_within(ink, reach)), 0)
    areas = np.bincount(labels[ink])[1:]  # [parts], as all that follow
    boxes = np.array([[(s.start, s.stop) for s in box] for box in ndimage.find_objects(labels)])
    low, high = boxes[..., 0], boxes[..., 1]  # [parts, 2], row and column
    lengths = (high - low).max(1)
    on_border = np.bincount(_edge(labels), minlength=1 + len(areas))[1:]
    # what lies along the border is a table, unless there is nothing else
    allowed = on_border < 0.3 * min(ink.shape)
    if not (allowed & (lengths > 0.12 * max(ink.shape))).any():
        allowed[:] = True
    largest = np.where(allowed, areas, 0).argmax()
    gaps = np.maximum(low - high[largest], low[largest] - high).max(1)
    is_near = (gaps < 0.25 * lengths[largest]) & (areas > 0.02 * areas[largest])
    is_digit = allowed & (is_near | (areas > 0.3 * areas[largest]))
    return cast(Mask, np.append(False, is_digit)[labels])


def _label(mask: Mask) -> NDArray[np.int32]:
    """Return a number from 1 for each connected part of a mask [H, W], and 0 elsewhere."""
    return cast(NDArray[np.int32], ndimage.label(mask, np.ones((3, 3)))[0])


def _within(mask: Mask, radius: int) -> Mask:
    """Widen a mask [H, W] by `radius` pixels."""
    return cast(Mask, ndimage.distance_transform_edt(~mask) <= radius)


# ---- from ink to MNIST's -------------------------------------------------------------------------


def _thicken(ink: Floats) -> Floats:
    """Cut the digit out, [H, W] -> [H', W'], and widen strokes thinner than MNIST's."""
    (box,) = ndimage.find_objects((ink > 0).astype(np.uint8))
    ink = ink[box]
    mask = np.pad(ink > 0.5, 1)
    sides = np.count_nonzero(mask[1:] != mask[:-1]) + np.count_nonzero(mask[:, 1:] != mask[:, :-1])
    width = 2 * np.count_nonzero(mask) / (np.pi / 4 * sides)  # of a long stroke in any direction
    # r more on each side makes both width and digit 2 r larger
    radius = int((STROKE * max(ink.shape) - 20 * width) / (2 * (20 - STROKE)))
    if radius <= 0:
        return ink
    ink = np.pad(ink, radius + 1)
    away = ndimage.distance_transform_edt(ink < 0.5)
    return cast(Floats, np.maximum(ink, np.clip(radius + 1 - away, 0, 1)).astype(np.float32))


def _place(digit: Floats, size: tuple[int, int]) -> Bytes:
    """Place a digit [H, W] in an image, uint8 [h, w], as MNIST was made.

    It is scaled with antialiasing to fit 20 x 20, and its centre of mass is the middle of 28 x 28
    (LeCun, Bottou, Bengio & Haffner 1998; the page of the data set). Other sizes in proportion.
    """
    scale = min(side * 20 / 28 / length for side, length in zip(size, digit.shape, strict=True))
    height, width = (max(1, round(length * scale)) for length in digit.shape)
    small = np.asarray(
        Image.fromarray(digit).resize((width, height), Image.Resampling.BICUBIC), np.float32
    )
    small = np.clip(small / max(small.max(), 1e-6), 0, 1)  # MNIST's all reach 255
    image = np.zeros(size, np.uint8)
    row, column = (
        int(np.clip(round(side // 2 - middle), 0, side - length))
        for side, middle, length in zip(
            size, ndimage.center_of_mass(small), small.shape, strict=True
        )
    )
    image[row : row + height, column : column + width] = np.round(255 * small)
    return image
