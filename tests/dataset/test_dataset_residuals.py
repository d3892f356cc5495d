"""Normal equations summed over the batches of a data set, against those of one whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from torch_secondorder import DatasetClosure
from torch_secondorder._foundation.memory import TooLarge
from torch_secondorder._objective.base import Regularization
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder._optim.residuals import residuals_at
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.curvature import (
    GaussNewton,
    Hessian,
    InseparableLoss,
    ResidualJacobian,
    UnknownOutputs,
)
from torch_secondorder.dataset._objective import DatasetObjective, objective_of
from torch_secondorder.dataset._operator import BatchSum
from torch_secondorder.dataset._residuals import BatchResiduals
from torch_secondorder.optim.levenberg_marquardt import LevenbergMarquardt
from torch_secondorder.solvers.damped_least_squares import DampedLeastSquares

DOUBLE = torch.float64


class Case:
    """A model, eleven samples, and the objectives of a loss on all of them."""

    def __init__(self, loss: Callable[..., Tensor], device: torch.device, **options: Any) -> None:
        torch.manual_seed(2)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(device, DOUBLE)
        self.x = torch.randn(11, 3, dtype=DOUBLE, device=device)
        self.y = torch.randn(11, 2, dtype=DOUBLE, device=device)
        self.loss, self.options = loss, options

    def vector(self) -> ParameterVector:
        return ParameterVector(self.model.parameters(), [1.0, 0.5, 2.0, 0.25])

    def over_batches(self, regularization: Regularization | None = None) -> DatasetObjective:
        loader = DataLoader(TensorDataset(self.x, self.y), batch_size=4)
        closure = DatasetClosure(self.model, self.loss, loader, **self.options)
        objective = objective_of(closure, self.vector(), regularization)
        assert isinstance(objective, DatasetObjective)
        return objective

    def at_once(self, regularization: Regularization | None = None) -> ResidualJacobian:
        objective = ClosureObjective.for_step(
            lambda: self.loss(self.model(self.x), self.y), self.vector(), regularization
        )
        return ResidualJacobian(objective.evaluate(curvature="jacobian"))


def classify(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, (y > 0).long()[:, 0])


LOSSES: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "mean": (F.mse_loss, {}),
    "graphs kept": (F.mse_loss, {"keep_graphs": 2}),
    "sum": (lambda z, y: F.mse_loss(z, y, reduction="sum"), {"reduction": "sum"}),
    "robust": (lambda z, y: F.huber_loss(z, y, delta=0.3), {}),
    "classes": (classify, {}),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("decay", [0.0, (0.1, 0.2, 0.3, 0.4)], ids=str)
def test_batches_add_up_to_the_whole(name: str, decay: Any, device: torch.device) -> None:
    loss, options = LOSSES[name]
    case, regularization = Case(loss, device, **options), Regularization(weight_decay=decay)
    objective = case.over_batches(regularization)
    evaluation = objective.evaluate(curvature="jacobian")
    found, whole = residuals_at(objective, evaluation), case.at_once(regularization)
    assert isinstance(found, BatchResiduals)
    assert found.finite and found.method == "graph" and not found.reason
    assert (found.rows, found.size) == (whole.rows, whole.size)
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(found.normal_matrix(), whole.normal_matrix(), **close)
    assert torch.equal(found.normal_matrix(), found.normal_matrix().T)
    torch.testing.assert_close(found.diagonal(), whole.diagonal(), **close)
    expected = whole.pull(whole.residuals)
    if whole.rest_gradient is not None:
        expected = expected + whole.rest_gradient
    torch.testing.assert_close(evaluation.grad, expected, **close)
    diagonal = torch.as_tensor(found.rest_diagonal, dtype=DOUBLE, device=device)
    torch.testing.assert_close(
        diagonal, torch.as_tensor(whole.rest_diagonal, dtype=DOUBLE, device=device), **close
    )


def test_terms_beside_the_residuals_count_once() -> None:
    case = Case(F.mse_loss, torch.device("cpu"))
    weight = case.model[0].weight
    case.loss = lambda z, y: F.mse_loss(z, y) + 3 * weight.square().sum()
    found, whole = residuals_at(case.over_batches(), None), case.at_once()
    assert isinstance(found.rest_diagonal, Tensor)
    torch.testing.assert_close(found.rest_diagonal, whole.rest_diagonal)
    assert float(found.rest_diagonal.max()) == pytest.approx(6.0)


def test_one_batch_needs_no_data_set() -> None:
    case = Case(F.mse_loss, torch.device("cpu"))
    objective = ClosureObjective(
        lambda: F.mse_loss(case.model(case.x), case.y), case.vector().params
    )
    found = residuals_at(objective, objective.evaluate(curvature="jacobian"))
    assert isinstance(found, ResidualJacobian)


def test_batches_may_be_evaluated_without_second_derivatives() -> None:
    objective = Case(F.mse_loss, torch.device("cpu")).over_batches()
    v = torch.randn(objective.vector.size, dtype=DOUBLE)
    expected = BatchSum(objective, lambda e, _: GaussNewton(e)) @ v
    found = BatchSum(objective, lambda e, _: GaussNewton(e), curvature="jacobian") @ v
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match='curvature="jacobian"'):
        _ = BatchSum(objective, lambda e, _: Hessian(e), curvature="jacobian") @ v


def test_numbers_that_are_not_finite_are_reported() -> None:
    case = Case(F.mse_loss, torch.device("cpu"))
    case.y[7, 0] = torch.nan
    assert not residuals_at(case.over_batches(), None).finite


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(InseparableLoss):
        residuals_at(Case(lambda z, y: F.mse_loss(z, y).sqrt(), cpu).over_batches(), None)
    with pytest.raises(UnknownOutputs, match="shows no residuals"):
        residuals_at(Case(lambda z, y: (z - y).square().mean(), cpu).over_batches(), None)
    with pytest.raises(ValueError, match="maximize"):
        residuals_at(Case(F.mse_loss, cpu).over_batches(Regularization(maximize=True)), None)
    found = residuals_at(Case(F.mse_loss, cpu).over_batches(), None)
    with pytest.raises(
        TypeError, match=r'the residuals themselves: use solver="primal", or "auto"'
    ):
        _ = found.residuals
    monkeypatch.setattr("torch_secondorder._foundation.memory._SMALL", 100)
    monkeypatch.setattr("torch_secondorder._foundation.memory.free_memory", lambda _: 200)
    with pytest.raises(TooLarge, match=r"26 x 26 .*batch by batch, .*use NewtonCG or LBFGS"):
        residuals_at(Case(F.mse_loss, cpu).over_batches(), None)


# Levenberg-Marquardt on them.

SETTINGS: dict[str, dict[str, Any]] = {
    "damping": {},
    "momentum": {"momentum": 0.5},
    "line search": {"globalization": "armijo"},
    "scaling": {"scaling": "more", "weight_decay": 0.01},
    "bounds": {"bounds": (-1.0, 1.0)},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_steps_are_those_on_one_whole_batch(name: str) -> None:
    found = []
    for over_batches in (True, False):
        case = Case(F.mse_loss, torch.device("cpu"))
        closure: Any = lambda case=case: F.mse_loss(case.model(case.x), case.y)  # noqa: E731
        if over_batches:
            loader = DataLoader(TensorDataset(case.x, case.y), batch_size=4)
            closure = DatasetClosure(case.model, F.mse_loss, loader)
        arguments = {
            "acceleration": None,
            "solver": "primal",
            "scaling": "identity",
            "max_iter": 3,
            **SETTINGS[name],
        }
        optimizer = LevenbergMarquardt(case.model.parameters(), **arguments)
        before = case.loss(case.model(case.x), case.y)
        losses = [optimizer.step(closure) for _ in range(2)]
        assert losses[1] < before
        assert optimizer.info is not None and optimizer.info.rows == 22
        assert optimizer.info.jacobian == "graph"
        if over_batches:
            assert optimizer.info.solver == "primal"
        found.append([*losses, *(p.detach() for p in case.model.parameters())])
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-9)


def test_untouched_arguments_leave_acceleration_out() -> None:
    case = Case(F.mse_loss, torch.device("cpu"))
    loader = DataLoader(TensorDataset(case.x, case.y), batch_size=4)
    closure = DatasetClosure(case.model, F.mse_loss, loader)
    optimizer = LevenbergMarquardt(case.model.parameters(), max_iter=20)
    before = optimizer.step(closure)
    assert optimizer.step(closure) < 0.2 * before
    assert optimizer.info is not None and optimizer.info.bend is None


REFUSED: dict[str, dict[str, Any]] = {
    "solver='dual'": {"solver": "dual"},
    "solver='cg'": {"solver": "cg"},
    "acceleration='geodesic'": {"acceleration": "geodesic"},
    'globalization="trust_region"': {"globalization": "trust_region"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_rows_is_refused(name: str) -> None:
    case = Case(F.mse_loss, torch.device("cpu"))
    before = [p.detach().clone() for p in case.model.parameters()]
    loader = DataLoader(TensorDataset(case.x, case.y), batch_size=4)
    closure = DatasetClosure(case.model, F.mse_loss, loader)
    optimizer = LevenbergMarquardt(case.model.parameters(), **REFUSED[name])
    with pytest.raises(ValueError, match=f"batch by batch.*too little for {name}: leave it out"):
        optimizer.step(closure)
    for p, old in zip(case.model.parameters(), before, strict=True):
        assert torch.equal(p, old)


def test_a_batch_that_is_not_finite_ends_the_step() -> None:
    case = Case(F.mse_loss, torch.device("cpu"))
    case.y[7, 0] = torch.inf
    before = [p.detach().clone() for p in case.model.parameters()]
    loader = DataLoader(TensorDataset(case.x, case.y), batch_size=4)
    optimizer = LevenbergMarquardt(case.model.parameters())
    optimizer.step(DatasetClosure(case.model, F.mse_loss, loader))
    assert optimizer.info is not None and optimizer.info.status.name.startswith("NONFINITE")
    for p, old in zip(case.model.parameters(), before, strict=True):
        assert torch.equal(p, old)


def test_a_singular_matrix_is_solved_by_its_eigenvectors() -> None:
    case = Case(F.mse_loss, torch.device("cpu"))
    sums = residuals_at(case.over_batches(), None)
    assert isinstance(sums, BatchResiduals)
    a = torch.randn(26, 3, dtype=DOUBLE)
    sums._matrix, grad = a @ a.T, a @ torch.ones(3, dtype=DOUBLE)
    system = DampedLeastSquares.of(sums, grad)
    step = system.solve(1e-30)
    assert system.factorization == "eigen"
    torch.testing.assert_close(sums._matrix @ step.x, -grad)
    assert step.length < 10
