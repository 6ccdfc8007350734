"""Sweeps: stacked equals alone, one object in MLflow, faults that stay where they belong."""

import contextlib
import csv
import functools
import io
import itertools
import json
import logging
import shlex
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.image
import mlflow
import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from mlflow.entities import Run
from omegaconf import OmegaConf

import mnist_exp
from mnist_exp.cli import main as cli
from mnist_exp.config import schema
from mnist_exp.config.compose import compose, compose_sweep
from mnist_exp.config.schema import SweepConfig, task_config
from mnist_exp.config.validate import validate_sweep
from mnist_exp.data import dataset as data
from mnist_exp.errors import ConfigError
from mnist_exp.figures import samples, style
from mnist_exp.runs import recorder as record
from mnist_exp.runs import train as run
from mnist_exp.runs.evaluate import evaluate
from mnist_exp.runs.recorder import THREADS, Result
from mnist_exp.sweeps import grid, stacks, sweep
from mnist_exp.sweeps.manifest import SweepJob
from mnist_exp.tracking import checkpoint, journal
from mnist_exp.tracking.store import Store
from mnist_exp.training import loop as training
from mnist_exp.training import metrics
from mnist_exp.training.events import Epoch
from tests.helpers import finish, fresh_store, start, write_idx

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


@pytest.fixture(scope="module", autouse=True)
def traces() -> Iterator[None]:
    """Commands in this process leave handlers and a number of threads behind: all are put back.

    What takes long and is read in test_record is left out: pictures of single runs are blank, and
    no model is exported.
    """
    handlers, threads = logging.root.handlers[:], torch.get_num_threads()
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "record_model", lambda *arguments: None)
        figures = [
            (samples, "sample_grid"),
            (samples, "confusion_matrix"),
            (record, "learning_curves"),
        ]
        for module, name in figures:
            patch.setattr(module, name, lambda *arguments, **more: None)
        patch.setattr(style, "pixels", functools.partial(_pixels, style.pixels))
        patch.setattr(style, "save", functools.partial(_save, style.save))
        patch.setattr(data, "load", functools.cache(data.load))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("HYDRA_FULL_ERROR", raising=False)
        yield
    for number, handler in signals.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)
    logging.root.handlers[:] = handlers


def _pixels(real: Any, figure: Any) -> np.ndarray:
    return np.zeros((2, 2, 3), np.uint8) if figure is None else real(figure)


def _save(real: Any, figure: Any, path: Path) -> None:
    if figure is None:
        path.write_bytes(b"")
    else:
        real(figure, path)


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


# stacked equals alone


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Two learning rates, two momenta, two seeds: four cells, one stack."""
    words = ["optimizer=momentum", "optimizer.lr=0.02,0.1", "optimizer.momentum=0,0.9", "seed=0,3"]
    return train_all(tmp_path_factory.mktemp("a grid"), *SMALL, *words)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """What a stack carries besides; Adam, and dropout."""
    words = ["optimizer=adam", "optimizer.lr=0.01", "model.dropout=0.2"]
    words += ["training.label_smoothing=0,0.2", "schedule=constant,cosine"]
    return train_all(tmp_path_factory.mktemp("mixed"), *SMALL, *words)


@pytest.mark.parametrize("name", ["seeds", "mixed"])
def test_stacked_equals_alone(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    done: Done = request.getfixturevalue(name)
    assert done.status == 0, done.err
    count = len(done.children)
    assert f"{count} jobs, 1 stack of {count}\n" in done.out
    uri = fresh_store(tmp_path)
    seen = set()
    # of three keys with two values each, every second job has each pair of values all the same
    for number in (0, 3, 5, 6) if count == 8 else range(count):
        child, own = done.children[number], json.loads(done.children[number].data.tags["swept"])
        plain = [w for w in done.words if w.split("=")[0] not in own]
        result = alone(
            tmp_path / f"run {number}", uri, *plain, *(f"{k}={v}" for k, v in own.items())
        )
        client = mlflow.MlflowClient(uri)
        record = client.get_run(result.run_id)
        assert child.info.status == record.info.status == "FINISHED"
        assert child.info.run_name.startswith(record.info.run_name)
        assert child.data.tags["config_hash"] == record.data.tags["config_hash"]
        params = {k: v for k, v in child.data.params.items() if k != "tracking.uri"}
        assert params == {k: v for k, v in record.data.params.items() if k != "tracking.uri"}
        other = Done(tmp_path, [], 0, "", "", client)
        same_points(done.curves(child), other.curves(record), SIZES)
        assert len(done.curves(child)["train/loss"]) == 2
        seen.add(tuple(done.curves(child)["train/loss"]))
        for key in ("best/val_accuracy", "best/epoch"):
            step, value = points(done, child, key)
            assert step == 2 and value == pytest.approx(record.data.metrics[key], abs=IMAGES / 500)
        a, b = (
            checkpoint.load(folder / "checkpoint.pt")
            for folder in (done.own / str(number), tmp_path / f"run {number}")
        )
        assert a["epochs"] == b["epochs"] and a["model"].keys() == b["model"].keys()
        for key, tensor in a["model"].items():
            torch.testing.assert_close(tensor, b["model"][key], rtol=1e-3, atol=1e-5)
    assert len(seen) == 4  # else nothing was compared


def points(done: Done, found: Run, key: str) -> tuple[int, float]:
    """The only point of a metric."""
    (point,) = done.client.get_metric_history(found.info.run_id, key)
    return point.step, point.value


def test_each_job_has_its_folder(seeds: Done) -> None:
    files = {"checkpoint.pt", "checkpoint.pt.sha256", "config.yaml", "train.log", ".hydra"}
    for number, child in seeds.children.items():
        folder = seeds.own / str(number)
        assert child.data.tags["output_dir"] == str(folder)
        assert {path.name for path in folder.iterdir()} >= files
        config = OmegaConf.load(folder / "config.yaml")
        own = json.loads(child.data.tags["swept"])
        for key, value in own.items():
            assert OmegaConf.select(config, key) == float(value)
        assert OmegaConf.load(folder / ".hydra" / "config.yaml") == config
        typed: Any = OmegaConf.to_container(OmegaConf.load(folder / ".hydra" / "overrides.yaml"))
        assert {f"{key}={value}" for key, value in own.items()} <= set(typed)
        hydra = OmegaConf.load(folder / ".hydra" / "hydra.yaml").hydra
        assert (hydra.job.num, hydra.runtime.output_dir) == (number, str(folder))


def test_each_job_has_its_log(seeds: Done, tmp_path: Path) -> None:
    for number, child in seeds.children.items():
        text = (seeds.own / str(number) / "train.log").read_text()
        lines = text.splitlines()
        assert lines[0] == f"{child.info.run_name}  on cpu"
        epochs = [line for line in lines if line.startswith("epoch ")]
        curves = seeds.curves(child)
        assert len(epochs) == 2
        for line, (epoch, loss), (_, accuracy) in zip(
            epochs, curves["train/loss"], curves["val/accuracy"], strict=True
        ):
            assert line.startswith(f"epoch {epoch}/2  train loss {loss:.4f}  ")
            assert f"val accuracy {accuracy:7.2%}" in line
        kept = seeds.fetch(child, "train.log", tmp_path)
        assert kept.read_text() == text


def test_checkpoint_scores_what_the_best_epoch_did(seeds: Done) -> None:
    mnist = data.load(
        *("mnist",), root=None, val_size=500, train_size=320, split_seed=0, cache=Path("none")
    )
    assert mnist.val is not None
    for number, child in seeds.children.items():
        weights = checkpoint.load(seeds.own / str(number) / "checkpoint.pt")["model"]
        x = ((mnist.val.images.float() / 255 - mnist.mean) / mnist.std).flatten(1)
        layers = sorted({name.split(".")[0] for name in weights}, key=int)
        for layer in layers:
            x = x @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"]
            x = x.relu() if layer != layers[-1] else x
        right = int((x.argmax(1) == mnist.val.labels).sum())
        assert abs(right - 500 * child.data.metrics["best/val_accuracy"]) <= IMAGES


# one object


def test_parent_and_children(seeds: Done) -> None:
    parent = seeds.parent
    assert (parent.info.status, len(seeds.children)) == ("FINISHED", 8)
    assert {c.data.tags["mlflow.parentRunId"] for c in seeds.children.values()} == {
        parent.info.run_id
    }
    assert {r.info.experiment_id for r in seeds.runs} == {parent.info.experiment_id}
    assert seeds.client.get_experiment(parent.info.experiment_id).name == "mnist-exp"
    assert seeds.client.search_runs(["0"]) == []  # Default
    assert parent.info.start_time <= min(c.info.start_time for c in seeds.children.values())
    assert parent.info.end_time >= max(c.info.end_time for c in seeds.children.values())
    assert parent.data.params == {
        "sweep.optimizer.lr": "0.02,0.1",
        "sweep.optimizer.momentum": "0,0.9",
        "sweep.seed": "0,3",
    }
    assert parent.info.run_id in seeds.out
    assert "8 jobs, 1 stack of 8\n" in seeds.out and seeds.err == ""


@pytest.fixture(scope="module")
def launchers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """The same sweep through two of them."""
    return {
        name: train_all(
            tmp_path_factory.mktemp(name),
            *(*SMALL, "optimizer.lr=0.05,0.2", "sweep.test=all"),
            f"hydra/launcher={name}",
        )
        for name in ("basic", "stacked")
    }


def test_our_own_warnings_are_heard_after_hydra_has_set_up_its_logging(
    launchers: dict[str, Done],
) -> None:
    assert "basic" in launchers  # by which Hydra does so in this process
    assert not logging.getLogger("mnist_exp.tracking.store").disabled


def test_launchers_leave_the_same_records(launchers: dict[str, Done]) -> None:
    basic, stacked = launchers["basic"], launchers["stacked"]
    assert (basic.status, stacked.status) == (0, 0), (basic.err, stacked.err)
    assert [d.parent.data.tags["launcher"] for d in (basic, stacked)] == ["basic", "stacked"]
    assert basic.parent.data.tags.keys() == stacked.parent.data.tags.keys()
    assert basic.parent.data.params == stacked.parent.data.params
    assert basic.parent.data.metrics.keys() == stacked.parent.data.metrics.keys()
    assert len(basic.children) == len(stacked.children) == 2
    description = stacked.parent.data.tags["mlflow.note.content"]
    assert (
        description.startswith("| rank | ")
        and f"experiments={stacked.own}/best.yaml" in description
    )
    for number, a in basic.children.items():
        b = stacked.children[number]
        assert a.info.run_name == b.info.run_name
        assert a.info.status == b.info.status == "FINISHED"
        here = {"tracking.uri"}
        assert {k: v for k, v in a.data.params.items() if k not in here} == {
            k: v for k, v in b.data.params.items() if k not in here
        }
        assert a.data.metrics.keys() == b.data.metrics.keys() >= {"test/accuracy", *CURVES}
        assert a.data.tags.keys() == b.data.tags.keys()
        differ = {k for k, v in a.data.tags.items() if v != b.data.tags[k]}
        assert differ <= {
            *("mlflow.parentRunId", "output_dir", "stack_size", "choices", "overrides"),
            *("git_dirty", "command_line", "run_key", "mlflow.note.content"),
            *("mlflow.loggedImages", "mlflow.log-model.history", "first_losses"),
        }
        first = [json.loads(run.data.tags["first_losses"]) for run in (a, b)]
        assert first[0] == pytest.approx(first[1], rel=1e-5)
        same_points(basic.curves(a), stacked.curves(b), SIZES)
        for done, child in ((basic, a), (stacked, b)):
            kept = {f.path for f in done.client.list_artifacts(child.info.run_id)}
            assert kept >= {"config.yaml", "train.log", "checkpoint", "curves.png", "images"}
            names = {p.name for p in (done.own / str(number)).iterdir()}
            assert names >= {
                *("checkpoint.pt", "checkpoint.pt.sha256", "config.yaml", "curves.png"),
                *("train.log", ".hydra", "journal.jsonl"),
            }


# the plan


def composed(*words: str) -> tuple[Any, Any, list[Any], list[SweepJob]]:
    """Loader, master config, parsed overrides, and jobs, of which none is composed."""
    context, master = compose_sweep(list(words))
    settings = validate_sweep(master)
    loader = context.config_loader
    parser = OverridesParser.create(config_loader=loader)
    overrides = parser.parse_overrides(list(master.hydra.overrides.task))
    return loader, master, overrides, grid.expand(overrides, settings)


def planned(*words: str) -> list[SweepJob]:
    """Jobs that are checked."""
    context, master = compose_sweep(list(words))
    jobs = grid.jobs(context, master)
    sweep.check(jobs, validate_sweep(master))
    assert [p.problem for p in jobs if p.problem] == []
    return jobs


def sizes(jobs: Sequence[SweepJob], most: int | None = None) -> list[int]:
    found = stacks.plan(jobs, most)
    numbers = [p.number for stack in found for p in stack]
    assert sorted(numbers) == [p.number for p in jobs]  # each once
    return sorted(len(stack) for stack in found)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for noise that is read in a moment."""
    root = write_idx(tmp_path_factory.mktemp("idx") / "images", size=8, classes=5, count=600)
    return ["dataset=idx", f"dataset.root='{root}'", "dataset.val_size=100", "training.device=cpu"]


@pytest.mark.parametrize(
    "words, expected",
    [
        ("optimizer.lr=0.1,0.2 seed=0,1", [4]),
        ("optimizer=adam optimizer.betas=[0.9,0.99],[0.8,0.9]", [2]),
        ("optimizer.weight_decay=0,1e-4 training.label_smoothing=0,0.1", [4]),
        ("+optimizer.dampening=0,0.5 optimizer.momentum=0,0.9", [4]),
        ("schedule=constant,cosine,step schedule.warmup_epochs=0,1", [6]),
        ("training.patience=null,1,2", [3]),
        ("model=linear,mlp seed=0,1", [2, 2]),
        ("model.hidden=[8],[16],[8,8] seed=0,1", [2, 2, 2]),
        ("training.batch_size=32,64 seed=0,1", [2, 2]),
        ("training.epochs=1,2 dataset.train_size=100,200", [1, 1, 1, 1]),
        ("dataset.split_seed=0,1 optimizer.lr=0.1,0.2", [2, 2]),
        ("optimizer=sgd,adam,adamw", [1, 1, 1]),
        ("optimizer=momentum +optimizer.nesterov=true,false", [1, 1]),
        ("optimizer=momentum,nesterov optimizer.lr=0.1,0.2", [2, 2]),
    ],
)
def test_what_shares_a_stack(words: str, expected: list[int], images: list[str]) -> None:
    assert sizes(planned(*images, *words.split())) == expected


@pytest.fixture(scope="module")
def eight(images: list[str]) -> list[SweepJob]:
    return planned(*images, "seed=range(4)", "optimizer.lr=0.1,0.2")


@pytest.mark.parametrize("most", [1, 2, 3, 5, 7, 8, 100])
def test_stacks_are_balanced(most: int, eight: list[SweepJob]) -> None:
    found = sizes(eight, most)
    assert len(found) == -(-8 // most)
    assert max(found) <= most and max(found) - min(found) <= 1


@pytest.mark.parametrize(
    "words, most, expected",
    [
        ("model=cnn", None, [1, 1, 1]),
        ("model=cnn", 2, [1, 2]),
        ("optimizer=adam optimizer._target_=torch.optim.NAdam", None, [1, 1, 1]),
        ("optimizer=adam optimizer._target_=torch.optim.NAdam", 8, [1, 1, 1]),
        ("model.hidden=[2000,2000]", None, [1, 1, 1]),  # beyond the caches
        ("model.hidden=[2000,2000]", 3, [3]),
    ],
)
def test_what_stays_alone_on_a_cpu(
    words: str, most: int | None, expected: list[int], images: list[str]
) -> None:
    assert sizes(planned(*images, *words.split(), "seed=0,1,2"), most) == expected


def test_a_stack_of_one_seed_where_it_can_be(eight: list[SweepJob]) -> None:
    """Its images are gathered once for all."""
    for stack in stacks.plan(eight, 2):
        assert len({p.values["seed"] for p in stack}) == 1


# the configs


RECIPE = """# @package _global_
defaults:
  - override /optimizer: adam
seed: 4
optimizer: {weight_decay: 0.01}
tracking: {tags: {team: blue}}
hydra:
  mode: MULTIRUN
  sweeper:
    params:
      optimizer.lr: 0.1,1e-3
      model.dropout: choice(0.0,0.5)
"""


@pytest.mark.parametrize(
    "words",
    [
        ["optimizer.lr=0.1,1e-3,1E-2,.5,1"],
        ["seed=range(3)", "optimizer.lr=choice(0.3,0.1)"],
        ["model=linear,mlp"],
        ["model=glob(l*)", "optimizer.lr=0.1,0.2"],
        ["model=linear,mlp", "optimizer=adam", "optimizer.lr=0.1,0.2", "seed=5"],
        ["+optimizer.dampening=0,0.1", "optimizer.momentum=0.1,0.9"],
        ["model.hidden=[8],[16,8],[]", "training.batch_size=32,64"],
        ["tracking.run_name='a b','c,d',null,\"it's\",a\\,b"],
        ["training.patience=null,1,2", "dataset.classes=null,[a,b]"],
        ["optimizer.weight_decay=${optimizer.lr},0", "optimizer.lr=0.1,0.2"],
        ["~model.dropout", "model.hidden=[8],[16]"],
        ["trusted_packages=[a],[b,c]"],
        ["training.device=auto,'cpu'", "training.compile=never,always"],
        ["tracking=default", "tracking.image_every=1,null", "tracking.experiment=a"],
        ["++tracking.tags={a: x},{b: y}", "seed=0,1"],
        ["RECIPE", "tracking.tags={team: x},{team: y}"],
        ["RECIPE", "optimizer.weight_decay=0.1,0.2", "tracking.tags.team=red,green"],
    ],
)
def test_the_fast_way_composes_as_hydra_does(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(RECIPE)
    words = [f"experiments={tmp_path}/own.yaml" if w == "RECIPE" else w for w in words]
    loader, master, overrides, jobs = composed(*words)
    assert list(grid.compose(loader, master, overrides, jobs)) == jobs
    assert len(jobs) > 1
    for p in jobs:
        assert p.problem == ""
        expected = loader.load_sweep_config(master, p.overrides)
        p.config.hydra.job.override_dirname = expected.hydra.job.override_dirname
        assert p.config == expected
        plain = [OmegaConf.to_container(task_config(c)) for c in (p.config, expected)]
        # == takes 1 for 1.0 and True
        assert json.dumps(plain[0]) == json.dumps(plain[1])
        assert p.config.hydra.overrides == expected.hydra.overrides
        assert p.config.hydra.runtime.choices == expected.hydra.runtime.choices


def test_name_of_a_folder_after_the_overrides() -> None:
    loader, master, overrides, jobs = composed("optimizer.lr=0.1,0.2,0.3", "model=linear")
    jobs = list(grid.compose(loader, master, overrides, jobs))
    names = [p.config.hydra.job.override_dirname for p in jobs]
    assert names == [f"model=linear,optimizer.lr={lr}" for lr in ("0.1", "0.2", "0.3")]


def test_jobs_do_not_share_their_configs() -> None:
    jobs = planned(*SMALL, "seed=0,1", "optimizer.lr=0.1,0.2")
    jobs[0].config.optimizer.lr = 9.0
    assert [p.config.optimizer.lr for p in jobs[1:]] == [0.2, 0.1, 0.2]


def test_recipe_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without -m; what it sweeps can be set, or swept otherwise, on the command line."""
    (tmp_path / "own.yaml").write_text(RECIPE)
    told: list[list[Mapping[str, str]]] = []

    def stop(jobs: Sequence[SweepJob], settings: SweepConfig) -> None:
        told.append([p.values for p in jobs])
        raise ConfigError("enough")

    monkeypatch.setattr(sweep, "check", stop)
    recipe = f"experiments={tmp_path}/own.yaml"
    for words in ([], ["optimizer.lr=0.2"], ["-m", "optimizer.lr=1,2,3"], ["-m", "seed=0,1"]):
        assert call("train", recipe, *words, f"tracking.uri=sqlite:///{tmp_path}/s.db")[0] == 2
    assert [len(values) for values in told] == [4, 2, 6, 8]
    assert {v["optimizer.lr"] for v in told[0]} == {"0.1", "0.001"}
    assert {v["optimizer.lr"] for v in told[2]} == {"1", "2", "3"}


def test_later_edits_do_not_reach_queued_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conf" / "optimizer").mkdir(parents=True)
    file = tmp_path / "conf" / "optimizer" / "own.yaml"
    file.write_text("_target_: torch.optim.SGD\nlr: 0.25\n")
    fit, edits = training.fit, iter(["_target_: torch.optim.SGD\nlr: 0.5\n", "lr: [nonsense\n"])

    def edit(*arguments: Any, **more: Any) -> Iterator[Any]:
        file.write_text(next(edits))
        return fit(*arguments, **more)

    monkeypatch.setattr(training, "fit", edit)
    place = ["--config-dir", str(tmp_path / "conf")]
    words = ["optimizer=own", "training.batch_size=32,64", "training.epochs=1", ONE_AT_A_TIME]
    done = train_all(tmp_path, *place, *SMALL, *words)
    assert done.status == 0, done.err
    assert "2 stacks of 1" in done.out
    assert [c.data.params["optimizer.lr"] for c in done.children.values()] == ["0.25", "0.25"]
    assert next(edits, None) is None  # else nothing was edited


# bad sweeps


@pytest.mark.parametrize(
    "words, parts",
    [
        (["optimizr.lr=1,2"], ["job 0", "optimizr", "Did you mean optimizer?"]),
        (["model=mlp,linear", "model.dropout=0,0.1"], ["job 2", "model.dropout", "no such key"]),
        (["+optimizer.speed=1,2"], ["job 0", "optimizer.speed", "no such argument"]),
        (["optimizer.lr=0.1,0.2,-1", "seed=0,1"], ["job 4", "optimizer.lr=-1", "0 or more"]),
        (["training.epochs=1,2,x"], ["job 2", "training.epochs=x", "whole number"]),
        (["dataset.val_size=10,60000"], ["job 1", "dataset.val_size=60000"]),
        (["model=mlp,cn"], ["job 1", "model=cn", "Did you mean cnn?"]),
        (["model.dropout=0.1,2"], ["job 1", "model.dropout=2", "between 0 and 1"]),
        (["model.hidden=[8],[-1]"], ["job 1", "model", "1 unit or more"]),
        (
            ["model._target_=mnist_exp.training.models.MLP,os.system"],
            ["job 1", "os.system", "not allowed"],
        ),
        (["seed=0,1,0"], ["job 2", "seed=0", "the same as job 0"]),
        (["optimizer.lr=0.1,1e-1"], ["job 1", "optimizer.lr=0.1", "the same as job 0"]),
        (["tracking.run_name=a,b"], ["job 1", "tracking.run_name=b", "the same as job 0"]),
        ([], ["nothing is swept", "-m"]),
        (["optimizer.lr=0.1"], ["nothing is swept"]),
        (["seed=choice()"], ["seed=choice()", "empty choice"]),
        (["seed=range(3,3)", "optimizer.lr=1,2"], ["seed=range(3,3)", "no values"]),
        (["optimizer.lr=interval(0,1)"], ["optimizer.lr=interval(0,1)", "0.01,0.1"]),
        (["dataset=idx", "dataset.root=/nonexistent,/nor-this"], ["job 0", "/nonexistent"]),
        (["experiments=nowhere,seed_mlp"], ["job 0", "experiments=nowhere", "seed_mlp"]),
        (["experiments=nowhere.yaml", "seed=0,1"], ["experiments=nowhere.yaml", "no such file"]),
        (["tracking.experiment=a,b"], ["job 1", "tracking.experiment", "cannot be swept"]),
        (["tracking.uri=sqlite:////tmp/none/a.db,sqlite:////tmp/none/b.db"], ["tracking.uri"]),
        (["training.patience=1,2", "dataset.val_size=0"], ["training.patience=1", "val_size"]),
        (["seed=range(10001)"], ["10,000", "sweep.max_jobs=N"]),
        (["seed=range(1000000000)"], ["10,000", "sweep.max_jobs=N"]),
        (["seed=range(101)", "dataset.split_seed=range(100)"], ["10,000", "sweep.max_jobs=N"]),
        (["seed=range(1000)", "dataset.split_seed=range(1000)", "training.epochs=range(1000)"],
         ["10,000", "sweep.max_jobs=N"]),
        (["seed=0,1", "hydra.launcher.max_stack=0"], ["hydra.launcher.max_stack=0", "1 or more"]),
        (["seed=0,1", "hydra.launcher.max_stack=x"], ["hydra.launcher.max_stack"]),
        (["seed=0,1", "sweep.on_error=foo"], ["sweep.on_error=foo", "continue or stop"]),
        (["seed=range(4)", "sweep.max_jobs=3"], ["more than 3 jobs", "sweep.max_jobs=N"]),
        (["seed=0,1", "sweep.max_jobs=0"], ["sweep.max_jobs=0", "1 or more"]),
        (["seed=0,1", "sweep.test=foo"], ["sweep.test=foo", "chosen or all"]),
        (["seed=0,1", "sweep.skipinvalid=true"], ["sweep.skipinvalid"]),
        (["seed=0,1", "hydra/launcher=foo"], ["hydra/launcher=foo", "stacked"]),
        (["seed=0,1", "hydra.launcher.max_stak=3"], ["max_stak", "hydra.launcher has: max_stack"]),
        (["seed=0,1", "hydra/launcher=joblib", "hydra.launcher.max_stack=3"], ["has: n_jobs"]),
        (["seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=0"],
         ["hydra.launcher.n_jobs=0", "1 or more"]),
        (["seed=0,1", "sweep=2"], ["sweep: takes no value", "sweep has: on_error"]),
        (["seed=0,1", "seed=2,3"], ["seed=0,1 seed=2,3", "swept twice"]),
        (["experiments=lr_batch_grid,seed_mlp"], ["job 0", "seed=0,1,2", "a sweep of its own"]),
        (["experiments=a.yaml,b.yaml"], ["experiments=a.yaml: there is no such file"]),
        (["optimizer.lr=0.1,"], ["optimizer.lr=0.1,: a value is missing"]),
        (["optimizer.lr=-1,-2", "sweep.skip_invalid=true"], ["no job is left", "optimizer.lr=-1"]),
    ],
)  # fmt: skip
def test_bad_sweep(words: list[str], parts: list[str], tmp_path: Path) -> None:
    own = [f"tracking.uri=sqlite:///{tmp_path}/store.db"]
    if any(word.startswith("tracking.uri=") for word in words):
        own = []
    refused(tmp_path, [*BASE, *own, *words], parts)


def refused(folder: Path, words: Sequence[str], parts: Sequence[str]) -> None:
    """Soon, with one message and exit status 2, and nothing is there that was not before."""
    before, began = sorted(folder.rglob("*")), time.monotonic()
    status, out, err = call("train", "-m", *words, f"hydra.sweep.dir={folder}/sweep")
    assert (status, out) == (2, ""), err
    assert err.startswith("mnist-exp: ") and err.count("mnist-exp: ") == 1
    assert "Traceback" not in err
    assert [part for part in parts if part not in err] == [], err
    assert sorted(folder.rglob("*")) == before
    assert time.monotonic() - began < 10


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    words = [*BASE, "seed=0,1", f"tracking.uri=sqlite:///{tmp_path}/store.db"]
    status, _, err = call("train", "-m", *words, "hydra.sweep.dir=/proc/sweep")
    assert status == 2 and "/proc/sweep" in err and "hydra.sweep.dir=FOLDER" in err, err
    assert not list(tmp_path.iterdir())


def test_jobs_are_told_apart_by_their_names(seeds: Done) -> None:
    names = [child.info.run_name for child in seeds.children.values()]
    assert len(set(names)) == 8
    assert names[0] == "mlp-16 momentum lr=0.02 bs=64 seed=0 momentum=0"


def test_jobs_of_every_launcher_are_told_apart(faults: Done) -> None:
    names = [child.info.run_name for child in faults.children.values()]
    assert sorted(name.split()[-1] for name in names) == ["fault=error", "fault=exit", "fault=none"]


def test_a_fault_in_the_first_of_many_jobs_is_told_at_once() -> None:
    began = time.monotonic()
    status, _, err = call("train", "-m", *BASE, "optimizer.lr=-1,0.1", "seed=range(5000)")
    assert status == 2 and "job 0" in err and "optimizer.lr=-1" in err, err
    assert time.monotonic() - began < 20  # all of them would take minutes


def test_who_sweeps_many_jobs_is_told_of_the_wait() -> None:
    said: list[str] = []
    context, master = compose_sweep([*SMALL, "seed=range(150)"])
    assert len(grid.jobs(context, master, said.append)) == 150
    assert said == ["checking 150 jobs before the first one starts: about 5 s"]


def test_more_than_10000_jobs_where_they_are_meant() -> None:
    *_, jobs = composed(*SMALL, "seed=range(10001)", "sweep.max_jobs=10001")
    assert len(jobs) == 10_001
    assert jobs[-1].values == {"seed": "10000"}


def test_exactly_10000_jobs_need_no_word() -> None:
    assert len(composed(*SMALL, "seed=range(100)", "dataset.split_seed=range(100)")[-1]) == 10_000


def test_skip_invalid(tmp_path: Path) -> None:
    words = ["optimizer.lr=0.1,-1,0.2,0.1", "training.epochs=1", "sweep.skip_invalid=true"]
    done = train_all(tmp_path, *SMALL, *words)
    assert done.status == 0, done.err
    assert [swept(c)["lr"] for c in done.children.values()] == ["0.1", "0.2"]
    assert {c.info.status for c in done.children.values()} == {"FINISHED"}
    assert done.parent.info.status == "FINISHED"
    lines = [line for line in done.out.splitlines() if "INVALID" in line]
    assert any("-1" in line and "optimizer.lr=-1" in line for line in lines)
    assert any("the same as job 0" in line for line in lines)
    assert len(lines) == 2


# faults


def test_diverged_run_ends_alone(seeds: Done, tmp_path: Path) -> None:
    words = [w.replace("lr=0.02,0.1", "lr=0.02,1e30,0.1") for w in seeds.words]
    done = train_all(tmp_path, *words)
    assert done.status == 1
    assert "4 of 12 jobs did not finish" in done.err
    assert "12 jobs, 1 stack of 12" in done.out
    assert done.parent.info.status == "FAILED"
    reason = done.parent.data.tags["reason"]
    assert "4 of 12 jobs did not finish" in reason
    failed = [c for c in done.children.values() if swept(c)["lr"] == "1e+30"]
    assert len(failed) == 4
    for child in failed:
        assert child.info.status == "FAILED"
        assert "diverged" in child.data.tags["reason"] and "1e+30" in child.data.tags["reason"]
        log = Path(child.data.tags["output_dir"], "train.log").read_text()
        assert "diverged" in log
        weights = checkpoint.load(Path(child.data.tags["output_dir"]) / "checkpoint.pt")["model"]
        assert all(bool(torch.isfinite(w).all()) for w in weights.values())
    table = [line for line in done.out.splitlines() if " FAILED " in line]
    assert len(table) == 4 and all("diverged" in line for line in table)
    for before in seeds.children.values():
        after = done.child(**swept(before))
        assert after.info.status == "FINISHED"
        same_points(seeds.curves(before), done.curves(after), SIZES)
    assert done.parent.data.tags["chosen"] == seeds.parent.data.tags["chosen"]
    assert done.parent.data.metrics["jobs/finished"] == 8
    assert done.parent.data.metrics["jobs/not_finished"] == 4


FAULTY = """
import os
import signal
from dataclasses import dataclass

import torch
from mnist_exp.training.models import MLP
from mnist_exp.training.schedules import Constant


class Net(MLP):
    def __init__(self, input_shape, num_classes, fault="none"):
        super().__init__(input_shape, num_classes, (16,))
        self.fault = fault

    def forward(self, x):
        if self.fault != "none" and self.training and bool(x.any()):  # images, not a trial
            if self.fault == "error":
                raise ValueError("out of luck")
            if self.fault == "exit":
                raise SystemExit(3)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


class Picky(MLP):  # about its seed
    def __init__(self, input_shape, num_classes):
        super().__init__(input_shape, num_classes, (16,))
        if torch.initial_seed() == 7:
            raise ValueError("not the seven")


@dataclass(frozen=True, kw_only=True)
class Trap(Constant):
    closes: float = 9.0

    def after_warmup(self, epoch, epochs):
        if epoch >= self.closes:
            raise RuntimeError("the trap")
        return 1.0
"""
TRUSTED = "trusted_packages=[faulty]"
OWN_NET = [TRUSTED, "~model.hidden", "~model.dropout", "model._target_=faulty.Net"]


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture(scope="module", params=["stacked", "basic"])
def faults(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Done]:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "faulty.py").write_text(FAULTY)
    words = ["+model.fault=error,exit,none", f"hydra/launcher={request.param}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        yield train_all(folder, *BASE, *OWN_NET, *words)


def test_exception_in_the_code_of_a_job(faults: Done) -> None:
    assert faults.status == 1
    assert "2 of 3 jobs did not finish" in faults.err
    error, left, fine = (faults.child(fault=name) for name in ("error", "exit", "none"))
    assert [r.info.status for r in (error, left, fine)] == ["FAILED", "FAILED", "FINISHED"]
    assert error.data.tags["reason"] == "ValueError: out of luck"
    assert "SystemExit" in left.data.tags["reason"]
    log = Path(error.data.tags["output_dir"], "train.log").read_text()
    assert "Traceback" in log and 'raise ValueError("out of luck")' in log
    for child in (error, left):
        kept = {f.path for f in faults.client.list_artifacts(child.info.run_id)}
        assert "train.log" in kept
    assert "out of luck" in faults.out
    assert fine.data.metrics["test/accuracy"] > 0.1
    assert faults.parent.info.status == "FAILED"


def test_traceback_of_code_that_leaves(faults: Done) -> None:
    log = Path(faults.child(fault="exit").data.tags["output_dir"], "train.log").read_text()
    assert "SystemExit" in log and "raise SystemExit(3)" in log


@pytest.mark.usefixtures("faulty")
def test_exception_within_a_stack(tmp_path: Path) -> None:
    """Its cause cannot be told from outside: the stack is halved until it is alone."""
    words = [TRUSTED, "schedule._target_=faulty.Trap"]
    done = train_all(tmp_path / "with", *SMALL, *words, "+schedule.closes=9,1,8")
    without = train_all(tmp_path / "without", *SMALL, *words, "+schedule.closes=9,8")
    assert (done.status, without.status) == (1, 0)
    assert len(done.children) == 3  # what was begun again has left no runs
    for child in done.children.values():
        if swept(child)["closes"] == "1":
            assert child.info.status == "FAILED"
            assert child.data.tags["reason"] == "RuntimeError: the trap"
            log = Path(child.data.tags["output_dir"], "train.log").read_text()
            assert "Traceback" in log and "RuntimeError: the trap" in log
        else:
            assert child.info.status == "FINISHED"
            before = without.child(**swept(child))
            same_points(without.curves(before), done.curves(child), SIZES)


@pytest.mark.usefixtures("faulty")
def test_what_diverged_before_its_stack_failed_is_not_trained_again(tmp_path: Path) -> None:
    words = [*SMALL, TRUSTED, "schedule._target_=faulty.Trap", "training.epochs=3"]
    done = train_all(tmp_path / "sweep", *words, "+schedule.closes=2,9", "optimizer.lr=0.1,1e30")
    assert done.status == 1
    kinds = {}
    for child in done.children.values():
        entries, _ = journal.read(Path(child.data.tags["output_dir"]))
        own = swept(child)
        kinds[own["lr"], own["closes"]] = (
            child.info.status,
            [e.kind for e in entries if e.kind in ("begin", "resume")],
        )
    assert kinds["1e+30", "9"] == kinds["1e+30", "2"] == ("FAILED", ["begin"])
    assert kinds["0.1", "9"] == ("FINISHED", ["begin", "resume"])
    assert kinds["0.1", "2"][0] == "FAILED"


@pytest.mark.usefixtures("faulty")
@pytest.mark.parametrize("launcher", ["stacked", "basic"])
def test_exception_while_a_job_is_built(launcher: str, tmp_path: Path) -> None:
    words = [*OWN_NET, "model._target_=faulty.Picky", "seed=7,0"]
    done = train_all(tmp_path, *BASE, *words, f"hydra/launcher={launcher}")
    assert done.status == 1
    assert "1 of 2 jobs did not finish" in done.err
    assert done.child(seed=0).info.status == "FINISHED"
    assert done.child(seed=7).info.status == "FAILED"
    assert "not the seven" in done.child(seed=7).data.tags["reason"]
    assert "Traceback" in (done.own / "0" / "train.log").read_text()


@pytest.mark.parametrize("launcher", ["stacked", "basic"])
def test_stop_on_error(launcher: str, tmp_path: Path) -> None:
    # what shares a stack is not what follows each other
    words = ["optimizer.lr=1e30,0.1", "training.batch_size=32,64", "training.epochs=1"]
    words += [f"hydra/launcher={launcher}", "hydra.launcher.max_stack=1", "sweep.on_error=stop"]
    words.append(ONE_AT_A_TIME)
    done = train_all(tmp_path, *SMALL, *[w for w in words if launcher != "basic" or "max" not in w])
    assert done.status == 1
    assert "4 of 4 jobs did not finish" in done.err
    assert [c.info.status for c in done.children.values()] == ["FAILED"]
    jobs = json.loads((done.own / "sweep.json").read_text())["jobs"]
    found = {tuple(job["values"].values()): (job["status"], job["reason"]) for job in jobs}
    (first,) = [values for values, (status, _) in found.items() if status == "FAILED"]
    assert "diverged" in found.pop(first)[1]
    assert first == tuple(json.loads(done.children[0].data.tags["swept"]).values())
    assert set(found.values()) == {("NOT RUN", "an earlier job failed (sweep.on_error=stop)")}
    assert done.parent.info.status == "FAILED"


def test_a_sweep_is_not_overwritten_by_the_next_one(tmp_path: Path) -> None:
    words = [*SMALL, "training.epochs=1", "hydra/launcher=basic"]
    first = train_all(tmp_path, *words, "optimizer.lr=0.1,0.2")
    assert first.status == 0, first.err
    record = (first.own / "journal.jsonl").read_bytes()
    same = f"hydra.sweep.dir='{first.own}'"
    store = f"tracking.uri='{fresh_store(tmp_path / 'again')}'"
    status, _, err = call("train", "-m", *words, same, store, "optimizer.lr=0.3,0.4")
    assert status == 2 and f"mnist-exp resume {first.own}" in err
    assert (first.own / "journal.jsonl").read_bytes() == record


def test_jobs_that_would_share_a_folder_are_refused(tmp_path: Path) -> None:
    own = f"tracking.uri=sqlite:///{tmp_path}/store.db"
    words = [*SMALL, own, "seed=0,1", "hydra.sweep.subdir=same"]
    refused(tmp_path, words, ["hydra.sweep.subdir"])


def test_folder_named_after_what_is_swept(tmp_path: Path) -> None:
    """As Hydra's own documentation has it."""
    subdir = "hydra.sweep.subdir='lr=${optimizer.lr},job=${hydra.job.num}'"
    done = train_all(tmp_path, *SMALL, "training.epochs=1", "optimizer.lr=0.1,0.2", subdir)
    assert done.status == 0, done.err
    folders = {Path(c.data.tags["output_dir"]).name for c in done.children.values()}
    assert folders == {"lr=0.1,job=0", "lr=0.2,job=1"}


@pytest.mark.parametrize("when", ["training", "test"])
def test_interrupted_sweep(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is left RUNNING."""
    fit = training.fit

    def signalled(*arguments: Any, **more: Any) -> Iterator[Any]:
        for event in fit(*arguments, **more):
            yield event
            if isinstance(event, Epoch) and when == "training":
                raise KeyboardInterrupt

    def late(*arguments: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "fit", signalled)
    if when == "test":
        monkeypatch.setattr(run, "record_deferred_test", late)
    done = train_all(tmp_path, *SMALL, "seed=0,1", "training.batch_size=32,64", ONE_AT_A_TIME)
    *_, said, again = done.err.splitlines()
    assert (done.status, said) == (130, "mnist-exp: interrupted. To go on with it:")
    assert shlex.split(again)[-2:] == ["resume", str(done.own)]
    assert done.parent.info.status == "KILLED"
    statuses = [c.info.status for c in done.children.values()]
    assert statuses == (["KILLED"] * 2 if when == "training" else ["FINISHED"] * 4)


@pytest.fixture(scope="module", autouse=True)
def joblib(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """A sweep in processes, which runs beside the other tests."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    folder = tmp_path_factory.mktemp("joblib")
    (folder / "faulty.py").write_text(FAULTY)
    uri = fresh_store(folder)
    words = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "+model.fault=none,kill,exit"]
    place = [f"tracking.uri={uri}", f"hydra.sweep.dir='{folder}/the sweep'"]
    process = start(["train", "-m", *BASE, *OWN_NET, *words, *place], folder)
    yield process, folder
    if process.poll() is None:
        process.terminate()  # not a kill, as joblib's processes would outlive it
        process.communicate()


def test_killed_process_ends_its_job_alone(
    joblib: "tuple[subprocess.Popen[str], Path]",
) -> None:
    process, folder = joblib
    status, out, err = finish(process)
    client = mlflow.MlflowClient(f"sqlite:///{folder}/store.db")
    done = Done(folder, [], status, out, err, client)
    assert status == 1, (out, err)
    assert "2 of 3 jobs did not finish" in err
    killed, left, fine = (done.child(fault=name) for name in ("kill", "exit", "none"))
    assert [r.info.status for r in (killed, left, fine)] == ["KILLED", "FAILED", "FINISHED"]
    assert "SIGKILL" in killed.data.tags["reason"]
    assert "SIGKILL" in Path(killed.data.tags["output_dir"], "train.log").read_text()
    assert "SystemExit" in left.data.tags["reason"]
    assert fine.data.metrics["test/accuracy"] > 0.1
    assert done.parent.info.status == "FAILED"
    parent = done.parent.info.run_id
    assert {c.data.tags["mlflow.parentRunId"] for c in done.children.values()} == {parent}
    assert client.search_runs(["0"]) == []
    (row,) = [line for line in out.splitlines() if " KILLED " in line]
    assert "SIGKILL" in row


# cells, and the choice


def cells(done: Done) -> dict[tuple[str, ...], list[Run]]:
    """Children by everything but their seed."""
    found: dict[tuple[str, ...], list[Run]] = {}
    for child in done.children.values():
        own = swept(child)
        found.setdefault((own["lr"], own["momentum"]), []).append(child)
    return found


def accuracies(runs: Sequence[Run], key: str = "best/val_accuracy") -> list[float]:
    return [r.data.metrics[key] for r in runs]


def chosen_of(done: Done) -> tuple[str, ...]:
    means = {cell: statistics.fmean(accuracies(runs)) for cell, runs in cells(done).items()}
    assert len(set(means.values())) == len(means)  # else the choice is arbitrary
    return max(means, key=lambda cell: means[cell])


def test_seeds_are_one_cell(seeds: Done, tmp_path: Path) -> None:
    best = chosen_of(seeds)
    assert seeds.parent.data.tags["chosen"] == f"lr={best[0]} momentum={best[1]}"
    values, tests = (
        accuracies(cells(seeds)[best], key) for key in ("best/val_accuracy", "test/accuracy")
    )
    metrics = seeds.parent.data.metrics
    for key, own in (("best/val_accuracy", values), ("test/accuracy", tests)):
        assert metrics[key] == pytest.approx(statistics.fmean(own))
        assert metrics[f"{key}_std"] == pytest.approx(statistics.stdev(own))
        assert metrics[f"{key}_n"] == len(own) == 2
    with seeds.fetch(seeds.parent, "leaderboard.csv", tmp_path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    for row in rows:
        cell = (row["optimizer.lr"], row["optimizer.momentum"])
        runs = cells(seeds)[cell]
        own = accuracies(runs)
        assert float(row["val_accuracy_mean"]) == pytest.approx(statistics.fmean(own))
        assert float(row["val_accuracy_std"]) == pytest.approx(statistics.stdev(own))
        assert row["val_accuracy_n"] == "2"
        assert set(row["run_ids"].split()) == {r.info.run_id for r in runs}
        assert (row["chosen"] == "yes") == (cell == best)
        assert bool(row["test_accuracy_mean"]) == (cell == best)
    means = [float(row["val_accuracy_mean"]) for row in rows]
    assert means == sorted(means, reverse=True)
    text = f"{statistics.fmean(values):.2%}".replace("%", " %")
    spread = f"± {100 * statistics.stdev(values):.2f} (2)"
    assert f"{text} {spread}" in seeds.out


def test_test_set_is_read_for_the_chosen_cell_alone(seeds: Done) -> None:
    best = chosen_of(seeds)
    for cell, runs in cells(seeds).items():
        for r in runs:
            assert ("test/accuracy" in r.data.metrics) == (cell == best)
            assert ("test/loss" in r.data.metrics) == (cell == best)
            assert r.info.status == "FINISHED"
            if cell == best:
                found = evaluate(seeds.store, seeds.store.get(r.info.run_id))
                recorded = {key: found.recorded[key] for key in found.test}
                assert found.test == pytest.approx(recorded, rel=1e-6)  # other threads add it up


def test_all_are_tested_where_the_sweep_asks_for_it(launchers: dict[str, Done]) -> None:
    for done in launchers.values():
        for child in done.children.values():
            found = evaluate(done.store, done.store.get(child.info.run_id))
            assert found.recorded.keys() == found.test.keys()
            assert abs(found.test["test/accuracy"] - found.recorded["test/accuracy"]) < 2e-4


def test_the_test_set_does_not_choose(
    seeds: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turned upside down, all of it known at the time, it changes nothing."""
    score = metrics.score

    def inverted(logits: Any, split: Any, prefix: str) -> list[dict[str, float]]:
        found = score(logits, split, prefix)
        if prefix == "test":
            found = [{k: 1 - v if k == "test/accuracy" else v for k, v in m.items()} for m in found]
        return found

    monkeypatch.setattr(metrics, "score", inverted)
    done = train_all(tmp_path, *seeds.words, "sweep.test=all")
    assert chosen_of(done) == chosen_of(seeds)
    assert done.parent.data.tags["chosen"] == seeds.parent.data.tags["chosen"]
    by_test = {c: statistics.fmean(accuracies(r, "test/accuracy")) for c, r in cells(done).items()}
    assert max(by_test, key=lambda cell: by_test[cell]) != chosen_of(done)


def test_without_validation_nothing_is_chosen(tmp_path: Path) -> None:
    words = ["dataset.val_size=0", "training.epochs=1", "optimizer.lr=0.01,0.1"]
    done = train_all(tmp_path, *SMALL, *words)
    assert done.status == 0, done.err
    assert "chosen" not in done.parent.data.tags
    assert all("test/accuracy" not in c.data.metrics for c in done.children.values())
    assert not (done.own / "best.yaml").exists()
    assert "best.yaml" not in done.out  # no command that cannot work


# the report


def leaves(config: Any) -> dict[str, Any]:
    return {k: v for k, v in schema.leaves(config) if not k.startswith("tracking.")}


def best_run(done: Done) -> Run:
    """The first of the chosen cell."""
    return next(c for c in done.children.values() if "test/accuracy" in c.data.metrics)


def test_best_recipe(seeds: Done, tmp_path: Path) -> None:
    kept = seeds.fetch(seeds.parent, "best.yaml", tmp_path)
    assert kept.read_text() == (seeds.own / "best.yaml").read_text()
    recorded = OmegaConf.load(seeds.own / best_run(seeds).data.tags["job"] / "config.yaml")
    assert " " in str(seeds.own)
    for path in (kept, seeds.own / "best.yaml"):
        for word in (f"experiments={path}", f"experiments='{path}'"):
            again = task_config(compose([word]))
            assert leaves(again) == leaves(recorded)


@pytest.mark.parametrize("name", ["lr=0.1,seed=0", "it's (a) [folder] {x}", "a: ${b} 100%", "ü"])
def test_best_recipe_from_a_folder_of_any_name(name: str, seeds: Done, tmp_path: Path) -> None:
    path = tmp_path / name / "best.yaml"
    path.parent.mkdir()
    path.write_text((seeds.own / "best.yaml").read_text())
    again = task_config(compose([f"experiments={path}"]))
    recorded = OmegaConf.load(seeds.own / best_run(seeds).data.tags["job"] / "config.yaml")
    assert leaves(again) == leaves(recorded)


def test_best_recipe_trains_the_same(seeds: Done, tmp_path: Path) -> None:
    best = best_run(seeds)
    uri = fresh_store(tmp_path)
    result = alone(tmp_path / "run", uri, f"experiments={seeds.own}/best.yaml")
    again = Done(tmp_path, [], 0, "", "", mlflow.MlflowClient(uri))
    same_points(seeds.curves(best), again.curves(again.runs[0]), SIZES)
    assert result.test_accuracy == pytest.approx(best.data.metrics["test/accuracy"], abs=2e-4)


def test_best_recipe_can_be_changed(seeds: Done) -> None:
    words = [f"experiments={seeds.own}/best.yaml", "seed=99", "training.epochs=7"]
    again = leaves(task_config(compose(words)))
    recorded = leaves(OmegaConf.load(seeds.own / best_run(seeds).data.tags["job"] / "config.yaml"))
    assert again == recorded | {"seed": 99, "training.epochs": 7}


def test_best_recipe_of_swept_groups(mixed: Done) -> None:
    recorded = OmegaConf.load(mixed.own / best_run(mixed).data.tags["job"] / "config.yaml")
    again = task_config(compose([f"experiments={mixed.own}/best.yaml"]))
    assert leaves(again) == leaves(recorded)
    assert again.schedule == recorded.schedule


@pytest.fixture(scope="module")
def issue(tmp_path_factory: pytest.TempPathFactory, images: list[str]) -> Done:
    """The grid that people type most, on noise."""
    words = [*images, "training.epochs=2"]
    words += ["model.hidden=[8]", "training.compile=never", "training.threads=1"]
    words += ["optimizer.lr=0.01,0.03,0.1,0.3", "training.batch_size=32,64,128,256"]
    return train_all(tmp_path_factory.mktemp("issue"), *words)


def test_learning_rate_by_batch_size(issue: Done) -> None:
    assert issue.status == 0, issue.err
    assert "16 jobs, 4 stacks of 4" in issue.out
    values = ["0.01", "0.03", "0.1", "0.3"], ["32", "64", "128", "256"]
    found = {
        (c.data.params["optimizer.lr"], c.data.params["training.batch_size"])
        for c in issue.children.values()
    }
    assert found == set(itertools.product(*values))
    assert len(issue.children) == 16
    for child in issue.children.values():
        assert child.info.status == "FINISHED"
        assert [step for step, _ in issue.curves(child)["train/loss"]] == [1, 2]
    rows = [line for line in issue.out.splitlines() if " FINISHED " in line]
    assert [int(line.split()[0]) for line in rows] == list(range(16))  # in the order of the jobs


@pytest.mark.parametrize(
    "name, heat_maps", [("seeds", ["heat_map_lr_momentum"]), ("issue", ["heat_map_lr_batch_size"])]
)
def test_report_on_the_parent(
    name: str, heat_maps: list[str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    done: Done = request.getfixturevalue(name)
    run_id = done.parent.info.run_id
    kept = {f.path for f in done.client.list_artifacts(run_id)}
    figures = {"learning_curves", *heat_maps}
    tables = {"leaderboard.md", "leaderboard.csv", "best.yaml"}
    assert kept >= tables | {f"{figure}.png" for figure in figures}
    assert {path for path in kept if path.startswith("heat_map")} == {f"{f}.png" for f in heat_maps}
    for file in (*tables, *(f"{figure}.png" for figure in figures)):
        own = done.own / file
        assert own.read_bytes() == done.fetch(done.parent, file, tmp_path).read_bytes()
    images = [Path(f.path).name for f in done.client.list_artifacts(run_id, "images")]
    drawn = {image.split("+")[0] for image in images if image.endswith(".png")}
    assert drawn == {f"sweep~{figure}" for figure in figures}
    for figure in figures:
        assert matplotlib.image.imread(done.own / f"{figure}.png").std() > 0.05
    lines = (done.own / "leaderboard.md").read_text().splitlines()
    assert len(lines) == 2 + len({str(sorted(swept(c).items() - {("seed", swept(c).get("seed"))}))
                                  for c in done.children.values()})  # fmt: skip
    assert "(chosen)" in lines[2] and "(chosen)" not in "".join(lines[3:])


def test_sweep_that_all_fails(tmp_path: Path) -> None:
    words = ["optimizer.lr=1e30,2e30", "training.epochs=1"]
    done = train_all(tmp_path, *SMALL, *words)
    assert done.status == 1 and "2 of 2 jobs did not finish" in done.err
    assert done.parent.info.status == "FAILED"
    assert "best.yaml" not in done.out  # no command that cannot work
    kept = {f.path for f in done.client.list_artifacts(done.parent.info.run_id)}
    assert kept >= {"leaderboard.md", "leaderboard.csv"} and "best.yaml" not in kept


# patience


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Done]:
    def train(patience: str) -> Done:
        words = ["optimizer.lr=0.05,0,0.2", "training.epochs=5", f"training.patience={patience}"]
        return train_all(tmp_path_factory.mktemp("patience"), *SMALL, *words)

    return train


def test_stopped_run_leaves_the_stack(patient: Callable[[str], Done]) -> None:
    done, without = patient("2"), patient("null")
    assert (done.status, without.status) == (0, 0), done.err
    assert "3 jobs, 1 stack of 3" in done.out
    for lr in ("0.05", "0.2"):
        same_points(without.curves(without.child(lr=lr)), done.curves(done.child(lr=lr)), SIZES)
        assert "stopped" not in done.child(lr=lr).data.tags
    still = done.child(lr="0")  # which learns nothing
    assert still.info.status == "FINISHED"
    curves, before = done.curves(still), without.curves(without.child(lr="0"))
    assert {key: [s for s, _ in own] for key, own in curves.items()} == {
        key: [1, 2, 3] for key in CURVES
    }
    same_points({key: own[:3] for key, own in before.items()}, curves, SIZES)
    assert "after epoch 3" in still.data.tags["stopped"]
    log = Path(still.data.tags["output_dir"], "train.log").read_text()
    assert "stopped after epoch 3" in log and log.count("\nepoch ") == 3
    assert "3 runs" in done.out and "2 runs" in done.out


def test_swept_patience_shares_a_stack(tmp_path: Path) -> None:
    words = ["optimizer.lr=0", "training.epochs=4", "training.patience=1,2,null"]
    done = train_all(tmp_path, *SMALL, *words)
    assert done.status == 0, done.err
    assert "3 jobs, 1 stack of 3" in done.out
    lengths = [len(done.curves(c)["val/loss"]) for c in done.children.values()]
    assert lengths == [2, 3, 4]
