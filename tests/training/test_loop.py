"""The core against plain PyTorch loops, and the runs of a stack against themselves alone."""

import importlib
import math
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, AdamW, NAdam, RAdam, RMSprop

from mnist_exp.data.dataset import Dataset, Split, load
from mnist_exp.training import compile as compile_step
from mnist_exp.training import loop as training
from mnist_exp.training import metrics
from mnist_exp.training import step as train_step
from mnist_exp.training.events import Epoch, Message, Progress, RunSpec
from mnist_exp.training.metrics import MetricSums
from mnist_exp.training.models import CNN, MLP
from mnist_exp.training.schedules import Constant, Cosine, OneCycle, Schedule, Step
from mnist_exp.training.stack import Stack

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SHAPE, CLASSES = (1, 8, 8), 4
BATCH = 32
Build = Callable[[], nn.Module]
MakeDataset = Callable[..., Dataset]
Optimizer = type[torch.optim.Optimizer]


@dataclass
class Trained:
    stack: Stack
    epochs: list[Epoch]
    losses: np.ndarray  # [all steps, K]
    notices: list[str]
    after: list[dict[str, Tensor]]  # the stack's tensors when each epoch was yielded


def fit(
    build: Build,
    data: Dataset,
    runs: Sequence[RunSpec],
    optimizer: Optimizer = SGD,
    *,
    epochs: int = 1,
    batch_size: int = BATCH,
    compiled: bool = False,
) -> Trained:
    stack = Stack(build, [run.seed for run in runs], CPU)
    trained = Trained(stack, [], np.zeros((0, len(runs))), [], [])
    for record in training.fit(
        stack, data, runs, optimizer, epochs=epochs, batch_size=batch_size, compiled=compiled
    ):
        if isinstance(record, Progress):
            losses = np.full((len(record.losses), len(runs)), np.nan)
            losses[:, record.active] = record.losses
            trained.losses = np.concatenate([trained.losses, losses])
        elif isinstance(record, Message):
            trained.notices.append(record.text)
        else:
            trained.epochs.append(record)
            trained.after.append(stack.snapshot())
    return trained


def run(
    seed: int = 0, schedule: Schedule | None = None, smoothing: float = 0.0, **kw: Any
) -> RunSpec:
    return RunSpec(seed, {"lr": 0.1, **kw}, schedule or Constant(), smoothing)


def plain(
    module: nn.Module,
    data: Dataset,
    run: RunSpec,
    optimizer: Optimizer,
    steps: int,
    *,
    batch_size: int = BATCH,
    schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
) -> list[float]:
    """The same run as anyone would write it; batches are taken in the order of the core's."""
    updates = optimizer([p for p in module.parameters() if p.requires_grad], **run.optimizer)
    scheduler = schedule(updates) if schedule else None
    images = (data.train.images / 255 - data.mean) / data.std
    count = len(data.train)
    losses: list[float] = []
    for epoch in range(steps):
        order = training._order(run.seed, epoch, count)
        for start in range(0, count, batch_size):
            if len(losses) == steps:
                return losses
            chosen = order[start : start + batch_size]
            updates.zero_grad()
            logits = module(images[chosen])
            loss = F.cross_entropy(
                logits, data.train.labels[chosen], label_smoothing=run.label_smoothing
            )
            loss.backward()
            updates.step()
            if scheduler is not None:
                scheduler.step()
            losses.append(loss.item())
    return losses


def seeded(build: Build, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def assert_weights(
    stack: Stack, k: int, expected: nn.Module | Stack, rtol: float = 1e-4, atol: float = 1e-5
) -> None:
    """Parameters and buffers of run k are those of `expected` (a stack: its only run)."""
    module = expected if isinstance(expected, nn.Module) else expected.model(0)
    torch.testing.assert_close(
        stack.model(k).state_dict(), dict(module.state_dict()), rtol=rtol, atol=atol
    )


def assert_equals_alone(
    together: Trained, k: int, alone: Trained, rtol: float = 1e-4, atol: float = 1e-5
) -> None:
    """Losses, metrics (what takes time apart), weights and buffers."""
    steps = len(alone.losses)
    np.testing.assert_allclose(together.losses[:steps, k], alone.losses[:, 0], rtol=rtol, atol=atol)
    for ours, its in zip(together.epochs, alone.epochs, strict=False):
        assert ours.improved[k] == its.improved[0]
        assert ours.metrics[k].keys() == its.metrics[0].keys()
        for name, value in its.metrics[0].items():
            if name not in ("epoch_seconds", "images_per_second"):
                assert ours.metrics[k][name] == pytest.approx(value, rel=rtol, abs=atol), name
    assert_weights(together.stack, k, alone.stack, rtol, atol)


def assert_scaled(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Close as measured by a tensor's largest value: what remains where values are huge."""
    assert tensors.keys() == expected.keys()
    for name, t in expected.items():
        scale = t.abs().max().double()
        torch.testing.assert_close(tensors[name] / scale, t / scale, rtol=1e-3, atol=1e-3)


def mlp() -> nn.Module:
    return MLP(SHAPE, CLASSES, hidden=(16, 8))


def dropping_mlp() -> nn.Module:
    return MLP(SHAPE, CLASSES, hidden=(16, 8), dropout=0.2)


def cnn() -> nn.Module:
    return CNN(SHAPE, CLASSES, channels=(4, 6), hidden=8, dropout=0.25)


class Functional(nn.Module):
    """Dropout of channels as a module, of units as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2)
        self.channels = nn.Dropout2d(0.25)
        self.last = nn.Linear(36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.channels(self.conv(x)).relu().flatten(1)
        out: Tensor = self.last(F.dropout(x, 0.5, self.training))
        return out


# ---- a run of a stack is the run alone -----------------------------------------------------------

STACKS: dict[str, tuple[Build, Optimizer, list[RunSpec]]] = {
    "mlp, everything different": (
        mlp,
        SGD,
        [
            run(0, lr=0.1, momentum=0.0),
            run(1, Cosine(warmup_epochs=0.5), 0.1, lr=0.3, momentum=0.5, weight_decay=1e-2),
            run(2, OneCycle(), 0.3, lr=0.05, momentum=0.9),
        ],
    ),
    "mlp with dropout, only the seed different": (
        dropping_mlp,
        SGD,
        [run(seed, lr=0.1) for seed in (5, 6, 7)],
    ),
    "batch normalisation and dropout": (
        cnn,
        SGD,
        [
            run(0, lr=0.1),
            run(1, Step(every_epochs=1.5), lr=0.05, momentum=0.9, weight_decay=1e-3),
            run(0, lr=0.02, smoothing=0.1),
        ],
    ),
    "batch normalisation and dropout, AdamW": (
        cnn,
        AdamW,
        [run(0, lr=1e-3), run(1, Cosine(), lr=3e-3, betas=(0.8, 0.95)), run(2, lr=1e-2, eps=1e-3)],
    ),
    "functional dropout": (
        Functional,
        RMSprop,
        [run(0, lr=1e-3, eps=1e-3), run(1, lr=3e-3, momentum=0.5, eps=1e-3), run(0, lr=1e-2)],
    ),
    "an optimizer without a rule": (
        dropping_mlp,
        NAdam,
        [run(0, lr=1e-3), run(1, Cosine(), lr=3e-3), run(2, lr=1e-3, weight_decay=0.1)],
    ),
}


@pytest.mark.parametrize("validation", [0, 70])
@pytest.mark.parametrize("name", STACKS)
def test_a_run_of_a_stack_equals_the_run_alone(
    name: str, validation: int, make_dataset: MakeDataset
) -> None:
    build, optimizer, runs = STACKS[name]
    data = make_dataset(val=validation)
    together = fit(build, data, runs, optimizer, epochs=3)
    assert together.losses.shape == (30, len(runs))
    for k, own in enumerate(runs):
        assert_equals_alone(together, k, fit(build, data, [own], optimizer, epochs=3))
    # and the runs are different ones
    last = together.losses[-1]
    assert len({round(float(loss), 3) for loss in last}) == len(runs)


def test_batch_normalisation_counts_its_batches(make_dataset: MakeDataset) -> None:
    trained = fit(cnn, make_dataset(), [run(0), run(1)], epochs=2)
    assert trained.stack.buffers["1.num_batches_tracked"].tolist() == [20, 20]


# ---- a run is what a plain loop computes ---------------------------------------------------------


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


# ---- seeds and data ------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [mlp, cnn])
def test_a_config_gives_the_same_bits_again_and_another_seed_others(
    build: Build, make_dataset: MakeDataset
) -> None:
    data = make_dataset(val=40)
    state = torch.get_rng_state()
    first = fit(build, data, [run(0)], epochs=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)  # whatever else draws numbers
    again = fit(build, data, [run(0)], epochs=2)
    other = fit(build, data, [run(1)], epochs=2)
    weights, same, others = (t.stack.snapshot() for t in (first, again, other))
    assert all(torch.equal(weights[n], same[n]) for n in weights)
    assert np.array_equal(first.losses, again.losses)
    assert not any(torch.equal(weights[n], others[n]) for n in first.stack.params)


def indexed(count: int, start: int) -> Split:
    """Images whose first two pixels are their number, counted from `start`."""
    number = torch.arange(start, start + count)
    images = torch.zeros(count, *SHAPE, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = number // 256, number % 256
    return Split(images, number % CLASSES)


def test_an_epoch_is_every_training_image_once(make_dataset: MakeDataset) -> None:
    """And no other; validation sees its own, once, and nothing sees the test set."""
    train, val, test = indexed(300, 0), indexed(70, 1000), indexed(50, 2000)
    data = replace(make_dataset(), train=train, val=val, test=test)
    seen: dict[bool, list[list[int]]] = {True: [], False: []}  # training -> batches

    class Witness(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(64, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            pixels = (x.flatten(1)[:, :2] * data.std + data.mean).mul(255).round().long()
            seen[self.training].append((pixels[:, 0] * 256 + pixels[:, 1]).tolist())
            out: Tensor = self.last(x.flatten(1))
            return out

    def epochs(seed: int, count: int) -> list[list[int]]:
        """The training images of each epoch, in order."""
        seen[True].clear()
        seen[False].clear()
        fit(Witness, data, [run(seed)], epochs=count)
        assert [len(b) for b in seen[True]] == ([32] * 9 + [12]) * count
        assert sorted(i for b in seen[False] for i in b) == sorted([*range(1000, 1070)] * count)
        train = [i for b in seen[True] for i in b]
        return [train[e * 300 : e * 300 + 300] for e in range(count)]

    first, second, third = epochs(seed=0, count=3)
    other = epochs(seed=1, count=1)[0]
    for order in (first, second, third, other):
        assert sorted(order) == list(range(300))
    orders = {tuple(order) for order in (first, second, third, other, range(300))}
    assert len(orders) == 5
    assert epochs(seed=0, count=2) == [first, second]


def test_the_order_of_a_run_is_its_own_in_a_stack(
    make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[Tensor] = []
    gather = train_step.TrainStep._gather

    def record(own: Any, images: Tensor, labels: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        chosen.append(order)
        return gather(own, images, labels, order)

    monkeypatch.setattr(train_step.TrainStep, "_gather", record)

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
    gradients = Stack.gradients

    def record(stack: Stack, *arguments: Any) -> Any:
        found.append(arguments[4])
        return gradients(stack, *arguments)

    monkeypatch.setattr(Stack, "gradients", record)

    def keys(*seeds: int) -> list[list[int]]:
        """[K, 2 epochs * 10 steps]"""
        found.clear()
        fit(dropping_mlp, make_dataset(), [run(seed) for seed in seeds], epochs=2)
        rows: list[list[int]] = torch.stack(found, 1).tolist()
        return rows

    stacked = keys(4, 9, 4)
    assert len({*stacked[0], *stacked[1]}) == 40
    assert stacked[2] == stacked[0]
    assert keys(4) == stacked[:1]


# ---- metrics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("size", [1, 3])
def test_metrics_are_exact_over_uneven_batches(
    size: int, smoothing: float, make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of models that stand still: 257 training images in batches of 64, the last of one."""
    monkeypatch.setattr(metrics, "EVALUATION_BATCH", 32)  # for 70 images 32, 32 and 6
    data = make_dataset(train=257, val=70)
    runs = [run(seed, lr=0.0, smoothing=smoothing) for seed in range(size)]
    trained = fit(mlp, data, runs, batch_size=64)
    assert trained.losses.shape == (5, size)
    for k in range(size):
        module = seeded(mlp, k)
        found = trained.epochs[0].metrics[k]
        for split, name, smooth in ((data.train, "train", smoothing), (data.val, "val", 0.0)):
            assert split is not None
            logits = module((split.images / 255 - data.mean) / data.std).detach().double()
            loss = F.cross_entropy(logits, split.labels, label_smoothing=smooth).item()
            correct = int((logits.argmax(1) == split.labels).sum())
            assert found[f"{name}/loss"] == pytest.approx(loss, rel=1e-6)
            assert found[f"{name}/accuracy"] == correct / len(split)
        # what the mean over batches would have been is another number
        assert abs(trained.losses[:, k].mean() / found["train/loss"] - 1) > 1e-4


def test_sums_keep_what_float32_would_lose() -> None:
    sums = MetricSums(2)
    small = np.array([0.1, 0.2], dtype=np.float32)
    sums.add(np.array([2.0**24, 2.0**24], dtype=np.float32), np.array([1, 2]), 3)
    for _ in range(1000):
        sums.add(small, np.array([0, 1]), 1)
    total = [2**24 + 1000 * float(v) for v in small]
    means = sums.means("x")
    assert [m["x/loss"] for m in means] == pytest.approx([t / 1003 for t in total], rel=1e-12)
    assert [m["x/accuracy"] for m in means] == [1 / 1003, 1002 / 1003]


def test_an_epoch_tells_how_long_it_took(make_dataset: MakeDataset) -> None:
    data = make_dataset(val=40)
    trained = fit(mlp, data, [run(0), run(1)], epochs=2)
    names = {"train/loss", "train/accuracy", "val/loss", "val/accuracy"}
    for i, record in enumerate(trained.epochs):
        assert record.epoch == i + 1
        assert record.failed == {}
        for own in record.metrics:
            assert own.keys() == names | {"lr", "epoch_seconds", "images_per_second"}
            training_seconds = len(data.train) / own["images_per_second"]
            assert 0 < training_seconds <= own["epoch_seconds"] < 60


def test_progress_tells_where_an_epoch_stands(
    make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "STEPS_PER_SYNC", 4)
    stack = Stack(mlp, [0, 1], CPU)
    records = training.fit(stack, make_dataset(), [run(0), run(1)], SGD, epochs=2, batch_size=BATCH)
    stands = [r for r in records if isinstance(r, Progress)]
    assert {p.steps for p in stands} == {10}
    for epoch in (1, 2):
        own = [p for p in stands if p.epoch == epoch]
        assert [p.step for p in own] == np.cumsum([len(p.losses) for p in own]).tolist()
        assert [p.step for p in own] == [4, 8, 10]
        assert [p.images for p in own] == [4 * BATCH, 4 * BATCH, 300 - 8 * BATCH]
    assert {p.losses.shape[1] for p in stands} == {2}
    assert {tuple(p.active) for p in stands} == {(0, 1)}


# ---- validation chooses --------------------------------------------------------------------------


def test_validation_chooses_the_epoch(make_dataset: MakeDataset) -> None:
    """With few validation images there are ties, and the earlier of equals is taken."""
    data = make_dataset(val=20)
    runs = [run(seed, lr=lr) for seed, lr in ((0, 0.003), (1, 0.3), (0, 0.5), (1, 1.2), (0, 2.0))]
    trained = fit(mlp, data, runs, epochs=8)
    best, ties, recoveries = [], 0, 0
    for k in range(len(runs)):
        accuracies = [epoch.metrics[k]["val/accuracy"] for epoch in trained.epochs]
        best.append(int(np.argmax(accuracies)))  # the first of equals
        ties += accuracies.count(max(accuracies)) > 1
        rises = [i for i in range(1, 8) if accuracies[i] > accuracies[i - 1]]
        recoveries += any(accuracies[i] < max(accuracies[:i]) for i in rises)
        records = [a > max(accuracies[:i], default=-1) for i, a in enumerate(accuracies)]
        assert [epoch.improved[k] for epoch in trained.epochs] == records
        chosen = {n: t[k] for n, t in trained.stack.snapshot().items()}
        for n, t in trained.after[best[k]].items():
            assert torch.equal(chosen[n], t[k]), n
    # what could go wrong has happened
    assert ties and recoveries and any(0 < epoch < 7 for epoch in best) and len(set(best)) > 1


def test_without_validation_the_last_epoch_is_kept(make_dataset: MakeDataset) -> None:
    trained = fit(mlp, make_dataset(), [run(0), run(1)], epochs=3)
    assert [epoch.improved for epoch in trained.epochs] == [[True, True]] * 3
    final = trained.stack.snapshot()
    assert all(torch.equal(final[n], t) for n, t in trained.after[-1].items())
    assert not any(torch.equal(final[n], t) for n, t in trained.after[-2].items())


# ---- divergence ----------------------------------------------------------------------------------

# From epoch 2 the rate is 1e29: its first update is finite, and what it makes of the images is not.
EXPLODES = Step(every_epochs=1.0, gamma=1e30)


@pytest.mark.parametrize("validation", [0, 70])
@pytest.mark.parametrize(
    ("build", "optimizer", "given"),
    [(mlp, SGD, {}), (cnn, Adam, {"eps": 1e-3}), (cnn, NAdam, {"eps": 1e-3})],
)
def test_a_run_that_diverges_stops_before_the_update(
    build: Build,
    optimizer: Optimizer,
    given: dict[str, Any],
    validation: int,
    make_dataset: MakeDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        training, "STEPS_PER_SYNC", 4
    )  # it is looked at again after it has diverged
    data = make_dataset(val=validation)
    runs = [run(0, lr=0.01, **given), run(1, EXPLODES, **given), run(2, lr=0.02, **given)]
    together = fit(build, data, runs, optimizer, epochs=3)
    assert [list(epoch.failed) for epoch in together.epochs] == [[], [1], []]
    reason = together.epochs[1].failed[1]
    assert reason.startswith("diverged: the training loss is ")
    assert "in epoch 2, step 2 of 10, at a learning rate of 1e+29" in reason
    assert together.epochs[0].metrics[1] and not together.epochs[1].metrics[1]
    assert not together.epochs[2].metrics[1] and not together.epochs[2].improved[1]
    # its weights and buffers are those after the last update: of 11 batches, and finite
    model = together.stack.model(1)
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())
    if build is cnn:
        assert together.stack.buffers["1.num_batches_tracked"].tolist()[1] == 11
    assert max(p.abs().max() for p in model.parameters()) > 1e20
    # alone it ends there; the others go on as if alone
    alone = fit(build, data, [runs[1]], optimizer, epochs=3)
    assert [epoch.failed for epoch in alone.epochs] == [{}, {0: reason}]
    assert not np.isfinite(alone.losses[11, 0])
    assert_scaled(model.state_dict(), alone.stack.model(0).state_dict())
    for k in (0, 2):
        assert_equals_alone(together, k, fit(build, data, [runs[k]], optimizer, epochs=3))


@pytest.mark.parametrize("size", [1, 2])
def test_a_stack_of_runs_that_all_diverged_ends(
    size: int, make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the next look at what the steps have brought, not at the end of the epoch."""
    monkeypatch.setattr(training, "STEPS_PER_SYNC", 4)
    runs = [run(0, EXPLODES), run(1, Step(every_epochs=0.5, gamma=1e30))][:size]
    trained = fit(mlp, make_dataset(), runs, epochs=5)
    assert len(trained.epochs) == 2
    assert len(trained.losses) == 10 + 4
    failed = {k: reason for epoch in trained.epochs for k, reason in epoch.failed.items()}
    assert "epoch 2, step 2 of 10" in failed[0]
    if size == 2:
        assert "epoch 1, step 7 of 10" in failed[1]
    assert trained.epochs[1].metrics == [{}] * size
    assert trained.epochs[1].improved == [False] * size


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


@pytest.mark.parametrize("optimizer", [SGD, NAdam])
def test_one_bad_batch_ends_a_run(
    optimizer: Optimizer, make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class that the model holds for impossible, and one image has: the loss of its batch is
    infinite, with finite gradients, and all batches after it are as good as those before."""

    class Sure(MLP):
        def forward(self, x: Tensor) -> Tensor:
            impossible = torch.tensor([False, False, False, True])
            for layer in self:
                x = layer(x)
            return x.masked_fill(impossible, -math.inf)

    def build() -> nn.Module:
        return Sure(SHAPE, CLASSES, hidden=(8,))

    monkeypatch.setattr(training, "STEPS_PER_SYNC", 4)
    data = make_dataset()
    labels = data.train.labels % 3
    labels[123] = 3
    data = replace(data, train=Split(data.train.images, labels))
    runs = [run(seed, lr=0.01) for seed in range(6)]
    trained = fit(build, data, runs, optimizer, epochs=2)
    (epoch,) = trained.epochs
    bad = [int((training._order(k, 0, 300) == 123).nonzero()) // BATCH for k in range(6)]
    assert len({step % 4 for step in bad}) > 1 and len({step // 4 for step in bad}) > 1
    for k, step in enumerate(bad):
        reason = f"diverged: the training loss is inf in epoch 1, step {step + 1} of 10"
        assert epoch.failed[k].startswith(reason)
        module = seeded(build, k)
        plain(module, data, runs[k], optimizer, steps=step)
        assert_weights(trained.stack, k, module)


# ---- compiled ------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not compile_step.can_compile(CPU),
    reason="torch.compile needs a C++ compiler and Python's headers",
)
def test_compiled_equals_eager(make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_step, "STEPS_PER_CALL", 2)  # compiles in less time
    standalone_compile = importlib.import_module("torch._inductor.standalone_compile")
    calls: list[int] = []
    compile_graph = standalone_compile.standalone_compile

    def counted(graph: Any, example: Any, **options: Any) -> Callable[..., Any]:
        made = compile_graph(graph, example, **options)

        def call(*arguments: Any) -> Any:
            calls.append(1)
            return made(*arguments)

        return call

    monkeypatch.setattr(standalone_compile, "standalone_compile", counted)
    data = make_dataset()

    def build() -> nn.Module:
        return MLP(SHAPE, CLASSES, hidden=(8,), dropout=0.25)

    own = run(1, Step(every_epochs=2.0, gamma=1e30), 0.1, momentum=0.9)
    compiled = fit(build, data, [own], epochs=4, compiled=True)
    # the trial; the chunks of whole batches of each epoch, up to the one in which it diverges
    assert len(calls) == 1 + 4 + 4 + 4
    eager = fit(build, data, [own], epochs=4)
    assert len(calls) == 13
    assert [text.startswith("compiling") for text in compiled.notices] == [True]
    np.testing.assert_allclose(compiled.losses, eager.losses, rtol=1e-4, atol=1e-5)
    for ours, expected in zip(compiled.epochs[:2], eager.epochs[:2], strict=True):
        for name in ("train/loss", "train/accuracy", "lr"):
            assert ours.metrics[0][name] == pytest.approx(expected.metrics[0][name], rel=1e-4)
    torch.testing.assert_close(compiled.after[1], eager.after[1], rtol=1e-4, atol=1e-5)
    # and stops as it does, before the update
    assert len(compiled.epochs) == 3
    assert compiled.epochs[2].failed == eager.epochs[2].failed
    assert "epoch 3, step 2 of 10" in compiled.epochs[2].failed[0]
    assert_scaled(compiled.after[2], eager.after[2])


class Branching(nn.Module):
    """What it computes depends on values: no graph can hold that."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(x.flatten(1))
        return out * 2 if out.sum() > 0 else out


@pytest.mark.parametrize(
    ("build", "optimizer", "batch_size", "why"),
    [
        (Branching, SGD, BATCH, "data-dependent"),
        (mlp, NAdam, BATCH, "NAdam"),
        (mlp, SGD, 100, "fewer than 4 whole batches"),
    ],
)
def test_what_cannot_be_compiled_runs_as_it_is(
    build: Build, optimizer: Optimizer, batch_size: int, why: str, make_dataset: MakeDataset
) -> None:
    data, own = make_dataset(), run(lr=0.01)
    trained = fit(build, data, [own], optimizer, batch_size=batch_size, compiled=True)
    _, notice = trained.notices
    assert "cannot be compiled" in notice and why in notice
    assert "\n" not in notice
    eager = fit(build, data, [own], optimizer, batch_size=batch_size)
    assert eager.notices == []
    assert np.array_equal(trained.losses, eager.losses)
    assert_weights(trained.stack, 0, eager.stack, rtol=0, atol=0)


def test_compiling_pays_for_long_runs_on_machines_that_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/" + name)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(Path(__file__).parent))
    assert not compile_step.can_compile(CPU)  # no headers
    monkeypatch.setattr(Path, "exists", lambda path: path.name == "Python.h")
    assert compile_step.can_compile(CPU)
    assert not compile_step.can_compile(torch.device("mps"))
    assert compile_step.worth_compiling(20_000, 1, CPU) and compile_step.worth_compiling(
        1_000, 4, CPU
    )
    assert not compile_step.worth_compiling(19_999, 1, CPU)
    assert not compile_step.worth_compiling(999, 4, CPU)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not compile_step.can_compile(CPU)  # no compiler


def test_an_update_that_overflows_is_not_made(make_dataset: Callable[..., Dataset]) -> None:
    """Loss and gradient are finite, what they lead to is not: the weights stay as they were."""
    dataset = make_dataset()
    stack = Stack(lambda: MLP(dataset.shape, len(dataset.classes)), [0], torch.device("cpu"))
    before = stack.snapshot()
    # the gradient alone would be finite, but a decay of 1e30 times a rate of 1e30 is not
    run = RunSpec(0, {"lr": 1e30, "weight_decay": 1e30}, Constant())
    records = list(training.fit(stack, dataset, [run], torch.optim.SGD, epochs=1, batch_size=32))
    last = records[-1]
    assert isinstance(last, Epoch) and "not finite" in last.failed[0]
    for name, tensor in stack.snapshot().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
