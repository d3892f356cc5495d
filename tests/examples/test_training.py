"""The training loop that the examples share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from _training import Contender, Task, endings, train
from torch_secondorder import LBFGS

X, Y = torch.linspace(-1, 1, 20)[:, None], torch.linspace(0, 3, 20)[:, None]


def squared_error(model: nn.Module) -> Tensor:
    return nn.functional.mse_loss(model(X), Y)


def losses(batch_size: int | None) -> Iterator[Callable[[nn.Module], Tensor]]:
    while True:
        yield squared_error


def measured(model: nn.Module) -> tuple[float, float]:
    loss = squared_error(model).item()
    return loss, loss


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (LBFGS, "gradient"),
        (lambda p: torch.optim.SGD(p, lr=0.0), "the last step changed nothing"),
    ],
)
def test_a_run_that_cannot_go_on_says_why(make: Callable[..., Optimizer], reason: str) -> None:
    torch.manual_seed(0)
    task = Task(nn.Linear(1, 1), losses, measured, lambda *_: "")
    contenders = {"it": Contender("It", make)}
    run = train(task, contenders, "it", seconds=20.0)
    assert run.seconds < 20.0 and run.steps == run.curve.steps[-1] >= 1
    assert reason in run.ending and run.ending in endings([run])
