"""Removing runs: all of what is meant, nothing else, and whatever happens in the middle."""

import errno
import os
import shutil
import sqlite3
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from mnist_exp import api
from mnist_exp.errors import ConfigError, RunFailed
from mnist_exp.tracking import mlflow_internals, upload
from mnist_exp.tracking.journal import RunHistory
from mnist_exp.tracking.run_log import OpenRuns
from mnist_exp.tracking.store import Store
from tests.catalog import made_up
from tests.catalog.made_up import deliver, kept, run_id
from tests.faults.server import Upstream
from tests.helpers import fresh_store
from tests.programs import Start, dead_owner


def rm(uri: str, *words: str) -> None:
    api.rm(words, [f"tracking.uri={uri}"])


def rows(uri: str) -> dict[str, int]:
    """The number of rows of each table of a database that is about runs."""
    names = [
        "runs",
        "tags",
        "params",
        "metrics",
        "latest_metrics",
        "inputs",
        "input_tags",
        "logged_models",
    ]
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as database:
        return {
            name: database.execute(f"SELECT COUNT(*) FROM {name}").fetchone()[0] for name in names
        }


def log_model(uri: str, run: str) -> None:
    """Log a model of a run, a file, as uploads do."""
    client = Store(uri).client
    experiment = client.get_run(run).info.experiment_id
    model = client.create_logged_model(experiment, "model", run, {"a": "tag"})
    place = Path(model.artifact_location.removeprefix("file://"))
    place.mkdir(parents=True)
    (place / "MLmodel").write_text("a model")


def test_a_run_goes_with_all_that_is_of_it_and_nothing_else(
    open_runs: OpenRuns, outputs: Path, uri: str, tmp_path: Path
) -> None:
    made_up.run(outputs / "other", open_runs, uri)
    made_up.sweep(outputs / "sweep", open_runs, uri)
    deliver(open_runs)
    log_model(uri, run_id(outputs / "other"))
    before, rows_before = kept(tmp_path), rows(uri)
    assert any(name.endswith("MLmodel") for name in before)
    made_up.run(outputs / "run", open_runs, uri)
    deliver(open_runs)
    log_model(uri, run_id(outputs / "run"))
    figures = outputs / "evaluations" / run_id(outputs / "run")[:8]
    figures.mkdir(parents=True)
    (figures / "confusion.png").write_text("a figure")
    assert rows(uri) != rows_before

    plan = api.plan_removal([run_id(outputs / "run")[:10]], [f"tracking.uri={uri}"])
    assert (outputs / "run").exists()  # it was only looked at
    assert [removal.folders for removal in plan.removals] == [[outputs / "run"]]
    plan.carry_out()
    assert kept(tmp_path) == before and rows(uri) == rows_before
    with pytest.raises(ConfigError, match="there is no such run"):
        rm(uri, plan.removals[0].id)


def test_a_sweep_goes_with_its_jobs(
    open_runs: OpenRuns, outputs: Path, uri: str, tmp_path: Path
) -> None:
    made_up.run(outputs / "other", open_runs, uri)
    deliver(open_runs)
    before, rows_before = kept(tmp_path), rows(uri)
    made_up.sweep(outputs / "sweep", open_runs, uri)
    deliver(open_runs)
    assert rows(uri)["runs"] == 5
    rm(uri, run_id(outputs / "sweep"))
    assert kept(tmp_path) == before and rows(uri) == rows_before


def test_what_mlflow_never_had_can_go(open_runs: OpenRuns, outputs: Path, uri: str) -> None:
    made_up.run(outputs / "run", open_runs, uri)
    (plan,) = api.plan_removal(["last"], [f"tracking.uri={uri}"]).removals
    assert "which MLflow never had" in plan.title
    rm(uri, "last")
    assert open_runs.entries() == [] and not (outputs / "run").exists()


def test_two_that_remove_the_same_run_both_come_to_an_end(
    open_runs: OpenRuns, outputs: Path, uri: str
) -> None:
    """The second finds that all is done: it failed at what the first had taken away."""
    made_up.run(outputs / "run", open_runs, uri)
    deliver(open_runs)
    plans = [api.plan_removal(["last"], [f"tracking.uri={uri}"]) for _ in range(2)]
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(lambda plan: plan.carry_out(), plans)) == [None, None]
    assert not (outputs / "run").exists() and set(rows(uri).values()) == {0}


def test_where_nothing_can_be_written_nothing_is_removed(
    open_runs: OpenRuns, outputs: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up.run(outputs / "run", open_runs, uri)

    def refuse(*arguments: Any, **more: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(ConfigError, match=r"\(Read-only file system\), so nothing is removed"):
        rm(uri, "last")
    assert (outputs / "run" / "journal.jsonl").exists()


def test_what_an_upload_has_made_meanwhile_goes_as_well(
    open_runs: OpenRuns, outputs: Path, uri: str
) -> None:
    """Another process delivers between the look at the records and the removal."""
    made_up.sweep(outputs / "sweep", open_runs, uri)
    plan = api.plan_removal(["last"], [f"tracking.uri={uri}"])
    deliver(open_runs)
    assert rows(uri)["runs"] == 4
    plan.carry_out()
    assert rows(uri)["runs"] == 0 and not (outputs / "sweep").exists()


def test_an_upload_that_comes_too_late_makes_nothing_anew(
    open_runs: OpenRuns, outputs: Path, uri: str
) -> None:
    folder = outputs / "run"
    made_up.run(folder, open_runs, uri)
    rm(uri, "last")
    with pytest.raises(upload.NotReady):
        upload.upload_journal(folder, open_runs, Store(uri))
    assert not folder.exists() and rows(uri)["runs"] == 0


def refusals(open_runs: OpenRuns, outputs: Path, uri: str, start: Start) -> dict[str, str]:
    """What cannot be removed, with a part of the reason."""
    made_up.begin(outputs / "running", open_runs, uri)
    made_up.begin_sweep(outputs / "sweep", open_runs, uri, owner=dead_owner(start)).end("KILLED")
    made_up.begin_job(outputs / "sweep", 0, open_runs, uri)  # which a process is at work on
    owner = {"host": "elsewhere", "pid": 7, "born": ""}
    made_up.begin(outputs / "elsewhere", open_runs, uri, owner=owner)
    made_up.begin(outputs / "unknown", open_runs, uri, owner=owner)
    deliver(open_runs)
    open_runs.remove(RunHistory.of(outputs / "unknown").key)  # all that is known is in MLflow
    return {
        str(outputs / "running"): "is at work on it. Stop it first",
        str(outputs / "sweep"): "is at work on it. Stop it first",
        str(outputs / "sweep" / "0"): "job of a sweep, which is removed as a whole",
        str(outputs / "elsewhere"): "process 7 on elsewhere is at work on it",
        str(outputs / "unknown"): "no process that trains it can be seen",
        "ffffffff": "there is no such run",
    }


def test_all_are_checked_before_anything_goes(
    open_runs: OpenRuns, outputs: Path, uri: str, tmp_path: Path, start: Start
) -> None:
    made_up.run(outputs / "run", open_runs, uri)
    words = refusals(open_runs, outputs, uri, start)
    before = kept(tmp_path)
    for word, reason in words.items():
        with pytest.raises(ConfigError, match=reason):
            rm(uri, str(outputs / "run"), word)
    assert kept(tmp_path) == before


def test_a_run_that_is_resumed_while_a_person_thinks_stays(
    open_runs: OpenRuns, outputs: Path, uri: str
) -> None:
    """That is no bad command, as what was named before it has gone."""
    made_up.run(outputs / "first", open_runs, uri)
    made_up.begin(outputs / "run", open_runs, uri).end("KILLED")
    words = [str(outputs / "first"), str(outputs / "run")]
    plan = api.plan_removal(words, [f"tracking.uri={uri}"])
    made_up.begin(outputs / "run", open_runs, uri)
    with pytest.raises(RunFailed, match=r"work on it by now.*: mnist-exp rm \w{8} tracking.uri="):
        plan.carry_out()
    assert (outputs / "run" / "journal.jsonl").exists() and len(open_runs.entries()) == 1
    assert not (outputs / "first").exists()


def outside(folder: Path, open_runs: OpenRuns, uri: str) -> Path:
    """A record whose folder is not in outputs/."""
    made_up.run(folder.parents[1] / "elsewhere", open_runs, uri)
    return folder.parents[1] / "elsewhere"


def linked(folder: Path, open_runs: OpenRuns, uri: str) -> Path:
    """A folder that is a symbolic link to one elsewhere."""
    made_up.run(folder, open_runs, uri)
    shutil.move(folder, folder.parents[1] / "elsewhere")
    folder.symlink_to(folder.parents[1] / "elsewhere")
    return folder.parents[1] / "elsewhere"


def shared(folder: Path, open_runs: OpenRuns, uri: str) -> Path:
    """A folder in which another run has its own."""
    made_up.run(folder, open_runs, uri)
    made_up.run(folder / "of another run", open_runs, uri)
    return folder


def reused(folder: Path, open_runs: OpenRuns, uri: str) -> Path:
    """A folder that holds the record of another run by now."""
    made_up.run(folder, open_runs, uri)
    deliver(open_runs)
    shutil.rmtree(folder)
    made_up.run(folder, open_runs, fresh_store(folder.parents[1] / "another"))
    return folder


def everything(folder: Path, open_runs: OpenRuns, uri: str) -> Path:
    """A record that names outputs/ itself, with all runs."""
    made_up.run(folder.parent, open_runs, uri)
    made_up.run(folder, open_runs, uri)
    return folder.parent


@pytest.mark.parametrize("make", [outside, linked, shared, reused, everything])
def test_a_folder_that_is_not_the_run_s_own_stays(
    make: Callable[[Path, OpenRuns, str], Path], open_runs: OpenRuns, outputs: Path, uri: str
) -> None:
    stays = make(outputs / "run", open_runs, uri)
    word = RunHistory.of(stays).key
    if make is not reused:
        deliver(open_runs)
    else:
        word = Store(uri).find("last").id
    before = kept(stays)
    plan = api.plan_removal([word], [f"tracking.uri={uri}"])
    assert any("  stays: " in line for line in plan.lines())
    plan.carry_out()
    assert kept(stays) == before
    assert word not in [run.key for run in Store(uri).of_kind(None)]


@pytest.mark.parametrize(
    "place", ["{tmp}/precious", "{tmp}/mlruns/{id}/..", "{tmp}", "s3://b/{id}"]
)
def test_artifacts_elsewhere_stay(
    place: str, open_runs: OpenRuns, outputs: Path, uri: str, tmp_path: Path
) -> None:
    """Whatever a row of the database says."""
    made_up.run(outputs / "run", open_runs, uri)
    deliver(open_runs)
    own = run_id(outputs / "run")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("precious")
    (tmp_path / "mlruns" / "another").mkdir()
    (tmp_path / "mlruns" / "another" / "file").write_text("precious")
    with closing(sqlite3.connect(tmp_path / "store.db")) as database, database:
        address = place.format(tmp=tmp_path, id=own)
        database.execute("UPDATE runs SET artifact_uri = ?", (address,))
    plan = api.plan_removal(["last"], [f"tracking.uri={uri}"])
    assert any("  stays: " in line for line in plan.lines())
    plan.carry_out()
    assert (precious / "file").exists() and (tmp_path / "mlruns" / "another" / "file").exists()
    assert rows(uri)["runs"] == 0


def test_a_model_in_the_registry_keeps_its_run(
    open_runs: OpenRuns, outputs: Path, uri: str
) -> None:
    made_up.run(outputs / "run", open_runs, uri)
    deliver(open_runs)
    client = Store(uri).client
    client.create_registered_model("digits")
    client.create_model_version("digits", "file:///somewhere", run_id(outputs / "run"))
    with pytest.raises(ConfigError, match="registry, as digits version 1"):
        rm(uri, "last")
    assert (outputs / "run").exists()


def test_a_server_marks_runs_as_deleted(
    open_runs: OpenRuns,
    outputs: Path,
    upstream: Upstream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    made_up.sweep(outputs / "sweep", open_runs, upstream.uri, jobs=2)
    made_up.run(outputs / "run", open_runs, upstream.uri)
    made_up.run(outputs / "deleted", open_runs, upstream.uri)
    deliver(open_runs)
    ids = [run_id(outputs / name) for name in ("sweep", "sweep/0", "sweep/1")]
    run, deleted = run_id(outputs / "run"), run_id(outputs / "deleted")
    plan = api.plan_removal([ids[0]], [f"tracking.uri={upstream.uri}"])
    assert "its owner frees the files by: mlflow gc" in plan.lines()[-1]
    plan.carry_out()
    client = Store(upstream.uri).client
    stages = [client.get_run(each).info.lifecycle_stage for each in (*ids, run)]
    assert stages == ["deleted", "deleted", "deleted", "active"]
    assert not (outputs / "sweep").exists() and (outputs / "run").exists()

    client.delete_run(deleted)
    api.gc([f"tracking.uri={upstream.uri}"])
    assert not (outputs / "deleted").exists() and (outputs / "run").exists()
    assert api.plan_gc([f"tracking.uri={upstream.uri}"]).is_empty


@pytest.mark.parametrize("by_gc", [False, True])
def test_a_removal_goes_on_where_mlflow_takes_the_run_for_a_running_one(
    by_gc: bool, open_runs: OpenRuns, outputs: Path, uri: str
) -> None:
    """Its end had not been delivered, and the journal that has it was moved already."""
    writer = made_up.begin(outputs / "run", open_runs, uri)
    deliver(open_runs)
    writer.end("KILLED")
    word = run_id(outputs / "run")
    place = outputs / ".removed" / word
    place.mkdir(parents=True)
    shutil.move(outputs / "run", place / RunHistory.of(outputs / "run").key)
    if by_gc:
        api.gc([f"tracking.uri={uri}"])
    else:
        rm(uri, word)
    assert rows(uri)["runs"] == 0 and open_runs.entries() == [] and not place.exists()


def test_an_interruption_names_the_run_and_last_is_refused(
    open_runs: OpenRuns,
    outputs: Path,
    uri: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Once its rows are gone, another run is the last one."""
    for name in ("older", "newest"):
        made_up.run(outputs / name, open_runs, uri)
    deliver(open_runs)
    word = run_id(outputs / "newest")
    clear = shutil.rmtree

    def interrupt(place: Path) -> None:
        if place.parent.name == ".removed":
            raise KeyboardInterrupt
        clear(place)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", interrupt)
        rm(uri, word)
    assert f"mnist-exp rm {word[:8]} tracking.uri={uri}" in caplog.text
    with pytest.raises(ConfigError, match=f"mnist-exp rm {word[:8]} tracking.uri="):
        rm(uri, "last")
    rm(uri, word[:8])
    assert (outputs / "older").exists()
    rm(uri, "last")
    assert rows(uri)["runs"] == 0


STEPS = ("os.rename", "os.rmdir", "shutil.rmtree")


def remove_and_die(uri: str, word: str, step: int) -> bool:
    """Remove a run in a process that dies at a step; return whether it got that far.

    A step is what changes a name in the file system, but for two of three files of a folder that
    goes, and each call to the database while a run is deleted.
    """
    process = os.fork()
    if process:
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert status in (0, 9)
        return status == 9
    count, files, is_deleting = 0, 0, False
    delete = mlflow_internals.delete_run_for_good

    def die(event: str, _: object) -> None:
        nonlocal count, files
        files += event == "os.remove"
        is_third = event == "os.remove" and files % 3 == 2
        if event in STEPS or is_third or (is_deleting and event == "sqlite3.connect"):
            count += 1
        if count > step:
            os._exit(9)

    def deleting(client: Any, path: Path, run_id: str) -> None:
        nonlocal is_deleting
        is_deleting = True
        delete(client, path, run_id)
        is_deleting = False

    try:
        plan = api.plan_removal([word], [f"tracking.uri={uri}"])
        mlflow_internals.delete_run_for_good = deleting
        sys.addaudithook(die)
        plan.carry_out()
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("jobs, is_delivered", [(1, True), (2, False)])
def test_a_removal_that_dies_at_any_step_goes_on_when_typed_again(
    jobs: int, is_delivered: bool, open_runs: OpenRuns, outputs: Path, uri: str, tmp_path: Path
) -> None:
    project, backup = tmp_path, tmp_path.with_name(f"{tmp_path.name} backup")
    made_up.run(outputs / "other", open_runs, uri)
    deliver(open_runs)
    before, rows_before = kept(project), rows(uri)
    made_up.sweep(outputs / "sweep", open_runs, uri, jobs=jobs)
    if is_delivered:
        deliver(open_runs)
    word = run_id(outputs / "sweep") or RunHistory.of(outputs / "sweep").key
    shutil.copytree(project, backup)
    for step in range(1000):
        shutil.rmtree(project)
        shutil.copytree(backup, project)
        if not remove_and_die(uri, word, step):
            break
        try:
            rm(uri, word)
        except ConfigError as error:  # it had died after the last step that left anything
            assert "there is no such run" in str(error)
        assert kept(project) == before and rows(uri) == rows_before, step
        assert open_runs.entries() == [] and list(outputs.glob(".removed/*")) == [], step
    assert step > 5
