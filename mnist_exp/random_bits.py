"""Random bits that are a function of a key and a counter alone.

A generator hands out numbers in an order, so each would depend on who was given numbers before.
"""

from torch import Tensor


def counter_bits(key: Tensor | int, counter: Tensor) -> Tensor:
    """Return 32 bits for each counter, as int64 from 0 to 2**32 - 1.

    The bits come from MurmurHash3's 32-bit finaliser (Appleby 2011), in int64 as torch has no
    unsigned shifts.
    """
    bits = key + counter * 0x85EBCA77
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = bits & 0xFFFFFFFF
        bits = (bits ^ (bits >> shift)) * factor
    bits = bits & 0xFFFFFFFF
    return bits ^ (bits >> 16)
