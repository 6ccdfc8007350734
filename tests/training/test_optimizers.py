"""Stacked optimizers against torch.optim."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, AdamW, NAdam, RAdam, RMSprop

from mnist_exp.training.optimizers import StackedOptimizer, over, stacked_optimizer

PRESETS = sorted(Path(__file__).parents[2].glob("conf/optimizer/*.yaml"))
SHAPES = [(), (5,), (4, 3), (2, 3, 3, 2)]
Arguments = dict[str, Any]
Optimizer = type[torch.optim.Optimizer]


def preset(path: Path) -> tuple[Optimizer, Arguments]:
    arguments: Any = OmegaConf.to_container(OmegaConf.load(path))
    return getattr(torch.optim, arguments.pop("_target_").rpartition(".")[2]), arguments


def stacked_rule(optimizer: Optimizer, runs: Sequence[Arguments]) -> StackedOptimizer | None:
    """The rule of a stack, with torch's defaults where a run says nothing."""
    dummy = nn.Parameter(torch.zeros(2))
    return stacked_optimizer(optimizer, [optimizer([dummy], **run).defaults for run in runs])


def assert_equals_torch(
    optimizer: Optimizer, runs: Sequence[Arguments], dtype: torch.dtype
) -> None:
    """50 updates of a stack, and of one torch.optim instance a run, on the same gradients.

    In float64 the two must agree to its rounding errors, so that a number in the wrong place shows
    however small it is. In float32, as in use, 50 updates of weights of about 1 may be off by some
    rounding errors of 6e-8 each.
    """
    tolerance = {torch.float64: (1e-10, 1e-12), torch.float32: (1e-5, 2e-6)}[dtype]
    generator = torch.Generator().manual_seed(0)
    rule = stacked_rule(optimizer, runs)
    assert rule is not None
    size = len(runs)
    params = [torch.randn(size, *s, generator=generator, dtype=dtype) for s in SHAPES]
    alone = [[nn.Parameter(p[k].clone()) for p in params] for k in range(size)]
    references = [optimizer(own, **run) for own, run in zip(alone, runs, strict=True)]
    slots = [rule.initial_state(p) for p in params]
    peaks = np.array([reference.defaults["lr"] for reference in references])
    for step in range(1, 51):
        lr = peaks * (1 + math.cos(step)) / 2
        numbers = {
            n: torch.tensor(v, dtype=dtype)
            for n, v in rule.hyperparameters(np.array(step), lr).items()
        }
        for i, p in enumerate(params):
            g = torch.randn(p.shape, generator=generator, dtype=dtype)
            for k in range(size):
                alone[k][i].grad = g[k].clone()
            h = {name: over(vector, p) for name, vector in numbers.items()}
            params[i], slots[i] = rule.update(p, g, slots[i], h)
        for k, reference in enumerate(references):
            reference.param_groups[0]["lr"] = lr[k]
            reference.step()
    for i, p in enumerate(params):
        expected = torch.stack([own[i].detach() for own in alone])
        torch.testing.assert_close(p, expected, rtol=tolerance[0], atol=tolerance[1])


def test_the_presets_are_found() -> None:
    assert {"sgd", "adam"} <= {path.stem for path in PRESETS}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_equals_torch(path: Path, dtype: torch.dtype) -> None:
    optimizer, given = preset(path)
    other = {"lr": given["lr"] * 3, "weight_decay": 0.1}
    third = {"lr": given["lr"] / 3}
    if "betas" in given:
        other["betas"], third["betas"] = (0.8, 0.95), (0.5, 0.99)
    if given.get("momentum"):
        other["momentum"] = 0.5
    if "alpha" in given:
        other["alpha"] = 0.9
    assert_equals_torch(optimizer, [given, {**given, **other}, {**given, **third}], dtype)


# A large eps, where a class has one, as the usual ones are too small to be seen in the result.
VARIANTS: dict[str, tuple[Optimizer, Arguments, list[Arguments]]] = {
    "momentum, and none": (
        SGD,
        {"lr": 0.1},
        [{"momentum": 0.9}, {"momentum": 0.0}, {"momentum": 0.5, "weight_decay": 0.1}],
    ),
    "dampening": (
        SGD,
        {"lr": 0.1, "momentum": 0.9},
        [{"dampening": 0.0}, {"dampening": 0.5}, {"dampening": 0.9, "weight_decay": 0.1}],
    ),
    "dampening without momentum": (
        SGD,
        {"lr": 0.1, "dampening": 0.5},
        [{"momentum": 0.0}, {"momentum": 0.9}, {"momentum": 0.0, "lr": 0.01}],
    ),
    "nesterov": (
        SGD,
        {"nesterov": True},
        [
            {"lr": 0.1, "momentum": 0.9},
            {"lr": 0.2, "momentum": 0.5, "weight_decay": 0.1},
            {"lr": 0.05, "momentum": 0.99},
        ],
    ),
    "sgd maximize": (
        SGD,
        {"maximize": True, "momentum": 0.9},
        [{"lr": 0.1}, {"lr": 0.1, "weight_decay": 0.1}, {"lr": 0.01, "momentum": 0.5}],
    ),
    "adam": (
        Adam,
        {},
        [
            {"lr": 0.1, "betas": (0.9, 0.999), "eps": 0.1},
            {"lr": 0.01, "betas": (0.5, 0.9), "eps": 1e-8, "weight_decay": 0.1},
            {"lr": 0.03, "betas": (0.0, 0.99), "eps": 0.01},
        ],
    ),
    "adam, integers": (Adam, {}, [{"lr": 1}, {"lr": 0.1, "weight_decay": 1}]),
    "adam amsgrad": (
        Adam,
        {"amsgrad": True, "lr": 0.1},
        [{"betas": (0.9, 0.5)}, {"betas": (0.5, 0.2), "weight_decay": 0.1}, {"eps": 0.1}],
    ),
    "adam maximize": (
        Adam,
        {"maximize": True, "lr": 0.1},
        [{}, {"weight_decay": 0.1}, {"betas": (0.5, 0.9)}],
    ),
    "adam, decoupled decay": (
        Adam,
        {"decoupled_weight_decay": True, "lr": 0.1},
        [{"weight_decay": 0.0}, {"weight_decay": 0.1}, {"weight_decay": 0.5}],
    ),
    "adamw": (
        AdamW,
        {"lr": 0.1},
        [
            {"weight_decay": 0.5, "eps": 0.1},
            {"weight_decay": 0.0, "betas": (0.5, 0.9)},
            {"lr": 0.01, "weight_decay": 1.0},
        ],
    ),
    "adamw amsgrad maximize": (
        AdamW,
        {"amsgrad": True, "maximize": True, "lr": 0.1},
        [{"weight_decay": 0.5}, {"betas": (0.9, 0.5)}, {"lr": 0.01}],
    ),
    "rmsprop": (
        RMSprop,
        {"lr": 0.05},
        [{"alpha": 0.5, "eps": 0.1}, {"alpha": 0.9, "weight_decay": 0.1}, {"alpha": 0.99}],
    ),
    "rmsprop centered": (
        RMSprop,
        {"centered": True, "lr": 0.05},
        [{"alpha": 0.9, "eps": 0.1}, {"alpha": 0.95, "eps": 0.01}, {"weight_decay": 0.1}],
    ),
    "rmsprop centered, momentum": (
        RMSprop,
        {"centered": True, "lr": 0.05, "eps": 0.01},
        [{"momentum": 0.9}, {"momentum": 0.0}, {"momentum": 0.5, "weight_decay": 0.1}],
    ),
    "rmsprop maximize, momentum": (
        RMSprop,
        {"maximize": True, "lr": 0.05},
        [{"momentum": 0.9}, {"momentum": 0.5, "weight_decay": 0.1}, {"alpha": 0.5}],
    ),
    "adagrad": (
        Adagrad,
        {"lr": 0.1},
        [
            {"lr_decay": 0.1, "initial_accumulator_value": 0.5},
            {"lr_decay": 0.0, "initial_accumulator_value": 2.0, "weight_decay": 0.1},
            {"lr_decay": 0.5, "eps": 0.1},
        ],
    ),
    "adagrad maximize": (
        Adagrad,
        {"maximize": True, "lr": 0.1},
        [{}, {"weight_decay": 0.1}, {"lr_decay": 0.1}],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_variant_equals_torch(name: str, dtype: torch.dtype) -> None:
    optimizer, shared, runs = VARIANTS[name]
    assert_equals_torch(optimizer, [{**shared, **run} for run in runs], dtype)


@pytest.mark.parametrize(
    ("optimizer", "flag", "given"),
    [
        (SGD, "nesterov", {"momentum": 0.9}),
        (SGD, "maximize", {}),
        (Adam, "amsgrad", {}),
        (AdamW, "maximize", {}),
        (RMSprop, "centered", {}),
        (Adagrad, "maximize", {}),
    ],
)
def test_runs_with_different_flags_are_refused(
    optimizer: Optimizer, flag: str, given: Arguments
) -> None:
    with pytest.raises(ValueError, match=flag):
        stacked_rule(optimizer, [given, {**given, flag: True}])
    assert stacked_rule(optimizer, [{**given, flag: True}] * 2) is not None


@pytest.mark.parametrize("optimizer", [NAdam, RAdam, Adadelta])
def test_other_classes_have_no_rule(optimizer: Optimizer) -> None:
    assert stacked_rule(optimizer, [{}]) is None


def test_a_subclass_has_no_rule() -> None:
    class Changed(SGD):
        pass

    assert stacked_rule(Changed, [{}]) is None


@pytest.mark.parametrize("switch", ["foreach", "fused", "capturable", "differentiable"])
def test_torchs_own_implementations_have_no_rule(switch: str) -> None:
    assert stacked_rule(Adam, [{}, {}]) is not None
    assert stacked_rule(Adam, [{}, {switch: True}]) is None
    assert stacked_rule(Adam, [{}, {switch: False}]) is not None
