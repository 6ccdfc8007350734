"""A journal gives back what was written, never anything else."""

import errno
import itertools
import json
import os
import random
import signal
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mnist_exp.tracking import journal
from mnist_exp.tracking.journal import Journal, read
from tests.faults.journals import ODD, comparable, damage_is_reported, write_all
from tests.programs import READY, Start, at_once


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


@pytest.mark.parametrize("fields", [{"a": {1}}, {"a": b""}])
def test_what_cannot_be_written_leaves_no_trace(tmp_path: Path, fields: dict[str, Any]) -> None:
    with closing(Journal(tmp_path)) as written:
        with pytest.raises((ValueError, TypeError)):
            written.write("value", **fields)
        written.write("value", i=0)
    assert numbers(tmp_path) == [0]


def test_closed(tmp_path: Path) -> None:
    written = Journal(tmp_path)
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
        with closing(Journal(tmp_path)) as written:
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
    with closing(Journal(tmp_path)) as written:
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

    with closing(Journal(tmp_path)) as written:
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
with closing(Journal(Path(sys.argv[1]))) as written:
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
with closing(Journal(Path(sys.argv[1]))) as written:
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
    with closing(Journal(Path(sys.argv[1]))) as written:
        for k in range(i, i + 3):
            written.write("value", who=sys.argv[2], i=k, value="x" * (200_000 if k % 7 == 0 else k))
"""
    at_once([start(READY + program, tmp_path, who) for who in range(3)])
    entries, problems = read(tmp_path)
    assert problems == []
    for who in "012":
        assert [e.fields["i"] for e in entries if e.fields["who"] == who] == [*range(300)]


def test_threads_append_at_once(tmp_path: Path) -> None:
    with closing(Journal(tmp_path)) as written:

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
