"""The training step on a stack: gather, forward, backward, update; as it is, or compiled.

What is carried from step to step (parameters, buffers, the optimizer's memory, who is alive)
belongs to the step; everything else comes in with a call.
"""

import contextlib
import logging
import os
import shutil
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.linalg import vector_norm
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from mnist_exp.data.dataset import Dataset
from mnist_exp.training.optimizers import over, rule_for
from mnist_exp.training.schedules import Schedule
from mnist_exp.training.stack import Stack, Tensors

# Steps that a call takes together. A compiled call costs about 0.1 ms whatever it holds, a third of
# a single seed MLP's step, so there it holds four; each more makes compiling slower.
CHUNK = 4
# Steps times models from which on compiling surely repays itself, on the seed recipe: it saves 1 ms
# a step of a model, and takes 20 s for a model alone (10 s for a stack, where a call holds one
# step), or 1 s where torch's cache on disk has it.
COMPILE_FROM = {"alone": 20_000, "stack": 4_000}

Slots = dict[str, tuple[Tensor, ...]]  # parameter -> the optimizer's memory, [K, ...] each
Carried = tuple[Tensors, Tensors, Slots, Tensor]  # params, buffers, slots, alive: bool [K]
Trained = tuple[Carried, Tensor, Tensor, Tensor]  # and mean losses, correct, finite: [S, K]


@dataclass(frozen=True)
class RunSpec:
    """What one run of a stack has for itself."""

    seed: int
    optimizer: Mapping[str, Any]  # the arguments of the optimizer class
    schedule: Schedule
    label_smoothing: float = 0.0
    patience: int | None = None  # epochs without a better validation loss after which it stops


class TrainStep:
    """A few training steps on a stack, and what is carried from one to the next."""

    def __init__(
        self,
        stack: Stack,
        data: Dataset,
        runs: Sequence[RunSpec],
        optimizer: type[torch.optim.Optimizer],
        batch_size: int,
    ) -> None:
        self.stack, self.data, self.runs = stack, data, runs
        self.optimizer, self.batch_size = optimizer, batch_size
        # runs of one seed see the same images in the same order: they are gathered once for all
        self.shared = len({run.seed for run in runs}) == 1
        self.chunk = max(1, CHUNK // stack.size) if stack.device.type == "cpu" else CHUNK
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
        self.compiled: Callable[..., Sequence[Tensor]] | None = None

    def take(self, rows: Sequence[int]) -> "TrainStep":
        """The step for some of the stack's models only, as they are now; not compiled."""
        assert self.rule is not None, "torch's own optimizers hold on to their parameters"
        runs = [self.runs[k] for k in rows]
        taken = TrainStep(self.stack.take(rows), self.data, runs, self.optimizer, self.batch_size)
        index = torch.tensor(rows, device=self.stack.device)
        taken.rule, taken.alive = self.rule.take(rows), self.alive[index]
        taken.slots = {n: tuple(t[index] for t in slots) for n, slots in self.slots.items()}
        return taken

    def state(self) -> dict[str, Any]:
        """What is carried to the next step, and the memory of torch's own optimizers."""
        return {
            "carried": list(tree_leaves(self._carried())),
            "plain": [] if self.rule else [o.state_dict() for o in self.plain],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes what `state` has given in a step of the same form, into the tensors at hand."""
        for own, saved in zip(tree_leaves(self._carried()), state["carried"], strict=True):
            own.copy_(saved)
        for optimizer, memory in zip(self.plain, state["plain"], strict=False):
            optimizer.load_state_dict(memory)

    def hyperparameters(self, done: int, lr: np.ndarray) -> Tensors:
        """What the updates after the first `done` need, at learning rates `lr` [S, K]: [S, K]."""
        steps = done + 1 + np.arange(len(lr))[:, None]
        found = {"lr": lr} if self.rule is None else self.rule.at(steps, lr)
        whole = {name: np.broadcast_to(n, lr.shape).copy() for name, n in found.items()}
        return {
            name: torch.from_numpy(n).float().to(self.stack.device) for name, n in whole.items()
        }

    def __call__(
        self, chosen: Tensor, keys: Tensor, hyperparameters: Tensors
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Trains on the images `chosen` [K, N], or [1, N] where all runs see the same, in S
        batches; keys (of the dropout masks) and hyperparameters: [S, K].

        Returns each batch's mean loss (float64), number of correct predictions, and whether loss
        and gradients were finite, [S, K] each.
        """
        names = list(hyperparameters)
        calls = zip(
            torch.split(chosen, self.chunk * self.batch_size, 1),
            torch.split(keys, self.chunk),
            zip(*(torch.split(hyperparameters[n], self.chunk) for n in names), strict=True),
            strict=True,
        )
        records = []
        with torch.random.fork_rng(enabled=self.stack.noisy):
            for own_chosen, own_keys, values in calls:
                if self.stack.noisy:  # for random functions that do not follow the keys
                    torch.manual_seed(int(own_keys[0, 0]))
                records.append(
                    self._call(own_chosen, own_keys, dict(zip(names, values, strict=True)))
                )
        losses, correct, finite = (torch.cat(r).cpu().numpy() for r in zip(*records, strict=True))
        return losses.astype(np.float64), correct, finite

    def _call(self, chosen: Tensor, keys: Tensor, hyperparameters: Tensors) -> Sequence[Tensor]:
        if self.compiled is not None and chosen.shape[1] == self.chunk * self.batch_size:
            with torch.no_grad():
                return self.compiled(chosen, keys, hyperparameters)
        images, labels = self.data.train.images, self.data.train.labels
        old = self._carried()
        new, *records = self._steps(old, images, labels, chosen, keys, hyperparameters)
        if self.compiled is None:
            self.stack.params, self.stack.buffers, self.slots, self.alive = new
        else:  # which goes on with the same tensors
            for was, now in zip(tree_leaves(old), tree_leaves(new), strict=True):
                was.copy_(now)
        return records

    def compile(self) -> str:
        """Compiles calls of whole batches; changes nothing that is carried. Why not, or ''.

        The step is traced to plain tensor operations by running it on copies, so that what the
        compiler sees knows no vmap, autograd or module.
        """
        if self.rule is None:
            return f"there is no stacked rule for {type(self.plain[0]).__name__}"
        size = self.chunk * self.batch_size
        if len(self.data.train) < size:
            return f"an epoch has fewer than {self.chunk} whole batches"
        from torch.fx.experimental.proxy_tensor import make_fx

        runs, device = self.stack.size, self.stack.device
        hyperparameters = self.hyperparameters(0, np.zeros((self.chunk, runs)))
        state, structure = tree_flatten(self._carried())
        fixed = [self.data.train.images, self.data.train.labels]
        keys = torch.zeros(self.chunk, runs, dtype=torch.long, device=device)
        rows = 1 if self.shared else runs
        chosen = torch.arange(size, device=device).expand(rows, -1).contiguous()
        inputs = [chosen, keys, *hyperparameters.values()]

        def in_place(*flat: Tensor) -> list[Tensor]:
            old, (images, labels, chosen, keys, *values) = flat[: len(state)], flat[len(state) :]
            own = dict(zip(hyperparameters, values, strict=True))
            carried = tree_unflatten(old, structure)
            new, *records = self._steps(carried, images, labels, chosen, keys, own, traced=True)
            for was, now in zip(old, tree_leaves(new), strict=True):
                if now is not was:
                    was.copy_(now)
            return records

        try:
            copies = [t.clone() for t in state]
            with torch.random.fork_rng():
                graph = make_fx(in_place)(*copies, *fixed, *inputs)
            graph.graph.eliminate_dead_code()
            graph.recompile()
            with torch.random.fork_rng(), torch.no_grad():
                call = _inductor(graph, [*copies, *fixed, *inputs])
                call(*copies, *fixed, *inputs)
                if device.type == "cuda":
                    call = _captured(call, state, fixed, inputs)
        except Exception as error:  # a compiler can raise anything; fit() passes it on
            return (str(error).strip().splitlines() or [type(error).__name__])[0]

        def compiled(chosen: Tensor, keys: Tensor, hyperparameters: Tensors) -> Sequence[Tensor]:
            return call(*state, *fixed, chosen.contiguous(), keys, *hyperparameters.values())

        self.compiled = compiled
        return ""

    def _carried(self) -> Carried:
        return self.stack.params, self.stack.buffers, self.slots, self.alive

    def _steps(
        self,
        carried: Carried,
        images: Tensor,
        labels: Tensor,
        chosen: Tensor,
        keys: Tensor,
        hyperparameters: Tensors,
        traced: bool = False,
    ) -> Trained:
        x, y = self._gather(images, labels, chosen)
        batches = zip(*(torch.split(t, self.batch_size, 1) for t in (x, y)), strict=True)
        records = []
        for i, (x, y) in enumerate(batches):
            own = {name: values[i] for name, values in hyperparameters.items()}
            carried, *record = self._step(carried, x, y, keys[i], own, traced)
            records.append(record)
        losses, correct, finite = (torch.stack(r) for r in zip(*records, strict=True))
        return carried, losses, correct, finite

    def _gather(self, images: Tensor, labels: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The images [K, N, C, H, W], normalised, and labels [K, N] at `chosen` [K, N]."""
        flat = chosen.flatten()
        x = self.data.normalise(images.index_select(0, flat))
        return x.view(*chosen.shape, *self.data.shape), labels[flat].view(chosen.shape)

    def _step(
        self,
        carried: Carried,
        x: Tensor,
        y: Tensor,
        keys: Tensor,
        hyperparameters: Mapping[str, Tensor],
        traced: bool,
    ) -> Trained:
        """The training step. x: [K, B, C, H, W], y: [K, B] (or [1, ...]: the same for all),
        keys: [K], hyperparameters: [K] each.
        """
        params, buffers, slots, alive = carried
        grads, new_buffers, loss, correct = self.stack.gradients(
            params, buffers, x, y, keys, self.smooth
        )
        new_params, new_slots = {}, {}
        if self.rule is not None:
            for n, p in params.items():
                h = {name: over(v, p) for name, v in hyperparameters.items()}
                new_params[n], new_slots[n] = self.rule.update(p, grads[n], slots[n], h)
        # a gradient that is not finite shows in what it leads to, and so does an update too large
        results = grads if self.rule is None else new_params
        largest = [vector_norm(t.reshape(len(t), -1), torch.inf, 1) for t in results.values()]
        finite = torch.isfinite(loss) & torch.isfinite(torch.stack(largest).amax(0))
        alive = alive & finite
        if self.rule is None:
            new_params, new_slots = self._plain_update(params, grads, alive, hyperparameters), slots
        new = (new_params, new_buffers, new_slots)
        # a traced step cannot look at values; elsewhere the rare case alone pays for the choice
        if traced or not bool(alive.all()):
            new = tree_map(
                lambda now, old: old if now is old else torch.where(over(alive, now), now, old),
                new,
                (params, buffers, slots),
            )
        return (*new, alive), loss, correct, finite

    def _plain_update(
        self, params: Tensors, grads: Tensors, alive: Tensor, hyperparameters: Mapping[str, Tensor]
    ) -> Tensors:
        """torch's own optimizers, run by run, in place."""
        for k in alive.nonzero().flatten().tolist():
            for group in self.plain[k].param_groups:
                group["lr"] = float(hyperparameters["lr"][k])
                for view, g in zip(group["params"], grads.values(), strict=True):
                    view.grad = g[k]
            self.plain[k].step()
        return params


def _inductor(graph: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """The traced `graph`, compiled for inputs like these."""
    from torch._inductor import config as inductor  # 2 s to import, for those who compile

    # not from torch._inductor itself, where the module hides the function once it is imported
    from torch._inductor.standalone_compile import standalone_compile

    # on a machine without a GPU, the CUDA build of torch says so in the middle of the epochs
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    inductor.compile_threads = 1  # its pool of worker processes would double the memory
    call: Callable[..., Sequence[Tensor]] = standalone_compile(
        graph,
        list(inputs),
        dynamic_shapes="from_example_inputs",
        options={"config_patches": {"cpp_wrapper": inputs[0].device.type == "cpu"}},
    )
    return call


def warm_up_compiler() -> None:
    """Compiles next to nothing, so that processes which are forked from this one start at once.

    The first time in a process takes a second more than those that follow, even from the cache: the
    compiler is imported, and what a cached result depends on (torch, triton, the C++ compiler) is
    read and hashed.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    x = torch.zeros(16)
    with contextlib.suppress(Exception), torch.no_grad():  # TrainStep.compile() will say why not
        _inductor(make_fx(lambda x: [x + 1])(x), [x])(x)


def compiling_pays(steps: int, size: int, device: torch.device) -> bool:
    """Whether so many steps of a stack are sooner done compiled, on a machine that can."""
    return steps * size >= COMPILE_FROM["alone" if size == 1 else "stack"] and can_compile(device)


def can_compile(device: torch.device) -> bool:
    """The compiler needs a C++ compiler for a CPU, and Python's headers for its wrappers."""
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    found = any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++"))
    return device.type in ("cpu", "cuda") and headers and found


def _captured(
    call: Callable[..., Sequence[Tensor]],
    state: Sequence[Tensor],
    fixed: Sequence[Tensor],
    inputs: Sequence[Tensor],
) -> Callable[..., Sequence[Tensor]]:
    """`call` as a CUDA graph: one launch, whatever it holds. It changes `state` in place."""
    before = [t.clone() for t in state]
    own = [t.clone() for t in inputs]
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # kernels are built and tuned at first use, which cannot be captured
            call(*state, *fixed, *own)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        records = call(*state, *fixed, *own)
    for tensor, value in zip(state, before, strict=True):
        tensor.copy_(value)

    def replay(*flat: Tensor) -> Sequence[Tensor]:
        for tensor, value in zip(own, flat[-len(own) :], strict=True):
            tensor.copy_(value)
        graph.replay()
        return [t.clone() for t in records]

    return replay
