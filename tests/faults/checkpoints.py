"""Checkpoints that are damaged, or whose saving is killed or loses its power."""

import errno
import functools
import itertools
import os
import random
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from mnist_exp.errors import ConfigError
from mnist_exp.tracking import checkpoint


def digest_file(path: Path) -> Path:
    """Return the file beside a checkpoint that holds its SHA-256."""
    return path.with_name(path.name + ".sha256")


def numbered_state(number: int) -> dict[str, Any]:
    """Return a state that is recognised by its number."""
    return {"weight": torch.full((40,), float(number)), "number": number}


def is_numbered(state: dict[str, Any] | None, number: int) -> bool:
    """Return whether a state is `numbered_state(number)`, whole."""
    return (
        state is not None
        and state["number"] == number
        and torch.equal(state["weight"], numbered_state(number)["weight"])
    )


def accept_any(state: dict[str, Any]) -> str:
    """Have no objection to a state, for `checkpoint.newest`."""
    return ""


def file_names(folder: Path) -> set[str]:
    """Return the names of all that is in a folder."""
    return {p.name for p in folder.iterdir()}


def checkpoint_names(*numbers: int) -> set[str]:
    """Return the names of the numbered checkpoints' files, with those of their digests."""
    return {f"state-{n:09d}.pt{end}" for n in numbers for end in ("", ".sha256")}


def damage_is_refused(folder: Path, seed: int) -> bool:
    """Damage the newer of two checkpoints, and assert that it is named and the older one is used.

    Returns:
        False where the bytes that were changed mean nothing, which is asserted as well.
    """
    draw = random.Random(seed)
    for number in (1, 2):
        path = checkpoint.save_numbered(folder, number, numbered_state(number))
    victim = draw.choice([path, digest_file(path)])
    content = bytearray(victim.read_bytes())
    place = draw.randrange(len(content))
    if draw.random() < 0.5:
        content[place] ^= 1 << draw.randrange(8)
    else:
        del content[place:]
    victim.write_bytes(content)
    state, messages = checkpoint.newest(folder, accept_any)
    if victim == digest_file(path) and place > 64:  # behind the digest
        assert is_numbered(checkpoint.load(path), 2) and is_numbered(state, 2) and not messages
        return False
    try:
        checkpoint.load(path)
    except ConfigError as error:
        assert "state-000000002.pt: damaged" in str(error)
    else:
        raise AssertionError(f"{path}: it is damaged, and was loaded")
    assert is_numbered(state, 1)
    assert len(messages) == 1 and messages[0].startswith(f"{path}: damaged")
    return True


class Killed(BaseException):
    """What a process that is killed does not survive; nothing may catch it."""


class FailingDisk:
    """A disk on which every operation from number `at` on raises `error`, in a `with` block.

    A write does half its work then. After a full disk's ENOSPC, files can still be removed. The
    instance also keeps what a power failure would leave: of a file what was synced, of a folder
    the names that it had when it was synced, and any of the changes since.
    """

    def __init__(self, folder: Path, at: int, error: BaseException) -> None:
        self.folder, self.at, self.error = folder, at, error
        self.count = 0
        self.failed = False
        self.synced = {p.stat().st_ino: p.read_bytes() for p in folder.glob("*")}
        self.names = self.current()
        self.held = [os.open(p, os.O_RDONLY) for p in folder.glob("*")]  # no inode is used again

    def current(self) -> dict[str, int]:
        return {p.name: p.stat().st_ino for p in self.folder.glob("*")}

    def __enter__(self) -> "FailingDisk":
        self.patches = ExitStack()
        opened = Path.open

        def open_file(path: Path, mode: str, **options: Any) -> Any:
            if mode == "rb":
                return opened(path, mode, **options)
            assert mode == "wb"
            self.step("open")
            file = opened(path, "w+b", buffering=0)
            self.synced.pop(os.fstat(file.fileno()).st_ino, None)
            self.held.append(os.dup(file.fileno()))
            return File(file, self)

        def sync(descriptor: int) -> None:
            self.step("fsync")
            found = os.fstat(descriptor)
            if stat.S_ISREG(found.st_mode):
                self.synced[found.st_ino] = os.pread(descriptor, found.st_size, 0)
            elif os.path.samestat(found, self.folder.stat()):
                self.names = self.current()

        operations: list[tuple[Any, str]] = [(os, "replace"), (Path, "unlink"), (Path, "mkdir")]
        counted = [(owner, name, self.counted(getattr(owner, name))) for owner, name in operations]
        for owner, name, function in ((Path, "open", open_file), (os, "fsync", sync), *counted):
            self.patches.enter_context(mock.patch.object(owner, name, function))
        return self

    def __exit__(self, *raised: object) -> None:
        self.patches.close()
        for descriptor in self.held:
            os.close(descriptor)

    def counted(self, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: Any, **options: Any) -> object:
            self.step(function.__name__)
            return function(*args, **options)

        return call

    def step(self, name: str) -> None:
        """Count an operation, and raise the error if its time has come."""
        self.count += 1
        if self.count > self.at:
            self.failed = True
            if name != "unlink" or getattr(self.error, "errno", None) != errno.ENOSPC:
                raise self.error

    def after_power_failure(self, into: Path) -> Iterator[Path]:
        """Yield folders in `into` with each content that could be there once power is back."""
        now = self.current()
        pending = [n for n in {**self.names, **now} if self.names.get(n) != now.get(n)]
        for number, done in enumerate(itertools.product((False, True), repeat=len(pending))):
            left = dict(self.names)
            for name, happened in zip(pending, done, strict=True):
                if happened:
                    left.pop(name, None)
                    left |= {name: now[name]} if name in now else {}
            folder = into / str(number)
            folder.mkdir(parents=True)
            for name, inode in left.items():
                (folder / name).write_bytes(self.synced.get(inode, bytes(100)))
            yield folder


class File:
    """An open file whose writes a `FailingDisk` counts and cuts in half."""

    def __init__(self, file: Any, disk: FailingDisk) -> None:
        self.file, self.disk = file, disk
        self.fileno, self.flush = file.fileno, file.flush

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *raised: object) -> None:
        self.file.close()

    def write(self, data: Any) -> int:
        try:
            self.disk.step("write")
        except BaseException:
            self.file.write(data[: len(data) // 2])
            raise
        self.disk.synced.pop(os.fstat(self.fileno()).st_ino, None)
        return int(self.file.write(data))


def run_until_killed(folder: Path, at: int, change: Callable[[], object]) -> FailingDisk:
    """Run `change`, killed at operation `at` on files if it has that many.

    Returns:
        The disk, which knows whether it was killed and what a power failure would have left.
    """
    with (
        mock.patch.object(os, "getpid", lambda: 2**22 + 1),  # that no process can have afterwards
        mock.patch.object(os, "kill"),  # but has now
        FailingDisk(folder, at, Killed()) as disk,
    ):
        try:
            change()
        except (Killed, RuntimeError):  # torch may turn the one into the other
            assert disk.failed
        else:
            assert not disk.failed
    return disk


def age_parts(folder: Path) -> None:
    """Make the half-written files in a folder so old that the next one to write removes them."""
    for part in folder.glob("*.part"):
        os.utime(part, (0, 0))


def kill_save_anywhere(place: Path, before: list[int]) -> None:
    """Kill the saving of checkpoint 3 at each operation on files in turn, and cut the power there.

    Asserts that the newest checkpoint is then the last of those `before` or 3, undamaged, and that
    saving goes on from there.
    """
    old = max(before, default=None)
    found = set()
    for at in itertools.count():
        folder = place / f"killed at {at}"
        folder.mkdir()
        for number in before:
            checkpoint.save_numbered(folder, number, numbered_state(number))
        save = functools.partial(checkpoint.save_numbered, folder, 3, numbered_state(3))
        disk = run_until_killed(folder, at, save)
        for left in (folder, *disk.after_power_failure(place / f"off at {at}")):
            now = newest_number(left)
            assert now in (old, 3)
            found.add(now)
            age_parts(left)
            checkpoint.save_numbered(left, 4, numbered_state(4))
            assert newest_number(left) == 4
            assert file_names(left) == checkpoint_names(4, *([now] if now else []))
        if not disk.failed:
            break
    assert at > 40 and found == {old, 3}


def newest_number(folder: Path) -> int | None:
    """Return the newest checkpoint's number, and assert that none in the folder is damaged."""
    for path in folder.glob("*.pt"):
        assert is_numbered(checkpoint.load(path), int(path.stem[-9:]))
    state, messages = checkpoint.newest(folder, accept_any)
    assert not messages
    return None if state is None else int(state["number"])
