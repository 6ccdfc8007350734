"""The shared core: the training step, evaluation, and `fit()`, which yields records.

Nothing here knows where the config came from or where the records go.
"""

import logging
import os
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.utils._pytree import tree_map

from mnist_exp.data import Dataset, Split
from mnist_exp.metrics import Sums
from mnist_exp.optim import Schedule, over, rule_for
from mnist_exp.stack import Stack, Tensors

# Steps that are gathered, trained and looked at together. A compiled call costs about 0.2 ms
# whatever it holds, so it holds more than one step; each more makes compiling slower (20 s for 4).
CHUNK = 4
# From here on a compiled step surely repays its compilation, 20 s or more where nothing is cached:
# of the seed recipe, it saves up to 1 ms a step.
COMPILE_FROM_STEPS = 50_000
EVALUATION_BATCH = 512

Slots = dict[str, tuple[Tensor, ...]]  # parameter -> the optimizer's memory, [K, ...] each
Carried = tuple[Tensors, Tensors, Slots, Tensor]  # params, buffers, slots, alive: bool [K]
Trained = tuple[Carried, Tensor, Tensor, Tensor]  # and mean losses, correct, finite: [S, K]


@dataclass(frozen=True)
class Run:
    """What one run of a stack has for itself."""

    seed: int
    optimizer: Mapping[str, Any]  # the arguments of the optimizer class
    schedule: Schedule
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class Progress:
    """Where a running epoch stands."""

    epoch: int  # 1, 2, ...
    step: int  # done in this epoch
    steps: int  # in an epoch
    images: int  # in the newest S batches
    losses: np.ndarray  # [S, K], the mean loss of each of them
    correct: np.ndarray  # [S, K], predictions


@dataclass(frozen=True)
class Epoch:
    """The record of one epoch; lists have one entry a run."""

    epoch: int
    metrics: list[dict[str, float]]  # empty for a run that has failed
    improved: list[bool]  # validation accuracy is the best so far
    failed: dict[int, str] = field(default_factory=dict)  # run -> reason, where it failed just now


@dataclass(frozen=True)
class Notice:
    """Something that a person should know of, and that changes no number."""

    text: str
    compiled: bool  # whether the step is


def fit(
    stack: Stack,
    data: Dataset,
    runs: Sequence[Run],
    optimizer: type[torch.optim.Optimizer],
    *,
    epochs: int,
    batch_size: int,
    compiled: bool = False,
) -> Iterator[Progress | Epoch | Notice]:
    """Trains the stack, in place; run k of `runs` is model k.

    With a validation split the stack holds each run's weights of its best epoch (validation
    accuracy, the earlier of equals) at the end, otherwise those of the last. A run whose loss or
    gradient is not finite stops before that update and keeps its weights; the others go on.
    """
    step = _Step(stack, runs, optimizer)
    if compiled:
        yield Notice(
            "compiling the training step (once for each shape; cached for later runs)", True
        )
        if problem := step.compile(data, batch_size):
            yield Notice(f"the step cannot be compiled and runs as it is: {problem}", False)
    count = len(data.train)
    steps = -(-count // batch_size)
    peaks = np.array([float(d["lr"]) for d in step.defaults])
    ended = np.zeros(stack.size, dtype=bool)
    best_accuracy = np.full(stack.size, -1.0)
    best = stack.snapshot()

    for epoch in range(epochs):
        began = time.perf_counter()
        order = torch.stack([_order(run.seed, epoch, count) for run in runs]).to(stack.device)
        noise = torch.stack([_noise(run.seed, epoch, steps) for run in runs], 1).to(stack.device)
        times = [epoch + i / steps for i in range(steps)]
        lr = np.array([peaks * [r.schedule.factor(t, epochs) for r in runs] for t in times])
        numbers = step.numbers(epoch * steps, lr)  # [steps, K] each
        sums = Sums(stack.size)
        failed: dict[int, str] = {}
        for first in range(0, steps, CHUNK):
            chosen = order[:, first * batch_size : (first + CHUNK) * batch_size]  # [K, S * B]
            x, y = _gather(data, chosen)
            now = slice(first, first + CHUNK)
            todo = range(steps)[now]
            own_numbers = {name: t[now] for name, t in numbers.items()}
            losses, correct, finite = step(x, y, noise[now], own_numbers, batch_size)  # [S, K]
            for own_losses, own_correct, i in zip(losses, correct, todo, strict=True):
                size = min(batch_size, count - i * batch_size)
                sums.add(own_losses * size, own_correct, size)
            for k in np.flatnonzero(~finite.all(0) & ~ended):
                i = int(np.argmin(finite[:, k]))
                failed[int(k)] = (
                    f"diverged: {_culprit(losses[i, k])} in epoch {epoch + 1}, step "
                    f"{first + i + 1} of {steps}, at a learning rate of {lr[first + i, k]:.4g}"
                )
                ended[k] = True
            yield Progress(epoch + 1, todo[-1] + 1, steps, y.shape[1], losses, correct)
            if ended.all():
                yield Epoch(epoch + 1, [{} for _ in runs], [False] * stack.size, failed)
                return
        trained = time.perf_counter()

        metrics = sums.means("train")
        improved = ~ended
        if data.val is not None:
            validated = score(predict(stack, data, data.val), data.val, "val")
            metrics = [own | new for own, new in zip(metrics, validated, strict=True)]
            accuracy = np.array([m["val/accuracy"] for m in metrics])
            improved &= accuracy > best_accuracy
            best_accuracy = np.where(improved, accuracy, best_accuracy)
        if data.val is not None or epoch == epochs - 1:
            best = _chosen(improved | ended, stack.snapshot(), best)
        ended_at = time.perf_counter()
        for own, rate in zip(metrics, lr[-1], strict=True):
            own["lr"] = float(rate)
            own["epoch_seconds"] = ended_at - began
            own["images_per_second"] = count / (trained - began)
        alive = [{} if gone else own for own, gone in zip(metrics, ended, strict=True)]
        yield Epoch(epoch + 1, alive, improved.tolist(), failed)
    stack.restore(best)


def predict(stack: Stack, data: Dataset, split: Split) -> Tensor:
    """Logits [K, N, classes] on the CPU, in evaluation mode."""
    batches = torch.split(split.images, max(32, EVALUATION_BATCH // stack.size))
    return torch.cat([stack.logits(data.normalise(images)).cpu() for images in batches], 1)


def score(logits: Tensor, split: Split, prefix: str) -> list[dict[str, float]]:
    """Exact loss and accuracy over a split, one dict a run. logits: [K, N, classes]."""
    labels = split.labels.cpu()
    sums = Sums(len(logits))
    each = [F.cross_entropy(own.double(), labels, reduction="sum") for own in logits]
    correct = (logits.argmax(-1) == labels).sum(1)
    sums.add(torch.stack(each).numpy(), correct.numpy(), len(labels))
    return sums.means(prefix)


def compiling_pays(steps: int, device: torch.device) -> bool:
    """Whether a run of so many steps is shorter with its step compiled, on a machine that can."""
    return steps >= COMPILE_FROM_STEPS and can_compile(device)


def can_compile(device: torch.device) -> bool:
    """torch.compile needs a C++ compiler for a CPU, and Python's headers for its wrappers."""
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    found = any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++"))
    return device.type in ("cpu", "cuda") and headers and found


class _Step:
    """A few training steps on a stack, and what is carried from one to the next."""

    def __init__(
        self, stack: Stack, runs: Sequence[Run], optimizer: type[torch.optim.Optimizer]
    ) -> None:
        self.stack = stack
        self.alive = torch.ones(stack.size, dtype=torch.bool, device=stack.device)
        smooth = [run.label_smoothing for run in runs]
        self.smooth = torch.tensor(smooth, device=stack.device) if any(smooth) else None
        # torch's optimizers on views of each run's parameters: they check the numbers, know the
        # defaults, and do the updates where there is no rule for a stack
        views = [[nn.Parameter(p[k]) for p in stack.params.values()] for k in range(stack.size)]
        self.plain = [optimizer(v, **run.optimizer) for v, run in zip(views, runs, strict=True)]
        self.defaults = [o.defaults for o in self.plain]
        self.rule = rule_for(optimizer, self.defaults)
        self.slots: Slots = {}
        if self.rule is not None:
            self.slots = {n: self.rule.slots(p) for n, p in stack.params.items()}
        self.compiled: Callable[..., Trained] | None = None

    def numbers(self, done: int, lr: np.ndarray) -> Tensors:
        """What the updates after the first `done` need, at learning rates `lr` [S, K]: [S, K]."""
        steps = done + 1 + np.arange(len(lr))[:, None]
        found = {"lr": lr} if self.rule is None else self.rule.at(steps, lr)
        whole = {name: np.broadcast_to(n, lr.shape).copy() for name, n in found.items()}
        return {
            name: torch.from_numpy(n).float().to(self.stack.device) for name, n in whole.items()
        }

    def __call__(
        self, x: Tensor, y: Tensor, noise: Tensor, numbers: Tensors, batch_size: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x: [K, N, C, H, W], y: [K, N], for S batches of `batch_size` or less; noise and numbers
        [S, K].

        Returns each batch's mean loss, number of correct predictions, and whether loss and
        gradients were finite, [S, K] each.
        """
        whole = x.shape[1] == CHUNK * batch_size
        steps = self.compiled if self.compiled is not None and whole else self._steps
        with torch.random.fork_rng(enabled=self.stack.noisy):
            if self.stack.noisy:  # for random functions that do not follow the keys
                torch.manual_seed(int(noise[0, 0]))
            inputs = self._inputs(x, y, noise, numbers, batch_size)
            carried, losses, correct, finite = steps(*inputs)
        self.stack.params, self.stack.buffers, self.slots, self.alive = carried
        return losses.cpu().numpy(), correct.cpu().numpy(), finite.cpu().numpy()

    def compile(self, data: Dataset, batch_size: int) -> str:
        """Compiles chunks of whole batches, on a trial that changes nothing. Why not, or ''."""
        if self.rule is None:
            return f"there is no stacked rule for {type(self.plain[0]).__name__}"
        if len(data.train) < CHUNK * batch_size:
            return f"an epoch has fewer than {CHUNK} whole batches"
        from torch._dynamo import config as dynamo  # 2 s to import, for those who compile
        from torch._dynamo.exc import TorchDynamoException
        from torch._inductor import config as inductor
        from torch._inductor.exc import InductorError

        # on a machine without a GPU, the CUDA build of torch says so in the middle of the epochs
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        inductor.compile_threads = 1  # its pool of worker processes would double the memory
        dynamo.trace_autograd_ops = True
        runs, device = self.stack.size, self.stack.device
        x, y = _gather(data, torch.arange(CHUNK * batch_size, device=device).expand(runs, -1))
        noise = torch.zeros(CHUNK, runs, dtype=torch.long, device=device)
        numbers = self.numbers(0, np.zeros((CHUNK, runs)))
        compiled = torch.compile(
            self._steps, fullgraph=True, dynamic=False, options={"cpp_wrapper": True}
        )
        try:
            with torch.random.fork_rng():
                compiled(*self._inputs(x, y, noise, numbers, batch_size))
        except (TorchDynamoException, InductorError) as error:
            return str(error).strip().splitlines()[0]
        self.compiled = compiled
        return ""

    def _inputs(
        self, x: Tensor, y: Tensor, noise: Tensor, numbers: Tensors, batch_size: int
    ) -> tuple[Carried, Sequence[Tensor], Sequence[Tensor], Tensor, Tensors]:
        carried = (self.stack.params, self.stack.buffers, self.slots, self.alive)
        xs, ys = torch.split(x, batch_size, 1), torch.split(y, batch_size, 1)
        return carried, xs, ys, noise, numbers

    def _steps(
        self,
        carried: Carried,
        xs: Sequence[Tensor],
        ys: Sequence[Tensor],
        noise: Tensor,
        numbers: Tensors,
    ) -> Trained:
        records = []
        for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
            own = {name: n[i] for name, n in numbers.items()}
            carried, *record = self._step(carried, x, y, noise[i], own)
            records.append(record)
        losses, correct, finite = (torch.stack(r) for r in zip(*records, strict=True))
        return carried, losses, correct, finite

    def _step(
        self, carried: Carried, x: Tensor, y: Tensor, noise: Tensor, numbers: Mapping[str, Tensor]
    ) -> Trained:
        """The training step. x: [K, B, C, H, W], y: [K, B], noise: [K], numbers: [K] each."""
        params, buffers, slots, alive = carried
        grads, new_buffers, loss, correct = self.stack.gradients(
            params, buffers, x, y, noise, self.smooth
        )
        new_params, new_slots = {}, {}
        if self.rule is not None:
            for n, p in params.items():
                h = {name: over(v, p) for name, v in numbers.items()}
                new_params[n], new_slots[n] = self.rule.update(p, grads[n], slots[n], h)
        # a gradient that is not finite shows in what it leads to, and so does an update too large
        results = grads if self.rule is None else new_params
        largest = [vector_norm(t.reshape(len(t), -1), torch.inf, 1) for t in results.values()]
        finite = torch.isfinite(loss) & torch.isfinite(torch.stack(largest).amax(0))
        alive = alive & finite
        if self.rule is None:
            new_params, new_slots = self._plain_update(params, grads, alive, numbers), slots
        new = (new_params, new_buffers, new_slots)
        # a graph cannot look at values; elsewhere the rare case alone pays for the choice
        if torch.compiler.is_compiling() or not bool(alive.all()):
            new = tree_map(
                lambda now, old: old if now is old else torch.where(over(alive, now), now, old),
                new,
                (params, buffers, slots),
            )
        return (*new, alive), loss, correct, finite

    def _plain_update(
        self, params: Tensors, grads: Tensors, alive: Tensor, numbers: Mapping[str, Tensor]
    ) -> Tensors:
        """torch's own optimizers, run by run, in place."""
        for k in alive.nonzero().flatten().tolist():
            for group in self.plain[k].param_groups:
                group["lr"] = float(numbers["lr"][k])
                for view, g in zip(group["params"], grads.values(), strict=True):
                    view.grad = g[k]
            self.plain[k].step()
        return params


def _gather(data: Dataset, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The training images [K, N, C, H, W], normalised, and labels [K, N] at `chosen` [K, N]."""
    flat = chosen.flatten()
    images = data.train.images.index_select(0, flat)
    labels = data.train.labels.index_select(0, flat)
    return data.normalise(images).view(*chosen.shape, *data.shape), labels.view(chosen.shape)


def _draw(seed: int, purpose: int, epoch: int) -> np.random.Generator:
    """A generator that depends on nothing but the run's seed, what for, and the epoch."""
    return np.random.default_rng([seed, purpose, epoch])


def _order(seed: int, epoch: int, count: int) -> Tensor:
    return torch.from_numpy(_draw(seed, 1, epoch).permutation(count))


def _noise(seed: int, epoch: int, steps: int) -> Tensor:
    return torch.from_numpy(_draw(seed, 2, epoch).integers(2**31, size=steps))


def _chosen(mask: np.ndarray, new: Tensors, old: Tensors) -> Tensors:
    """Run by run, `new` where `mask` [K] is set."""
    picked = torch.from_numpy(mask)
    return {n: torch.where(over(picked.to(t.device), t), t, old[n]) for n, t in new.items()}


def _culprit(loss: float) -> str:
    update = "a gradient, or the update that it leads to, is not finite"
    return update if np.isfinite(loss) else f"the training loss is {loss}"
