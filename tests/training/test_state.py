"""The state that an event of `fit` gives: training goes on from it, bit for bit."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mnist_exp.training import loop
from mnist_exp.training.epochs import Focus
from mnist_exp.training.events import Epoch, Message, RunSpec, StackSpec
from mnist_exp.training.models import MLP
from mnist_exp.training.schedules import Constant, Cosine
from mnist_exp.training.stack import Stack
from tests.training.helpers import CPU, MakeDataset, cnn


def leaves(node: Any) -> Iterator[Any]:
    """The plain values and tensors of a state, in order."""
    if isinstance(node, dict):
        for key in node:
            yield key
            yield from leaves(node[key])
    elif isinstance(node, list | tuple):
        for each in node:
            yield from leaves(each)
    else:
        yield node


def equal(a: Any, b: Any) -> bool:
    pairs = list(zip(leaves(a), leaves(b), strict=True))
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def dropped(shape: tuple[int, int, int], classes: int) -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(shape[1] * shape[2], 12),
        torch.nn.BatchNorm1d(12),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.3),
        torch.nn.Linear(12, classes),
    )


FOCUS = Focus(after=0.5, hardest=0.4, random=0.2)  # 4 steps in each epoch
CASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, 1, None),
    "adam in a stack": (torch.optim.Adam, {"lr": 0.01}, 3, None),
    "torch's own": (torch.optim.NAdam, {"lr": 0.01}, 2, None),
    "the hardest images": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, 1, FOCUS),
    "the hardest images in a stack": (torch.optim.Adam, {"lr": 0.01}, 3, FOCUS),
    "channels last in bfloat16": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, 1, None),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("validation", [0, 70])
def test_fit_goes_on_from_any_state(
    name: str, validation: int, make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "STEPS_PER_SYNC", 3)
    optimizer, numbers, size, focus = CASES[name]
    dataset = make_dataset(train=100, val=validation)
    is_rounded = "bfloat16" in name
    precision = torch.bfloat16 if is_rounded else torch.float32
    runs = [
        RunSpec(
            k,
            numbers | {"lr": numbers["lr"] * (k + 1)},
            Cosine(),
            patience=2 - k if k < 2 else 2,
            ema=0.5 if k else None,
        )
        for k in range(size)
    ]
    if not validation:
        runs = [RunSpec(k, run.optimizer, Cosine()) for k, run in enumerate(runs)]

    def go_on(state: Any = None) -> tuple[Stack, list[Any]]:
        build = cnn if is_rounded else functools.partial(dropped, dataset.shape, 4)
        stack = Stack(build, [run.seed for run in runs], CPU, precision)
        assert stack.is_channels_last == is_rounded
        seen = []
        spec = StackSpec(optimizer, 3, 16, focus=focus)
        for event in loop.fit(stack, dataset, runs, spec, state=state):
            if not isinstance(event, Message):
                seen.append((event, copied(event.state())))
        return stack, seen

    whole, events = go_on()
    for place in range(len(events)):
        stack, rest = go_on(events[place][1])
        assert equal(stack.snapshot(), whole.snapshot())
        assert [type(e) for e, _ in rest] == [type(e) for e, _ in events[place + 1 :]]
        for (_, state), (_, expected) in zip(rest, events[place + 1 :], strict=True):
            assert equal(state, expected)
        metrics = [m for e, _ in rest if isinstance(e, Epoch) for m in e.metrics]
        there = [e for e, _ in events[place + 1 :] if isinstance(e, Epoch)]
        timed = ("epoch_seconds", "images_per_second")
        for found, wanted in zip(metrics, (m for e in there for m in e.metrics), strict=True):
            assert {k: v for k, v in found.items() if k not in timed} == {
                k: v for k, v in wanted.items() if k not in timed
            }


def copied(state: Any) -> Any:
    """As a checkpoint would have it."""
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [copied(value) for value in state]
    return state.clone() if isinstance(state, torch.Tensor) else state


def test_a_stack_that_has_shrunk_goes_on_shrunk(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(train=64, val=40)
    runs = [
        RunSpec(0, {"lr": lr}, Constant(), patience=p, ema=e)
        for lr, p, e in ((0.0, 1, None), (0.1, 9, 0.5))
    ]

    def events(state: Any = None) -> list[tuple[Epoch, Any]]:
        stack = Stack(lambda: MLP(dataset.shape, 4, hidden=[8]), [0, 0], CPU)
        found = loop.fit(stack, dataset, runs, StackSpec(torch.optim.SGD, 5, 16), state=state)
        kept = []
        for event in found:
            if isinstance(event, Epoch):
                kept.append((event, copied(event.state())))
        return kept

    whole = events()
    shrunk = [len(state["rows"]) for _, state in whole]
    assert shrunk[0] == 2 and shrunk[-1] == 1
    for place in range(len(whole) - 1):
        rest = events(whole[place][1])
        assert equal(rest[-1][1], whole[-1][1])
