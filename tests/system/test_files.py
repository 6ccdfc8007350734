"""A file is whole, with its old content or its new one; what cannot be written is told."""

import os
import signal
import time
from pathlib import Path
from typing import BinaryIO

import pytest

from mnist_exp.errors import ConfigError
from mnist_exp.system import files
from tests.programs import Start


def test_a_text_bytes_or_a_function_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a file"

    def content(file: BinaryIO) -> None:
        file.write(b"from a ")
        file.write(b"function")

    for written, expected in (("Größe", "Größe".encode()), (b"\xff", b"\xff")):
        files.write(path, written)
        assert path.read_bytes() == expected
    files.write(path, content)
    assert path.read_bytes() == b"from a function"
    assert [file.name for file in tmp_path.iterdir()] == ["a file"]


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a file"
    files.write(path, "old")

    def fail(_: object) -> None:
        raise OSError("no")

    for arguments in ((fail,), ("new", fail)):
        with pytest.raises(OSError, match="no"):
            files.write(path, *arguments)
        assert path.read_text() == "old"
        assert [file.name for file in tmp_path.iterdir()] == ["a file"]


def test_the_new_file_is_whole_before_it_takes_the_place(tmp_path: Path) -> None:
    path = tmp_path / "a file"
    files.write(path, "old")
    contents: list[str] = []
    files.write(path, "new", lambda part: contents.extend([part.read_text(), path.read_text()]))
    assert contents == ["new", "old"] and path.read_text() == "new"


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_stays(
    tmp_path: Path, start: Start
) -> None:
    program = """
import signal
import time
from mnist_exp.system import files
from tests.programs import Start
files.write(Path(sys.argv[1]), lambda file: os.kill(os.getpid(), signal.SIGKILL))
"""
    for name in ("a", ".b.json"):
        assert start(program, tmp_path / name).wait() == -signal.SIGKILL
        (left,) = tmp_path.iterdir()  # the one before it is gone
        assert left.name.startswith(f"{name}.")
        files.write(tmp_path / "now", "")  # it may be of a process that is not seen from here
        (tmp_path / "now").unlink()
        assert left.exists()
        long_ago = time.time() - 3700
        os.utime(left, (long_ago, long_ago))
    present: list[int] = []

    def write_another(file: BinaryIO) -> None:
        (part,) = tmp_path.glob("new.*.part")
        os.utime(part, (0, 0))
        files.write(tmp_path / "another", "of the same process")
        present.append(len(list(tmp_path.glob("*.part"))))

    files.write(tmp_path / "new", write_another)
    assert {path.name for path in tmp_path.iterdir()} == {"another", "new"} and present == [1]


def test_a_folder_that_cannot_be_written_is_told_and_nothing_is_made(tmp_path: Path) -> None:
    files.check_writable_folder(tmp_path / "a" / "b")
    files.check_writable_file(tmp_path / "a" / "file.png")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(IsADirectoryError):
        files.check_writable_file(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        files.check_writable_folder(tmp_path / "file" / "b")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "file").chmod(0o400)
    with pytest.raises(PermissionError):
        files.check_writable_file(tmp_path / "file")


def test_the_message_names_the_option_and_the_path(tmp_path: Path) -> None:
    with (
        pytest.raises(
            ConfigError, match=r"--output .*x: cannot be written \(No such file.*--output"
        ),
        files.reporting_write_errors("--output", tmp_path / "x"),
    ):
        (tmp_path / "x").read_text()
