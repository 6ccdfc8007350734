"""What the tests of the core share: small models, a short way to train them, a plain loop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from mnist_exp.augmentation.settings import Augmentation
from mnist_exp.data.dataset import Dataset, Split
from mnist_exp.training import loop
from mnist_exp.training.epochs import Focus
from mnist_exp.training.events import Epoch, Message, Progress, RunSpec, StackSpec
from mnist_exp.training.models import CNN, MLP, ResNet
from mnist_exp.training.schedules import Constant, Schedule
from mnist_exp.training.seeds import image_order
from mnist_exp.training.stack import Batch, Stack

CPU = torch.device("cpu")
SHAPE, CLASSES = (1, 8, 8), 4
BATCH = 32
Build = Callable[[], nn.Module]
MakeDataset = Callable[..., Dataset]
Optimizer = type[torch.optim.Optimizer]


@dataclass
class Trained:
    stack: Stack
    epochs: list[Epoch]
    losses: np.ndarray  # [all steps, K]
    notices: list[str]
    after: list[dict[str, Tensor]]  # the stack's tensors when each epoch was yielded


def fit(
    build: Build,
    data: Dataset,
    runs: Sequence[RunSpec],
    optimizer: Optimizer = SGD,
    *,
    epochs: int = 1,
    batch_size: int = BATCH,
    compiled: bool = False,
    augmentation: Augmentation | None = None,
    decay_norms: bool = True,
    focus: Focus | None = None,
    precision: torch.dtype = torch.float32,
) -> Trained:
    stack = Stack(build, [run.seed for run in runs], CPU, precision)
    trained = Trained(stack, [], np.zeros((0, len(runs))), [], [])
    augmentation = augmentation or Augmentation()
    spec = StackSpec(optimizer, epochs, batch_size, augmentation, decay_norms, focus)
    for record in loop.fit(stack, data, runs, spec, compiled=compiled):
        if isinstance(record, Progress):
            losses = np.full((len(record.losses), len(runs)), np.nan)
            losses[:, record.active] = record.losses
            trained.losses = np.concatenate([trained.losses, losses])
        elif isinstance(record, Message):
            trained.notices.append(record.text)
        else:
            trained.epochs.append(record)
            trained.after.append(stack.snapshot())
    return trained


def run(
    seed: int = 0, schedule: Schedule | None = None, smoothing: float = 0.0, **kw: Any
) -> RunSpec:
    return RunSpec(seed, {"lr": 0.1, **kw}, schedule or Constant(), smoothing)


def plain(
    module: nn.Module,
    data: Dataset,
    run: RunSpec,
    optimizer: Callable[..., torch.optim.Optimizer],
    steps: int,
    *,
    batch_size: int = BATCH,
    schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
    after_step: Callable[[], object] = lambda: None,
) -> list[float]:
    """The same run as anyone would write it; batches are taken in the order of the core's."""
    updates = optimizer([p for p in module.parameters() if p.requires_grad], **run.optimizer)
    scheduler = schedule(updates) if schedule else None
    images = (data.train.images / 255 - data.mean) / data.std
    count = len(data.train)
    losses: list[float] = []
    for epoch in range(steps):
        order = image_order(run.seed, epoch, count)
        for start in range(0, count, batch_size):
            if len(losses) == steps:
                return losses
            chosen = order[start : start + batch_size]
            updates.zero_grad()
            logits = module(images[chosen])
            loss = F.cross_entropy(
                logits, data.train.labels[chosen], label_smoothing=run.label_smoothing
            )
            loss.backward()
            if run.clip_norm is not None:
                nn.utils.clip_grad_norm_(module.parameters(), run.clip_norm)
            updates.step()
            if scheduler is not None:
                scheduler.step()
            losses.append(loss.item())
            after_step()
    return losses


def seeded(build: Build, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def assert_weights(
    stack: Stack, k: int, expected: nn.Module | Stack, rtol: float = 1e-4, atol: float = 1e-5
) -> None:
    """Parameters and buffers of run k are those of `expected` (a stack: its only run)."""
    module = expected if isinstance(expected, nn.Module) else expected.model(0)
    torch.testing.assert_close(
        stack.model(k).state_dict(), dict(module.state_dict()), rtol=rtol, atol=atol
    )


def assert_equals_alone(
    together: Trained, k: int, alone: Trained, rtol: float = 1e-4, atol: float = 1e-5
) -> None:
    """Losses, metrics (what takes time apart), weights and buffers."""
    steps = len(alone.losses)
    np.testing.assert_allclose(together.losses[:steps, k], alone.losses[:, 0], rtol=rtol, atol=atol)
    for ours, its in zip(together.epochs, alone.epochs, strict=False):
        assert ours.improved[k] == its.improved[0]
        assert ours.metrics[k].keys() == its.metrics[0].keys()
        for name, value in its.metrics[0].items():
            if name not in ("epoch_seconds", "images_per_second"):
                assert ours.metrics[k][name] == pytest.approx(value, rel=rtol, abs=atol), name
    assert_weights(together.stack, k, alone.stack, rtol, atol)


def assert_scaled(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Close as measured by a tensor's largest value: what remains where values are huge."""
    assert tensors.keys() == expected.keys()
    for name, t in expected.items():
        scale = t.abs().max().double()
        torch.testing.assert_close(tensors[name] / scale, t / scale, rtol=1e-3, atol=1e-3)


def mlp() -> nn.Module:
    return MLP(SHAPE, CLASSES, hidden=(16, 8))


def dropping_mlp() -> nn.Module:
    return MLP(SHAPE, CLASSES, hidden=(16, 8), dropout=0.2)


def normalised_mlp() -> nn.Module:
    """With batch normalisation, and nothing random."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 12, bias=False),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.Linear(12, CLASSES),
    )


def cnn() -> nn.Module:
    return CNN(SHAPE, CLASSES, channels=(4, 6), hidden=8, dropout=0.0)


def resnet() -> nn.Module:
    return ResNet(SHAPE, CLASSES, width=4)


def dropping_cnn() -> nn.Module:
    return CNN(SHAPE, CLASSES, channels=(4, 6), hidden=8, dropout=0.25)


def indexed(count: int, start: int) -> Split:
    """Images whose first two pixels are their number, counted from `start`."""
    number = torch.arange(start, start + count)
    images = torch.zeros(count, *SHAPE, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = number // 256, number % 256
    return Split(images, number % CLASSES)


def batch(size: int, count: int = 24) -> Batch:
    """Random images, labels, and keys from 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, count, *SHAPE, generator=generator)
    y = torch.randint(CLASSES, (size, count), generator=generator)
    return Batch(x, y, torch.arange(size) + 1, None)


def same_batch(size: int) -> Batch:
    """One batch for all models, and keys from 1."""
    x, y, *_ = batch(1)
    return Batch(x, y, torch.arange(size) + 1, None)
