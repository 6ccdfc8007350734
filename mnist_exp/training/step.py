"""The training step on a stack: gather, forward, backward, update; as it is, or compiled.

What is carried from step to step is the step's own TrainState; everything else comes in with a
call.
"""

import functools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mnist_exp.augmentation.augment import Augmented, Augmenter
from mnist_exp.data.dataset import Dataset
from mnist_exp.errors import first_line
from mnist_exp.training.averaging import initial_average, new_weights, updated_average
from mnist_exp.training.compile import compile_in_place
from mnist_exp.training.events import RunSpec, StackSpec
from mnist_exp.training.optimizers import (
    OptimizerState,
    clipped,
    over,
    stacked_optimizer,
    torch_optimizer,
)
from mnist_exp.training.stack import Batch, Stack, Tensors
from mnist_exp.training.trace import Call, trace

log = logging.getLogger(__name__)

# The number of steps that a call takes together. A compiled call costs about 0.1 ms whatever it
# holds, a third of a single seed MLP's step, so there it holds four; each more makes compiling
# slower.
STEPS_PER_CALL = 4


class TrainState(NamedTuple):
    """All that one step hands to the next; every tensor is [K, ...]."""

    params: Tensors
    buffers: Tensors
    optimizer: dict[str, OptimizerState]  # by the name of the parameter
    average: Tensors  # of parameters and buffers; empty where no run has one
    alive: Tensor  # bool [K], False for a run that has diverged

    def tensors(self) -> list[Tensor]:
        """Return all tensors in a fixed order, `alive` last; checkpoints rely on it."""
        optimizer = [t for state in self.optimizer.values() for t in state]
        tensors = [*self.params.values(), *self.buffers.values(), *optimizer]
        return [*tensors, *self.average.values(), self.alive]

    def with_tensors(self, tensors: Iterable[Tensor]) -> "TrainState":
        """Return a state of this form that holds `tensors`, in the order of `tensors()`."""
        rest = iter(tensors)
        return TrainState(
            {name: next(rest) for name in self.params},
            {name: next(rest) for name in self.buffers},
            {n: tuple(next(rest) for _ in state) for n, state in self.optimizer.items()},
            {name: next(rest) for name in self.average},
            next(rest),
        )


# the state after a step, and its mean loss, correct predictions, finite: [K]
StepResult = tuple[TrainState, Tensor, Tensor, Tensor]


class TrainStep:
    """A few training steps on a stack, and the state that one hands to the next."""

    def __init__(
        self,
        stack: Stack,
        data: Dataset,
        runs: Sequence[RunSpec],
        spec: StackSpec,
    ) -> None:
        self.stack, self.data, self.runs, self.spec = stack, data, runs, spec
        self.sizes = spec.epoch_sizes(len(data.train))
        # runs of one seed see the same images in the same order, unless each has hardest images of
        # its own: they are gathered once for all
        self.shared = len({run.seed for run in runs}) == 1 and (
            spec.focus is None or stack.size == 1
        )
        self.augmenter: Augmenter | None = None
        if spec.augmentation.is_on:
            self.augmenter = Augmenter(spec.augmentation, data, spec.batch_size, stack.device)
        on_cpu = stack.device.type == "cpu"
        self.steps_per_call = max(1, STEPS_PER_CALL // stack.size) if on_cpu else STEPS_PER_CALL
        self.alive = torch.ones(stack.size, dtype=torch.bool, device=stack.device)
        smoothing = torch.tensor([run.label_smoothing for run in runs], device=stack.device)
        self.smoothing = smoothing if smoothing.any() else None
        limits = [math.inf if run.clip_norm is None else run.clip_norm for run in runs]
        is_limited = min(limits) < math.inf
        self.clip_norm = torch.tensor(limits, device=stack.device) if is_limited else None
        self.average = initial_average(stack) if any(run.ema for run in runs) else {}
        # torch's optimizers on views of each run's parameters: they check the numbers, know the
        # defaults, and do the updates where there is no stacked optimizer
        self.views = [
            [nn.Parameter(p[k]) for p in stack.params.values()] for k in range(stack.size)
        ]
        self.plain = [
            torch_optimizer(spec.optimizer, views, run.optimizer, spec.decay_norms)
            for views, run in zip(self.views, runs, strict=True)
        ]
        self.defaults = [o.defaults for o in self.plain]
        self.stacked = stacked_optimizer(spec.optimizer, self.defaults)
        self.optimizer_state: dict[str, OptimizerState] = {}
        if self.stacked is not None:
            self.optimizer_state = {
                n: self.stacked.initial_state(p) for n, p in stack.params.items()
            }
        self.compiled: Call | None = None
        self.is_traceable = stack.is_traceable and self.stacked is not None
        self.traces: dict[bool, Call] = {}  # of a call of whole batches, by whether it is guarded

    def select(self, indices: Sequence[int]) -> "TrainStep":
        """Return the step for some of the stack's models only, as they are now; not compiled."""
        assert self.stacked is not None, "torch's own optimizers hold on to their parameters"
        runs = [self.runs[k] for k in indices]
        stack = self.stack.select(indices)
        selected = TrainStep(stack, self.data, runs, self.spec)
        index = torch.tensor(indices, device=self.stack.device)
        selected.stacked, selected.alive = self.stacked.select(indices), self.alive[index]
        selected.optimizer_state = {
            name: tuple(stack.laid_out(t[index]) for t in state)
            for name, state in self.optimizer_state.items()
        }
        selected.average = {n: stack.laid_out(self.average[n][index]) for n in selected.average}
        return selected

    @functools.cached_property
    def hyperparameter_names(self) -> list[str]:
        """The names of the hyperparameters, in the order in which calls are given them.

        They are asked of the optimizer that the step has in the end: that of a larger stack, which
        `select` gives it, may read more.
        """
        return list(self.hyperparameters(0, np.zeros((1, self.stack.size))))

    def evaluated_stack(self) -> Stack:
        """Return the stack as it is evaluated and kept: with averaged weights, if there are any."""
        return self.stack.with_tensors(self.average) if self.average else self.stack

    def state(self) -> dict[str, Any]:
        """Return what the next step depends on: the train state, or that of torch's optimizers."""
        return {
            "carried": self._train_state().tensors(),
            "plain": [] if self.stacked else [o.state_dict() for o in self.plain],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Copy what `state()` of a step of the same form has returned into the tensors at hand."""
        for tensor, saved in zip(self._train_state().tensors(), state["carried"], strict=True):
            tensor.copy_(saved)
        for optimizer, saved in zip(self.plain, state["plain"], strict=False):
            optimizer.load_state_dict(saved)

    def hyperparameters(self, done: int, lr: np.ndarray) -> Tensors:
        """Return what the updates after the first `done` need at learning rates `lr` [S, K]."""
        steps = done + 1 + np.arange(len(lr))[:, None]
        values = {"lr": lr} if self.stacked is None else self.stacked.hyperparameters(steps, lr)
        if self.average:
            horizons = [run.ema for run in self.runs]
            values["new_weight"] = new_weights(horizons, steps, self.sizes.whole_epoch)
        device = self.stack.device
        return {  # [S, K] each
            name: torch.from_numpy(np.broadcast_to(v, lr.shape).copy()).float().to(device)
            for name, v in values.items()
        }

    def __call__(
        self, indices: Tensor, keys: Tensor, hyperparameters: Tensors
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Train on S batches of images.

        Args:
            indices: The images of all S batches, [K, N], or [1, N] if all runs see the same.
            keys: The keys of what the steps draw, int64 [S, K].
            hyperparameters: What the updates need, [S, K] each.

        Returns:
            Each batch's mean loss (float64), number of correct predictions, and whether loss and
            gradients were finite, [S, K] each.
        """
        before, is_guarded = self._train_state(), self.compiled is not None
        if not is_guarded and self.stacked is not None and bool(self.alive.all()):
            # what is not finite stays so: a look at the end shows whether it was so on the way
            losses, correct, finite = self._train(indices, keys, hyperparameters, guarded=False)
            totals = torch.stack([p.sum() for p in self.stack.params.values()])
            if np.isfinite(losses).all() and bool(totals.isfinite().all()):
                return losses, correct, finite
            self._set_state(before)
        return self._train(indices, keys, hyperparameters, guarded=True)

    def _train(
        self, indices: Tensor, keys: Tensor, hyperparameters: Tensors, guarded: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Do what calling the step does; `guarded` is explained in `_step`."""
        size, names = self.steps_per_call, list(hyperparameters)
        calls = zip(
            torch.split(indices, size * self.spec.batch_size, 1),
            torch.split(keys, size),
            zip(*(torch.split(hyperparameters[n], size) for n in names), strict=True),
            strict=True,
        )
        results = []
        with torch.random.fork_rng(enabled=self.stack.is_stochastic):
            for call_indices, call_keys, values in calls:
                if self.stack.is_stochastic:  # for random functions that do not follow the keys
                    torch.manual_seed(int(call_keys[0, 0]))
                results.append(self._call(call_indices, call_keys, values, guarded))
        losses, correct, finite = (torch.cat(r).cpu().numpy() for r in zip(*results, strict=True))
        return losses.astype(np.float64), correct, finite

    def _call(
        self, indices: Tensor, keys: Tensor, hyperparameters: Sequence[Tensor], guarded: bool
    ) -> Sequence[Tensor]:
        is_whole = indices.shape[1] == self.steps_per_call * self.spec.batch_size
        if self.compiled is not None and is_whole:
            with torch.no_grad():
                return self.compiled(indices.contiguous(), keys, *hyperparameters)
        old, split = self._train_state(), self.data.train
        given = [*old.tensors(), split.images, split.labels, indices, keys, *hyperparameters]
        steps: Call = functools.partial(self._steps, guarded=guarded)
        if is_whole and self.is_traceable:
            steps = self._traced(steps, given, guarded)
        *tensors, losses, correct, finite = steps(*given)
        self._set_state(old.with_tensors(tensors))
        return losses, correct, finite

    def _traced(self, steps: Call, example: Sequence[Tensor], guarded: bool) -> Call:
        """Return the trace of `steps`, or themselves if they cannot be traced."""
        if guarded not in self.traces:
            try:
                self.traces[guarded] = trace(steps, example)
            except Exception as error:  # a trace keeps all that is computed: memory may not do
                log.warning("the step is not traced, and runs as it is: %s", first_line(error))
                self.is_traceable = False
        return self.traces.get(guarded, steps)

    def compile(self) -> str:
        """Compile the calls that take whole batches only, and return why that is impossible, or "".

        The train state stays as it is.
        """
        if self.stacked is None:
            return f"there is no stacked rule for {type(self.plain[0]).__name__}"
        count = self.steps_per_call * self.spec.batch_size  # images in a call
        if max(self.sizes.lengths) < count:
            return f"an epoch has fewer than {self.steps_per_call} whole batches"
        size, device = self.stack.size, self.stack.device
        hyperparameters = self.hyperparameters(0, np.zeros((self.steps_per_call, size)))
        indices = torch.arange(count, device=device).expand(1 if self.shared else size, -1)
        keys = torch.zeros(self.steps_per_call, size, dtype=torch.long, device=device)
        inputs = [indices.contiguous(), keys, *hyperparameters.values()]
        constants = [self.data.train.images, self.data.train.labels]
        steps = functools.partial(self._steps, guarded=True)
        try:
            self.compiled = compile_in_place(
                steps, self._train_state().tensors(), constants, inputs
            )
        except Exception as error:  # a compiler can raise anything; fit() passes it on
            return first_line(error)
        return ""

    def _train_state(self) -> TrainState:
        params, buffers = self.stack.params, self.stack.buffers
        return TrainState(params, buffers, self.optimizer_state, self.average, self.alive)

    def _set_state(self, new: TrainState) -> None:
        """Go on from `new`; a compiled step goes on with the same tensors."""
        if self.compiled is None:
            self.stack.params, self.stack.buffers = new.params, new.buffers
            self.optimizer_state, self.average, self.alive = new.optimizer, new.average, new.alive
            return
        for old_tensor, new_tensor in zip(
            self._train_state().tensors(), new.tensors(), strict=True
        ):
            old_tensor.copy_(new_tensor)

    def _steps(self, *tensors: Tensor, guarded: bool) -> list[Tensor]:
        """Do S training steps on tensors alone, as a graph takes them.

        Args:
            tensors: Those of the state; the images and labels of the training split; the indices
                [K, S * B], or [1, S * B], and the keys of the steps [S, K]; and the
                hyperparameters in their order, [S, K] each.
            guarded: As for `_step`.

        Returns:
            The tensors of the new state; and of each step the mean loss, the number of correct
            predictions, and whether it was finite, [S, K].
        """
        state = self._train_state().with_tensors(tensors)
        images, labels, indices, keys, *values = tensors[len(state.tensors()) :]
        batches = self._gather(images, labels, indices, keys).batches(self.spec.batch_size)
        results = []
        for i, given in enumerate(batches):
            batch = Batch(given.x, given.y, keys[i], self.smoothing, given.others, given.shares)
            numbers = dict(zip(self.hyperparameter_names, [v[i] for v in values], strict=True))
            state, *result = self._step(state, batch, numbers, guarded)
            results.append(result)
        return [*state.tensors(), *(torch.stack(r) for r in zip(*results, strict=True))]

    def _gather(self, images: Tensor, labels: Tensor, indices: Tensor, keys: Tensor) -> Augmented:
        """Return what the network gets of the images at `indices` [K, N], and their labels."""
        if self.augmenter is not None:
            return self.augmenter(images, labels, indices, keys)
        flat = indices.flatten()
        x = self.data.normalise(images.index_select(0, flat))
        return Augmented(x.view(*indices.shape, *self.data.shape), labels[flat].view(indices.shape))

    def _step(
        self, state: TrainState, batch: Batch, hyperparameters: Mapping[str, Tensor], guarded: bool
    ) -> StepResult:
        """Do one training step; the losses and so on are [K].

        Args:
            state: The state before the step.
            batch: The batch of each run.
            hyperparameters: What the update needs, [K] each.
            guarded: Whether to look if each run is finite, and to leave those as they are that are
                not; otherwise they are taken to be.
        """
        params = state.params
        grads, buffers, loss, correct = self.stack.gradients(params, state.buffers, batch)
        if self.clip_norm is not None:
            grads = clipped(grads, self.clip_norm)
        new_params, optimizer_state = {}, {}
        if self.stacked is not None:
            for n, p in params.items():
                h = {name: over(value, p) for name, value in hyperparameters.items()}
                decays = self.spec.decay_norms or p.dim() > 2  # [K, ...]
                new_params[n], optimizer_state[n] = self.stacked.update(
                    p, grads[n], state.optimizer[n], h, decays
                )
        finite = alive = state.alive
        if guarded:
            # a gradient that is not finite shows in what it leads to, and so does a large update
            results = grads if self.stacked is None else new_params
            largest = [t.abs().reshape(len(t), -1).amax(1) for t in results.values()]
            finite = torch.isfinite(loss) & torch.isfinite(torch.stack(largest).amax(0))  # [K]
            alive = state.alive & finite
        if self.stacked is None:
            new_params = self._plain_update(params, grads, alive, hyperparameters)
        average: Tensors = {}
        if state.average:
            weight = hyperparameters["new_weight"]
            average = updated_average(state.average, new_params | buffers, weight)
        new = TrainState(new_params, buffers, optimizer_state, average, alive)
        if not guarded:
            return new, loss, correct, finite
        pairs = zip(new.tensors()[:-1], state.tensors()[:-1], strict=True)
        kept = [t if t is old else torch.where(over(alive, t), t, old) for t, old in pairs]
        return new.with_tensors([*kept, alive]), loss, correct, finite

    def _plain_update(
        self, params: Tensors, grads: Tensors, alive: Tensor, hyperparameters: Mapping[str, Tensor]
    ) -> Tensors:
        """Update the parameters in place with torch's own optimizers, run by run; return them."""
        for k in alive.nonzero().flatten().tolist():
            for group in self.plain[k].param_groups:
                group["lr"] = float(hyperparameters["lr"][k])
            for view, g in zip(self.views[k], grads.values(), strict=True):
                view.grad = g[k]
            self.plain[k].step()
        return params
