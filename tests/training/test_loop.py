"""The loop: runs of a stack against themselves alone, seeds, validation, divergence."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, RMSprop

from mnist_exp.data.dataset import Split
from mnist_exp.training import loop
from mnist_exp.training.events import Progress, RunSpec, StackSpec
from mnist_exp.training.models import MLP
from mnist_exp.training.muon import Muon
from mnist_exp.training.schedules import Cosine, OneCycle, Step
from mnist_exp.training.seeds import image_order
from mnist_exp.training.stack import Stack
from tests.training.helpers import (
    BATCH,
    CLASSES,
    CPU,
    SHAPE,
    Build,
    MakeDataset,
    Optimizer,
    assert_equals_alone,
    assert_scaled,
    assert_weights,
    dropping_cnn,
    dropping_mlp,
    fit,
    indexed,
    mlp,
    normalised_mlp,
    plain,
    run,
    seeded,
)


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
        dropping_cnn,
        SGD,
        [
            run(0, lr=0.1),
            run(1, Step(every_epochs=1.5), lr=0.05, momentum=0.9, weight_decay=1e-3),
            run(0, lr=0.02, smoothing=0.1),
        ],
    ),
    "batch normalisation and dropout, AdamW": (
        dropping_cnn,
        AdamW,
        [run(0, lr=1e-3), run(1, Cosine(), lr=3e-3, betas=(0.8, 0.95)), run(2, lr=1e-2, eps=1e-3)],
    ),
    "muon": (
        normalised_mlp,
        Muon,
        [run(0, lr=0.02), run(1, Cosine(), lr=0.01, momentum=0.8, adamw_lr=0.01), run(2, lr=0.05)],
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
    trained = fit(dropping_cnn, make_dataset(), [run(0), run(1)], epochs=2)
    assert trained.stack.buffers["1.num_batches_tracked"].tolist() == [20, 20]


@pytest.mark.parametrize("build", [mlp, dropping_cnn])
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
    monkeypatch.setattr(loop, "STEPS_PER_SYNC", 4)
    stack = Stack(mlp, [0, 1], CPU)
    records = loop.fit(stack, make_dataset(), [run(0), run(1)], StackSpec(SGD, 2, BATCH))
    stands = [r for r in records if isinstance(r, Progress)]
    assert {p.steps for p in stands} == {10}
    for epoch in (1, 2):
        own = [p for p in stands if p.epoch == epoch]
        assert [p.step for p in own] == np.cumsum([len(p.losses) for p in own]).tolist()
        assert [p.step for p in own] == [4, 8, 10]
        assert [p.images for p in own] == [4 * BATCH, 4 * BATCH, 300 - 8 * BATCH]
    assert {p.losses.shape[1] for p in stands} == {2}
    assert {tuple(p.active) for p in stands} == {(0, 1)}


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


@pytest.mark.parametrize("optimizer", [SGD, AdamW, RMSprop, Muon])
def test_a_run_with_weight_decay_that_ends_leaves_those_without(
    optimizer: Optimizer, make_dataset: MakeDataset
) -> None:
    """The optimizer of the stack goes on reading weight decay, for runs that have none."""
    data = make_dataset(val=40)
    still = Step(every_epochs=1, gamma=1e-30)  # it does not improve after its first epoch
    first = replace(run(0, still, lr=0.01, weight_decay=0.1), patience=1)
    runs = [first, run(1, lr=0.01, weight_decay=0.0)]
    together = fit(mlp, data, runs, optimizer=optimizer, epochs=5)
    assert any(epoch.stopped for epoch in together.epochs[:-1])
    assert_equals_alone(together, 1, fit(mlp, data, runs[1:], optimizer=optimizer, epochs=5))


# From epoch 2 the rate is 1e29: its first update is finite, and what it makes of the images is not.
EXPLODES = Step(every_epochs=1.0, gamma=1e30)


@pytest.mark.parametrize("validation", [0, 70])
@pytest.mark.parametrize(
    ("build", "optimizer", "given"),
    [(mlp, SGD, {}), (dropping_cnn, Adam, {"eps": 1e-3}), (dropping_cnn, NAdam, {"eps": 1e-3})],
)
def test_a_run_that_diverges_stops_before_the_update(
    build: Build,
    optimizer: Optimizer,
    given: dict[str, Any],
    validation: int,
    make_dataset: MakeDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop, "STEPS_PER_SYNC", 4)  # it is looked at again after it has diverged
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
    if build is dropping_cnn:
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
    monkeypatch.setattr(loop, "STEPS_PER_SYNC", 4)
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

    monkeypatch.setattr(loop, "STEPS_PER_SYNC", 4)
    data = make_dataset()
    labels = data.train.labels % 3
    labels[123] = 3
    data = replace(data, train=Split(data.train.images, labels))
    runs = [run(seed, lr=0.01) for seed in range(6)]
    trained = fit(build, data, runs, optimizer, epochs=2)
    (epoch,) = trained.epochs
    bad = [int((image_order(k, 0, 300) == 123).nonzero()) // BATCH for k in range(6)]
    assert len({step % 4 for step in bad}) > 1 and len({step // 4 for step in bad}) > 1
    for k, step in enumerate(bad):
        reason = f"diverged: the training loss is inf in epoch 1, step {step + 1} of 10"
        assert epoch.failed[k].startswith(reason)
        module = seeded(build, k)
        plain(module, data, runs[k], optimizer, steps=step)
        assert_weights(trained.stack, k, module)


class HalfPrecision(nn.Module):
    """Its parameters, or its logits alone, are bfloat16, which NumPy does not have."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.last = nn.Linear(64, CLASSES, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(x.flatten(1).to(self.last.weight.dtype))
        return out.bfloat16()


@pytest.mark.parametrize("optimizer", [SGD, AdamW, NAdam])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_model_may_compute_in_another_precision(
    optimizer: Optimizer, dtype: torch.dtype, make_dataset: MakeDataset
) -> None:
    runs = [run(seed, lr=0.01, smoothing=0.1) for seed in (0, 1)]
    together = fit(lambda: HalfPrecision(dtype), make_dataset(val=40), runs, optimizer, epochs=3)
    assert {t.dtype for t in together.stack.params.values()} == {dtype}
    first, *_, last = (epoch.metrics for epoch in together.epochs)
    for before, after in zip(first, last, strict=True):
        assert after["train/loss"] < before["train/loss"]
        assert np.isfinite(after["val/loss"])
