"""Training on the hardest images, after a first part on all of them."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, NAdam

from mnist_exp.augmentation.settings import Augmentation
from mnist_exp.training import compile as compile_step
from mnist_exp.training import loop, metrics
from mnist_exp.training import step as train_step
from mnist_exp.training.epochs import Focus
from mnist_exp.training.events import Progress, RunSpec, StackSpec
from mnist_exp.training.schedules import Constant, Cosine, OneCycle, Step
from mnist_exp.training.seeds import image_order, other_images
from mnist_exp.training.stack import Stack
from tests.training.helpers import (
    BATCH,
    CLASSES,
    CPU,
    Build,
    MakeDataset,
    Optimizer,
    assert_equals_alone,
    assert_weights,
    dropping_cnn,
    dropping_mlp,
    fit,
    indexed,
    mlp,
    run,
    seeded,
)

# of 300 images: 10 steps, 5, and 3 in each focused epoch
FOCUS = Focus(after=1.5, hardest=0.2, random=0.1)
HARDEST, RANDOM = 60, 30


def focused_loop(module: nn.Module, data: Any, own: RunSpec, epochs: int) -> list[set[int]]:
    """Train as anyone would write it; return the hardest images and the others of each epoch."""
    updates = SGD(module.parameters(), **own.optimizer)
    images = (data.train.images / 255 - data.mean) / data.std
    labels, count = data.train.labels, len(data.train)
    steps, total, seen = 0, 10 + 5 + 3 * (epochs - 2), []
    hardest: set[int] = set()
    for epoch in range(epochs):
        order = image_order(own.seed, epoch, count).tolist()
        if epoch == 1:
            order = order[:150]
        if epoch > 1:
            if not hardest:
                module.eval()
                with torch.no_grad():
                    losses = F.cross_entropy(module(images), labels, reduction="none").tolist()
                module.train()
                hardest = set(sorted(range(count), key=lambda i: -losses[i])[:HARDEST])
            is_hard = torch.tensor([i in hardest for i in range(count)])
            others = set(other_images(own.seed, epoch, is_hard, RANDOM).tolist())
            order = [i for i in order if i in hardest | others]
            seen += [hardest, others]
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            for group in updates.param_groups:
                time = epochs * steps / total
                group["lr"] = own.optimizer["lr"] * own.schedule.multiplier(time, epochs)
            updates.zero_grad()
            F.cross_entropy(module(images[chosen]), labels[chosen]).backward()
            updates.step()
            steps += 1
    assert steps == total
    return seen


@pytest.mark.parametrize("schedule", [Constant(), OneCycle()])
def test_it_trains_as_a_plain_loop_does(schedule: Any, make_dataset: MakeDataset) -> None:
    data, own = make_dataset(), run(3, schedule, lr=0.1, momentum=0.9)
    trained = fit(mlp, data, [own], epochs=4, focus=FOCUS)
    module = seeded(mlp, 3)
    hardest, others, still_hardest, new_others = focused_loop(module, data, own, 4)
    assert_weights(trained.stack, 0, module)
    assert len(trained.losses) == 21
    assert hardest == still_hardest and others != new_others
    assert len(others) == len(new_others) == RANDOM and not hardest & (others | new_others)


def test_the_hardest_have_the_greatest_loss_and_equals_go_by_their_number(
    make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_dataset(train=50)
    stack = Stack(mlp, [0, 1], CPU)
    state = loop.LoopState.start(
        train_step.TrainStep(stack, data, [run(0), run(1)], StackSpec(SGD, 3, BATCH, focus=FOCUS))
    )
    state.choose_hardest()
    assert state.hardest is None  # it is too early
    state.epoch = 2
    state.choose_hardest()
    assert state.hardest is not None
    losses = metrics.image_losses(stack, data, data.train)
    for hard, own in zip(state.hardest, losses, strict=True):
        assert hard.sum() == 10 and own[hard].min() > own[~hard].max()
    assert not torch.equal(*state.hardest)
    state.hardest = None
    equal = torch.ones(2, 50)
    equal[:, 40] = 2.0
    monkeypatch.setattr(metrics, "image_losses", lambda *given: equal)
    state.choose_hardest()
    chosen = [row.nonzero().flatten().tolist() for row in state.hardest]
    assert chosen == [[*range(9), 40]] * 2


def test_image_losses_are_those_of_each_model_on_each_image(
    make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "EVALUATION_BATCH", 64)
    data, stack = make_dataset(), Stack(dropping_cnn, [0, 1, 2], CPU)
    losses = metrics.image_losses(stack, data, data.train)
    images = data.normalise(data.train.images)
    for k, own in enumerate(losses):
        expected = F.cross_entropy(stack.model(k)(images), data.train.labels, reduction="none")
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize(("after", "first"), [(0.3, [90]), (1, [300]), (1.5, [300, 150])])
def test_an_epoch_sees_the_images_that_are_its_own(
    after: float, first: list[int], make_dataset: MakeDataset
) -> None:
    data = replace(make_dataset(), train=indexed(300, 0))
    seen: list[list[int]] = []

    class Witness(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(64, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                pixels = (x.flatten(1)[:, :2] * data.std + data.mean).mul(255).round().long()
                seen.append((pixels[:, 0] * 256 + pixels[:, 1]).tolist())
            out: Tensor = self.last(x.flatten(1))
            return out

    epochs = len(first) + 3
    trained = fit(Witness, data, [run(5)], epochs=epochs, focus=Focus(after, 0.2, 0.1))
    assert [len(batch) for batch in seen[-3:]] == [32, 32, 26]
    images = iter(itertools.chain(*seen))
    parts = [list(itertools.islice(images, count)) for count in [*first, 90, 90, 90]]
    assert next(images, None) is None and len(trained.losses) == len(seen)
    for epoch, part in enumerate(parts[: len(first)]):
        assert part == image_order(5, epoch, 300)[: len(part)].tolist()
    focused = parts[len(first) :]
    assert all(len(set(part)) == 90 for part in focused)
    assert len(set.intersection(*map(set, focused))) >= HARDEST
    assert len({frozenset(part) for part in focused}) == 3  # the others are drawn anew
    hard = [i in set.intersection(*map(set, focused)) for i in focused[0]]
    assert hard != sorted(hard) and hard != sorted(hard, reverse=True)  # they come mixed


STACKS: dict[str, tuple[Build, Optimizer, list[RunSpec]]] = {
    "seeds": (dropping_mlp, SGD, [run(5), run(6, lr=0.3, momentum=0.9), run(7, Cosine())]),
    "one seed": (mlp, Adam, [run(0, lr=1e-3), run(0, lr=1e-2), run(0, OneCycle(), lr=3e-2)]),
    "batch normalisation": (dropping_cnn, SGD, [run(0), run(1, smoothing=0.1)]),
    "torch's own optimizer": (mlp, NAdam, [run(0, lr=1e-3), run(1, lr=1e-2)]),
}


@pytest.mark.parametrize("name", STACKS)
def test_a_run_of_a_stack_equals_the_run_alone(name: str, make_dataset: MakeDataset) -> None:
    build, optimizer, runs = STACKS[name]
    data = make_dataset(val=40)
    together = fit(build, data, runs, optimizer, epochs=4, focus=FOCUS)
    for k, own in enumerate(runs):
        alone = fit(build, data, [own], optimizer, epochs=4, focus=FOCUS)
        assert_equals_alone(together, k, alone)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_that_diverges_in_a_focused_epoch_leaves_the_others(
    compiled: bool, make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others go on in a smaller stack, each with the images that were hard for it."""
    if compiled and not compile_step.can_compile(CPU):
        pytest.skip("torch.compile needs a C++ compiler and Python's headers")
    monkeypatch.setattr(train_step, "STEPS_PER_CALL", 3)  # one step a call of a stack of 3
    data = make_dataset(val=40)
    # the first focused epoch begins at step 15 of 24, which is 3.1 of 5 epochs
    runs = [run(1, Step(every_epochs=3.2, gamma=1e30)), run(1), run(1, lr=0.05)]
    together = fit(mlp, data, runs, epochs=5, focus=FOCUS, compiled=compiled)
    assert [list(epoch.failed) for epoch in together.epochs] == [[], [], [0], [], []]
    assert "in epoch 3, step 3 of 3" in together.epochs[2].failed[0]
    assert not any("cannot be compiled" in notice for notice in together.notices)
    for k in (1, 2):
        assert_equals_alone(together, k, fit(mlp, data, [runs[k]], epochs=5, focus=FOCUS))


def test_focus_with_averages_and_augmentation_equals_the_run_alone(
    make_dataset: MakeDataset,
) -> None:
    """The hardest are found by the weights that are trained."""
    data = make_dataset(val=40)
    given: dict[str, Any] = {"epochs": 4, "augmentation": Augmentation(shift=1), "focus": FOCUS}
    runs = [replace(run(seed), ema=ema) for seed, ema in ((0, 0.5), (1, None))]
    together = fit(mlp, data, runs, **given)
    for k, own in enumerate(runs):
        assert_equals_alone(together, k, fit(mlp, data, [own], **given))
    without = fit(mlp, data, [run(0), run(1)], **given)
    np.testing.assert_allclose(together.losses, without.losses, rtol=1e-5)


def test_the_hardest_are_found_on_the_images_as_they_are(
    make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, seen = make_dataset(), []
    logits = Stack.logits

    def record(own: Stack, x: Tensor) -> Tensor:
        seen.append(x)
        return logits(own, x)

    monkeypatch.setattr(Stack, "logits", record)  # without validation, asked for nothing else
    fit(mlp, data, [run(0)], epochs=4, augmentation=Augmentation(shift=2, flip=0.5), focus=FOCUS)
    assert torch.equal(torch.cat(seen), data.normalise(data.train.images))


def test_patience_counts_focused_epochs(make_dataset: MakeDataset) -> None:
    data = make_dataset(val=40)
    runs = [replace(run(0, lr=0.0), patience=3), run(0)]
    trained = fit(mlp, data, runs, epochs=6, focus=FOCUS)
    assert [list(epoch.stopped) for epoch in trained.epochs] == [[], [], [], [0], [], []]
    assert_equals_alone(trained, 1, fit(mlp, data, runs[1:], epochs=6, focus=FOCUS))


def test_the_metrics_of_a_focused_epoch_are_over_what_it_saw(make_dataset: MakeDataset) -> None:
    data = make_dataset()
    trained = fit(mlp, data, [run(0)], epochs=3, focus=FOCUS)
    losses, sizes = trained.losses[15:, 0], np.array([32, 32, 26])
    expected = float(losses @ sizes / 90)
    assert trained.epochs[2].metrics[0]["train/loss"] == pytest.approx(expected, rel=1e-6)


def test_progress_moves_evenly_though_epochs_do_not(
    make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "STEPS_PER_SYNC", 1)
    stack, data = Stack(mlp, [0], CPU), make_dataset()
    events = loop.fit(stack, data, [run(0)], StackSpec(SGD, 4, BATCH, focus=FOCUS))
    stands = [event for event in events if isinstance(event, Progress)]
    assert [p.steps for p in stands] == [10] * 10 + [5] * 5 + [3] * 6
    assert [p.time for p in stands] == pytest.approx([4 * (i + 1) / 21 for i in range(21)])


def test_without_focus_the_state_has_no_hardest_images(make_dataset: MakeDataset) -> None:
    data = make_dataset()
    plain, focused = (fit(mlp, data, [run(0)], epochs=3, focus=f) for f in (None, FOCUS))
    assert not any("hardest" in epoch.state() for epoch in plain.epochs)
    assert "hardest" in focused.epochs[-1].state()
    # and up to the last batch of the first part, nothing differs
    assert np.array_equal(plain.losses[:14], focused.losses[:14])
