"""Checkpoints: whole or not there at all, checksummed, and safe to load."""

import hashlib
import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from mnist_exp.errors import ConfigError


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` (tensors and plain values) to `path`, and its SHA-256 to `path`.sha256.

    A reader finds the old file or the new one, never half of one.
    """
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    digest = _sha256(part)
    os.replace(part, path)
    _sidecar(path).write_text(f"{digest}  {path.name}\n")


def load(path: Path) -> dict[str, Any]:
    """What was saved, on the CPU. Raises ConfigError where the file is not what was written."""
    if not path.exists():
        raise ConfigError(f"{path}: there is no such checkpoint")
    words = _sidecar(path).read_text().split() if _sidecar(path).exists() else []
    if not words:
        raise ConfigError(f"{path}: not to be trusted, as {_sidecar(path).name} is not beside it")
    if (found := _sha256(path)) != words[0]:
        raise ConfigError(
            f"{path}: damaged, its SHA-256 is {found[:12]}... but {_sidecar(path).name} has "
            f"{words[0][:12]}..."
        )
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError) as error:
        raise ConfigError(f"{path}: not a checkpoint of tensors and plain values alone") from error
    return state


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
