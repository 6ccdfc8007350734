"""Schedules against torch's, or what defines them."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim import lr_scheduler as torch_schedules

from mnist_exp.training.schedules import Constant, Cosine, OneCycle, Schedule, Step

EPOCHS, STEPS = 5, 10  # steps an epoch
TOTAL = EPOCHS * STEPS


def course(schedule: Schedule) -> list[float]:
    """The factors of all steps of a run."""
    return [schedule.multiplier(e + i / STEPS, EPOCHS) for e in range(EPOCHS) for i in range(STEPS)]


def torchs_course(schedule: type[torch_schedules.LRScheduler], **arguments: Any) -> list[float]:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = schedule(optimizer, **arguments)
    rates = []
    for _ in range(TOTAL):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine_equals_torch(final: float) -> None:
    expected = torchs_course(torch_schedules.CosineAnnealingLR, T_max=TOTAL, eta_min=final)
    assert course(Cosine(final=final)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


# Of an epoch of 10 steps, 0.7 and 1.9 are no exact binary fractions: the fall must not be late.
@pytest.mark.parametrize("every", [1.0, 2.0, 0.1, 0.3, 0.7, 1.9])
def test_step_equals_torch(every: float) -> None:
    size = round(every * STEPS)
    expected = torchs_course(torch_schedules.StepLR, step_size=size, gamma=0.5)
    assert course(Step(every_epochs=every, gamma=0.5)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("share", "warmup"), [(0.3, 0.0), (0.5, 0.0), (0.5, 1.0)])
def test_one_cycle_equals_torch(share: float, warmup: float) -> None:
    """torch counts a run's last step in: of `total_steps` N + 1 it reaches the lowest rate at step
    N (from 0), and the peak at step `pct_start` * (N + 1) - 1. Here those are the moments N, which
    is the end of a run of N steps, and share * N."""
    rise = (warmup / EPOCHS or share) * TOTAL
    expected = torchs_course(
        torch_schedules.OneCycleLR,
        max_lr=1.0,
        total_steps=TOTAL + 1,
        pct_start=(rise + 1) / (TOTAL + 1),
        div_factor=20.0,
        final_div_factor=100.0,
        cycle_momentum=False,
    )
    ours = OneCycle(rise_share=share, warmup_epochs=warmup, start_divisor=20.0, end_divisor=100.0)
    assert course(ours) == pytest.approx(expected, rel=1e-9)
    assert max(course(ours)) == course(ours)[round(rise)] == 1
    assert ours.multiplier(EPOCHS, EPOCHS) == pytest.approx(1 / 2000)


def test_constant() -> None:
    assert course(Constant()) == [1.0] * TOTAL


@pytest.mark.parametrize("warmup", [1.0, 2.5])
@pytest.mark.parametrize(
    "schedule", [Constant, Cosine, Step], ids=lambda schedule: schedule.__name__
)
def test_warm_up_is_linear_and_goes_over_into_the_course(
    schedule: type[Schedule], warmup: float
) -> None:
    warmed = schedule(warmup_epochs=warmup)
    rise = course(warmed)[: int(warmup * STEPS)]
    assert 0 < rise[0] < 0.05
    slopes = np.diff([*rise, warmed.multiplier(warmup, EPOCHS)])
    assert slopes == pytest.approx(slopes[0])
    assert warmed.multiplier(warmup, EPOCHS) == 1.0
    assert warmed.multiplier(warmup - 1e-9, EPOCHS) == pytest.approx(1.0)
    # the rest of the run has the schedule's whole course
    for share in (0.1, 0.5, 0.9, 1.0):
        rest = EPOCHS - warmup
        expected = schedule().multiplier(share * rest, rest)  # type: ignore[arg-type]
        assert warmed.multiplier(warmup + share * rest, EPOCHS) == pytest.approx(expected)


def test_warm_up_of_the_whole_run_ends_at_the_full_rate() -> None:
    assert Cosine(warmup_epochs=EPOCHS).multiplier(EPOCHS - 1e-9, EPOCHS) == pytest.approx(1.0)
    assert math.isfinite(Cosine(warmup_epochs=EPOCHS).multiplier(EPOCHS, EPOCHS))


@pytest.mark.parametrize(
    ("schedule", "name", "value"),
    [
        (Constant, "warmup_epochs", -1.0),
        (Constant, "warmup_epochs", math.nan),
        (Cosine, "warmup_epochs", math.inf),
        (Cosine, "final", -0.1),
        (Cosine, "final", "low"),
        (Step, "gamma", -0.1),
        (Step, "gamma", None),
        (Step, "every_epochs", 0.0),
        (Step, "every_epochs", -1.0),
        (OneCycle, "rise_share", 0.0),
        (OneCycle, "rise_share", 1.0),
        (OneCycle, "start_divisor", 0.5),
        (OneCycle, "end_divisor", 0.0),
        (OneCycle, "end_divisor", -1.0),
    ],
)
def test_bad_arguments_are_refused_by_name(schedule: type[Schedule], name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        schedule(**{name: value})
