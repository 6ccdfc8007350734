"""Standard output and error that cannot stop a run."""

import io
import os
import select
import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class Output(io.FileIO):
    """A descriptor. What a full disk, or a terminal that is gone, does not take is dropped.

    That nobody reads, as after `| head`, is an error all the same: other programs end there too.
    """

    problem = ""  # why something was dropped

    def write(self, data: "ReadableBuffer") -> int | None:  # type: ignore[override]
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
    """Gives this process such streams, and returns what is under standard output.

    One that is not Python's own, as in a notebook, stays.
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
    """As Python has made it; None: it was closed."""
    own: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}
    at_once = True
    if isinstance(before, io.TextIOWrapper):
        own = {"encoding": before.encoding, "errors": before.errors}
        at_once = before.line_buffering or before.write_through  # PYTHONUNBUFFERED
    return io.TextIOWrapper(io.BufferedWriter(output), line_buffering=at_once, **own)


def flush() -> bool:
    """Writes what is left to be written. False: nobody reads standard output, and it is dropped."""
    is_read = True
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            stream.flush()
            is_read = is_read and stream is not sys.stdout
    return is_read
