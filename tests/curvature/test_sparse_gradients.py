"""Embeddings with sparse gradients have the curvature of dense ones, one product or several."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_secondorder import AdaHessian, Contractive, DatasetClosure, NewtonCG, Sophia, diagnostics
from torch_secondorder._objective.base import Evaluation
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder.curvature import (
    Fisher,
    GaussNewton,
    GaussNewtonBartlett,
    Hessian,
    Hutchinson,
    LinearOperator,
)

INDICES = torch.tensor([[0, 1, 1, 2], [3, 3, 3, 5], [6, 0, 1, 1]])
Y = torch.tensor([[0.3, -0.2], [1.0, 0.5], [-0.4, 0.1]], dtype=torch.float64)


class Model(nn.Module):
    """Embeds words, and maps their mean to two numbers."""

    def __init__(self, sparse: bool, *, tied: bool = False, narrow: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(8, 3, sparse=sparse, padding_idx=3).double()
        self.head = nn.Linear(3, 2).double()
        self.tied = tied
        if narrow:
            self.table.float()

    def forward(self, indices: Tensor) -> Tensor:
        x = self.table(indices).tanh().mean(1).to(torch.float64)
        return self.head(x) + ((x @ self.table.weight.T).exp().mean() if self.tied else 0.0)

    def loss(self) -> Tensor:
        return F.mse_loss(self(INDICES), Y) + 0.01 * self.head.weight.square().sum()


KINDS: dict[str, Callable[[Evaluation], LinearOperator]] = {
    "hessian": Hessian,
    "gauss_newton": GaussNewton,
    "empirical_fisher": partial(Fisher, labels="empirical"),
}


@pytest.mark.parametrize("more", [{}, {"tied": True}, {"narrow": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_dense_gradients(kind: str, more: dict[str, Any]) -> None:
    found = []
    for sparse in (False, True):
        model = Model(sparse, **more)
        operator = KINDS[kind](
            ClosureObjective(model.loss, model.parameters()).evaluate(curvature=True)
        )
        eye = torch.eye(operator.size, dtype=operator.dtype)
        found += [operator.matmat(eye), torch.stack([operator.matvec(v) for v in eye], 1)]
    for matrix in found[1:]:
        torch.testing.assert_close(matrix, found[0])


@pytest.mark.parametrize("estimator", [Hutchinson(5), GaussNewtonBartlett(5)], ids=["h", "b"])
def test_diagonals_are_those_of_dense_gradients(estimator: Any) -> None:
    found = []
    for sparse in (False, True):
        model = Model(sparse)
        evaluation = ClosureObjective(model.loss, model.parameters()).evaluate(curvature=True)
        given = Hessian(evaluation) if isinstance(estimator, Hutchinson) else evaluation
        found.append(estimator(given, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(found[1], found[0])


RUNS: dict[str, Callable[[Any], Any]] = {
    "nystrom": partial(NewtonCG, preconditioner="nystrom"),
    "martens": partial(NewtonCG, preconditioner="martens"),
    "kfac": partial(NewtonCG, preconditioner="kfac"),
    "fisher": partial(NewtonCG, curvature="fisher", preconditioner="nystrom"),
    "hessian": partial(NewtonCG, curvature="hessian", preconditioner="nystrom"),
    "adahessian": partial(AdaHessian, n_samples=3),
    "adahessian_gnb": partial(AdaHessian, n_samples=3, estimator="gnb"),
    "sophia": partial(Sophia, estimator=Hutchinson(3)),
}


def trained(sparse: bool, name: str, way: str) -> list[Tensor]:
    model = Model(sparse)
    groups = [
        {"params": model.table.parameters(), "lr": 0.1},
        {"params": model.head.parameters(), "lr": 0.2},
    ]
    optimizer = RUNS[name](groups)
    if way == "contractive":
        optimizer = Contractive(optimizer, model.head, weight=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for rows in ([0], [1, 2]) if way == "micro-batches" else ([0, 1, 2],):
            loss = F.mse_loss(model(INDICES[rows]), Y[rows])
            if way == "micro-batches" and len(rows) > 1:  # one gradient sparse, another one dense
                loss = loss + 0.1 * model.table.weight.square().sum()
            loss.backward()
            total += loss.detach()
        return total

    given: Any = closure
    if way == "dataset":
        given = DatasetClosure(model, F.mse_loss, [(INDICES[:1], Y[:1]), (INDICES[1:], Y[1:])])
    for _ in range(3):
        optimizer.step(given)
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("way", ["closure", "micro-batches", "dataset", "contractive"])
@pytest.mark.parametrize("name", RUNS)
def test_optimizers_take_the_same_steps(name: str, way: str) -> None:
    for a, b in zip(trained(True, name, way), trained(False, name, way), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_diagnostics_see_the_same(curvature: Any) -> None:
    found = []
    for sparse in (False, True):
        model = Model(sparse)
        problem = diagnostics.from_closure(
            model.loss, list(model.parameters()), curvature=curvature
        )
        trace, pairs = diagnostics.trace(problem), diagnostics.eigenpairs(problem, 2)
        found.append(torch.stack([torch.tensor(trace.value), *pairs.values]))
    torch.testing.assert_close(found[1], found[0])
