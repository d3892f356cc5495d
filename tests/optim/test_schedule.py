"""The schedule of estimates: when a step estimates the curvature."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_secondorder._optim.diagonal.schedule import EstimateSchedule

A, B = torch.zeros(1), torch.zeros(1)


def count(
    schedule: EstimateSchedule,
    params: list[Tensor],
    period: int,
    *,
    got: bool = False,
    lacks: bool = False,
    moved: bool | None = None,
) -> bool:
    """Counts a step; `moved` is for one on a device, which knows only later whether it moved."""
    check: Any = SimpleNamespace(on_device=moved is not None, moved=moved)
    layout: Any = SimpleNamespace(got_curvature=got, lacks_curvature=lacks)
    return schedule.count(params, {"update_period": period}, check, layout)


def due(schedule: EstimateSchedule, params: list[Tensor], period: int) -> bool:
    return schedule.is_due(params, {"update_period": period})


def run(schedule: EstimateSchedule, params: list[Tensor], period: int, steps: int) -> list[int]:
    """The steps that estimate."""
    found = []
    for step in range(steps):
        found += [step] if due(schedule, params, period) else []
        count(schedule, params, period)
    return found


@pytest.mark.parametrize(
    ("warm_up", "period", "expected"),
    [
        (1, 1, [*range(12)]),
        (1, 5, [0, 5, 10]),
        (3, 5, [0, 1, 2, 5, 10]),
        (10, 4, [*range(4), 4, 8]),
    ],
)
def test_every_so_many_steps_and_the_first_ones(
    warm_up: int, period: int, expected: list[int]
) -> None:
    assert run(EstimateSchedule(warm_up), [A], period, 12) == expected


def test_an_optimizer_without_estimates_is_never_due() -> None:
    schedule = EstimateSchedule(10, active=False)
    assert run(schedule, [A], 1, 5) == []
    assert schedule.repeat() is False


def test_nothing_to_train_is_never_due() -> None:
    assert not due(EstimateSchedule(), [], 1)


@pytest.mark.parametrize(("warm_up", "expected"), [(1, [0]), (3, [0, 1, 2])])
def test_a_new_parameter_has_a_warm_up(warm_up: int, expected: list[int]) -> None:
    schedule = EstimateSchedule(warm_up)
    run(schedule, [A], 10, 11)  # the next estimate in turn is at step 20
    assert run(schedule, [A, B], 10, 8) == expected


def test_a_parameter_that_is_gone_changes_nothing() -> None:
    schedule = EstimateSchedule()
    run(schedule, [A, B], 10, 3)
    assert not due(schedule, [B], 10) and not schedule.has_new([B])


def test_a_parameter_without_curvature_is_waited_for() -> None:
    schedule = EstimateSchedule(3)
    run(schedule, [A, B], 10, 11)
    assert count(schedule, [A, B], 10, lacks=True)
    assert schedule.out_of_turn == 10
    count(schedule, [A, B], 10, got=True)
    assert schedule.out_of_turn == 2  # the rest of its warm-up


def test_a_step_that_moved_nothing_is_repeated() -> None:
    schedule = EstimateSchedule()
    run(schedule, [A], 10, 3)
    assert schedule.repeat() and due(schedule, [A], 10)
    count(schedule, [A], 10)
    assert not due(schedule, [A], 10)


def test_a_step_on_a_device_is_taken_back_if_it_moved_nothing() -> None:
    schedule = EstimateSchedule()
    assert count(schedule, [A], 10, moved=False)
    assert (schedule.steps, schedule.out_of_turn) == (0, 1)
    assert not count(schedule, [A], 10, moved=True)
    assert schedule.steps == 1
    count(schedule, [A], 10, moved=False)  # once one has moved, nothing waits for the device
    assert schedule.steps == 2
