"""Standard output and error that cannot stop a run."""

import io
import os
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
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            self.problem = str(error.strerror)
            return memoryview(data).nbytes


def replace() -> Output:
    """Gives this process such streams, and returns what is under standard output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed by the shell, `>&-`: no file that is opened later is to be it
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    output = Output(1, "w", closefd=False)
    sys.stdout = _text(output, sys.stdout)
    sys.stderr = _text(Output(2, "w", closefd=False), sys.stderr)
    return output


def _text(output: Output, before: TextIO | None) -> io.TextIOWrapper:
    """As Python has made it; None: it was closed."""
    own: dict[str, Any] = {"encoding": "utf-8", "line_buffering": True}
    if isinstance(before, io.TextIOWrapper):
        names = "encoding", "errors", "line_buffering", "write_through"
        own = {name: getattr(before, name) for name in names}
    return io.TextIOWrapper(io.BufferedWriter(output), **own)
