"""The registry of open runs, and the runs in it whose process has died."""

import errno
import json
import logging
import os
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mnist_exp.errors import ConfigError
from mnist_exp.system.processes import is_running, process_identity
from mnist_exp.tracking import journal, run_log
from mnist_exp.tracking.journal import Journal, read
from mnist_exp.tracking.run_log import (
    OpenRun,
    OpenRuns,
    RunWriter,
    add_tags,
    mark_failed,
    mark_killed,
)
from tests.programs import READY, Start, at_once, dead_owner

DEEP = b"[" * 100_000


# marking as killed


def begun(folder: Path, its_owner: dict[str, Any], kind: str = "begin") -> dict[str, Any]:
    with closing(Journal(folder)) as written:
        written.write(kind, owner=its_owner)
        written.write("epoch", i=1)
    return its_owner


def test_a_run_of_this_process_alone_is_marked_failed(tmp_path: Path, start: Start) -> None:
    """One of another process may be trained there, which is why it cannot be trained here."""
    own, other = tmp_path / "own", tmp_path / "other"
    for folder in (own, other):
        folder.mkdir()
        (folder / ".reserve").write_bytes(b"room")
    begun(own, process_identity())
    begun(other, dead_owner(start))
    for folder in (own, other, tmp_path):  # the last one has no record
        mark_failed(folder, "no room")
    (*_, end), _ = read(own)
    assert end.fields == {"status": "FAILED", "reason": "no room"}
    assert [entry.kind for entry in read(other)[0]] == ["begin", "epoch"]
    assert [(folder / ".reserve").exists() for folder in (own, other)] == [False, True]


def test_an_end_waits_for_the_room_that_others_have_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two runs on a full disk, one takes what the other has freed until it fails as well."""
    begun(tmp_path, process_identity())
    refusals, real = [3], os.write

    def write(descriptor: int, data: Any) -> int:
        if b'"end"' in bytes(data) and refusals[0]:
            refusals[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    mark_failed(tmp_path, "no room")
    (*_, end), problems = read(tmp_path)
    assert (end.kind, refusals, problems) == ("end", [0], [])
    monkeypatch.setattr(run_log, "_LAST_SECONDS", 0.05)
    refusals[0] = 1000
    (tmp_path / "other").mkdir()
    begun(tmp_path / "other", process_identity())
    with pytest.raises(OSError, match="No space left"):  # nobody gives it back
        mark_failed(tmp_path / "other", "no room")


def test_a_dead_run_is_marked_killed(tmp_path: Path, start: Start) -> None:
    dead = begun(tmp_path, dead_owner(start))
    with (tmp_path / journal.NAME).open("a") as file:
        file.write('{"time": 1')
    assert mark_killed(tmp_path, dead, "it died") is True
    (*_, epoch, end), problems = read(tmp_path)
    assert (epoch.kind, end.kind, problems) == ("epoch", "end", [])
    assert end.fields == {"status": "KILLED", "reason": "it died"}
    assert mark_killed(tmp_path, dead, "it died") is False


def test_eight_mark_it_at_once(tmp_path: Path, start: Start) -> None:
    dead = begun(tmp_path, dead_owner(start))
    program = "import json\nprint(mark_killed(Path(sys.argv[1]), json.loads(sys.argv[2]), 'died'))"
    words = (tmp_path, json.dumps(dead))
    printed = at_once([start(READY + program, *words) for _ in range(8)])
    assert sorted(printed) == ["False"] * 7 + ["True"]
    assert [entry.kind for entry in read(tmp_path)[0]] == ["begin", "epoch", "end"]


def test_what_must_not_be_marked_killed(tmp_path: Path, start: Start) -> None:
    dead, alive = dead_owner(start), process_identity()
    elsewhere = {**dead, "host": "elsewhere"}
    for k, (recorded, asked) in enumerate(
        [(alive, alive), (elsewhere, elsewhere), (alive, dead), (elsewhere, dead), (dead, alive)]
    ):
        folder = tmp_path / str(k)
        folder.mkdir()
        begun(folder, recorded)
        before = (folder / journal.NAME).read_bytes()
        assert mark_killed(folder, asked, "it died") is False
        assert (folder / journal.NAME).read_bytes() == before


def test_a_resumed_run_is_its_new_owner_s(tmp_path: Path, start: Start) -> None:
    first = begun(tmp_path, dead_owner(start))
    assert mark_killed(tmp_path, first, "it died") is True
    begun(tmp_path, process_identity(), "resume")
    assert mark_killed(tmp_path, first, "it died") is False
    second = begun(tmp_path, dead_owner(start), "resume")
    assert mark_killed(tmp_path, second, "again") is True
    assert [entry.kind for entry in read(tmp_path)[0]].count("end") == 2


def test_an_end_is_an_end_whatever_it_says(tmp_path: Path, start: Start) -> None:
    dead = begun(tmp_path, dead_owner(start))
    with closing(Journal(tmp_path)) as written:
        written.write("end", status="FINISHED", owner=dead)
        written.write("sent")
    assert mark_killed(tmp_path, dead, "it died") is False


def test_a_run_that_ends_while_it_is_looked_at(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    its_owner = begun(tmp_path, dead_owner(start))

    def ends_and_dies(its_owner: dict[str, Any]) -> bool:
        with closing(Journal(tmp_path)) as written:
            written.write("end", status="FINISHED")
        return is_running(its_owner) is True

    monkeypatch.setattr(run_log, "is_running", ends_and_dies)
    assert mark_killed(tmp_path, its_owner, "it died") is False


def test_nothing_to_mark(tmp_path: Path, start: Start) -> None:
    dead = dead_owner(start)
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert mark_killed(folder, dead, "it died") is False
    assert [*tmp_path.iterdir()] == []
    Journal(tmp_path).close()
    assert mark_killed(tmp_path, dead, "it died") is False


# the registry of open runs


def test_open_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    open_runs, here = OpenRuns(tmp_path / "not yet" / "open"), process_identity()
    assert open_runs.entries() == []
    open_runs.remove("b")
    odd = tmp_path / os.fsdecode(b"\xff \xc3\xbc")
    open_runs.add("b", Path("outputs"), here)
    open_runs.add("a", odd, here)
    a = OpenRun("a", odd, here)
    b = OpenRun("b", tmp_path / "outputs", here)
    assert open_runs.entries() == OpenRuns(open_runs.folder).entries() == [a, b]
    open_runs.add("b", odd, here)
    assert open_runs.entries() == [a, OpenRun("b", odd, here)]
    open_runs.remove("a")
    open_runs.remove("a")
    assert [entry.key for entry in open_runs.entries()] == ["b"]
    assert [path.name for path in open_runs.folder.iterdir()] == ["b.json"]


@pytest.mark.parametrize("is_torn", [False, True])
@pytest.mark.parametrize(
    "add", [RunWriter.reopen, lambda folder, open_runs: add_tags(folder, open_runs, dict)]
)
def test_nothing_is_added_to_a_record_that_is_gone(
    add: Callable[[Path, OpenRuns], object], is_torn: bool, tmp_path: Path
) -> None:
    """It would make the folder anew, and an entry that nothing takes out again."""
    open_runs, folder = OpenRuns(tmp_path / "open"), tmp_path / "run"
    if is_torn:
        folder.mkdir()
        (folder / journal.NAME).write_bytes(b"half a li")
    with pytest.raises(ConfigError, match="no record of a run any more"):
        add(folder, open_runs)
    assert folder.exists() == is_torn and open_runs.entries() == []


def test_what_is_not_an_entry_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_runs = OpenRuns(tmp_path)
    open_runs.add("whole", tmp_path, process_identity())
    content = (tmp_path / "whole.json").read_bytes()
    fields = json.loads(content)
    bad = [content[:size] for size in range(0, len(content), 10)]
    bad += [b"\xff", b"17", b"null", b"[]", b"{}", b"\0" * 50, DEEP]
    for change in ({"owner": 1}, {"owner": {**process_identity(), "pid": "1"}}, {"folder": 1}):
        bad.append(json.dumps({**fields, **change}).encode())
    for k, damaged_content in enumerate(bad):
        (tmp_path / f"bad{k}.json").write_bytes(damaged_content)
    (tmp_path / "folder.json").mkdir()
    with caplog.at_level(logging.WARNING):
        assert [entry.key for entry in open_runs.entries()] == ["whole"]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * (len(bad) + 1)
    for name in ("folder", *(f"bad{k}" for k in range(len(bad)))):
        assert sum(f"{tmp_path / name}.json: " in message for message in caplog.messages) == 1


def test_processes_add_at_once(
    tmp_path: Path, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    program = """
open_runs = OpenRuns(Path(sys.argv[1]))
for i in range(20):
    open_runs.add(f"{sys.argv[2]}-{i:02}", Path("x"), process_identity())
    open_runs.add("same", Path("x"), process_identity())
    if i % 2:
        open_runs.remove(f"{sys.argv[2]}-{i:02}")
"""
    open_runs = OpenRuns(tmp_path)
    processes = [start(READY + program, tmp_path, who) for who in range(4)]
    finished = threading.Event()

    def look() -> None:
        while not finished.is_set():
            open_runs.entries()

    looking = threading.Thread(target=look)
    with caplog.at_level(logging.WARNING):
        looking.start()
        try:
            at_once(processes)
        finally:
            finished.set()
            looking.join()
    assert caplog.messages == []
    wanted = [f"{who}-{i:02}" for who in range(4) for i in range(0, 20, 2)]
    assert [entry.key for entry in open_runs.entries()] == [*wanted, "same"]
    assert len([*tmp_path.iterdir()]) == len(wanted) + 1
