"""Update rules for a stack of K runs.

A rule is the update of one `torch.optim` class, written for parameters `[K, ...]`: every number
(learning rate, momentum, ...) may differ from run to run, every flag (nesterov, amsgrad, ...) is
shared. Rules are pure, so that a step can be compiled, and a run that diverged left as it was.

A rule gets its numbers for one step as a vector `[K]` each. They are computed in float64 on the
host, an epoch at a time: in float32, bias corrections such as 1 - 0.999**t lose half of their
digits.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

Numbers = dict[str, np.ndarray]  # name -> float64 [K]
Scalars = Mapping[str, Tensor]  # name -> [K, 1, ...]
Slots = tuple[Tensor, ...]  # the optimizer's memory for one parameter, each [K, ...]


class Rule(ABC):
    """The update of one optimizer class. `defaults` are `torch.optim`'s own, one dict a run."""

    flags: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[tuple[str, ...]] = ()  # the numbers that `update` takes as they are

    def __init__(self, defaults: Sequence[Mapping[str, Any]]) -> None:
        self.flag = {name: bool(defaults[0][name]) for name in self.flags}
        self.numbers: Numbers = {}
        for name, value in defaults[0].items():
            if name == "betas":
                for i in (0, 1):
                    self.numbers[f"beta{i + 1}"] = np.array([float(d[name][i]) for d in defaults])
            elif isinstance(value, int | float) and not isinstance(value, bool):
                self.numbers[name] = np.array([float(d[name]) for d in defaults])
        self.decays = bool(self.numbers["weight_decay"].any())

    def take(self, rows: Sequence[int]) -> "Rule":
        """The rule for some of the runs only. Its memory keeps its form."""
        taken = copy.copy(self)
        taken.numbers = {name: values[list(rows)] for name, values in self.numbers.items()}
        return taken

    def regularise(self, p: Tensor, g: Tensor, h: Scalars) -> Tensor:
        """The gradient to follow: sign for `maximize`, plus L2 `weight_decay`."""
        if self.flag["maximize"]:
            g = -g
        return g + h["weight_decay"] * p if self.decays else g

    def at(self, step: np.ndarray, lr: np.ndarray) -> Numbers:
        """What `update` reads at steps [S, 1] (1, 2, ...) and learning rates `lr` [S, K].

        Each broadcasts to [S, K].
        """
        used = ("weight_decay", *self.reads) if self.decays else self.reads
        return {"lr": lr, **{name: self.numbers[name] for name in used}}

    @abstractmethod
    def slots(self, p: Tensor) -> Slots:
        """The memory for parameter `p`, before the first update."""

    @abstractmethod
    def update(self, p: Tensor, g: Tensor, s: Slots, h: Scalars) -> tuple[Tensor, Slots]:
        """New parameter and memory, given the gradient and this step's numbers."""


class SGD(Rule):
    flags = frozenset({"nesterov", "maximize"})
    reads = ("momentum",)

    def __init__(self, defaults: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(defaults)
        self.remembers = bool(self.numbers["momentum"].any())

    def at(self, step: np.ndarray, lr: np.ndarray) -> Numbers:
        # torch starts its buffer with the undamped first gradient, and has none without momentum
        damping = self.numbers["dampening"] * (step > 1) * (self.numbers["momentum"] > 0)
        return {**super().at(step, lr), "undamped": 1 - damping}

    def slots(self, p: Tensor) -> Slots:
        return (torch.zeros_like(p),) if self.remembers else ()

    def update(self, p: Tensor, g: Tensor, s: Slots, h: Scalars) -> tuple[Tensor, Slots]:
        g = self.regularise(p, g, h)
        if self.remembers:
            buffer = h["momentum"] * s[0] + h["undamped"] * g
            g = g + h["momentum"] * buffer if self.flag["nesterov"] else buffer
            s = (buffer,)
        return p - h["lr"] * g, s


class Adam(Rule):
    """Kingma & Ba 2015, and Loshchilov & Hutter 2019 where the decay is decoupled (AdamW)."""

    flags = frozenset({"amsgrad", "maximize", "decoupled_weight_decay"})
    reads = ("beta2", "eps")

    def at(self, step: np.ndarray, lr: np.ndarray) -> Numbers:
        n = self.numbers
        return {
            **super().at(step, lr),
            "step_size": lr / (1 - n["beta1"] ** step),
            "correction2": np.sqrt(1 - n["beta2"] ** step),
            "gain1": 1 - n["beta1"],
            "gain2": 1 - n["beta2"],
            "shrink": 1 - lr * n["weight_decay"],
        }

    def slots(self, p: Tensor) -> Slots:
        return tuple(torch.zeros_like(p) for _ in range(3 if self.flag["amsgrad"] else 2))

    def update(self, p: Tensor, g: Tensor, s: Slots, h: Scalars) -> tuple[Tensor, Slots]:
        if self.flag["decoupled_weight_decay"]:
            p = p * h["shrink"]
            g = -g if self.flag["maximize"] else g
        else:
            g = self.regularise(p, g, h)
        mean = s[0] + h["gain1"] * (g - s[0])
        square = h["beta2"] * s[1] + h["gain2"] * g * g
        largest = (torch.maximum(s[2], square),) if self.flag["amsgrad"] else ()
        scale = (largest[0] if largest else square).sqrt() / h["correction2"] + h["eps"]
        return p - h["step_size"] * mean / scale, (mean, square, *largest)


class RMSprop(Rule):
    flags = frozenset({"centered", "maximize"})
    reads = ("alpha", "eps", "momentum")

    def __init__(self, defaults: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(defaults)
        self.remembers = bool(self.numbers["momentum"].any())

    def at(self, step: np.ndarray, lr: np.ndarray) -> Numbers:
        return {**super().at(step, lr), "gain": 1 - self.numbers["alpha"]}

    def slots(self, p: Tensor) -> Slots:
        return tuple(torch.zeros_like(p) for _ in range(1 + self.flag["centered"] + self.remembers))

    def update(self, p: Tensor, g: Tensor, s: Slots, h: Scalars) -> tuple[Tensor, Slots]:
        g = self.regularise(p, g, h)
        square = h["alpha"] * s[0] + h["gain"] * g * g
        kept = [square]
        if self.flag["centered"]:
            mean = s[1] + h["gain"] * (g - s[1])
            kept.append(mean)
            square = square - mean * mean
        g = g / (square.sqrt() + h["eps"])
        if self.remembers:
            g = h["momentum"] * s[-1] + g
            kept.append(g)
        return p - h["lr"] * g, tuple(kept)


class Adagrad(Rule):
    flags = frozenset({"maximize"})
    reads = ("eps",)

    def at(self, step: np.ndarray, lr: np.ndarray) -> Numbers:
        return {**super().at(step, lr), "lr": lr / (1 + (step - 1) * self.numbers["lr_decay"])}

    def slots(self, p: Tensor) -> Slots:
        start = torch.as_tensor(self.numbers["initial_accumulator_value"], dtype=p.dtype)
        return (over(start.to(p.device), p).expand_as(p).clone(),)

    def update(self, p: Tensor, g: Tensor, s: Slots, h: Scalars) -> tuple[Tensor, Slots]:
        g = self.regularise(p, g, h)
        square = s[0] + g * g
        return p - h["lr"] * g / (square.sqrt() + h["eps"]), (square,)


RULES: dict[type[torch.optim.Optimizer], type[Rule]] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: Adam,
    torch.optim.RMSprop: RMSprop,
    torch.optim.Adagrad: Adagrad,
}


# switches of torch's own implementations; a run that sets one gets torch's implementation
SWITCHES = ("foreach", "fused", "capturable", "differentiable")


def rule_for(
    optimizer: type[torch.optim.Optimizer], defaults: Sequence[Mapping[str, Any]]
) -> Rule | None:
    """The stacked rule of an optimizer class, or None: it must take torch's own, run by run."""
    rule = RULES.get(optimizer)
    if rule is None or any(d.get(switch) for d in defaults for switch in SWITCHES):
        return None
    if any(d.get(flag) != defaults[0].get(flag) for d in defaults for flag in rule.flags):
        raise ValueError(f"runs of one stack must share the flags {sorted(rule.flags)}")
    return rule(defaults)


def over(vector: Tensor, p: Tensor) -> Tensor:
    """[K] -> [K, 1, ...], to broadcast over `p` [K, ...]."""
    return vector.view(-1, *(1,) * (p.dim() - 1))


UNSUITED: dict[type[torch.optim.Optimizer], str] = {
    torch.optim.LBFGS: "it evaluates the loss several times a step",
    torch.optim.SparseAdam: "it takes sparse gradients only",
}
