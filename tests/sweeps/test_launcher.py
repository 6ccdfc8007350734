"""The launchers leave the same records, and faults stay where they belong."""

import json
import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest

from mnist_exp.run.evaluate import evaluate
from mnist_exp.tracking import journal
from tests.helpers import finish, fresh_store, start, write_idx
from tests.sweeps.helpers import (
    BASE,
    CURVES,
    ONE_AT_A_TIME,
    SIZES,
    SMALL,
    Done,
    same_points,
    swept,
    train_all,
)


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


def test_jobs_of_every_launcher_are_told_apart(faults: Done) -> None:
    names = [child.info.run_name for child in faults.children.values()]
    assert sorted(name.split()[-1] for name in names) == ["fault=error", "fault=exit", "fault=none"]


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
        if self.fault != "none" and self.training and len(x) > 2:  # not in the trial
            if self.fault == "error":
                raise ValueError("out of luck")
            if self.fault == "exit":
                raise SystemExit(3)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


class Picky(MLP):  # about its seed, once its record has begun
    def __init__(self, input_shape, num_classes):
        super().__init__(input_shape, num_classes, (16,))
        if torch.initial_seed() == 7 and os.path.exists("the sweep/0/journal.jsonl"):
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


def test_all_are_tested_where_the_sweep_asks_for_it(launchers: dict[str, Done]) -> None:
    for done in launchers.values():
        for child in done.children.values():
            found = evaluate(done.store, done.store.get(child.info.run_id))
            assert found.recorded.keys() == found.scores.keys()
            assert abs(found.scores["test/accuracy"] - found.recorded["test/accuracy"]) < 2e-4


MODULE_OF_A_NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Flatten(), nn.LazyLinear(num_classes))
"""


@pytest.mark.parametrize("launcher", ["stacked", "basic", "joblib"])
def test_paths_begin_where_the_command_was_typed(launcher: str, tmp_path: Path) -> None:
    """Jobs looked for the data, the store and the module in folders of their own."""
    write_idx(tmp_path / "images", size=8, classes=10)
    (tmp_path / "own_net.py").write_text(MODULE_OF_A_NET)
    fresh_store(tmp_path)
    words = ["dataset=idx", "dataset.root=images", "dataset.val_size=30", "training.epochs=1"]
    words += ["~model", "+model={_target_: own_net.Net}", "trusted_packages=[own_net]"]
    words += ["tracking.uri=sqlite:///store.db", "hydra.sweep.dir=sweep", "seed=0,1"]
    words += ["training.compile=never", f"hydra/launcher={launcher}", "hydra.job.chdir=true"]
    status, out, err = finish(start(["train", "-m", *words], tmp_path))
    assert status == 0, (out, err)
    assert "MLflow does not have all of it yet" not in out
    assert [path.parent for path in tmp_path.rglob("*.db")] == [tmp_path]
    jobs = json.loads((tmp_path / "sweep" / "frozen.json").read_text())
    assert {job["config"]["dataset"]["root"] for job in jobs} == {str(tmp_path / "images")}
