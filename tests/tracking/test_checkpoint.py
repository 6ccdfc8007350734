"""A checkpoint is what was saved, or it is refused, whatever happens in between."""

import errno
import functools
import hashlib
import itertools
import os
import pickle
import random
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from mnist_exp.errors import ConfigError
from mnist_exp.tracking import checkpoint
from tests.faults.checkpoints import (
    FailingDisk,
    accept_any,
    age_parts,
    checkpoint_names,
    damage_is_refused,
    digest_file,
    file_names,
    is_numbered,
    kill_save_anywhere,
    newest_number,
    numbered_state,
    run_until_killed,
)

STATE: dict[str, Any] = {
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


def sign(path: Path) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    digest_file(path).write_text(f"{digest}  {path.name}\n")


def test_round_trip(path: Path) -> None:
    loaded = checkpoint.load(path)
    assert loaded.keys() == STATE.keys()
    assert torch.equal(loaded["model"]["weight"], STATE["model"]["weight"])
    assert loaded["model"]["seen"].dtype == torch.int64
    assert (loaded["epochs"], loaded["history"]) == (3, STATE["history"])


def test_sidecar_is_what_sha256sum_writes(path: Path) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest_file(path).read_text() == f"{digest}  checkpoint.pt\n"
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, digest_file(path).name]


def test_saved_again(path: Path) -> None:
    checkpoint.save(path, {"epochs": 4})
    assert checkpoint.load(path) == {"epochs": 4}


def test_missing(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"other\.pt: there is no such checkpoint"):
        checkpoint.load(path.with_name("other.pt"))


@pytest.mark.parametrize("content", [None, "", "\n", "\xff\xfe", "damaged"])
def test_without_sidecar(path: Path, content: str | None) -> None:
    digest_file(path).unlink()
    if content is not None:
        digest_file(path).write_text(content, encoding="latin-1")
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
        attacked = checkpoint.save_numbered(folder, number, numbered_state(number))
    for file in (path, attacked):
        attack = {"model": Malicious(target)}
        if way == "torch":
            torch.save(attack, file)
        else:
            file.write_bytes(pickle.dumps(attack, protocol=2))
        sign(file)
    with pytest.raises(ConfigError, match="not a checkpoint of tensors and plain values alone"):
        checkpoint.load(path)
    state, messages = checkpoint.newest(folder, accept_any)
    assert is_numbered(state, 1)
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


def test_200_damages(tmp_path: Path) -> None:
    assert 140 < sum(damage_is_refused(tmp_path / str(seed), seed) for seed in range(200)) < 190


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "states"
    for number in range(1, 6):
        checkpoint.save_numbered(folder, number, numbered_state(number))
        assert file_names(folder) == checkpoint_names(*range(max(1, number - 1), number + 1))
    checkpoint.save_numbered(folder, 6, numbered_state(6), keep=3)
    assert file_names(folder) == checkpoint_names(4, 5, 6)
    for mine in ("notes.txt", "state-final.pt", "state-9.pt"):
        (folder / mine).write_text("")
    for number in (10**9 - 1, 10**9):  # the newest has a digit more
        checkpoint.save_numbered(folder, number, numbered_state(number), keep=1)
    assert file_names(folder) == checkpoint_names(10**9) | {
        "notes.txt",
        "state-final.pt",
        "state-9.pt",
    }
    assert is_numbered(checkpoint.newest(folder, accept_any)[0], 10**9)


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
    assert file_names(tmp_path) == checkpoint_names(2, 3, 8, 9)


def test_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "not there", accept_any) == (None, [])
    assert checkpoint.newest(tmp_path, accept_any) == (None, [])
    path = checkpoint.save_numbered(tmp_path, 1, numbered_state(1))
    assert checkpoint.newest(tmp_path, lambda state: "no") == (None, [f"{path}: no"])
    path.unlink()
    path.mkdir()  # cannot be read, as on a bad disk
    state, messages = checkpoint.newest(tmp_path, accept_any)
    assert state is None and messages[0].startswith(f"{path}: cannot be read")


@pytest.mark.parametrize("before", [None, 1])
def test_save_killed_anywhere(tmp_path: Path, before: int | None) -> None:
    found = set()
    for at in itertools.count():
        path = tmp_path / f"killed at {at}" / "checkpoint.pt"
        path.parent.mkdir()
        if before:
            checkpoint.save(path, numbered_state(before))
        disk = run_until_killed(
            path.parent, at, functools.partial(checkpoint.save, path, numbered_state(2))
        )
        for folder in (path.parent, *disk.after_power_failure(tmp_path / f"off at {at}")):
            path = folder / path.name
            state = checkpoint.load(path) if path.exists() else None
            now = None if state is None else state["number"]
            assert now in (before, 2) and (now is None or is_numbered(state, now))
            found.add(now)
            age_parts(folder)
            checkpoint.save(path, numbered_state(3))
            assert is_numbered(checkpoint.load(path), 3)
            assert file_names(folder) == {path.name, digest_file(path).name}
            assert len(digest_file(path).read_text().splitlines()) == 1
        if not disk.failed:
            break
    assert at > 40 and found == {before, 2}


@pytest.mark.parametrize("before", [[], [1], [1, 2]])
def test_save_numbered_killed_anywhere(tmp_path: Path, before: list[int]) -> None:
    kill_save_anywhere(tmp_path, before)


def test_killed_again_and_again(tmp_path: Path) -> None:
    draw = random.Random(7)
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, numbered_state(0))
    last = 0
    for number in range(1, 100):
        run_until_killed(
            tmp_path,
            draw.randrange(70),
            functools.partial(checkpoint.save, path, numbered_state(number)),
        )
        now = checkpoint.load(path)["number"]
        assert now in (last, number) and is_numbered(checkpoint.load(path), now)
        last = now
    assert last > 50


def test_a_new_folder_is_synced_into_its_parent(tmp_path: Path) -> None:
    folder = tmp_path / "states"
    disk = run_until_killed(
        tmp_path, 1000, lambda: checkpoint.save_numbered(folder, 1, numbered_state(1))
    )
    assert disk.names.keys() == {"states"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_full_or_read_only_disk(tmp_path: Path, number: int) -> None:
    for at in itertools.count():
        folder = tmp_path / str(at)
        for old in (1, 2):
            checkpoint.save_numbered(folder, old, numbered_state(old))
        with FailingDisk(folder, at, OSError(number, os.strerror(number))) as disk:
            try:
                checkpoint.save_numbered(folder, 3, numbered_state(3))
            except OSError as error:
                assert error.errno == number
        now = newest_number(folder)
        assert now == 3 or checkpoint_names(1, 2) <= file_names(folder)
        if number == errno.ENOSPC:
            assert not list(folder.glob("*.part"))
        checkpoint.save_numbered(folder, 3, numbered_state(3))
        assert newest_number(folder) == 3 and file_names(folder) == checkpoint_names(2, 3)
        if not disk.failed:
            break
    assert at > 40
