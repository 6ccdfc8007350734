"""The number of images and steps of each epoch, which differ from epoch to epoch with focus.

Nothing here needs torch: `mnist-exp status` asks it for the time that is left.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Focus:
    """Training on all images first, and then on the hardest of them and a few others.

    Jiang et al., "Accelerating Deep Learning by Focusing on the Biggest Losers" (2019), with one
    choice of the hardest images in place of one in each batch.
    """

    after: float  # epochs over all images
    hardest: float  # the share of the training images, those with the greatest loss after that
    random: float  # the share of the training images that is drawn from the rest in each epoch

    @property
    def first_epochs(self) -> int:
        """The number of epochs before the hardest images are chosen; the last may be a part."""
        return math.ceil(self.after)

    def passes(self, epochs: int) -> float:
        """Return how often the first `epochs` epochs go through the training split, as in 1.5."""
        focused = max(0, epochs - self.first_epochs)
        return min(epochs, self.after) + focused * (self.hardest + self.random)


@dataclass(frozen=True)
class EpochSizes:
    """The number of images and of steps in each epoch (1, 2, ...) of a run."""

    count: int  # images of the training split
    batch_size: int  # the last batch of an epoch may be smaller
    epochs: int
    focus: Focus | None = None

    @property
    def hardest(self) -> int:
        """The number of the hardest images; 0 without focus."""
        return 0 if self.focus is None else round(self.count * self.focus.hardest)

    @property
    def random(self) -> int:
        """The number of images that are drawn from the rest for an epoch; 0 without focus."""
        share = 0.0 if self.focus is None else self.focus.random
        return min(round(self.count * share), self.count - self.hardest)

    def is_focused(self, epoch: int) -> bool:
        """Return whether an epoch sees the hardest images and a few others only."""
        return self.focus is not None and epoch > self.focus.first_epochs

    def images(self, epoch: int) -> int:
        """Return the number of images that an epoch sees."""
        if self.focus is None or epoch < self.focus.first_epochs:
            return self.count
        if self.is_focused(epoch):
            return self.hardest + self.random
        return round(self.count * (self.focus.after - (epoch - 1)))

    @property
    def lengths(self) -> list[int]:
        """The different numbers of images that an epoch has, in the order in which they come."""
        last = self.epochs if self.focus is None else self.focus.first_epochs
        return list(dict.fromkeys(self.images(epoch) for epoch in (1, last, self.epochs)))

    @property
    def whole_epoch(self) -> int:
        """The number of steps of an epoch that sees all images."""
        return math.ceil(self.count / self.batch_size)

    def steps(self, epoch: int) -> int:
        """Return the number of steps of an epoch."""
        return math.ceil(self.images(epoch) / self.batch_size)

    def steps_before(self, epoch: int) -> int:
        """Return the number of steps of all epochs before this one."""
        if self.focus is None:
            return (epoch - 1) * self.whole_epoch
        first = self.focus.first_epochs
        before = (min(epoch, first) - 1) * self.steps(1)
        if epoch > first:
            before += self.steps(first) + (epoch - 1 - first) * self.steps(first + 1)
        return before

    @property
    def total_steps(self) -> int:
        """The number of steps of the run."""
        return self.steps_before(self.epochs + 1)

    def time(self, epoch: int, step: int) -> float:
        """Return the time after so many steps of an epoch, from 0 to `epochs`.

        Without focus it is counted in epochs; with it every step takes the same time, so that a
        schedule goes on evenly.
        """
        if self.focus is None:
            return epoch - 1 + step / self.steps(epoch)
        return self.epochs * ((self.steps_before(epoch) + step) / self.total_steps)
