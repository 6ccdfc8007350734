"""Random bits by key and counter."""

import torch

from mnist_exp.random_bits import counter_bits


def murmur(number: int) -> int:
    """MurmurHash3's finaliser, as its author wrote it for unsigned numbers of 32 bits."""
    number = (number ^ number >> 16) * 0x85EBCA6B % 2**32
    number = (number ^ number >> 13) * 0xC2B2AE35 % 2**32
    return number ^ number >> 16


def test_bits_are_those_of_murmur_hash() -> None:
    """Which the masks of dropout on record were drawn by."""
    for key, counter in ((0, 0), (2**31 - 1, 3), (12, 10**6)):
        expected = murmur((key + counter * 0x85EBCA77) % 2**32)
        assert counter_bits(key, torch.tensor(counter)).item() == expected
