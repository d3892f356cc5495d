"""The whole public API as a user's program has it; `mypy --strict` accepts each line.

The functions are run as well, so what type checkers are told is what happens. A line that is to be
an error for them has `type: ignore`, which is an error itself where it is not needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import assert_type

import torch_secondorder
from torch_secondorder import (
    BFGS,
    LBFGS,
    SOAP,
    AdaHessian,
    AdaHessianInfo,
    AdaSecant,
    AdaSecantInfo,
    BFGSInfo,
    CapturedStep,
    ClosureObjective,
    Constrained,
    ConstrainedInfo,
    Contractive,
    ContractiveInfo,
    DatasetClosure,
    Evaluation,
    FunctionalObjective,
    KFACInfo,
    KKTReport,
    LBFGSInfo,
    LeastSquaresResult,
    LevenbergMarquardt,
    LevenbergMarquardtInfo,
    MissingSecondDerivative,
    Newton,
    NewtonCG,
    NewtonCGInfo,
    NewtonInfo,
    NonlinearCG,
    NonlinearCGInfo,
    OptimizeResult,
    Projected,
    ProjectedInfo,
    SecondOrderOptimizer,
    Shampoo,
    ShampooInfo,
    SOAPInfo,
    Sophia,
    SophiaInfo,
    StepInfo,
    StepStatus,
    curve_fit,
    kkt_residuals,
    least_squares,
    mark_outputs,
    minimize,
)
from torch_secondorder.constraints import Box, NormBall, Orthogonal, Simplex, UnitNorm
from torch_secondorder.curvature import (
    Damped,
    Diagonal,
    DiagonalEstimator,
    FiniteDifference,
    Fisher,
    FromOutputs,
    GaussNewton,
    GaussNewtonBartlett,
    Hessian,
    Hutchinson,
    InseparableLoss,
    InverseBFGS,
    InverseBroyden,
    JacobianMethod,
    KroneckerFactors,
    LinearOperator,
    ReducedBroyden,
    ResidualJacobian,
    UnknownOutputs,
    exact_diagonal,
)
from torch_secondorder.diagnostics import (
    Definiteness,
    Eigenpairs,
    ObservedInformation,
    Problem,
    SecondOrderModel,
    Source,
    SpectralDensity,
    TraceEstimate,
    definiteness,
    eigenpairs,
    from_closure,
    from_model,
    observed_information,
    second_order_model,
    spectral_density,
    trace,
)
from torch_secondorder.func import (
    DerivativeReport,
    Discrepancy,
    batch_jacobian,
    check_derivatives,
    ggnvp,
    hessian_diagonal,
    hvp,
    jacobian,
    jvp,
    module_jacobian,
    vhp,
    vjp,
)
from torch_secondorder.globalization import (
    Armijo,
    DampingName,
    DampingRule,
    FixedStep,
    Globalization,
    GlobalizationName,
    HagerZhang,
    LineSearch,
    LineSearchName,
    MarquardtDamping,
    NielsenDamping,
    Phi,
    SearchResult,
    SearchStatus,
    StrongWolfe,
    Trial,
    TrustRegion,
    falls_without_end,
    resolve_damping,
    resolve_globalization,
    resolve_line_search,
)
from torch_secondorder.linear import (
    KrylovResult,
    KrylovStatus,
    LstsqResult,
    NormConstrainedResult,
    OperatorLike,
    RectangularOperator,
    RidgeResult,
    as_operator,
    jacobian_operator,
    lsmr,
    lsqr,
    lstsq,
    norm_constrained,
    ridge,
)
from torch_secondorder.optim import (
    AccelerationName,
    GraftingName,
    RootMethodName,
    ScalingName,
    SecantName,
)
from torch_secondorder.penalties import contractive_penalty, jacobian_penalty
from torch_secondorder.solvers import (
    CG,
    KFAC,
    MINRES,
    DampedLeastSquares,
    DampedStep,
    DefinitenessName,
    DenseQuadratic,
    DenseStep,
    Iterate,
    LeastSquaresSolverName,
    LinearSolver,
    Martens,
    Nystrom,
    NystromApproximation,
    Preconditioner,
    PreconditionerName,
    SolveResult,
    SolverName,
    SolveStatus,
    Tridiagonal,
    lanczos,
    resolve_preconditioner,
    resolve_solver,
    solve_trust_region,
)


def model_and_data() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A small regression."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2))
    return model, torch.randn(8, 3), torch.randn(8, 2)


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of all examples."""
    return nn.functional.mse_loss(outputs, targets)


def closure_for(
    model: nn.Module, x: Tensor, y: Tensor, zero_grad: Callable[[], None]
) -> Callable[[], Tensor]:
    """The standard closure."""

    def closure() -> Tensor:
        zero_grad()
        loss = loss_of(model(x), y)
        loss.backward()
        return loss

    return closure


# Optimizers.


def lbfgs() -> None:
    model, x, y = model_and_data()
    optimizer = LBFGS(model.parameters(), lr=0.5, max_iter=2, line_search_fn="hager_zhang")
    assert_type(optimizer.info, LBFGSInfo | None)
    loss = optimizer.step(closure_for(model, x, y, optimizer.zero_grad))
    assert_type(loss, Tensor)
    assert optimizer.info is not None
    assert_type(optimizer.info.step_length, float)
    assert_type(optimizer.info.search_status, SearchStatus | None)
    assert_type(optimizer.info.status, StepStatus)
    assert_type(optimizer.info.as_dict(), dict[str, Any])
    LBFGS(model.parameters(), line_search_fn=StrongWolfe(c2=0.5))
    LBFGS(model.parameters(), line_search_fn=None)
    LBFGS(model.parameters(), bounds=(torch.zeros(1), None))
    LBFGS([torch.ones(2)], bounds=(0.0, [torch.ones(1)]))
    LBFGS(model.parameters(), update="ssbroyden")
    with refusal():
        LBFGS(model.parameters(), line_search_fn="newton")  # type: ignore[arg-type]


def bfgs() -> None:
    model, x, y = model_and_data()
    optimizer = BFGS(model.parameters(), max_iter=2, update="ssbroyden")
    assert_type(optimizer.info, BFGSInfo | None)
    loss = optimizer.step(closure_for(model, x, y, optimizer.zero_grad))
    assert_type(loss, Tensor)
    assert optimizer.info is not None
    assert_type(optimizer.info.skipped_pairs, int)
    assert_type(optimizer.info.tau, float)
    with refusal():
        BFGS(model.parameters(), update="broyden")  # type: ignore[arg-type]


def adasecant() -> None:
    model, x, y = model_and_data()
    secant: SecantName = "coordinate"
    optimizer = AdaSecant(model.parameters(), secant=secant, update_period=1, delta_clip=None)
    assert_type(optimizer.info, AdaSecantInfo | None)
    loss = optimizer.step(closure_for(model, x, y, optimizer.zero_grad))
    assert_type(loss, Tensor)
    assert optimizer.info is not None
    assert_type(optimizer.info.rate, float)
    assert_type(optimizer.info.probes, int)
    with refusal():
        AdaSecant(model.parameters(), secant="newton")  # type: ignore[arg-type]


def soap_and_shampoo() -> None:
    model, x, y = model_and_data()
    soap = SOAP(model.parameters(), lr=1e-3, update_period=2, block_size=None)
    assert_type(soap.info, SOAPInfo | None)
    assert_type(soap.step(closure_for(model, x, y, soap.zero_grad)), Tensor)
    assert soap.info is not None
    assert_type(soap.info.off_diagonal, float | None)
    shampoo = Shampoo(model.parameters(), grafting=None, factor_dtype=torch.bfloat16)
    assert_type(shampoo.info, ShampooInfo | None)
    grafting: GraftingName = "sgd"
    root_method: RootMethodName = "newton"
    Shampoo(model.parameters(), grafting=grafting, root_method=root_method)
    assert_type(shampoo.step(closure_for(model, x, y, shampoo.zero_grad)), Tensor)
    with refusal():
        Shampoo(model.parameters(), grafting="adagrad")  # type: ignore[arg-type]
    with refusal():
        Shampoo(model.parameters(), root_method="svd")  # type: ignore[arg-type]


def kfac() -> None:
    model, x, y = model_and_data()
    # The preconditioner of the same name is in `torch_secondorder.solvers`.
    optimizer = torch_secondorder.KFAC(model.parameters(), update_period=2, labels="empirical")
    assert_type(optimizer.info, KFACInfo | None)
    assert_type(optimizer.step(closure_for(model, x, y, optimizer.zero_grad)), Tensor)
    assert optimizer.info is not None
    assert_type(optimizer.info.unclipped, float | None)
    with refusal():
        torch_secondorder.KFAC(model.parameters(), labels="data")  # type: ignore[arg-type]


def nonlinear_cg() -> None:
    model, x, y = model_and_data()
    optimizer = NonlinearCG(model.parameters(), max_iter=2, beta="hager_zhang", restart=None)
    assert_type(optimizer.info, NonlinearCGInfo | None)
    loss = optimizer.step(closure_for(model, x, y, optimizer.zero_grad))
    assert_type(loss, Tensor)
    assert optimizer.info is not None
    assert_type(optimizer.info.beta, float)
    assert_type(optimizer.info.restarts, int)
    assert_type(optimizer.info.restart_reason, str)
    NonlinearCG(model.parameters(), preconditioner=lambda v: 2 * v)
    with refusal():
        NonlinearCG(model.parameters(), beta="newton")  # type: ignore[arg-type]


def a_closure_may_return_a_number() -> None:
    model, x, y = model_and_data()
    optimizer = LBFGS(model.parameters())

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(model(x), y)
        loss.backward()
        return loss.item()

    assert_type(optimizer.step(closure), Tensor)
    with refusal():
        optimizer.step("closure")  # type: ignore[call-overload]


def minimizing_a_function() -> None:
    def cost(p: dict[str, Tensor]) -> Tensor:
        return (p["w"] ** 4).sum() + (p["b"] - 1.0).square().sum()

    def report(intermediate_result: OptimizeResult) -> None:
        assert_type(intermediate_result.fun, float)

    start = {"w": torch.ones(2), "b": torch.zeros(1)}
    result = minimize(cost, start, "L-BFGS-B", callback=report, options={"maxiter": 3})
    assert_type(result, OptimizeResult)
    assert_type(result.success, bool)
    assert_type(result.nfev, int)
    assert_type(result.info, StepInfo)
    minimize(cost, start, method=LBFGS, jac="2-point", tol=1e-2)
    within = minimize(cost, start, constraints={"type": "eq", "fun": lambda p: p["w"].sum() - 1})
    assert_type(within.v, list[Any])
    assert_type(within.multipliers, dict[str, Tensor])
    assert_type(within.constr_violation, float)
    with refusal():
        minimize(cost, start, jac="4-point")  # type: ignore[arg-type]


def fitting_curves() -> None:
    x = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)

    def curve(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return a * torch.exp(b * x)

    def residuals(p: Tensor) -> Tensor:
        return curve(x, p[0], p[1]) - x

    result = least_squares(residuals, [1.0, 0.5], bounds=(0, 2), loss="huber", f_scale=0.1)
    assert_type(result, LeastSquaresResult)
    assert_type(result.cost, float)
    assert_type(result.njev, int)
    parameters, covariance = curve_fit(curve, x, x.square(), sigma=torch.ones(5))
    assert_type(parameters, Tensor)
    assert_type(covariance, Tensor)
    _, _, report = curve_fit(curve, x, x.square(), [1.0, 0.5], full_output=True)
    assert_type(report, LeastSquaresResult)
    with refusal():
        least_squares(residuals, [1.0, 0.5], loss="square")  # type: ignore[arg-type]


def groups() -> None:
    model, x, y = model_and_data()
    weights: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 1e-3},
        {"params": [p for p in model.parameters() if p.ndim == 1]},
    ]
    optimizer = LBFGS(weights, max_iter=2)
    optimizer.step(closure_for(model, x, y, optimizer.zero_grad))
    AdaHessian(model.named_parameters())
    Sophia([torch.zeros(2, requires_grad=True)]).add_param_group({"params": model[0].weight})
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    with refusal():
        LBFGS(3)  # type: ignore[arg-type]


def newton_cg() -> None:
    model, x, y = model_and_data()
    optimizer = NewtonCG(
        model.parameters(),
        curvature="ggn",
        globalization=TrustRegion(initial=1.0),
        preconditioner="martens",
        solver="cg",
        curvature_products="autograd",
    )
    closure = closure_for(model, x, y, optimizer.zero_grad)
    assert_type(optimizer.step(closure), Tensor)
    assert_type(optimizer.step(closure, curvature_closure=closure), Tensor)
    assert_type(optimizer.info, NewtonCGInfo | None)
    assert optimizer.info is not None
    assert_type(optimizer.info.products, int)
    NewtonCG(model.parameters(), curvature=GaussNewton, solver=MINRES(20), preconditioner=KFAC())
    NewtonCG(model.parameters(), globalization="damping", damping=1.0)
    with refusal():
        NewtonCG(model.parameters(), curvature="kfac")  # type: ignore[arg-type]
    with refusal():
        NewtonCG(model.parameters(), solver="lu")  # type: ignore[arg-type]
    with refusal():
        NewtonCG(model.parameters(), curvature_products="exact")  # type: ignore[arg-type]


def newton() -> None:
    model, x, y = model_and_data()
    optimizer = Newton(model.parameters(), globalization=TrustRegion(initial=1.0), corrections=2)
    assert_type(optimizer.step(closure_for(model, x, y, optimizer.zero_grad)), Tensor)
    assert_type(optimizer.info, NewtonInfo | None)
    assert optimizer.info is not None
    assert_type(optimizer.info.smallest_eigenvalue, float | None)
    Newton(model.parameters(), 1.0, "damping", max_iter=20, max_eval=100)
    with refusal():
        Newton(model.parameters(), globalization="dogleg")  # type: ignore[arg-type]


def levenberg_marquardt() -> None:
    model, x, y = model_and_data()
    scaling: ScalingName = "more"
    damping: DampingName = "nielsen"
    acceleration: AccelerationName = "auto"
    LevenbergMarquardt(model.parameters(), factor_dtype=torch.float32)
    optimizer = LevenbergMarquardt(model.parameters(), 1.0, damping, max_iter=3, scaling=scaling)
    closure = closure_for(model, x, y, optimizer.zero_grad)
    assert_type(optimizer.step(closure), Tensor)
    assert_type(optimizer.info, LevenbergMarquardtInfo | None)
    assert optimizer.info is not None
    assert_type(optimizer.info.rows, int)
    LevenbergMarquardt(model.parameters(), 1.0, MarquardtDamping(1.0), acceleration="geodesic")
    LevenbergMarquardt(model.parameters(), acceleration=acceleration)
    LevenbergMarquardt(model.parameters(), damping=0.1, momentum=0.9, globalization=None)
    LevenbergMarquardt(model.parameters(), solver="dual", globalization=Armijo())
    with refusal():
        LevenbergMarquardt(model.parameters(), solver="lu")  # type: ignore[arg-type]


def adahessian() -> None:
    model, x, y = model_and_data()
    optimizer = AdaHessian(model.parameters(), lr=0.1, estimator="hutchinson", average_block=2)
    assert_type(optimizer.step(closure_for(model, x, y, optimizer.zero_grad)), Tensor)
    assert_type(optimizer.info, AdaHessianInfo | None)
    optimizer.zero_grad()
    assert_type(optimizer.curvature_due, bool)
    loss_of(model(x), y).backward()
    assert_type(optimizer.step(), Tensor | None)
    optimizer.zero_grad()
    with optimizer.watching():
        loss_of(model(x), y).backward()
    optimizer.step()
    AdaHessian(model.parameters(), estimator=Hutchinson(2), average_block=None)
    with refusal():
        AdaHessian(model.parameters(), estimator="fisher")  # type: ignore[arg-type]


def sophia() -> None:
    model, x, y = model_and_data()
    optimizer = Sophia(model.parameters(), lr=1e-2, estimator="gnb", betas=(0.9, 0.99))
    scheduler = StepLR(optimizer, 10)
    optimizer.step(closure_for(model, x, y, optimizer.zero_grad))
    scheduler.step()
    assert_type(optimizer.info, SophiaInfo | None)
    assert optimizer.info is not None
    assert_type(optimizer.info.unclipped, float | None)
    Sophia(model.parameters(), estimator=GaussNewtonBartlett())


def captured() -> None:
    model, x, y = model_and_data()
    optimizer = AdaHessian(model.parameters(), lr=0.1)

    def closure(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model(x), y)
        loss.backward()
        return loss

    step = CapturedStep(optimizer, closure, warm_up=2)
    assert_type(step(x, y), Tensor)
    assert_type(step.captured, tuple[str, ...])
    assert_type(step.reason, str)


def contractive() -> None:
    encoder = nn.Sequential(nn.Linear(3, 2), nn.Sigmoid())
    model, x = nn.Sequential(encoder, nn.Linear(2, 3)), torch.rand(6, 3)
    optimizer = Contractive(torch.optim.Adam(model.parameters()), encoder, 0.1, method="exact")
    optimizer.step(closure_for(model, x, x, optimizer.zero_grad))
    assert_type(optimizer.info, ContractiveInfo | None)
    assert optimizer.info is not None
    assert_type(optimizer.info.inner, StepInfo | None)
    with refusal():
        Contractive(optimizer, encoder, 0.1, method="all")  # type: ignore[arg-type]


def constrained() -> None:
    model, x, y = model_and_data()
    weight = next(model.parameters())
    optimizer = Constrained(
        LBFGS(model.parameters()),
        equalities=lambda: weight.sum(),
        inequalities={"bound": lambda: weight - 1},
        penalty=1.0,
    )
    optimizer.step(closure_for(model, x, y, optimizer.zero_grad))
    assert_type(optimizer.info, ConstrainedInfo | None)
    assert_type(optimizer.multipliers, dict[str, Tensor])
    closure = closure_for(model, x, y, optimizer.zero_grad)
    assert_type(optimizer.kkt_residuals(closure, second_order=True), KKTReport)
    assert_type(kkt_residuals(closure, optimizer), KKTReport)


def projected() -> None:
    model, x, y = model_and_data()
    weight, bias, *_ = model.parameters()
    adam = torch.optim.Adam(model.parameters())
    optimizer = Projected(adam, [(weight, Orthogonal()), (bias, Box(-1.0, None))])
    optimizer.step(closure_for(model, x, y, optimizer.zero_grad))
    assert_type(optimizer.info, ProjectedInfo | None)
    Projected(LBFGS(model.parameters()), {weight: UnitNorm(dim=1)})
    Projected(torch.optim.SGD(model.parameters(), 0.1), [([weight, bias], NormBall(2.0, p=1))])
    assert_type(Simplex(total=1.0, dim=(0, 1)).project(weight), Tensor)
    assert_type(UnitNorm().retract(weight, weight), Tensor)
    assert_type(NormBall().contains(weight), bool)
    assert_type(Box(high=torch.ones(3)).parametrization(), nn.Module)


def certified() -> None:
    model, x, y = model_and_data()
    weight = next(model.parameters())
    report = kkt_residuals(
        closure_for(model, x, y, model.zero_grad),
        model.parameters(),
        equalities=lambda: weight.sum(),
        inequalities={"bound": lambda: weight - 1},
        bounds=(-10.0, None),
        second_order=True,
        tolerance=1e-3,
    )
    assert_type(report, KKTReport)
    assert_type(report.largest, float)
    assert_type(report.worst, str)
    assert_type(report.satisfied(1e-3), bool)
    assert_type(report.multipliers, dict[str, Tensor])
    again = kkt_residuals(
        closure_for(model, x, y, model.zero_grad),
        model.named_parameters(),
        lambda: weight.sum(),
        multipliers={"equalities": 1.0},
        weight_decay=0.1,
        maximize=True,
    )
    assert_type(again.curvature, float | None)


def any_optimizer() -> None:
    model, x, y = model_and_data()
    optimizers: list[SecondOrderOptimizer] = [
        LBFGS(model.parameters()),
        Newton(model.parameters()),
        NewtonCG(model.parameters()),
        AdaHessian(model.parameters()),
        Sophia(model.parameters()),
    ]
    for optimizer in optimizers:
        optimizer.step(closure_for(model, x, y, optimizer.zero_grad))
        assert_type(optimizer.info, StepInfo | None)
        if isinstance(optimizer.info, NewtonCGInfo):
            assert_type(optimizer.info.products, int)


def functions_in_place_of_closures() -> None:
    model, x, y = model_and_data()

    def loss(params: dict[str, Tensor]) -> Tensor:
        return loss_of(torch.func.functional_call(model, params, (x,)), y)

    FunctionalObjective(loss, dict(model.named_parameters()), compile=True, mode="max-autotune")
    with refusal():
        FunctionalObjective(loss, {}, compile=True, mode="fastest")  # type: ignore[arg-type]
    objective = FunctionalObjective(loss, dict(model.named_parameters()), compile=False)
    assert_type(LBFGS(model.parameters()).step(objective), Tensor)
    assert_type(Sophia(model.parameters()).step(objective), Tensor)
    assert_type(objective.evaluate(curvature="jacobian"), Evaluation)
    with refusal():
        objective.evaluate(curvature="residuals")  # type: ignore[arg-type]


def whole_data_sets() -> None:
    model, x, y = model_and_data()
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    closure = DatasetClosure(model, loss_of, loader, reduction="mean", keep_graphs=2)
    assert_type(closure(), Tensor)
    assert_type(LBFGS(model.parameters()).step(closure), Tensor)
    assert_type(NewtonCG(model.parameters()).step(closure), Tensor)
    with refusal():
        DatasetClosure(model, loss_of, loader, reduction="max")  # type: ignore[arg-type]


# Curvature, solvers and globalization.


def evaluated() -> Evaluation:
    """An evaluation with curvature."""
    w = torch.tensor([1.0, 2.0])
    objective = FunctionalObjective(lambda p: ((p["w"] ** 2) ** 2).sum(), {"w": w})
    return objective.evaluate(curvature=True)


def operators() -> None:
    evaluation = evaluated()
    assert_type(evaluation.loss, Tensor)
    assert_type(evaluation.grad, Tensor)
    try:
        hessian = Hessian(evaluation)
        GaussNewton(evaluation)
    except MissingSecondDerivative as error:
        assert_type(error.operation, str)
    except (InseparableLoss, UnknownOutputs):
        pass
    v = torch.ones(2)
    assert_type(hessian @ v, Tensor)
    assert_type(hessian.matmat(torch.eye(2)), Tensor)
    assert_type(Damped(hessian, 0.1).matvec(v), Tensor)
    assert_type(Diagonal(v) @ v, Tensor)
    assert_type(exact_diagonal(hessian), Tensor)
    assert_type(Hutchinson(4, distribution="gaussian")(hessian), Tensor)
    inverse = InverseBFGS(2, history_size=3)
    inverse.push(v, 2 * v)
    assert_type(inverse.direction(v), Tensor)
    matrix = InverseBroyden(2, update="ssbfgs")
    assert_type(matrix.push(v, 2 * v), bool)
    assert_type(matrix @ v, Tensor)
    reduced = ReducedBroyden(2, history_size=3, update="ssbfgs")
    reduced.push(v, 2 * v)
    assert_type(reduced.direction(v), Tensor)
    w = torch.tensor([1.0, 2.0])
    differences = FiniteDifference(FunctionalObjective(lambda p: (p**4).sum(), w))
    assert_type(differences.size, int)
    estimators: list[DiagonalEstimator] = [Hutchinson(), GaussNewtonBartlett(2)]
    assert len(estimators) == 2
    with refusal():
        Hutchinson(distribution="cauchy")  # type: ignore[arg-type]


def jacobian_of_residuals() -> None:
    model, x, y = model_and_data()
    objective = ClosureObjective(
        lambda: torch.nn.functional.mse_loss(model(x), y), model.parameters()
    )
    ways: list[JacobianMethod] = ["graph", "rows", "columns"]
    J = ResidualJacobian(objective.evaluate(curvature="jacobian"), method=ways[0])
    assert_type(J.method, JacobianMethod)
    assert_type(J.reason, str)
    assert_type(J.dense(), Tensor)
    assert_type(J.pull(J.residuals), Tensor)
    assert_type(J.push(torch.ones(J.size)), Tensor)
    assert_type(J.normal_matrix(), Tensor)
    assert_type(J.kernel(torch.ones(J.size)), Tensor)
    with refusal():
        ResidualJacobian(objective.evaluate(curvature="jacobian"), method="vmap")  # type: ignore[arg-type]


def curvature_by_outputs() -> None:
    model, x, _ = model_and_data()
    labels = torch.randint(0, 2, (8,))

    def loss(params: dict[str, Tensor]) -> Tensor:
        outputs = torch.func.functional_call(model, params, (x,))
        return nn.functional.cross_entropy(mark_outputs(outputs), labels)

    objective = FunctionalObjective(loss, dict(model.named_parameters()))
    evaluation = objective.evaluate(curvature=True)
    weight = next(model.parameters())
    of_closure = ClosureObjective(lambda: (weight**2).sum(), [weight])
    assert_type(of_closure.evaluate(curvature=True), Evaluation)
    ggn = GaussNewton(evaluation, remainder="ignore")
    fisher = Fisher(evaluation, labels="empirical")
    assert_type(ggn.diagonal(), Tensor)
    assert_type(ggn.factors(), list[KroneckerFactors])
    assert isinstance(fisher, FromOutputs)
    assert_type(GaussNewtonBartlett()(evaluation), Tensor)
    with refusal():
        Fisher(evaluation, labels="true")  # type: ignore[arg-type]


def linear_solvers() -> None:
    operator: LinearOperator = Diagonal(torch.tensor([1.0, 2.0, 3.0]))
    b = torch.ones(3)
    solvers: list[LinearSolver] = [CG(), MINRES(max_iterations=10)]
    for solver in solvers:
        result = solver(operator, b, x0=torch.zeros(3))
        assert_type(result, SolveResult)
        assert_type(result.x, Tensor)
        assert_type(result.status, SolveStatus)
    assert_type(CG(keep_iterates=True)(operator, b, radius=1.0).iterates, tuple[Iterate, ...])
    preconditioners: list[Preconditioner] = [Nystrom(rank=2), Martens(), KFAC()]
    preconditioners[0].refresh(operator, None)
    assert_type(preconditioners[0].inverse(0.1), LinearOperator)
    approximation = NystromApproximation.of(operator, 2)
    assert_type(approximation, NystromApproximation)
    found = lanczos(operator, b, 2)
    assert_type(found, Tridiagonal)
    assert_type(found.eigh(), tuple[Tensor, Tensor])
    preconditioner: PreconditionerName = "nystrom"
    assert_type(resolve_preconditioner(preconditioner), Preconditioner | None)
    name: SolverName = "minres"
    assert_type(resolve_solver(name, 10), LinearSolver | None)
    step = solve_trust_region(operator.dense(), b, 0.5)
    assert_type(step, DenseStep)
    assert_type(step.next_from(b), Tensor)
    quadratic = DenseQuadratic.of(operator.dense(), b, tolerance=1e-6)
    assert_type(quadratic.damped(0.1), DenseStep)
    assert_type(quadratic.definiteness, DefinitenessName)


def linear_least_squares() -> None:
    A, b = torch.randn(5, 3), torch.randn(5)
    assert_type(lstsq(A, b, rcond=1e-5), LstsqResult)
    assert_type(lstsq(A, b).rank, int)
    assert_type(lstsq(A, b).residual_norm, Tensor)
    assert_type(ridge(A, b, torch.tensor([0.1, 1.0])), RidgeResult)
    bounded = norm_constrained(A, b, 0.1)
    assert_type(bounded, NormConstrainedResult)
    assert_type(bounded.multiplier, Tensor)
    assert_type(bounded.status, KrylovStatus | None)

    def multiply(v: Tensor) -> Tensor:
        return A @ v

    def multiply_transposed(u: Tensor) -> Tensor:
        return A.T @ u

    forms: list[OperatorLike] = [A, A.to_sparse(), (multiply, multiply_transposed), as_operator(A)]
    for form in forms:
        result = lsqr(form, b, damp=0.1, x0=torch.zeros(3))
        assert_type(result, KrylovResult)
        assert_type(result.status, KrylovStatus)
        assert_type(lsmr(form, b, preconditioner=Diagonal(torch.ones(3))).condition, float)
        norm_constrained(form, b, 0.1, atol=1e-4)
    jacobian_of = jacobian_operator(torch.sin, b)
    assert_type(jacobian_of, RectangularOperator)
    assert_type(jacobian_of.rmatvec(b), Tensor)
    with refusal():
        lsqr(3, b)  # type: ignore[arg-type]


def damped_least_squares() -> None:
    w = torch.ones(2, dtype=torch.float64)
    objective = ClosureObjective(lambda: nn.functional.mse_loss(w * w, 0.5 * w.detach()), [w])
    w.requires_grad_()
    evaluation = objective.evaluate(curvature=True)
    name: LeastSquaresSolverName = "primal"
    system = DampedLeastSquares.of(ResidualJacobian(evaluation), evaluation.grad, name)
    assert_type(system.solve(0.1), DampedStep)
    assert_type(system.solve(0.1).decrease, float)


def line_searches() -> None:
    def phi(t: float) -> Trial:
        return Trial(t, (t - 1.0) ** 2, 2 * (t - 1.0))

    function: Phi = phi
    searches: list[LineSearch] = [StrongWolfe(), HagerZhang(), Armijo(), FixedStep()]
    for search in searches:
        result = search(function, phi(0.0), 1.0, precision=1e-12)
        assert_type(result, SearchResult)
        assert_type(result.status, SearchStatus)
        assert_type(result.trial.loss, float)
        assert_type(falls_without_end(-2.0, result), bool)
    search_name: LineSearchName = "strong_wolfe"
    assert_type(resolve_line_search(search_name), LineSearch)
    name: GlobalizationName = "trust_region"
    chosen: Globalization = resolve_globalization(name, None, True)
    if isinstance(chosen, TrustRegion):
        assert_type(chosen.begun(1.0), float)
    assert_type(resolve_damping("nielsen", True), DampingRule | float | None)
    rules: list[DampingRule] = [MarquardtDamping(initial=1.0), NielsenDamping(share=1e-6)]
    assert_type(resolve_damping("nielsen", True), DampingRule | float | None)
    for rule in rules:
        assert_type(rule.begun(1.0), float)
        assert_type(rule.rejected(1.0, 1), float)


# Derivatives and penalties.


def derivatives() -> None:
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    v = torch.ones(2, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return (x**3).sum()

    def elementwise(x: Tensor) -> Tensor:
        return x**3

    trees: list[Any] = [
        *(hvp(f, x, v), vhp(f, x, v), hessian_diagonal(f, x), ggnvp(elementwise, f, x, v)),
        *(jacobian(elementwise, x, "reverse"), jvp(elementwise, (x,), (v,)), vjp(elementwise, x)),
        module_jacobian(nn.Linear(2, 2).double(), torch.ones(3, 2).double(), "inputs"),
    ]
    assert all(tree is not None for tree in trees)
    assert_type(batch_jacobian(elementwise, torch.ones(3, 2), "forward"), Tensor)
    report = check_derivatives(f, x, directions=2)
    assert_type(report, DerivativeReport)
    assert_type(report.gradient, Discrepancy)
    with refusal():
        jacobian(elementwise, x, "both")  # type: ignore[arg-type]


def penalties() -> None:
    encoder = nn.Sequential(nn.Linear(3, 2), nn.Sigmoid())
    x = torch.rand(4, 3)
    assert_type(contractive_penalty(encoder, x, "exact"), Tensor)
    assert_type(jacobian_penalty(encoder, x, "projection", n_projections=2), Tensor)
    with refusal():
        jacobian_penalty(encoder, x, "auto")  # type: ignore[arg-type]


# Diagnostics.


def diagnostics() -> None:
    model, x, y = model_and_data()
    problem = from_model(model, loss_of, [(x, y)], curvature="hessian", reduction="mean")
    assert_type(problem, Problem)
    sources: list[Source] = [problem, Diagonal(x.new_ones(3))]
    assert_type(trace(sources[1], 3), TraceEstimate)
    pairs = eigenpairs(problem, 2, "largest")
    assert_type(pairs, Eigenpairs)
    assert_type(pairs.values, Tensor)
    assert_type(trace(problem, 30), TraceEstimate)
    assert_type(definiteness(problem), Definiteness)
    assert_type(spectral_density(problem, 2, 5), SpectralDensity)
    line = second_order_model(problem)
    assert_type(line, SecondOrderModel)
    assert_type(line(0.5), float)
    closure = closure_for(model, x, y, model.zero_grad)
    assert_type(from_closure(closure, model.parameters(), curvature="ggn"), Problem)
    operator = Diagonal(torch.tensor([1.0, 2.0]))
    assert_type(observed_information(operator), ObservedInformation)
    assert_type(observed_information(operator).standard_errors, Tensor)
    with refusal():
        eigenpairs(problem, 2, "middle")  # type: ignore[arg-type]


class refusal:
    """Expects an error that says what is wrong."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> bool:
        assert kind is not None and issubclass(kind, TypeError | ValueError)
        return True


assert_type(torch_secondorder.__version__, str)

ALL = [
    *(lbfgs, a_closure_may_return_a_number, minimizing_a_function, groups, newton_cg, adahessian),
    *(newton, bfgs, nonlinear_cg, sophia, contractive, adasecant, soap_and_shampoo, kfac),
    *(levenberg_marquardt, constrained, projected, certified, fitting_curves),
    *(any_optimizer, functions_in_place_of_closures, whole_data_sets, operators),
    *(curvature_by_outputs, linear_solvers, linear_least_squares, line_searches, derivatives),
    *(penalties, diagnostics, damped_least_squares, jacobian_of_residuals),
]
