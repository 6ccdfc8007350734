"""What a network gets of drawings, photographs and files that are no images."""

import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

from mnist_exp.data.dataset import Dataset, load
from mnist_exp.data.photos import UnreadableImage, read
from mnist_exp.training import loop
from mnist_exp.training.events import RunSpec, StackSpec
from mnist_exp.training.models import CNN
from mnist_exp.training.schedules import OneCycle
from mnist_exp.training.stack import Stack
from tests.data.drawing import draw, photograph

MIDDLE = 14  # of 28 pixels, as MNIST's images have it: from 13.5 to 14.5


def seen(picture: Image.Image, folder: Path, name: str = "a.png", **options: Any) -> np.ndarray:
    picture.save(folder / name, **options)
    return read(folder / name, (28, 28)).preprocessed


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    """Correlation of two images."""
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


def box(image: np.ndarray) -> tuple[int, int]:
    rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
    return int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1


def centre(image: np.ndarray) -> np.ndarray:
    """Of mass: row, column."""
    points = np.indices(image.shape).reshape(2, -1)
    return np.asarray((points * image.ravel()).sum(1) / image.sum())


def a_digit(digit: int = 5, seed: int = 0, **choices: Any) -> Image.Image:
    black_on_white = {"ink": (0, 0, 0), "paper": (255, 255, 255)}
    return draw(digit, np.random.default_rng(seed), **{"way": 0, **black_on_white, **choices})


@pytest.fixture(scope="module")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    cache = tmp_path_factory.mktemp("cache")
    return load("mnist", root=None, val_size=0, train_size=10_000, split_seed=0, cache=cache)


# ---- MNIST's own preparation ---------------------------------------------------------------------


@pytest.mark.parametrize("digit", range(10))
def test_size_place_and_levels_are_mnists(digit: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(digit)
    for _ in range(2):
        image = seen(draw(digit, rng), tmp_path)
        assert image.dtype == np.uint8 and image.shape == (28, 28)
        assert max(box(image)) == 20
        assert abs(centre(image) - MIDDLE).max() <= 0.51
        assert image.max() == 255
        assert 20 < image.sum() / 255 < 190  # as 99 % of MNIST


def test_mnist_comes_back(mnist: Dataset, tmp_path: Path) -> None:
    images = mnist.test.images[:200, 0].numpy()
    alike = [likeness(seen(Image.fromarray(image), tmp_path), image) for image in images]
    # a centre of mass that is half-way between two pixels can be rounded the other way
    assert np.quantile(alike, 0.03) > 0.99


def test_raw_is_exact(mnist: Dataset, tmp_path: Path) -> None:
    for image in mnist.test.images[:20, 0].numpy():
        Image.fromarray(image).save(tmp_path / "a.png")
        photo = read(tmp_path / "a.png", (28, 28), raw=True)
        assert np.array_equal(photo.preprocessed, image)
        assert np.array_equal(photo.original, image[..., None].repeat(3, 2))


def test_raw_is_neither_inverted_nor_moved(tmp_path: Path) -> None:
    picture = Image.new("L", (280, 140), 200)
    picture.paste(40, (0, 0, 140, 140))
    picture.save(tmp_path / "a.png")
    image = read(tmp_path / "a.png", (14, 28), raw=True).preprocessed
    assert image.shape == (14, 28)
    assert (image[:, :12] == 40).all() and (image[:, 16:] == 200).all()


@pytest.mark.parametrize("size", [(28, 28), (8, 8), (32, 32), (64, 64), (20, 40), (40, 20)])
def test_other_sizes_are_in_proportion(size: tuple[int, int], tmp_path: Path) -> None:
    a_digit(3).save(tmp_path / "a.png")
    image = read(tmp_path / "a.png", size).preprocessed
    assert image.shape == size
    fits = [side * 20 / 28 for side in size]
    assert all(own <= fit + 0.5 for own, fit in zip(box(image), fits, strict=True))
    assert any(abs(own - fit) <= 1 for own, fit in zip(box(image), fits, strict=True))
    assert abs(centre(image) - np.array(size) // 2).max() <= 0.51


def test_strokes_of_any_pen_become_mnists(tmp_path: Path) -> None:
    thin, usual, bold = (
        seen(a_digit(3, size=(600, 600), height=0.8, pen=pen), tmp_path)
        for pen in (0.003, 0.1, 0.2)
    )
    assert likeness(thin, usual) > 0.75
    assert 0.6 < thin.sum() / usual.sum() < 1.1
    assert bold.sum() > 1.2 * usual.sum()  # and thick ones stay as they are


# ---- the same digit, another picture -------------------------------------------------------------


@pytest.mark.parametrize("digit", [1, 4, 5, 8])
def test_polarity_scale_place_and_colour_do_not_matter(digit: int, tmp_path: Path) -> None:
    picture = a_digit(digit, size=(300, 260), height=0.6, pen=0.08)
    expected = seen(picture, tmp_path)
    width, height = picture.size
    larger = picture.resize((2 * width, 2 * height), Image.Resampling.BICUBIC)
    moved = Image.new("RGB", (500, 400), "white")
    moved.paste(picture, (190, 5))
    found = ImageOps.invert(picture).getbbox()
    others = {
        "light on dark": ImageOps.invert(picture),
        "larger": larger,
        "moved": moved,
        "without a margin": picture.crop(found),
        "without a margin, light on dark": ImageOps.invert(picture.crop(found)),
        "yellow on white": ImageOps.colorize(picture.convert("L"), (255, 220, 40), "white"),
        "red on blue": ImageOps.colorize(picture.convert("L"), (200, 60, 60), (60, 90, 200)),
        "hardly darker": ImageOps.colorize(picture.convert("L"), (150, 150, 150), (180, 180, 180)),
    }
    for name, other in others.items():  # sizes and places are rounded to a pixel, up or down
        assert likeness(seen(other, tmp_path), expected) > 0.9, name


def test_dust_and_what_lies_along_the_border_are_left_out(tmp_path: Path) -> None:
    picture = a_digit(3, size=(500, 400), height=0.5, pen=0.1)
    expected = seen(picture, tmp_path)
    pen = ImageDraw.Draw(picture)
    for x, y in ((20, 20), (480, 30), (470, 380), (30, 200), (250, 390)):
        pen.ellipse([x - 3, y - 3, x + 3, y + 3], (30, 30, 30))
    assert likeness(seen(picture, tmp_path), expected) > 0.98
    pen.rectangle([0, 0, 500, 12], (60, 40, 30))
    assert likeness(seen(picture, tmp_path), expected) > 0.98


def test_a_part_of_the_digit_on_its_own_stays(tmp_path: Path) -> None:
    picture = a_digit(5, way=2, size=(400, 400), height=0.6, pen=0.06)
    whole = seen(picture, tmp_path)
    bar = picture.copy()
    _, top, _, bottom = ImageOps.invert(picture).getbbox() or (0, 0, 0, 0)
    bar.paste("white", (0, 0, 400, top + (bottom - top) // 12))
    assert whole[:8].sum() > seen(bar, tmp_path)[:8].sum()


@pytest.mark.parametrize("digit", range(10))
def test_a_photograph_is_nearly_the_drawing(digit: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(digit)
    choices: list[dict[str, Any]] = [
        {"pen": 0.08},
        {"pen": 0.03, "ink": (160, 160, 160), "paper": (245, 245, 240)},  # a pencil
        {"pen": 0.08, "ink": (235, 235, 230), "paper": (40, 70, 55)},  # chalk
    ]
    for own in choices:
        picture = draw(digit, rng, size=(320, 280), height=0.6, **own)
        image = seen(photograph(picture, rng), tmp_path, "a.jpg", quality=80)
        assert likeness(image, seen(picture, tmp_path)) > 0.75, own


def test_a_sheet_on_a_dark_table(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sheet = draw(2, rng, size=(400, 300), height=0.5, pen=0.08, paper=(250, 250, 250))
    table = Image.new("RGB", (520, 400), (70, 45, 30))
    turned = sheet.convert("RGBA").rotate(4, Image.Resampling.BICUBIC, expand=True)
    table.paste(turned, (50, 30), turned)
    image = seen(photograph(table, rng), tmp_path, "a.jpg")
    upright = Image.new("RGB", turned.size, (250, 250, 250))
    upright.paste(turned, (0, 0), turned)
    assert likeness(image, seen(upright, tmp_path)) > 0.85


@pytest.mark.parametrize("squared", [False, True])
def test_faint_lines_on_the_paper_are_left_out(squared: bool, tmp_path: Path) -> None:
    picture = a_digit(4, size=(500, 400), height=0.6, pen=0.08, ink=(20, 30, 90))
    expected = seen(picture, tmp_path)
    lines = Image.new("RGB", picture.size, "white")
    pen = ImageDraw.Draw(lines)
    for at in range(15, 500, 35):
        pen.line([0, at, 500, at], (185, 205, 230), 2)
        if squared:
            pen.line([at, 0, at, 400], (185, 205, 230), 2)
    darker = np.minimum(np.asarray(picture), np.asarray(lines))
    assert likeness(seen(Image.fromarray(darker), tmp_path), expected) > 0.93


# ---- modes and formats ---------------------------------------------------------------------------


def in_mode(picture: Image.Image, mode: str) -> Image.Image:
    grey = np.asarray(picture.convert("L"))
    if mode == "I;16":
        return Image.fromarray(grey.astype(np.uint16) * 257)
    if mode == "I":
        return Image.fromarray(grey.astype(np.int32) * 257)
    if mode == "F":
        return Image.fromarray(grey.astype(np.float32) / 255)
    return picture.convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *((mode, "png") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
        *((mode, "tif") for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F")),
        *((mode, "jpg") for mode in ("L", "RGB", "CMYK")),
        *((mode, "bmp") for mode in ("1", "L", "P", "RGB")),
        ("P", "gif"),
        ("RGB", "webp"),
    ],
)
def test_every_mode_and_format(mode: str, suffix: str, tmp_path: Path) -> None:
    picture = a_digit(2, size=(300, 240), pen=0.08)
    expected = seen(picture, tmp_path)
    in_mode(picture, mode).save(tmp_path / f"a.{suffix}")
    photo = read(tmp_path / f"a.{suffix}", (28, 28))
    assert photo.original.shape == (240, 300, 3)
    assert likeness(photo.original, np.asarray(picture)) > 0.97
    assert likeness(photo.preprocessed, expected) > 0.97


def test_floats_of_any_range(tmp_path: Path) -> None:
    grey = np.asarray(a_digit(2).convert("L"), np.float32)
    for values in (grey, grey / 255, grey * 1e6, grey - 100):
        Image.fromarray(values).save(tmp_path / "a.tif")
        given = read(tmp_path / "a.tif", (28, 28)).original
        assert given.min() == 0 and given.max() == 255
    values = grey.copy()
    values[0, 0], values[0, 1] = np.nan, np.inf
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert read(tmp_path / "a.tif", (28, 28)).preprocessed.any()


@pytest.mark.parametrize("dark", [True, False])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_ink_on_nothing(mode: str, dark: bool, tmp_path: Path) -> None:
    picture = a_digit(6, size=(300, 240), pen=0.08)
    expected = seen(picture, tmp_path)
    layer = Image.new("RGBA", picture.size, (0, 0, 0, 255) if dark else (255, 255, 255, 255))
    layer.putalpha(ImageOps.invert(picture.convert("L")))
    if mode == "P":
        layer = layer.quantize(16)
    elif mode == "LA":
        layer = layer.convert("LA")
    layer.save(tmp_path / "a.png")
    photo = read(tmp_path / "a.png", (28, 28))
    assert photo.original[0, 0].tolist() == [255 * dark] * 3
    assert likeness(photo.preprocessed, expected) > 0.97


@pytest.mark.parametrize("pen", [0.08, 0.2])  # the second is more than a twentieth of all
def test_paper_with_transparent_corners(pen: float, tmp_path: Path) -> None:
    picture = a_digit(6, size=(300, 240), height=0.7, pen=pen, paper=(250, 240, 170))
    expected = seen(picture, tmp_path)
    mask = Image.new("L", picture.size)
    ImageDraw.Draw(mask).rounded_rectangle([0, 0, 299, 239], 40, 255)
    picture.putalpha(mask)
    assert likeness(seen(picture, tmp_path), expected) > 0.98


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_it_is_held_upright(suffix: str, tmp_path: Path) -> None:
    picture = a_digit(7, size=(300, 240), pen=0.08)
    expected = seen(picture, tmp_path)
    turns = {
        3: Image.Transpose.ROTATE_180,
        6: Image.Transpose.ROTATE_90,
        8: Image.Transpose.ROTATE_270,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
    }
    for orientation, turn in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"a.{suffix}"
        picture.transpose(turn).save(path, exif=exif)
        photo = read(path, (28, 28))
        assert photo.original.shape == (240, 300, 3)
        assert likeness(photo.preprocessed, expected) > 0.95


def test_the_thumbnail_is_small(tmp_path: Path) -> None:
    a_digit(7).resize((2000, 1000)).save(tmp_path / "a.jpg")
    assert read(tmp_path / "a.jpg", (28, 28)).original.shape == (256, 512, 3)


def test_the_first_frame(tmp_path: Path) -> None:
    first, second = a_digit(7, size=(200, 200)), a_digit(8, size=(200, 200))
    for name in ("a.gif", "a.tif"):
        first.save(tmp_path / name, save_all=True, append_images=[second])
        image = read(tmp_path / name, (28, 28)).preprocessed
        assert likeness(image, seen(first, tmp_path)) > 0.97


# ---- faults --------------------------------------------------------------------------------------


def fault(path: Path) -> str:
    with pytest.raises(UnreadableImage) as caught:
        read(path, (28, 28))
    return str(caught.value)


def encoded(format: str) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)
    Image.fromarray(noise).save(file, format)
    return file.getvalue()


def test_what_is_no_file(tmp_path: Path) -> None:
    assert fault(tmp_path / "nothing.png") == "there is no such file"
    assert fault(tmp_path) == "it is a folder"
    os.mkfifo(tmp_path / "pipe.png")
    assert fault(tmp_path / "pipe.png") == "it is no file"
    assert fault(tmp_path / ("long" * 200)).startswith("it cannot be read: ")
    assert fault(tmp_path / "nul\0.png").startswith("it cannot be read: ")


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_digit().save(tmp_path / "a.png")

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert fault(tmp_path / "a.png") == "permission denied"


def test_what_the_memory_has_no_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise MemoryError

    a_digit().save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "convert", refuse)
    assert fault(tmp_path / "a.png") == "it is too large to be decoded"


def test_what_is_no_image(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"")
    assert fault(path) == "it is empty"
    for content in (b"not an image", b"%PDF-1.7", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM"):
        path.write_bytes(content)
        what = fault(path)
        assert what == "it is no image that can be read: PNG, JPEG, BMP, GIF, TIFF or WebP"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP"])
def test_what_is_cut_off_or_damaged(format: str, tmp_path: Path) -> None:
    content, path = encoded(format), tmp_path / "a"
    path.write_bytes(content[: len(content) // 2])
    half = fault(path)
    assert half == f"it is cut off after {len(content) // 2:,} bytes, or damaged" or format in (
        "WEBP",
        "TIFF",
    )
    rng = np.random.default_rng(0)
    for k in range(60):  # never anything but UnreadableImage, and no warning
        damaged = bytearray(content[: int(rng.integers(1, len(content)))] if k % 2 else content)
        for at in rng.integers(0, min(len(damaged), 300), 8):
            damaged[at] = int(rng.integers(256))
        path.write_bytes(damaged)
        try:
            read(path, (28, 28), raw=bool(k % 3))
        except UnreadableImage as error:
            assert str(error) and "\n" not in str(error)


@pytest.mark.parametrize(("side", "million"), [(10_100, 103), (15_000, 225)])
def test_what_is_too_large(side: int, million: int, tmp_path: Path) -> None:
    Image.new("1", (side, side)).save(tmp_path / "a.png")
    expected = f"it has {million} million pixels; at most 100 million"
    assert fault(tmp_path / "a.png") == expected


def blank_pages() -> dict[str, Image.Image]:
    rng = np.random.default_rng(0)
    page = Image.new("RGB", (300, 240), (240, 238, 230))
    y, x = np.mgrid[0:1:240j, 0:1:300j]
    return {
        "white": Image.new("L", (300, 240), 255),
        "black": Image.new("L", (28, 28)),
        "a pixel": Image.new("RGB", (1, 1), "red"),
        "a line": Image.new("RGB", (300, 1), "red"),
        "transparent": Image.new("RGBA", (50, 50)),
        "a gradient": Image.fromarray((120 + 60 * x + 40 * y).astype(np.uint8)),
        "noise": Image.fromarray(rng.normal(200, 8, (240, 300)).clip(0, 255).astype(np.uint8)),
        "a photograph": photograph(page, rng),
    }


@pytest.mark.parametrize("name", blank_pages())
def test_what_is_blank(name: str, tmp_path: Path) -> None:
    blank_pages()[name].save(tmp_path / "a.png")
    assert fault(tmp_path / "a.png") == "it is blank, or no ink can be told from its background"
    assert read(tmp_path / "a.png", (28, 28), raw=True).preprocessed.shape == (28, 28)


def test_pillows_warnings_stay_inside(tmp_path: Path) -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0"  # cut off
    a_digit().save(tmp_path / "a.jpg", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(tmp_path / "a.jpg", (28, 28)).preprocessed.any()


# ---- and a network recognises them ---------------------------------------------------------------


def test_a_network_trained_on_mnist_reads_them(mnist: Dataset, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    stack = Stack(lambda: CNN(mnist.shape, 10, channels=(8, 16, 32), hidden=32), [0], cpu)
    run = RunSpec(0, {"lr": 1e-2}, OneCycle())
    for _ in loop.fit(stack, mnist, [run], StackSpec(torch.optim.AdamW, 2, 50)):
        pass
    model = stack.model(0).eval()
    rng = np.random.default_rng(0)
    labels = torch.arange(40) % 10
    drawings = [draw(int(label), rng, size=(320, 260)) for label in labels]
    for pictures in (drawings, [photograph(drawing, rng) for drawing in drawings]):
        images = np.stack([seen(picture, tmp_path) for picture in pictures])
        with torch.no_grad():
            logits = model(mnist.normalise(torch.from_numpy(images)[:, None]))
        assert (logits.argmax(1) == labels).float().mean() >= 0.9


def test_ink_of_one_shade(tmp_path: Path) -> None:
    """To the last bit but one, which left nothing to divide into dark and light."""
    picture = Image.new("RGB", (23, 23), (205, 205, 205))
    line = [(6.9, 4.6), (16.1, 4.6), (9.2, 18.4)]
    ImageDraw.Draw(picture).line(line, fill=(137, 28, 212), width=1)
    image = seen(picture, tmp_path)
    assert image.max() == 255 and max(box(image)) == 20
