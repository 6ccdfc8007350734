"""Random numbers as a function of counters: uniform, normal, and independent of each other."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from mnist_exp.augmentation.draws import Draws
from mnist_exp.augmentation.pixels import draw_shares, greater_shares
from mnist_exp.augmentation.settings import Augmentation

COUNT = 20_000
ELASTIC = Augmentation(elastic=1.0)


def draws(key: int = 7, settings: Augmentation = ELASTIC) -> Draws:
    """Of the first images, in one step."""
    return Draws.of(settings, torch.full((COUNT,), key), torch.arange(COUNT))


def correlations(columns: Tensor) -> Tensor:
    """Between columns [M, n], off the diagonal, in standard errors."""
    matrix = np.corrcoef(columns.double().numpy().T) - np.eye(columns.shape[1])
    return torch.from_numpy(matrix * len(columns) ** 0.5)


def test_uniform_numbers_are_uniform() -> None:
    for name in ("flip", "shift", "erase", "mixup", "elastic"):
        numbers = draws().uniform(name)
        assert numbers.min() >= 0 and numbers.max() < 1
        assert stats.kstest(numbers.flatten().numpy(), "uniform").pvalue > 1e-4
    symmetric = draws().symmetric("shear")
    torch.testing.assert_close(symmetric, 2 * draws().uniform("shear") - 1)


def test_whole_numbers_are_equally_frequent() -> None:
    first, second = draws().integers("shift", [5, 28])
    for numbers, limit in ((first, 5), (second, 28)):
        assert stats.chisquare(torch.bincount(numbers, minlength=limit)).pvalue > 1e-4
        assert int(numbers.max()) == limit - 1


def test_normal_numbers_are_normal() -> None:
    normal = draws().normal("elastic")
    assert normal.shape == (COUNT, 98) and bool(normal.isfinite().all())
    error = normal.numel() ** -0.5
    assert abs(normal.mean()) < 5 * error
    assert abs(normal.var() - 1) < 5 * 2**0.5 * error
    assert stats.kstest(normal[:2000].flatten().numpy(), "norm").pvalue > 1e-4
    assert correlations(normal[:, ::7]).abs().max() < 5


def test_numbers_are_independent_between_images_steps_and_uses() -> None:
    names = ("flip", "shift", "rotation", "scale", "shear", "erase", "mixup")
    steps = [draws(7), draws(8), draws(123_456_789)]  # keys next to each other too
    uses = torch.cat([step.uniform(name) for step in steps for name in names], 1)
    assert correlations(uses).abs().max() < 5
    one = draws().uniform("rotation")[:, 0]
    neighbours = torch.stack([one.roll(places) for places in (0, 1, 2, 64, 128)], 1)
    assert correlations(neighbours).abs().max() < 5


def test_to_switch_one_on_leaves_the_others_as_they_are() -> None:
    others = draws(settings=Augmentation(mixup=0.2))
    assert torch.equal(others.bits, draws().bits[:, : others.bits.shape[1]])
    assert others.bits.shape[1] == 10


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0, 8.0])
def test_shares_are_those_of_the_beta_distribution(alpha: float) -> None:
    shares = draw_shares(draws(), greater_shares(alpha)).double().numpy()
    assert shares.min() >= 0.5 and shares.max() <= 1
    expected = np.random.default_rng(0).beta(alpha, alpha, 10**6)
    expected = np.maximum(expected, 1 - expected)
    error = expected.std() / COUNT**0.5
    assert abs(shares.mean() - expected.mean()) < 5 * error
    assert shares.std() == pytest.approx(expected.std(), rel=0.03)
    rounded = expected[:COUNT].astype(np.float32)  # many are 1
    assert stats.kstest(shares, rounded).statistic < 0.025


@pytest.mark.parametrize("alpha", [1e-300, 1e-3, 1e4, 1e300])
def test_shares_are_finite_for_every_alpha(alpha: float) -> None:
    shares = greater_shares(alpha)
    assert bool(((shares >= 0.5) & (shares <= 1)).all())
