"""Checkpoints: whole or not there at all, checksummed, and safe to load.

A checkpoint is a file and its sidecar, `path` and `path`.sha256. Each is written beside it, synced
and renamed, and the folder is synced after each rename, as a file system may bring two of them to
the disk in any order. The sidecar comes first, and lists the digests of the old file and the new
one while the file changes: a kill or a power failure never leaves a whole file that its sidecar
does not vouch for.
"""

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mnist_exp.errors import ConfigError
from mnist_exp.system import files


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a state (tensors and plain values) to `path`, and its SHA-256 to `path`.sha256.

    A reader finds the old file or the new one, never half of one. Raises OSError where the disk is
    full or read-only; what was there before is whole then. One process at a time may save a path.
    """
    old = _digests(path)
    files.write(
        path,
        lambda file: _serialize(state, file),
        lambda part: _write_sidecar(path, [files.sha256(part), *old]),
    )
    if old:
        _write_sidecar(path, _digests(path)[:1])


def load(path: Path, name: str = "") -> dict[str, Any]:
    """Return the state of a checkpoint, on the CPU; `name` is that of the file, for messages.

    Raises ConfigError where the file is not what was written.
    """
    name = name or str(path)
    if not path.exists():
        raise ConfigError(f"{name}: there is no such checkpoint")
    sidecar = _sidecar(path)
    if not sidecar.exists():
        raise ConfigError(f"{name}: not to be trusted, as {sidecar.name} is not beside it")
    no_checkpoint = ConfigError(f"{name}: not a checkpoint of tensors and plain values alone")
    with path.open("rb") as file:  # opened once: what is loaded is what was checked
        digests = _digests(path)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest not in digests:
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return load(path, name)  # saved anew since it was opened, and its sidecar with it
            listed = " or ".join(f"{other[:12]}..." for other in digests) or "none"
            raise ConfigError(
                f"{name}: damaged, its SHA-256 is {digest[:12]}... but {sidecar.name} has {listed}"
            )
        file.seek(0)
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # the unpickler raises whatever a crafted file drives it to
            raise no_checkpoint from error
    if not isinstance(state, dict):
        raise no_checkpoint
    return state


def save_numbered(folder: Path, number: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Save `folder`/state-`number`.pt, and remove all but the `keep` (at least 1) newest.

    Returns the path. Only numbers up to `number` count: a higher one, which `newest` passed over,
    neither displaces what is saved now nor is removed. Makes `folder`, not its parents. Raises
    OSError as `save` does; earlier checkpoints are removed only once the new one is on the disk.
    """
    if not folder.exists():
        folder.mkdir()
        files.sync_folder(folder.parent)
    path = folder / f"state-{number:09d}.pt"
    save(path, state)
    removed = [old for old in _numbered(folder) if _number(old) <= number][keep:]
    for old in removed:
        old.unlink()
    if removed:
        files.sync_folder(folder)  # no checkpoint comes back without its sidecar
    for sidecar in folder.glob("state-*.pt.sha256"):  # theirs, and what earlier kills left
        if not sidecar.with_suffix("").exists():
            sidecar.unlink()
    return path


def newest(
    folder: Path, fits: Callable[[dict[str, Any]], str]
) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the state of the newest whole checkpoint of `save_numbered` that fits, or None.

    With it comes a message for each newer checkpoint that was passed over. `fits` returns why a
    state is not usable, or "".
    """
    messages = []
    for path in _numbered(folder):
        try:
            state = load(path)
        except ConfigError as error:
            messages.append(str(error))
        except OSError as error:  # a bad disk
            messages.append(f"{path}: cannot be read, {error}")
        else:
            if not (reason := fits(state)):
                return state, messages
            messages.append(f"{path}: {reason}")
    return None, messages


def _numbered(folder: Path) -> list[Path]:
    """Return the checkpoints of `save_numbered`, the newest first."""
    paths = (p for p in folder.glob("state-*.pt") if re.fullmatch("state-[0-9]{9,}", p.stem))
    return sorted(paths, key=_number, reverse=True)


def _number(path: Path) -> int:
    return int(path.stem.removeprefix("state-"))


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _digests(path: Path) -> list[str]:
    """Return the digests that the sidecar lists; none where it is missing or illegible."""
    sidecar = _sidecar(path)
    content = sidecar.read_bytes() if sidecar.exists() else b""
    return [digest.decode() for digest in re.findall(rb"^([0-9a-f]{64}) ", content, re.MULTILINE)]


def _write_sidecar(path: Path, digests: list[str]) -> None:
    """Write the sidecar of `path`, in the format of sha256sum."""
    files.write(_sidecar(path), "".join(f"{digest}  {path.name}\n" for digest in digests))


def _serialize(state: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # a failed write, which torch covers up
            raise error.__context__ from None
        raise
