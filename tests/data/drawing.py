"""Digits as people write them, drawn: for what is photographed, scanned or drawn with a mouse."""

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# Strokes in a box of 100 x 100, y down: each the points that a smooth curve passes through; one
# with a ! is a corner. Several ways to write each digit.
WAYS = {
    0: [
        ["55,0 15,20 8,60 40,100 80,75 85,30 50,0"],
        ["70,6 40,0 10,45 35,100 75,80 80,20 45,2"],
    ],
    1: [
        ["50,0 50,50 50,100"],
        ["30,25 55,0! 54,50 55,100"],
        ["32,20 52,0! 51,50 52,100", "25,100 50,99 78,100"],
    ],
    2: [
        ["12,22 45,0 80,25 50,65 10,100! 50,98 90,98"],
        ["15,20 50,0 78,30 50,75 18,97 15,80 40,84 65,98 92,90"],
    ],
    3: [
        ["15,12 50,0 80,22 40,46! 82,70 50,100 10,86"],
        ["15,3 80,2! 42,40! 82,68 50,100 12,90"],
    ],
    4: [
        ["30,0 12,58! 90,56", "68,15 64,60 60,100"],
        ["90,68 50,68 8,68! 36,35 66,0! 66,50 66,100"],
    ],
    5: [
        ["25,3 20,42! 55,38 82,65 50,100 12,90", "25,3 50,3 85,0"],
        ["85,2 30,3! 22,45! 60,42 80,70 50,100 12,92"],
        ["22,10 20,44! 60,42 78,70 48,100 12,90", "34,2 60,0 90,0"],
    ],
    6: [
        ["70,0 35,25 15,65 40,100 78,80 60,52 28,60 18,75"],
        ["45,0 18,45 22,88 55,100 78,75 50,56 20,78"],
    ],
    7: [
        ["10,5 50,4 85,2! 60,45 40,100"],
        ["10,5 50,4 85,2! 58,50 42,100", "35,52 58,50 80,49"],
        ["10,18 12,4! 85,3! 50,50 45,100"],
    ],
    8: [
        ["72,15 45,0 20,22 50,48 80,75 50,100 18,78 50,48 76,22 68,10"],
        ["50,0 22,22 50,46 76,22 50,0", "50,46 15,74 50,100 84,74 50,46"],
    ],
    9: [
        ["78,15 45,0 18,28 45,52 78,20! 74,60 68,100"],
        ["76,10 40,0 16,25 45,48 78,12! 78,60 55,100 20,90"],
    ],
}

PAPERS = [(255, 255, 255), (250, 246, 232), (238, 238, 240), (225, 232, 240), (250, 240, 170)]
INKS = [(0, 0, 0), (25, 30, 60), (20, 40, 150), (150, 25, 25), (60, 60, 65), (20, 90, 40)]


def curve(stroke: str, rng: np.random.Generator, steps: int = 16) -> np.ndarray:
    """[N, 2] from 0 to 1: Catmull-Rom splines from corner to corner, the points a little moved."""
    parts: list[list[np.ndarray]] = [[]]
    for word in stroke.split():
        point = np.array(word.rstrip("!").split(","), float) / 100 + rng.normal(0, 0.022, 2)
        parts[-1].append(point)
        if word.endswith("!"):
            parts.append([point])
    t = np.linspace(0, 1, steps)[:, None]
    pieces = []
    for part in parts:
        p = [part[0], *part, part[-1]]
        for a, b, c, d in zip(p, p[1:], p[2:], p[3:], strict=False):
            cubic = 3 * (b - c) + d - a
            pieces.append(b + t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * cubic)) / 2)
    return np.concatenate(pieces)


def draw(
    digit: int,
    rng: np.random.Generator,
    *,
    size: tuple[int, int] | None = None,
    way: int | None = None,
    pen: float | None = None,
    height: float | None = None,
    paper: tuple[int, int, int] | None = None,
    ink: tuple[int, int, int] | None = None,
) -> Image.Image:
    """RGB. What is not given is chosen: `size` (width, height); `pen`, its width as a share of the
    digit's height; `height`, of the digit, as a share of the picture's shorter side."""
    width, tall = size or (int(rng.integers(200, 801)), int(rng.integers(200, 801)))
    ways = WAYS[digit]
    strokes = ways[int(rng.integers(len(ways))) if way is None else way]
    height = height or rng.uniform(0.35, 0.85)
    pen = pen or rng.uniform(0.015, 0.13)
    h = height * min(width, tall)
    w = h * rng.uniform(0.5, 0.8)
    slant, turn = rng.uniform(-0.1, 0.35), rng.uniform(-0.1, 0.1)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    curves = []
    for stroke in strokes:
        x, y = (curve(stroke, rng) - 0.5).T
        curves.append(np.stack([x * w / h - slant * y, y], 1) @ matrix.T * h)
    everything = np.concatenate(curves)
    low, high = everything.min(0), everything.max(0)
    margin = pen * h / 2 + 3
    room = np.array([width, tall]) - 2 * margin - (high - low)
    if (room < 0).any():  # slanted too wide for the picture
        shrink = ((np.array([width, tall]) - 2 * margin) / (high - low)).min()
        curves, low, high = [c * shrink for c in curves], low * shrink, high * shrink
        room = np.array([width, tall]) - 2 * margin - (high - low)
    offset = margin + np.maximum(room, 0) * rng.uniform(0.1, 0.9, 2) - low
    fine = 4  # drawn larger, then made small: no jagged edges
    mask = Image.new("L", (fine * width, fine * tall))
    pencil = ImageDraw.Draw(mask)
    for own in curves:
        points = (own + offset) * fine
        radii = fine * max(pen * h, 1) / 2 * (1 + 0.12 * np.sin(np.linspace(0, 7, len(points))))
        for (x0, y0), (x1, y1), r in zip(points, points[1:], radii, strict=False):
            pencil.line([x0, y0, x1, y1], 255, max(1, round(2 * r)))
            pencil.ellipse([x1 - r, y1 - r, x1 + r, y1 + r], 255)
    mask = mask.resize((width, tall), Image.Resampling.BOX)
    paper = paper or PAPERS[int(rng.integers(len(PAPERS)))]
    ink = ink or INKS[int(rng.integers(len(INKS)))]
    return Image.composite(
        Image.new("RGB", mask.size, ink), Image.new("RGB", mask.size, paper), mask
    )


def photograph(picture: Image.Image, rng: np.random.Generator, quality: int = 70) -> Image.Image:
    """What a telephone makes of it: a lamp at one side, a hand's shadow, paper that is not smooth,
    a lens that is a little out of focus, noise, JPEG."""
    width, height = picture.size
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    angle = rng.uniform(0, 2 * np.pi)
    across = np.cos(angle) * (x - x.mean()) + np.sin(angle) * (y - y.mean())
    soft = rng.uniform(0.01, 0.1)
    shadow = 1 - rng.uniform(0.2, 0.5) / (1 + np.exp(-(across - rng.uniform(-0.2, 0.2)) / soft))
    lens = 1 - 0.5 * ((x - x.mean()) ** 2 + (y - y.mean()) ** 2)
    light = shadow * lens * (1 + rng.uniform(-0.3, 0.3) * (x - x.mean()))
    grain = Image.fromarray(rng.normal(0, 0.02, (height // 3, width // 3)).astype(np.float32))
    texture = np.asarray(grain.resize(picture.size, Image.Resampling.BICUBIC))
    sharp = picture.filter(ImageFilter.GaussianBlur(0.8))
    pixels = np.asarray(sharp) * (light * (1 + texture))[..., None] * rng.uniform(0.85, 1)
    pixels = pixels * np.array([1, 0.97, 0.9]) + rng.normal(0, 5, pixels.shape)
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return Image.open(file)
