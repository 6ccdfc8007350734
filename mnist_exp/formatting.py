"""Numbers as text: one place for all tables, figures and messages."""

import math

import numpy as np


def number_or_dash(value: float, spec: str) -> str:
    """Return a number as the format `spec` writes it, or a dash where there is none (nan)."""
    return "-" if math.isnan(value) else f"{value:{spec}}"


def percent(share: float) -> str:
    """Return a share, 0 to 1, in percent with two decimals: "97.31 %"."""
    return f"{100 * share:.2f} %"


def rounded_percent(share: float) -> str:
    """Return a share in percent with one decimal: "97.3%".

    It is "<0.1%", never "0.0%", for more than none, and ">99.9%" for less than all.
    """
    if 0 < share < 0.0005:
        return "<0.1%"
    return ">99.9%" if 0.9995 <= share < 1 else f"{share:.1%}"


def shortest_number(value: float) -> str:
    """Return a number as short as it goes: 0.01, 64, 1e6; rounded only if it has many digits."""
    for number in (value, float(f"{value:.3g}")):
        plain = np.format_float_positional(number, trim="-")
        power = np.format_float_scientific(number, trim="-", exp_digits=1).replace("e+", "e")
        text = plain if len(plain) <= 6 else min(plain, power, key=len)
        if len(text) <= 8:
            break
    return text
