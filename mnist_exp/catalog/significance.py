"""Is a difference more than chance? Tests of two runs on the same images, or on the same seeds.

SciPy takes a second to import: it is imported where there is something to test.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class McNemar:
    """McNemar's exact test of two classifiers on the same images."""

    only_first: int  # images that the first alone has right
    only_other: int
    p_value: float | None  # two-sided; None where no image tells them apart


def mcnemar(first: Sequence[bool], other: Sequence[bool]) -> McNemar:
    """Return McNemar's exact test of which images two classifiers have right.

    McNemar, "Note on the sampling error of the difference between correlated proportions or
    percentages" (1947): where both are equally good, an image that one alone has right is that
    one's or the other's with equal chance.
    """
    only_first = sum(a and not b for a, b in zip(first, other, strict=True))
    only_other = sum(b and not a for a, b in zip(first, other, strict=True))
    if only_first + only_other == 0:
        return McNemar(0, 0, None)
    from scipy.stats import binomtest

    p_value = float(binomtest(only_first, only_first + only_other).pvalue)
    return McNemar(only_first, only_other, p_value)


@dataclass(frozen=True)
class PairedTest:
    """A paired t-test of the other's values against the first's, over the seeds of both."""

    seeds: Sequence[str]  # that both have
    difference: float | None  # the mean over the seeds of other minus first; None without seeds
    interval: tuple[float, float] | None  # 95 %, of the difference
    p_value: float | None  # two-sided
    reason: str = ""  # why there is no test


def paired_test(first: Mapping[str, float], other: Mapping[str, float]) -> PairedTest:
    """Return the paired t-test of values by seed; without a p-value where it cannot be made."""
    if not first or not other:
        return PairedTest((), None, None, None, "they do not both have one")
    seeds = [seed for seed in first if seed in other]
    differences = [other[seed] - first[seed] for seed in seeds]
    if not seeds:
        return PairedTest(seeds, None, None, None, "they have no seed in common")
    mean = math.fsum(differences) / len(seeds)
    if len(seeds) < 2:
        return PairedTest(seeds, mean, None, None, "one seed in common; a test needs two or more")
    spread = max(differences) - min(differences)
    if spread <= 1e-12:  # accuracies are exact to less than that
        return PairedTest(seeds, mean, None, None, "the difference is the same for every seed")
    from scipy.stats import ttest_rel

    result = ttest_rel([other[seed] for seed in seeds], [first[seed] for seed in seeds])
    low, high = result.confidence_interval(0.95)
    return PairedTest(seeds, mean, (float(low), float(high)), float(result.pvalue))


def p_text(p_value: float) -> str:
    """Return a p-value as text: "p = 0.031", "p < 1e-300"."""
    return "p < 1e-300" if p_value < 1e-300 else f"p = {p_value:.2g}"
