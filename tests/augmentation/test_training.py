"""Training on augmented images: what a run gets depends on its seed, and on nothing beside it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD

from mnist_exp.augmentation.augment import Augmenter
from mnist_exp.augmentation.settings import Augmentation
from mnist_exp.data.dataset import Dataset
from mnist_exp.training import compile as compile_step
from mnist_exp.training import loop
from mnist_exp.training import step as train_step
from mnist_exp.training import trace as tracing
from mnist_exp.training.events import Message, RunSpec, StackSpec
from mnist_exp.training.seeds import image_order, step_keys
from mnist_exp.training.stack import Stack
from tests.training.helpers import (
    BATCH,
    CPU,
    MakeDataset,
    assert_equals_alone,
    assert_weights,
    fit,
    mlp,
    run,
    seeded,
)
from tests.training.test_state import copied, equal

EVERYTHING = Augmentation(
    shift=1.0, rotation=12.0, scale=0.1, shear=8.0, elastic=0.5, erase=3, mixup=0.4, flip=0.3
)
KINDS = {
    "shift": Augmentation(shift=2.0),
    "elastic": Augmentation(elastic=0.8),
    "erase": Augmentation(erase=3),
    "mixup": Augmentation(mixup=0.4),
    "flip": Augmentation(flip=0.5),
    "everything": EVERYTHING,
}


@pytest.mark.parametrize("kind", KINDS)
def test_runs_of_two_seeds_in_a_stack_equal_themselves_alone(
    kind: str, make_dataset: MakeDataset
) -> None:
    data, runs = make_dataset(val=40), [run(4), run(9, smoothing=0.1)]
    together = fit(mlp, data, runs, epochs=2, augmentation=KINDS[kind])
    for k, own in enumerate(runs):
        alone = fit(mlp, data, [own], epochs=2, augmentation=KINDS[kind])
        assert_equals_alone(together, k, alone)
        without = fit(mlp, data, [own], epochs=2)
        assert (np.abs(alone.losses - without.losses) > 1e-4).mean() > 0.9


def test_runs_of_one_seed_see_the_same_images(make_dataset: MakeDataset) -> None:
    """They are augmented once for both, and as they are alone."""
    data, runs = make_dataset(), [run(4), run(4, lr=0.2)]
    together = fit(mlp, data, runs, epochs=2, augmentation=EVERYTHING)
    assert together.losses[0, 0] == together.losses[0, 1]
    for k, own in enumerate(runs):
        assert_equals_alone(together, k, fit(mlp, data, [own], epochs=2, augmentation=EVERYTHING))


def test_mixed_labels_equal_a_plain_loop(make_dataset: MakeDataset) -> None:
    """Against torch's cross-entropy for probabilities, and every step's images made anew."""
    data, own = make_dataset(), run(3, smoothing=0.1)
    trained = fit(mlp, data, [own], augmentation=Augmentation(mixup=0.5))
    module = seeded(mlp, 3)
    optimizer = SGD(module.parameters(), lr=0.1)
    augmenter = Augmenter(Augmentation(mixup=0.5), data, BATCH, CPU)
    order, keys = image_order(3, 0, 300), step_keys(3, 0, 10)
    losses, correct = [], 0
    for step, chosen in enumerate(order.split(BATCH)):
        given = augmenter(
            data.train.images, data.train.labels, chosen[None], keys[step][None, None]
        )
        pixels = data.normalise(data.train.images[chosen])
        assert given.others is not None and given.shares is not None
        shares = given.shares[0]
        weights = shares[:, None, None, None]
        torch.testing.assert_close(given.x[0], weights * pixels + (1 - weights) * pixels.roll(1, 0))
        first, second = (F.one_hot(t[0], 4).float() for t in (given.y, given.others))
        assert torch.equal(second, first.roll(1, 0))
        targets = shares[:, None] * first + (1 - shares[:, None]) * second
        optimizer.zero_grad()
        logits = module(given.x[0])
        loss = F.cross_entropy(logits, targets, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        correct += int((logits.argmax(1) == data.train.labels[chosen]).sum())
    np.testing.assert_allclose(trained.losses[:, 0], losses, rtol=1e-4, atol=1e-5)
    assert_weights(trained.stack, 0, module)
    assert trained.epochs[0].metrics[0]["train/accuracy"] == correct / 300


def test_what_is_off_is_not_carried_out(make_dataset: MakeDataset) -> None:
    given = Stack(mlp, [4], CPU), make_dataset(), [run(4)]
    assert train_step.TrainStep(*given, StackSpec(SGD, 1, 8, Augmentation())).augmenter is None
    assert train_step.TrainStep(*given, StackSpec(SGD, 1, 8, EVERYTHING)).augmenter is not None


def test_validation_and_test_images_stay_as_they_are(
    make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, seen = make_dataset(val=40), []
    logits = Stack.logits

    def record(own: Stack, x: Tensor) -> Tensor:
        seen.append(x)
        return logits(own, x)

    monkeypatch.setattr(Stack, "logits", record)
    fit(mlp, data, [run(4)], epochs=2, augmentation=EVERYTHING)
    assert data.val is not None
    assert len(seen) == 2 and all(torch.equal(x, data.normalise(data.val.images)) for x in seen)


def collected(
    dataset: Dataset, runs: Sequence[RunSpec], state: Any = None
) -> tuple[Stack, list[Any]]:
    stack = Stack(mlp, [run.seed for run in runs], CPU)
    spec = StackSpec(SGD, 2, 16, EVERYTHING)
    events = loop.fit(stack, dataset, runs, spec, state=state)
    return stack, [copied(e.state()) for e in events if not isinstance(e, Message)]


@pytest.mark.parametrize("seeds", [[4], [4, 9]])
def test_a_run_goes_on_from_the_middle_of_an_epoch_to_the_bit(
    seeds: list[int], make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "STEPS_PER_SYNC", 3)
    dataset, runs = make_dataset(train=100, val=40), [run(seed) for seed in seeds]
    whole, states = collected(dataset, runs)
    for place in (1, 4):
        stack, rest = collected(dataset, runs, states[place])
        assert equal(stack.snapshot(), whole.snapshot())
        assert equal(rest[-1], states[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_traced_step_equals_the_step_as_it_is(
    kind: str, make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, made = make_dataset(), []
    trace = tracing.trace

    def record(*arguments: Any) -> Any:
        made.append(trace(*arguments))
        return made[-1]

    monkeypatch.setattr(train_step, "trace", record)
    traced = fit(mlp, data, [run(4), run(9)], epochs=2, augmentation=KINDS[kind])
    assert len(made) == 1
    monkeypatch.setattr(train_step.TrainStep, "_traced", lambda own, steps, *rest: steps)
    plain = fit(mlp, data, [run(4), run(9)], epochs=2, augmentation=KINDS[kind])
    np.testing.assert_allclose(traced.losses, plain.losses, rtol=1e-5)
    torch.testing.assert_close(traced.stack.snapshot(), plain.stack.snapshot())


@pytest.mark.skipif(
    not compile_step.can_compile(CPU),
    reason="torch.compile needs a C++ compiler and Python's headers",
)
def test_a_compiled_step_equals_the_step_as_it_is(
    make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_step, "STEPS_PER_CALL", 1)  # compiles in less time
    data = make_dataset()
    compiled = fit(mlp, data, [run(4)], compiled=True, augmentation=EVERYTHING)
    assert [text.startswith("compiling") for text in compiled.notices] == [True]
    plain = fit(mlp, data, [run(4)], augmentation=EVERYTHING)
    np.testing.assert_allclose(compiled.losses, plain.losses, rtol=1e-4, atol=1e-5)


def test_a_batch_of_one_image_is_mixed_with_itself(make_dataset: MakeDataset) -> None:
    data = make_dataset(train=33)
    trained = fit(mlp, data, [run(4)], augmentation=Augmentation(mixup=0.5))
    assert np.isfinite(trained.losses).all() and len(trained.losses) == 2
    augmenter = Augmenter(Augmentation(mixup=0.5), data, 1, CPU)
    one = torch.zeros(1, 1, dtype=torch.long)
    given = augmenter(data.train.images, data.train.labels, one, one)
    torch.testing.assert_close(given.x[0], data.normalise(data.train.images[:1]))


def test_what_an_image_gets_does_not_depend_on_those_beside_it(make_dataset: MakeDataset) -> None:
    """Nor on its place in the batch: on the key of the step and its own number alone."""
    data = make_dataset()
    settings = replace(EVERYTHING, mixup=0.0)
    augmenter = Augmenter(settings, data, 10, CPU)
    split, keys = data.train, torch.tensor([[5], [6]])
    whole = augmenter(split.images, split.labels, torch.arange(20)[None], keys).x[0]
    few = augmenter(split.images, split.labels, torch.tensor([[7, 3, 3]]), keys[:1]).x[0]
    torch.testing.assert_close(few, whole[[7, 3, 3]])
    other = augmenter(split.images, split.labels, torch.tensor([[7]]), keys[1:]).x[0]
    assert not torch.allclose(other[0], whole[7], atol=0.1)
