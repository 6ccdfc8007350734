"""Tests of a difference: what they come to, and where there is none to be made."""

import math

import pytest

from mnist_exp.catalog.significance import McNemar, mcnemar, p_text, paired_test


def test_mcnemar_is_the_exact_binomial_test_of_the_images_that_differ() -> None:
    """Of 10 such images, 9 or more for either one have the chance (10 + 1) * 2 / 2**10."""
    first = [True] * 9 + [False] + [True, False] * 20
    other = [False] * 9 + [True] + [True, False] * 20
    result = mcnemar(first, other)
    assert (result.only_first, result.only_other) == (9, 1)
    assert result.p_value == pytest.approx(22 / 2**10)
    turned = mcnemar(other, first)
    assert (turned.only_first, turned.only_other) == (1, 9)
    assert turned.p_value == result.p_value


def test_mcnemar_of_the_same_images_is_no_test() -> None:
    assert mcnemar([True, False], [True, False]) == McNemar(0, 0, None)
    assert mcnemar([True, False] * 4, [False, True] * 4).p_value == 1


def test_a_paired_test_is_students_over_the_common_seeds() -> None:
    """Differences 1, 2, 3: t = 2 / (1 / sqrt(3)) with 2 degrees of freedom."""
    first = {"0": 10.0, "1": 10.0, "2": 10.0, "3": 77.0}
    other = {"2": 13.0, "1": 12.0, "0": 11.0, "4": 99.0}
    result = paired_test(first, other)
    assert list(result.seeds) == ["0", "1", "2"] and result.difference == pytest.approx(2)
    t = 2 * math.sqrt(3)
    assert result.p_value == pytest.approx(1 - t / math.sqrt(2 + t**2))
    half = 4.302652729911275 / math.sqrt(3)  # the 0.975 quantile of t with 2 degrees of freedom
    assert result.interval == pytest.approx((2 - half, 2 + half))
    assert result.reason == ""


@pytest.mark.parametrize(
    ("first", "other", "difference", "reason"),
    [
        ({}, {"0": 1.0}, None, "do not both have one"),
        ({"1": 0.5}, {"0": 1.0}, None, "no seed in common"),
        ({"0": 0.5, "1": 0.7}, {"0": 0.75}, 0.25, "one seed in common"),
        ({"0": 0.5, "1": 0.7}, {"0": 0.5, "1": 0.7}, 0.0, "the same for every seed"),
        ({"0": 0.1, "1": 0.2}, {"0": 0.3, "1": 0.4}, 0.2, "the same for every seed"),
    ],
)
def test_where_there_is_no_test_it_says_why(
    first: dict[str, float], other: dict[str, float], difference: float | None, reason: str
) -> None:
    result = paired_test(first, other)
    assert result.p_value is None and result.interval is None
    assert result.difference == (None if difference is None else pytest.approx(difference))
    assert reason in result.reason


def test_the_sign_of_a_difference_is_that_of_the_other_one() -> None:
    seeds = {str(seed): seed / 10 for seed in range(4)}
    better = {seed: value + 0.1 + float(seed) / 50 for seed, value in seeds.items()}
    up, down = paired_test(seeds, better), paired_test(better, seeds)
    assert up.difference is not None and down.difference is not None
    assert up.difference == pytest.approx(-down.difference) and up.difference > 0
    assert up.p_value == pytest.approx(down.p_value)


def test_p_values_as_text() -> None:
    assert [p_text(p) for p in (0.031, 1.0, 0.0, 3.1e-85)] == [
        "p = 0.031",
        "p = 1",
        "p < 1e-300",
        "p = 3.1e-85",
    ]
