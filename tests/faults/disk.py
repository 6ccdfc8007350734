"""A disk that is full from some write on: what a run or a sweep makes of that.

It is a simulation in a forked process, which needs no superuser. All that Python writes there is
counted, however it is opened; room that is made by removing a file can be used again.
"""

import builtins
import errno
import io
import multiprocessing
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mnist_exp.tracking import journal
from mnist_exp.tracking.journal import RunHistory
from tests.faults.interruptions import (
    GRID,
    JOBS,
    REGISTRY,
    Forked,
    differences,
    resume,
    words_of,
)

FOLDER_BYTES = 4096  # what a new folder takes
PLENTY = 2**40
NO_SPACE = os.strerror(errno.ENOSPC)
# of a run of BASE, and of a sweep of GRID: about the number of its writes
WRITES = {"run": 600, "sweep": 1300}


class FullDisk:
    """A disk that holds some folders, and has no room from write number `at` on.

    A process and those that it forks share it.
    """

    def __init__(self, folders: Sequence[Path], at: int) -> None:
        self.folders, self.at = tuple(map(str, folders)), at
        self.writes = multiprocessing.Value("q", 0)
        self.left = multiprocessing.Value("q", PLENTY)  # bytes
        self.descriptors: set[int] = set()  # of the files that are open for writing

    def install(self) -> None:
        """Have this process write to it, until its end."""
        disk, real_open, real_write = self, io.open, os.write

        class File(io.FileIO):
            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **options)
                disk.descriptors.add(self.fileno())

            def write(self, data: Any) -> int:
                view = memoryview(data).cast("B")
                return super().write(view[: disk.take(len(view))])

            def close(self) -> None:
                if not self.closed:
                    disk.descriptors.discard(self.fileno())
                super().close()

        def open_file(
            file: Any, mode: str = "r", buffering: int = -1, *more: Any, **how: Any
        ) -> Any:
            if isinstance(file, int) or not set("wax+") & set(mode) or not disk.holds(file):
                return real_open(file, mode, buffering, *more, **how)
            raw = File(file, mode.replace("b", "").replace("t", ""), opener=how.pop("opener", None))
            if buffering == 0:
                return raw
            file = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            if "b" in mode:
                return file
            text: Any = io.TextIOWrapper(file, *more, **how)
            text.reconfigure(line_buffering=buffering == 1)
            return text

        def write(descriptor: int, data: Any) -> int:
            if descriptor in disk.descriptors:
                data = memoryview(data)[: disk.take(len(data))]
            return real_write(descriptor, data)

        replaced: Any = (builtins, io, os)
        for module in replaced[:2]:
            module.open = open_file
        os.write = write
        os.mkdir = self._mkdir(os.mkdir)
        os.unlink = os.remove = self._freeing(os.unlink, 0)
        os.replace = self._freeing(os.replace, 1)
        os.ftruncate = self._truncating(os.ftruncate)

    def holds(self, path: Any) -> bool:
        """Return whether a file is on this disk."""
        return str(os.path.abspath(os.fspath(path))).startswith(self.folders)

    def take(self, size: int, least: int = 1) -> int:
        """Return how many of so many bytes find room. Raise OSError for less than `least`."""
        with self.writes.get_lock():
            self.writes.value += 1
            if self.writes.value == self.at:
                self.left.value = 0
            taken = min(size, int(self.left.value))
            if size and taken < least:
                raise OSError(errno.ENOSPC, NO_SPACE)
            self.left.value -= taken
            return taken

    def _free(self, size: int) -> None:
        with self.writes.get_lock():
            self.left.value += size

    def _mkdir(self, function: Callable[..., None]) -> Callable[..., None]:
        def mkdir(path: Any, *arguments: Any, **options: Any) -> None:
            if self.holds(path) and not os.path.exists(path):
                self.take(FOLDER_BYTES, least=FOLDER_BYTES)
            function(path, *arguments, **options)

        return mkdir

    def _freeing(self, function: Callable[..., None], index: int) -> Callable[..., None]:
        """Return a function that removes the file which its argument of this index names."""

        def call(*arguments: Any, **options: Any) -> None:
            try:
                found = os.stat(arguments[index], dir_fd=options.get("dir_fd"))
            except OSError:
                size = 0
            else:
                size = found.st_size if stat.S_ISREG(found.st_mode) else 0
            function(*arguments, **options)
            self._free(size)

        return call

    def _truncating(self, function: Callable[[int, int], None]) -> Callable[[int, int], None]:
        def truncate(descriptor: int, size: int) -> None:
            before = os.fstat(descriptor).st_size
            function(descriptor, size)
            self._free(max(0, before - size))

        return truncate


def fill_during_run(folder: Path, at: int) -> tuple[Path, int]:
    """Train a run on a disk that is full from write number `at` on, and check how it ends.

    Returns:
        Its folder, and the number of writes that were tried.
    """
    run_folder = folder / "the run"
    disk = FullDisk([run_folder, folder / REGISTRY], at)
    process = Forked(["train", *words_of(folder)], folder, disk.install)
    status = process.wait()
    if disk.writes.value < at:
        assert status == 0
        return run_folder, disk.writes.value
    _check_end(process, status)
    history = RunHistory.of(run_folder)
    if history.key:
        assert status == 1
        assert history.status == "FAILED" and NO_SPACE in history.reason, history
    else:
        assert journal.size(run_folder) == 0
    return run_folder, disk.writes.value


def fill_during_sweep(folder: Path, at: int) -> tuple[Path, int]:
    """Do the same with a sweep, whose jobs are trained in several processes."""
    sweep_folder = folder / "cut"
    disk = FullDisk([sweep_folder, folder / REGISTRY], at)
    process = Forked(
        ["train", "-m", *GRID, f"hydra.sweep.dir={sweep_folder}"], folder, disk.install
    )
    status = process.wait()
    if disk.writes.value < at:
        assert status == 0
        return sweep_folder, disk.writes.value
    _check_end(process, status)
    for part in (sweep_folder, *(sweep_folder / str(n) for n in range(JOBS))):
        history = RunHistory.of(part)
        if history.key:
            assert status == 1
            assert history.status in ("FINISHED", "FAILED"), (part, history)
            if part == sweep_folder:
                assert history.status == "FAILED", history
    return sweep_folder, disk.writes.value


def _check_end(process: Forked, status: int) -> None:
    text = process.text.read_text()
    assert status in (1, 2), (status, text)
    assert NO_SPACE in text and "Traceback" not in text, text


def lost_or_doubled(texts: Sequence[str]) -> list[str]:
    """Return those of `differences` that count for a sweep whose jobs were trained again.

    What is trained again alone differs in its rounding, and the jobs that had finished were a
    choice of their own, which was tested.
    """
    return [text for text in texts if not text.startswith(("differing", "lost: test/"))]


def goes_on_as(folder: Path, others: Sequence[tuple[str, Path]], *words: str) -> list[str]:
    """Resume what a full disk has ended, and return in what it differs from others.

    Args:
        folder: Of a run or a sweep, which may not have begun.
        others: Where each run is in the folder, and one that nothing happened to.
        words: More of the command line.
    """
    if not RunHistory.of(folder).key:
        return []
    resume(folder, *words)
    return [text for name, other in others for text in differences(folder / name, other)]
