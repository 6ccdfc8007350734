"""Standard output that is full, closed, shared, or read by nobody."""

import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT

OWN = {**os.environ, "PYTHONPATH": str(ROOT)}
WRITES = """
import os, sys
from mnist_exp.system import streams
output = streams.replace_standard_streams()
sys.stdout.write({text})
{then}
"""


def start(text: str, then: str, stdout: int, **more: str) -> "subprocess.Popen[bytes]":
    words = [sys.executable, "-c", WRITES.format(text=text, then=then)]
    return subprocess.Popen(words, stdout=stdout, stderr=subprocess.PIPE, env={**OWN, **more})


def ended(process: "subprocess.Popen[bytes]") -> tuple[int, bytes]:
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def test_nobody_reads() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    then = "assert streams.flush() is False; assert streams.flush() is True"
    process = start("'a'", then, writing)
    os.close(writing)
    assert ended(process) == (0, b"")


@pytest.mark.parametrize("words, status", [(["--version"], 141), (["nonsense"], 2)])
def test_nobody_reads_what_a_verb_says(words: list[str], status: int) -> None:
    for both in (False, True):
        reading, writing = os.pipe()
        os.close(reading)
        process = subprocess.Popen(
            [sys.executable, "-m", "mnist_exp", *words],
            stdout=writing,
            stderr=writing if both else subprocess.PIPE,
            env=OWN,
        )
        os.close(writing)
        found, err = ended(process)
        assert found == status and b"Traceback" not in (err or b"")


def test_whoever_shares_it_does_not_wait() -> None:
    """More than a pipe holds, to one that is read later and never blocks."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    process = start("'a' * 1_000_000", "sys.stdout.flush(); assert not output.problem", writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        assert file.read() == b"a" * 1_000_000
    assert ended(process) == (0, b"")


def test_unbuffered_stays_so() -> None:
    reading, writing = os.pipe()
    process = start("'a line\\n'", "os.kill(os.getpid(), 9)", writing, PYTHONUNBUFFERED="1")
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        assert file.read() == b"a line\n"
    assert ended(process) == (-9, b"")


def test_what_somebody_else_has_put_there_stays() -> None:
    """As a notebook does."""
    then = """
import io
sys.stdout = own = io.StringIO()
streams.replace_standard_streams()
assert sys.stdout is own"""
    assert ended(start("''", then, subprocess.DEVNULL)) == (0, b"")
