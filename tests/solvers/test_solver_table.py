"""All solvers on all kinds of operators with all preconditioners, against dense solutions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.dense_operators import symmetric, vector_of
from tests.support.oracles import make_case
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder.curvature import (
    Damped,
    Diagonal,
    FiniteDifference,
    GaussNewton,
    Hessian,
    LinearOperator,
)
from torch_secondorder.solvers import CG, MINRES, Martens, Nystrom, SolveStatus

SOLVERS: dict[str, Any] = {
    "cg": CG(2000),
    "minres": MINRES(2000, stop_at_negative_curvature=False),
    "minres that stops": MINRES(2000),
}


class Matrix(LinearOperator):
    """A dense operator."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.size = matrix, len(matrix)
        self.dtype, self.device = matrix.dtype, matrix.device

    def matvec(self, v: Tensor) -> Tensor:
        return self.matrix @ v


@dataclass
class System:
    """An operator, how it is damped, and how well a solution can be known.

    Attributes:
        operator: What preconditioners see.
        damping: What is added to it.
        tolerance: Residual to ask for; by precision.
        definite: Whether CG is for it.
        singular: Whether b has to be made to fit.
    """

    operator: LinearOperator
    damping: float = 0.0
    tolerance: tuple[float, float] = (1e-9, 1e-4)
    definite: bool = True
    singular: bool = False


def spread(low: float, high: float, size: int = 40) -> Tensor:
    return torch.logspace(low, high, size, dtype=torch.float64)


def of_model(
    name: str,
    make: Callable[[ClosureObjective], LinearOperator],
    device: torch.device,
    dtype: torch.dtype,
) -> LinearOperator:
    case = make_case(name, device, dtype)
    return make(ClosureObjective(case.closure(), case.params()))


def gauss_newton(objective: ClosureObjective) -> LinearOperator:
    return GaussNewton(objective.evaluate(curvature=True))


def hessian(objective: ClosureObjective) -> LinearOperator:
    return Hessian(objective.evaluate(curvature=True))


def singular() -> Tensor:
    eigenvalues = spread(-1, 1)
    eigenvalues[::4] = 0.0
    return symmetric(eigenvalues)


def indefinite() -> Tensor:
    eigenvalues = spread(-1, 1)
    eigenvalues[::3] *= -1
    return symmetric(eigenvalues)


OPERATORS: dict[str, Callable[[torch.device, torch.dtype], System]] = {
    "definite": lambda device, dtype: System(Matrix(symmetric(spread(-1, 1)).to(device, dtype))),
    "ill-conditioned": lambda device, dtype: System(
        Matrix(symmetric(spread(-6, 0)).to(device, dtype)), 1e-4, (1e-9, 3e-4)
    ),
    "ill-conditioned, undamped": lambda device, dtype: System(
        Matrix(symmetric(spread(-6, 0)).to(device, dtype)), 0.0, (1e-8, 0.0)
    ),
    "gauss-newton": lambda device, dtype: System(
        of_model("mlp", gauss_newton, device, dtype), 1e-3
    ),
    "gauss-newton of a cnn": lambda device, dtype: System(
        of_model("cnn", gauss_newton, device, dtype), 0.1
    ),
    "hessian": lambda device, dtype: System(of_model("rnn", hessian, device, dtype), 4.0),
    "finite differences": lambda device, dtype: System(
        # What is not symmetric to the last digit is not solved to the last digit.
        of_model("mlp", FiniteDifference, device, dtype),
        1.0,
        (1e-6, 1e-2),
    ),
    "singular": lambda device, dtype: System(Matrix(singular().to(device, dtype)), singular=True),
    "indefinite": lambda device, dtype: System(
        Matrix(indefinite().to(device, dtype)), definite=False
    ),
}
PRECONDITIONERS = ["none", "jacobi", "nystrom", "full nystrom", "martens"]


def dense(operator: LinearOperator) -> Tensor:
    eye = torch.eye(operator.size, dtype=operator.dtype, device=operator.device)
    matrix = torch.stack([operator.matvec(e) for e in eye], dim=1).double()
    return (matrix + matrix.T) / 2


def inverse(name: str, system: System, matrix: Tensor) -> LinearOperator | None:
    operator = system.operator
    generator = torch.Generator().manual_seed(1)
    if name == "none":
        return None
    if name == "jacobi":
        return Diagonal(matrix.diagonal().abs().clamp(min=1e-3).reciprocal().to(operator.dtype))
    preconditioner = Nystrom(10 if name == "nystrom" else operator.size)
    if name == "martens":
        preconditioner = Martens()
        generator = torch.Generator(operator.device).manual_seed(1)
    preconditioner.refresh(operator, generator)
    # Nothing is known of the size of values that were lifted to zero: here it is about one.
    return preconditioner.inverse(system.damping if system.definite else 1.0)


CELLS = [
    (operator, preconditioner)
    for operator in OPERATORS
    for preconditioner in PRECONDITIONERS
    if preconditioner != "martens" or operator.startswith("gauss-newton")
]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("operator", "preconditioner"), CELLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_against_a_dense_solution(
    operator: str, preconditioner: str, solver: str, dtype: torch.dtype, device: torch.device
) -> None:
    system = OPERATORS[operator](device, dtype)
    tolerance = system.tolerance[dtype == torch.float32]
    if not tolerance:
        pytest.skip("its condition is beyond float32")
    damped = Damped(system.operator, system.damping)
    matrix = dense(damped)
    b = vector_of(damped.size).to(device, dtype)
    if system.singular:
        b = damped.matvec(b)
    m = inverse(preconditioner, system, matrix)
    result = replace(SOLVERS[solver], tolerance=tolerance)(damped, b, preconditioner=m)
    x, exact = result.x.double(), b.double()
    residual = float((exact - matrix @ x).norm() / exact.norm())
    decrease = float(exact @ x - x @ (matrix @ x) / 2)
    size = float((exact @ x).abs()) + float(x @ (matrix @ x)) + float(exact @ exact) * 1e-3
    # MINRES knows it by recurrence only.
    slack = 3 if dtype == torch.float64 else 12
    assert result.residual_norm == pytest.approx(residual, rel=0.2, abs=slack * tolerance)
    assert result.decrease == pytest.approx(decrease, abs=10 * tolerance * abs(size))
    if not system.definite and solver != "minres":
        assert result.status is SolveStatus.NEGATIVE_CURVATURE
        assert result.negative_direction is not None
        p = result.negative_direction.double()
        assert float(p @ (matrix @ p)) <= 0 < float(p @ exact)
        return
    assert result.status is SolveStatus.CONVERGED
    assert residual <= (slack + 1) * tolerance
    values = torch.linalg.eigvalsh(matrix).abs()
    solution = torch.linalg.pinv(matrix, rtol=1e-5 if system.singular else 0.0) @ exact
    if system.singular and m is not None:  # then it may have something of the null space
        x = torch.linalg.pinv(matrix, rtol=1e-5) @ (matrix @ x)
    smallest = float(
        values[values > 1e-5 * values.max()].min() if system.singular else values.min()
    )
    bound = (slack + 1) * tolerance * float(exact.norm()) / smallest
    assert float((x - solution).norm()) <= bound + 1e-9 * float(solution.norm())


@pytest.mark.parametrize("operator", ["ill-conditioned", "gauss-newton", "singular"])
def test_a_sketch_of_all_columns_leaves_little_to_do(operator: str, device: torch.device) -> None:
    system = OPERATORS[operator](device, torch.float64)
    damped = Damped(system.operator, system.damping)
    matrix = dense(damped)
    b = matrix @ vector_of(damped.size).to(device)
    for solver in (CG(2000, 1e-6), MINRES(2000, 1e-6)):
        few = solver(damped, b, preconditioner=inverse("full nystrom", system, matrix))
        assert few.iterations <= solver(damped, b).iterations / 2
