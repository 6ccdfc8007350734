"""Checkpoints: whole or not there at all, checksummed, and safe to load."""

import hashlib
import os
from pathlib import Path
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
    expected = _sidecar(path).read_text().split()[0] if _sidecar(path).exists() else "missing"
    if (found := _sha256(path)) != expected:
        raise ConfigError(
            f"{path}: damaged, its SHA-256 is {found[:12]}... but {_sidecar(path).name} has "
            f"{expected[:12]}..."
        )
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
