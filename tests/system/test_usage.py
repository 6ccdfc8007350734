"""Memory and CPU time of this process, in the units that they are said to have."""

import time

from mnist_exp.system import usage


def test_peak_memory_is_in_mib_and_grows_by_what_is_used() -> None:
    before = usage.peak_memory_mb()
    assert 10 < before < 100_000
    wanted = int(before) + 64
    taken = b"\x01" * (wanted * usage.MEGABYTE)  # more than the process has had in all
    after = usage.peak_memory_mb()
    assert len(taken) / usage.MEGABYTE <= after < 3 * wanted


def test_cpu_time_counts_work_and_not_waiting() -> None:
    before = usage.cpu_seconds()
    time.sleep(0.2)
    waited = usage.cpu_seconds() - before
    end = time.thread_time() + 0.2
    while time.thread_time() < end:
        pass
    worked = usage.cpu_seconds() - before - waited
    assert waited < 0.15 and worked >= 0.2
