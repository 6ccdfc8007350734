"""Averages of the weights over the steps: what is evaluated and kept where a run has one."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mnist_exp.training.optimizers import over
from mnist_exp.training.stack import Stack, Tensors


def new_weights(
    horizons: Sequence[float | None], steps: np.ndarray, steps_per_epoch: int
) -> np.ndarray:
    """Return the weight that the newest parameters have in their average, float64 [S, K].

    Polyak & Juditsky, "Acceleration of Stochastic Approximation by Averaging" (1992), whose average
    is over all steps alike; here older ones fade. The average begins short, as in TensorFlow's
    ExponentialMovingAverage, so that the initial weights are soon forgotten.

    Args:
        horizons: Of each run, in epochs; None: the average is the newest parameters.
        steps: The numbers of the steps (1, 2, ...), [S, 1].
        steps_per_epoch: The number of steps in an epoch.
    """
    lengths = [1 if h is None else max(1, h * steps_per_epoch) for h in horizons]
    warm_up = np.array([0 if h is None else 1 for h in horizons]) * 9 / (10 + steps)
    weights: np.ndarray = np.maximum(1 / np.array(lengths), warm_up)
    return weights


def initial_average(stack: Stack) -> Tensors:
    """Return a copy of what can be averaged, [K, ...] each: integer buffers cannot.

    It is in float32 at least, as the small changes of an average are lost in bfloat16.
    """
    tensors = {**stack.params, **stack.buffers}
    return {
        name: t.to(torch.promote_types(t.dtype, torch.float32), copy=True)
        for name, t in tensors.items()
        if t.is_floating_point()
    }


def updated_average(average: Tensors, newest: Tensors, weight: Tensor) -> Tensors:
    """Return the average once `newest`, [K, ...] each, has come in with a weight [K] of each run.

    With a weight of 1 it is equal to `newest`, to the bit.
    """
    return {
        name: torch.lerp(old, newest[name].to(old.dtype), over(weight, old).to(old.dtype))
        for name, old in average.items()
    }
