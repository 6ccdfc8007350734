"""The training step against plain PyTorch loops, and what it does not do to weights."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, AdamW, NAdam, RAdam, Rprop

from mnist_exp.data.dataset import Dataset, load
from mnist_exp.training import loop
from mnist_exp.training import step as train_step
from mnist_exp.training.events import Epoch, RunSpec, StackSpec
from mnist_exp.training.models import MLP
from mnist_exp.training.schedules import Constant, Cosine
from mnist_exp.training.stack import Stack
from tests.training.helpers import (
    CLASSES,
    MakeDataset,
    Optimizer,
    assert_weights,
    dropping_mlp,
    fit,
    mlp,
    normalised_mlp,
    plain,
    run,
    seeded,
)


def test_the_seed_recipe_equals_a_plain_loop(tmp_path: Path) -> None:
    """784-64-32-10, SGD 0.1, batch 64: four epochs of 50 steps, the last of 14 images."""
    data = load("mnist", root=None, val_size=0, train_size=3150, split_seed=0, cache=tmp_path)
    own = run(seed=3, lr=0.1)
    trained = fit(lambda: MLP((1, 28, 28), 10), data, [own], epochs=4, batch_size=64)

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(784, 64),
            nn.ReLU(),
            nn.Linear(64, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )

    module = seeded(build, 3)
    losses = plain(module, data, own, SGD, steps=200, batch_size=64)
    assert losses[0] > 2 and losses[-1] < 1
    np.testing.assert_allclose(trained.losses[:, 0], losses, rtol=1e-4, atol=1e-5)
    assert_weights(trained.stack, 0, module)


@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [
        (SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}),
        (Adam, {"lr": 1e-2, "eps": 1e-3}),
        (Adagrad, {"lr": 1e-2, "initial_accumulator_value": 0.1}),
        (NAdam, {"lr": 1e-3}),
        (RAdam, {"lr": 1e-2}),
        (Adadelta, {"lr": 1.0}),
    ],
)
def test_every_optimizer_equals_a_plain_loop(
    optimizer: Optimizer, arguments: dict[str, Any], make_dataset: MakeDataset
) -> None:
    """With a rule or without one, alone and in a stack."""
    data = make_dataset()
    own = RunSpec(1, arguments, Constant(), 0.1)
    other = RunSpec(2, {**arguments, "lr": arguments["lr"] / 10}, Constant())
    module = seeded(mlp, 1)
    losses = plain(module, data, own, optimizer, steps=30)
    alone = fit(mlp, data, [own], optimizer, epochs=3)
    stack = fit(mlp, data, [other, own], optimizer, epochs=3)
    for trained, k in ((alone, 0), (stack, 1)):
        np.testing.assert_allclose(trained.losses[:, k], losses, rtol=1e-4, atol=1e-5)
        assert_weights(trained.stack, k, module)


@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [
        (SGD, {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1}),
        (AdamW, {"lr": 0.01, "weight_decay": 0.5}),
        (AdamW, {"lr": 0.01, "weight_decay": 0.5, "foreach": True}),
        (NAdam, {"lr": 0.01, "weight_decay": 0.1}),
        (Adam, {"lr": 0.01}),
        (Rprop, {"lr": 0.001}),  # has no weight decay
    ],
)
def test_weight_decay_without_norms_equals_two_groups(
    optimizer: Optimizer, arguments: dict[str, Any], make_dataset: MakeDataset
) -> None:
    data, own = make_dataset(), RunSpec(1, arguments, Constant())

    def grouped(params: list[nn.Parameter], **given: Any) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [
            {"params": [p for p in params if p.dim() > 1]},
            {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0},
        ]
        return optimizer(groups, **given)

    module, usual = seeded(normalised_mlp, 1), seeded(normalised_mlp, 1)
    losses = plain(module, data, own, grouped, steps=20)
    others = plain(usual, data, own, optimizer, steps=20)
    assert np.allclose(losses, others, rtol=1e-4) == ("weight_decay" not in arguments)
    for runs in ([own], [RunSpec(0, arguments, Constant()), own]):
        trained = fit(normalised_mlp, data, runs, optimizer, epochs=2, decay_norms=False)
        np.testing.assert_allclose(trained.losses[:, -1], losses, rtol=1e-4, atol=1e-5)
        assert_weights(trained.stack, len(runs) - 1, module)


@pytest.mark.parametrize("optimizer", [SGD, NAdam])
@pytest.mark.parametrize("greatest", [0.1, 0.4])
def test_a_clipped_gradient_equals_torchs(
    greatest: float, optimizer: Optimizer, make_dataset: MakeDataset
) -> None:
    data = make_dataset()
    own = replace(run(1, lr=0.1 if optimizer is SGD else 0.01), clip_norm=greatest)
    module, unclipped = seeded(mlp, 1), seeded(mlp, 1)
    losses = plain(module, data, own, optimizer, steps=30)
    others = plain(unclipped, data, replace(own, clip_norm=None), optimizer, steps=30)
    assert not np.allclose(losses, others, rtol=1e-4)
    for runs in ([own], [run(0, lr=0.01), own]):
        trained = fit(mlp, data, runs, optimizer, epochs=3)
        np.testing.assert_allclose(trained.losses[:, -1], losses, rtol=1e-4, atol=1e-5)
        assert_weights(trained.stack, len(runs) - 1, module)


@pytest.mark.parametrize("optimizer", [SGD, NAdam])
def test_a_gradient_without_a_limit_stays_as_it_is_beside_one_with(
    optimizer: Optimizer, make_dataset: MakeDataset
) -> None:
    """Even where the square of its norm is beyond float32."""

    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(64, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(x.flatten(1)) * 1e22
            return out

    runs = [run(0, lr=1e-22), replace(run(1, lr=1e-22), clip_norm=1.0)]
    for build in (mlp, Steep):
        usual = fit(build, make_dataset(), [runs[0], run(1, lr=1e-22)], optimizer)
        beside = fit(build, make_dataset(), runs, optimizer)
        assert np.array_equal(usual.losses[:, 0], beside.losses[:, 0])
        assert not usual.epochs[0].failed
        expected, found = usual.stack.snapshot(), beside.stack.snapshot()
        for name, tensor in expected.items():
            assert torch.equal(found[name][0], tensor[0])


@pytest.mark.parametrize("optimizer", [SGD, NAdam])
def test_the_schedule_moves_with_every_step(
    optimizer: Optimizer, make_dataset: MakeDataset
) -> None:
    data = make_dataset()
    own = run(0, Cosine(), lr=0.1 if optimizer is SGD else 0.01)
    module = seeded(mlp, 0)
    losses = plain(
        module,
        data,
        own,
        optimizer,
        steps=30,
        schedule=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=30),
    )
    trained = fit(mlp, data, [own], optimizer, epochs=3)
    np.testing.assert_allclose(trained.losses[:, 0], losses, rtol=1e-4, atol=1e-5)
    assert_weights(trained.stack, 0, module)
    # the record of an epoch has the rate of its last step
    peak = own.optimizer["lr"]
    rates = [epoch.metrics[0]["lr"] for epoch in trained.epochs]
    expected = [peak * (1 + math.cos(math.pi * step / 30)) / 2 for step in (9, 19, 29)]
    assert rates == pytest.approx(expected)


def test_two_models_that_torch_knows_specially(make_dataset: MakeDataset) -> None:
    """A frozen layer stays as it was made; a shared weight stays shared."""

    class Special(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fixed = nn.Linear(64, 64).requires_grad_(False)
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
            self.second.weight = self.first.weight
            self.last = nn.Linear(64, CLASSES)
            self.scale = nn.Parameter(torch.tensor(1.0))

        def forward(self, x: Tensor) -> Tensor:
            x = self.fixed(x.flatten(1)).relu()
            out: Tensor = self.last(self.second(self.first(x).relu())) * self.scale
            return out

    data = make_dataset(val=40)
    data = replace(data, val=None)
    own = run(1, lr=0.1, weight_decay=0.01)
    module = seeded(Special, 1)
    fixed = module.get_parameter("fixed.weight").clone()
    plain(module, data, own, SGD, steps=20)
    assert torch.equal(module.get_parameter("fixed.weight"), fixed)
    for runs in ([own], [run(0), own]):
        trained = fit(Special, data, runs, epochs=2)
        model = trained.stack.model(len(runs) - 1)
        assert torch.equal(model.get_parameter("fixed.weight"), fixed)
        assert model.get_parameter("second.weight") is model.get_parameter("first.weight")
        assert_weights(trained.stack, len(runs) - 1, module)


def test_the_order_of_a_run_is_its_own_in_a_stack(
    make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[Tensor] = []
    call = train_step.TrainStep._call

    def record(own: Any, indices: Tensor, *arguments: Any) -> Any:
        chosen.append(indices)
        return call(own, indices, *arguments)

    monkeypatch.setattr(train_step.TrainStep, "_call", record)

    def order(*seeds: int) -> Tensor:
        """[K, 2 epochs * 300]"""
        chosen.clear()
        fit(mlp, make_dataset(), [run(seed) for seed in seeds], epochs=2)
        return torch.cat(chosen, 1)

    stacked = order(4, 9, 4)
    assert torch.equal(stacked[0], stacked[2]) and not torch.equal(stacked[0], stacked[1])
    assert torch.equal(stacked[0], order(4)[0]) and torch.equal(stacked[1], order(9)[0])
    for row in (*stacked[:, :300], *stacked[:, 300:]):
        assert torch.equal(row.sort().values, torch.arange(300))
    assert torch.equal(order(4, 4, 4), order(4))  # gathered once for all


def test_every_step_of_a_run_has_dropout_masks_of_its_own(
    make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Tensor] = []
    call = train_step.TrainStep._call

    def record(own: Any, indices: Tensor, keys: Tensor, *arguments: Any) -> Any:
        found.append(keys)
        return call(own, indices, keys, *arguments)

    monkeypatch.setattr(train_step.TrainStep, "_call", record)

    def keys(*seeds: int) -> list[list[int]]:
        """[K, 2 epochs * 10 steps]"""
        found.clear()
        fit(dropping_mlp, make_dataset(), [run(seed) for seed in seeds], epochs=2)
        rows: list[list[int]] = torch.cat(found).T.tolist()
        return rows

    stacked = keys(4, 9, 4)
    assert len({*stacked[0], *stacked[1]}) == 40
    assert stacked[2] == stacked[0]
    assert keys(4) == stacked[:1]


@pytest.mark.parametrize("optimizer", [SGD, NAdam])
@pytest.mark.parametrize("size", [1, 2])
def test_a_gradient_that_is_not_finite_is_seen_under_a_finite_loss(
    size: int, optimizer: Optimizer, make_dataset: MakeDataset
) -> None:
    class Steep(nn.Module):
        """The square root of 0 is 0, and its slope is infinite."""

        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(64, CLASSES)
            self.steep = nn.Parameter(torch.zeros(CLASSES))
            self.register_buffer("calls", torch.tensor(0))
            self.calls: Tensor

        def forward(self, x: Tensor) -> Tensor:
            self.calls += self.training
            out: Tensor = self.last(x.flatten(1)) + self.steep.sqrt()
            return out

    trained = fit(Steep, make_dataset(), [run(k) for k in range(size)], optimizer, epochs=2)
    assert len(trained.epochs) == 1
    assert np.isfinite(trained.losses[0]).all()
    for k in range(size):
        assert (
            trained.epochs[0]
            .failed[k]
            .startswith(
                "diverged: a gradient, or the update that it leads to, is not finite in epoch 1"
            )
        )
        assert_weights(trained.stack, k, seeded(Steep, k), rtol=0, atol=0)


def test_an_update_that_overflows_is_not_made(make_dataset: Callable[..., Dataset]) -> None:
    """Loss and gradient are finite, what they lead to is not: the weights stay as they were."""
    dataset = make_dataset()
    stack = Stack(lambda: MLP(dataset.shape, len(dataset.classes)), [0], torch.device("cpu"))
    before = stack.snapshot()
    # the gradient alone would be finite, but a decay of 1e30 times a rate of 1e30 is not
    run = RunSpec(0, {"lr": 1e30, "weight_decay": 1e30}, Constant())
    records = list(loop.fit(stack, dataset, [run], StackSpec(torch.optim.SGD, 1, 32)))
    last = records[-1]
    assert isinstance(last, Epoch) and "not finite" in last.failed[0]
    for name, tensor in stack.snapshot().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
