"""The draws of a run from its seed: the order of its images, and the keys of its steps.

A generator depends on nothing but the seed, its purpose, and the epoch.
"""

import math

import numpy as np
import torch
from torch import Tensor

from mnist_exp.augmentation.augment import Augmented, Augmenter
from mnist_exp.augmentation.settings import Augmentation
from mnist_exp.data.dataset import Dataset

IMAGE_ORDER, STEP_KEYS, OTHER_IMAGES = 1, 2, 3  # purposes; records depend on these numbers


def image_order(seed: int, epoch: int, count: int) -> Tensor:
    """Return the order of the training images in an epoch (from 0), [count]."""
    return torch.from_numpy(np.random.default_rng([seed, IMAGE_ORDER, epoch]).permutation(count))


def step_keys(seed: int, epoch: int, steps: int) -> Tensor:
    """Return the keys of augmentation and dropout masks in an epoch (from 0), [steps]."""
    generator = np.random.default_rng([seed, STEP_KEYS, epoch])
    return torch.from_numpy(generator.integers(2**31, size=steps))


def other_images(seed: int, epoch: int, hardest: Tensor, count: int) -> Tensor:
    """Return the images that an epoch (from 0) sees beside the hardest (bool [N]), [count]."""
    generator = np.random.default_rng([seed, OTHER_IMAGES, epoch])
    drawn = torch.from_numpy(generator.permutation(len(hardest)))
    return drawn[~hardest[drawn]][:count]


def first_augmented(
    data: Dataset, augmentation: Augmentation, seed: int, batch_size: int, count: int
) -> Augmented:
    """Return the first `count` images of epoch 1, [1, count, ...], as a run of a seed gets them."""
    order = image_order(seed, 0, len(data.train))
    steps = math.ceil(min(count, len(order)) / batch_size)
    indices = order[: steps * batch_size]  # whole batches, as an image is mixed with one of them
    keys = step_keys(seed, 0, steps)
    device = data.train.images.device
    augmenter = Augmenter(augmentation, data, batch_size, device)
    numbers = indices[None].to(device), keys[:, None].to(device)
    return augmenter(data.train.images, data.train.labels, *numbers).batches(count)[0]
