"""The sizes of epochs, and what follows from them: steps, time, passes."""

import itertools

import pytest

from mnist_exp.training.epochs import EpochSizes, Focus

# images of each epoch, of 300 in batches of 32
CASES = {
    "no focus": (EpochSizes(300, 32, 3), [300, 300, 300]),
    "a part of an epoch first": (
        EpochSizes(300, 32, 3, Focus(0.3, 0.2, 0.1)),
        [90, 90, 90],
    ),
    "one epoch first": (EpochSizes(300, 32, 3, Focus(1, 0.5, 0.0)), [300, 150, 150]),
    "epochs and a part first": (
        EpochSizes(300, 32, 5, Focus(2.5, 0.1, 0.05)),
        [300, 300, 150, 45, 45],
    ),
    "all images are hard": (EpochSizes(301, 32, 2, Focus(1, 0.9, 0.1)), [301, 301]),
}


@pytest.mark.parametrize("name", CASES)
def test_steps_follow_from_the_images_of_each_epoch(name: str) -> None:
    sizes, images = CASES[name]
    epochs = range(1, sizes.epochs + 1)
    assert [sizes.images(epoch) for epoch in epochs] == images
    assert sizes.lengths == list(dict.fromkeys(images))
    steps = [-(-count // 32) for count in images]
    assert [sizes.steps(epoch) for epoch in epochs] == steps
    assert [sizes.steps_before(epoch) for epoch in epochs] == [
        sum(steps[: epoch - 1]) for epoch in epochs
    ]
    assert sizes.total_steps == sum(steps)


@pytest.mark.parametrize("name", CASES)
def test_time_goes_on_evenly_from_the_first_step_to_the_last(name: str) -> None:
    sizes, _ = CASES[name]
    times = [
        sizes.time(epoch, step)
        for epoch in range(1, sizes.epochs + 1)
        for step in range(sizes.steps(epoch))
    ]
    times.append(sizes.time(sizes.epochs, sizes.steps(sizes.epochs)))
    assert times[0] == 0 and times[-1] == sizes.epochs
    length = sizes.epochs / sizes.total_steps
    assert [b - a for a, b in itertools.pairwise(times)] == pytest.approx(
        [length] * sizes.total_steps
    )


def test_only_the_epochs_after_the_first_part_are_focused() -> None:
    sizes = EpochSizes(300, 32, 5, Focus(2.5, 0.1, 0.05))
    assert [sizes.is_focused(epoch) for epoch in range(1, 6)] == [False] * 3 + [True] * 2
    assert not EpochSizes(300, 32, 5).is_focused(5)


def test_the_shares_never_come_to_more_images_than_there_are() -> None:
    """Both are rounded: two of three images, and two more."""
    sizes = EpochSizes(3, 32, 2, Focus(1, 0.5, 0.5))
    assert (sizes.hardest, sizes.random) == (2, 1)


def test_passes_are_the_images_of_the_epochs_in_units_of_all_images() -> None:
    for after in (0.3, 1, 2.5):
        focus = Focus(after, 0.2, 0.1)
        sizes = EpochSizes(1000, 32, 5, focus)
        for epochs in range(6):
            images = sum(sizes.images(epoch) for epoch in range(1, epochs + 1))
            assert focus.passes(epochs) == pytest.approx(images / 1000)
