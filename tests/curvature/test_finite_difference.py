"""Differences of gradients against Hessians."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.custom_functions import Cube
from tests.support.oracles import CASES, dense_hessian, make_case
from torch_secondorder._objective.base import Regularization
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder._objective.functional import FunctionalObjective
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.curvature import FiniteDifference, Hessian

RELATIVE = {torch.float64: 1e-5, torch.float32: 2e-2}


def normal(size: int, like: Tensor, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(like)


def assert_products(operator: FiniteDifference, exact: Tensor, relative: float) -> None:
    for seed in range(3):
        v = normal(operator.size, exact, seed).to(operator.dtype)
        expected = exact @ v.to(exact)
        error = torch.linalg.vector_norm((operator @ v).to(exact) - expected)
        assert float(error) <= relative * float(torch.linalg.vector_norm(expected))


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("kind", ["closure", "function"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "cnn"])
def test_against_the_hessian(
    name: str, kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    case, exact = make_case(name, device, dtype), make_case(name, device)
    pure, params = case.pure(), case.params()
    objective: Any = ClosureObjective(case.closure(), params)
    if kind == "function":
        objective = FunctionalObjective(lambda p: pure(*p), params)
    with objective:
        operator = FiniteDifference(objective)
        assert_products(operator, dense_hessian(exact.pure(), exact.params()), RELATIVE[dtype])
        assert objective.evaluations == 6


def test_the_kinks_of_max_pooling_may_lie_between(device: torch.device) -> None:
    """Then a difference knows both sides; without them it is the Hessian."""
    case = make_case("cnn", device)
    with ClosureObjective(case.closure(), case.params()) as objective:
        assert_products(
            FiniteDifference(objective), dense_hessian(case.pure(), case.params()), 1e-4
        )


def cubic(x: Tensor) -> Tensor:
    return (x**3).sum() / 6 + x[0] * x[1]


def cubic_hessian(x: Tensor) -> Tensor:
    exact = x.double().diag()
    exact[0, 1] += 1
    exact[1, 0] += 1
    return exact


SCALES = [1e-30, 1e-20, 1e-8, 1.0, 1e8, 1e20, 1e30]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", RELATIVE)
def test_the_size_of_v_does_not_matter(
    dtype: torch.dtype, scale: float, device: torch.device
) -> None:
    """With an exponent of two less than float32 has, its square leaves the range."""
    x = torch.tensor([3.0, 5.0, -1.0], dtype=dtype, device=device)
    operator = FiniteDifference(FunctionalObjective(cubic, x))
    v = torch.tensor([1.0, -2.0, 3.0], dtype=dtype, device=device)
    torch.testing.assert_close(
        (operator @ (v * scale)) / scale,
        (cubic_hessian(x) @ v.double()).to(dtype),
        rtol=RELATIVE[dtype] / 10,
        atol=0,
    )


@pytest.mark.parametrize("size", [0.0, 1e-6, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", RELATIVE)
def test_the_size_of_the_parameters(dtype: torch.dtype, size: float, device: torch.device) -> None:
    x = size * torch.tensor([3.0, 5.0, -1.0], dtype=dtype, device=device)
    operator = FiniteDifference(FunctionalObjective(cubic, x))
    v = torch.tensor([1.0, -2.0, 3.0], dtype=dtype, device=device)
    expected = cubic_hessian(x) @ v.double()
    error = torch.linalg.vector_norm((operator @ v).double() - expected)
    assert float(error) <= RELATIVE[dtype] * float(torch.linalg.vector_norm(expected))


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_what_there_is_no_difference_along(value: float, device: torch.device) -> None:
    """Nothing is evaluated, least of all at parameters that are no numbers."""
    x = torch.ones(2, device=device)
    objective = FunctionalObjective(cubic, x)
    product = FiniteDifference(objective) @ torch.tensor([value, 0.0], device=device)
    assert objective.evaluations == 0
    assert product.isfinite().all() == (value == 0) and (value != 0 or not product.any())


@pytest.mark.parametrize("decay", [0.1, (0.1, 3.0)])
@pytest.mark.parametrize("maximize", [False, True])
def test_regularization_and_scale(
    maximize: bool, decay: float | tuple[float, ...], device: torch.device
) -> None:
    case = make_case("mlp", device)
    params = [case.model[0].weight, case.model[2].weight]
    vector = ParameterVector(params, scale=[1.0, 0.5])

    def objective() -> ClosureObjective:
        return ClosureObjective.for_step(case.closure(), vector, Regularization(maximize, decay))

    exact = Hessian(objective().evaluate(curvature=True))
    eye = torch.eye(vector.size, dtype=torch.float64, device=device)
    with objective() as o:
        assert_products(FiniteDifference(o), exact @ eye, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_parameters_come_back(dtype: torch.dtype, device: torch.device) -> None:
    case = make_case("mlp", device, dtype)
    before = [p.detach().clone() for p in case.params()]
    objective = ClosureObjective(case.closure(), case.params())
    operator = FiniteDifference(objective)
    v = normal(operator.size, objective.position)
    with objective:
        product = operator @ v
        objective.settle()
        assert all(torch.equal(p, q) for p, q in zip(case.params(), before, strict=True))
        assert torch.equal(operator @ v, product) and product.dtype == operator.dtype
    assert all(torch.equal(p, q) for p, q in zip(case.params(), before, strict=True))
    fails = ClosureObjective(lambda: 1 / 0, case.params())
    with pytest.raises(ZeroDivisionError), fails:
        FiniteDifference(fails) @ v
    assert all(torch.equal(p, q) for p, q in zip(case.params(), before, strict=True))


def test_it_is_of_where_the_objective_stands(device: torch.device) -> None:
    x = torch.tensor([3.0, 5.0, -1.0], dtype=torch.float64, device=device)
    with FunctionalObjective(cubic, x) as objective:
        operator = FiniteDifference(objective)
        for _ in range(2):
            assert_products(operator, cubic_hessian(objective.position), 1e-6)
            objective.accept(torch.ones(3, dtype=torch.float64, device=device))


def test_nothing_needs_a_second_derivative(device: torch.device) -> None:
    x = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64, device=device))

    def closure() -> Tensor:
        x.grad = None
        loss = Cube.apply(x).square().sum()
        loss.backward()
        return loss

    with ClosureObjective(closure, [x]) as objective:
        assert_products(FiniteDifference(objective), (30 * x.detach() ** 4).diag(), 1e-5)
    with pytest.raises(RuntimeError):
        objective = ClosureObjective(closure, [x])
        Hessian(objective.evaluate(curvature=True)) @ torch.ones_like(x)


@pytest.fixture
def _forgets_what_was_compiled() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("_forgets_what_was_compiled")
@pytest.mark.filterwarnings("ignore")  # of the compiler's own making
def test_a_compiled_module(device: torch.device) -> None:
    case, plain = make_case("mlp", device), make_case("mlp", device)
    case.model = torch.compile(case.model, backend="aot_eager")
    with ClosureObjective(case.closure(), case.params()) as objective:
        assert_products(
            FiniteDifference(objective), dense_hessian(plain.pure(), plain.params()), 1e-5
        )
