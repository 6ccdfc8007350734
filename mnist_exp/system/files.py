"""Files that are whole or not there at all, whatever ends the process or the machine."""

import errno
import glob
import hashlib
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mnist_exp.errors import ConfigError

_AN_HOUR = 3600  # seconds


def write(
    path: Path,
    content: str | bytes | Callable[[BinaryIO], object],
    before_replacing: Callable[[Path], object] = lambda part: None,
) -> None:
    """Write a file, and return once the disk has it; a reader finds the old content or the new.

    Two processes may write the same file at once. Where OSError is raised, the old file is there.
    What processes that were killed in the middle of this have left in the folder is removed after
    an hour.

    Args:
        path: The file, whose folder is there.
        content: A text, bytes, or a function that writes to the open file.
        before_replacing: Is called with the new file, which the disk has, before it takes the
            place of the old one.
    """
    _remove_parts_of_the_dead(path.parent)
    owner = f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    part = path.with_name(f"{path.name}.{owner}.part")
    try:
        with part.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        before_replacing(part)
        replace(part, path)
    except BaseException:
        with suppress(OSError):  # the first error is the one to tell
            part.unlink(missing_ok=True)
        raise


def _remove_parts_of_the_dead(folder: Path) -> None:
    """Remove the files that `write` was about to rename when its process, on this host, died.

    A process in another container may have the same host name, and a number that is not found here:
    what was written in the last hour stays.
    """
    for part in folder.glob(f"*.{glob.escape(socket.gethostname())}-*.part"):
        with suppress(OSError, ValueError):
            if time.time() - part.stat().st_mtime < _AN_HOUR:
                continue
            try:
                os.kill(int(part.name.split("-")[-2]), 0)
            except ProcessLookupError:
                part.unlink()


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace(part: Path, path: Path) -> None:
    """Give a file, which the disk has, its name, and return once the disk has that as well."""
    os.replace(part, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Return once the disk has the names in a folder. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot sync a folder, see fsync(2)
            raise
    finally:
        os.close(descriptor)


def check_writable_folder(folder: Path) -> None:
    """Raise OSError if a folder cannot be made or written to, as far as a look can tell."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    tempfile.TemporaryFile(dir=existing).close()  # it has no name, and leaves no trace


def check_room(folder: Path, size: int) -> None:
    """Raise OSError if a folder has no room for so many bytes."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(size))


def check_writable_file(path: Path) -> None:
    """Raise OSError if a file cannot be made or written to, as far as a look can tell."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if not path.exists():
        check_writable_folder(path.parent)
    elif not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@contextmanager
def reporting_write_errors(option: str, path: Path) -> Iterator[None]:
    """Raise ConfigError in place of OSError, where `path`, which `option` names, is written."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"{option} {path}: cannot be written ({reason}). Choose another place: {option} ..."
        ) from error
