"""The journal of a run: its record on this disk, which is there before MLflow has it, or without.

`FOLDER/journal.jsonl` only grows, by an entry a line:

    {"time": 1795420241123, "kind": "end", "status": "FINISHED", "reason": "", "crc": "c87217c7"}

time: ms since 1970. crc: the CRC-32 of the line's bytes without the crc and the newline, so that a
flipped bit that still parses is seen: `zlib.crc32(line[:-21] + b"}")`. The line is UTF-8, and
JSON as Python has it: floats with all their digits, and NaN, Infinity and -Infinity.
"""

import contextlib
import fcntl
import json
import math
import os
import re
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from mnist_exp.errors import ConfigError

NAME = "journal.jsonl"
EPOCH_METRIC = "train/loss"  # which every epoch of every run has
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


def _sealed(body: bytes) -> bytes:
    """Return the line of a JSON object: with its CRC-32, and a newline."""
    return body[:-1] + b', "crc": "%08x"}\n' % zlib.crc32(body)


def read(folder: Path, start: int = 0) -> tuple[list[Entry], list[str]]:
    """Return the entries from byte `start` on, and a message for each damaged line among them.

    A last line without its newline is still being written, and is neither. `start` is 0 or the
    `end` of an entry. Raises OSError where the file cannot be read, and nothing for what is in it.
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
    """Return the bytes of a journal's whole lines; 0 where there is none. Raises OSError."""
    try:
        with (folder / NAME).open("rb", buffering=0) as file:
            return _end_of_last_line(file.fileno())
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _parse(line: bytes, end: int) -> Entry:
    """Return the entry of a line without its newline; `end` is the byte behind it.

    Raises ValueError or RecursionError for what `Journal.write` has not made.
    """
    crc = _CRC.fullmatch(line[-20:])
    if crc is None:
        raise ValueError("it has no CRC-32")
    body = line[:-20] + b"}"
    if _sealed(body) != line + b"\n":
        recorded = crc[1].decode(errors="backslashreplace")
        raise ValueError(f"its CRC-32 is {zlib.crc32(body):08x}, and it says {recorded}")
    members = json.loads(body.decode())
    if not isinstance(members, dict):
        raise ValueError("it is no JSON object")
    entry_time, kind = members.pop("time", None), members.pop("kind", None)
    if type(entry_time) is not int or not isinstance(kind, str):
        raise ValueError("it has no time or no kind")
    return Entry(entry_time, kind, members, end)


class Journal:
    """A journal that is open for appending.

    Threads may share it, and other processes may have it open as well; a forked one opens its own.
    """

    def __init__(self, folder: Path) -> None:
        """Open the journal of a run, and make it if there is none. Raises OSError."""
        self._lock = threading.Lock()
        self._file = (folder / NAME).open("ab+", buffering=0)
        try:
            with self._locked() as descriptor:
                _cut_torn_line(descriptor)
        except BaseException:
            self._file.close()
            raise

    def write(self, kind: str, /, **fields: Any) -> None:
        """Append an entry, whole or not at all; its fields are whatever JSON has.

        Raises TypeError or ValueError for another field, and OSError where the disk fails.
        """
        text = _encode({"time": time.time_ns() // 1_000_000, "kind": kind, **fields})
        # half of a surrogate pair, as in a file's name that is not UTF-8, becomes JSON's own escape
        rest = _sealed(text.encode(errors="backslashreplace"))
        with self._locked() as descriptor:
            # a writer may have died, or failed to cut, since this one opened the file
            _cut_torn_line(descriptor)
            try:
                # one call, unless the disk fills up: a killed process leaves all or a beginning
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
            except BaseException:
                with contextlib.suppress(OSError):  # of the two, the first says more
                    _cut_torn_line(descriptor)
                raise

    def sync(self) -> None:
        """Return once the disk has all entries. Raises OSError."""
        with self._lock:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; nothing more can be written."""
        with self._lock:
            self._file.close()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """Yield the file's descriptor, while no other thread or process writes to it.

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


def _cut_torn_line(descriptor: int) -> None:
    """Take off what follows the last newline. Never a whole line: it may have been read."""
    if (end := _end_of_last_line(descriptor)) < os.fstat(descriptor).st_size:
        os.ftruncate(descriptor, end)


def _end_of_last_line(descriptor: int) -> int:
    """Return the bytes of an open file up to its last newline."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - _BLOCK)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def lock(folder: Path) -> FileLock:
    """Return a lock to hold where what a journal says decides what is written to it."""
    return FileLock(folder / ".journal.lock")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator["RunHistory"]:
    """Yield the history of a run that is on record, and hold the lock of its journal meanwhile.

    Raises ConfigError where the folder holds no record, as where it is being removed.
    """
    history = RunHistory()
    if (folder / NAME).exists():  # as the lock would make a folder that has gone anew
        with lock(folder):
            history = RunHistory.of(folder)
            if history.key:
                yield history
                return
    raise ConfigError(f"{folder}: it holds no record of a run any more, and gets no new one")


@dataclass(frozen=True)
class RunHistory:
    """A run as its journal has it so far."""

    key: str = ""  # "" where nothing has begun
    name: str = ""
    uri: str = ""  # of the store that it is for
    experiment: str = ""
    parent: str = ""  # the folder of its sweep
    start_time: int = 0  # ms since 1970
    end_time: int | None = None  # likewise; None while it runs
    owner: Mapping[str, Any] = field(default_factory=dict)  # the process that writes it
    owner_since: int = 0  # ms since 1970, when that process began or resumed it
    owner_after: int = 0  # the epochs that were recorded then
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    dataset_digest: str = ""  # the SHA-256 of the data that it began with
    dataset_sizes: Mapping[str, int] = field(default_factory=dict)  # split -> number of images
    # key -> step -> value, in the order in which they were recorded
    metrics: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    status: str = ""  # "" while it runs
    reason: str = ""

    @classmethod
    def of(cls, folder: Path) -> "RunHistory":
        """Replay the journal in a run's folder. Raises OSError where it cannot be read."""
        entries, _ = read(folder)  # of a damaged line, who uploads it says so
        values: dict[str, Any] = {}
        tags: dict[str, str] = {}
        metrics: dict[str, dict[int, float]] = {}
        for entry in entries:
            fields = entry.fields
            if entry.kind == "begin":
                names = ("key", "name", "uri", "experiment", "parent")
                values |= {name: fields.get(name, "") for name in names}
                values["start_time"] = entry.time
                tags = dict(fields.get("tags", {}))
            if entry.kind in ("begin", "resume"):
                values |= {"owner": fields["owner"], "status": "", "reason": "", "end_time": None}
                values["owner_since"] = entry.time
                values["owner_after"] = max(metrics.get(EPOCH_METRIC, {}), default=0)
            elif entry.kind == "store":
                values["uri"] = fields["uri"]
            elif entry.kind == "tags":
                tags |= fields["values"]
            elif entry.kind == "params":
                values["params"] = fields["values"]
            elif entry.kind == "dataset":
                values.setdefault("dataset_digest", fields["digest"])
                values.setdefault("dataset_sizes", fields.get("sizes", {}))
            elif entry.kind == "metrics":
                for key, value in fields["values"].items():
                    metrics.setdefault(key, {})[fields["step"]] = value
            elif entry.kind == "end":
                values |= {"status": fields["status"], "reason": fields.get("reason", "")}
                values["end_time"] = entry.time
        return cls(**values, tags=tags, metrics=metrics)

    @property
    def is_over(self) -> bool:
        """True of a run that finished or failed; one that was killed can go on."""
        return self.status in ("FINISHED", "FAILED")

    @property
    def epochs(self) -> int:
        """The last epoch that is recorded, or 0."""
        return max(self.metrics.get(EPOCH_METRIC, {}), default=0)

    def highest(self, key: str) -> float | None:
        """Return the highest finite value of a metric; None where there is none."""
        values = self.metrics.get(key, {}).values()
        return max((value for value in values if math.isfinite(value)), default=None)

    def newest(self) -> dict[str, float]:
        """Return the newest value of each metric."""
        return {key: points[max(points)] for key, points in self.metrics.items()}

    def history(self, key: str) -> list[tuple[int, float]]:
        """Return the points of a metric, (step, value), by step."""
        return sorted(self.metrics.get(key, {}).items())
