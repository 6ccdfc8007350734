"""Metrics as sums over examples, divided once, so that uneven batches are exact."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class Sums:
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
    def restored(cls, state: Mapping[str, Any]) -> "Sums":
        sums = cls(len(state["loss"]))
        sums.add(np.array(state["loss"]), np.array(state["correct"], np.int64), state["seen"])
        return sums

    def means(self, prefix: str) -> list[dict[str, float]]:
        """One dict a run: `prefix/loss` (nats) and `prefix/accuracy` (0 to 1)."""
        return [
            {f"{prefix}/loss": float(loss) / self.seen, f"{prefix}/accuracy": int(n) / self.seen}
            for loss, n in zip(self.loss, self.correct, strict=True)
        ]


def confusion(true: Tensor, predicted: Tensor, classes: int) -> np.ndarray:
    """Counts [classes, classes], rows true, columns predicted."""
    cells = torch.bincount(true * classes + predicted, minlength=classes**2)
    return cells.view(classes, classes).cpu().numpy()
