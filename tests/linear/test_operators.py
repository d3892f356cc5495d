"""Forms of a matrix that the iterative methods take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support import device_backend
from tests.support.rectangular import Counting, gaussian, graded
from torch_secondorder import FunctionalObjective, mark_outputs
from torch_secondorder.curvature import Diagonal, ResidualJacobian
from torch_secondorder.linear import (
    RectangularOperator,
    as_operator,
    jacobian_operator,
    lsmr,
    lsqr,
    lstsq,
    ridge,
)


def check(operator: RectangularOperator, matrix: Tensor) -> None:
    m, n = matrix.shape
    v, u = gaussian(n, seed=8).to(matrix), gaussian(m, seed=9).to(matrix)
    torch.testing.assert_close(operator.matvec(v), matrix @ v)
    torch.testing.assert_close(operator.rmatvec(u), matrix.T @ u)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("form", ["dense", "pair", "object", "sparse_coo", "sparse_csr"])
def test_forms_of_a_matrix(form: str, device: torch.device) -> None:
    if form == "sparse_csr" and device.type == device_backend.NAME:
        pytest.skip("the test device has no CSR tensors")
    A, b = graded(7, 4, 5.0).to(device), gaussian(7).to(device)
    forms: dict[str, Callable[[], Any]] = {
        "dense": lambda: A,
        "pair": lambda: (lambda v: A @ v, lambda u: A.T @ u),
        "object": lambda: Counting(A),
        "sparse_coo": A.to_sparse,
        "sparse_csr": A.to_sparse_csr,
    }
    given = forms[form]()
    check(as_operator(given), A)
    torch.testing.assert_close(lsqr(given, b, 0.0, 1e-12, 1e-12).x, lstsq(A, b).x)


def test_a_symmetric_operator_is_its_own_transpose(device: torch.device) -> None:
    entries = torch.tensor([1.0, -2.0, 3.0], device=device)
    check(as_operator(Diagonal(entries)), torch.diag(entries))


def test_residuals_of_a_loss(device: torch.device) -> None:
    """A damped Gauss-Newton step on the residuals of a model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double().to(device)
    x, y = gaussian(9, 3).to(device), gaussian(9, 1, seed=1).to(device)

    def loss(params: dict[str, Tensor]) -> Tensor:
        outputs = torch.func.functional_call(model, params, (x,))
        return nn.functional.mse_loss(mark_outputs(outputs), y)

    objective = FunctionalObjective(loss, dict(model.named_parameters()))
    evaluation = objective.evaluate(curvature=True)
    J = ResidualJacobian(evaluation)
    matrix = J.dense()
    check(as_operator(J), matrix)
    step = lsmr(J, -J.residuals, 0.1, 1e-12, 1e-12).x
    torch.testing.assert_close(step, ridge(matrix, -J.residuals, 0.01).x, rtol=1e-7, atol=1e-9)
    assert float(step @ evaluation.grad) < 0


def test_the_jacobian_of_a_function(device: torch.device) -> None:
    point = gaussian(5).to(device)
    W = gaussian(3, 5, seed=1).to(device)
    calls = [0]

    def function(x: Tensor) -> Tensor:
        calls[0] += 1
        return torch.tanh(W @ x) * x[:3].square()

    matrix = torch.func.jacrev(function)(point)
    calls[0] = 0
    operator = jacobian_operator(function, point.requires_grad_())
    for _ in range(3):
        check(operator, matrix)
    assert calls[0] == 1
    with torch.no_grad():
        check(operator, matrix)
    assert not operator.matvec(point).requires_grad
    result = lsqr(operator, gaussian(3).to(device))
    torch.testing.assert_close(result.x, lstsq(matrix, gaussian(3).to(device)).x.detach())


def test_a_jacobian_between_tensors_of_any_shape(device: torch.device) -> None:
    """An image whose blurred version is known; no rule for forward mode is needed."""
    kernel = torch.tensor([[[0.25, 0.5, 0.25]]], dtype=torch.float64, device=device)
    image = gaussian(2, 1, 8).to(device)

    def blur(image: Tensor) -> Tensor:
        return nn.functional.conv1d(image, kernel, padding=1)

    operator = jacobian_operator(blur, torch.zeros_like(image))
    result = lsmr(operator, blur(image), 0.0, 1e-13, 1e-13, 0.0, 200)
    assert result.x.shape == image.shape
    torch.testing.assert_close(result.x, image, rtol=1e-7, atol=1e-8)


class WithoutTranspose:
    def matvec(self, v: Tensor) -> Tensor:
        return v


@pytest.mark.parametrize(
    ("A", "error", "message"),
    [
        (WithoutTranspose(), TypeError, "got a WithoutTranspose without rmatvec"),
        ((torch.sin,), TypeError, "an object with these methods, a LinearOperator or .* got tuple"),
        ((torch.sin, 3), TypeError, "got tuple"),
        (torch.ones(2, 2, 2), ValueError, r"shape \(m, n\), got shape \(2, 2, 2\)"),
        (None, TypeError, "got NoneType"),
    ],
)  # fmt: skip
def test_what_is_no_matrix(A: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        as_operator(A)


def test_errors_of_a_jacobian() -> None:
    x = torch.ones(2)
    with pytest.raises(TypeError, match="function must be callable, got Tensor"):
        jacobian_operator(x, x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the value of the function must be a tensor, got tuple"):
        jacobian_operator(lambda x: (x, x), x)  # type: ignore[arg-type,return-value]
