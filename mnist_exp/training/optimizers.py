"""Optimizers for a stack of K runs.

A stacked optimizer is the update of one `torch.optim` class, written for parameters `[K, ...]`:
every number (learning rate, momentum, ...) may differ from run to run, every flag (nesterov,
amsgrad, ...) is shared. Updates are pure, so that a step can be compiled, and a run that diverged
is left as it was.

An update gets its hyperparameters for one step as a vector `[K]` each. They are computed in float64
on the host, an epoch at a time: in float32, bias corrections such as 1 - 0.999**t lose half of
their digits.
"""

import copy
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mnist_exp.formatting import is_number
from mnist_exp.training.muon import Muon, orthogonalised

Numbers = dict[str, np.ndarray]  # name -> float64, which broadcasts to [S, K]
Scalars = Mapping[str, Tensor]  # name -> [K, 1, ...]
OptimizerState = tuple[Tensor, ...]  # the optimizer's state for one parameter, each [K, ...]
Updated = tuple[Tensor, OptimizerState]  # the new parameter and its new state


class StackedOptimizer(ABC):
    """The update of one optimizer class. `defaults` are `torch.optim`'s own, one dict a run."""

    flags: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[tuple[str, ...]] = ()  # the numbers that the update takes as they are

    def __init__(self, defaults: Sequence[Mapping[str, Any]]) -> None:
        self.flag = {name: bool(defaults[0][name]) for name in self.flags}
        self.numbers: Numbers = {}  # [K] each
        for name, value in defaults[0].items():
            if name == "betas":
                for i in (0, 1):
                    self.numbers[f"beta{i + 1}"] = np.array([float(d[name][i]) for d in defaults])
            elif is_number(value):
                self.numbers[name] = np.array([float(d[name]) for d in defaults])
        self.has_weight_decay = bool(self.numbers["weight_decay"].any())
        self.has_momentum = "momentum" in self.numbers and bool(self.numbers["momentum"].any())

    def select(self, indices: Sequence[int]) -> "StackedOptimizer":
        """Return the optimizer for some of the runs only; its state keeps its form."""
        selected = copy.copy(self)
        selected.numbers = {name: values[list(indices)] for name, values in self.numbers.items()}
        return selected

    def hyperparameters(self, step: np.ndarray, lr: np.ndarray) -> Numbers:
        """Return what `update` reads at steps [S, 1] (1, 2, ...) and learning rates [S, K]."""
        used = ("weight_decay", *self.reads) if self.has_weight_decay else self.reads
        return {"lr": lr, **{n: self.numbers[n] for n in used}, **self._computed(step, lr)}

    def initial_state(self, p: Tensor) -> OptimizerState:
        """Return the state for parameter `p` before the first update."""
        return tuple(torch.zeros_like(p) for _ in range(self._state_size()))

    def update(
        self, p: Tensor, g: Tensor, state: OptimizerState, h: Scalars, decays: bool = True
    ) -> Updated:
        """Return a parameter [K, ...] and its state after one step.

        Args:
            p: The parameter.
            g: Its gradient, [K, ...].
            state: The optimizer's state for it.
            h: The hyperparameters of this step, [K, 1, ...] each.
            decays: Whether weight decay, if there is any, is for this parameter as well.
        """
        dtype = p.dtype
        if self.flag["maximize"]:
            g = -g
        if decays and self.flag.get("decoupled_weight_decay"):
            p = p * h["decay_factor"]
        elif decays and self.has_weight_decay:
            g = g + h["weight_decay"] * p
        new_p, new_state = self._update(p, g, state, h)
        if new_p.dtype != dtype:  # of bfloat16 and float32 hyperparameters comes float32
            return new_p.to(dtype), tuple(t.to(dtype) for t in new_state)
        return new_p, new_state

    def _computed(self, step: np.ndarray, lr: np.ndarray) -> Numbers:
        """Return the hyperparameters that are not those of torch themselves."""
        return {}

    def _state_size(self) -> int:
        """Return the number of tensors in the state of a parameter, if they begin with zeros."""
        return 0

    @abstractmethod
    def _update(self, p: Tensor, g: Tensor, state: OptimizerState, h: Scalars) -> Updated:
        """Return what `update` does, once the weights have decayed."""


class SGD(StackedOptimizer):
    """Gradient descent, with momentum as in Sutskever, Martens, Dahl & Hinton 2013."""

    flags = frozenset({"nesterov", "maximize"})
    reads = ("momentum",)

    def _computed(self, step: np.ndarray, lr: np.ndarray) -> Numbers:
        # torch starts its buffer with the undamped first gradient, and has none without momentum
        dampening = self.numbers["dampening"] * (step > 1) * (self.numbers["momentum"] > 0)
        return {"one_minus_dampening": 1 - dampening}

    def _state_size(self) -> int:
        return int(self.has_momentum)

    def _update(self, p: Tensor, g: Tensor, state: OptimizerState, h: Scalars) -> Updated:
        if self.has_momentum:
            buffer = h["momentum"] * state[0] + h["one_minus_dampening"] * g
            g = torch.addcmul(g, h["momentum"], buffer) if self.flag["nesterov"] else buffer
            state = (buffer,)
        return torch.addcmul(p, h["lr"], g, value=-1), state


class Adam(StackedOptimizer):
    """Kingma & Ba 2015, and Loshchilov & Hutter 2019 where the decay is decoupled (AdamW)."""

    flags = frozenset({"amsgrad", "maximize", "decoupled_weight_decay"})
    reads: ClassVar[tuple[str, ...]] = ("beta2", "eps")

    def _computed(self, step: np.ndarray, lr: np.ndarray) -> Numbers:
        n = self.numbers
        return {
            "step_size": lr / (1 - n["beta1"] ** step),
            "bias_correction2": np.sqrt(1 - n["beta2"] ** step),
            "one_minus_beta1": 1 - n["beta1"],
            "one_minus_beta2": 1 - n["beta2"],
            "decay_factor": 1 - lr * n["weight_decay"],
        }

    def _state_size(self) -> int:
        return 3 if self.flag["amsgrad"] else 2

    def _update(self, p: Tensor, g: Tensor, state: OptimizerState, h: Scalars) -> Updated:
        mean = torch.addcmul(state[0], h["one_minus_beta1"], g - state[0])
        square = torch.addcmul(h["beta2"] * state[1], h["one_minus_beta2"] * g, g)
        largest = (torch.maximum(state[2], square),) if self.flag["amsgrad"] else ()
        scale = (largest[0] if largest else square).sqrt() / h["bias_correction2"] + h["eps"]
        return torch.addcdiv(p, h["step_size"] * mean, scale, value=-1), (mean, square, *largest)


class RMSprop(StackedOptimizer):
    """Tieleman & Hinton 2012, and Graves 2013 where it is centered."""

    flags = frozenset({"centered", "maximize"})
    reads = ("alpha", "eps", "momentum")

    def _computed(self, step: np.ndarray, lr: np.ndarray) -> Numbers:
        return {"one_minus_alpha": 1 - self.numbers["alpha"]}

    def _state_size(self) -> int:
        return 1 + self.flag["centered"] + self.has_momentum

    def _update(self, p: Tensor, g: Tensor, state: OptimizerState, h: Scalars) -> Updated:
        square = torch.addcmul(h["alpha"] * state[0], h["one_minus_alpha"] * g, g)
        new_state = [square]
        if self.flag["centered"]:
            mean = state[1] + h["one_minus_alpha"] * (g - state[1])
            new_state.append(mean)
            square = torch.addcmul(square, mean, mean, value=-1)
        g = g / (square.sqrt() + h["eps"])
        if self.has_momentum:
            g = h["momentum"] * state[-1] + g
            new_state.append(g)
        return torch.addcmul(p, h["lr"], g, value=-1), tuple(new_state)


class Adagrad(StackedOptimizer):
    """Duchi, Hazan & Singer 2011."""

    flags = frozenset({"maximize"})
    reads = ("eps",)

    def initial_state(self, p: Tensor) -> OptimizerState:
        """Return the sum of squares, which begins at `initial_accumulator_value`."""
        start = torch.as_tensor(self.numbers["initial_accumulator_value"], dtype=p.dtype)
        return (over(start.to(p.device), p).expand_as(p).clone(),)

    def _computed(self, step: np.ndarray, lr: np.ndarray) -> Numbers:
        return {"lr": lr / (1 + (step - 1) * self.numbers["lr_decay"])}

    def _update(self, p: Tensor, g: Tensor, state: OptimizerState, h: Scalars) -> Updated:
        square = torch.addcmul(state[0], g, g)
        return torch.addcdiv(p, h["lr"] * g, square.sqrt() + h["eps"], value=-1), (square,)


class StackedMuon(Adam):
    """The update of `Muon`: its own for matrices [K, R, C], and AdamW's for all else."""

    flags = Adam.flags | {"nesterov"}
    reads = (*Adam.reads, "momentum")

    def initial_state(self, p: Tensor) -> OptimizerState:
        """Return the momentum of a matrix, or the state of Adam."""
        return (torch.zeros_like(p),) if _is_matrix(p) else super().initial_state(p)

    def update(
        self, p: Tensor, g: Tensor, state: OptimizerState, h: Scalars, decays: bool = True
    ) -> Updated:
        """Return a parameter and its state after one step; matrices decay at their own rate."""
        if _is_matrix(p):
            h = {**h, "decay_factor": h["matrix_decay_factor"]}
        return super().update(p, g, state, h, decays)

    def _computed(self, step: np.ndarray, lr: np.ndarray) -> Numbers:
        n = self.numbers
        return super()._computed(step, lr * (n["adamw_lr"] / n["lr"])) | {
            "one_minus_momentum": 1 - n["momentum"],
            "matrix_decay_factor": 1 - lr * n["weight_decay"],
        }

    def _update(self, p: Tensor, g: Tensor, state: OptimizerState, h: Scalars) -> Updated:
        if not _is_matrix(p):
            return super()._update(p, g, state, h)
        momentum = torch.addcmul(state[0], h["one_minus_momentum"], g - state[0])
        g = torch.addcmul(g, h["momentum"], momentum - g) if self.flag["nesterov"] else momentum
        rows, columns = p.shape[1], math.prod(p.shape[2:])
        direction = orthogonalised(g.reshape(-1, rows, columns)).reshape(p.shape)
        scale = max(1, rows / columns) ** 0.5
        return torch.addcmul(p, h["lr"], direction, value=-scale), (momentum,)


def _is_matrix(p: Tensor) -> bool:
    return p.dim() > 2  # [K, ...]


STACKED: dict[type[torch.optim.Optimizer], type[StackedOptimizer]] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: Adam,
    torch.optim.RMSprop: RMSprop,
    torch.optim.Adagrad: Adagrad,
    Muon: StackedMuon,
}
# a run that sets one of these chooses among torch's implementations, and gets torch's
IMPLEMENTATION_FLAGS = ("foreach", "fused", "capturable", "differentiable")
UNSUPPORTED: dict[type[torch.optim.Optimizer], str] = {
    torch.optim.Muon: "it takes matrices alone. Choose optimizer=muon",
    torch.optim.LBFGS: "it evaluates the loss several times a step",
    torch.optim.SparseAdam: "it takes sparse gradients only",
}


def stacked_optimizer(
    optimizer: type[torch.optim.Optimizer], defaults: Sequence[Mapping[str, Any]]
) -> StackedOptimizer | None:
    """Return the stacked form of an optimizer class, or None: it must be torch's, run by run.

    `defaults` are `torch.optim`'s own, one dict a run. Raises ValueError if they differ in a flag.
    """
    stacked = STACKED.get(optimizer)
    if stacked is None or any(d.get(flag) for d in defaults for flag in IMPLEMENTATION_FLAGS):
        return None
    if any(d.get(flag) != defaults[0].get(flag) for d in defaults for flag in stacked.flags):
        raise ValueError(f"runs of one stack must share the flags {sorted(stacked.flags)}")
    return stacked(defaults)


def torch_optimizer(
    optimizer: type[torch.optim.Optimizer],
    params: Sequence[Tensor],
    arguments: Mapping[str, Any],
    decay_norms: bool = True,
) -> torch.optim.Optimizer:
    """Return an instance of an optimizer class on `params`, and raise what it raises.

    Without `decay_norms`, parameters of one dimension are a group of their own, without decay.

    The first that is made imports torch's compiler, which takes a second, as `add_param_group` is
    hidden from it. Where the updates are those of a stacked optimizer, nothing needs that.
    """
    if optimizer in STACKED:
        plain = {"add_param_group": inspect.unwrap(torch.optim.Optimizer.add_param_group)}
        optimizer = type(optimizer.__name__, (optimizer,), plain)
    groups: list[dict[str, Any]] = [{"params": params}]
    if not decay_norms:
        norms = [p for p in params if p.dim() <= 1]
        groups = [{"params": [p for p in params if p.dim() > 1]}]
        groups.append({"params": norms, "weight_decay": 0.0})
    return optimizer(groups, **arguments)


def clipped(grads: Mapping[str, Tensor], greatest: Tensor) -> dict[str, Tensor]:
    """Return gradients [K, ...] scaled down to a norm, as `torch.nn.utils.clip_grad_norm_` does.

    Pascanu, Mikolov & Bengio, "On the difficulty of training recurrent neural networks" (2013).

    Args:
        grads: The gradients of all parameters.
        greatest: The greatest L2 norm that those of a run may have together, [K]; inf for any.
    """
    norms = [torch.linalg.vector_norm(g.reshape(len(g), -1), dim=1) for g in grads.values()]
    norm = torch.linalg.vector_norm(torch.stack([n.float() for n in norms]), dim=0) + 1e-6  # [K]
    # without a limit the gradient stays as it is, even where its norm overflows
    factor = torch.where(norm > greatest, greatest / norm, 1.0)
    return {name: g * over(factor, g).to(g.dtype) for name, g in grads.items()}


def over(vector: Tensor, p: Tensor) -> Tensor:
    """Return a vector [K] as [K, 1, ...], to broadcast over `p` [K, ...]."""
    return vector.view(-1, *(1,) * (p.dim() - 1))
