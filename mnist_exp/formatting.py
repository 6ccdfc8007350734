"""Numbers and tables as text: one place for all tables, figures and messages."""

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple


class Table(NamedTuple):
    """A table of texts, which a notebook shows as one."""

    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Return the table in GitHub's Markdown; what would end a cell or start HTML is escaped."""

        def line(texts: Sequence[str]) -> str:
            escaped = [re.sub(r"([\\|<])", r"\\\1", " ".join(text.split())) for text in texts]
            return f"| {' | '.join(escaped)} |\n"

        return "".join(map(line, [self.header, ["---"] * len(self.header), *self.rows]))

    def _repr_markdown_(self) -> str:
        return self.markdown()


def is_number(value: Any) -> bool:
    """Return whether a value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def as_typed(value: Any) -> str:
    """Return a value of a config as a person would type it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def printable(text: str) -> str:
    """Return a text without line breaks, and without what moves a terminal's cursor."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def printable_lines(text: str) -> str:
    """Return a text as `printable` does, but with its line breaks."""
    return "\n".join(map(printable, text.split("\n")))


def utc_time(milliseconds: int) -> str:
    """Return a time, in ms since 1970, in ISO 8601 in UTC: 2026-11-27T17:29:34.120+00:00."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds")


def finite(node: Any) -> Any:
    """Return plain values with None in place of numbers that JSON has no word for."""
    if isinstance(node, Mapping):
        return {key: finite(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [finite(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node


def number_or_dash(value: float, spec: str) -> str:
    """Return a number as the format `spec` writes it, or a dash where there is none (nan)."""
    return "-" if math.isnan(value) else f"{value:{spec}}"


def percent(share: float, decimals: int = 2) -> str:
    """Return a share, 0 to 1, in percent: "97.31 %"."""
    return f"{100 * share:.{decimals}f} %"


def rounded_percent(share: float) -> str:
    """Return a share in percent with one decimal: "97.3%".

    It is "<0.1%", never "0.0%", for more than none, and ">99.9%" for less than all.
    """
    if 0 < share < 0.0005:
        return "<0.1%"
    return ">99.9%" if 0.9995 <= share < 1 else f"{share:.1%}"


def shortest_number(value: float) -> str:
    """Return a number as short as it goes: 0.01, 64, 1e6; rounded only if it has many digits."""
    import numpy as np  # for those who draw, not for those who read a command line

    for number in (value, float(f"{value:.3g}")):
        plain = np.format_float_positional(number, trim="-")
        power = np.format_float_scientific(number, trim="-", exp_digits=1).replace("e+", "e")
        text = plain if len(plain) <= 6 else min(plain, power, key=len)
        if len(text) <= 8:
            break
    return text


@dataclass(frozen=True)
class MeanStd:
    """Mean and sample standard deviation (ddof=1; None for n = 1) of n values."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "MeanStd":
        """Return those of one value or more, exactly rounded: in another order they tie."""
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), std, len(values))

    # A mean over seeds has a decimal more than one value: of 10,000 test images, one is 0.01 %.

    def percent(self) -> str:
        """Return the text of shares: "97.314 % ± 0.123 (3)", and "97.31 % (1)" where n = 1."""
        if self.std is None:
            return f"{percent(self.mean)} ({self.n})"
        return f"{percent(self.mean, 3)} ± {100 * self.std:.3f} ({self.n})"

    def loss(self) -> str:
        """Return the text of losses: "0.08123 ± 0.00045 (3)", and "0.0812 (1)" where n = 1."""
        if self.std is None:
            return f"{self.mean:.4f} ({self.n})"
        return f"{self.mean:.5f} ± {self.std:.5f} ({self.n})"


def wilson(correct: int, seen: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of an accuracy, if `correct` of `seen` were right.

    Wilson, "Probable Inference, the Law of Succession, and Statistical Inference" (1927): unlike
    accuracy ± z standard errors, it stays within 0 and 1, and has a width where all are correct.
    (SciPy has it too, and takes a second to import.)
    """
    z2 = statistics.NormalDist().inv_cdf(0.975) ** 2
    middle = (correct + z2 / 2) / (seen + z2)
    half = math.sqrt(z2 * (correct * (seen - correct) / seen + z2 / 4)) / (seen + z2)
    return max(0.0, middle - half), min(1.0, middle + half)


def count_of(number: int, noun: str) -> str:
    """Return a number with its noun: "1 job", "10,000 jobs"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
