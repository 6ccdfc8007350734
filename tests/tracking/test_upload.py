"""From journals to MLflow: nothing is lost, nothing is doubled, whatever the server does."""

import errno
import multiprocessing
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

from mnist_exp.system.processes import fork, process_identity, receive
from mnist_exp.tracking import journal, upload, uploader, waiting
from mnist_exp.tracking.journal import Journal
from mnist_exp.tracking.run_log import OpenRuns, RunWriter, mark_dead_runs
from mnist_exp.tracking.store import Store
from mnist_exp.tracking.upload import UploadState, upload_journal
from mnist_exp.tracking.uploader import Uploader, UploadLoop
from tests.faults.delivery import (
    EPOCHS,
    MODES,
    MOMENTS,
    begin,
    eight_writers,
    epoch,
    faults_in,
    first_part,
    last_part,
    recorded_through,
    whole,
)
from tests.faults.server import FaultyServer, Mode, Upstream
from tests.helpers import fresh_store


@pytest.fixture
def server(faulty: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> FaultyServer:
    monkeypatch.setattr(uploader, "PAUSE", 0.05)
    return faulty


@pytest.fixture
def open_runs(tmp_path: Path) -> OpenRuns:
    return OpenRuns(tmp_path / "open")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_server_that_fails(
    mode: Mode,
    moment: str,
    server: FaultyServer,
    upstream: Upstream,
    open_runs: OpenRuns,
    tmp_path: Path,
) -> None:
    """Neither stops nor slows who records; what it has not taken is brought by `sync`."""
    recorded_through(mode, moment, server, open_runs, tmp_path / "run")
    assert faults_in(tmp_path / "run", upstream.uri) == []


def test_it_comes_back(
    server: FaultyServer, upstream: Upstream, open_runs: OpenRuns, tmp_path: Path
) -> None:
    said: list[str] = []
    server.mode = "refuse"
    with Uploader() as background:
        background.open(server.uri, open_runs, said.append)
        background.watch([tmp_path / "run"])
        writer = begin(tmp_path / "run", open_runs, server.uri)
        first_part(writer)
        for number in range(1, EPOCHS + 1):
            epoch(writer, number)
            time.sleep(0.05)
        server.mode = "ok"
        last_part(writer)
        assert background.close(20) == []
    assert ["does not take" in said[0], "answers again" in said[-1]] == [True, True]
    assert len(said) == 2  # once each
    assert faults_in(tmp_path / "run", upstream.uri) == []


def test_any_answer_may_be_lost(
    server: FaultyServer, upstream: Upstream, open_runs: OpenRuns, tmp_path: Path
) -> None:
    """Each call in turn is committed, and its answer dropped: the next try finds it."""
    folder = tmp_path / "run"
    whole(folder, open_runs, server.uri)
    faults = 0
    store = Store(server.uri)
    while open_runs.entries():
        server.requests.clear()
        server.fail("drop", after=faults % 3, kind="POST")
        try:
            upload_journal(folder, open_runs, store)
        except Exception:
            faults += 1
        server.mode = "ok"
        assert faults < 60
        if faults % 4 == 3:
            upload_journal(folder, open_runs, store)
    assert faults >= 3
    assert faults_in(folder, upstream.uri) == []


def test_delivered_at_every_line(open_runs: OpenRuns, tmp_path: Path) -> None:
    """An uploader that is killed after any entry, before it has noted that, delivers it again."""
    store = Store(fresh_store(tmp_path))
    folder = tmp_path / "run"
    writer = begin(folder, open_runs, store.uri)
    first_part(writer)
    upload_journal(folder, open_runs, store)
    state = UploadState.of(folder)
    for number in range(1, EPOCHS + 1):
        epoch(writer, number)
        upload_journal(folder, open_runs, store)
        state.save(folder)  # as it was before
    last_part(writer)
    UploadState(store.uri, creating=True).save(folder)  # and nothing is known but that it was made
    upload_journal(folder, open_runs, store)
    assert faults_in(folder, store.uri) == []


def test_a_store_that_was_made_anew(open_runs: OpenRuns, tmp_path: Path) -> None:
    """It has nothing of the run, and gets all of it."""
    folder = tmp_path / "run"
    store = Store(fresh_store(tmp_path))
    writer = begin(folder, open_runs, store.uri)
    first_part(writer)
    upload_journal(folder, open_runs, store)
    fresh_store(tmp_path)
    for number in range(1, EPOCHS + 1):
        epoch(writer, number)
    last_part(writer)
    assert waiting.deliver(open_runs) == (1, {})
    assert faults_in(folder, store.uri) == []


def test_sync_passes_over_runs_that_cannot_be_read(
    open_runs: OpenRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many they are; and says so of one whose beginning is lost."""
    store = Store(fresh_store(tmp_path))
    for number in range(6):
        whole(tmp_path / f"run{number}", open_runs, store.uri)
    path = tmp_path / "run5" / journal.NAME
    path.write_bytes(b"x" + path.read_bytes())
    real = upload_journal
    bad = {tmp_path / f"run{number}" for number in range(4)}

    def failing(folder: Path, open_runs: OpenRuns, store: Store) -> UploadState:
        if folder in bad:
            raise PermissionError("no")
        return real(folder, open_runs, store)

    monkeypatch.setattr(upload, "upload_journal", failing)
    count, problems = waiting.deliver(open_runs)
    assert count == 1 and problems.keys() == {*bad, tmp_path / "run5"}
    assert "first line" in problems[tmp_path / "run5"]


def test_a_run_that_was_deleted_in_mlflow(open_runs: OpenRuns, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    store = Store(fresh_store(tmp_path))
    writer = begin(folder, open_runs, store.uri)
    first_part(writer)
    state = upload_journal(folder, open_runs, store)
    store.client.delete_run(state.run_id)
    last_part(writer)
    assert waiting.deliver(open_runs) == (1, {}) and open_runs.entries() == []


def test_an_earlier_run_does_not_hold_up(
    open_runs: OpenRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that cannot be delivered; what it is now about is, and nobody waits or is told."""
    store = Store(fresh_store(tmp_path))
    whole(tmp_path / "bad", open_runs, store.uri)
    monkeypatch.setattr(uploader, "PAUSE", 0.05)
    real = upload_journal

    def failing(folder: Path, open_runs: OpenRuns, store: Store) -> UploadState:
        if folder.name == "bad":
            raise OSError("no")
        return real(folder, open_runs, store)

    monkeypatch.setattr(upload, "upload_journal", failing)
    said: list[str] = []
    with Uploader() as background:
        background.open(store.uri, open_runs, said.append)
        background.watch([tmp_path / "good"])
        whole(tmp_path / "good", open_runs, store.uri)
        began = time.monotonic()
        assert background.close(20) == [] and time.monotonic() - began < 10
    assert said == [] and [e.folder.name for e in open_runs.entries()] == ["bad"]


def test_a_server_that_fails_twice_is_left_alone_until_the_next_round(
    open_runs: OpenRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call to one that hangs takes seconds, in which nothing else is uploaded."""
    store = Store(fresh_store(tmp_path))
    folders = [tmp_path / f"run{number}" for number in range(5)]
    for folder in folders:
        whole(folder, open_runs, store.uri)
    tried: list[Path] = []

    def failing(folder: Path, open_runs: OpenRuns, store: Store) -> UploadState:
        tried.append(folder)
        raise OSError("no answer")

    monkeypatch.setattr(upload, "upload_journal", failing)
    told, connection = multiprocessing.Pipe(duplex=False)
    loop = UploadLoop(store.uri, open_runs, connection)
    loop.folders = folders
    for rounds in (1, 2):
        loop.upload_news()
        assert tried == folders[:2] * rounds
    assert told.recv()[0] == "no answer" and not told.poll()
    waiting.deliver(open_runs)  # a person waits for all
    assert sorted(tried[4:]) == folders


def test_what_is_refused_for_itself_does_not_hold_up_those_behind_it(
    open_runs: OpenRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(fresh_store(tmp_path))
    folders = [tmp_path / f"run{number}" for number in range(4)]
    for folder in folders:
        whole(folder, open_runs, store.uri)
    _refuse(monkeypatch, *folders[:2])
    waiting_ones = [(store.uri, folder) for folder in folders]
    problems = upload.upload_all(waiting_ones, open_runs, {}, tries_again=False)
    assert [*problems] == folders[:2]
    assert {entry.folder for entry in open_runs.entries()} == {*folders[:2]}


def test_who_closes_waits_neither_for_earlier_runs_nor_for_what_will_not_pass(
    open_runs: OpenRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier runs come one at a time, after the own, until something is asked for."""
    store = Store(fresh_store(tmp_path))
    folders = [tmp_path / name for name in ("a", "b", "c", "own")]
    for folder in folders:
        whole(folder, open_runs, store.uri)
    asking, connection = multiprocessing.Pipe()
    asking.send(("watch", [tmp_path / "own"]))
    tried: list[str] = []
    real = upload_journal

    def closing_at_the_second(folder: Path, open_runs: OpenRuns, store: Store) -> UploadState:
        tried.append(folder.name)
        if len(tried) == 2:
            asking.send(("close",))
        return real(folder, open_runs, store)

    monkeypatch.setattr(upload, "upload_journal", closing_at_the_second)
    UploadLoop(store.uri, open_runs, connection).run()
    assert tried[0] == "own" and len(tried) == 2

    tried_again = _refuse(monkeypatch, *folders)
    asking.send(("watch", [folder for folder in folders if folder.name not in tried]))
    asking.send(("close",))
    UploadLoop(store.uri, open_runs, connection).run()
    assert len(tried_again) == 2


def _refuse(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> list[Path]:
    """Let the store refuse the runs in some folders for good, and return where it is noted."""
    tried: list[Path] = []
    real = upload_journal

    def refusing(folder: Path, open_runs: OpenRuns, store: Store) -> UploadState:
        tried.append(folder)
        if folder in folders:
            raise MlflowException("you may not write", error_code=PERMISSION_DENIED)
        return real(folder, open_runs, store)

    monkeypatch.setattr(upload, "upload_journal", refusing)
    return tried


def test_the_end_of_the_process_is_told_once(open_runs: OpenRuns, tmp_path: Path) -> None:
    """And nobody waits for it; its end when it is closed is no news."""
    uri, said = fresh_store(tmp_path), list[str]()
    for is_killed in (False, True):
        with Uploader() as background:
            background.open(uri, open_runs, said.append)
            background.watch([tmp_path / "run"])
            if is_killed:
                (process,) = multiprocessing.active_children()
                process.kill()
                process.join()
                whole(tmp_path / "run", open_runs, uri)
                began = time.monotonic()
                background.flush(20)
                assert background.close(20) == [tmp_path / "run"]
                assert time.monotonic() - began < 10
            else:
                assert background.close(20) == [] == said
    assert len(said) == 1 and "has ended" in said[0] and "mnist-exp sync" in said[0]


def test_a_process_that_is_forked_during_a_report_can_print(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It inherited the lock of what the thread was printing to, and waited for it for ever."""
    stream_lock, is_reporting = threading.Lock(), threading.Event()

    def report(text: str) -> None:
        with stream_lock:
            is_reporting.set()
            time.sleep(0.3)

    def print_in_the_other_process() -> bool:
        return stream_lock.acquire(timeout=5)

    with Uploader() as uploads:
        monkeypatch.setattr(uploads, "_report", report)
        ours, theirs = multiprocessing.Pipe()
        monkeypatch.setattr(uploads, "_connection", ours)
        listener = threading.Thread(target=uploads._listen)
        listener.start()
        theirs.send(("a problem", "a text"))
        assert is_reporting.wait(5)
        connection, process = fork(print_in_the_other_process)
        assert receive(connection, process) is True
        uploads._is_closing = True
        theirs.close()
        listener.join(5)


def test_a_record_that_cannot_be_looked_at_is_a_problem(
    open_runs: OpenRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(folder: Path, uri: str) -> bool:
        raise PermissionError(errno.EACCES, "not for you")

    monkeypatch.setattr(uploader, "has_news", failing)
    asking, connection = multiprocessing.Pipe()
    asking.send(("watch", [tmp_path / "run"]))
    asking.send(("close",))
    UploadLoop(fresh_store(tmp_path), open_runs, connection).run()
    assert "not for you" in asking.recv()[1]


def test_a_model_that_is_gone_does_not_stop_the_record(
    open_runs: OpenRuns, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(fresh_store(tmp_path))
    (tmp_path / "run").mkdir()
    writer = begin(tmp_path / "run", open_runs, store.uri)
    writer.journal.write("model", path="model")
    writer.end("FINISHED")
    assert waiting.deliver(open_runs) == (1, {})
    assert f"{tmp_path / 'run' / 'model'}: it is gone" in caplog.text


def test_what_a_store_refuses_for_good_is_told_once_with_what_to_do(
    open_runs: OpenRuns,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = Store(fresh_store(tmp_path))
    whole(tmp_path / "run", open_runs, store.uri)

    def refusing(folder: Path, open_runs: OpenRuns, store: Store) -> UploadState:
        raise MlflowException("you may not write", error_code=PERMISSION_DENIED)

    monkeypatch.setattr(upload, "upload_journal", refusing)
    told, connection = multiprocessing.Pipe(duplex=False)
    loop = UploadLoop(store.uri, open_runs, connection)
    loop.folders = [tmp_path / "run"]
    for _ in range(3):
        loop.upload_news()
    _, text = told.recv()
    assert "you may not write" in text and "sync --to URI" in text and not told.poll()
    waiting.deliver_to(open_runs, store.uri)  # another command, which says nothing
    assert caplog.messages == []


def test_a_folder_that_is_away_for_a_while(open_runs: OpenRuns, tmp_path: Path) -> None:
    store = Store(fresh_store(tmp_path))
    whole(tmp_path / "run", open_runs, store.uri)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    reasons = {tmp_path / "run": "the folder is not there"}
    assert mark_dead_runs(open_runs) == [] and waiting.deliver(open_runs) == (0, reasons)
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    assert waiting.deliver(open_runs) == (1, {})
    assert faults_in(tmp_path / "run", store.uri) == []


def test_a_folder_that_moves_during_its_upload_is_not_made_anew(
    open_runs: OpenRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where it is removed meanwhile."""
    folder, uri = tmp_path / "run", fresh_store(tmp_path)
    whole(folder, open_runs, uri)
    send = upload._upload_entries

    def send_and_move(*arguments: Any) -> UploadState:
        state = send(*arguments)
        folder.rename(tmp_path / "elsewhere")
        return state

    monkeypatch.setattr(upload, "_upload_entries", send_and_move)
    with pytest.raises(upload.NotReady):
        upload_journal(folder, open_runs, Store(uri))
    assert not folder.exists()


def test_what_is_too_long_or_no_unicode_is_uploaded_all_the_same(
    open_runs: OpenRuns, tmp_path: Path
) -> None:
    """As a command line can be, and the name of a file in it."""
    store, odd = Store(fresh_store(tmp_path)), "no UTF-8: \udcff"
    (tmp_path / "run").mkdir()
    writer = RunWriter.begin(
        tmp_path / "run",
        open_runs,
        name=odd + "n" * 300,
        uri=store.uri,
        experiment="delivery",
        tags={"command_line": odd + "x" * 9000},
    )
    writer.params({"dataset.root": odd, "long": "x" * 9000})
    writer.tags({"overrides": odd})
    writer.end("FAILED", odd)
    assert waiting.deliver(open_runs) == (1, {})
    run = store.client.get_run(UploadState.of(tmp_path / "run").run_id)
    assert run.data.tags["reason"] == run.data.tags["overrides"] == "no UTF-8: \\udcff"
    assert len(run.data.tags["command_line"]) == 8000 and len(run.info.run_name) == 250
    assert len(run.data.params["long"]) == 6000


def test_jobs_wait_for_their_sweep(open_runs: OpenRuns, tmp_path: Path) -> None:
    store = Store(fresh_store(tmp_path))
    parent = begin(tmp_path / "sweep", open_runs, store.uri)
    child = begin(tmp_path / "sweep" / "0", open_runs, store.uri, parent=tmp_path / "sweep")
    with pytest.raises(upload.NotReady):
        upload_journal(child.folder, open_runs, store)
    child.end("FINISHED")
    parent.end("FINISHED")
    assert waiting.deliver(open_runs) == (2, {})
    runs = {folder.name: UploadState.of(folder).run_id for folder in (parent.folder, child.folder)}
    tags = store.get(runs["0"]).tags
    assert tags["mlflow.parentRunId"] == runs["sweep"]


def test_a_damaged_line_is_passed_over(
    open_runs: OpenRuns, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(fresh_store(tmp_path))
    folder = tmp_path / "run"
    whole(folder, open_runs, store.uri)
    path = folder / journal.NAME
    lines = path.read_bytes().splitlines(keepends=True)
    (at,) = [i for i, line in enumerate(lines) if b'"step": 3, "values": {"train' in line]
    lines[at] = lines[at].replace(b"0.333", b"0.334")
    path.write_bytes(b"".join(lines))
    upload_journal(folder, open_runs, store)
    assert "damaged" in caplog.text and str(path) in caplog.text
    run_id = UploadState.of(folder).run_id
    steps = [m.step for m in store.client.get_metric_history(run_id, "train/loss")]
    assert steps == [1, 2, 4, 5, 6]
    assert store.get(run_id).status == "FINISHED" and open_runs.entries() == []


def test_eight_writers_on_one_fresh_store(tmp_path: Path) -> None:
    """At once and cold: every point, no lock error, nothing in Default."""
    assert eight_writers(tmp_path, f"sqlite:///{tmp_path / 'fresh.db'}") == []


def test_the_dead_are_marked_once_and_uploaded(open_runs: OpenRuns, tmp_path: Path) -> None:
    store = Store(fresh_store(tmp_path))
    folder = tmp_path / "run"
    writer = begin(folder, open_runs, store.uri)
    epoch(writer, 1)
    writer.journal.close()
    dead = {**process_identity(), "born": "long ago"}
    lines = journal.read(folder)[0]
    (folder / journal.NAME).unlink()
    with closing(Journal(folder)) as again:  # as a process that is no more has written it
        for entry in lines:
            fields = entry.fields | ({"owner": dead} if entry.kind == "begin" else {})
            again.write(entry.kind, **fields)
    open_runs.add(lines[0].fields["key"], folder, dead)
    killed: list[Any] = []
    threads = [
        threading.Thread(target=lambda: killed.extend(mark_dead_runs(open_runs))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(killed) == 1
    assert waiting.deliver(open_runs) == (1, {})
    run = store.get(UploadState.of(folder).run_id)
    assert run.status == "KILLED" and "without a word" in run.tags["reason"]
    assert open_runs.entries() == []
