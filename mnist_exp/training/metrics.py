"""Evaluation: predictions, metrics as sums over examples (exact for uneven batches), scores."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_exp.data.dataset import DatasetInfo, Split
from mnist_exp.training.stack import Stack
from mnist_exp.training.views import Views

EVALUATION_BATCH = 512  # images at a time; fewer where the models of a stack would need more room


@dataclass
class MetricSums:
    """Loss and correct predictions of K runs, summed over the examples seen."""

    loss: np.ndarray  # float64 [K]
    correct: np.ndarray  # int64 [K]
    seen: int = 0

    @classmethod
    def zeros(cls, size: int) -> "MetricSums":
        """Return the sums of `size` runs before the first example."""
        return cls(np.zeros(size), np.zeros(size, np.int64))

    def add(self, loss: np.ndarray, correct: np.ndarray, seen: int) -> None:
        """Add `seen` examples; `loss` [K] is their sum, not their mean, and so is `correct` [K]."""
        self.loss += loss
        self.correct += correct
        self.seen += seen

    def state(self) -> dict[str, Any]:
        """Return the sums as plain values, exactly."""
        return {
            "seen": self.seen,
            "loss": self.loss.tolist(),
            "correct": self.correct.tolist(),
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> "MetricSums":
        """Return the sums that `state()` was called on."""
        return cls(np.array(state["loss"]), np.array(state["correct"], np.int64), state["seen"])

    def means(self, prefix: str) -> list[dict[str, float]]:
        """Return one dict a run: `prefix/loss` (nats) and `prefix/accuracy` (0 to 1)."""
        return [
            {f"{prefix}/loss": float(loss) / self.seen, f"{prefix}/accuracy": int(n) / self.seen}
            for loss, n in zip(self.loss, self.correct, strict=True)
        ]


def predict(stack: Stack, data: DatasetInfo, split: Split, views: Views | None = None) -> Tensor:
    """Return logits [K, N, classes], on the CPU, in evaluation mode; `views` as for a batch."""
    batches = torch.split(split.images, max(32, min(EVALUATION_BATCH, 2048 // stack.size)))
    return torch.cat([predict_batch(stack, data, images, views) for images in batches], 1)


def predict_batch(
    stack: Stack, data: DatasetInfo, images: Tensor, views: Views | None = None
) -> Tensor:
    """Return logits [K, B, classes] of uint8 images [B, 1, H, W], on the CPU.

    Args:
        stack: K models.
        data: The data set that they were trained on.
        images: The images.
        views: Test-time augmentation: average the probabilities over these views of the images.

    Raises:
        ConfigError: The images are too small for it.
    """
    if views is None:
        return stack.logits(data.normalise(images)).cpu()
    return average([stack.logits(data.normalise(view)).cpu() for view in views.of(images)])


def average(predictions: Sequence[Tensor]) -> Tensor:
    """Return the logarithm of the mean probability of several logits [..., classes], in float64.

    That is logits as good as any, normalised.
    """
    shares = torch.stack([each.double().log_softmax(-1) for each in predictions])
    return shares.logsumexp(0) - math.log(len(predictions))


def image_losses(stack: Stack, data: DatasetInfo, split: Split) -> Tensor:
    """Return the cross-entropy of each image [K, N] (nats), on the CPU, in evaluation mode."""
    losses = []
    # in parts: the logits of all training images would take a gigabyte where a stack is large
    for images, labels in zip(
        split.images.split(EVALUATION_BATCH), split.labels.split(EVALUATION_BATCH), strict=True
    ):
        logits = predict(stack, data, Split(images, labels))  # [K, B, classes]
        repeated = labels.cpu().repeat(len(logits))
        loss = F.cross_entropy(logits.flatten(0, 1), repeated, reduction="none")
        losses.append(loss.view(len(logits), -1))
    return torch.cat(losses, 1)


def score(logits: Tensor, split: Split, prefix: str) -> list[dict[str, float]]:
    """Return the exact loss and accuracy of logits [K, N, classes] over a split, one dict a run."""
    labels = split.labels.cpu()
    losses = [F.cross_entropy(model.double(), labels, reduction="sum") for model in logits]
    correct = (logits.argmax(-1) == labels).sum(1)  # [K, N] -> [K]
    return MetricSums(torch.stack(losses).numpy(), correct.numpy(), len(labels)).means(prefix)


def confusion(true: Tensor, predicted: Tensor, classes: int) -> np.ndarray:
    """Return counts [classes, classes], rows true, columns predicted."""
    cells = torch.bincount(true * classes + predicted, minlength=classes**2)
    return cells.view(classes, classes).cpu().numpy()


@dataclass(frozen=True)
class ClassScore:
    """The scores of one class against all others, from 0 to 1; nan for 0 / 0."""

    precision: float  # the share of this class in what was taken for it
    recall: float  # the share of this class that was taken for it
    f1: float  # the harmonic mean of the two
    images: int  # the number of images of this class


def class_scores(counts: np.ndarray) -> list[ClassScore]:
    """Return the scores of each class from what `confusion` has returned."""
    hits, predicted, images = counts.diagonal(), counts.sum(0), counts.sum(1)
    with np.errstate(invalid="ignore"):
        shares = hits / predicted, hits / images, 2 * hits / (predicted + images)
    columns = (column.tolist() for column in (*shares, images))
    return [ClassScore(*row) for row in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Calibration:
    """The confidence of predictions beside their accuracy, in equally wide bins from 0 to 1.

    The arrays have one entry a bin, nan where it is empty.
    """

    confidence: np.ndarray  # the mean in the bin
    accuracy: np.ndarray
    counts: np.ndarray  # the number of images

    @property
    def error(self) -> float:
        """The expected calibration error: |accuracy - confidence|, averaged over the images."""
        gaps = np.nan_to_num(np.abs(self.accuracy - self.confidence))
        return float(gaps @ self.counts / max(1, self.counts.sum()))


def calibration(confidence: Tensor, correct: Tensor, bins: int = 15) -> Calibration:
    """Return the calibration of N predictions, given their confidence and whether they are right.

    Guo, Pleiss, Sun & Weinberger, "On Calibration of Modern Neural Networks" (2017), whose number
    of bins is the default; a bin holds its upper edge.
    """
    index = (confidence.double() * bins).ceil().long().sub(1).clamp(0, bins - 1)
    counts = torch.bincount(index, minlength=bins)  # [N] -> [bins]
    sums = [torch.bincount(index, weights.double(), bins) for weights in (confidence, correct)]
    means = [(total / counts).numpy() for total in sums]  # 0 / 0 is nan
    return Calibration(means[0], means[1], counts.numpy())
