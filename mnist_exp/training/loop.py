"""The shared core: evaluation, and `fit()`, which trains a stack and yields records.

Nothing here knows where the config came from or where the records go.
"""

import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnist_exp.data.dataset import Dataset
from mnist_exp.training import metrics
from mnist_exp.training.events import Epoch, Message, Progress, RunSpec
from mnist_exp.training.metrics import MetricSums
from mnist_exp.training.stack import Stack, Tensors
from mnist_exp.training.step import TrainStep

STEPS_PER_SYNC = 32  # the number of steps between two looks at what they have brought
# Runs that have ended leave a compiled stack when it can be halved and so many steps are left: each
# size is compiled anew, and the smaller saves about 0.1 ms a step and model.
SHRINK_FROM_STEPS = 5_000


def fit(
    stack: Stack,
    data: Dataset,
    runs: Sequence[RunSpec],
    optimizer: type[torch.optim.Optimizer],
    *,
    epochs: int,
    batch_size: int,
    compiled: bool = False,
    state: Mapping[str, Any] | None = None,
) -> Iterator[Progress | Epoch | Message]:
    """Trains the stack, in place; run k of `runs` is model k.

    With a validation split the stack holds each run's weights of its best epoch (validation
    accuracy, the earlier of equals) at the end, otherwise those of the last. A run whose loss or
    gradient is not finite stops before that update and keeps its weights, and one with `patience`
    stops where its validation loss has not improved for so many epochs; the others go on without
    them, and faster.

    `state`: what an event of an earlier `fit` with the same arguments has given; training goes on
    from there, to the same end.
    """
    course = _Course.start(TrainStep(stack, data, runs, optimizer, batch_size))
    if state is not None:
        course.restore(state)
        compiled = state["compiled"]
    seen, ended = course.seen, course.ended
    for epoch in range(course.epoch + 1, epochs + 1):
        if len(ended) == len(runs):
            break
        steps_left = (epochs - epoch + 1) * -(-len(data.train) // batch_size)
        remaining = [i for i, k in enumerate(course.rows) if k not in ended]
        if course.steps == 0 and _shrinks(course.step, remaining, steps_left, compiled):
            course.shrink(remaining)
        step, rows = course.step, course.rows
        if compiled and step.compiled is None:
            yield from _compile(step)
            compiled = step.compiled is not None
        began = time.perf_counter()
        untrained = max(1, len(data.train) - course.steps * batch_size)  # images, in this epoch
        means, failed = yield from _train(course, epochs)
        trained = time.perf_counter()
        ended |= set(failed)
        if data.val is not None and not ended.issuperset(rows):
            logits = metrics.predict(step.stack, data, data.val)
            validated = metrics.score(logits, data.val, "val")
            means = [train | val for train, val in zip(means, validated, strict=True)]
        times = {
            "epoch_seconds": time.perf_counter() - began,
            "images_per_second": untrained / (trained - began),
        }
        live = {k: m | times for k, m in zip(rows, means, strict=True) if k not in ended}
        improved = {k for k, m in live.items() if data.val is None or seen[k].improves(m, epoch)}
        if data.val is not None or failed or epoch == epochs:
            _keep(course.best, step.stack, rows, improved | set(failed))
        stopped = {}
        if data.val is not None and epoch < epochs:
            stopped = {k: why for k in live if (why := seen[k].stale(runs[k].patience, epoch))}
        ended |= set(stopped)
        course.end_epoch()
        yield Epoch(
            epoch,
            [live.get(k, {}) for k in range(len(runs))],
            [k in improved for k in range(len(runs))],
            step.stack,
            rows,
            failed,
            stopped,
            course.state,
        )
    stack.restore(course.best)


@dataclass
class _Validation:
    """What validation has said of one run so far."""

    accuracy: float = -1.0  # the best
    loss: float = math.inf  # the lowest
    epoch: int = 0  # of the lowest loss

    def improves(self, metrics: Mapping[str, float], epoch: int) -> bool:
        """Takes an epoch's metrics in. Whether its accuracy is the best so far."""
        if metrics["val/loss"] < self.loss:
            self.loss, self.epoch = metrics["val/loss"], epoch
        better = metrics["val/accuracy"] > self.accuracy
        self.accuracy = max(self.accuracy, metrics["val/accuracy"])
        return better

    def stale(self, patience: int | None, epoch: int) -> str:
        """Why to stop after `epoch`, or ''."""
        if patience is None or epoch - self.epoch < patience:
            return ""
        return f"after epoch {epoch}: val/loss has not improved since epoch {self.epoch}"


@dataclass
class _Course:
    """Where training stands: what `fit` carries from one step, and one epoch, to the next.

    No generator is in here: each draws from nothing but a run's seed, what for, and the epoch.
    """

    step: TrainStep
    rows: list[int]  # row i of the step is run rows[i]
    seen: list[_Validation]  # one a run
    ended: set[int]  # runs that have failed or stopped
    best: Tensors  # [all runs, ...]
    sums: MetricSums  # of the steps that are done of the next epoch
    steps: int = 0  # their number
    failed: dict[int, str] = field(default_factory=dict)  # in them: run -> reason
    epoch: int = 0  # done

    @classmethod
    def start(cls, step: TrainStep) -> "_Course":
        size = step.stack.size
        seen = [_Validation() for _ in range(size)]
        return cls(step, [*range(size)], seen, set(), step.stack.snapshot(), MetricSums(size))

    def end_epoch(self) -> None:
        self.epoch, self.steps, self.failed = self.epoch + 1, 0, {}
        self.sums = MetricSums(len(self.rows))

    def shrink(self, remaining: Sequence[int]) -> None:
        """Goes on with the rows `remaining` only, not compiled."""
        self.step, self.rows = self.step.select(remaining), [self.rows[i] for i in remaining]
        self.sums = MetricSums(len(self.rows))

    def state(self) -> dict[str, Any]:
        return {
            "rows": list(self.rows),
            "seen": [asdict(each) for each in self.seen],
            "ended": sorted(self.ended),
            "best": dict(self.best),
            "epoch": self.epoch,
            "steps": self.steps,
            "sums": self.sums.state(),
            "failed": dict(self.failed),
            "compiled": self.step.compiled is not None,
            "step": self.step.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        if len(state["rows"]) < len(self.rows):
            self.shrink(state["rows"])
        self.step.restore(state["step"])
        self.seen = [_Validation(**each) for each in state["seen"]]
        self.ended, self.failed = set(state["ended"]), dict(state["failed"])
        for name, tensor in self.best.items():
            tensor.copy_(state["best"][name])
        self.epoch, self.steps = state["epoch"], state["steps"]
        self.sums = MetricSums.restored(state["sums"])


def _train(
    course: _Course, epochs: int
) -> Generator[Progress, None, tuple[list[dict[str, float]], dict[int, str]]]:
    """Trains the next epoch, or what is left of it.

    Returns the metrics, row by row, and the runs that diverged, with the reason. Ends early where
    no run is left.
    """
    step, rows, ended, epoch = course.step, course.rows, course.ended, course.epoch + 1
    runs, device = step.runs, step.stack.device
    count, batch_size = len(step.data.train), step.batch_size
    steps = -(-count // batch_size)
    seeds = [run.seed for run in (runs[:1] if step.shared else runs)]
    order = torch.stack([_order(seed, epoch - 1, count) for seed in seeds]).to(device)
    keys = torch.stack([_keys(run.seed, epoch - 1, steps) for run in runs], 1).to(device)
    times = [epoch - 1 + i / steps for i in range(steps)]
    base = np.array([float(d["lr"]) for d in step.defaults])
    lr = np.array([base * [run.schedule.factor(t, epochs) for run in runs] for t in times])
    hyperparameters = step.hyperparameters((epoch - 1) * steps, lr)  # [steps, K] each
    sums, failed = course.sums, course.failed
    sizes = np.minimum(batch_size, count - batch_size * np.arange(steps))[:, None]
    for first in range(course.steps, steps, STEPS_PER_SYNC):
        now = slice(first, first + STEPS_PER_SYNC)
        chosen = order[:, first * batch_size : (first + STEPS_PER_SYNC) * batch_size]  # [K, S * B]
        own = {name: values[now] for name, values in hyperparameters.items()}
        losses, correct, finite = step(chosen, keys[now], own)  # [S, K]
        sums.add((losses * sizes[now]).sum(0), correct.sum(0), chosen.shape[1])
        for row in np.flatnonzero(~finite.all(0)).tolist():
            if (k := rows[row]) not in ended and k not in failed:
                i = int(np.argmin(finite[:, row]))
                failed[k] = (
                    f"diverged: {_culprit(losses[i, row])} in epoch {epoch}, step "
                    f"{first + i + 1} of {steps}, at a learning rate of {lr[first + i, row]:.4g}"
                )
        course.steps = first + len(losses)
        yield Progress(
            epoch, course.steps, steps, chosen.shape[1], rows, losses, correct, course.state
        )
        if failed and all(k in ended or k in failed for k in rows):
            break
    means = zip(sums.means("train"), lr[-1], strict=True)
    return [m | {"lr": float(rate)} for m, rate in means], failed


def _compile(step: TrainStep) -> Iterator[Message]:
    size = f" of a stack of {step.stack.size}" if step.stack.size > 1 else ""
    yield Message(
        f"compiling the training step{size} (once for each shape; cached for later runs)", True
    )
    if problem := step.compile():
        yield Message(f"the step cannot be compiled and runs as it is: {problem}", False)


def _shrinks(step: TrainStep, remaining: Sequence[int], steps: int, compiled: bool) -> bool:
    """Whether to go on without the rows that have ended, `steps` before the end."""
    if step.stacked is None or len(remaining) == step.stack.size:
        return False
    half = 2 * len(remaining) <= step.stack.size
    return not compiled or (half and steps >= SHRINK_FROM_STEPS)


def _keep(best: Tensors, stack: Stack, rows: Sequence[int], runs: Set[int]) -> None:
    """Writes what the stack holds of `runs` into `best` [all runs, ...]; row i is run rows[i]."""
    chosen = [i for i, k in enumerate(rows) if k in runs]
    if chosen:
        own = torch.tensor(chosen, device=stack.device)
        to = torch.tensor([rows[i] for i in chosen], device=stack.device)
        for name, tensor in stack.snapshot().items():
            best[name][to] = tensor[own]


def _draw(seed: int, purpose: int, epoch: int) -> np.random.Generator:
    """A generator that depends on nothing but the run's seed, what for, and the epoch."""
    return np.random.default_rng([seed, purpose, epoch])


def _order(seed: int, epoch: int, count: int) -> Tensor:
    return torch.from_numpy(_draw(seed, 1, epoch).permutation(count))


def _keys(seed: int, epoch: int, steps: int) -> Tensor:
    """Of each step's dropout masks."""
    return torch.from_numpy(_draw(seed, 2, epoch).integers(2**31, size=steps))


def _culprit(loss: float) -> str:
    update = "a gradient, or the update that it leads to, is not finite"
    return update if np.isfinite(loss) else f"the training loss is {loss}"
