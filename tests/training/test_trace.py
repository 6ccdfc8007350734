"""What a trace holds: the same operations, on other tensors."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, AdamW, RMSprop

from mnist_exp.training import step as train_step
from mnist_exp.training.stack import Stack
from mnist_exp.training.trace import trace
from tests.training.helpers import (
    Build,
    MakeDataset,
    Optimizer,
    assert_weights,
    dropping_cnn,
    dropping_mlp,
    fit,
    mlp,
    run,
)


def in_place_among_views(x: Tensor, y: Tensor) -> Sequence[Tensor]:
    total = torch.zeros_like(x)
    row = total[0]
    row += y
    total.mul_(2)
    row.add_(1)
    return [total, row.clone(), x.t().t() + 1, x * 1]


def products(x: Tensor, y: Tensor) -> Sequence[Tensor]:
    a, b = x.expand(2, 3, 4), y.expand(2, 5, 4)
    return [torch.bmm(a, b.transpose(1, 2)).transpose(1, 2), torch.bmm(b, a.mT).mT.transpose(2, 1)]


def gradient(x: Tensor, y: Tensor) -> Sequence[Tensor]:
    x = x.detach().requires_grad_()
    first, *rest = torch.split((x * y).cumsum(1) * torch.arange(4), 2)
    return torch.autograd.grad(first.sum() + rest[0].prod(), x)


@pytest.mark.parametrize("function", [in_place_among_views, products, gradient])
def test_a_trace_does_the_same_to_other_tensors(function: Any) -> None:
    examples = [(torch.randn(3, 4), torch.randn(4)) for _ in range(3)]
    traced = trace(function, examples[0])
    for x, y in examples * 2:  # and again: a call leaves nothing behind
        before = x.clone(), y.clone()
        for result, expected in zip(traced(x, y), function(x, y), strict=True):
            torch.testing.assert_close(result, expected)
        assert torch.equal(x, before[0]) and torch.equal(y, before[1])


def test_random_numbers_are_drawn_in_every_call() -> None:
    traced = trace(lambda x: [torch.rand_like(x), torch.rand(3)], [torch.zeros(3)])
    torch.manual_seed(1)
    first, again = traced(torch.zeros(3)), traced(torch.zeros(3))
    assert not torch.equal(first[0], again[0]) and not torch.equal(first[1], again[1])
    torch.manual_seed(1)
    assert torch.equal(first[0], torch.rand(3))


def test_what_depends_on_values_cannot_be_traced() -> None:
    with pytest.raises(ValueError, match="depends on values"):
        trace(lambda x: [x * 2 if x.sum() > 0 else x], [torch.ones(3)])


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    ("build", "optimizer", "arguments"),
    [
        (mlp, SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
        (mlp, RMSprop, {"lr": 0.001, "centered": True}),
        (mlp, Adagrad, {"lr": 0.01}),
        (dropping_mlp, AdamW, {"lr": 0.01, "amsgrad": True}),
        (dropping_cnn, SGD, {}),
    ],
)
def test_the_traced_step_equals_the_step_as_it_is(
    build: Build,
    optimizer: Optimizer,
    arguments: dict[str, Any],
    size: int,
    make_dataset: MakeDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On batches that are not those of the trace, and with a run that diverges."""
    runs = [run(seed, smoothing=0.1, **arguments) for seed in range(size)]
    if size > 1:
        runs[1] = run(1, **arguments | {"lr": 1e30})
    calls: list[int] = []

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return trace(*arguments)

    monkeypatch.setattr(train_step, "trace", counted)
    traced = fit(build, make_dataset(val=40), runs, optimizer, epochs=2)
    # where a run has diverged, its epoch again with a look at every step, and the others alone
    assert len(calls) == (1 if size == 1 else 3)
    make = Stack.__init__

    def untraceable(self: Stack, *arguments: Any) -> None:
        make(self, *arguments)
        self.is_traceable = False

    monkeypatch.setattr(Stack, "__init__", untraceable)
    plain = fit(build, make_dataset(val=40), runs, optimizer, epochs=2)
    assert len(calls) == (1 if size == 1 else 3)
    np.testing.assert_allclose(traced.losses, plain.losses, rtol=1e-4, atol=1e-5)
    assert traced.epochs[0].failed.keys() == plain.epochs[0].failed.keys()
    for k in range(size):
        assert_weights(traced.stack, k, plain.stack.select([k]), rtol=1e-3)


SHORT_RUN = """
import sys
from pathlib import Path
import torch
from mnist_exp.data.dataset import load
from mnist_exp.training import loop
from mnist_exp.training.events import RunSpec, StackSpec
from mnist_exp.training.models import MLP
from mnist_exp.training.schedules import Constant
from mnist_exp.training.stack import Stack

data = load("mnist", root=None, val_size=100, train_size=300, split_seed=0, cache=Path(sys.argv[1]))
for size in (1, 2):
    for optimizer in (torch.optim.SGD, torch.optim.AdamW):
        runs = [RunSpec(seed, {"lr": 0.01}, Constant()) for seed in range(size)]
        stack = Stack(lambda: MLP((1, 28, 28), 10), range(size), torch.device("cpu"))
        assert list(loop.fit(stack, data, runs, StackSpec(optimizer, 2, 32)))
print([name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules])
"""


def test_a_run_that_is_not_compiled_imports_no_compiler(tmp_path: Path) -> None:
    """It takes a second, and any optimizer of torch would import it."""
    command = [sys.executable, "-c", SHORT_RUN, str(tmp_path)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "[]\n"


def test_a_product_with_one_is_another_tensor_where_it_is_written_to() -> None:
    def function(x: Tensor) -> list[Tensor]:
        y = x * 1
        y.add_(1)
        return [y, x + 0]

    x = torch.zeros(3)
    traced = trace(function, [x.clone()])
    results = traced(x)
    assert [t.tolist() for t in results] == [[1, 1, 1], [0, 0, 0]] and not x.any()


def test_a_product_with_one_has_its_own_type() -> None:
    traced = trace(lambda x: [x * 1], [torch.tensor([True, False])])
    (result,) = traced(torch.tensor([True, False]))
    assert result.dtype == torch.int64
