"""What becomes of images, against slow plain references, for draws that are given."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from mnist_exp.augmentation import pixels
from mnist_exp.augmentation.draws import _COUNTS, Draws
from mnist_exp.augmentation.geometry import SmoothMap, shift_whole_pixels
from mnist_exp.augmentation.settings import Augmentation
from tests.training.helpers import CPU

LEAST, MIDDLE, MOST = 0, 2**31, 2**32 - 1  # bits: the lowest of a range, the middle, the highest
HEIGHT, WIDTH = 9, 12


def images(count: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 1, HEIGHT, WIDTH)
    return torch.randint(1, 256, shape, generator=generator, dtype=torch.uint8)


def given(**bits: Sequence[int]) -> Draws:
    """Of one image: those named, and the middle of every other range."""
    numbers: Mapping[str, Sequence[int]] = bits
    parts = [numbers.get(name, [MIDDLE] * count) for name, count in _COUNTS.items()]
    return Draws(torch.tensor([[*itertools.chain(*parts)]]))


def drawn(count: int) -> Draws:
    return Draws.of(Augmentation(elastic=1.0), torch.full((count,), 3), torch.arange(count))


def moved(settings: Augmentation, draws: Draws, shape: Tensor | None = None) -> np.ndarray:
    image = images() if shape is None else shape
    height, width = image.shape[2:]
    found: np.ndarray = SmoothMap(settings, height, width, CPU)(image, draws)[0, 0].numpy()
    return found


def shifted(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """Pixel by pixel."""
    found = np.zeros_like(image)
    for y in range(HEIGHT):
        for x in range(WIDTH):
            if 0 <= y - down < HEIGHT and 0 <= x - right < WIDTH:
                found[y, x] = image[y - down, x - right]
    return found


@pytest.mark.parametrize("most", [1, 3, 8])
def test_images_are_shifted_by_whole_pixels(most: int) -> None:
    many = images(400)
    found = shift_whole_pixels(many, drawn(400), most)
    assert found.dtype == torch.uint8
    span, seen = range(-most, most + 1), set()
    for image, result in zip(many[:, 0].numpy(), found[:, 0].numpy(), strict=True):
        (place,) = [
            (down, right)
            for down in span
            for right in span
            if np.array_equal(shifted(image, down, right), result)
        ]
        seen.add(place)
    assert {down for down, _ in seen} == {right for _, right in seen} == set(span)


def test_what_moves_nothing_is_the_image() -> None:
    settings = Augmentation(shift=2.5, rotation=90.0, scale=0.5, shear=20.0)
    np.testing.assert_allclose(moved(settings, given()), images()[0, 0], atol=1e-3)


def test_a_quarter_turn_is_a_quarter_turn() -> None:
    square = images()[..., :HEIGHT]
    turned = moved(Augmentation(rotation=90.0), given(rotation=[MOST]), square)
    np.testing.assert_allclose(turned, np.rot90(square[0, 0], -1), atol=1e-2)
    back = moved(Augmentation(rotation=90.0), given(rotation=[LEAST]), square)
    np.testing.assert_allclose(back, np.rot90(square[0, 0]), atol=1e-2)


def test_a_smooth_shift_is_the_shift() -> None:
    """To the right and down by two pixels, and by half of one."""
    settings = Augmentation(shift=2.0)
    image = images()[0, 0].numpy().astype(float)
    found = moved(settings, given(shift=[MOST, MOST]))
    np.testing.assert_allclose(found, shifted(image, 2, 2), atol=1e-3)
    half = moved(Augmentation(shift=0.5), given(shift=[MOST, MIDDLE]))
    np.testing.assert_allclose(half, (image + shifted(image, 0, 1)) / 2, atol=1e-3)


@pytest.mark.parametrize("right", [LEAST, MIDDLE, MOST])
@pytest.mark.parametrize("down", [LEAST, MIDDLE, MOST])
def test_shifts_by_whole_pixels_and_smooth_ones_are_the_same(right: int, down: int) -> None:
    draws = given(shift=[right, down])
    whole = shift_whole_pixels(images(), draws, 2)[0, 0].numpy()
    np.testing.assert_allclose(moved(Augmentation(shift=2.0), draws), whole, atol=1e-3)


@pytest.mark.parametrize("bits", [LEAST, MOST])
def test_scale_and_shear_equal_a_sampling_by_hand(bits: int) -> None:
    sign = 1 if bits == MOST else -1
    image = images()[0, 0].numpy().astype(float)
    wide, slant = 1 + 0.25 * sign, np.tan(np.radians(20 * sign))
    stretched = np.zeros_like(image)
    sheared = np.zeros_like(image)
    for y in range(HEIGHT):
        for x in range(WIDTH):
            middle_x, middle_y = (WIDTH - 1) / 2, (HEIGHT - 1) / 2
            stretched[y, x] = between(image[y], (x - middle_x) / wide + middle_x)
            sheared[y, x] = between(image[y], x - slant * (y - middle_y))
    found = moved(Augmentation(scale=0.25), given(scale=[bits, MIDDLE]))
    np.testing.assert_allclose(found, stretched, atol=1e-2)
    found = moved(Augmentation(shear=20.0), given(shear=[bits]))
    np.testing.assert_allclose(found, sheared, atol=1e-2)


def between(row: np.ndarray, place: float) -> float:
    """The value of a row between two pixels, where 0 lies around it."""
    padded = np.concatenate([np.zeros(20), row, np.zeros(20)])
    return float(np.interp(place + 20, np.arange(len(padded)), padded))


def test_an_elastic_deformation_is_a_cubic_spline_of_normal_displacements() -> None:
    """Of an image whose pixels say where they are, as far as what is sampled is inside."""
    from scipy.interpolate import BSpline

    size, deviation = 40, 0.8
    ramp = torch.arange(size).expand(size, size)
    across = torch.stack([ramp, ramp.T])[:, None].float()  # x, and y
    draws = drawn(1)
    twice = Draws(draws.bits.expand(2, -1))
    found = SmoothMap(Augmentation(elastic=deviation), size, size, CPU)(across, twice)[:, 0].numpy()
    points = deviation * draws.normal("elastic").view(2, 7, 7).numpy()
    basis = BSpline(np.arange(-2.0, 9.0), np.eye(7), 3)  # knots so that point j is at j
    weights = basis(1 + (np.arange(size) + 0.5) * 4 / size)
    expected = weights @ points @ weights.T + across[:, 0].numpy()
    inner = slice(4, -4)
    np.testing.assert_allclose(found[:, inner, inner], expected[:, inner, inner], atol=1e-3)
    assert 0.2 < (found - across[:, 0].numpy())[:, inner, inner].std() < deviation


@pytest.mark.parametrize("probability", [0.25, 1.0])
def test_images_are_mirrored_with_their_probability(probability: float) -> None:
    many = images(2000)
    found = pixels.flip(many, drawn(2000), probability)
    mirrored = (found == many.flip(-1)).flatten(1).all(1)
    same = (found == many).flatten(1).all(1)
    assert torch.equal(mirrored, ~same)
    error = (probability * (1 - probability) / 2000) ** 0.5
    assert abs(mirrored.float().mean() - probability) <= 5 * error


@pytest.mark.parametrize("side", [1, 2, 5, 8])
def test_a_square_is_erased(side: int) -> None:
    """Around a pixel of the image, each as often as another; what lies outside is cut off."""
    many = images(600).float()
    found = pixels.erase(many, drawn(600), side)
    erased = found != many
    assert bool((found[erased] == 0).all()) and bool((many != 0).all())
    rows, columns = erased.any(3)[:, 0], erased.any(2)[:, 0]  # [600, HEIGHT], [600, WIDTH]
    assert torch.equal(erased[:, 0], rows[:, :, None] & columns[:, None])
    for lines, size in ((rows, HEIGHT), (columns, WIDTH)):
        possible = [
            tuple(middle - side // 2 <= line < middle - side // 2 + side for line in range(size))
            for middle in range(size)
        ]
        counts = Counter(tuple(line) for line in lines.tolist())
        assert counts.keys() == set(possible)
        assert chisquare([counts[place] for place in possible]).pvalue > 0.001
