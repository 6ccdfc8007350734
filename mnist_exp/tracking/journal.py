"""The local record of a run, which is there before and whether or not MLflow has it.

`FOLDER/journal.jsonl` only grows, by an entry a line:

    {"time": 1795420241123, "kind": "end", "status": "FINISHED", "reason": "", "crc": "c87217c7"}

time: ms since 1970. crc: the CRC-32 of the line's bytes without the crc and the newline, so that a
flipped bit that still parses is seen: `zlib.crc32(line[:-21] + b"}")`. The line is UTF-8, and
JSON as Python has it: floats with all their digits, and NaN, Infinity and -Infinity.
"""

import contextlib
import fcntl
import json
import logging
import os
import re
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from filelock import FileLock

from mnist_exp.system import files
from mnist_exp.system.processes import is_running

log = logging.getLogger(__name__)

NAME = "journal.jsonl"
KINDS = ("run", "sweep")  # of what a registry of open runs holds
_OWN = frozenset({"time", "kind", "crc"})  # of the members of a line, those that are no fields
_CRC = re.compile(rb', "crc": "([^"]{8})"}')
_BLOCK = 4096  # bytes, of a look back for the last newline
_encode = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(frozen=True)
class Entry:
    """A line of a journal."""

    time: int  # ms since 1970
    kind: str
    fields: dict[str, Any]
    end: int  # the byte behind it, where the next one begins


def _line(kind: str, fields: Mapping[str, Any]) -> bytes:
    text = _encode({"time": time.time_ns() // 1_000_000, "kind": kind, **fields})
    # half of a surrogate pair, as in a file's name that is not UTF-8, becomes JSON's own escape
    return _sealed(text.encode(errors="backslashreplace"))


def _sealed(body: bytes) -> bytes:
    return body[:-1] + b', "crc": "%08x"}\n' % zlib.crc32(body)


def read(folder: Path, start: int = 0) -> tuple[list[Entry], list[str]]:
    """The entries from byte `start` on, and a message for each damaged line among them.

    start: 0, or the `end` of an entry. A last line without its newline is still being written: it
    is neither. The message of a line is the same in each call. Without a journal: ([], []).
    Raises OSError where the file is there but cannot be read, and nothing for what is in it.
    """
    path = folder / NAME
    try:
        with path.open("rb") as file:
            file.seek(start)
            *lines, _ = file.read().split(b"\n")
    except FileNotFoundError:
        return [], []
    entries, problems, end = [], [], start
    for line in lines:
        begin, end = end, end + len(line) + 1
        try:
            entries.append(_parse(line, end))
        except (ValueError, RecursionError) as error:
            problems.append(f"{path}: damaged, the line from byte {begin} to {end}: {error}")
    return entries, problems


def size(folder: Path) -> int:
    """Bytes of a journal's whole lines; 0 where there is none. Raises OSError."""
    try:
        with (folder / NAME).open("rb", buffering=0) as file:
            return _whole(file.fileno())
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _parse(line: bytes, end: int) -> Entry:
    """Raises ValueError or RecursionError for what `_line` has not made."""
    crc = _CRC.fullmatch(line[-20:])
    if crc is None:
        raise ValueError("it has no CRC-32")
    body = line[:-20] + b"}"
    if _sealed(body) != line + b"\n":
        found = crc[1].decode(errors="backslashreplace")
        raise ValueError(f"its CRC-32 is {zlib.crc32(body):08x}, and it says {found}")
    members = json.loads(body.decode())
    if not isinstance(members, dict):
        raise ValueError("it is no JSON object")
    entry_time, kind = members.pop("time", None), members.pop("kind", None)
    if type(entry_time) is not int or not isinstance(kind, str):
        raise ValueError("it has no time or no kind")
    return Entry(entry_time, kind, members, end)


class Journal:
    """A journal, opened for appending, and made if there is none. Raises OSError.

    Threads may share it, and other processes may have it open as well; a forked one opens its own.
    """

    def __init__(self, folder: Path) -> None:
        self._lock = threading.Lock()
        self._file = (folder / NAME).open("ab+", buffering=0)
        try:
            with self._alone() as descriptor:
                _cut(descriptor)
        except BaseException:
            self._file.close()
            raise

    def write(self, kind: str, /, **fields: Any) -> None:
        """Appends an entry, whole or not at all.

        fields: whatever JSON has; a tuple is read as a list, and a key as a string. Raises
        TypeError or ValueError for anything else, for the names time, kind and crc, and once
        closed; OSError where the disk does not take it.
        """
        if taken := _OWN & fields.keys():
            raise ValueError(f"no field can be called {', '.join(sorted(taken))}")
        rest = _line(kind, fields)
        with self._alone() as descriptor:
            # a writer may have died, or failed to cut, since this one opened the file
            _cut(descriptor)
            try:
                # one call, unless the disk fills up: a killed process leaves all or a beginning
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
            except BaseException:
                with contextlib.suppress(OSError):  # of the two, the first says more
                    _cut(descriptor)
                raise

    def sync(self) -> None:
        """Returns once the disk has all entries. Raises OSError."""
        with self._lock:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[int]:
        """The file's descriptor, while no other thread or process writes to it.

        Otherwise a line that grows could be taken for a torn one, and cut.
        """
        with self._lock:
            descriptor = self._file.fileno()
            try:
                with contextlib.suppress(OSError):  # some network file systems have no locks
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                yield descriptor
            finally:
                with contextlib.suppress(OSError):
                    fcntl.flock(descriptor, fcntl.LOCK_UN)


def _cut(descriptor: int) -> None:
    """Takes off what follows the last newline. Never a whole line: it may have been read."""
    if (end := _whole(descriptor)) < os.fstat(descriptor).st_size:
        os.ftruncate(descriptor, end)


def _whole(descriptor: int) -> int:
    """Bytes up to the last newline."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - _BLOCK)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


@dataclass(frozen=True)
class OpenRun:
    """A run that is not both ended and delivered."""

    key: str
    folder: Path  # absolute
    owner: dict[str, Any]
    kind: str  # one of KINDS


class OpenRuns:
    """The runs that are not both ended and delivered, a file each in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, key: str, folder: Path, owner: Mapping[str, Any], kind: str) -> None:
        """Adds a run, or replaces it. A reader finds all of it or nothing. Raises OSError."""
        assert kind in KINDS, kind
        self.folder.mkdir(parents=True, exist_ok=True)
        entry = {"folder": str(folder.resolve()), "owner": dict(owner), "kind": kind}
        files.write(self._path(key), json.dumps(entry))

    def remove(self, key: str) -> None:
        """Takes out a run; one that is not there is as good. Raises OSError."""
        self._path(key).unlink(missing_ok=True)

    def _read(self, key: str) -> OpenRun | None:
        """The run of this key; None where it is not there, or, with a warning, not readable."""
        path = self._path(key)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            folder, owner, kind = content["folder"], content["owner"], content["kind"]
            types = [type(owner[name]) for name in ("host", "pid", "born")]
            if kind not in KINDS or types != [str, int, str]:
                raise ValueError(f"a {kind} of {owner}")
            return OpenRun(key, Path(folder), owner, kind)
        except FileNotFoundError:
            return None
        # whatever a file can hold that is not an entry
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as e:
            log.warning("%s: passed over, as it is not readable: %s: %s", path, type(e).__name__, e)
            return None

    def entries(self) -> list[OpenRun]:
        """All runs by their key, but for those that, with a warning each, are not readable."""
        found = [self._read(path.stem) for path in sorted(self.folder.glob("*.json"))]
        return [entry for entry in found if entry is not None]

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"


def lock(folder: Path) -> FileLock:
    """For deciding from a journal what to write to it: to mark_killed its run, or to resume it."""
    return FileLock(folder / ".journal.lock")


def mark_killed(folder: Path, owner: Mapping[str, Any], reason: str) -> bool:
    """Ends the journal of a run whose process died without a word: KILLED, with the reason.

    owner: who began or last resumed the run, as far as the caller knows. True where this call did
    it; False where the process may be alive, the run has ended, or the journal has another owner.
    Raises OSError.
    """
    # asked before reading: what a process that is dead by now has written is all there
    if is_running(owner) is not False or not (folder / NAME).exists():
        return False
    with lock(folder):
        last = None
        for entry in read(folder)[0]:
            if entry.kind in ("begin", "resume", "end"):
                last = entry
        if last is None or last.kind == "end" or last.fields.get("owner") != dict(owner):
            return False
        with Journal(folder) as journal:
            journal.write("end", status="KILLED", reason=reason)
            journal.sync()
        return True
