"""A checkpoint is what was saved, or it is refused, whatever happens in between."""

import errno
import hashlib
import itertools
import os
import pickle
import random
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mnist_exp.errors import ConfigError
from mnist_exp.tracking import checkpoint

STATE = {
    "model": {"weight": torch.arange(600.0).view(20, 30), "seen": torch.tensor(7)},
    "epochs": 3,
    "history": [{"loss": 0.5}, {"loss": 0.25}],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "my run" / "checkpoint.pt"
    path.parent.mkdir()
    checkpoint.save(path, STATE)
    return path


def sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def sign(path: Path) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    sidecar(path).write_text(f"{digest}  {path.name}\n")


def test_round_trip(path: Path) -> None:
    loaded = checkpoint.load(path)
    assert loaded.keys() == STATE.keys()
    assert torch.equal(loaded["model"]["weight"], STATE["model"]["weight"])
    assert loaded["model"]["seen"].dtype == torch.int64
    assert (loaded["epochs"], loaded["history"]) == (3, STATE["history"])


def test_sidecar_is_what_sha256sum_writes(path: Path) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert sidecar(path).read_text() == f"{digest}  checkpoint.pt\n"
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, sidecar(path).name]


def test_saved_again(path: Path) -> None:
    checkpoint.save(path, {"epochs": 4})
    assert checkpoint.load(path) == {"epochs": 4}


def test_missing(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"other\.pt: there is no such checkpoint"):
        checkpoint.load(path.with_name("other.pt"))


@pytest.mark.parametrize("content", [None, "", "\n", "\xff\xfe", "damaged"])
def test_without_sidecar(path: Path, content: str | None) -> None:
    sidecar(path).unlink()
    if content is not None:
        sidecar(path).write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"checkpoint\.pt\.sha256"):
        checkpoint.load(path)


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("way", ["torch", "pickle"])
def test_code_is_never_run(path: Path, way: str) -> None:
    target = path.with_name("made by the attack")
    folder = path.with_name("numbered")
    for number in (1, 2):
        attacked = checkpoint.save_numbered(folder, number, numbered(number))
    for file in (path, attacked):
        state = {"model": Malicious(target)}
        if way == "torch":
            torch.save(state, file)
        else:
            file.write_bytes(pickle.dumps(state, protocol=2))
        sign(file)
    with pytest.raises(ConfigError, match="not a checkpoint of tensors and plain values alone"):
        checkpoint.load(path)
    state, messages = checkpoint.newest(folder, anything)
    assert same(state, 1)
    assert messages == [f"{attacked}: not a checkpoint of tensors and plain values alone"]
    assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"\x80\x02.", b"PK\x03\x04"])
def test_anything_else_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    sign(path)
    with pytest.raises(ConfigError, match=r"checkpoint\.pt: not a checkpoint"):
        checkpoint.load(path)


def test_a_state_is_a_dict(path: Path) -> None:
    torch.save(torch.zeros(3), path)
    sign(path)
    with pytest.raises(ConfigError, match=r"checkpoint\.pt: not a checkpoint"):
        checkpoint.load(path)


def test_saved_while_it_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = checkpoint._digests

    def late(path: Path) -> list[str]:
        monkeypatch.undo()
        checkpoint.save(path, {"epochs": 4})
        return read(path)

    monkeypatch.setattr(checkpoint, "_digests", late)
    assert checkpoint.load(path) == {"epochs": 4}


def test_a_folder_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = errno.EINVAL

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", fsync)
    checkpoint.save(tmp_path / "checkpoint.pt", STATE)
    error = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        checkpoint.save(tmp_path / "checkpoint.pt", STATE)


def numbered(number: int) -> dict[str, Any]:
    return {"weight": torch.full((40,), float(number)), "number": number}


def same(state: dict[str, Any] | None, number: int) -> bool:
    return (
        state is not None
        and state["number"] == number
        and torch.equal(state["weight"], numbered(number)["weight"])
    )


def anything(state: dict[str, Any]) -> str:
    return ""


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def pairs(*numbers: int) -> set[str]:
    return {f"state-{n:09d}.pt{end}" for n in numbers for end in ("", ".sha256")}


def damaged_is_refused(folder: Path, seed: int) -> bool:
    """Whether a damage at random is one at all; it is named, and the checkpoint before is used."""
    draw = random.Random(seed)
    for number in (1, 2):
        path = checkpoint.save_numbered(folder, number, numbered(number))
    victim = draw.choice([path, sidecar(path)])
    content = bytearray(victim.read_bytes())
    place = draw.randrange(len(content))
    if draw.random() < 0.5:
        content[place] ^= 1 << draw.randrange(8)
    else:
        del content[place:]
    victim.write_bytes(content)
    state, messages = checkpoint.newest(folder, anything)
    if victim == sidecar(path) and place > 64:  # behind the digest
        assert same(checkpoint.load(path), 2) and same(state, 2) and not messages
        return False
    with pytest.raises(ConfigError, match=r"state-000000002\.pt: damaged"):
        checkpoint.load(path)
    assert same(state, 1)
    assert len(messages) == 1 and messages[0].startswith(f"{path}: damaged")
    return True


def test_200_damages(tmp_path: Path) -> None:
    assert 140 < sum(damaged_is_refused(tmp_path / str(seed), seed) for seed in range(200)) < 190


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "states"
    for number in range(1, 6):
        checkpoint.save_numbered(folder, number, numbered(number))
        assert names(folder) == pairs(*range(max(1, number - 1), number + 1))
    checkpoint.save_numbered(folder, 6, numbered(6), keep=3)
    assert names(folder) == pairs(4, 5, 6)
    for mine in ("notes.txt", "state-final.pt", "state-9.pt"):
        (folder / mine).write_text("")
    for number in (10**9 - 1, 10**9):  # the newest has a digit more
        checkpoint.save_numbered(folder, number, numbered(number), keep=1)
    assert names(folder) == pairs(10**9) | {"notes.txt", "state-final.pt", "state-9.pt"}
    assert same(checkpoint.newest(folder, anything)[0], 10**9)


def test_another_runs(tmp_path: Path) -> None:
    for number in (1, 8, 9):
        path = checkpoint.save_numbered(tmp_path, number, {"run": number == 1}, keep=3)

    def fits(state: dict[str, Any]) -> str:
        return "" if state["run"] else "it is another run's"

    state, messages = checkpoint.newest(tmp_path, fits)
    assert state == {"run": True}
    assert messages == [
        f"{path.with_name(f'state-00000000{n}.pt')}: it is another run's" for n in (9, 8)
    ]
    for number in (2, 3):  # the others' are newer by number, and stand in nobody's way
        checkpoint.save_numbered(tmp_path, number, {"run": number})
    assert checkpoint.newest(tmp_path, fits) == ({"run": 3}, messages)
    assert names(tmp_path) == pairs(2, 3, 8, 9)


def test_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "not there", anything) == (None, [])
    assert checkpoint.newest(tmp_path, anything) == (None, [])
    path = checkpoint.save_numbered(tmp_path, 1, numbered(1))
    assert checkpoint.newest(tmp_path, lambda state: "no") == (None, [f"{path}: no"])
    path.unlink()
    path.mkdir()  # cannot be read, as on a bad disk
    state, messages = checkpoint.newest(tmp_path, anything)
    assert state is None and messages[0].startswith(f"{path}: cannot be read")


class Killed(BaseException):
    pass


class Disk:
    """From operation `at` on, every operation on files raises `error`; a write does half its work.

    After a full disk's ENOSPC, files can still be removed. Also keeps what a power failure would
    leave: of a file what was synced, of a folder the names that it had when it was synced, and any
    of the changes since.
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

    def __enter__(self) -> "Disk":
        self.patch = pytest.MonkeyPatch()
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

        self.patch.setattr(Path, "open", open_file)
        self.patch.setattr(os, "fsync", sync)
        for owner, name in ((os, "replace"), (Path, "unlink"), (Path, "mkdir")):
            self.patch.setattr(owner, name, self.counted(getattr(owner, name)))
        return self

    def __exit__(self, *raised: object) -> None:
        self.patch.undo()
        for descriptor in self.held:
            os.close(descriptor)

    def counted(self, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: Any, **options: Any) -> object:
            self.step(function.__name__)
            return function(*args, **options)

        return call

    def step(self, name: str) -> None:
        self.count += 1
        if self.count > self.at:
            self.failed = True
            if name != "unlink" or getattr(self.error, "errno", None) != errno.ENOSPC:
                raise self.error

    def after_power_failure(self, into: Path) -> Iterator[Path]:
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
    def __init__(self, file: Any, disk: Disk) -> None:
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
        return self.file.write(data)


def killed(folder: Path, at: int, change: Callable[[], object]) -> Disk:
    with Disk(folder, at, Killed()) as disk:
        try:
            change()
        except (Killed, RuntimeError):  # torch may turn the one into the other
            assert disk.failed
        else:
            assert not disk.failed
    return disk


@pytest.mark.parametrize("before", [None, 1])
def test_save_killed_anywhere(tmp_path: Path, before: int | None) -> None:
    found = set()
    for at in itertools.count():
        path = tmp_path / f"killed at {at}" / "checkpoint.pt"
        path.parent.mkdir()
        if before:
            checkpoint.save(path, numbered(before))
        disk = killed(path.parent, at, lambda path=path: checkpoint.save(path, numbered(2)))
        for folder in (path.parent, *disk.after_power_failure(tmp_path / f"off at {at}")):
            path = folder / path.name
            state = checkpoint.load(path) if path.exists() else None
            now = state and state["number"]
            assert now in (before, 2) and (state is None or same(state, now))
            found.add(now)
            checkpoint.save(path, numbered(3))
            assert same(checkpoint.load(path), 3)
            assert names(folder) == {path.name, sidecar(path).name}
            assert len(sidecar(path).read_text().splitlines()) == 1
        if not disk.failed:
            break
    assert at > 40 and found == {before, 2}


@pytest.mark.parametrize("before", [[], [1], [1, 2]])
def test_save_numbered_killed_anywhere(tmp_path: Path, before: list[int]) -> None:
    killed_anywhere(tmp_path, before)


def killed_anywhere(tmp_path: Path, before: list[int]) -> None:
    """At each operation on files in turn, and the power cut there."""
    old = max(before, default=None)
    found = set()
    for at in itertools.count():
        folder = tmp_path / f"killed at {at}"
        folder.mkdir()
        for number in before:
            checkpoint.save_numbered(folder, number, numbered(number))
        disk = killed(
            folder, at, lambda folder=folder: checkpoint.save_numbered(folder, 3, numbered(3))
        )
        for left in (folder, *disk.after_power_failure(tmp_path / f"off at {at}")):
            now = undamaged(left)
            assert now in (old, 3)
            found.add(now)
            checkpoint.save_numbered(left, 4, numbered(4))
            assert undamaged(left) == 4
            assert names(left) == pairs(4, *([now] if now else []))
        if not disk.failed:
            break
    assert at > 40 and found == {old, 3}


def undamaged(folder: Path) -> int | None:
    """The newest's number, where no checkpoint of the folder is damaged."""
    for path in folder.glob("*.pt"):
        assert same(checkpoint.load(path), int(path.stem[-9:]))
    state, messages = checkpoint.newest(folder, anything)
    assert not messages
    return None if state is None else int(state["number"])


def test_killed_again_and_again(tmp_path: Path) -> None:
    draw = random.Random(7)
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, numbered(0))
    last = 0
    for number in range(1, 100):
        killed(tmp_path, draw.randrange(70), lambda n=number: checkpoint.save(path, numbered(n)))
        now = checkpoint.load(path)["number"]
        assert now in (last, number) and same(checkpoint.load(path), now)
        last = now
    assert last > 50


def test_a_new_folder_is_synced_into_its_parent(tmp_path: Path) -> None:
    folder = tmp_path / "states"
    disk = killed(tmp_path, 1000, lambda: checkpoint.save_numbered(folder, 1, numbered(1)))
    assert disk.names.keys() == {"states"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_full_or_read_only_disk(tmp_path: Path, number: int) -> None:
    for at in itertools.count():
        folder = tmp_path / str(at)
        for old in (1, 2):
            checkpoint.save_numbered(folder, old, numbered(old))
        with Disk(folder, at, OSError(number, os.strerror(number))) as disk:
            try:
                checkpoint.save_numbered(folder, 3, numbered(3))
            except OSError as error:
                assert error.errno == number
        now = undamaged(folder)
        assert now == 3 or pairs(1, 2) <= names(folder)
        if number == errno.ENOSPC:
            assert not list(folder.glob("*.part"))
        checkpoint.save_numbered(folder, 3, numbered(3))
        assert undamaged(folder) == 3 and names(folder) == pairs(2, 3)
        if not disk.failed:
            break
    assert at > 40
