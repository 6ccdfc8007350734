"""The random numbers of each image: a function of the step's key, the image, and what they are for.

They come from counters, so what an image gets does not depend on the images, and the runs of a
stack, that come before it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mnist_exp.augmentation.settings import Augmentation
from mnist_exp.random_bits import counter_bits

SALT = 0xA5C1E3D7  # apart from the dropout masks of the same step, which have the same key
CONTROLS = 7  # points along an axis, of an elastic deformation
# What is drawn for an image, and how many numbers. Each has its place whether or not the others are
# on, so that to switch one on leaves the others as they are.
_COUNTS = {
    **{"flip": 1, "shift": 2, "rotation": 1, "scale": 2, "shear": 1, "erase": 2, "mixup": 1},
    "elastic": 2 * CONTROLS**2,  # the last, as it is by far the most
}


class Draws:
    """The random numbers of M images, by what they are for."""

    def __init__(self, bits: Tensor) -> None:
        """Take the bits of each image, int64 [M, numbers], in the order of what they are for."""
        self.bits = bits

    @classmethod
    def of(cls, settings: Augmentation, keys: Tensor, indices: Tensor) -> "Draws":
        """Return the draws of images.

        Args:
            settings: What is to be drawn.
            keys: The key of the step that each image is in, int64 [M].
            indices: The number of each image in the training split, int64 [M].
        """
        unused = 0 if settings.elastic else _COUNTS["elastic"]
        counters = torch.arange(sum(_COUNTS.values()) - unused, device=keys.device)
        images = counter_bits(keys + SALT, indices)
        return cls(counter_bits(images[:, None], counters))

    def uniform(self, *names: str) -> Tensor:
        """Return floats [M, numbers] from 0 to below 1; several names follow each other."""
        return (self._of(*names) >> 8) * 2.0**-24  # as many bits as a float32 has

    def symmetric(self, *names: str) -> Tensor:
        """Return floats [M, numbers] from -1 to below 1; several names follow each other."""
        return self.uniform(*names) * 2 - 1

    def integers(self, name: str, limits: Sequence[int]) -> list[Tensor]:
        """Return whole numbers [M] from 0 to below each of the limits."""
        columns = self._of(name).unbind(1)
        return [bits * limit >> 32 for bits, limit in zip(columns, limits, strict=True)]

    def normal(self, name: str) -> Tensor:
        """Return standard normal floats [M, numbers], of an even number (Box and Muller 1958)."""
        first, second = self.uniform(name).chunk(2, 1)
        radius = (-2 * (1 - first).log()).sqrt()
        angle = 2 * math.pi * second
        return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)

    def _of(self, *names: str) -> Tensor:
        order = list(_COUNTS)
        first = order.index(names[0])
        assert order[first : first + len(names)] == list(names)
        start = sum(_COUNTS[name] for name in order[:first])
        return self.bits[:, start : start + sum(_COUNTS[name] for name in names)]
