"""A checkpoint is what was saved, or it is refused."""

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from mnist_exp import checkpoint
from mnist_exp.errors import ConfigError

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


@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.999])
def test_flipped_bit(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"checkpoint\.pt: damaged"):
        checkpoint.load(path)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_truncated(path: Path, kept: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ConfigError, match=r"checkpoint\.pt: damaged"):
        checkpoint.load(path)


def test_missing(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"other\.pt: there is no such checkpoint"):
        checkpoint.load(path.with_name("other.pt"))


@pytest.mark.parametrize("content", [None, "", "\n"])
def test_without_sidecar(path: Path, content: str | None) -> None:
    sidecar(path).unlink()
    if content is not None:
        sidecar(path).write_text(content)
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
    state = {"model": Malicious(target)}
    if way == "torch":
        torch.save(state, path)
    else:
        path.write_bytes(pickle.dumps(state, protocol=2))
    sign(path)
    with pytest.raises(ConfigError, match="not a checkpoint of tensors and plain values alone"):
        checkpoint.load(path)
    assert not target.exists()


def test_anything_else_is_refused(path: Path) -> None:
    path.write_bytes(b"not a checkpoint at all")
    sign(path)
    with pytest.raises(ConfigError, match="not a checkpoint"):
        checkpoint.load(path)


def test_the_old_file_survives_a_full_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(state: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, {"epochs": 4})
    assert checkpoint.load(path)["epochs"] == 3


def test_a_new_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"

    def replace(source: Path, target: Path) -> None:
        assert not path.exists()
        assert torch.load(source, weights_only=True)["epochs"] == 3  # all of it, before it moves
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, STATE)
    assert not path.exists()
