"""Test-time augmentation: the views of an image that a model's probabilities are averaged over."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from mnist_exp.errors import ConfigError

# of each view, the (row, column) of the image that its top left corner comes from
SHIFTS = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))


@dataclass(frozen=True)
class Views:
    """An image and its shifts by one pixel, and all of them mirrored where that is asked for."""

    mirrored: bool = False  # for a model that was trained on mirror images

    @property
    def description(self) -> str:
        """The views in words, for the title of a figure or a table."""
        mirrored = " and mirror images" if self.mirrored else ""
        return f"TTA over {len(SHIFTS)} shifts{mirrored}"

    def of(self, images: Tensor) -> Iterator[Tensor]:
        """Yield images [..., H, W], and then shifted by a pixel to the left, right, up and down.

        What comes in at an edge is 0, the background. Raises ConfigError for less than 3 x 3
        pixels.
        """
        height, width = images.shape[-2:]
        if min(height, width) < 3:
            raise ConfigError(
                f"--tta: images of {height} x {width} pixels are too small to be shifted by one; "
                f"they must be 3 x 3 or larger. Leave out --tta"
            )
        padded = F.pad(images, (1, 1, 1, 1))
        for row, column in SHIFTS:
            view = padded[..., 1 + row : 1 + row + height, 1 + column : 1 + column + width]
            yield view
            if self.mirrored:
                yield view.flip(-1)
