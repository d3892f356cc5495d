"""Under DistributedDataParallel: real process groups of two ranks on one machine."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from tests.support.ranks import Check, on_both, run_on_ranks
from tests.support.shares import Share
from torch_secondorder import LBFGS, FunctionalObjective, NewtonCG, StepStatus
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder.curvature import Fisher, GaussNewton, Hessian

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed"),
]


def train(
    rank: int, ranks: int, dtype: torch.dtype, steps: int = 10, backward: bool = True
) -> list[Any]:
    share = Share(rank, ranks, dtype)
    optimizer = LBFGS(share.model.parameters(), max_iter=1, max_eval=20)
    closure = share.closure if backward else share.loss
    losses = [optimizer.step(closure).item() for _ in range(steps)]
    return [losses, share.values()]


def train_in_float64(rank: int, ranks: int) -> list[Any]:
    return train(rank, ranks, torch.float64)


def train_in_float32(rank: int, ranks: int) -> list[Any]:
    return train(rank, ranks, torch.float32, steps=5)  # rounding differs, and iterations amplify it


def train_without_backward(rank: int, ranks: int) -> list[Any]:
    return train(rank, ranks, torch.float64, backward=False)


def train_newton(rank: int, ranks: int) -> list[Any]:
    """What is the same on the whole batch, and does not blow rounding up by orders of magnitude."""
    losses, values = [], []
    for arguments in (
        {},
        {"curvature": "hessian"},
        {"preconditioner": "nystrom"},
        {"curvature": "hessian", "globalization": "damping", "damping": 0.1},
    ):
        share = Share(rank, ranks)
        # More iterations, at the low damping that the default begins with, amplify rounding.
        optimizer = NewtonCG(share.model.parameters(), max_cg_iter=5, **arguments)
        losses += [optimizer.step(share.closure).item() for _ in range(5)]
        values += share.values()
    return [losses, values]


def multiply(rank: int, ranks: int) -> list[Any]:
    """Loss, gradient and products; then an ordinary forward and backward."""
    share = Share(rank, ranks)
    objective = ClosureObjective(share.closure, share.model.parameters())
    found = []
    for _ in range(2):
        evaluation = objective.evaluate(curvature=True)
        eye = torch.eye(objective.vector.size, dtype=torch.float64)
        found += [evaluation.loss, evaluation.grad, Hessian(evaluation) @ eye]
        found += [GaussNewton(evaluation) @ eye, GaussNewton(evaluation) @ eye[0]]
        found += [Fisher(evaluation, labels="empirical") @ eye]
        found += [Hessian(evaluation) @ eye[0], objective.trial(eye[0]).loss]
        objective.settle()
        first = objective.evaluate(curvature="jacobian")
        found += [first.loss, first.grad, GaussNewton(first) @ eye]
        share.closure()
        found += share.gradients()
    return found


def call_a_function(rank: int, ranks: int) -> list[Any]:
    share = Share(rank, ranks)

    def function(params: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(share.model, params, share.x), share.y)

    objective = FunctionalObjective(function, dict(share.model.named_parameters()))
    plain, curved = objective.evaluate(), objective.evaluate(curvature=True)
    eye = torch.eye(objective.vector.size, dtype=torch.float64)
    first = objective.evaluate(curvature="jacobian")
    found = [plain.loss, plain.grad, curved.loss, curved.grad, Hessian(curved) @ eye]
    return [*found, first.loss, first.grad, GaussNewton(first) @ eye]


def meet_nan(rank: int, ranks: int) -> list[Any]:
    """The last rank's loss is not finite in the third step, and in trials of the fifth."""
    share = Share(rank, ranks)
    optimizer = LBFGS(share.model.parameters(), max_iter=2, max_eval=50)
    mine = rank == ranks - 1
    found: list[Any] = []
    for step in range(1, 7):
        evaluations = 0

        def closure(step: int = step) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            share.model.zero_grad()
            bad = mine and (step == 3 or (step == 5 and evaluations == 2))
            loss = share.loss() * (math.nan if bad else 1.0)
            loss.backward()
            return loss

        optimizer.step(closure)
        info = optimizer.info
        status = list(StepStatus).index(info.status)
        found += [status, info.evaluations, info.nonfinite_trials, share.values()]
    return found


def count_bytes(rank: int, ranks: int) -> float:
    """What an iteration of L-BFGS sends beside gradients, with twenty pairs."""
    sent, all_reduce = 0, dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal sent
        sent += tensor.numel() * tensor.element_size()
        return all_reduce(tensor, *args, **kwargs)

    share = Share(rank, ranks)
    optimizer = LBFGS(share.model.parameters(), max_iter=1, max_eval=20, history_size=20)
    dist.all_reduce = counted
    try:
        for _ in range(30):
            optimizer.step(share.closure)
    finally:
        dist.all_reduce = all_reduce
    return sent / 30


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        train_in_float64,
        train_in_float32,
        train_without_backward,
        train_newton,
        multiply,
        call_a_function,
        meet_nan,
        count_bytes,
    )
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks([*CHECKS.values()], tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("train_in_float64", 1e-12),
        ("train_without_backward", 1e-12),
        ("train_in_float32", 1e-6),
        ("train_newton", 1e-11),
    ],
)
def test_training_equals_that_on_the_whole_batch(
    ranks: list[dict[str, Any]], name: str, tolerance: float
) -> None:
    losses, values = on_both(ranks, name)
    expected_losses, expected = CHECKS[name](0, 1)
    assert losses[-1] < 0.7 * losses[0]
    assert losses == pytest.approx(expected_losses, rel=10 * tolerance)
    torch.testing.assert_close(values, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["multiply", "call_a_function"])
def test_losses_gradients_and_products_are_averages(ranks: list[dict[str, Any]], name: str) -> None:
    ours, expected = on_both(ranks, name), CHECKS[name](0, 1)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_all_ranks_reject_what_one_finds_not_finite(ranks: list[dict[str, Any]]) -> None:
    found = on_both(ranks, "meet_nan")
    numbers, evaluations, nonfinite, values = (found[i::4] for i in range(4))
    statuses = [list(StepStatus)[number] for number in numbers]
    assert statuses.pop(2) is StepStatus.NONFINITE_START
    assert set(statuses) == {StepStatus.MAX_ITERATIONS}
    assert evaluations[2] == 1
    assert nonfinite == [0, 0, 0, 0, 1, 0]
    torch.testing.assert_close(values[2], values[1], rtol=0, atol=0)


def test_lbfgs_sends_nothing_but_losses_beside_gradients(ranks: list[dict[str, Any]]) -> None:
    assert 8 <= on_both(ranks, "count_bytes") <= 100
