"""Runs and sweeps on a disk that is full from some write on."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.disk import (
    WRITES,
    fill_during_run,
    fill_during_sweep,
    goes_on_as,
    lost_or_doubled,
)
from tests.faults.interruptions import JOBS, reference, reference_sweep


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    return reference(folder)


@pytest.fixture(scope="module")
def whole_sweep(folder: Path) -> Path:
    return reference_sweep(folder)


# the first ones create it
@pytest.mark.parametrize("at", [1, 2, 3, 5, 8, 12, 16, 20, *range(24, WRITES["run"], 96)])
def test_a_full_disk_ends_a_run_as_failed(at: int, whole: Path, tmp_path: Path) -> None:
    run, _ = fill_during_run(tmp_path, at)
    assert goes_on_as(run, [("", whole)]) == []


@pytest.mark.parametrize("at", [1, 13, 22, 40, 400, 900])
def test_a_full_disk_ends_a_sweep_as_failed(at: int, whole_sweep: Path, tmp_path: Path) -> None:
    sweep, _ = fill_during_sweep(tmp_path, at)
    jobs = [(str(n), whole_sweep / str(n)) for n in range(JOBS)]
    assert lost_or_doubled(goes_on_as(sweep, jobs, "--failed")) == []


@pytest.mark.parametrize("kind, fill", [("run", fill_during_run), ("sweep", fill_during_sweep)])
def test_a_disk_is_filled_within_the_writes(
    kind: str, fill: Callable[[Path, int], tuple[Path, int]], tmp_path: Path
) -> None:
    _, writes = fill(tmp_path, 2**40)
    assert 0.5 < WRITES[kind] / writes < 1
