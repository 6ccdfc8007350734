"""The jobs of a sweep before anything is trained: composed, checked, refused."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mnist_exp.config.compose import compose_sweep
from mnist_exp.config.schema import SweepConfig, task_config
from mnist_exp.errors import ConfigError
from mnist_exp.run.console import Reporter
from mnist_exp.sweeps import grid, sweep
from mnist_exp.sweeps.manifest import SweepJob
from tests.sweeps.helpers import BASE, SMALL, call, composed, planned

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


@pytest.mark.parametrize(
    "words, parts",
    [
        (["optimizr.lr=1,2"], ["job 0", "optimizr", "Did you mean optimizer?"]),
        (["model=mlp,linear", "model.dropout=0,0.1"], ["job 2", "model.dropout", "no such key"]),
        (["+optimizer.speed=1,2"], ["job 0", "optimizer.speed", "no such argument"]),
        (["optimizer.lr=0.1,0.2,-1", "seed=0,1"], ["job 4", "optimizer.lr=-1", "0 or more"]),
        (["training.epochs=1,2,x"], ["job 2", "training.epochs=x: must be a whole number"]),
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
        (["training.ema=null,interval(0,1)"], ["training.ema=null,interval(0,1): give the values"]),
        (["seed=0,1", "training.ema=${augmentation.foo}"],
         ["job 0", "training.ema", "augmentation.foo"]),
        (["seed=0,1", "training.ema=${oc.env:NOT_SET_AT_ALL}"], ["job 0", "NOT_SET_AT_ALL"]),
        (["seed=0,1", "training.ema=${training.ema}"], ["job 0", "training.ema"]),
        (["seed=0,1", "training.ema=${eval:1}"], ["job 0", "training.ema", "eval"]),
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


def test_a_fault_in_the_first_of_many_jobs_is_told_at_once() -> None:
    began = time.monotonic()
    status, _, err = call("train", "-m", *BASE, "optimizer.lr=-1,0.1", "seed=range(5000)")
    assert status == 2 and "job 0" in err and "optimizer.lr=-1" in err, err
    assert time.monotonic() - began < 20  # all of them would take minutes


def test_an_interpolation_has_the_values_of_its_job() -> None:
    """It was resolved once for all jobs, in a config that had none of the swept values."""
    words = [*SMALL, "augmentation.rotation=5,20", "augmentation.shear=${augmentation.rotation}"]
    for job in grid.jobs(*compose_sweep(words), Reporter()):
        config = task_config(job.config)
        assert (
            config.augmentation.shear
            == config.augmentation.rotation
            == float(job.values["augmentation.rotation"])
        )


def test_who_sweeps_many_jobs_is_told_of_the_wait() -> None:
    said: list[str] = []

    class Listener(Reporter):
        def notice(self, text: str) -> None:
            said.append(text)

        def announce(self, text: str) -> None:
            said.append(text)

    context, master = compose_sweep([*SMALL, "seed=range(150)"])
    assert len(grid.jobs(context, master, Listener())) == 150
    assert said == [
        "checking 150 jobs before the first one starts: about 5 s",
        "150 jobs, seed=0,1,2,...,149: checking them ...",
        "150 jobs, seed=0,1,2,...,149: loading torch ...",
    ]


def test_more_than_10000_jobs_where_they_are_meant() -> None:
    *_, jobs = composed(*SMALL, "seed=range(10001)", "sweep.max_jobs=10001")
    assert len(jobs) == 10_001
    assert jobs[-1].values == {"seed": "10000"}


def test_exactly_10000_jobs_need_no_word() -> None:
    assert len(composed(*SMALL, "seed=range(100)", "dataset.split_seed=range(100)")[-1]) == 10_000


def test_jobs_that_would_share_a_folder_are_refused(tmp_path: Path) -> None:
    own = f"tracking.uri=sqlite:///{tmp_path}/store.db"
    words = [*SMALL, own, "seed=0,1", "hydra.sweep.subdir=same"]
    refused(tmp_path, words, ["hydra.sweep.subdir"])
