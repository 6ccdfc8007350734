"""Learning rate schedules: the rate over a run, as a factor of `optimizer.lr`."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from mnist_exp.formatting import is_number


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """The learning rate over a run, as a factor of `optimizer.lr`.

    It rises linearly over `warmup_epochs` (fractions allowed), and follows `after_warmup` over the
    rest of the run.
    """

    warmup_epochs: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (is_number(value) and math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number of 0 or more, got {value!r}")

    def multiplier(self, epoch: float, epochs: int) -> float:
        """Return the factor at time `epoch` (0 at the first step; fractional) of `epochs`."""
        if epoch < self.warmup_epochs:
            # one hundredth to begin with: a first step of zero would be wasted
            return 0.01 + 0.99 * (epoch / self.warmup_epochs)
        return self.after_warmup(epoch - self.warmup_epochs, max(epochs - self.warmup_epochs, 1e-9))

    @abstractmethod
    def after_warmup(self, epoch: float, epochs: float) -> float:
        """Return the factor after the warm-up, with time counted from its end."""


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The same rate throughout."""

    def after_warmup(self, epoch: float, epochs: float) -> float:
        """Return 1."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Half a cosine from 1 down to `final` (Loshchilov & Hutter 2017, without restarts)."""

    final: float = 0.0

    def after_warmup(self, epoch: float, epochs: float) -> float:
        """Return the factor on the cosine."""
        return _cosine(1.0, self.final, epoch / epochs)


@dataclass(frozen=True, kw_only=True)
class Step(Schedule):
    """A rate that is multiplied by `gamma` after every `every_epochs`."""

    every_epochs: float = 30.0
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every_epochs == 0:
            raise ValueError("every_epochs must be more than 0, got 0")

    def after_warmup(self, epoch: float, epochs: float) -> float:
        """Return the factor after the steps down so far."""
        # a step is a fraction of an epoch: 0.3 / 0.1 is a little less than 3
        steps = math.floor(epoch / self.every_epochs + 1e-9)
        try:
            return float(self.gamma**steps)
        except OverflowError:
            return math.inf  # the run diverges, and says so


@dataclass(frozen=True, kw_only=True)
class OneCycle(Schedule):
    """A rise along a cosine, and a fall along another to nearly nothing (Smith & Topin 2018).

    `optimizer.lr` is the peak. The rise takes `warmup_epochs`, or `rise_share` of the run where
    that is 0; it begins at peak / `start_divisor`, and the fall ends at
    peak / (`start_divisor` * `end_divisor`). The momentum stays as it is.
    """

    rise_share: float = 0.3
    start_divisor: float = 25.0
    end_divisor: float = 1e4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rise_share < 1:
            raise ValueError(f"rise_share must be between 0 and 1, got {self.rise_share}")
        if min(self.start_divisor, self.end_divisor) < 1:
            raise ValueError("start_divisor and end_divisor must be 1 or more")

    def multiplier(self, epoch: float, epochs: int) -> float:
        """Return the factor at time `epoch` of `epochs`, as every schedule does."""
        top = self.warmup_epochs or self.rise_share * epochs
        if epoch < top:
            return _cosine(1 / self.start_divisor, 1.0, epoch / top)
        return self.after_warmup(epoch - top, max(epochs - top, 1e-9))

    def after_warmup(self, epoch: float, epochs: float) -> float:
        """Return the factor on the way down."""
        return _cosine(1.0, 1 / (self.start_divisor * self.end_divisor), epoch / epochs)


def _cosine(start: float, end: float, share: float) -> float:
    """Return the value at a share (0 to 1) of half a cosine from `start` to `end`."""
    return end + (start - end) * (1 + math.cos(math.pi * min(share, 1.0))) / 2
