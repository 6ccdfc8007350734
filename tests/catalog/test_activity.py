"""What runs on this machine now, and asking it to end."""

import json
import math
import shutil
import signal
import time
from pathlib import Path

import pytest

from mnist_exp import api
from mnist_exp.catalog import activity
from mnist_exp.catalog.activity import activities
from mnist_exp.catalog.records import load_open_records
from mnist_exp.errors import ConfigError, RunFailed
from mnist_exp.system.processes import process_identity
from mnist_exp.tracking import run_log
from mnist_exp.tracking.journal import RunHistory
from mnist_exp.tracking.run_log import OpenRuns
from mnist_exp.tracking.upload import UploadState
from tests.catalog import made_up
from tests.helpers import fresh_store
from tests.programs import Start, dead_owner

# a run that ends as a real one does when it is asked to; or, told so, that takes no notice
TRAINS = """
import signal, time
folder, registry, deaf = Path(sys.argv[1]), OpenRuns(Path(sys.argv[2])), sys.argv[3] == "deaf"
folder.mkdir()
def end(*_):
    if not deaf:
        writer.end("KILLED", "interrupted")
        sys.exit(143)
writer = RunWriter.begin(folder, registry, name="a run", uri="", experiment="e", tags={})
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("ready", flush=True)
while True:
    time.sleep(0.01)
"""


def training(start: Start, folder: Path, open_runs: OpenRuns, how: str = "") -> None:
    process = start(TRAINS, folder, open_runs.folder, how)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"


def test_what_runs_is_shown_and_nothing_else(
    open_runs: OpenRuns, tmp_path: Path, start: Start
) -> None:
    made_up.run(tmp_path / "ended", open_runs, "a store")
    made_up.begin(tmp_path / "killed", open_runs, "a store", owner=dead_owner(start))
    made_up.begin(tmp_path / "running", open_runs, "another store", epochs=4)
    (found,) = activities(open_runs)
    assert found.record.name == "running" and found.progress == "epoch 4/10"
    assert found.best_val_accuracy == 0.9  # not the newest, which is 0.5
    assert found.images_per_second == 100
    assert found.process == str(process_identity()["pid"])
    assert api.status().as_json()[0]["process"]["seen"] is True


def test_the_time_left_goes_by_the_epochs_since_the_process_began(
    open_runs: OpenRuns, tmp_path: Path
) -> None:
    """What an earlier process did before the run was resumed says nothing of this one."""
    folder = tmp_path / "run"
    made_up.begin(folder, open_runs, "", epochs=6).end("KILLED")
    writer = made_up.begin(folder, open_runs, "")
    (found,) = activities(open_runs)
    assert found.epochs == 6 and found.seconds_left is None
    for epoch in (7, 8):
        writer.metrics({"train/loss": 1.0}, epoch)
    began = RunHistory.of(folder).owner_since / 1000
    before = time.time()
    (found,) = activities(open_runs)
    assert found.seconds_left is not None  # two done, two to go
    assert before - began <= found.seconds_left <= time.time() - began


@pytest.mark.parametrize("after, done, left", [(2.5, 4, 1.2), (0.5, 1, 1.8), (None, 4, 6)])
def test_the_time_left_knows_that_focused_epochs_are_short(
    after: float | None, done: int, left: float, open_runs: OpenRuns, tmp_path: Path
) -> None:
    """Of 10 epochs; each focused one has a fifth of the images of a whole one."""
    folder, shares = tmp_path / "run", {"hardest": 0.15, "random": 0.05}
    params = {f"training.focus.{key}": value for key, value in {"after": after, **shares}.items()}
    made_up.begin(folder, open_runs, "", epochs=done, params=params)
    passes = {2.5: 2.7, 0.5: 0.5, None: 4}[after]  # that are done
    began = RunHistory.of(folder).owner_since / 1000
    before = time.time()
    (found,) = activities(open_runs)
    assert found.seconds_left is not None
    shortest, longest = (before - began) * left / passes, (time.time() - began) * left / passes
    assert shortest - 1e-9 <= found.seconds_left <= longest + 1e-9


def test_a_sweep_is_one_line_of_all_its_jobs(open_runs: OpenRuns, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    made_up.begin_sweep(sweep, open_runs, "", jobs=4)
    made_up.begin_job(sweep, 0, open_runs, "", epochs=10).end("FINISHED")
    open_runs.remove(RunHistory.of(sweep / "0").key)  # as once it is delivered
    for number in (1, 2):
        made_up.begin_job(sweep, number, open_runs, "", epochs=5)
    made_up.begin(tmp_path / "run", open_runs, "")
    began = RunHistory.of(sweep).owner_since / 1000
    before = time.time()
    run, found = sorted(activities(open_runs), key=lambda a: a.is_sweep)
    assert found.progress == "1/4 jobs, 2 running" and found.images_per_second == 200
    assert (found.epochs, found.epochs_asked, found.best_val_accuracy) == (20, 40, 0.9)
    assert found.seconds_left is not None  # half is done
    assert before - began <= found.seconds_left <= time.time() - began
    assert len(api.status().table().rows) == 2
    named = api.status(found.record.id[:6])
    assert [row[1] for row in named.table().rows] == ["sweep", "1", "2"]
    assert [job["kind"] for job in named.as_json()[0]["jobs"]] == ["job", "job"]
    assert len(api.status(run.record.id).table().rows) == 1


def test_a_process_that_cannot_be_seen_is_said_to_be_elsewhere(
    open_runs: OpenRuns, tmp_path: Path
) -> None:
    owner = {"host": "elsewhere", "pid": 7, "born": ""}
    made_up.begin(tmp_path / "run", open_runs, "", owner=owner)
    (found,) = activities(open_runs)
    assert found.process == "7 on elsewhere" and found.as_json()["process"]["seen"] is None
    with pytest.raises(ConfigError, match=r"process 7 on elsewhere .* cannot be seen"):
        api.stop(found.record.id)
    assert RunHistory.of(tmp_path / "run").status == ""


def test_a_name_of_nothing_that_runs(open_runs: OpenRuns, tmp_path: Path) -> None:
    assert api.status("last").activities == []
    made_up.run(tmp_path / "ended", open_runs, "")
    made_up.begin(tmp_path / "running", open_runs, "")
    (running,) = activities(open_runs)
    (ended,) = (r for r in load_open_records(open_runs) if r.status == "FINISHED")
    with pytest.raises(ConfigError, match=f"machine: {running.record.id[:8]}"):
        api.status(ended.id)
    with pytest.raises(ConfigError, match=f"is FINISHED. .* machine: {running.record.id[:8]}"):
        api.stop(ended.id)


def test_stop_ends_a_run_of_another_process(
    open_runs: OpenRuns, tmp_path: Path, start: Start
) -> None:
    """Also one that ignores SIGINT, as the background jobs of a shell do."""
    training(start, tmp_path / "run", open_runs)
    stopped = api.stop(str(tmp_path / "run"))
    assert (stopped.history.status, stopped.history.reason) == ("KILLED", "interrupted")
    plain = stopped.as_json()
    assert (plain["status"], plain["folder"]) == ("KILLED", str(tmp_path / "run"))
    assert activities(open_runs) == []


def test_stop_gives_up_where_nothing_ends(
    open_runs: OpenRuns, tmp_path: Path, start: Start
) -> None:
    training(start, tmp_path / "run", open_runs, "deaf")
    (found,) = activities(open_runs)
    with pytest.raises(RunFailed, match="was asked to end 0 s ago, and has not ended yet"):
        activity.stop(found.record, seconds=0.2)
    assert RunHistory.of(tmp_path / "run").status == ""


def test_a_process_that_dies_of_the_signal_leaves_a_true_status(
    open_runs: OpenRuns, tmp_path: Path, start: Start
) -> None:
    program = TRAINS.replace("signal.signal(signal.SIGTERM, end)", "")
    process = start(program, tmp_path / "run", open_runs.folder, "")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    (found,) = activities(open_runs)
    stopped = activity.stop(found.record)
    assert stopped.history.status == "KILLED" and "without a word" in stopped.history.reason
    assert process.wait() == -signal.SIGTERM


def test_stop_does_not_wait_for_another_process(
    open_runs: OpenRuns, tmp_path: Path, start: Start
) -> None:
    """One that has resumed the run meanwhile, or where the folder is gone."""
    owner = dead_owner(start)
    made_up.begin(tmp_path / "resumed", open_runs, "", owner=owner)
    made_up.begin(tmp_path / "removed", open_runs, "", owner=owner)
    records = {record.name: record for record in load_open_records(open_runs)}
    made_up.begin(tmp_path / "resumed", open_runs, "")
    shutil.rmtree(tmp_path / "removed")
    for name, reason in (("resumed", "has resumed it"), ("removed", "was removed meanwhile")):
        with pytest.raises(RunFailed, match=reason):
            activity.stop(records[name])
    assert RunHistory.of(tmp_path / "resumed").status == "" and not (tmp_path / "removed").exists()


def test_stop_gives_up_where_the_end_of_a_dead_process_is_not_recorded(
    open_runs: OpenRuns, tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up.begin(tmp_path / "run", open_runs, "", owner=dead_owner(start))
    (record,) = load_open_records(open_runs)
    monkeypatch.setattr(run_log, "mark_killed", lambda *_: False)
    with pytest.raises(RunFailed, match="has not ended yet"):
        activity.stop(record, seconds=0.2)


def test_stop_names_a_run_as_mlflow_does_by_then(
    open_runs: OpenRuns, tmp_path: Path, start: Start
) -> None:
    """At its end it is delivered, and `resume` finds no key of what is not open."""
    folder = tmp_path / "run"
    made_up.begin(folder, open_runs, "", owner=dead_owner(start))
    (record,) = load_open_records(open_runs)
    UploadState("", "0123456789").save(folder)
    stopped = activity.stop(record)
    assert stopped.id == stopped.as_json()["id"] == "0123456789" != record.id


def test_stop_last_is_the_newest_that_runs(
    open_runs: OpenRuns, tmp_path: Path, start: Start
) -> None:
    training(start, tmp_path / "running", open_runs)
    made_up.run(tmp_path / "ended since", open_runs, "")
    assert api.stop("last").record.folder == tmp_path / "running"


def test_stop_leaves_runs_of_another_store_alone_where_one_is_named(
    open_runs: OpenRuns, tmp_path: Path, start: Start
) -> None:
    training(start, tmp_path / "running", open_runs)
    with pytest.raises(ConfigError, match="last: there is no run or sweep yet"):
        api.stop("last", [f"tracking.uri={fresh_store(tmp_path / 'other')}"])
    assert not RunHistory.of(tmp_path / "running").status


def test_a_job_is_shown_with_its_sweep(open_runs: OpenRuns, tmp_path: Path) -> None:
    made_up.begin_sweep(tmp_path / "sweep", open_runs, "")
    made_up.begin_job(tmp_path / "sweep", 0, open_runs, "")
    (sweep,) = activities(open_runs)
    (job,) = sweep.running_jobs
    typed = f"mnist-exp status {sweep.record.id[:8]}"
    with pytest.raises(ConfigError, match=f"job of the sweep .*: {typed}"):
        api.status(job.record.id)


def test_jobs_that_were_killed_before_are_to_come(open_runs: OpenRuns, tmp_path: Path) -> None:
    """Where the sweep was resumed: three epochs of one job, and all of another."""
    sweep = tmp_path / "sweep"
    made_up.begin_sweep(sweep, open_runs, "", jobs=3).end("KILLED")
    made_up.begin_job(sweep, 0, open_runs, "", epochs=7).end("KILLED")
    time.sleep(0.002)  # so that those were before
    made_up.begin_sweep(sweep, open_runs, "", jobs=3)
    made_up.begin_job(sweep, 1, open_runs, "", epochs=1)
    began = RunHistory.of(sweep).owner_since / 1000
    before = time.time()
    (found,) = activities(open_runs)
    assert found.progress == "0/3 jobs, 1 running"
    left = 3 + 9 + 10
    assert found.seconds_left is not None  # one was done since
    assert (before - began) * left <= found.seconds_left <= (time.time() - began) * left


@pytest.mark.parametrize("first", [math.nan, 0.0])
def test_an_accuracy_of_0_is_one_and_nan_is_none(
    first: float, open_runs: OpenRuns, tmp_path: Path
) -> None:
    made_up.begin_sweep(tmp_path / "sweep", open_runs, "", jobs=1)
    writer = made_up.begin_job(tmp_path / "sweep", 0, open_runs, "")
    writer.metrics({"val/accuracy": first, "images_per_second": math.nan}, 1)
    writer.metrics({"val/accuracy": 0.0}, 2)
    (found,) = api.status().as_json()
    assert found["best_val_accuracy"] == 0
    json.dumps(api.status().as_json(), allow_nan=False)


def test_an_entry_without_a_journal_is_no_run(open_runs: OpenRuns, tmp_path: Path) -> None:
    open_runs.add("f" * 32, tmp_path / "gone", process_identity())
    assert load_open_records(open_runs) == [] and activities(open_runs) == []


def test_a_process_of_another_user_is_not_stopped(
    open_runs: OpenRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up.begin(tmp_path / "run", open_runs, "")
    (found,) = activities(open_runs)

    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr("os.kill", refuse)
    with pytest.raises(ConfigError, match="another user's"):
        activity.stop(found.record)
    assert RunHistory.of(tmp_path / "run").status == ""


def test_a_job_is_not_stopped_alone(open_runs: OpenRuns, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    made_up.begin_sweep(sweep, open_runs, fresh_store(tmp_path))
    made_up.begin_job(sweep, 0, open_runs, "")
    key = RunHistory.of(sweep).key
    with pytest.raises(ConfigError, match=f"job of a sweep.*: mnist-exp stop {key[:8]}"):
        api.stop(str(sweep / "0"))
