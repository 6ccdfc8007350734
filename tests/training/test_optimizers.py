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

from mnist_exp.training.muon import Muon, orthogonalised
from mnist_exp.training.optimizers import StackedOptimizer, over, stacked_optimizer

PRESETS = [  # of torch's own optimizers
    path
    for path in sorted(Path(__file__).parents[2].glob("conf/optimizer/*.yaml"))
    if "torch.optim" in path.read_text()
]
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


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("decays", [True, False])
def test_muon_equals_torchs_on_matrices_and_adamw_on_the_rest(
    decays: bool, nesterov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 updates of three runs of a stack; a kernel is the matrix of its output channels."""
    # torch iterates in bfloat16, whose rounding would hide all else
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    runs: list[Arguments] = [
        {"lr": 0.02, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.8, "adamw_lr": 0.01},
        {"lr": 0.05, "momentum": 0.0, "betas": (0.8, 0.9), "eps": 0.1, "weight_decay": 0.0},
    ]
    runs = [{"nesterov": nesterov, **run} for run in runs]
    generator = torch.Generator().manual_seed(0)
    shapes = [(5,), (), (4, 6), (7, 3), (5, 5), (4, 3, 2, 2), (9, 2, 1, 2)]
    params = [torch.randn(3, *s, generator=generator, dtype=torch.float64) for s in shapes]
    rule = stacked_rule(Muon, runs)
    assert rule is not None
    states = [rule.initial_state(p) for p in params]
    alone = [
        [nn.Parameter((p[k].flatten(1) if p.dim() > 2 else p[k]).clone()) for p in params]
        for k in range(3)
    ]
    references: list[list[torch.optim.Optimizer]] = []
    peaks = []
    for own, run in zip(alone, runs, strict=True):
        given = Muon(own, **run).defaults
        peaks.append((given["lr"], given["adamw_lr"]))
        decay = given["weight_decay"]
        keys = ("lr", "momentum", "nesterov")
        matrices = torch.optim.Muon(
            [p for p in own if p.dim() > 1], weight_decay=decay, **{key: given[key] for key in keys}
        )
        others = AdamW(
            [p for p in own if p.dim() < 2],
            given["adamw_lr"],
            given["betas"],
            given["eps"],
            decay if decays else 0.0,
        )
        references.append([matrices, others])
    for step in range(1, 21):
        factor = (1 + math.cos(step)) / 2  # of the schedule
        lr = np.array([peak for peak, _ in peaks]) * factor
        numbers = rule.hyperparameters(np.array(step), lr)
        for i, p in enumerate(params):
            g = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            for k in range(3):
                alone[k][i].grad = g[k].reshape(alone[k][i].shape).clone()
            h = {name: over(torch.tensor(v, dtype=p.dtype), p) for name, v in numbers.items()}
            params[i], states[i] = rule.update(p, g, states[i], h, decays or p.dim() > 2)
        for both, rates in zip(references, peaks, strict=True):
            for reference, peak in zip(both, rates, strict=True):
                reference.param_groups[0]["lr"] = peak * factor
                reference.step()
    for i, p in enumerate(params):
        expected = torch.stack([own[i].detach() for own in alone]).reshape(p.shape)
        torch.testing.assert_close(p, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (8, 8)])
def test_orthogonalised_matrices_have_singular_values_of_about_1(shape: tuple[int, int]) -> None:
    basis = torch.linalg.qr(torch.randn(2, 20, 20, generator=torch.Generator().manual_seed(0)))
    left, right = basis.Q[0, : shape[0], :8], basis.Q[1, :8, : shape[1]]
    left, right = torch.linalg.qr(left).Q, torch.linalg.qr(right.T).Q.T
    matrix = left @ torch.logspace(-1, 2, 8).diag() @ right
    values = torch.linalg.svdvals(orthogonalised(torch.stack([matrix, 1e-3 * matrix])))
    assert values.min() > 0.3 and values.max() < 1.3
    assert orthogonalised(torch.zeros(1, *shape)).isfinite().all()
