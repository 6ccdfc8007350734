"""Numbers and tables as text."""

import pytest
from scipy.stats import binomtest

from mnist_exp.formatting import Table, wilson


def test_a_table_in_markdown() -> None:
    text = Table(["a|b", "c"], [["x", "<class 'int'>"], ["1\n2", r"\|"]]).markdown()
    assert text.splitlines() == [
        r"| a\|b | c |",
        "| --- | --- |",
        r"| x | \<class 'int'> |",
        r"| 1 2 | \\\| |",
    ]


@pytest.mark.parametrize(
    "correct, seen, low, high",
    [  # Newcombe, "Two-sided confidence intervals for the single proportion" (1998), table I
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson(correct: int, seen: int, low: float, high: float) -> None:
    assert wilson(correct, seen) == pytest.approx((low, high), abs=5e-5)
    assert wilson(seen - correct, seen) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize("seen", [1, 7, 1000, 10_000])
def test_wilson_is_that_of_scipy_and_within_0_and_1(seen: int) -> None:
    for correct in {0, 1, seen // 3, seen - 1, seen}:
        expected = binomtest(correct, seen).proportion_ci(method="wilson")
        low, high = wilson(correct, seen)
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
        assert 0 <= low <= correct / seen <= high <= 1
