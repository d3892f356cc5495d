"""The Jacobian of residuals on two ranks with unequal parts of a batch, and in one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.support.ranks import on_both, run_on_ranks
from torch_secondorder import ClosureObjective, mark_outputs
from torch_secondorder._objective.base import Evaluation, Regularization
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.curvature import JacobianMethod, ResidualJacobian, residual_jacobian

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed"),
]

METHODS = ["graph", "rows", "columns"]
#: The samples of each rank.
PARTS = (slice(0, 12), slice(12, 32))


def randn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def plain(z: Tensor, rank: int) -> Tensor:
    return z


def mixed(z: Tensor, rank: int) -> Tensor:
    """Samples of the second rank that depend on one another."""
    return z - z.mean(0) if rank else z


def loss_of(net: nn.Module, kind: Callable[[Tensor, int], Tensor], penalty: bool, rank: int) -> Any:
    z = mark_outputs(kind(net(randn(32, 3, seed=1)[PARTS[rank]]), rank))
    loss = z.square().mean()
    if penalty and rank:  # on one rank alone
        loss = loss + 0.1 * sum(p.square().sum() for p in net.parameters())
    return loss


def evaluated(
    kind: Callable[[Tensor, int], Tensor], penalty: bool, rank: int, ranks: int
) -> Evaluation:
    net: nn.Module = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    for i, p in enumerate(net.parameters()):
        p.data = 0.5 * randn(*p.shape, seed=i)
    params = list(net.parameters())
    if ranks > 1:
        net = DistributedDataParallel(net)

    def closure() -> Tensor:
        if ranks > 1:
            loss: Tensor = loss_of(net, kind, penalty, rank)
        else:
            loss = sum(loss_of(net, kind, penalty, r) for r in range(len(PARTS))) / len(PARTS)
        loss.backward()
        return loss

    objective = ClosureObjective.for_step(
        closure, ParameterVector(params, [1.0, 2.0, 0.5, 3.0]), Regularization(weight_decay=0.2)
    )
    return objective.evaluate(curvature="jacobian")


def results(
    kind: Callable[[Tensor, int], Tensor],
    method: JacobianMethod | None,
    penalty: bool,
    rank: int,
    ranks: int,
) -> dict[str, Any]:
    residual_jacobian._PART = 200  # several messages
    evaluation = evaluated(kind, penalty, rank, ranks)
    J = ResidualJacobian(evaluation, method=method)
    u, v, w = randn(J.rows, seed=5), randn(J.size, seed=6), randn(J.size, seed=7)
    found = {
        "kernel": J.kernel(),
        "weighted": J.kernel(w),
        "pull": J.pull(u),
        "push": J.push(v),
        "normal": J.normal_matrix(),
        "diagonal": J.diagonal(),
        "dense": J.dense(),
        "residuals": J.residuals,
        "rest": J.rest_gradient,
        "rest diagonal": J.rest_diagonal,
        "gradient": evaluation.grad,
        "change": J.change_to(evaluation),
    }
    return {"tensors": found, "method": METHODS.index(J.method)}


CASES = {
    "graph": (plain, None, False, "graph"),
    "rows": (plain, "rows", False, "rows"),
    "columns": (plain, "columns", False, "columns"),
    "mixed on one rank": (mixed, None, False, "rows"),
    "penalty on one rank": (plain, None, True, "graph"),
}


def case(name: str, rank: int, ranks: int) -> dict[str, Any]:
    kind, method, penalty, _ = CASES[name]
    return results(kind, method, penalty, rank, ranks)


def every_case(rank: int, ranks: int) -> dict[str, Any]:
    return {name: case(name, rank, ranks) for name in CASES}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks([every_case], tmp_path_factory.mktemp("jacobian"))


@pytest.mark.parametrize("name", CASES)
def test_ranks_are_as_one_process(name: str, ranks: list[dict[str, Any]]) -> None:
    found, alone = on_both(ranks, "every_case")[name], case(name, 0, 1)
    assert found["method"] == alone["method"] == METHODS.index(CASES[name][3])
    for key, tensor in alone["tensors"].items():
        torch.testing.assert_close(
            found["tensors"][key],
            tensor,
            rtol=1e-10,
            atol=1e-12,
            msg=partial("{}: {}".format, key),
        )
