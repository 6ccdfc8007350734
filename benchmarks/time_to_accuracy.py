"""The seconds from the start of training to its end, of recipes that aim at an accuracy soon.

Beside them, in turns, the network of train_mnist_fast (Oikarinen 2020) in the fastest plain loop,
with the images as tensors in memory, channels last.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import load_mnist
from mnist_exp.config.compose import compose
from mnist_exp.data.dataset import Dataset
from mnist_exp.run.job import CachedLoader, prepare
from mnist_exp.training import loop, metrics
from mnist_exp.training.stack import Stack

SEEDS = 10
RECIPES = ("fast_99", "fast_994")  # in experiments/
PLAIN = "train_mnist_fast's network, a plain loop, 1 epoch"
PLAIN_BATCH, PLAIN_LR = 256, 0.01  # of Adam


@dataclass
class Finished:
    """What the runs of one recipe have reached, one entry a seed."""

    seconds: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)  # on the test set, 0 to 1


def measure(seeds: Sequence[int] = range(SEEDS)) -> dict[str, Finished]:
    """Return what each recipe takes and reaches; the recipes take turns, a seed each."""
    load, everything = CachedLoader(), load_mnist()
    contenders: dict[str, Callable[[int], tuple[float, float]]] = {
        PLAIN: partial(_train_plainly, everything),
        **{f"experiments={name}": partial(_train_recipe, name, load) for name in RECIPES},
    }
    finished = {name: Finished() for name in contenders}
    for train in contenders.values():
        train(len(seeds))  # what the first in a process pays for
    for seed in seeds:
        for name, train in contenders.items():
            seconds, accuracy = train(seed)
            finished[name].seconds.append(seconds)
            finished[name].accuracies.append(accuracy)
    return finished


def _train_recipe(name: str, load: CachedLoader, seed: int) -> tuple[float, float]:
    """Train a recipe, and return the seconds, and the accuracy on the test set."""
    job = prepare(compose([f"experiments={name}", f"seed={seed}", "training.device=cpu"]), load)
    dataset = load(job.config.dataset)
    began = time.perf_counter()
    stack = Stack(job.build, [seed], job.device)
    for _ in loop.fit(stack, dataset, [job.run_spec], job.stack_spec):
        pass
    seconds = time.perf_counter() - began
    (scores,) = metrics.score(metrics.predict(stack, dataset, dataset.test), dataset.test, "test")
    return seconds, scores["test/accuracy"]


def _train_plainly(dataset: Dataset, seed: int) -> tuple[float, float]:
    """Train the plain loop, and return the seconds, and the accuracy on the test set."""
    began = time.perf_counter()
    torch.manual_seed(seed)
    # [B, 1, 28, 28] -> [B, 24, 12, 12] -> [B, 32, 5, 5] -> [B, 10]
    model = nn.Sequential(
        *(nn.Conv2d(1, 24, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(24, 32, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(800, 256), nn.ReLU(), nn.Linear(256, 10)),
    ).to(memory_format=torch.channels_last)
    images, labels = _as_channels_last(dataset, dataset.train.images), dataset.train.labels
    optimizer = torch.optim.Adam(model.parameters(), PLAIN_LR)
    batches = torch.randperm(len(labels)).split(PLAIN_BATCH)
    # as the recipes have it: at one rate to the end, the last few batches would decide
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PLAIN_LR, len(batches))
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - began
    with torch.no_grad():
        predicted = model(_as_channels_last(dataset, dataset.test.images)).argmax(1)
    return seconds, float((predicted == dataset.test.labels).double().mean())


def _as_channels_last(dataset: Dataset, images: Tensor) -> Tensor:
    return dataset.normalise(images).to(memory_format=torch.channels_last)
