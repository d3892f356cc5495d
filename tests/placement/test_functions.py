"""Operators, solvers and functions on a device: tensors of the host do not mix in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_secondorder
from tests.support.placement import DOUBLE, Problem, assert_same, draw
from torch_secondorder import (
    ClosureObjective,
    DatasetClosure,
    FunctionalObjective,
    curvature,
    curve_fit,
    diagnostics,
    func,
    kkt_residuals,
    least_squares,
    linear,
    mark_outputs,
    minimize,
    penalties,
    solvers,
)

Case = Callable[[torch.device], Any]
FUNCTIONS: dict[str, Case] = {}


def case(name: str) -> Callable[[Case], Case]:
    """Names a case: the function that it is about, and more where there are several."""

    def register(function: Case) -> Case:
        FUNCTIONS[name] = function
        return function

    return register


@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_are_those_on_the_cpu(name: str) -> None:
    assert_same(FUNCTIONS[name], 1e-6)


#: What needs no case: classes of results, names of options, and what others are made of.
PLAIN = {
    # Results and types.
    *("Source", "OperatorLike", "JacobianMethod", "FromOutputs", "DefinitenessName"),
    *("LeastSquaresSolverName", "PreconditionerName", "SolverName", "LinearSolver"),
    *("Definiteness", "Eigenpairs", "ObservedInformation", "SecondOrderModel", "SpectralDensity"),
    *("TraceEstimate", "KrylovResult", "KrylovStatus", "LstsqResult", "NormConstrainedResult"),
    *("RidgeResult", "DerivativeReport", "Discrepancy", "DampedStep", "DenseStep", "Iterate"),
    *("SolveResult", "SolveStatus", "Tridiagonal", "Problem", "RectangularOperator"),
    *("LeastSquaresResult", "OptimizeResult", "InseparableLoss", "UnknownOutputs"),
    # Base classes, and parts of what the cases call.
    *("DiagonalEstimator", "KroneckerFactors", "LinearOperator", "Preconditioner"),
    *("resolve_preconditioner", "resolve_solver"),
    # By name in the cases of optimizers.
    *("Martens", "KFAC"),
}


def test_all_functions_are_here() -> None:
    found = {name.partition(",")[0] for name in FUNCTIONS}
    for package in (curvature, diagnostics, func, linear, penalties, solvers):
        for name in set(package.__all__) - PLAIN:
            assert name in found, f"{package.__name__}.{name}"
    functions = {"minimize", "least_squares", "curve_fit", "kkt_residuals", "DatasetClosure"}
    objectives = {"ClosureObjective", "FunctionalObjective", "mark_outputs"}
    assert functions | objectives <= found & set(torch_secondorder.__all__)


# Curvature.


def evaluated(device: torch.device, kind: Any = True) -> Any:
    problem = Problem(device)
    objective = ClosureObjective(problem.closure(), problem.params)
    return objective.evaluate(curvature=kind), objective


def products(A: Any, device: torch.device) -> list[Tensor]:
    assert A.device == device
    V = draw(A.size, 3, device=device)
    found = [A @ V[:, 0], A.matmat(V), A.dense()]
    if isinstance(A, curvature.FromOutputs):
        factors = A.factors(generator(device))
        found += [A.diagonal(2, generator(device)), [(f.inputs, f.outputs) for f in factors]]
    return found


def generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def matrix(device: torch.device) -> Tensor:
    A = draw(6, 6)
    return (A @ A.T + torch.eye(6, dtype=DOUBLE)).to(device)


class Dense(curvature.LinearOperator):
    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.size = matrix, len(matrix)
        self.dtype, self.device = matrix.dtype, matrix.device

    def matvec(self, v: Tensor) -> Tensor:
        return self.matrix @ v


for _kind in ("Hessian", "GaussNewton", "Fisher"):

    @case(_kind)
    def _(device: torch.device, kind: str = _kind) -> Any:
        options = {"generator": generator(device)} if kind == "Fisher" else {}
        evaluation, _ = evaluated(device)
        return products(getattr(curvature, kind)(evaluation, **options), device)


@case("Damped")
def _(device: torch.device) -> Any:
    return products(curvature.Damped(Dense(matrix(device)), 0.5), device)


@case("Diagonal")
def _(device: torch.device) -> Any:
    return products(curvature.Diagonal(draw(6, device=device)), device)


@case("FiniteDifference")
def _(device: torch.device) -> Any:
    return curvature.FiniteDifference(evaluated(device)[1]) @ draw(43, device=device)


@case("Hutchinson")
def _(device: torch.device) -> Any:
    estimators = [curvature.Hutchinson(2), curvature.Hutchinson(distribution="gaussian")]
    return [e(curvature.Hessian(evaluated(device)[0]), generator(device)) for e in estimators]


@case("GaussNewtonBartlett")
def _(device: torch.device) -> Any:
    return curvature.GaussNewtonBartlett(2)(evaluated(device)[0], generator(device))


@case("exact_diagonal")
def _(device: torch.device) -> Any:
    return curvature.exact_diagonal(curvature.Hessian(evaluated(device)[0]))


for _method in ("graph", "rows", "columns"):

    @case(f"ResidualJacobian, {_method}")
    def _(device: torch.device, method: Any = _method) -> Any:
        evaluation, _ = evaluated(device)
        J = curvature.ResidualJacobian(evaluation, method=method)
        u, v = draw(J.rows, device=device), draw(J.size, device=device)
        squares = [J.normal_matrix(), J.diagonal(), J.kernel(), J.kernel(v)]
        # Residuals are roots of the curvature, which are not unique: their squares are.
        return [J.residuals.square().sum(), J.pull(J.push(v)), J.push(v).norm(), u.norm(), squares]


CASES_OF_HISTORIES = {
    "InverseBFGS": lambda device: curvature.InverseBFGS(8, 3, DOUBLE, device),
    "InverseBroyden": lambda device: curvature.InverseBroyden(8, DOUBLE, device, update="bfgs"),
    "ReducedBroyden": lambda device: curvature.ReducedBroyden(8, 10, DOUBLE, device),
}
for _name, _make in CASES_OF_HISTORIES.items():

    @case(_name)
    def _(device: torch.device, make: Any = _make) -> Any:
        H, g = make(device), draw(8, device=device, seed=9)
        for k in range(5):
            s = draw(8, device=device, seed=k)
            H.push(s, s * torch.arange(1.0, 9.0, dtype=DOUBLE, device=device))
            if hasattr(H, "direction"):
                H.direction(g)
        again = make(device)
        again.load_state_dict(H.state_dict())
        return [H @ g, again @ g, H.matmat(torch.stack((g, -g), 1))]


# Solvers.


@case("CG")
def _(device: torch.device) -> Any:
    A, b = Dense(matrix(device)), draw(6, device=device)
    found = solvers.CG(keep_iterates=True)(A, b, x0=0.1 * b)
    inside = solvers.CG(recompute=2)(A, b, radius=0.3, preconditioner=curvature.Diagonal(b.abs()))
    return [found.x, found.decrease, [i.x for i in found.iterates], inside.x]


@case("MINRES")
def _(device: torch.device) -> Any:
    A = Dense(matrix(device) - 3 * torch.eye(6, dtype=DOUBLE, device=device))
    b = draw(6, device=device)
    whole = solvers.MINRES(stop_at_negative_curvature=False)(A, b)
    return [whole.x, solvers.MINRES()(A, b, preconditioner=curvature.Diagonal(b.abs())).x]


@case("Nystrom")
def _(device: torch.device) -> Any:
    A, preconditioner = Dense(matrix(device)), solvers.Nystrom(3)
    preconditioner.refresh(A, generator(device))
    again = solvers.Nystrom(3)
    again.load_state_dict(preconditioner.state_dict())
    return [p.inverse(0.1) @ draw(6, device=device) for p in (preconditioner, again)]


@case("NystromApproximation")
def _(device: torch.device) -> Any:
    # By default random numbers are drawn on the device; a generator of the host will do as well.
    draws = (generator(device), torch.Generator().manual_seed(1))
    v = draw(6, device=device)
    return [solvers.NystromApproximation.of(Dense(matrix(device)), 3, g) @ v for g in draws]


@case("DampedLeastSquares")
def _(device: torch.device) -> Any:
    evaluation, _ = evaluated(device)
    J, grad, center = (
        curvature.ResidualJacobian(evaluation),
        evaluation.grad,
        draw(43, device=device),
    )
    systems = [solvers.DampedLeastSquares.of(J, grad, name) for name in ("primal", "dual", "cg")]
    metric = center.square() + 1
    return [[s.solve(0.1).x, s.solve(0.2, metric, center).x] for s in systems]


@case("DenseQuadratic")
def _(device: torch.device) -> Any:
    results = []
    for shift in (0.0, -4.0):
        H = matrix(device) + shift * torch.eye(6, dtype=DOUBLE, device=device)
        model = solvers.DenseQuadratic.of(H, draw(6, device=device))
        steps = [model.within(0.5), model.damped(0.5), model.along_gradient()]
        results += [getattr(step, "x", step) for step in steps]
    return results


@case("lanczos")
def _(device: torch.device) -> Any:
    A, start = Dense(matrix(device)), draw(6, device=device)
    found = solvers.lanczos(A, start, 4)
    without = solvers.lanczos(A, start, 4, reorthogonalize=False)
    return [found.eigh(), found.ritz_vectors([0, -1]).abs(), without.eigh()]


@case("solve_trust_region")
def _(device: torch.device) -> Any:
    return solvers.solve_trust_region(matrix(device), draw(6, device=device), 0.3).x


# Linear least squares.


def tall(device: torch.device) -> tuple[Tensor, Tensor]:
    return draw(9, 4, device=device), draw(9, device=device, seed=1)


for _name in ("lsqr", "lsmr"):

    @case(_name)
    def _(device: torch.device, name: str = _name) -> Any:
        A, b = tall(device)
        solve = getattr(linear, name)
        return [solve(A, b).x, solve(A, b, 0.3, x0=b[:4], preconditioner=torch.diag(b[:4].abs())).x]


@case("lstsq")
def _(device: torch.device) -> Any:
    A, b = tall(device)
    found = linear.lstsq(A, b)
    return [found.x, found.singular_values, found.residual_norm, found.norm]


@case("ridge")
def _(device: torch.device) -> Any:
    A, b = tall(device)
    penalty = torch.tensor([0.1, 1.0], dtype=DOUBLE, device=device)
    return [linear.ridge(A, b, 0.1), linear.ridge(A, b, penalty)]


@case("norm_constrained")
def _(device: torch.device) -> Any:
    A, b = tall(device)
    pair = (lambda v: A @ v, lambda u: A.T @ u)
    free = linear.norm_constrained(linear.as_operator(pair), b, 0.1)
    return [linear.norm_constrained(A, b, r).x for r in (0.1, 9.0)] + [free.x]


@case("as_operator")
def _(device: torch.device) -> Any:
    A, b = tall(device)
    operator = linear.as_operator(A)
    return [operator.matvec(b[:4]), operator.rmatvec(b)]


@case("jacobian_operator")
def _(device: torch.device) -> Any:
    A, b = tall(device)
    operator = linear.jacobian_operator(lambda x: (A @ x).tanh(), b[:4])
    return [operator.matvec(b[:4]), operator.rmatvec(b), linear.lsqr(operator, b).x]


# Functions.


def smooth(x: Tensor) -> Tensor:
    return (x.sin() * x.flip(0)).sum()


def curved(x: Tensor) -> Tensor:
    return torch.stack((x.sin().sum(), x.square().sum(), x[0] * x[1]))


@case("jacobian")
def _(device: torch.device) -> Any:
    x = draw(4, device=device)
    return [func.jacobian(curved, x, mode) for mode in ("auto", "forward", "reverse")]


@case("hvp")
def _(device: torch.device) -> Any:
    return func.hvp(smooth, draw(4, device=device), draw(4, device=device, seed=1))


@case("vhp")
def _(device: torch.device) -> Any:
    return func.vhp(smooth, draw(4, device=device), draw(4, device=device, seed=1))


@case("ggnvp")
def _(device: torch.device) -> Any:
    x, v = draw(4, device=device), draw(4, device=device, seed=1)
    return func.ggnvp(curved, lambda z: z.exp().sum(), x, v)


@case("hessian_diagonal")
def _(device: torch.device) -> Any:
    return func.hessian_diagonal(smooth, draw(4, device=device))


@case("jvp")
def _(device: torch.device) -> Any:
    return func.jvp(curved, (draw(4, device=device),), (draw(4, device=device, seed=1),))


@case("vjp")
def _(device: torch.device) -> Any:
    value, pull = func.vjp(curved, draw(4, device=device))
    return [value, pull(torch.ones_like(value))]


@case("batch_jacobian")
def _(device: torch.device) -> Any:
    net = Problem(device).net
    return [func.batch_jacobian(net, draw(3, 4, device=device), m) for m in ("auto", "reverse")]


@case("module_jacobian")
def _(device: torch.device) -> Any:
    net, x = Problem(device).net, draw(3, 4, device=device)
    return [func.module_jacobian(net, x), func.module_jacobian(net, x, "parameters")]


@case("check_derivatives")
def _(device: torch.device) -> Any:
    report = func.check_derivatives(smooth, draw(4, device=device))
    assert report.passed
    return report.passed


# Penalties and diagnostics.


@case("jacobian_penalty")
def _(device: torch.device) -> Any:
    net, x = Problem(device).net, draw(3, 4, device=device)
    drawn = penalties.jacobian_penalty(net, x, "projection", 2, generator(device))
    results = [penalties.jacobian_penalty(net, x), drawn]
    return [results, torch.autograd.grad(results[0], net[1].weight)]


@case("contractive_penalty")
def _(device: torch.device) -> Any:
    encoder, x = Problem(device).encoder, draw(3, 4, device=device)
    noisy = penalties.contractive_penalty(
        encoder, x, noise=0.1, n_noise=2, generator=generator(device)
    )
    results = [penalties.contractive_penalty(encoder, x, m) for m in ("auto", "exact")]
    return [noisy, results, torch.autograd.grad(results[0], encoder[0].weight)]


def source(device: torch.device) -> Any:
    problem = Problem(device)
    return diagnostics.from_closure(problem.closure(), problem.params)


@case("from_closure")
def _(device: torch.device) -> Any:
    return diagnostics.trace(source(device), 12).value


@case("from_model")
def _(device: torch.device) -> Any:
    problem = Problem(device)
    batches = [(problem.x[:6], problem.y[:6]), (problem.x[6:].cpu(), problem.y[6:].cpu())]
    found = diagnostics.from_model(problem.net, F.cross_entropy, batches)
    return diagnostics.trace(found, 12).value


@case("trace")
def _(device: torch.device) -> Any:
    return [diagnostics.trace(source(device), n).value for n in (12, 100)]


@case("definiteness")
def _(device: torch.device) -> Any:
    found = diagnostics.definiteness(source(device))
    return [found.curvature, found.direction.abs().sum()]


@case("eigenpairs")
def _(device: torch.device) -> Any:
    found = diagnostics.eigenpairs(source(device), 2, tolerance=1e-6)
    assert found.vectors.device == device
    return [found.values, found.vectors.abs()]


@case("spectral_density")
def _(device: torch.device) -> Any:
    found = diagnostics.spectral_density(source(device), 2, 6)
    return [found.nodes, found.weights, found.density(torch.linspace(-1, 1, 5), 0.1)]


@case("second_order_model")
def _(device: torch.device) -> Any:
    return diagnostics.second_order_model(source(device))


@case("observed_information")
def _(device: torch.device) -> Any:
    function = FunctionalObjective(
        lambda x: (x.square() * (2 + x.sin())).sum(), draw(3, device=device)
    )
    return diagnostics.observed_information(function)


# Functions that minimize.


def bowl(x: Tensor) -> Tensor:
    return (x - 1).square().sum() + 0.1 * (x[0] * x[1]).sin()


METHODS = ("lbfgs", "bfgs", "cg", "newton-cg", "newton")
for _method in METHODS:

    @case(f"minimize, {_method}")
    def _(device: torch.device, method: Any = _method) -> Any:
        result = minimize(bowl, torch.zeros(3, dtype=DOUBLE, device=device), method)
        assert result.x.device == device
        return [result.x, result.fun]


@case("minimize, bounds")
def _(device: torch.device) -> Any:
    x0 = torch.zeros(3, dtype=DOUBLE, device=device)
    return minimize(bowl, x0, bounds=[(-1, 0.5), (None, None), (0, 2)]).x


@case("minimize, constraints")
def _(device: torch.device) -> Any:
    x0 = torch.zeros(3, dtype=DOUBLE, device=device)
    on_plane = {"type": "eq", "fun": lambda x: x.sum() - 1}
    inside = {"type": "ineq", "fun": lambda x: 0.2 - x[:1]}
    return minimize(bowl, x0, constraints=[on_plane, inside]).x


@case("minimize, finite differences")
def _(device: torch.device) -> Any:
    x0 = torch.zeros(3, dtype=DOUBLE, device=device)
    return minimize(lambda x: float(bowl(x)), x0, jac="3-point").x


@case("least_squares")
def _(device: torch.device) -> Any:
    A, b = tall(device)
    x0 = torch.zeros(4, dtype=DOUBLE, device=device)
    residuals = lambda x: (A @ x).tanh() - 0.1 * b  # noqa: E731
    plain = least_squares(residuals, x0)
    robust = least_squares(residuals, x0, loss="soft_l1", bounds=(-0.1, 0.1))
    return [plain.x, plain.jac, robust.x, least_squares(residuals, x0, jac="2-point").x]


@case("curve_fit")
def _(device: torch.device) -> Any:
    t = torch.linspace(0, 1, 9, dtype=DOUBLE, device=device)
    data = 2 * torch.exp(-t) + 0.01 * draw(9, device=device)
    model = lambda t, a, b: a * torch.exp(-b * t)  # noqa: E731
    p0 = torch.ones(2, dtype=DOUBLE, device=device)
    return curve_fit(model, t, data, p0, sigma=torch.ones_like(t))


@case("kkt_residuals")
def _(device: torch.device) -> Any:
    x = nn.Parameter(torch.tensor([0.6, 0.8], dtype=DOUBLE, device=device))

    def closure() -> Tensor:
        x.grad = None
        loss = (x * torch.tensor([-3.0, -4.0], dtype=DOUBLE, device=device)).sum()
        loss.backward()
        return loss

    report = kkt_residuals(
        closure, [x], inequalities={"disk": lambda: x @ x - 1}, second_order=True
    )
    return [report.stationarity, report.multipliers["disk"], report.feasibility]


# Objectives.


@case("ClosureObjective")
def _(device: torch.device) -> Any:
    evaluation, objective = evaluated(device)
    step = -0.1 * evaluation.grad
    trial = objective.trial(step)
    objective.accept(step)
    return [evaluation.loss, evaluation.grad, trial.loss, objective.evaluate().grad]


@case("FunctionalObjective")
def _(device: torch.device) -> Any:
    x = nn.Parameter(draw(3, device=device))
    objective = FunctionalObjective(bowl, x)
    torch_secondorder.LBFGS([x]).step(objective)
    return [x, diagnostics.eigenpairs(objective, 1).values]


@case("mark_outputs")
def _(device: torch.device) -> Any:
    problem = Problem(device)

    def closure() -> Tensor:
        problem.net.zero_grad()
        outputs = mark_outputs(problem.net(problem.x))
        loss = F.cross_entropy(outputs, problem.y)
        loss.backward()
        return loss

    evaluation = ClosureObjective(closure, problem.params).evaluate(curvature=True)
    return curvature.GaussNewton(evaluation) @ draw(43, device=device)


@case("DatasetClosure")
def _(device: torch.device) -> Any:
    problem = Problem(device)
    # A loader gives tensors of the host, which are moved to where the model is.
    loader = [(problem.x[i : i + 4].cpu(), problem.y[i : i + 4].cpu()) for i in (0, 4, 8)]
    closure = DatasetClosure(problem.net, F.cross_entropy, loader, progress=False)
    optimizer = torch_secondorder.NewtonCG(problem.params, max_iter=1)
    losses = [optimizer.step(closure) for _ in range(2)]
    return [losses, problem.params]
