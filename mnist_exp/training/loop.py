"""The training loop: `fit()` trains a stack and yields what a record needs.

Nothing here knows where the config came from or where the records go.
"""

import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mnist_exp.data.dataset import Dataset
from mnist_exp.training import metrics
from mnist_exp.training.events import Epoch, Message, Progress, RunSpec, StackSpec
from mnist_exp.training.seeds import image_order, other_images, step_keys
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
    spec: StackSpec,
    *,
    compiled: bool = False,
    state: Mapping[str, Any] | None = None,
) -> Iterator[Progress | Epoch | Message]:
    """Train a stack in place, and yield what a record needs.

    With a validation split the stack holds each run's weights of its best epoch (validation
    accuracy, the earlier of equals) at the end, otherwise those of the last. A run whose loss or
    gradient is not finite stops before that update and keeps its weights, and one with `patience`
    stops where its validation loss has not improved for so many epochs; the others go on without
    them, and faster. A run with an average of its weights (`ema`) is evaluated, chosen and kept
    with it; the hardest images are chosen by the weights that are trained. With `focus`, the later
    epochs see each run's hardest images of the time after the first part, and others drawn anew.

    Args:
        stack: The models, initialised.
        data: The data set, on the device of the stack.
        runs: What differs from run to run; run k trains model k.
        spec: What the runs share.
        compiled: Whether to compile the step.
        state: What an event of an earlier `fit` with the same arguments has given, as its `state`;
            training goes on from there, to the same end.
    """
    loop = LoopState.start(TrainStep(stack, data, runs, spec))
    epochs = spec.epochs
    if state is not None:
        loop.restore(state)
        compiled = state["compiled"]
    while loop.epoch < epochs and len(loop.ended) < len(runs):
        loop.shrink_if_faster(compiled)
        if compiled and loop.step.compiled is None:
            yield from _compile(loop.step)
            compiled = loop.step.compiled is not None
        began = time.perf_counter()
        loop.choose_hardest()
        started = time.perf_counter()
        left = loop.step.sizes.images(loop.epoch + 1) - loop.steps * spec.batch_size
        images = max(1, left)  # not yet seen in this epoch
        trained = yield from _train(loop)
        speed = images / (time.perf_counter() - started)
        values = loop.validate(trained)
        times = {"epoch_seconds": time.perf_counter() - began, "images_per_second": speed}
        yield loop.end_epoch([v | times for v in values], is_last=loop.epoch + 1 == epochs)
    stack.restore(loop.best)


@dataclass
class EarlyStopping:
    """The best validation results of one run so far."""

    accuracy: float = -1.0  # the best
    loss: float = math.inf  # the lowest
    epoch: int = 0  # of the lowest loss

    def update(self, values: Mapping[str, float], epoch: int) -> bool:
        """Take in the metrics of an epoch, and return whether its accuracy is the best so far."""
        if values["val/loss"] < self.loss:
            self.loss, self.epoch = values["val/loss"], epoch
        improved = values["val/accuracy"] > self.accuracy
        self.accuracy = max(self.accuracy, values["val/accuracy"])
        return improved

    def reason_to_stop(self, patience: int | None, epoch: int) -> str:
        """Return why the run is to stop after `epoch`, or ""."""
        if patience is None or epoch - self.epoch < patience:
            return ""
        return f"after epoch {epoch}: val/loss has not improved since epoch {self.epoch}"


@dataclass
class LoopState:
    """The position of training: what `fit` carries from one step, and one epoch, to the next.

    No generator is in here: each draws from nothing but a run's seed, its purpose, and the epoch.
    """

    step: TrainStep
    active: list[int]  # model i of the step belongs to run active[i]
    stopping: list[EarlyStopping]  # one a run
    ended: set[int]  # the runs that have failed or stopped
    best: Tensors  # [all runs, ...]
    sums: metrics.MetricSums  # of the steps that are done of the next epoch
    steps: int = 0  # their number
    failed: dict[int, str] = field(default_factory=dict)  # in them: run -> reason
    epoch: int = 0  # the number of epochs done
    hardest: Tensor | None = None  # bool [K, N], on the CPU; None until they are chosen

    @classmethod
    def start(cls, step: TrainStep) -> "LoopState":
        """Return the state before the first step."""
        size, best = step.stack.size, step.stack.snapshot()
        stopping = [EarlyStopping() for _ in range(size)]
        return cls(step, [*range(size)], stopping, set(), best, metrics.MetricSums.zeros(size))

    def choose_hardest(self) -> None:
        """Choose each run's hardest images before the first epoch that sees them.

        They are those of the greatest loss, by the weights as they are trained (not their average),
        and of equal ones the first.
        """
        step = self.step
        if self.hardest is None and step.sizes.is_focused(self.epoch + 1):
            losses = metrics.image_losses(step.stack, step.data, step.data.train)
            ranked = losses.sort(dim=1, descending=True, stable=True).indices  # [K, N]
            chosen = ranked[:, : step.sizes.hardest]
            self.hardest = torch.zeros_like(losses, dtype=torch.bool).scatter_(1, chosen, True)

    def shrink_if_faster(self, compiled: bool) -> None:
        """Leave the runs that have ended behind at the beginning of an epoch, if that is faster."""
        remaining = [i for i, k in enumerate(self.active) if k not in self.ended]
        size = self.step.stack.size
        if self.steps > 0 or self.step.stacked is None or len(remaining) == size:
            return
        sizes = self.step.sizes
        steps_left = sizes.total_steps - sizes.steps_before(self.epoch + 1)
        if not compiled or (2 * len(remaining) <= size and steps_left >= SHRINK_FROM_STEPS):
            self._shrink(remaining)

    def _shrink(self, indices: Sequence[int]) -> None:
        """Go on with the models at `indices` only, not compiled."""
        self.step, self.active = self.step.select(indices), [self.active[i] for i in indices]
        self.sums = metrics.MetricSums.zeros(len(self.active))
        if self.hardest is not None:
            self.hardest = self.hardest[list(indices)]

    def validate(self, trained: list[dict[str, float]]) -> list[dict[str, float]]:
        """Return the metrics of the active runs with those on the validation split, if any."""
        val = self.step.data.val
        if val is None or self.ended.issuperset(self.active):
            return trained
        logits = metrics.predict(self.step.evaluated_stack(), self.step.data, val)
        return [a | b for a, b in zip(trained, metrics.score(logits, val, "val"), strict=True)]

    def end_epoch(self, values: Sequence[dict[str, float]], is_last: bool) -> Epoch:
        """Take in the metrics of an epoch, one dict an active run, and return its record."""
        epoch, failed, validated = self.epoch + 1, self.failed, self.step.data.val is not None
        live = {k: v for k, v in zip(self.active, values, strict=True) if k not in self.ended}
        improved = set(live)
        if validated:
            improved = {k for k, v in live.items() if self.stopping[k].update(v, epoch)}
        if validated or failed or is_last:
            self._keep_best(improved | set(failed))
        stopped = {}
        if validated and not is_last:
            for k, run in zip(self.active, self.step.runs, strict=True):
                if k in live and (why := self.stopping[k].reason_to_stop(run.patience, epoch)):
                    stopped[k] = why
        self.ended |= set(stopped)
        self.epoch, self.steps, self.failed = epoch, 0, {}
        self.sums = metrics.MetricSums.zeros(len(self.active))
        runs = range(len(self.stopping))
        return Epoch(
            epoch,
            [live.get(k, {}) for k in runs],
            [k in improved for k in runs],
            self.step.evaluated_stack(),
            self.active,
            failed,
            stopped,
            self.state,
        )

    def _keep_best(self, runs: Set[int]) -> None:
        """Write what the evaluated stack holds of `runs` into `best`."""
        chosen = [i for i, k in enumerate(self.active) if k in runs]
        if chosen:
            device = self.step.stack.device
            source = torch.tensor(chosen, device=device)
            target = torch.tensor([self.active[i] for i in chosen], device=device)
            for name, tensor in self.step.evaluated_stack().snapshot().items():
                self.best[name][target] = tensor[source]

    def state(self) -> dict[str, Any]:
        """Return all that training depends on; the keys are a file format."""
        hardest = {} if self.hardest is None else {"hardest": self.hardest}
        return {
            "rows": list(self.active),
            "seen": [asdict(each) for each in self.stopping],
            "ended": sorted(self.ended),
            "best": dict(self.best),
            "epoch": self.epoch,
            "steps": self.steps,
            "sums": self.sums.state(),
            "failed": dict(self.failed),
            "compiled": self.step.compiled is not None,
            "step": self.step.state(),
        } | hardest

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state()` has returned."""
        if len(state["rows"]) < len(self.active):
            self._shrink(state["rows"])
        self.step.restore(state["step"])
        self.stopping = [EarlyStopping(**each) for each in state["seen"]]
        self.ended, self.failed = set(state["ended"]), dict(state["failed"])
        for name, tensor in self.best.items():
            tensor.copy_(state["best"][name])
        self.epoch, self.steps = state["epoch"], state["steps"]
        self.sums = metrics.MetricSums.restored(state["sums"])
        self.hardest = state.get("hardest")


class _EpochPlan(NamedTuple):
    """All that the steps of one epoch are given."""

    order: Tensor  # [K, N], the images in the order of each run, or [1, N]
    keys: Tensor  # [steps, K], of what they draw
    lr: np.ndarray  # [steps, K]
    hyperparameters: Tensors  # [steps, K] each


def _plan(step: TrainStep, epoch: int, hardest: Tensor | None) -> _EpochPlan:
    """Return the plan of `epoch` (1, 2, ...), which depends on seeds and schedules alone.

    With the `hardest` images of each run, bool [K, N], it is a plan for them and a few others.
    """
    sizes, done, device = step.sizes, epoch - 1, step.stack.device
    steps, epochs = sizes.steps(epoch), sizes.epochs
    seeds = [run.seed for run in (step.runs[:1] if step.shared else step.runs)]
    orders = [image_order(seed, done, sizes.count) for seed in seeds]
    if hardest is not None:
        seen_by_run = [
            is_hard.index_fill(0, other_images(seed, done, is_hard, sizes.random), True)
            for seed, is_hard in zip(seeds, hardest, strict=True)
        ]
        # the order of the epoch is kept, so that hard and other images come mixed
        orders = [order[is_seen[order]] for order, is_seen in zip(orders, seen_by_run, strict=True)]
    order = torch.stack(orders)[:, : sizes.images(epoch)]
    keys = torch.stack([step_keys(run.seed, done, steps) for run in step.runs], 1)
    base = np.array([float(defaults["lr"]) for defaults in step.defaults])
    times = [sizes.time(epoch, i) for i in range(steps)]
    factors = [[run.schedule.multiplier(t, epochs) for run in step.runs] for t in times]
    lr = base * np.array(factors)
    numbers = step.hyperparameters(sizes.steps_before(epoch), lr)
    return _EpochPlan(order.to(device), keys.to(device), lr, numbers)


def _train(loop: LoopState) -> Generator[Progress, None, list[dict[str, float]]]:
    """Train the next epoch, or what is left of it; return the metrics of the active runs.

    The runs that diverge are added to `loop.failed` and `loop.ended`. If no run is left, training
    ends before the epoch does.
    """
    step, active, epoch = loop.step, loop.active, loop.epoch + 1
    steps, count = step.sizes.steps(epoch), step.sizes.images(epoch)
    batch_size = step.spec.batch_size
    plan = _plan(step, epoch, loop.hardest)
    sizes = np.minimum(batch_size, count - batch_size * np.arange(steps))[:, None]  # of batches
    for first in range(loop.steps, steps, STEPS_PER_SYNC):
        now = slice(first, first + STEPS_PER_SYNC)  # S steps
        images = plan.order[:, first * batch_size : now.stop * batch_size]  # [K, S * B]
        numbers = {name: values[now] for name, values in plan.hyperparameters.items()}
        losses, correct, finite = step(images, plan.keys[now], numbers)  # [S, K]
        loop.sums.add((losses * sizes[now]).sum(0), correct.sum(0), images.shape[1])
        for row in np.flatnonzero(~finite.all(0)).tolist():
            k, i = active[row], int(np.argmin(finite[:, row]))
            if k not in loop.ended and k not in loop.failed:
                what = "a gradient, or the update that it leads to, is not finite"
                if not np.isfinite(losses[i, row]):
                    what = f"the training loss is {losses[i, row]}"
                loop.failed[k] = (
                    f"diverged: {what} in epoch {epoch}, step {first + i + 1} of {steps}, at a "
                    f"learning rate of {plan.lr[first + i, row]:.4g}"
                )
        loop.steps = first + len(losses)
        yield Progress(
            epoch,
            loop.steps,
            steps,
            step.sizes.time(epoch, loop.steps),
            images.shape[1],
            active,
            losses,
            correct,
            loop.state,
        )
        if loop.failed and loop.ended.union(loop.failed).issuperset(active):
            break
    loop.ended |= set(loop.failed)
    means = zip(loop.sums.means("train"), plan.lr[-1], strict=True)
    return [mean | {"lr": float(rate)} for mean, rate in means]


def _compile(step: TrainStep) -> Iterator[Message]:
    size = f" of a stack of {step.stack.size}" if step.stack.size > 1 else ""
    yield Message(
        f"compiling the training step{size} (once for each shape; cached for later runs)", True
    )
    if problem := step.compile():
        yield Message(f"the step cannot be compiled and runs as it is: {problem}", False)
