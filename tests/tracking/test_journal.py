"""A journal gives back what was written, never anything else, and its run is buried once."""

import errno
import itertools
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mnist_exp.system import processes
from mnist_exp.system.processes import is_running, process_identity
from mnist_exp.tracking import journal, run_log
from mnist_exp.tracking.journal import Journal, read
from mnist_exp.tracking.run_log import OpenRun, OpenRuns, mark_killed
from tests.faults.journals import ODD, comparable, damage_is_reported, write_all
from tests.helpers import ROOT

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts Python with the lines of a program and its arguments; nothing outlives the test."""
    processes = []

    def start(program: str, *words: object) -> "subprocess.Popen[str]":
        modules = ("system.processes", "tracking.journal", "tracking.run_log")
        imports = "".join(f"from mnist_exp.{module} import *\n" for module in modules)
        program = f"import os, sys\n{imports}{program}"
        process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, words)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def at_once(processes: Sequence["subprocess.Popen[str]"]) -> list[str]:
    """What processes print that say that they are ready, and wait for a line before they begin."""
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    printed = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return printed


READY = "print('ready', flush=True)\nsys.stdin.readline()\n"


def numbers(folder: Path, name: str = "i") -> list[int]:
    entries, problems = read(folder)
    assert problems == []
    return [entry.fields[name] for entry in entries]


# the format


def test_round_trip(tmp_path: Path) -> None:
    before = time.time() * 1000
    entries = write_all(tmp_path, ODD)
    assert [repr(entry.fields) for entry in entries] == [
        repr({"i": i, "value": value}) for i, value in enumerate(ODD)
    ]
    assert {entry.kind for entry in entries} == {"value"}
    assert all(before - 1 <= entry.time <= time.time() * 1000 for entry in entries)
    assert read(tmp_path)[1] == []


def test_every_float_is_exact(tmp_path: Path) -> None:
    rng = random.Random(0)
    values = [rng.uniform(-1, 1) * 10.0 ** rng.randint(-308, 308) for _ in range(1000)]
    assert [entry.fields["value"] for entry in write_all(tmp_path, values)] == values


def test_read_from_any_entry_on(tmp_path: Path) -> None:
    entries = write_all(tmp_path, ODD)
    for k, entry in enumerate(entries):
        assert comparable(read(tmp_path, entry.end)[0]) == comparable(entries[k + 1 :])
    assert entries[-1].end == (tmp_path / journal.NAME).stat().st_size


def test_lines_are_utf8_and_as_the_module_describes_them(tmp_path: Path) -> None:
    write_all(tmp_path, ODD)
    for line in (tmp_path / journal.NAME).read_bytes().splitlines(keepends=True):
        crc = json.loads(line.decode())["crc"]
        assert crc == f"{zlib.crc32(line[:-21] + b'}'):08x}"


def test_no_journal(tmp_path: Path) -> None:
    assert read(tmp_path) == read(tmp_path / "nowhere") == ([], [])


@pytest.mark.parametrize("fields", [{"time": 1}, {"crc": 1}, {"kind": 1}, {"a": {1}}, {"a": b""}])
def test_what_cannot_be_written_leaves_no_trace(tmp_path: Path, fields: dict[str, Any]) -> None:
    with Journal(tmp_path) as written:
        with pytest.raises((ValueError, TypeError)):
            written.write("value", **fields)
        written.write("value", i=0)
    assert numbers(tmp_path) == [0]


def test_closed(tmp_path: Path) -> None:
    with Journal(tmp_path) as written:
        written.sync()
    written.close()
    uses: list[Callable[[], object]] = [lambda: written.write("value"), written.sync]
    for use in uses:
        with pytest.raises(ValueError, match="closed"):
            use()


# damage


def test_torn_at_every_byte(tmp_path: Path) -> None:
    entries = write_all(tmp_path, [0.5, "ü", None])
    path = tmp_path / journal.NAME
    content = path.read_bytes()
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        whole = [entry for entry in entries if entry.end <= size]
        assert read(tmp_path) == (whole, [])
        with Journal(tmp_path) as written:
            assert path.read_bytes() == content[: whole[-1].end if whole else 0]
            written.write("later")
        found, problems = read(tmp_path)
        assert (found[:-1], found[-1].kind, problems) == (whole, "later", [])


def test_a_long_torn_line_is_cut(tmp_path: Path) -> None:
    entries = write_all(tmp_path, [0, "x" * 3_000_000])
    os.truncate(tmp_path / journal.NAME, entries[1].end - 1)
    Journal(tmp_path).close()
    assert (tmp_path / journal.NAME).stat().st_size == entries[0].end


def test_a_line_torn_by_another_writer_is_cut_before_the_next(tmp_path: Path) -> None:
    with Journal(tmp_path) as written:
        written.write("value", i=0)
        with (tmp_path / journal.NAME).open("a") as other:
            other.write('{"time": 1')
        written.write("value", i=1)
    assert numbers(tmp_path) == [0, 1]


@pytest.mark.parametrize("seed", range(200))
def test_damage(tmp_path: Path, seed: int) -> None:
    damage_is_reported(tmp_path, seed)


DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    "line",
    [
        *(b"", b"\0" * 100, b"\xff\xfe", b"17", b"{}", b"null", b'"}', b"x" * 10_000_000, DEEP),
        *(b'{"time": 1, "kind": "a"}', b'{"time": 1, "kind": "a", "crc": "00000000"}'),
        b'{"time": 1, "kind": "a", "crc": "\xff\xff\xff\xff\xff\xff\xff\xff"}',
    ],
    ids=lambda line: repr(line[:8]),
)
@pytest.mark.parametrize("is_sealed", [False, True])
def test_read_raises_for_no_content(tmp_path: Path, line: bytes, is_sealed: bool) -> None:
    """Nor where somebody has put a right CRC-32 behind it."""
    entries = write_all(tmp_path, [0])
    if is_sealed:
        line = line[:-1] + b', "crc": "%08x"}' % zlib.crc32(line[:-1] + b"}")
    with (tmp_path / journal.NAME).open("ab") as file:
        file.write(line + b"\n")
    later = write_all(tmp_path, [1])[-1]
    found, problems = read(tmp_path)
    if is_sealed and b"kind" in line and b"\xff" not in line:
        assert [entry.kind for entry in found] == ["value", "a", "value"]
    else:
        assert found == [*entries, later]
        (problem,) = problems
        assert f"from byte {entries[0].end} to {entries[0].end + len(line) + 1}: " in problem
        assert len(problem) < 500


# the disk


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, rest: write(descriptor, rest[:7]))
        written = write_all(tmp_path, ODD[:-1])
    assert [repr(entry.fields["value"]) for entry in written] == [*map(repr, ODD[:-1])]


@pytest.mark.parametrize("can_cut", [True, False])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_cut: bool, error: BaseException
) -> None:
    """A line that could not be completed is gone, at once or before the next."""
    write, calls = os.write, itertools.count()

    def full(descriptor: int, rest: bytes) -> int:
        if next(calls):
            raise error
        return write(descriptor, rest[: len(rest) // 2])

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    with Journal(tmp_path) as written:
        written.write("value", i=0)
        size = (tmp_path / journal.NAME).stat().st_size
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            if not can_cut:
                patch.setattr(os, "ftruncate", fail)
            with pytest.raises(type(error)) as raised:
                written.write("value", i=1)
        assert raised.value is error
        assert ((tmp_path / journal.NAME).stat().st_size == size) == can_cut
        assert numbers(tmp_path) == [0]
        written.write("value", i=2)
    assert numbers(tmp_path) == [0, 2]


def test_a_file_that_may_not_grow(tmp_path: Path, start: Start) -> None:
    program = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
with Journal(Path(sys.argv[1])) as written:
    for i in range(1000):
        try:
            written.write("value", i=i, value="x" * 300)
        except OSError as error:
            print(i, error.errno)
            break
"""
    count, number = map(int, start(program, tmp_path).communicate(timeout=60)[0].split())
    assert number == errno.EFBIG
    assert numbers(tmp_path) == [*range(count)]
    assert (tmp_path / journal.NAME).read_bytes().endswith(b"\n")


# several writers, and killed ones

WRITER = """
with Journal(Path(sys.argv[1])) as written:
    for i in range(int(sys.argv[2]), sys.maxsize):
        written.write("value", i=i, value="x" * (300_000 if i % 20 == 0 else i % 500))
        if i == int(sys.argv[2]):
            print("ready", flush=True)
"""


def test_a_killed_writer_loses_nothing(tmp_path: Path, start: Start) -> None:
    rng = random.Random(0)
    next_one = end = 0
    for _ in range(10):
        writer = start(WRITER, tmp_path, next_one)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, 0.02))
        writer.send_signal(signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
        entries, problems = read(tmp_path, end)
        assert problems == []
        found = [entry.fields["i"] for entry in entries]
        assert found == [*range(next_one, next_one + len(found))]
        assert len(found) > 0
        next_one, end = next_one + len(found), entries[-1].end


def test_processes_append_at_once(tmp_path: Path, start: Start) -> None:
    """Opening again and again, which cuts off a line that is torn, but not one that grows."""
    program = """
for i in range(0, 300, 3):
    with Journal(Path(sys.argv[1])) as written:
        for k in range(i, i + 3):
            written.write("value", who=sys.argv[2], i=k, value="x" * (200_000 if k % 7 == 0 else k))
"""
    at_once([start(READY + program, tmp_path, who) for who in range(3)])
    entries, problems = read(tmp_path)
    assert problems == []
    for who in "012":
        assert [e.fields["i"] for e in entries if e.fields["who"] == who] == [*range(300)]


def test_threads_append_at_once(tmp_path: Path) -> None:
    with Journal(tmp_path) as written:

        def work(who: int) -> None:
            for i in range(300):
                written.write("value", who=who, i=i)
                if i % 100 == 0:
                    written.sync()

        threads = [threading.Thread(target=work, args=(who,)) for who in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    entries, problems = read(tmp_path)
    assert problems == []
    for who in range(4):
        assert [e.fields["i"] for e in entries if e.fields["who"] == who] == [*range(300)]


# owners

OWNER = "import json\nprint(json.dumps(process_identity()), flush=True)\n"
WAIT = "sys.stdin.readline()\n"


def dead_owner(start: Start) -> dict[str, Any]:
    return dict(json.loads(start(OWNER).communicate(timeout=60)[0]))


def running_owner(process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdout is not None
    return dict(json.loads(process.stdout.readline()))


def test_this_process_is_alive() -> None:
    assert is_running(process_identity()) is True
    assert json.loads(json.dumps(process_identity())) == process_identity()


def test_a_process_is_alive_until_it_ends(start: Start) -> None:
    process = start(OWNER + WAIT)
    its_owner = running_owner(process)
    assert is_running(its_owner) is True
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # which leaves a zombie
    os.kill(process.pid, 0)
    assert is_running(its_owner) is False
    process.wait()
    assert is_running(its_owner) is False


@pytest.mark.skipif(not Path("/proc/self/comm").exists(), reason="a name can be set on Linux")
def test_a_name_that_looks_like_more_of_the_line(start: Start) -> None:
    process = start("Path('/proc/self/comm').write_text('a) Z 1 (b) 2')\n" + OWNER + WAIT)
    its_owner = running_owner(process)
    assert is_running(its_owner) is True
    assert its_owner["born"].split()[0] == process_identity()["born"].split()[0]
    assert (
        0
        <= int(its_owner["born"].split()[1]) - int(process_identity()["born"].split()[1])
        < 100 * 3600
    )


def test_a_recycled_pid_is_dead(start: Start) -> None:
    assert is_running({**process_identity(), "born": dead_owner(start)["born"]}) is False


def test_another_host(start: Start) -> None:
    for one in (process_identity(), dead_owner(start)):
        assert is_running({**one, "host": "elsewhere"}) is None


def test_a_pid_that_cannot_be(start: Start) -> None:
    assert is_running({**process_identity(), "pid": 10**30}) is False


def test_a_hidden_process_may_be_alive(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = dead_owner(start)

    def kill(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    assert is_running(gone) is None


@pytest.mark.skipif(shutil.which("ps") is None, reason="needs ps")
def test_without_proc(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_start_time", processes._start_time_by_ps)
    here = process_identity()
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert re.fullmatch(r"\w{3} \w{3} [ \d]\d \d\d:\d\d:\d\d \d{4}", here["born"])
    assert is_running(here) is True
    process = start(OWNER + WAIT)
    child = {**running_owner(process), "born": processes._start_time_by_ps(process.pid)}
    assert is_running(child) is True
    assert is_running({**child, "born": "Mon Nov 23 07:50:41 1970"}) is False
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert is_running(child) is False
    process.wait()
    assert is_running(child) is False


# burying


def begun(folder: Path, its_owner: dict[str, Any], kind: str = "begin") -> dict[str, Any]:
    with Journal(folder) as written:
        written.write(kind, owner=its_owner)
        written.write("epoch", i=1)
    return its_owner


def test_bury(tmp_path: Path, start: Start) -> None:
    dead = begun(tmp_path, dead_owner(start))
    with (tmp_path / journal.NAME).open("a") as file:
        file.write('{"time": 1')
    assert mark_killed(tmp_path, dead, "it died") is True
    (*_, epoch, end), problems = read(tmp_path)
    assert (epoch.kind, end.kind, problems) == ("epoch", "end", [])
    assert end.fields == {"status": "KILLED", "reason": "it died"}
    assert mark_killed(tmp_path, dead, "it died") is False


def test_eight_bury_at_once(tmp_path: Path, start: Start) -> None:
    dead = begun(tmp_path, dead_owner(start))
    program = "import json\nprint(mark_killed(Path(sys.argv[1]), json.loads(sys.argv[2]), 'died'))"
    words = (tmp_path, json.dumps(dead))
    printed = at_once([start(READY + program, *words) for _ in range(8)])
    assert sorted(printed) == ["False"] * 7 + ["True"]
    assert [entry.kind for entry in read(tmp_path)[0]] == ["begin", "epoch", "end"]


def test_what_must_not_be_buried(tmp_path: Path, start: Start) -> None:
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
    with Journal(tmp_path) as written:
        written.write("end", status="FINISHED", owner=dead)
        written.write("sent")
    assert mark_killed(tmp_path, dead, "it died") is False


def test_a_run_that_ends_while_it_is_looked_at(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    its_owner = begun(tmp_path, dead_owner(start))

    def ends_and_dies(its_owner: dict[str, Any]) -> bool:
        with Journal(tmp_path) as written:
            written.write("end", status="FINISHED")
        return is_running(its_owner) is True

    monkeypatch.setattr(run_log, "is_running", ends_and_dies)
    assert mark_killed(tmp_path, its_owner, "it died") is False


def test_nothing_to_bury(tmp_path: Path, start: Start) -> None:
    dead = dead_owner(start)
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert mark_killed(folder, dead, "it died") is False
    assert [*tmp_path.iterdir()] == []
    Journal(tmp_path).close()
    assert mark_killed(tmp_path, dead, "it died") is False


# the registry of open runs


def test_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    open_runs, here = OpenRuns(tmp_path / "not yet" / "open"), process_identity()
    assert open_runs.entries() == []
    open_runs.remove("b")
    odd = tmp_path / os.fsdecode(b"\xff \xc3\xbc")
    open_runs.add("b", Path("outputs"), here, "run")
    open_runs.add("a", odd, here, "sweep")
    a = OpenRun("a", odd, here, "sweep")
    b = OpenRun("b", tmp_path / "outputs", here, "run")
    assert open_runs.entries() == OpenRuns(open_runs.folder).entries() == [a, b]
    open_runs.add("b", odd, here, "run")
    assert open_runs.entries() == [a, OpenRun("b", odd, here, "run")]
    open_runs.remove("a")
    open_runs.remove("a")
    assert [entry.key for entry in open_runs.entries()] == ["b"]
    assert [path.name for path in open_runs.folder.iterdir()] == ["b.json"]


def test_what_is_not_an_entry_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_runs = OpenRuns(tmp_path)
    open_runs.add("whole", tmp_path, process_identity(), "run")
    content = (tmp_path / "whole.json").read_bytes()
    fields = json.loads(content)
    bad = [content[:size] for size in range(0, len(content), 10)]
    bad += [b"\xff", b"17", b"null", b"[]", b"{}", b"\0" * 50, DEEP]
    for change in (
        {"kind": "x"},
        {"owner": 1},
        {"owner": {**process_identity(), "pid": "1"}},
        {"folder": 1},
    ):
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
    open_runs.add(f"{sys.argv[2]}-{i:02}", Path("x"), process_identity(), "run")
    open_runs.add("same", Path("x"), process_identity(), "run")
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
