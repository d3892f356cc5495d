"""The diagonal optimizers, and what tests train with them and count."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.diagonal_references import Task, values
from torch_secondorder import AdaHessian, Sophia, StepStatus

KINDS: dict[str, Callable[..., Any]] = {
    "AdaHessian": lambda params, **rest: AdaHessian(params, **{"lr": 0.02, **rest}),
    "Sophia": lambda params, **rest: Sophia(
        params, **{"lr": 0.01, "gamma": 20.0, "update_period": 1, **rest}
    ),
    "Sophia-G": lambda params, **rest: Sophia(
        params,
        **{"lr": 0.01, "gamma": 20.0, "update_period": 1, "estimator": "gnb", **rest},
    ),
}

every = pytest.mark.parametrize("kind", KINDS)
#: Those that differentiate twice.
twice = pytest.mark.parametrize("kind", ["AdaHessian", "Sophia"])
periods = pytest.mark.parametrize("period", [1, 3])

#: Micro-batches.
PARTS = (slice(0, 3), slice(3, 5), slice(5, 8))

#: Backward passes that keep their graph are what is tested.
NO_WARNING_OF_CYCLES = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")


def eval_loss(task: Task, part: slice = slice(None)) -> Tensor:
    """Without statistics of the batch: parts add up to the whole."""
    task.model.eval()
    return F.cross_entropy(task.model(task.tokens[part]), task.y[part], reduction="sum") / 8


Step = Callable[[Any, Task, Callable[[], None]], None]


def five_steps(kind: str, period: int, clip: bool, step: Step | None = None) -> list[Tensor]:
    """The parameters after five steps on a schedule, with gradients clipped if wished.

    Args:
        kind: One of `KINDS`.
        period: Steps from one curvature to the next.
        clip: Clips gradients.
        step: Makes a step of an optimizer on a task, where a function is called to clip; made by
            the standard closure if None.
    """
    task = Task()
    optimizer = KINDS[kind](task.model.parameters(), update_period=period)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)

    def clip_gradients() -> None:
        if clip:
            nn.utils.clip_grad_norm_(task.model.parameters(), 0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = task.loss()
        loss.backward()
        clip_gradients()
        return loss

    for _ in range(5):
        if step is None:
            optimizer.step(closure)
        else:
            step(optimizer, task, clip_gradients)
        schedule.step()
        assert optimizer.info.status is StepStatus.MOVED
    return values(task.model)


def steps_on_parts(kind: str, period: int) -> list[Tensor]:
    """The parameters after four steps by closures that go over `PARTS`."""
    task = Task()
    optimizer = KINDS[kind](task.model.parameters(), update_period=period)

    def closure() -> Tensor:
        optimizer.zero_grad()
        for part in PARTS:
            eval_loss(task, part).backward()
        return torch.zeros(())

    for _ in range(4):
        optimizer.step(closure)
    return values(task.model)


def tiny() -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Softplus(), nn.Flatten(), nn.Linear(8, 2)
    )
    x, y = torch.randn(4, 1, 4, 4), torch.randint(2, (4,))
    return model, lambda: F.cross_entropy(model(x), y)


def live_tensors() -> int:
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def live_graphs() -> int:
    gc.collect()
    return sum(issubclass(type(o), Tensor) and o.grad_fn is not None for o in gc.get_objects())
