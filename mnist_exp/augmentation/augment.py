"""The augmentation of a step's images, from pixels to normalised and mixed images.

torchvision's transforms draw one set of parameters a call, which a whole batch would share. Kornia
draws for each image, but from torch's generator in the order of the calls: a run in a stack would
differ from itself alone, and a resumed run from an uninterrupted one.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mnist_exp.augmentation import pixels
from mnist_exp.augmentation.draws import Draws
from mnist_exp.augmentation.geometry import SmoothMap, shift_whole_pixels
from mnist_exp.augmentation.settings import Augmentation
from mnist_exp.data.dataset import DatasetInfo


class Augmented(NamedTuple):
    """Images as the network gets them, [K, N, ...]; K is 1 where all models of a stack see them."""

    x: Tensor  # normalised, [K, N, C, H, W]
    y: Tensor  # the labels, [K, N]; of mixtures, those of the greater shares
    others: Tensor | None = None  # the labels of the smaller shares, [K, N]
    shares: Tensor | None = None  # the greater shares, from 0.5 to 1, [K, N]

    def batches(self, size: int) -> "list[Augmented]":
        """Return batches of so many images; the last may be smaller."""
        parts = zip(*(t.split(size, 1) for t in self if t is not None), strict=True)
        return [Augmented(*part) for part in parts]


class Augmenter:
    """The augmentation of the training images of a data set."""

    def __init__(
        self, settings: Augmentation, data: DatasetInfo, batch_size: int, device: torch.device
    ) -> None:
        """Make the augmentation.

        Args:
            settings: What it changes, and by how much.
            data: What gives the shape of the images, their mean and their standard deviation.
            batch_size: The number of images of a batch, within which images are mixed.
            device: Where the images are.
        """
        self.settings, self.data, self.batch_size = settings, data, batch_size
        self.smooth_map = SmoothMap(settings, *data.shape[1:], device)
        self.quantiles = (
            pixels.greater_shares(settings.mixup).to(device) if settings.mixup else None
        )

    def __call__(self, images: Tensor, labels: Tensor, indices: Tensor, keys: Tensor) -> Augmented:
        """Return the images of S batches, augmented.

        What happens to an image depends on the key of its step and its own number alone; a mixture,
        on the image before it in the batch as well (mixup, Zhang et al. 2018).

        Args:
            images: Those of the training split, uint8 [count, C, H, W].
            labels: Theirs, [count].
            indices: The images of all S batches, [K, N]; the last batch may be smaller.
            keys: The keys of the steps, int64 [S, models]. Where all models see the same images
                (K = 1), those of the first model count.
        """
        settings = self.settings
        flat = indices.flatten()
        size, count = len(indices), indices.shape[1]
        of_images = keys.T[:size, :, None].expand(-1, -1, min(count, self.batch_size)).flatten(1)
        draws = Draws.of(settings, of_images[:, :count].flatten(), flat)
        x = images.index_select(0, flat)
        if settings.flip:
            x = pixels.flip(x, draws, settings.flip)
        if settings.resamples:
            x = self.smooth_map(x, draws)
        elif settings.shift:
            x = shift_whole_pixels(x, draws, int(settings.shift))
        x = self.data.normalise(x)
        if settings.erase:
            x = pixels.erase(x, draws, settings.erase)
        x = x.view(*indices.shape, *self.data.shape)
        y = labels[flat].view(indices.shape)
        if self.quantiles is None:
            return Augmented(x, y)
        shares = pixels.draw_shares(draws, self.quantiles).view(indices.shape)
        before = self._places_before(count, indices.device)
        weights = shares[..., None, None, None]
        mixed = torch.lerp(x.index_select(1, before), x, weights)
        return Augmented(mixed, y, y.index_select(1, before), shares)

    def _places_before(self, count: int, device: torch.device) -> Tensor:
        """Return the place before each of `count` images; before a batch's first, its last."""
        batches = torch.arange(count, device=device).split(self.batch_size)
        return torch.cat([places.roll(1) for places in batches])
