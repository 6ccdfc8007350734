"""A process is told from all others, and from those that had its number before."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from mnist_exp.system import processes
from mnist_exp.system.processes import is_running, process_identity
from tests.programs import OWNER, WAIT, Start, dead_owner, running_owner


def test_this_process_is_alive() -> None:
    assert is_running(process_identity()) is True
    assert json.loads(json.dumps(process_identity())) == process_identity()


def test_a_process_is_alive_until_it_ends(start: Start) -> None:
    process = start(OWNER + WAIT)
    its_owner = running_owner(process)
    assert is_running(its_owner) is True
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # which leaves a zombie
    os.kill(process.pid, 0)
    assert is_running(its_owner) is False
    process.wait()
    assert is_running(its_owner) is False


@pytest.mark.skipif(not Path("/proc/self/comm").exists(), reason="a name can be set on Linux")
def test_a_name_that_looks_like_more_of_the_line(start: Start) -> None:
    process = start("Path('/proc/self/comm').write_text('a) Z 1 (b) 2')\n" + OWNER + WAIT)
    its_owner = running_owner(process)
    assert is_running(its_owner) is True
    assert its_owner["born"].split()[0] == process_identity()["born"].split()[0]
    assert (
        0
        <= int(its_owner["born"].split()[1]) - int(process_identity()["born"].split()[1])
        < 100 * 3600
    )


def test_a_recycled_pid_is_dead(start: Start) -> None:
    assert is_running({**process_identity(), "born": dead_owner(start)["born"]}) is False


def test_another_host(start: Start) -> None:
    for one in (process_identity(), dead_owner(start)):
        assert is_running({**one, "host": "elsewhere"}) is None


def test_a_pid_that_cannot_be(start: Start) -> None:
    assert is_running({**process_identity(), "pid": 10**30}) is False


def test_a_hidden_process_may_be_alive(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = dead_owner(start)

    def kill(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    assert is_running(gone) is None


@pytest.mark.skipif(shutil.which("ps") is None, reason="needs ps")
def test_without_proc(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_start_time", processes._start_time_by_ps)
    here = process_identity()
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert re.fullmatch(r"\w{3} \w{3} [ \d]\d \d\d:\d\d:\d\d \d{4}", here["born"])
    assert is_running(here) is True
    process = start(OWNER + WAIT)
    child = {**running_owner(process), "born": processes._start_time_by_ps(process.pid)}
    assert is_running(child) is True
    assert is_running({**child, "born": "Mon Nov 23 07:50:41 1970"}) is False
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert is_running(child) is False
    process.wait()
    assert is_running(child) is False
