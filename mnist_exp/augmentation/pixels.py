"""Changes of pixels in their places: mirroring, erasing, shares of a mixture."""

import numpy as np
import torch
from torch import Tensor

from mnist_exp.augmentation.draws import Draws

SHARES = 4096  # the number of quantiles that stand for a distribution


def flip(images: Tensor, draws: Draws, probability: float) -> Tensor:
    """Return images [M, C, H, W], mirrored from left to right with a probability."""
    chosen = draws.uniform("flip") < probability  # [M, 1]
    return torch.where(chosen[:, :, None, None], images.flip(-1), images)


def erase(images: Tensor, draws: Draws, side: int) -> Tensor:
    """Return normalised images [M, C, H, W] with a square set to the mean, which is 0.

    Its middle is anywhere in the image, so that it may reach over the edge: Cutout (DeVries and
    Taylor 2017).
    """
    inside = []
    for size, middle in zip(
        images.shape[2:], draws.integers("erase", images.shape[2:]), strict=True
    ):
        place = torch.arange(size, device=images.device) - middle[:, None] + side // 2  # [M, size]
        inside.append(((place >= 0) & (place < side)).float())
    rows, columns = inside
    kept = 1 - rows[:, :, None] * columns[:, None]  # [M, H, W]
    return images * kept[:, None]  # which takes a third of the time of masked_fill on a CPU


def greater_shares(alpha: float) -> Tensor:
    """Return the quantiles of max(s, 1 - s) for s of the distribution Beta(alpha, alpha)."""
    from scipy.special import betaincinv  # 0.1 s to import, for those who mix

    probabilities = (1 + (np.arange(SHARES) + 0.5) / SHARES) / 2  # the upper half of s
    return torch.from_numpy(betaincinv(alpha, alpha, probabilities)).float()


def draw_shares(draws: Draws, quantiles: Tensor) -> Tensor:
    """Return the share of each image in its mixture, [M]."""
    (places,) = draws.integers("mixup", [len(quantiles)])
    return quantiles.index_select(0, places)
