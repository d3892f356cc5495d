"""The result of a minimization: a dict with attributes, as SciPy's."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torch_secondorder._optim.info import StepInfo, StepStatus

#: The status integer and the message for each way to end. The integers below 100 that SciPy's BFGS
#: has mean the same.
ENDINGS: dict[StepStatus, tuple[int, str]] = {
    StepStatus.CONVERGED_GRADIENT: (0, "no entry of the (projected) gradient is larger than gtol"),
    StepStatus.CONVERGED_CHANGE: (
        0,
        "the last iteration changed neither x nor the function by more than ftol, relative to "
        "their size",
    ),
    StepStatus.NOTHING_TO_TRAIN: (0, "x0 has no entries; the function was evaluated once"),
    StepStatus.MAX_ITERATIONS: (1, "all maxiter iterations were done"),
    StepStatus.MAX_EVALUATIONS: (1, "maxfun evaluations were used"),
    StepStatus.ZERO_LEARNING_RATE: (1, "lr is zero: the function was evaluated, nothing moved"),
    StepStatus.STALLED: (
        2,
        "neither the function nor the gradient has improved for several iterations: what is left "
        "is rounding error; a wider dtype or a more accurate gradient can get further",
    ),
    StepStatus.NO_DECREASE: (
        2,
        "no lower value was found, not even along the negative gradient; x is the best point found",
    ),
    StepStatus.NONFINITE_START: (3, "the function or its gradient is not finite at x0"),
    StepStatus.NONFINITE_TRIALS: (
        3,
        "every trial gave a non-finite value or gradient, even close to the best point found, "
        "which is x",
    ),
    StepStatus.NONFINITE_PRODUCTS: (
        3,
        "second derivatives were not finite; x is the best point found",
    ),
    StepStatus.UNBOUNDED: (
        4,
        "the function falls without end; x is the lowest point found where all is finite",
    ),
    StepStatus.STOPPED: (99, "the callback raised StopIteration"),
}


class OptimizeResult(dict[str, Any]):
    """Result of `minimize`, with the fields of SciPy's; `result.x` and `result["x"]` are the same.

    From `constr` on, fields are there with constraints only.

    Args:
        **fields: What it holds, see below.

    Attributes:
        x: The point where the minimization ended: a tree like `x0`, of the same dtypes and devices.
        fun: The function there, a float.
        jac: The gradient there, a tree like `x0`.
        success: Whether the minimization has converged.
        status: 0 for success; 1 if `maxiter` or `maxfun` ended it; 2 if rounding errors did; 3 for
            values that are not finite; 4 if the function falls without end; 5 if the constraints
            could not be satisfied; 99 if the callback stopped it.
        message: A sentence about the end.
        nit: Iterations.
        nfev: Evaluations of the function, including those of finite differences.
        njev: Gradients. An exact gradient comes with each evaluation.
        nhev: Hessians, or products with one for methods that never form it.
        info: The report of the optimizer, a `StepInfo` of its own class; with constraints of its
            last step, but with all iterations and evaluations.
        constr: The values of each constraint, in the shapes of its function. With bounds, `x` is
            the last one.
        constr_violation: The largest violation of a constraint.
        v: The multipliers of each constraint, shaped like `constr`, with SciPy's signs: the
            gradient of the Lagrangian is `jac` plus the sum of each constraint's `J'v`. An entry is
            positive if its upper bound keeps the function from falling, and negative if its lower
            bound does. To first order, the lowest value changes by `-v` for each unit that the
            bound of an entry is raised.
        multipliers: The multipliers by the constraints' names, without those of the bounds: the
            keys of the dict that they were given in, else `constraints[0]` and so on.
        optimality: The largest entry of the gradient of the Lagrangian, zero at a solution.
        complementarity: The largest product of a multiplier and the distance to its bound.
        lagrangian_grad: The gradient of the Lagrangian, a tree like `x0`.
        constr_nfev: Evaluations of each constraint.
        constr_njev: Jacobians of each constraint.

    >>> result = OptimizeResult(fun=0.5, success=True)
    >>> result.fun, result["success"]
    (0.5, True)
    >>> print(result)
        fun: 0.5
    success: True
    """

    x: Any
    fun: float
    jac: Any
    success: bool
    status: int
    message: str
    nit: int
    nfev: int
    njev: int
    nhev: int
    info: StepInfo
    constr: list[Any]
    constr_violation: float
    v: list[Any]
    multipliers: dict[str, Tensor]
    optimality: float
    complementarity: float
    lagrangian_grad: Any
    constr_nfev: list[int]
    constr_njev: list[int]

    def __init__(self, **fields: Any) -> None:
        super().__init__(fields)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"an OptimizeResult has no {name!r}, it has {', '.join(self)}"
            ) from None

    __setattr__ = dict.__setitem__
    __delattr__ = dict.__delitem__

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self]

    def __repr__(self) -> str:
        """A table of the fields, one to a line."""
        width = max(map(len, self), default=0)
        lines = []
        for name, value in self.items():
            if isinstance(value, StepInfo):
                text = f"{type(value).__name__} with status {value.status.name}"
            else:
                text = f"{value:.10g}" if isinstance(value, float) else str(value)
            lines.append(f"{name:>{width}}: " + text.replace("\n", "\n" + " " * (width + 2)))
        return "\n".join(lines) or "OptimizeResult()"


class LeastSquaresResult(OptimizeResult):
    """Result of `least_squares`, with the fields of SciPy's.

    Args:
        **fields: What it holds, see below.

    Attributes:
        x: The solution: like `x0`, of the same dtype and device.
        cost: The cost there, half the sum of squares for the linear loss; a float.
        fun: The residuals there, of the shape that `fun` returns.
        jac: Their Jacobian there, of shape `(*fun.shape, *x.shape)`; a tree of these if `x0` is a
            tree. With another loss than the linear one, rows are multiplied by the roots of its
            curvatures, so that `J'J` still approximates the Hessian of the cost.
        grad: The gradient of the cost there, like `x`.
        optimality: The largest absolute entry of the gradient; within bounds of its projection.
        active_mask: For each entry of `x` -1 at its lower bound, 1 at its upper bound, else 0.
        success: Whether the iteration has converged.
        status: 1, 2 or 3 if `gtol`, `ftol` or `xtol` was met, 4 for both of the latter; 0 if
            `max_nfev` ended it; -2 if the callback stopped it; -3 for values that are not finite;
            -4 if no step lowered the cost.
        message: A sentence about the end.
        nit: Iterations.
        nfev: Evaluations of `fun`, with those of finite differences.
        njev: Jacobians, with that of this result.
        info: The report of the optimizer, a `LevenbergMarquardtInfo`.

    >>> import torch
    >>> from torch_secondorder import least_squares
    >>> result = least_squares(lambda x: x**2 - 4, torch.tensor([1.0], dtype=torch.float64))
    >>> result.success, [round(value, 6) for value in result.x.tolist()]
    (True, [2.0])
    """

    cost: float
    fun: Any
    grad: Any
    optimality: float
    active_mask: Any


def ending(status: StepStatus) -> dict[str, Any]:
    """The fields of a result that say how the minimization ended."""
    number, message = ENDINGS.get(status, (2, status.value))
    return {"success": number == 0, "status": number, "message": message}
