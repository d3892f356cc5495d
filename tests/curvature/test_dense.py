"""Whole matrices, from products with all unit vectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.closures import closure_of
from tests.support.oracles import dense_hessian, make_case
from torch_secondorder import ClosureObjective, DatasetClosure
from torch_secondorder._autograd import vectorized
from torch_secondorder._objective.base import Regularization
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.curvature import Damped, Diagonal, Hessian, base
from torch_secondorder.curvature.base import symmetrized_
from torch_secondorder.dataset._objective import objective_of
from torch_secondorder.dataset._operator import curvature_at


def hessian_at(case: object, **options: object) -> Hessian:
    objective = ClosureObjective(case.closure(), case.params())  # type: ignore[attr-defined]
    return Hessian(objective.evaluate(curvature=True))


@pytest.mark.parametrize("many", [None, 1, 5, 1000])
@pytest.mark.parametrize("name", ["mlp", "cnn", "attention", "rnn", "pinn"])
def test_the_hessian(
    name: str, many: int | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if many is not None:
        monkeypatch.setattr(base, "many_at_once", lambda graph, device: many)
    case = make_case(name, device)
    found = hessian_at(case).dense()
    torch.testing.assert_close(found, dense_hessian(case.pure(), case.params()))
    assert torch.equal(found, found.T)


def test_regularization_and_scale() -> None:
    x, y = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in ([1.0, 2.0], [3.0]))
    vector = ParameterVector([x, y], scale=[1.0, 0.5])
    closure = closure_of(lambda: x.prod() * y.square().sum(), x, y)
    objective = ClosureObjective.for_step(closure, vector, Regularization(True, 0.25), None, None)
    found = Hessian(objective.evaluate(curvature=True)).dense()
    plain = torch.tensor([[0.0, 9.0, 12.0], [9.0, 0.0, 6.0], [12.0, 6.0, 4.0]])
    scale = torch.diag(torch.tensor([1.0, 1.0, 0.5]))
    expected = scale @ (0.25 * torch.eye(3) - plain) @ scale
    torch.testing.assert_close(found, expected.double())


def test_operations_without_a_batching_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "at_once", lambda multiply, directions: None)
    case = make_case("mlp", torch.device("cpu"))
    found = hessian_at(case).dense()
    torch.testing.assert_close(found, dense_hessian(case.pure(), case.params()))


def test_batches_of_a_data_set() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(7, 3).double(), torch.randint(2, (7,))
    closure = DatasetClosure(model, F.cross_entropy, [(x[:4], y[:4]), (x[4:], y[4:])])
    vector = ParameterVector(list(model.parameters()))
    with objective_of(closure, vector, Regularization(), None, None, None) as objective:
        evaluation = objective.evaluate(curvature=True)
        found = curvature_at(objective, evaluation, lambda e, _: Hessian(e)).dense()
    whole = ClosureObjective(lambda: F.cross_entropy(model(x), y), model.parameters())
    torch.testing.assert_close(found, Hessian(whole.evaluate(curvature=True)).dense())


def test_other_operators() -> None:
    entries = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(Damped(Diagonal(entries), 3.0).dense(), torch.diag(entries + 3.0))


@pytest.mark.parametrize("n", [1, 255, 256, 600])
def test_symmetrized(n: int) -> None:
    matrix = torch.randn(n, n, dtype=torch.float64)
    expected = (matrix + matrix.T) / 2
    assert symmetrized_(matrix) is matrix
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix, expected)


def passes(width: int, rows: int) -> int:
    """Vectors in one pass for a network of this width, with so many samples."""
    torch.manual_seed(0)
    model, x = nn.Linear(8, width), torch.randn(rows, 8)
    objective = ClosureObjective(lambda: model(x).tanh().square().sum(), model.parameters())
    linearization = objective.evaluate(curvature=True).linearization
    assert linearization is not None
    return vectorized.many_at_once(linearization.graph, torch.device("cpu"))


def test_the_size_of_the_graph_decides_how_many_are_multiplied_in_one_pass() -> None:
    assert passes(4, 4) == 64
    assert 1 < passes(16, 500) < 64
    assert passes(64, 10_000) == 1


def test_a_graph_that_does_not_tell_its_size() -> None:
    from torch_secondorder._autograd.graph import Graph

    empty: list[Tensor] = []
    assert vectorized.many_at_once(Graph(empty), torch.device("cpu")) == vectorized.AT_ONCE
