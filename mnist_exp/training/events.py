"""The input of `fit()`, RunSpec and StackSpec, and its output: Progress, Epoch, Message."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mnist_exp.augmentation.settings import Augmentation
from mnist_exp.training.epochs import EpochSizes, Focus
from mnist_exp.training.schedules import Schedule
from mnist_exp.training.stack import Stack

# Called at once, it returns all that the next step depends on, as tensors and plain values, and
# `fit` goes on from it, bit for bit. The tensors are those that training goes on with, no copies.
State = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class RunSpec:
    """The part of a run's settings that may differ from run to run within a stack."""

    seed: int
    optimizer: Mapping[str, Any]  # the arguments of the optimizer class
    schedule: Schedule
    label_smoothing: float = 0.0
    patience: int | None = None  # epochs without a better validation loss after which it stops
    clip_norm: float | None = None  # the greatest L2 norm of its whole gradient
    ema: float | None = None  # the horizon of the average of its weights, in epochs


@dataclass(frozen=True)
class StackSpec:
    """The part of the settings that all runs of a stack share."""

    optimizer: type[torch.optim.Optimizer]
    epochs: int
    batch_size: int  # the last of an epoch may be smaller
    augmentation: Augmentation = field(default_factory=Augmentation)  # of the training images
    decay_norms: bool = True  # whether weight decay also takes parameters of one dimension
    focus: Focus | None = None  # None: every epoch sees all images

    def epoch_sizes(self, images: int) -> EpochSizes:
        """Return the sizes of the epochs on so many training images."""
        return EpochSizes(images, self.batch_size, self.epochs, self.focus)


@dataclass(frozen=True)
class Progress:
    """The position within a running epoch, and what its newest S steps have brought."""

    epoch: int  # 1, 2, ...
    step: int  # the number of steps done in this epoch
    steps: int  # the number of steps in this epoch
    time: float  # of training, as schedules count it: from 0 to the number of epochs
    images: int  # the number of images in the newest S batches
    active: Sequence[int]  # the K runs that are still trained
    losses: np.ndarray  # [S, K], the mean loss of each batch
    correct: np.ndarray  # [S, K], the number of correct predictions in each batch
    state: State = field(repr=False)


@dataclass(frozen=True)
class Epoch:
    """The record of one epoch; its lists have one entry for each run that `fit` began with."""

    epoch: int
    metrics: list[dict[str, float]]  # empty for a run that has failed or stopped before
    improved: list[bool]  # whether the validation accuracy is the best so far
    stack: Stack  # as the epoch has left it, with averaged weights where there are any
    active: Sequence[int]  # model i of the stack belongs to run active[i]
    failed: dict[int, str] = field(default_factory=dict)  # run -> reason, if it has just failed
    stopped: dict[int, str] = field(default_factory=dict)  # run -> reason, if patience ended it
    state: State = field(default=dict, repr=False)

    def model(self, k: int) -> Stack:
        """Return the model of run `k`, as it is after this epoch, as a stack of one."""
        return self.stack.select([self.active.index(k)])


@dataclass(frozen=True)
class Message:
    """Something that a person should know of, and that changes no number."""

    text: str
    compiled: bool  # whether the step is compiled
