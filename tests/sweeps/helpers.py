"""Sweeps as tests run and compare them: in stores of their own, by the command line."""

import contextlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from mlflow.entities import Run

import mnist_exp
from mnist_exp.cli import main as cli
from mnist_exp.config.compose import compose_sweep
from mnist_exp.config.hydra_adapter import typed_overrides
from mnist_exp.config.validate import validate_sweep
from mnist_exp.run.console import Reporter
from mnist_exp.run.recorder import THREADS, Result
from mnist_exp.sweeps import grid, sweep
from mnist_exp.sweeps.manifest import SweepJob
from mnist_exp.tracking.store import Store
from tests.helpers import fresh_store

BASE = [
    *("dataset.train_size=320", "dataset.val_size=500", "training.epochs=2"),
    *("training.device=cpu", "training.threads=1", "training.compile=never"),
]
SMALL = [*BASE, "model.hidden=[16]"]
# as many threads as there are: the stacks are trained in this process, one after the other
ONE_AT_A_TIME = f"training.threads={THREADS}"
CURVES = ("train/loss", "train/accuracy", "val/loss", "val/accuracy", "lr")
# A stack adds up float32 numbers in another order than a run alone: the last digits differ.
CLOSE = {"rel": 1e-4, "abs": 1e-6}
# An image counts differently where two of its logits are equal up to those digits: a rare one.
IMAGES = 1


@dataclass
class Done:
    """A sweep that has been run."""

    folder: Path  # of the store; the sweep's own is in it
    words: list[str]
    status: int
    out: str
    err: str
    client: mlflow.MlflowClient = field(repr=False)

    @property
    def own(self) -> Path:
        return self.folder / "the sweep"

    @property
    def store(self) -> Store:
        return Store(f"sqlite:///{self.folder}/store.db")

    @property
    def runs(self) -> list[Run]:
        experiments = [e.experiment_id for e in self.client.search_experiments()]
        return list(self.client.search_runs(experiments))

    @property
    def parent(self) -> Run:
        (parent,) = [r for r in self.runs if "mlflow.parentRunId" not in r.data.tags]
        return parent

    @property
    def children(self) -> dict[int, Run]:
        """By the number of the job."""
        found = {int(r.data.tags["job"]): r for r in self.runs if "job" in r.data.tags}
        return dict(sorted(found.items()))

    def child(self, **values: Any) -> Run:
        """The child where each swept value, by the last part of its key, is this."""
        wanted = {(key, str(value)) for key, value in values.items()}
        (found,) = [r for r in self.children.values() if wanted <= set(swept(r).items())]
        return found

    def fetch(self, found: Run, name: str, to: Path) -> Path:
        return Path(self.client.download_artifacts(found.info.run_id, name, str(to)))

    def curves(self, found: Run) -> dict[str, list[tuple[int, float]]]:
        points = {k: self.client.get_metric_history(found.info.run_id, k) for k in CURVES}
        return {key: [(p.step, p.value) for p in own] for key, own in points.items()}


def swept(found: Run) -> dict[str, str]:
    values = json.loads(found.data.tags["swept"])
    return {key.rpartition(".")[2]: value for key, value in values.items()}


def call(*words: str) -> tuple[int, str, str]:
    """`cli.main` on words: exit status, what it printed, what it complained of."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as caught,
    ):
        cli.main(words)
    return int(caught.value.code or 0), out.getvalue(), err.getvalue()


def train_all(folder: Path, *words: str) -> Done:
    """A sweep in a store and a folder of its own."""
    uri = fresh_store(folder)
    place = [f"tracking.uri='{uri}'", f"hydra.sweep.dir='{folder}/the sweep'"]
    answer = call("train", "-m", *place, *words)
    return Done(folder, list(words), *answer, mlflow.MlflowClient(uri))


def alone(folder: Path, uri: str, *words: str) -> Result:
    return mnist_exp.train([*words, f"tracking.uri='{uri}'", f"hydra.run.dir='{folder}'"])


def same_points(
    a: Mapping[str, list[tuple[int, float]]], b: Mapping[str, list[tuple[int, float]]],
    images: Mapping[str, int],
) -> None:  # fmt: skip
    for key in CURVES:
        assert [step for step, _ in a[key]] == [step for step, _ in b[key]], key
        split, _, kind = key.partition("/")
        for (step, x), (_, y) in zip(a[key], b[key], strict=True):
            if kind == "accuracy":
                assert abs(x - y) * images[split] <= IMAGES + 1e-6, (key, step)
            else:
                assert x == pytest.approx(y, rel=CLOSE["rel"], abs=CLOSE["abs"]), (key, step)


SIZES = {"train": 320, "val": 500}


def composed(*words: str) -> tuple[Any, Any, list[Any], list[SweepJob]]:
    """Loader, master config, parsed overrides, and jobs, of which none is composed."""
    context, master = compose_sweep(list(words))
    settings = validate_sweep(master)
    loader = context.config_loader
    parser = OverridesParser.create(config_loader=loader)
    overrides = parser.parse_overrides(typed_overrides(master))
    return loader, master, overrides, grid.expand(overrides, settings)


def planned(*words: str) -> list[SweepJob]:
    """Jobs that are checked."""
    context, master = compose_sweep(list(words))
    jobs = grid.jobs(context, master, Reporter())
    sweep.check(jobs, validate_sweep(master))
    assert [p.problem for p in jobs if p.problem] == []
    return jobs
