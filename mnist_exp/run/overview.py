"""The overview of a data set: its facts, and a figure of the images that a run begins with."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mnist_exp.config.schema import Config
from mnist_exp.config.validate import likely_mistakes
from mnist_exp.data.dataset import Dataset
from mnist_exp.figures import samples
from mnist_exp.run.build import augmentation_of
from mnist_exp.run.job import check_fits, load_dataset

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetOverview:
    """A data set, its facts as text by their names, and a figure of 30 of its images."""

    dataset: Dataset
    facts: Mapping[str, str]
    figure: Any  # matplotlib's


def overview(config: Config) -> DatasetOverview:
    """Return the overview of a config's data set.

    Raises:
        ConfigError: The data set is at fault, or the augmentation does not fit it.
    """
    dataset, augmentation = load_dataset(config.dataset), augmentation_of(config)
    check_fits(augmentation, dataset)
    for warning in likely_mistakes([config]):
        log.warning(warning)
    channels, height, width = dataset.shape
    images = f"{len(dataset.train):,} training"
    if dataset.val is not None:
        images += f", {len(dataset.val):,} validation"
    facts = {
        "dataset": f"{dataset.name} ({dataset.source})",
        "images": f"{images}, {len(dataset.test):,} test",
        "size": f"{channels} x {height} x {width}, 8 bits a pixel",
        "classes": f"{len(dataset.classes)}: {', '.join(dataset.classes)}",
        "pixels": f"mean {dataset.mean:.4f}, std {dataset.std:.4f} (training images, 0 to 1)",
    }
    if not augmentation.is_on:
        return DatasetOverview(dataset, facts, samples.first_images(dataset))
    facts["augmentation"] = augmentation.describe()
    batch_size = config.training.batch_size
    figure = samples.augmented_images(dataset, augmentation, config.seed, batch_size)
    return DatasetOverview(dataset, facts, figure)
