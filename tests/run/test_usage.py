"""The metrics of `tracking.system`: a point an epoch, and nothing else changes."""

import math
from pathlib import Path

import pytest
import torch

import mnist_exp
from mnist_exp.run.usage import UsageMeter
from mnist_exp.system import usage
from mnist_exp.tracking.journal import RunHistory


def test_cpu_time_is_that_between_two_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.5, 13.0])
    monkeypatch.setattr(usage, "cpu_seconds", lambda: next(clock))
    meter = UsageMeter(torch.device("cpu"), is_on=True)
    assert [meter.read()["system/cpu_seconds"] for _ in range(2)] == [2.5, 0.5]
    assert set(meter._of_the_gpu()) == set()


def test_a_meter_that_is_off_reads_nothing() -> None:
    assert UsageMeter(torch.device("cpu"), is_on=False).read() == {}


@pytest.mark.parametrize(
    "problem", [None, ModuleNotFoundError("no pynvml"), Exception("NVML: not supported")]
)
def test_a_gpu(problem: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def utilization(device: torch.device) -> int:
        if problem is not None:
            raise problem
        return 37

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**20)
    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    values = UsageMeter(torch.device("cuda"), is_on=True).read()
    assert values["system/gpu_memory_mb"] == 3
    assert values.get("system/gpu_utilisation") == (None if problem else 37)


def test_numbers_are_those_of_a_run_without_it(place: list[str], tmp_path: Path) -> None:
    small = [*place, "training.compile=never"]
    plain = mnist_exp.train(small)
    metered = mnist_exp.train([*small, "tracking.system=true", f"hydra.run.dir={tmp_path}/other"])
    timed = {"epoch_seconds", "images_per_second"}
    for before, after in zip(plain.history, metered.history, strict=True):
        assert before.keys() == after.keys()
        assert all(before[key] == after[key] for key in before.keys() - timed)
    first, second = RunHistory.of(tmp_path / "run"), RunHistory.of(tmp_path / "other")
    assert second.tags["config_hash"] == first.tags["config_hash"]
    assert second.metrics.keys() - first.metrics.keys() == {
        "system/peak_memory_mb",
        "system/cpu_seconds",
    }
    for key in ("system/peak_memory_mb", "system/cpu_seconds"):
        points = second.history(key)
        assert [step for step, _ in points] == [1, 2]
        assert all(math.isfinite(value) and value > 0 for _, value in points)
