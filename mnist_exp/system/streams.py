"""Standard output and error that cannot stop a run."""

import io
import os
import select
import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class Output(io.FileIO):
    """A descriptor that drops what a full disk, or a terminal that is gone, does not take.

    That nobody reads, as after `| head`, is an error all the same: other programs end there too.
    """

    problem = ""  # why something was dropped

    def write(self, data: "ReadableBuffer") -> int | None:  # type: ignore[override]
        """Write bytes, and return how many were taken, be they written or dropped."""
        try:
            while (count := super().write(data)) is None:  # whoever shares it has made it so
                select.select([], [self], [])
            return count
        except BrokenPipeError:
            raise
        except OSError as error:
            self.problem = str(error.strerror)
            return memoryview(data).nbytes


def replace_standard_streams() -> Output:
    """Give this process streams onto Output, and return the one of standard output.

    A stream that is not Python's own, as in a notebook, stays.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed by the shell, `>&-`: no file that is opened later is to be it
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    output = Output(1, "w", closefd=False)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(output, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(Output(2, "w", closefd=False), sys.stderr)
    return output


def _text(output: Output, before: TextIO | None) -> io.TextIOWrapper:
    """Return a text stream like the one that it replaces, which is None if it was closed."""
    settings: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}
    is_line_buffered = True
    if isinstance(before, io.TextIOWrapper):
        settings = {"encoding": before.encoding, "errors": before.errors}
        is_line_buffered = before.line_buffering or before.write_through  # PYTHONUNBUFFERED
    return io.TextIOWrapper(io.BufferedWriter(output), line_buffering=is_line_buffered, **settings)


def flush() -> bool:
    """Write what is left; return False if it is dropped, as nobody reads standard output."""
    is_read = True
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            stream.flush()
            is_read = is_read and stream is not sys.stdout
    return is_read
