"""Files that are whole or not there at all, whatever ends the process or the machine."""

import errno
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mnist_exp.errors import ConfigError


def write(path: Path, text: str) -> None:
    """Writes a file, and returns once the disk has it. Raises OSError; the old one is there then.

    A reader finds the old content or the new. Two processes may write the same file at once.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        with part.open("wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):  # the first error is the one to tell
            part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def asked_for(option: str, path: Path) -> Iterator[None]:
    """Raises ConfigError where `path`, which was named by `option`, cannot be written."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"{option} {path}: cannot be written ({reason}). Choose another place: {option} ..."
        ) from error


def check_folder(folder: Path) -> None:
    """Raises OSError for a folder in which nothing could be written, or that cannot be made, as far
    as a look can tell. Creates nothing."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    tempfile.TemporaryFile(dir=place).close()  # it has no name, and leaves no trace


def check_file(path: Path) -> None:
    """Raises OSError for a file that could not be written, as far as a look can tell."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if not path.exists():
        check_folder(path.parent)
    elif not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def sync_folder(folder: Path) -> None:
    """Returns once the disk has the names in a folder. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot sync a folder, see fsync(2)
            raise
    finally:
        os.close(descriptor)
