"""Newton's method with linear systems solved by conjugate gradients, without a Hessian."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf, isfinite, nan
from typing import Any, Literal, overload

from torch import Tensor

from torch_secondorder._autograd.graph import MissingSecondDerivative
from torch_secondorder._foundation.checks import check_choice, check_integer, check_number
from torch_secondorder._foundation.types import Closure, ParamsT
from torch_secondorder._objective.base import Evaluation, EvaluationsSpent, Objective
from torch_secondorder._optim.base import StepClosure
from torch_secondorder._optim.curvature_choice import (
    DIFFERENCES,
    KINDS,
    SUITED,
    CurvatureChoice,
    CurvatureName,
    Factory,
    most_iterations,
    suited_preconditioner,
)
from torch_secondorder._optim.flat import Descent, DescentInfo, FlatOptimizer, Point
from torch_secondorder._optim.info import StepStatus
from torch_secondorder._optim.quadratic_model import (
    Memory,
    Model,
    Move,
    Tally,
    damped,
    point_of,
    searched,
    take,
    within_radius,
)
from torch_secondorder._optim.state import Choice, Nested, Number, Random, Vector, declare
from torch_secondorder.curvature import UnknownOutputs
from torch_secondorder.globalization import (
    DampingRule,
    Globalization,
    GlobalizationName,
    TrustRegion,
    resolve_globalization,
)
from torch_secondorder.solvers import (
    CG,
    LinearSolver,
    Preconditioner,
    PreconditionerName,
    SolveResult,
    SolverName,
    SolveStatus,
    resolve_preconditioner,
    resolve_solver,
)

__all__ = ["NewtonCG", "NewtonCGInfo"]

# Most iterations of a solver by name.
_MOST_ITERATIONS = 250
# Iterations without a new best loss or gradient after which only rounding error is left.
_PATIENCE = 5
# Iterates of conjugate gradients to choose from. Each takes the memory of a vector.
_ITERATES = 4
# The constant of Martens' rule for the end of conjugate gradients.
_PROGRESS = 5e-4
# The largest relative residual to solve a system to, and the one for the first system, before it is
# known how fast the gradient falls.
_FORCING, _FIRST_FORCING = 0.3, 0.5


@dataclass(frozen=True, slots=True)
class NewtonCGInfo(DescentInfo):
    """Report of one step of `NewtonCG`.

    Attributes:
        products: Products with the curvature; those by finite differences show as evaluations.
        solver_status: How the last linear solver ended; None without one.
        solver_iterations: Iterations of linear solvers.
        gain_ratio: The decrease of the loss in the last move over the one that the quadratic model
            predicted; None if undefined.
        damping: The damping of the next system; 0 without any.
        trust_radius: The trust radius of the next model; 0 without one.
        negative_curvature: The lowest curvature `p'A p / p'p` along a direction met, if negative.
        curvature: The last curvature: `"ggn"`, `"hessian"`, `"hessian by differences"`,
            `"fisher"`, `"empirical_fisher"`, or `"own"`.
        preconditioner: The class of the preconditioner; empty for none.
        repair: A sentence about curvature or preconditioners that were not finite and how they
            were replaced; empty if all was finite.

    >>> import torch
    >>> x = torch.tensor([3.0, 1.0], dtype=torch.float64, requires_grad=True)
    >>> optimizer = NewtonCG([x])
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = (x**4).sum()
    ...     loss.backward()
    ...     return loss
    >>> loss = optimizer.step(closure)
    >>> optimizer.info.solver_iterations, optimizer.info.curvature, optimizer.info.preconditioner
    (1, 'hessian', '')
    """

    products: int = 0
    solver_status: SolveStatus | None = None
    solver_iterations: int = 0
    gain_ratio: float | None = None
    damping: float = 0.0
    trust_radius: float = 0.0
    negative_curvature: float = 0.0
    curvature: str = ""
    preconditioner: str = ""
    repair: str = ""


class _Suited(Choice):
    """The name of the preconditioner that suits, where it was left to the optimizer."""

    def set(self, optimizer: NewtonCG, value: str) -> None:
        """See `ModelField.set`."""
        if optimizer._chosen is not None:
            optimizer._chosen, optimizer.preconditioner = (
                value,
                resolve_preconditioner(value or None),
            )


class NewtonCG(FlatOptimizer):
    """Newton-CG (Hessian-free optimization), from curvature products of the same closure.

    In each iteration the loss is modelled by `f + g'd + d'B d / 2`, where the curvature `B` is
    known only through products with vectors: the Gauss-Newton matrix, the Hessian or the Fisher
    matrix. Conjugate gradients solve `(B + damping * I) d = -g`, or minimize the model within a
    trust radius, or a line search decides how much of the result is taken. The closure is the
    standard one.

    References: Martens 2010, "Deep learning via Hessian-free optimization"; Steihaug 1983, "The
    conjugate gradient method and trust regions in large scale optimization".

    Args:
        params: Parameters or groups. A group may have its own `lr` and `weight_decay`.
        lr: The share of each solution that is tried first; 1 for Newton's step. If groups differ,
            each group's part of the metric is scaled by its share of the largest.
        curvature: `"auto"` for the best that the closure allows: the Gauss-Newton matrix if the
            model's outputs are found, else the Hessian, by differences of gradients if the graph
            has no second derivative; `info.curvature` says which. If part of the loss bypasses the
            outputs, the first direction of negative curvature changes it to the Hessian.
            `"ggn"` for the Gauss-Newton matrix, which is positive semidefinite for convex losses;
            `"hessian"`; `"fisher"` (labels drawn from the model) or `"empirical_fisher"`; or a
            function that takes an `Evaluation` and returns a `LinearOperator`.
        max_iter: Iterations per `step()`. More than one make sense on the full data only.
        globalization: `"damping"` for Levenberg-Marquardt damping, `"trust_region"`,
            `"line_search"` or the name of a line search, or an instance (`MarquardtDamping`,
            `TrustRegion`, a `LineSearch`).
            By default a trust region for the Hessian, and damping for all others; if `"auto"`
            changes the curvature, the globalization changes with it and begins anew.
        damping: With Levenberg-Marquardt damping, its first value, in the units of the curvature;
            by default 0.03 times the curvature along the first gradient, whatever the unit of the
            loss. Otherwise a constant that is added to the curvature, 0 by default.
        preconditioner: `"auto"` for one that suits curvature and model (Nyström up to 2,000
            parameters, K-FAC above, for networks of linear layers with a Gauss-Newton matrix);
            `"kfac"` (networks of linear layers), `"nystrom"` (few parameters, costly losses),
            `"martens"` (a diagonal), a `Preconditioner`, or None for none.
        solver: `"cg"`, `"minres"`, or a `LinearSolver`. A trust region needs conjugate gradients.
        max_cg_iter: Most iterations of the solver for one system; by default 5 with `"kfac"`, which
            are enough for a good step, and 250 otherwise.
        max_eval: Most evaluations of the closure per `step()`, including those of differences;
            unlimited by default.
        tolerance_grad: The step ends once no entry of the gradient is larger. By default `1e-7`,
            times the largest entry seen so far where that is below one.
        tolerance_change: The step ends once an iteration changes both the loss and the parameters
            by no more than this, relative to their size.
        weight_decay: Coefficient of `|theta|^2 / 2`, added to the loss.
        maximize: Whether to maximize the closure's loss.
        curvature_products: `"autograd"`, or `"finite_difference"` for models with operations that
            cannot be differentiated twice. Differences of gradients are products with the Hessian
            of the whole loss, whatever `curvature` says. Sharded parameters (`fully_shard`) always
            get them.
        seed: The seed of the random numbers used by `"fisher"` and preconditioners.

    Raises:
        TypeError: A parameter is neither floating-point nor complex, or a strategy has a wrong
            type.
        ValueError: A hyperparameter is out of range, or a name is unknown.

    >>> import torch
    >>> x = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
    >>> optimizer = NewtonCG([x], max_iter=50)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
    ...     loss.backward()
    ...     return loss
    >>> round(float(optimizer.step(closure)), 6)
    24.2
    >>> optimizer.info.status.name, [round(v, 6) for v in x.tolist()]
    ('CONVERGED_GRADIENT', [1.0, 1.0])
    >>> optimizer.info.curvature
    'hessian'
    """

    info: NewtonCGInfo | None
    _info_type = NewtonCGInfo
    _takes_manifolds = True
    _recognized_by = "max_cg_iter"
    _state_fields = declare(
        damping=Number(0.0, "_memory.damping"),
        radius=Number(0.0, "_memory.radius"),
        length=Number(0.0, "_memory.length"),
        start=Number(0.0, "_memory.start"),
        kind=Choice(KINDS, "_choice.kind"),
        indefinite=Number(False, "_choice.indefinite"),
        chosen=_Suited(SUITED),
        direction=Vector("_memory.direction"),
        sizes=Vector("_memory.sizes"),
        generator=Random(),
        preconditioner=Nested("preconditioner"),
    )
    _chosen: str | None
    preconditioner: Preconditioner | None
    _carried = (
        "curvature",
        "curvature_products",
        "globalization",
        "preconditioner",
        "solver",
        "_constant_damping",
        "_choice",
        "_chosen",
        "_rules",
        "_seed",
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        curvature: CurvatureName | Factory = "auto",
        max_iter: int = 1,
        *,
        globalization: GlobalizationName | Globalization | None = None,
        damping: float | None = None,
        preconditioner: Literal["auto"] | PreconditionerName | Preconditioner | None = "auto",
        solver: SolverName | LinearSolver = "cg",
        max_cg_iter: int | None = None,
        max_eval: int | None = None,
        tolerance_grad: float | None = None,
        tolerance_change: float = 1e-9,
        weight_decay: float = 0.0,
        maximize: bool = False,
        curvature_products: Literal["autograd", "finite_difference"] = "autograd",
        seed: int = 0,
    ) -> None:
        check_integer("max_cg_iter", max_cg_iter, optional=True, whole_floats=True)
        check_number("damping", damping, low=0.0, optional=True)
        if not callable(curvature):
            others = "a function from an Evaluation to a LinearOperator"
            check_choice("curvature", curvature, CurvatureName, others)
        check_choice("curvature_products", curvature_products, ("autograd", "finite_difference"))
        self.curvature = curvature
        check_integer("seed", seed, low=0, whole_floats=True)
        defaults = {
            "lr": lr,
            "max_iter": max_iter,
            "max_cg_iter": max_cg_iter,
            "max_eval": max_eval,
            "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults)
        if self._sharded:
            _check_sharded(curvature, preconditioner, curvature_products)
            curvature_products = "finite_difference"
            preconditioner = None
        self.curvature_products = curvature_products
        self.solver = resolve_solver(
            solver, _MOST_ITERATIONS if max_cg_iter is None else max_cg_iter
        )
        trusts = self.solver is None or curvature == "hessian"  # else it says what to do
        trusts = trusts or curvature_products == "finite_difference"
        #: Without and with a curvature that may be indefinite.
        self._rules = (
            resolve_globalization(globalization, damping, False),
            resolve_globalization(globalization, damping, trusts),
        )
        uses_hessian = curvature == "hessian" or curvature_products == "finite_difference"
        self.globalization = self._rules[uses_hessian]
        self._chosen = "" if preconditioner == "auto" else None
        self.preconditioner = resolve_preconditioner(
            None if self._chosen is not None else preconditioner
        )
        by_differences = curvature_products == "finite_difference"
        self._choice = CurvatureChoice(
            curvature, by_differences, self.preconditioner, self._chosen is not None
        )
        if self.solver is not None and isinstance(self.globalization, TrustRegion):
            raise ValueError(
                f"a trust region needs solver='cg', got {solver!r}; use globalization='damping'"
            )
        self._constant_damping = damping or 0.0
        self._seed = seed
        self._memory = self._fresh_memory()

    @overload  # type: ignore[override]
    def step(self, closure: StepClosure, curvature_closure: Closure | None = None) -> Tensor: ...

    @overload
    def step(
        self, closure: StepClosure | None = None, curvature_closure: Closure | None = None
    ) -> Tensor | None: ...

    def step(self, closure: Any = None, curvature_closure: Closure | None = None) -> Tensor | None:
        """Performs one step.

        Args:
            closure: The standard closure (zero the gradients, compute the loss, call `backward()`,
                return the loss), or a `FunctionalObjective`. It gives loss and gradient.
            curvature_closure: Another closure that the products come from, for instance of the same
                loss on a part of the batch; the same one by default.

        Returns:
            The closure's loss at the start of the step, detached.

        Raises:
            RuntimeError: There is no closure, no gradient reached the parameters, no model output
                was found, or an operation has no second derivative.
            TypeError: The closure returned something else than a loss.
            ValueError: The closure's loss is not a scalar, or a `curvature_closure` was given where
                products are finite differences.
        """
        if closure is None:
            curvature_closure = None
        if curvature_closure is not None and self.curvature_products == "finite_difference":
            raise ValueError(
                "curvature_closure does not go with curvature_products='finite_difference': its "
                "products are differences of the closure's own gradients"
            )
        return self._run(closure, curvature_closure)

    def _evaluate(self, objective: Objective) -> tuple[Evaluation, Point]:
        most = self.param_groups[0].get("max_eval")  # older checkpoints have none
        objective.limit = inf if most is None else most
        self._choice.begin(objective)
        evaluation = self._choice.evaluate(objective)
        return evaluation, point_of(evaluation, objective)

    def _begin(self, descent: Descent) -> None:
        descent.patience = _PATIENCE
        self._random(descent.objective.vector.device)
        self._tally, self._gain_ratio = Tally(), nan

    def _finish(self, objective: Objective, descent: Descent | None) -> dict[str, Any]:
        memory = self._memory
        if descent is None:
            memory.direction = None
            return {"curvature": self._choice.kind}
        tally = self._tally
        trusts = isinstance(self.globalization, TrustRegion)
        return {
            "products": tally.products,
            "solver_status": tally.solver_status,
            "solver_iterations": tally.solver_iterations,
            "gain_ratio": self._gain_ratio if isfinite(self._gain_ratio) else None,
            "damping": memory.damping,
            "trust_radius": memory.radius if trusts else 0.0,
            "negative_curvature": tally.negative_curvature,
            "curvature": self._choice.kind,
            "preconditioner": type(self.preconditioner).__name__ if self.preconditioner else "",
            "repair": tally.repair,
        }

    # The iterations of one step.

    def _iterate(self, descent: Descent) -> StepStatus | None:
        # Vectors and the graph are freed when an iteration ends: keep no reference to them.
        objective = descent.objective
        if objective.evaluations >= objective.limit:
            return StepStatus.MAX_EVALUATIONS
        if descent.point.evaluation is None:  # the trial has given the loss, but no graph
            try:
                evaluation = self._choice.evaluate(objective)
            except EvaluationsSpent:
                return StepStatus.MAX_EVALUATIONS
            descent.point = point_of(evaluation, objective)
            del evaluation
        found = self._next_move(descent)
        self._memory.length = descent.point.length
        if isinstance(found, Move):
            self._take(descent, found)
        if self._tally.unbounded:
            return StepStatus.UNBOUNDED
        return None if isinstance(found, Move) else found

    def _next_move(self, descent: Descent) -> Move | StepStatus:
        """A move by the chosen curvature, or by the next kind if its products fail."""
        choice, generator = self._choice, self._generator
        assert generator is not None
        while True:
            drawn = generator.get_state() if choice.automatic else None
            before = replace(self._memory, direction=None)  # without its vector
            try:
                return self._move(descent)
            except EvaluationsSpent:
                return StepStatus.MAX_EVALUATIONS
            except (MissingSecondDerivative, UnknownOutputs) as error:
                if not choice.falls_back(error, descent.objective):
                    raise
            # Back to the state before the attempt, which the next step may not repeat.
            self._memory.begin_anew(before)
            if drawn is not None:
                generator.set_state(drawn)

    def _move(self, descent: Descent) -> Move | StepStatus:
        objective, choice = descent.objective, self._choice
        assert descent.point.evaluation is not None and self._generator is not None
        memory = self._memory
        operator = choice.operator(
            objective, descent.point.evaluation, self._generator, memory.noted_sizes
        )
        rule, suited = self._suited(operator.size)
        preconditioner = suited
        if suited is not None:
            try:
                self._tally.products += suited.refresh(operator, self._generator)
            except FloatingPointError:
                preconditioner = None
                self._tally.repair = (
                    "what the preconditioner is made of was not finite, it was left out"
                )
        model = Model(
            descent,
            operator,
            self._solver_at(descent, rule, preconditioner),
            None if preconditioner is None else preconditioner.inverse,
            self._tally,
            # Trials keep their graph where it is used again and has room beside that of the point.
            descent.count + 1 < descent.max_iter
            and choice.kind != DIFFERENCES
            and objective.has_room_for_a_graph(),
        )
        if preconditioner is not suited and isinstance(rule, TrustRegion):
            # The radius is a length in the metric of the preconditioner that was left out.
            memory = replace(memory, radius=0.0)
        try:
            if isinstance(rule, DampingRule):
                return damped(model, rule, memory, descent.lr)
            if isinstance(rule, TrustRegion):
                return within_radius(model, rule, memory, descent.lr)
            return searched(model, rule, memory, descent.lr)
        finally:
            choice.met(self._tally.negative_curvature)

    def _solver_at(
        self, descent: Descent, rule: Globalization, preconditioner: Preconditioner | None
    ) -> Callable[..., SolveResult]:
        """Conjugate gradients with a tolerance that suits this point.

        The relative residual to reach falls with the square of the ratio of the last two gradients
        (Eisenstat and Walker 1996, choice 2), so that convergence is quadratic at the end and early
        systems are not solved more accurately than needed.
        """
        if self.solver is not None:
            return self.solver
        length = self._memory.length
        forcing = _FIRST_FORCING
        if length < inf:
            fall = descent.point.length / length
            forcing = min(_FORCING, max(0.9 * fall**2, 1e-12))
        objective = descent.objective
        most: int | None = self.param_groups[0]["max_cg_iter"]
        if most is None:
            most = most_iterations(preconditioner)
        if self._choice.kind == DIFFERENCES and objective.limit < inf:
            # A product takes at least two evaluations, and a trial takes one.
            most = min(most, max(int(objective.limit - objective.evaluations - 1) // 2, 1))
        if not isinstance(rule, DampingRule):
            return CG(most, tolerance=forcing, overwrites=True)
        return CG(
            most,
            tolerance=1e-12,
            progress=_PROGRESS,
            slack=forcing,
            keep_iterates=True,
            most_iterates=_ITERATES,
            overwrites=True,
        )

    def _take(self, descent: Descent, move: Move) -> None:
        """Moves the parameters."""
        take(descent, move)
        self._gain_ratio = move.gain_ratio

    def _suited(self, size: int) -> tuple[Globalization, Preconditioner | None]:
        """Globalization and preconditioner for the curvature that was found."""
        found = self._choice
        rule = self._rules[found.kind in ("hessian", DIFFERENCES)]
        self.globalization = rule
        if self._memory.rule is not rule:
            self._memory.begin_anew(self._fresh_memory())
        if self._chosen is not None:
            name = suited_preconditioner(found, size)
            if (name or "") != self._chosen:
                self._chosen, self.preconditioner = name or "", resolve_preconditioner(name)
        return rule, self.preconditioner

    # State.

    def _forget(self, reason: str) -> None:
        self._memory = self._fresh_memory()
        if self.preconditioner is not None:
            self.preconditioner.load_state_dict({})

    def _fresh_memory(self) -> Memory:
        rule = self.globalization
        if isinstance(rule, DampingRule):
            return Memory(rule.initial or 0.0, 0.0, start=rule.initial or 0.0, rule=rule)
        start = (rule.initial or 0.0) if isinstance(rule, TrustRegion) else 0.0
        return Memory(self._constant_damping, start, start=start, rule=rule)

    def _reset_state(self) -> None:
        super()._reset_state()
        self._memory = self._fresh_memory()
        self._choice.kind, self._choice.indefinite = "", False

    def _import_state(self, found: dict[str, Any]) -> None:
        # States of earlier releases have no start; their bounds were absolute.
        super()._import_state({"start": 1.0} | found if "damping" in found else found)
        if self._choice.kind:
            self.globalization = self._rules[self._choice.kind in ("hessian", DIFFERENCES)]
        self._memory.rule = self.globalization


def _check_sharded(curvature: Any, preconditioner: Any, curvature_products: str) -> None:
    """Says what does not go with sharded parameters, whose products are finite differences."""
    if callable(curvature):
        raise ValueError(
            "a curvature of one's own is made from a retained graph, and the hooks of fully_shard "
            "leave none for sharded parameters: use curvature='hessian'"
        )
    if preconditioner not in ("auto", None):
        raise ValueError(
            f"preconditioner={preconditioner!r} needs whole vectors or a retained graph, and there "
            "are neither for sharded parameters: leave it out"
        )
    if curvature not in ("auto", "hessian") and curvature_products == "autograd":
        warnings.warn(
            f"for sharded parameters products are finite differences of gradients, and so with the "
            f"Hessian of the whole loss instead of curvature={curvature!r}; say "
            "curvature='hessian' to agree",
            stacklevel=3,
        )
