"""Metrics as sums over examples, divided once, so that uneven batches are exact."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_exp.data.dataset import Dataset, Split
from mnist_exp.training.stack import Stack

EVALUATION_BATCH = 512  # images at a time; fewer where the models of a stack would need more room


@dataclass
class MetricSums:
    """Loss and correct predictions of K runs, summed over the examples seen."""

    size: int
    seen: int = 0
    loss: np.ndarray = field(init=False)  # float64 [K]
    correct: np.ndarray = field(init=False)  # int64 [K]

    def __post_init__(self) -> None:
        self.loss = np.zeros(self.size)
        self.correct = np.zeros(self.size, dtype=np.int64)

    def add(self, loss: np.ndarray, correct: np.ndarray, seen: int) -> None:
        """`loss` [K]: the sum, not the mean, over `seen` examples."""
        self.loss += loss
        self.correct += correct
        self.seen += seen

    def state(self) -> dict[str, Any]:
        """As plain values, exactly."""
        loss, correct = self.loss.tolist(), self.correct.tolist()
        return {"seen": self.seen, "loss": loss, "correct": correct}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> "MetricSums":
        sums = cls(len(state["loss"]))
        sums.add(np.array(state["loss"]), np.array(state["correct"], np.int64), state["seen"])
        return sums

    def means(self, prefix: str) -> list[dict[str, float]]:
        """One dict a run: `prefix/loss` (nats) and `prefix/accuracy` (0 to 1)."""
        return [
            {f"{prefix}/loss": float(loss) / self.seen, f"{prefix}/accuracy": int(n) / self.seen}
            for loss, n in zip(self.loss, self.correct, strict=True)
        ]


def predict(stack: Stack, data: Dataset, split: Split) -> Tensor:
    """Logits [K, N, classes] on the CPU, in evaluation mode."""
    batches = torch.split(split.images, max(32, min(EVALUATION_BATCH, 2048 // stack.size)))
    return torch.cat([stack.logits(data.normalise(images)).cpu() for images in batches], 1)


def score(logits: Tensor, split: Split, prefix: str) -> list[dict[str, float]]:
    """Exact loss and accuracy over a split, one dict a run. logits: [K, N, classes]."""
    labels = split.labels.cpu()
    sums = MetricSums(len(logits))
    each = [F.cross_entropy(own.double(), labels, reduction="sum") for own in logits]
    correct = (logits.argmax(-1) == labels).sum(1)
    sums.add(torch.stack(each).numpy(), correct.numpy(), len(labels))
    return sums.means(prefix)


def confusion(true: Tensor, predicted: Tensor, classes: int) -> np.ndarray:
    """Counts [classes, classes], rows true, columns predicted."""
    cells = torch.bincount(true * classes + predicted, minlength=classes**2)
    return cells.view(classes, classes).cpu().numpy()


def wilson(correct: int, seen: int, z: float = 1.959964) -> tuple[float, float]:
    """The interval that a share lies in, of which `correct` of `seen` were found; 95 % by default.

    Wilson, "Probable Inference, the Law of Succession, and Statistical Inference" (1927): unlike
    share ± z standard errors, it stays within 0 and 1, and has a width where all are correct.
    """
    share, room = correct / seen, z**2 / seen
    centre = (share + room / 2) / (1 + room)
    half = z / (1 + room) * math.sqrt(share * (1 - share) / seen + room / (4 * seen))
    # at the ends rounding alone would leave 0 or 1 outside
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == seen else centre + half)


@dataclass(frozen=True)
class ClassScore:
    """One class against all others, from 0 to 1; nan where there is nothing to divide by."""

    precision: float  # of what was taken for it, the share that it is
    recall: float  # of what it is, the share that was taken for it
    f1: float  # the harmonic mean of the two
    images: int  # of this class


def class_scores(counts: np.ndarray) -> list[ClassScore]:
    """One a class. counts: [classes, classes], as `confusion` gives it."""
    hits, predicted, images = counts.diagonal(), counts.sum(0), counts.sum(1)
    with np.errstate(invalid="ignore"):
        shares = hits / predicted, hits / images, 2 * hits / (predicted + images)
    columns = (each.tolist() for each in (*shares, images))
    return [ClassScore(*row) for row in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Calibration:
    """How well confidence says how often a prediction is right; arrays have an entry a bin.

    Bins are equally wide, from 0 to 1; nan where one is empty.
    """

    confidence: np.ndarray  # the mean in the bin
    accuracy: np.ndarray
    counts: np.ndarray  # images

    @property
    def error(self) -> float:
        """The expected calibration error: |accuracy - confidence|, averaged over the images."""
        gaps = np.nan_to_num(np.abs(self.accuracy - self.confidence))
        return float(gaps @ self.counts / self.counts.sum())


def calibration(confidence: Tensor, correct: Tensor, bins: int = 15) -> Calibration:
    """confidence: [N], of each prediction, 0 to 1; correct: [N], whether it is right.

    Guo, Pleiss, Sun & Weinberger, "On Calibration of Modern Neural Networks" (2017), whose number
    of bins is the default; a bin holds its upper edge.
    """
    own = confidence.double()
    place = (own * bins).ceil().long().sub(1).clamp(0, bins - 1)
    counts = torch.bincount(place, minlength=bins)
    sums = [torch.bincount(place, weights.double(), bins) for weights in (own, correct)]
    means = [(each / counts).numpy() for each in sums]  # 0 / 0 is nan
    return Calibration(means[0], means[1], counts.numpy())
