"""Second derivatives of custom functions are right, or refused by the function's name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from tests.support.closures import standard
from tests.support.custom_functions import Scalar, cube, custom_function, slope_of_cube
from torch_secondorder import (
    LBFGS,
    AdaHessian,
    DatasetClosure,
    FunctionalObjective,
    NewtonCG,
    Sophia,
    diagnostics,
    mark_outputs,
)
from torch_secondorder._autograd.custom_functions import Finding, applied, trusted
from torch_secondorder._autograd.graph import MissingSecondDerivative
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder.curvature import GaussNewton, Hessian

DOUBLE = torch.float64


CURVED: dict[str, tuple[Scalar, Scalar]] = {
    "cube": (cube, slope_of_cube),
    "tanh": (torch.tanh, lambda x: 1 - torch.tanh(x) ** 2),
    "sigmoid": (torch.sigmoid, lambda x: torch.sigmoid(x) * torch.sigmoid(-x)),
    "sine": (torch.sin, torch.cos),
    "squared_relu": (lambda x: x.relu() ** 2, lambda x: 2 * x.relu()),
    "log": (lambda x: torch.log1p(x * x), lambda x: 2 * x / (1 + x * x)),
}
PIECEWISE_LINEAR: dict[str, tuple[Scalar, Scalar]] = {
    "relu": (torch.relu, lambda x: (x > 0).to(x.dtype)),
    "hardtanh": (F.hardtanh, lambda x: (x.abs() < 1).to(x.dtype)),
    "softshrink": (F.softshrink, lambda x: (x.abs() > 0.5).to(x.dtype)),
    "straight_through": (torch.round, torch.ones_like),
    "reversal": (torch.clone, lambda x: torch.full_like(x, -0.3)),
}


def found(function: Any, *args: Any) -> Finding:
    _, finding = applied(function, function.apply, args)
    assert finding is not None
    return finding


def drawn(size: int, scale: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(size, dtype=DOUBLE, generator=generator)
    return x.to(dtype).requires_grad_()


SCALES = [1e-6, 1e-3, 1.0, 30.0, 1e6]


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", [*CURVED, *PIECEWISE_LINEAR])
def test_right_functions_are_never_refused(name: str, scale: float, dtype: torch.dtype) -> None:
    function = custom_function(*(CURVED | PIECEWISE_LINEAR)[name])
    for size in (1, 7, 500):
        x = drawn(size, scale, dtype, seed=size)
        for argument in (x, x * 1):
            before = argument.detach().clone()
            finding = found(custom_function(*(CURVED | PIECEWISE_LINEAR)[name]), argument)
            assert finding.transposes and finding.curves, finding
            assert torch.equal(argument.detach(), before)
    assert function is not None


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", CURVED)
@pytest.mark.parametrize("kind", ["no_graph", "detached", "saved", "once"])
def test_wrong_functions_are_found(kind: str, name: str, scale: float, dtype: torch.dtype) -> None:
    for size in (1, 7, 500):
        x = drawn(size, scale, dtype, seed=size)
        for argument in (x, x * 1):
            finding = found(custom_function(*CURVED[name], kind), argument)
            # What saved its derivative is fine for products with the Jacobian.
            assert (finding.transposes, finding.curves) == (kind == "saved", False)


def test_zeros_do_not_hide_what_is_wrong() -> None:
    for kind in ("no_graph", "saved"):
        assert not found(
            custom_function(cube, slope_of_cube, kind), torch.zeros(3, requires_grad=True)
        ).curves
    assert found(custom_function(cube, slope_of_cube), torch.zeros(3, requires_grad=True)).curves


class Solve(Function):
    """A function of several inputs that couples all entries; right, or with its solution saved."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, right: bool) -> Tensor:
        x = torch.linalg.solve(a, b)
        ctx.save_for_backward(a, b)
        ctx.x, ctx.right = x, right
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        a, b = ctx.saved_tensors
        x = torch.linalg.solve(a, b) if ctx.right else ctx.x.detach()
        by_b = torch.linalg.solve(a.T, g)
        return -torch.outer(by_b, x), by_b, None


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_functions_of_several_inputs(scale: float, dtype: torch.dtype) -> None:
    a = (scale * (3 * torch.eye(5) + torch.eye(5).roll(1, 0))).to(dtype).requires_grad_()
    b = drawn(5, 1.0, dtype)
    assert found(Solve, a, b, True).curves
    wrong = found(Solve, a, b, False)
    assert wrong.transposes and not wrong.curves


class Noisy(Function):
    """Draws random numbers in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        mask = torch.bernoulli(torch.full_like(x, 0.5))
        ctx.save_for_backward(x, mask)
        return mask * x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        x, mask = ctx.saved_tensors
        result: Tensor = 3 * mask * x**2 * g
        return result


def test_random_numbers_are_those_of_an_application_without_examination() -> None:
    x = drawn(50, 1.0, DOUBLE)
    torch.manual_seed(0)
    expected, after = Noisy.apply(x), torch.rand(())
    torch.manual_seed(0)
    value, finding = applied(Noisy, Noisy.apply, (x,))
    assert finding is not None and finding.curves
    assert torch.equal(value, expected) and torch.equal(torch.rand(()), after)


class Adjoint(Function):
    """As `odeint_adjoint` does: its parameters are arguments, and read from elsewhere."""

    held: Tensor

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor) -> Tensor:
        with torch.no_grad():
            y: Tensor = Adjoint.held * x
        ctx.save_for_backward(x, p)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, p = ctx.saved_tensors
        with torch.no_grad():
            with torch.enable_grad():
                again = x.detach().requires_grad_()
                y = Adjoint.held * again
            return torch.autograd.grad(y, (again, p), g)


def test_parameters_that_are_read_from_elsewhere() -> None:
    Adjoint.held = nn.Parameter(torch.tensor(1.5))
    finding = found(Adjoint, torch.ones(3), Adjoint.held)
    assert not finding.transposes and "leaves no graph" in finding.reason
    assert Adjoint.held.item() == 1.5


def test_a_function_that_cannot_be_differentiated_twice_says_why() -> None:
    class Stubborn(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return Inner.apply(g)

    class Inner(Function):
        @staticmethod
        def forward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * g

        @staticmethod
        def backward(ctx: Any, v: Tensor) -> Tensor:
            raise RuntimeError("no double backward here")

    finding = found(Stubborn, torch.ones(2, requires_grad=True))
    assert not finding.transposes and "no double backward here" in finding.reason


def test_functions_of_pytorch_that_do_more_than_compute_are_not_run_again() -> None:
    from torch.nn.parallel.distributed import _DDPSink

    assert trusted(_DDPSink)
    assert not trusted(Solve)


# In every way that curvature is asked for.

WRONG = ["no_graph", "detached", "saved", "once"]
HUTCHINSON: dict[str, Callable[..., Any]] = {"AdaHessian": AdaHessian, "Sophia": Sophia}


def loss_of(function: Any, x: Tensor) -> Tensor:
    return F.mse_loss(function.apply(x), torch.ones_like(x))


@pytest.mark.parametrize("kind", WRONG)
def test_a_hessian_is_refused(kind: str) -> None:
    function = custom_function(cube, slope_of_cube, kind)
    x = nn.Parameter(torch.full((2,), 2.0, dtype=DOUBLE))
    match = rf"Custom_{kind}.*curvature_products=\"finite_difference\""
    optimizer = NewtonCG([x], curvature="hessian")
    with pytest.raises(MissingSecondDerivative, match=match):
        optimizer.step(standard(optimizer, lambda: loss_of(function, x)))
    assert x.tolist() == [2, 2]
    objective = FunctionalObjective(partial(loss_of, function), x)
    with pytest.raises(MissingSecondDerivative, match=f"Custom_{kind}"):
        objective.evaluate(curvature=True).linearization.hessian_product(torch.ones(2).double())
    with pytest.raises(MissingSecondDerivative, match=f"Custom_{kind}"):
        diagnostics.trace(diagnostics.from_closure(lambda: loss_of(function, x), [x]))
    optimizer = NewtonCG([x], curvature="hessian", curvature_products="finite_difference")
    optimizer.step(standard(optimizer, lambda: loss_of(function, x)))
    assert (x < 2).all()


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", HUTCHINSON)
def test_an_estimate_is_refused(name: str, kind: str) -> None:
    function = custom_function(cube, slope_of_cube, kind)
    x = nn.Parameter(torch.full((2,), 2.0))
    match = rf"Custom_{kind}.*estimator=\"gnb\""
    optimizer = HUTCHINSON[name]([x])
    closure = standard(optimizer, lambda: loss_of(function, x))
    with pytest.raises(MissingSecondDerivative, match=match):
        optimizer.step(closure)
    with pytest.raises(MissingSecondDerivative, match=match), optimizer.watching():
        closure()
    with pytest.raises(MissingSecondDerivative, match=match):
        optimizer.step(FunctionalObjective(partial(loss_of, function), x))
    assert x.tolist() == [2, 2]
    optimizer = HUTCHINSON[name]([x], estimator="gnb")
    optimizer.step(standard(optimizer, lambda: loss_of(function, x)))
    assert (x < 2).all()


@pytest.mark.parametrize("kind", ["right", "saved"])
def test_gauss_newton_needs_no_curvature_of_what_lies_below_the_outputs(kind: str) -> None:
    x = nn.Parameter(torch.tensor([2.0, -1.0], dtype=DOUBLE))
    function = custom_function(cube, slope_of_cube, kind)
    objective = ClosureObjective(lambda: loss_of(function, x), [x])
    product = GaussNewton(objective.evaluate(curvature=True)) @ torch.ones(2, dtype=DOUBLE)
    torch.testing.assert_close(product, 9 * x.detach() ** 4)


@pytest.mark.parametrize("where", ["loss", "penalty"])
def test_gauss_newton_needs_that_of_what_lies_above(where: str) -> None:
    x = nn.Parameter(torch.tensor([2.0, -1.0], dtype=DOUBLE))
    function = custom_function(cube, slope_of_cube, "saved")

    def loss() -> Tensor:
        z = mark_outputs(x * 2)
        if where == "loss":
            return function.apply(z).square().sum()
        return z.square().sum() + function.apply(x).sum()

    operator = GaussNewton(ClosureObjective(loss, [x]).evaluate(curvature=True))
    with pytest.raises(MissingSecondDerivative, match="Custom_saved"):
        operator @ torch.ones(2, dtype=DOUBLE)


def test_what_the_parameters_have_no_part_in_is_not_refused() -> None:
    x = nn.Parameter(torch.ones(2, dtype=DOUBLE))
    data = torch.full((2,), 3.0, dtype=DOUBLE, requires_grad=True)
    function = custom_function(cube, slope_of_cube, "saved")

    def loss() -> Tensor:
        unused = function.apply(x)
        return (x**2 * function.apply(data)).sum() + 0 * unused.detach().sum()

    product = Hessian(ClosureObjective(loss, [x]).evaluate(curvature=True)) @ x.detach()
    assert product.tolist() == [54, 54]


def test_a_function_that_somebody_kept_is_noticed() -> None:
    apply = custom_function(cube, slope_of_cube, "saved").apply
    x = nn.Parameter(torch.ones(2))
    objective = ClosureObjective(lambda: apply(x).sum(), [x])
    with pytest.raises(MissingSecondDerivative, match="Custom_saved"):
        Hessian(objective.evaluate(curvature=True)) @ torch.ones(2)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_functions_over_a_data_set(curvature: str) -> None:
    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = function.apply(super().forward(x))
            return result

    function = custom_function(cube, slope_of_cube, "no_graph")
    model = Layer(2, 1)
    closure = DatasetClosure(model, F.mse_loss, [(torch.randn(4, 2), torch.randn(4, 1))] * 2)
    with pytest.raises(MissingSecondDerivative, match="Custom_no_graph"):
        NewtonCG(model.parameters(), curvature=curvature).step(closure)


def test_inside_a_checkpoint() -> None:
    function, layer = (
        custom_function(torch.tanh, lambda x: 1 - torch.tanh(x) ** 2),
        nn.Linear(3, 3).double(),
    )
    x = torch.randn(5, 3, dtype=DOUBLE)

    def product(inner: Callable[[Tensor], Tensor]) -> Tensor:
        def loss() -> Tensor:
            return checkpoint(inner, x, use_reentrant=False).square().mean()

        objective = ClosureObjective(loss, layer.parameters())
        return Hessian(objective.evaluate(curvature=True)) @ torch.ones(12, dtype=DOUBLE)

    custom = product(lambda x: function.apply(layer(x)))
    torch.testing.assert_close(custom, product(lambda x: torch.tanh(layer(x))))


def test_an_operation_of_a_library_is_a_custom_function() -> None:
    @torch.library.custom_op("torch_secondorder_tests::cube", mutates_args=())
    def operation(x: Tensor) -> Tensor:
        return x**3

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.slope = 3 * inputs[0] ** 2

    operation.register_autograd(lambda ctx, g: ctx.slope * g, setup_context=setup)
    x = nn.Parameter(torch.ones(2))
    objective = ClosureObjective(lambda: operation(x).sum(), [x])
    with pytest.raises(MissingSecondDerivative, match="torch_secondorder_tests_cube"):
        Hessian(objective.evaluate(curvature=True)) @ torch.ones(2)


class SavedCube(Function):
    """One that torch.compile can see into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(3 * x**2)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        result: Tensor = ctx.saved_tensors[0] * g
        return result


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_inside_a_compiled_function() -> None:
    objective = FunctionalObjective(
        lambda x: SavedCube.apply(x).sum(), torch.ones(2), compile={"backend": "aot_eager"}
    )
    evaluation = objective.evaluate(curvature=True)
    assert evaluation.grad.tolist() == [3, 3]
    with pytest.raises(MissingSecondDerivative, match="Leave compile out"):
        Hessian(evaluation) @ torch.ones(2)


# Checks go by the graph.


class _Late:
    """A closure that has another term after some steps."""

    def __init__(self, x: Tensor, term: Callable[[], Tensor], optimizer: Any, since: int) -> None:
        self.x, self.term, self.optimizer, self.left = x, term, optimizer, since

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = ((self.x - 1) ** 2).sum()
        if self.left <= 0:
            loss = loss + self.term()
        loss.backward()
        return loss


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", ["NewtonCG", *HUTCHINSON])
def test_a_term_that_comes_after_a_warm_up_is_found(name: str, kind: str) -> None:
    function = custom_function(cube, slope_of_cube, kind)
    x = nn.Parameter(torch.tensor([1.5, 2.0]))
    makers = {**HUTCHINSON, "NewtonCG": partial(NewtonCG, curvature="hessian")}
    optimizer = makers[name]([x])
    closure = _Late(x, lambda: function.apply(x).square().sum(), optimizer, 2)
    for _ in range(2):
        optimizer.step(closure)
        closure.left -= 1
    with pytest.raises(MissingSecondDerivative, match=f"Custom_{kind}"):
        for _ in range(10):  # Sophia looks at every tenth
            optimizer.step(closure)


@pytest.mark.parametrize("name", ["NewtonCG", *HUTCHINSON])
def test_gradients_from_elsewhere_after_a_warm_up_are_found(name: str) -> None:
    x = nn.Parameter(torch.tensor([1.5, 2.0]))
    makers = {**HUTCHINSON, "NewtonCG": partial(NewtonCG, curvature="hessian")}
    optimizer = makers[name]([x])
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = ((x - 1) ** 2).sum()
        loss.backward()
        if calls > 4:
            extra = ((x + 2) ** 4).sum()
            torch.autograd.backward(extra)
            loss = loss + extra
        return loss.detach()

    with pytest.raises(RuntimeError, match=r"instead of torch\.autograd\.backward"):
        for _ in range(12):
            optimizer.step(closure)


def test_backward_for_other_parameters_is_nobodys_business() -> None:
    x, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    def closure() -> Tensor:
        torch.autograd.backward((other**2).sum())
        return (x**2).sum()

    product = Hessian(ClosureObjective(closure, [x]).evaluate(curvature=True)) @ torch.ones(2)
    assert product.tolist() == [2, 2]
    assert other.grad is not None


# Reentrant checkpoints.

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "AdaHessian": AdaHessian,
    "AdaHessian gnb": partial(AdaHessian, estimator="gnb"),
    "Sophia": Sophia,
    "Sophia gnb": partial(Sophia, estimator="gnb"),
    "NewtonCG ggn": partial(NewtonCG, curvature="ggn"),
    "NewtonCG hessian": partial(NewtonCG, curvature="hessian"),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("kind", ["part", "whole", "linear"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reentrant_checkpoints_are_refused(name: str, kind: str, needs_grad: bool) -> None:
    torch.manual_seed(0)
    block, head = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 2)
    x, y = torch.randn(6, 3, requires_grad=needs_grad), torch.randn(6, 2)
    optimizer = OPTIMIZERS[name]([*block.parameters(), *head.parameters()])
    before = [p.detach().clone() for p in (*block.parameters(), *head.parameters())]

    def loss() -> Tensor:
        if kind == "whole":
            return F.mse_loss(checkpoint(lambda x: head(block(x)), x, use_reentrant=True), y)
        z = head(checkpoint(block, x, use_reentrant=True))
        return F.mse_loss(z, y) if kind == "part" else (mark_outputs(z) * y).mean()

    if not needs_grad and kind != "whole":
        return  # PyTorch itself warns, and trains nothing inside, with any optimizer
    closure = standard(optimizer, loss)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        optimizer.step(closure)
    if not isinstance(optimizer, NewtonCG):
        with pytest.raises(RuntimeError, match="use_reentrant=False"), optimizer.watching():
            closure()
    for p, old in zip((*block.parameters(), *head.parameters()), before, strict=True):
        assert torch.equal(p, old)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpoints_by_default() -> None:
    """Differences of gradients need no second derivative; without a gradient nothing helps."""
    torch.manual_seed(0)
    block, y = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(6, 2)
    for needs_grad in (True, False):
        x = torch.randn(6, 3, requires_grad=needs_grad)
        optimizer = NewtonCG(block.parameters())
        closure = standard(
            optimizer, lambda x=x: F.mse_loss(checkpoint(block, x, use_reentrant=True), y)
        )
        if needs_grad:
            optimizer.step(closure)
            assert optimizer.info.curvature == "hessian by differences"
            assert optimizer.info.loss_after < optimizer.info.loss
        else:
            with pytest.raises(MissingSecondDerivative, match="use_reentrant=False"):
                optimizer.step(closure)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpoints_of_what_is_frozen_are_fine() -> None:
    torch.manual_seed(0)
    backbone, head = nn.Linear(3, 4).requires_grad_(False), nn.Linear(4, 2)
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    for optimizer in (NewtonCG(head.parameters()), LBFGS(head.parameters())):
        closure = standard(
            optimizer, lambda: F.mse_loss(head(checkpoint(backbone, x, use_reentrant=True)), y)
        )
        first = optimizer.step(closure)
        assert closure() < first
