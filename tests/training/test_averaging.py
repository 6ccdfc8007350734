"""Averages of the weights, against torch's AveragedModel and against runs without one."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, NAdam
from torch.optim.swa_utils import AveragedModel

from mnist_exp.training import metrics
from mnist_exp.training.averaging import initial_average, updated_average
from mnist_exp.training.events import RunSpec
from mnist_exp.training.schedules import Cosine, Step
from mnist_exp.training.stack import Stack
from tests.training.helpers import (
    CPU,
    Build,
    MakeDataset,
    Optimizer,
    assert_equals_alone,
    assert_scaled,
    assert_weights,
    dropping_cnn,
    dropping_mlp,
    fit,
    mlp,
    normalised_mlp,
    plain,
    run,
    seeded,
)


def averaged(own: RunSpec, horizon: float | None) -> RunSpec:
    return replace(own, ema=horizon)


@pytest.mark.parametrize("horizon", [0.05, 0.3, 2.0])
@pytest.mark.parametrize(
    ("build", "optimizer", "lr"), [(mlp, SGD, 0.1), (normalised_mlp, SGD, 0.1), (mlp, NAdam, 0.01)]
)
def test_an_average_equals_torchs(
    build: Build, optimizer: Optimizer, lr: float, horizon: float, make_dataset: MakeDataset
) -> None:
    data, own = make_dataset(), averaged(run(1, lr=lr), horizon)
    module = seeded(build, 1)

    def average(old: Tensor, newest: Tensor, step: Tensor | int) -> Tensor:
        decay = min(1 - 1 / max(1, horizon * 10), (1 + int(step)) / (10 + int(step)))
        return decay * old + (1 - decay) * newest if old.is_floating_point() else newest

    expected = AveragedModel(module, avg_fn=average, use_buffers=True)
    expected.update_parameters(module)  # the first time it copies
    plain(module, data, own, optimizer, 30, after_step=lambda: expected.update_parameters(module))
    for runs in ([own], [run(0, lr=lr), own]):
        trained = fit(build, data, runs, optimizer, epochs=3)
        assert_weights(trained.stack, len(runs) - 1, expected.module)
    if horizon > 0.1:  # and it is another model than the newest
        with pytest.raises(AssertionError):
            assert_weights(trained.stack, 1, module)


@pytest.mark.parametrize(
    ("build", "optimizer"), [(dropping_mlp, SGD), (dropping_cnn, Adam), (dropping_mlp, NAdam)]
)
def test_a_run_of_a_stack_equals_the_run_alone(
    build: Build, optimizer: Optimizer, make_dataset: MakeDataset
) -> None:
    data = make_dataset(val=70)
    runs = [
        averaged(run(0, lr=0.01), 0.5),
        run(1, lr=0.02),
        averaged(run(2, Cosine(), lr=0.01), 3.0),
    ]
    together = fit(build, data, runs, optimizer, epochs=3)
    for k, own in enumerate(runs):
        assert_equals_alone(together, k, fit(build, data, [own], optimizer, epochs=3))


@pytest.mark.parametrize("optimizer", [SGD, NAdam])
def test_a_run_without_an_average_is_the_same_beside_one(
    optimizer: Optimizer, make_dataset: MakeDataset
) -> None:
    """To the bit; a horizon of less than a step is none."""
    data = make_dataset(val=70)
    runs = [run(0, lr=0.01), run(1, lr=0.02), run(2, lr=0.01)]
    usual = fit(dropping_cnn, data, runs, optimizer, epochs=3)
    beside = fit(
        dropping_cnn,
        data,
        [runs[0], averaged(runs[1], 1e-3), averaged(runs[2], 1.0)],
        optimizer,
        epochs=3,
    )
    assert np.array_equal(usual.losses, beside.losses)  # training knows nothing of averages
    expected, found = usual.stack.snapshot(), beside.stack.snapshot()
    for name, tensor in expected.items():
        assert torch.equal(found[name][:2], tensor[:2])
    assert not torch.equal(found["0.weight"][2], expected["0.weight"][2])
    for ours, theirs in zip(beside.epochs, usual.epochs, strict=True):
        for k in (0, 1):
            assert ours.metrics[k]["val/loss"] == theirs.metrics[k]["val/loss"]


def test_the_average_is_evaluated_and_chosen(make_dataset: MakeDataset) -> None:
    data = make_dataset(val=70)
    assert data.val is not None
    own = averaged(run(0, lr=1.5), 1.0)
    trained = fit(normalised_mlp, data, [own], epochs=8)
    accuracies, others = [], []
    for epoch, raw in zip(trained.epochs, trained.after, strict=True):
        (scores,) = metrics.score(metrics.predict(epoch.stack, data, data.val), data.val, "val")
        assert scores["val/loss"] == epoch.metrics[0]["val/loss"]
        accuracies.append(scores["val/accuracy"])
        newest = epoch.stack.with_tensors(raw)
        (scores,) = metrics.score(metrics.predict(newest, data, data.val), data.val, "val")
        others.append(scores["val/accuracy"])
    best = int(np.argmax(accuracies))
    assert best != int(np.argmax(others))  # else nothing is tested
    assert [epoch.improved[0] for epoch in trained.epochs][best:] == [True] + [False] * (7 - best)
    for name, tensor in trained.epochs[best].stack.snapshot().items():
        assert torch.equal(trained.stack.snapshot()[name], tensor), name


@pytest.mark.parametrize("optimizer", [SGD, NAdam])
def test_a_run_that_diverges_keeps_its_last_finite_average(
    optimizer: Optimizer, make_dataset: MakeDataset
) -> None:
    explodes = Step(every_epochs=1.0, gamma=1e30)
    runs = [averaged(run(0, lr=0.01), 1.0), averaged(run(1, explodes), 1.0)]
    data = make_dataset(val=70)
    together = fit(mlp, data, runs, optimizer, epochs=3)
    assert "epoch 2, step 2 of 10" in together.epochs[1].failed[1]
    weights = together.stack.model(1).state_dict()
    assert all(t.isfinite().all() for t in weights.values())
    alone = fit(mlp, data, runs[1:], optimizer, epochs=3)
    assert_scaled(weights, alone.stack.model(0).state_dict())
    assert_equals_alone(together, 0, fit(mlp, data, runs[:1], optimizer, epochs=3))


def test_a_model_of_half_precision_has_an_exact_average() -> None:
    """In bfloat16, changes of a five hundredth would leave it where it is."""
    stack = Stack(lambda: nn.Linear(4, 3, dtype=torch.bfloat16), [0], CPU)
    average, newest = initial_average(stack), {n: t + 1 for n, t in stack.params.items()}
    for _ in range(500):
        average = updated_average(average, newest, torch.tensor([1 / 500]))
    for name, tensor in stack.with_tensors(average).params.items():
        assert tensor.dtype == torch.bfloat16
        expected = stack.params[name] + 1 - 0.998**500
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0.02)
