"""The compiled step against the step as it is."""

import importlib
import os
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, NAdam

from mnist_exp.training import compile as compile_step
from mnist_exp.training import step as train_step
from mnist_exp.training.models import MLP
from mnist_exp.training.muon import Muon
from mnist_exp.training.schedules import Step
from tests.training.helpers import (
    BATCH,
    CLASSES,
    CPU,
    SHAPE,
    Build,
    MakeDataset,
    Optimizer,
    assert_scaled,
    assert_weights,
    fit,
    mlp,
    run,
)


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
    data = make_dataset(val=40)

    def build() -> nn.Module:
        return MLP(SHAPE, CLASSES, hidden=(8,), dropout=0.25)

    schedule = Step(every_epochs=2.0, gamma=1e30)
    own = replace(run(1, schedule, 0.1, momentum=0.9), clip_norm=0.4, ema=0.5)
    compiled = fit(build, data, [own], epochs=4, compiled=True)
    # the trial; the chunks of whole batches of each epoch, up to the one in which it diverges
    assert len(calls) == 1 + 4 + 4 + 4
    eager = fit(build, data, [own], epochs=4)
    assert len(calls) == 13
    assert [text.startswith("compiling") for text in compiled.notices] == [True]
    np.testing.assert_allclose(compiled.losses, eager.losses, rtol=1e-4, atol=1e-5)
    for ours, expected in zip(compiled.epochs[:2], eager.epochs[:2], strict=True):
        for name in ("train/loss", "train/accuracy", "val/loss", "lr"):
            assert ours.metrics[0][name] == pytest.approx(expected.metrics[0][name], rel=1e-4)
    torch.testing.assert_close(compiled.after[1], eager.after[1], rtol=1e-4, atol=1e-5)
    # and stops as it does, before the update
    assert len(compiled.epochs) == 3
    assert compiled.epochs[2].failed == eager.epochs[2].failed
    assert "epoch 3, step 2 of 10" in compiled.epochs[2].failed[0]
    assert_scaled(compiled.after[2], eager.after[2])
    assert_scaled(compiled.stack.snapshot(), eager.stack.snapshot())


@pytest.mark.skipif(
    not compile_step.can_compile(CPU),
    reason="torch.compile needs a C++ compiler and Python's headers",
)
def test_muon_is_compiled(make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_step, "STEPS_PER_CALL", 1)
    data, own = make_dataset(), run(1, lr=0.02)

    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))

    compiled, eager = (fit(build, data, [own], Muon, compiled=c) for c in (True, False))
    assert [text.startswith("compiling") for text in compiled.notices] == [True]
    np.testing.assert_allclose(compiled.losses, eager.losses, rtol=1e-4, atol=1e-5)
    assert_weights(compiled.stack, 0, eager.stack)


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
        (Branching, SGD, BATCH, "depends on values"),
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
    worth = compile_step.worth_compiling
    assert worth(80_000, 1, CPU, False) and worth(20_000, 4, CPU, False)
    assert not worth(79_999, 1, CPU, False) and not worth(19_999, 4, CPU, False)
    assert not worth(10**9, 1, CPU, True)  # convolutions
    assert worth(80_000, 1, torch.device("cuda"), True)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not compile_step.can_compile(CPU)  # no compiler


def test_what_is_compiled_outlives_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is the user's and not in the temporary folder, unless they have said where."""
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    compile_step._choose_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    compile_step._choose_cache()
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) == tmp_path / "mnist-exp/inductor"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "taken").touch()
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "taken" / name)
    compile_step._choose_cache()  # cannot be there
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
