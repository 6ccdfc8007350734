"""Clearing what is of no more use: all of that, and nothing that is."""

import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from mnist_exp import api
from mnist_exp.catalog.garbage import GarbagePlan
from mnist_exp.catalog.own_files import REMOVED
from mnist_exp.errors import ConfigError, RunFailed
from mnist_exp.run.kept_predictions import KeptPredictions
from mnist_exp.tracking import deletion, journal, mlflow_internals
from mnist_exp.tracking.journal import Journal, RunHistory
from mnist_exp.tracking.outages import Outage
from mnist_exp.tracking.run_log import OpenRuns
from mnist_exp.tracking.store import Store
from mnist_exp.tracking.upload import UploadState
from tests.catalog import made_up
from tests.catalog.made_up import deliver, kept, run_id
from tests.helpers import fresh_store


def gc(uri: str, checkpoints: bool = False) -> GarbagePlan:
    return api.gc([f"tracking.uri={uri}"], checkpoints=checkpoints)


def delete_for_good(uri: str, folder: Path) -> None:
    store = Store(uri)
    assert store.database is not None
    mlflow_internals.delete_run_for_good(store.client, store.database, run_id(folder))


def evaluated(run: str, store: str) -> Path:
    """What `evaluate` keeps of a run of a store, and the folder of it."""
    kept = KeptPredictions(run, "a digest", ["a", "b"], [0, 1], [0, 1], store)
    return kept.save().parent


def ids(uri: str) -> set[str]:
    return {run.id for run in Store(uri).everything()}


def test_nothing_goes_where_all_is_of_use(
    open_runs: OpenRuns, outputs: Path, uri: str, tmp_path: Path
) -> None:
    made_up.run(outputs / "run", open_runs, uri)
    made_up.sweep(outputs / "sweep", open_runs, uri)
    (outputs / "run" / "state-000000010.pt").write_text("a checkpoint")
    deliver(open_runs)
    made_up.run(outputs / "waiting", open_runs, uri)
    made_up.begin(outputs / "running", open_runs, uri)
    (outputs / "running" / "state-000000010.pt").write_text("a checkpoint")
    part = outputs / "running" / "state.host-1-2.part"
    part.write_text("is being written")
    os.utime(part, (0, 0))
    (outputs / "a file of mine.txt").write_text("mine")
    (outputs / "time.strftime-1.part").write_text("mine")
    (outputs / time.strftime("%Y-%m-%d")).mkdir()  # a run may come into it just now
    before, ids_before = kept(tmp_path), ids(uri)
    assert gc(uri).is_empty
    assert kept(tmp_path) == before and ids(uri) == ids_before
    assert (outputs / time.strftime("%Y-%m-%d")).exists()


def test_a_deleted_run_goes_with_its_files(
    open_runs: OpenRuns, outputs: Path, uri: str, tmp_path: Path
) -> None:
    made_up.run(outputs / "other", open_runs, uri)
    deliver(open_runs)
    before, ids_before = kept(tmp_path), ids(uri)
    made_up.run(outputs / "run", open_runs, uri)
    made_up.sweep(outputs / "sweep", open_runs, uri)
    deliver(open_runs)
    for run in Store(uri).of_kind(None):
        if run.id not in ids_before:
            Store(uri).client.delete_run(run.id)
    plan = api.plan_gc([f"tracking.uri={uri}"])
    assert len(plan.removals) == 2 and len(ids(uri)) == 6
    plan.carry_out()
    assert kept(tmp_path) == before and ids(uri) == ids_before


def test_a_deleted_sweep_with_a_job_that_is_not_stays(
    open_runs: OpenRuns, outputs: Path, uri: str, tmp_path: Path
) -> None:
    made_up.sweep(outputs / "sweep", open_runs, uri)
    deliver(open_runs)
    Store(uri).client.delete_run(run_id(outputs / "sweep"))
    before = kept(tmp_path)
    plan = gc(uri)
    assert plan.is_empty and "not all of its jobs are" in plan.lines()[0]
    assert kept(tmp_path) == before and len(ids(uri)) == 4


def test_what_another_program_has_deleted_is_not_ours(
    open_runs: OpenRuns, outputs: Path, uri: str
) -> None:
    client = Store(uri).client
    run = client.create_run("0").info.run_id
    client.delete_run(run)
    assert gc(uri).is_empty and run in ids(uri)


def test_folders_whose_run_is_gone(open_runs: OpenRuns, outputs: Path, uri: str) -> None:
    """But never the only copy of a record that MLflow never had as a whole."""
    made_up.run(outputs / "gone", open_runs, uri)
    made_up.sweep(outputs / "sweep", open_runs, uri, jobs=2)
    made_up.sweep(outputs / "half", open_runs, uri, jobs=2)
    made_up.run(outputs / "went on", open_runs, uri)
    deliver(open_runs)
    made_up.run(outputs / "forgotten", open_runs, uri)
    open_runs.remove(RunHistory.of(outputs / "forgotten").key)
    writer = made_up.begin(outputs / "went on", open_runs, uri)
    writer.end("KILLED")
    open_runs.remove(RunHistory.of(outputs / "went on").key)
    gone = ["gone", "sweep", "sweep/0", "sweep/1", "half", "half/0", "went on"]
    for name in gone:  # `mlflow gc` does that
        delete_for_good(uri, outputs / name)
    plan = gc(uri)
    stay = {"half", "forgotten", "went on", ".open", REMOVED}
    assert {path.name for path in outputs.iterdir()} == stay
    assert (outputs / "half" / "1" / "journal.jsonl").exists()
    assert (outputs / "half" / "0" / "journal.jsonl").exists()
    reasons = {name: [Path(place).name for place in names] for name, names in plan.kept.items()}
    assert reasons["as MLflow never had the whole record"] == ["forgotten", "went on"]


def test_a_store_that_is_gone_or_new_costs_no_folder(
    open_runs: OpenRuns, outputs: Path, uri: str, tmp_path: Path
) -> None:
    made_up.run(outputs / "run", open_runs, uri)
    deliver(open_runs)
    evaluated(run_id(outputs / "run"), uri)
    before = kept(outputs)
    Path(tmp_path, "store.db").unlink()
    other = fresh_store(tmp_path / "other")
    plan = gc(other)
    assert plan.is_empty and "there is no such file" in "\n".join(plan.lines())
    assert kept(outputs) == before
    fresh_store(tmp_path)
    with closing(sqlite3.connect(tmp_path / "store.db")) as database, database:
        database.execute("UPDATE experiments SET creation_time = ?", (time.time_ns() // 10**6,))
    plan = gc(uri)
    assert "was made anew since" in "\n".join(plan.lines())
    assert plan.is_empty and kept(outputs) == before


def test_leftovers(open_runs: OpenRuns, outputs: Path, uri: str, tmp_path: Path) -> None:
    made_up.run(outputs / "run", open_runs, uri)
    made_up.run(outputs / "half removed", open_runs, uri)
    deliver(open_runs)
    half = run_id(outputs / "half removed")
    for name, moved in ((half, "half removed"), ("f" * 32, "")):
        (outputs / REMOVED / name).mkdir(parents=True)
        if moved:
            shutil.move(outputs / moved, outputs / REMOVED / name / "a key")
        else:
            (outputs / REMOVED / name / "model.pt").write_text("weights")
    for run in (run_id(outputs / "run"), "01234567" * 4):
        evaluated(run, uri)
    (outputs / "evaluations" / "89abcdef").mkdir()  # whose run is not on record
    part = outputs / "run" / "state.pt.host-1-2.part"
    part.write_text("half of it")
    os.utime(part, (0, 0))
    (outputs / "2020-01-01").mkdir()
    (outputs / "sweeps" / "2020-01-01").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (outputs / "sweeps" / "2020-01-02").symlink_to(tmp_path / "elsewhere")
    gc(uri)
    assert ids(uri) == {run_id(outputs / "run")} and not part.exists()
    assert list((outputs / REMOVED).iterdir()) == []
    evaluations = {path.name for path in (outputs / "evaluations").iterdir()}
    assert evaluations == {run_id(outputs / "run")[:8], "89abcdef"}
    assert not (outputs / "2020-01-01").exists()
    assert [path.name for path in (outputs / "sweeps").iterdir()] == ["2020-01-02"]
    assert gc(uri).is_empty


def test_checkpoints_of_what_is_finished(open_runs: OpenRuns, outputs: Path, uri: str) -> None:
    made_up.run(outputs / "finished", open_runs, uri)
    made_up.begin(outputs / "killed", open_runs, uri).end("KILLED")
    made_up.sweep(outputs / "sweep", open_runs, uri, jobs=1)
    made_up.begin_sweep(outputs / "stopped", open_runs, uri).end("KILLED")
    made_up.begin_job(outputs / "stopped", 0, open_runs, uri).end("FINISHED")
    deliver(open_runs)
    made_up.run(outputs / "waiting", open_runs, uri)
    places = ["finished", "killed", "sweep/.stacks/0-0", "sweep/0", "stopped/.stacks/0-0"]
    places += ["stopped/0", "waiting"]
    names = ["state-000000010.pt", "state-000000010.pt.sha256", "checkpoint.pt", "state-of-mine.pt"]
    for place in places:
        (outputs / place).mkdir(parents=True, exist_ok=True)
        for name in names:
            (outputs / place / name).write_text("weights")
    before = set(kept(outputs))
    assert gc(uri).is_empty
    plan = gc(uri, checkpoints=True)
    assert len(plan.checkpoints) == 3
    cleared = {f"{place}/{name}" for place in ("finished", "sweep/0") for name in names[:2]}
    cleared |= {f"sweep/.stacks/0-0/{name}" for name in names}
    assert before - set(kept(outputs)) == cleared


def test_a_dry_run_changes_nothing(
    open_runs: OpenRuns, outputs: Path, uri: str, tmp_path: Path
) -> None:
    made_up.run(outputs / "run", open_runs, uri)
    deliver(open_runs)
    Store(uri).client.delete_run(run_id(outputs / "run"))
    before = kept(tmp_path)
    plan = api.gc([f"tracking.uri={uri}"], dry_run=True)
    assert not plan.is_empty and "deleted in MLflow" in plan.lines()[1]
    assert kept(tmp_path) == before and len(ids(uri)) == 1


@pytest.mark.parametrize("made", [None, 2**50, 0])
def test_a_server_that_may_have_been_made_anew_costs_no_folder(
    made: int | None,
    open_runs: OpenRuns,
    outputs: Path,
    uri: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made_up.run(outputs / "run", open_runs, uri)
    deliver(open_runs)
    server = "http://127.0.0.1:9"
    with closing(Journal(outputs / "run")) as file:
        file.write("store", uri=server)
    end = journal.size(outputs / "run")
    UploadState(server, run_id(outputs / "run"), end, ended=True).save(outputs / "run")
    evaluated(run_id(outputs / "run"), server)
    delete_for_good(uri, outputs / "run")
    monkeypatch.setattr(deletion, "ids_in", lambda uri: (set(), made))
    before = kept(outputs)
    plan = gc(uri)
    if made == 0:  # it is older than the run, which it has lost since
        assert kept(outputs) == {}
    else:
        assert plan.is_empty and "made anew since" in "\n".join(plan.lines())
        assert kept(outputs) == before


def test_evaluations_go_by_the_store_that_they_are_of(
    open_runs: OpenRuns, outputs: Path, uri: str, tmp_path: Path
) -> None:
    other = fresh_store(tmp_path / "other")
    made_up.run(outputs / "here", open_runs, uri)
    made_up.run(outputs / "there", open_runs, other)
    made_up.run(outputs / "gone", open_runs, uri)
    deliver(open_runs)
    stay = [evaluated(run_id(outputs / "here"), uri), evaluated(run_id(outputs / "there"), other)]
    stay.append(evaluated("a" * 32, ""))  # as it was kept before the store was noted
    stay.append(evaluated("b" * 32, f"sqlite:///{tmp_path / 'away.db'}"))
    stay.append(evaluated("c" * 32, uri).rename(outputs / "evaluations" / "of mine"))
    evaluated("d" * 32, uri)
    evaluated(run_id(outputs / "gone"), "")  # whose run is known to be gone by its folder
    delete_for_good(uri, outputs / "gone")
    gc(uri)
    assert sorted((outputs / "evaluations").iterdir()) == sorted(stay)


def test_a_failure_says_how_to_go_on_with_gc(
    open_runs: OpenRuns, outputs: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up.run(outputs / "run", open_runs, uri)
    deliver(open_runs)
    Store(uri).client.delete_run(run_id(outputs / "run"))

    def fail(*_: object) -> None:
        raise OSError("the disk")

    with monkeypatch.context() as patch, pytest.raises(RunFailed) as raised:
        patch.setattr(deletion, "delete", fail)
        gc(uri)
    assert str(raised.value).endswith(f"To go on with that: mnist-exp gc tracking.uri={uri}")
    gc(uri)
    assert ids(uri) == set() and not list((outputs / REMOVED).iterdir())


@pytest.mark.parametrize("plan", [lambda uri: api.plan_removal(["last"], uri), api.plan_gc])
def test_a_server_that_does_not_answer_is_no_store_without_runs(
    plan: Callable[..., object],
    open_runs: OpenRuns,
    outputs: Path,
    uri: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What waits for it is not all that there is."""
    made_up.run(outputs / "run", open_runs, uri)

    def fail(*_: object) -> None:
        raise ConfigError("busy") from Outage()

    monkeypatch.setattr(Store, "of_kind", fail)
    with pytest.raises(ConfigError, match="busy"):
        plan([f"tracking.uri={uri}"])
