"""Nonlinear conjugate gradients: the formulas of the literature, restarts, preconditioning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite, isnan, sqrt
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_callable, check_choice, check_number
from torch_secondorder._foundation.types import ParamsT
from torch_secondorder._objective.base import Objective
from torch_secondorder._optim.flat import Candidate, Descent, DescentInfo, Line, Point
from torch_secondorder._optim.line_search import LineSearchOptimizer
from torch_secondorder._optim.state import Number, Vector, declare
from torch_secondorder.curvature import LinearOperator
from torch_secondorder.globalization import HagerZhang, LineSearch, LineSearchName, StrongWolfe

__all__ = ["NonlinearCG", "NonlinearCGInfo"]

BetaName: TypeAlias = Literal[
    "shanno",
    "hager_zhang",
    "dai_kou",
    "polak_ribiere",
    "hestenes_stiefel",
    "fletcher_reeves",
    "dai_yuan",
    "hestenes_stiefel_dai_yuan",
    "fletcher_reeves_polak_ribiere",
]

# Bounds from below on beta, as a multiple of `d'g / d'd`: of Hager and Zhang 2013 (with the
# gradient before the step), and of Dai and Kou 2013 (with the one after it).
_LOWEST_HAGER_ZHANG, _LOWEST_DAI_KOU = 0.4, 0.5
# The curvature conditions `c2` of the strong Wolfe search by name, see `NonlinearCG`.
_FLAT, _FLATTER = 0.3, 0.1


class Products(NamedTuple):
    """The inner products that a formula for beta is made of.

    A step along `d` has led from a gradient `g` to `h`, and `y = h - g`; `P` is the preconditioner,
    or a number without one.

    Attributes:
        h_P_h: `h'P h`.
        h_P_y: `h'P y`.
        g_P_g: `g'P g`.
        y_P_y: `y'P y`.
        d_y: `d'y`.
        d_h: `d'h`.
        d_g: `d'g`.
        square: `d'P^-1 d`.
    """

    h_P_h: float
    h_P_y: float
    g_P_g: float
    y_P_y: float
    d_y: float
    d_h: float
    d_g: float
    square: float


def _perry(p: Products, theta: float) -> float:
    return p.h_P_y / p.d_y - theta * (p.y_P_y / p.d_y) * (p.d_h / p.d_y)


def _hager_zhang(p: Products) -> float:
    """Hager and Zhang 2005, with the bound of Hager and Zhang 2013."""
    return max(_perry(p, 2.0), _LOWEST_HAGER_ZHANG * p.d_g / p.square)


def _dai_kou(p: Products) -> float:
    """Dai and Kou 2013."""
    return max(_perry(p, 1.0), _LOWEST_DAI_KOU * p.d_h / p.square)


def _polak_ribiere(p: Products) -> float:
    """Polak and Ribière 1969, not below zero (Powell 1984)."""
    return max(p.h_P_y / p.g_P_g, 0.0)


def _hestenes_stiefel(p: Products) -> float:
    """Hestenes and Stiefel 1952, not below zero."""
    return max(p.h_P_y / p.d_y, 0.0)


def _fletcher_reeves(p: Products) -> float:
    """Fletcher and Reeves 1964."""
    return p.h_P_h / p.g_P_g


def _dai_yuan(p: Products) -> float:
    """Dai and Yuan 1999."""
    return p.h_P_h / p.d_y


def _hestenes_stiefel_dai_yuan(p: Products) -> float:
    """Dai and Yuan 2001."""
    return max(0.0, min(p.h_P_y, p.h_P_h) / p.d_y)


def _fletcher_reeves_polak_ribiere(p: Products) -> float:
    """Gilbert and Nocedal 1992."""
    return max(-p.h_P_h, min(p.h_P_y, p.h_P_h)) / p.g_P_g


_FORMULAS: dict[str, Callable[[Products], float]] = {
    "hager_zhang": _hager_zhang,
    "dai_kou": _dai_kou,
    "polak_ribiere": _polak_ribiere,
    "hestenes_stiefel": _hestenes_stiefel,
    "fletcher_reeves": _fletcher_reeves,
    "dai_yuan": _dai_yuan,
    "hestenes_stiefel_dai_yuan": _hestenes_stiefel_dai_yuan,
    "fletcher_reeves_polak_ribiere": _fletcher_reeves_polak_ribiere,
}


@dataclass(frozen=True, slots=True)
class NonlinearCGInfo(DescentInfo):
    """Report of one step of `NonlinearCG`.

    Attributes:
        beta: The last multiple of the direction before that entered a direction; of Shanno's
            method, the coefficient of the last step, in units of its direction.
        restarts: Directions that forgot the ones before.
        restart_reason: Why the last of them did; empty if there was none.

    >>> x = torch.tensor([3.0, 1.0], dtype=torch.float64, requires_grad=True)
    >>> optimizer = NonlinearCG([x])
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = x[0] ** 2 + 10 * x[1] ** 2
    ...     loss.backward()
    ...     return loss
    >>> loss = optimizer.step(closure)
    >>> optimizer.info.status.name, optimizer.info.restarts
    ('CONVERGED_GRADIENT', 0)
    """

    beta: float = 0.0
    restarts: int = 0
    restart_reason: str = ""


def _quotient(numerator: float, denominator: float) -> float:
    """The quotient, one where the denominator has underflowed."""
    return numerator / denominator if denominator else 1.0


class _Searched(NamedTuple):
    """The direction that is being searched.

    Attributes:
        g_P_g: `g'P g` at the start.
        square: `d'P^-1 d`.
        first: The first step to try, if it is known better than from the last step.
    """

    g_P_g: float
    square: float
    first: float | None


class NonlinearCG(LineSearchOptimizer):
    """Nonlinear conjugate gradients, which keep two to four vectors besides the gradient.

    Use it where the memory of `LBFGS` is too much, or where a good preconditioner is known. A
    direction is `-P g + beta d`, with the direction `d` before it, or in Shanno's method `-H g`:
    there `H` is the inverse BFGS matrix of two pairs of a step and the change of the gradient, the
    last one and the one of the last restart. On a quadratic with exact line searches all formulas
    give the same directions, those of linear conjugate gradients.

    Shanno's method is the default because it needs fewer evaluations: over 28 classical functions
    16% fewer than the best of the other formulas, and 36% fewer than SciPy's CG
    (`scripts/bench.py quasi_newton --part nonlinear_cg`).

    Reference: Shanno and Phua 1980, "Remark on Algorithm 500"; Powell 1977, "Restart procedures for
    the conjugate gradient method"; Hager and Zhang 2006, "A survey of nonlinear conjugate gradient
    methods".

    Args:
        params: Parameters or groups. A group may have its own `lr` and `weight_decay`.
        lr: Multiplies the first step that a line search tries; without a line search, the step. If
            groups differ, each group's share of the largest one is a constant preconditioner of
            the group's part.
        max_iter: Iterations per `step()`.
        max_eval: Closure evaluations per `step()`, `max_iter * 5 // 2` by default. Checked between
            iterations: a line search always finishes.
        tolerance_grad: The step ends once no entry of the gradient is larger. By default `1e-7`,
            times the largest entry seen so far if that is below one. If groups differ in `lr`, the
            gradient is that of the scaled parameters.
        tolerance_change: The step ends once an iteration changes both the loss and the parameters
            by no more than this, relative to their size.
        line_search_fn: `"strong_wolfe"`, `"hager_zhang"`, `"armijo"`, a `LineSearch`, or None for
            steps of length `lr` without a search. Conjugate directions need steps close to the
            minimum along them: by name, the first two searches stop at a smaller slope than they do
            elsewhere (`StrongWolfe(c2=0.3)` and `HagerZhang(sigma=0.3)` with Shanno's method, 0.1
            with the other formulas).
        beta: `"shanno"`, or the formula for beta: `"hager_zhang"`, `"dai_kou"`, `"polak_ribiere"`
            (not below zero), `"hestenes_stiefel"` (not below zero), `"fletcher_reeves"`,
            `"dai_yuan"`, or a hybrid, `"hestenes_stiefel_dai_yuan"` or
            `"fletcher_reeves_polak_ribiere"`.
        restart: The bound of Powell's test: a direction forgets the ones before if the new gradient
            `h` and the last one `g` are far from orthogonal, `|h'P g| >= restart * h'P h`. None for
            no test.
        preconditioner: `P`, symmetric, positive definite and close to a multiple of the inverse
            Hessian: a `LinearOperator`, such as a `Preconditioner` of `torch_secondorder.solvers`
            gives by `inverse`, or a function of a flat vector `(n,)`, in the order of the groups.
            If groups differ in `lr`, the vector belongs to the scaled parameters; under
            `fully_shard` it is the part that this process holds. Checkpoints do not contain it.
        weight_decay: Coefficient of `|theta|^2 / 2`, added to the loss.
        maximize: Whether to maximize the closure's loss.

    Raises:
        TypeError: A parameter is neither floating-point nor complex, or `line_search_fn` or
            `preconditioner` has a wrong type.
        ValueError: A hyperparameter is out of range, or a name is unknown. Also raised by `step` if
            the preconditioner returns another shape or NaN, or is not positive definite.

    >>> x = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
    >>> optimizer = NonlinearCG([x], max_iter=100)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
    ...     loss.backward()
    ...     return loss
    >>> round(float(optimizer.step(closure)), 6)
    24.2
    >>> optimizer.info.status.name, [round(v, 6) for v in x.tolist()]
    ('CONVERGED_GRADIENT', [1.0, 1.0])
    """

    info: NonlinearCGInfo | None
    _info_type = NonlinearCGInfo
    _recognized_by = "restart"
    _carried: ClassVar[tuple[str, ...]] = ("beta", "preconditioner")
    _state_fields = declare(
        direction=Vector("_direction_before"),
        difference=Vector(),
        base_step=Vector(),
        base_difference=Vector(),
        step_before=Number(0.0),
        slope=Number(0.0),
        d_y=Number(0.0),
        y_y=Number(0.0),
        g_P_g=Number(0.0),
        square=Number(0.0),
        unit=Number(1.0),
        base_s_y=Number(0.0),
        base_scale=Number(0.0),
        age=Number(0),
    )
    # The last step: its direction d, y, the length t, d'g and d'y; see `Products` for the rest.
    _direction_before: Tensor | None
    _difference: Tensor | None
    _step_before: float
    _slope: float
    _d_y: float
    _y_y: float
    _g_P_g: float
    _square: float
    _unit: float  # `P` where no preconditioner is given
    # Of Shanno's method: the pair of the last restart, s'y, s'y / y'P y, and its age in steps.
    _base_step: Tensor | None
    _base_difference: Tensor | None
    _base_s_y: float
    _base_scale: float
    _age: int

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float | None = None,
        tolerance_change: float = 1e-9,
        line_search_fn: LineSearchName | LineSearch | None = "strong_wolfe",
        *,
        beta: BetaName = "shanno",
        restart: float | None = 0.2,
        preconditioner: LinearOperator | Callable[[Tensor], Tensor] | None = None,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        check_choice("beta", beta, BetaName)
        check_number("restart", restart, above=0.0, optional=True)
        if not (preconditioner is None or isinstance(preconditioner, LinearOperator)):
            check_callable("preconditioner", preconditioner)
        self.beta, self.preconditioner = beta, preconditioner
        self._searched: _Searched | None = None  # None along the first direction
        self._beta: Tensor | float = 0.0
        self._restarts, self._restart_reason = 0, ""
        flat = _FLAT if beta == "shanno" else _FLATTER
        if line_search_fn == "strong_wolfe":
            line_search_fn = StrongWolfe(c2=flat)
        elif line_search_fn == "hager_zhang":
            line_search_fn = HagerZhang(sigma=flat)
        defaults = {
            "lr": lr,
            "max_iter": max_iter,
            "max_eval": max_eval,
            "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change,
            "restart": restart,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, line_search_fn, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        """See `SecondOrderOptimizer._check_group`."""
        super()._check_group(group)
        check_number("restart", group["restart"], above=0.0, optional=True)

    def _begin(self, descent: Descent) -> None:
        super()._begin(descent)
        group = self.param_groups[0]
        descent.max_eval = group["max_eval"] or group["max_iter"] * 5 // 2
        self._beta, self._restarts, self._restart_reason = 0.0, 0, ""

    def _finish(self, objective: Objective, descent: Descent | None) -> dict[str, Any]:
        reason = super()._finish(objective, descent)["history_reset"]
        if descent is None:
            return {"restart_reason": reason}
        self._searched = None
        return {
            "beta": float(self._beta),
            "restarts": self._restarts,
            "restart_reason": reason or self._restart_reason,
        }

    # Directions.

    def _direction(self, descent: Descent) -> Tensor | None:
        self._searched = None
        before, y = self._direction_before, self._difference
        if before is not None and y is not None:
            follow = self._memoryless if self.beta == "shanno" else self._conjugate
            return follow(descent, before, y)
        if self.preconditioner is None:
            return None
        grad = descent.point.grad
        assert grad is not None
        z = self._preconditioned(grad)
        self._check_positive("g", *descent.space.to_host(sums=[z @ grad]))
        return z.neg()

    def _conjugate(self, descent: Descent, before: Tensor, y: Tensor) -> Tensor:
        """The direction `-P h + beta d`; one synchronization."""
        grad = descent.point.grad
        assert grad is not None
        if self.preconditioner is None:
            z, sums = grad * self._unit, []
        else:
            z, sums = self._preconditioned(grad), [y @ self._preconditioned(y)]
        h_P_h, h_P_y, d_h, *more = descent.space.to_host(
            sums=[z @ grad, z @ y, before @ grad, *sums]
        )
        y_P_y = more[0] if more else self._unit * self._y_y
        self._check_positive("g", h_P_h)
        self._check_positive("y", y_P_y)
        beta, first = 0.0, None
        if not self._forgets(h_P_h, h_P_y):
            beta = self._formula(h_P_h, h_P_y, y_P_y, d_h)
        if not beta:
            # Along -P h, the curvature may be that of the last step.
            first = _quotient(self._step_before * self._d_y, y_P_y)
        square = h_P_h - 2.0 * beta * d_h + beta * beta * self._square
        self._searched, self._beta = _Searched(h_P_h, square, first), beta
        return before.mul(beta).sub_(z) if beta else z.neg()

    def _formula(self, h_P_h: float, h_P_y: float, y_P_y: float, d_h: float) -> float:
        """Beta, or zero where it is not finite."""
        products = Products(
            *(h_P_h, h_P_y, self._g_P_g, y_P_y),
            *(self._d_y, d_h, self._slope, self._square),
        )
        try:
            beta = _FORMULAS[self.beta](products)
        except ZeroDivisionError:  # squares of tiny numbers
            beta = inf
        if isfinite(beta):
            return beta
        self._note_restart("beta was not finite")
        return 0.0

    def _memoryless(self, descent: Descent, before: Tensor, y: Tensor) -> Tensor:
        """The direction `-H h` of Shanno's method; one synchronization.

        `H` is the BFGS update of `scale P` by the pair of the last restart and by the last pair, in
        the two-loop recursion.
        """
        grad, space = descent.point.grad, descent.space
        assert grad is not None
        base, of_base = self._base_step, self._base_difference
        more = [] if base is None else [base @ grad, base @ y]
        z = grad * self._unit
        h_h, h_y, d_h, *of_step = space.to_host(sums=[z @ grad, z @ y, before @ grad, *more])
        t, inner = self._step_before, d_h / self._d_y
        if not more or self._forgets(h_h, h_y):
            self._start_base(descent, before, y)
        r = torch.sub(grad, y, alpha=inner)
        if self._age and of_base is not None:
            step_h, step_y = of_step
            outer = (step_h - inner * step_y) / self._base_s_y
            r.sub_(of_base, alpha=outer)
        if self.preconditioner is not None:
            r = self._preconditioned(r)
        r = r * self._base_scale  # what a preconditioner returns may be its own
        if self._age and base is not None and of_base is not None:
            y_r, base_r = space.totals(y @ r, of_base @ r)
            back = outer - base_r / self._base_s_y
            r.addcmul_(base, back)
            y_r = y_r + step_y * back
        else:  # the last restart was just now: both pairs are the same
            y_r = space.total(y @ r)
        self._beta = y_r / self._d_y - t * inner
        self._searched = _Searched(h_h, h_h, None)
        return torch.addcmul(r.neg_(), before, self._beta)

    def _start_base(self, descent: Descent, before: Tensor, y: Tensor) -> None:
        """Makes the last pair that of the last restart."""
        y_P_y, s_y = self._y_y, self._step_before * self._d_y
        if self.preconditioner is not None:
            (y_P_y,) = descent.space.to_host(sums=[y @ self._preconditioned(y)])
            self._check_positive("y", y_P_y)
        self._base_step, self._base_difference = before * self._step_before, y
        self._base_s_y, self._base_scale, self._age = s_y, _quotient(s_y, y_P_y), 0

    def _forgets(self, h_P_h: float, h_P_y: float) -> bool:
        """Powell's test."""
        share = self.param_groups[0]["restart"]
        if share is None or abs(h_P_h - h_P_y) < share * h_P_h:
            return False
        self._note_restart("successive gradients were far from orthogonal")
        return True

    def _first_step(self, descent: Descent, line: Line) -> float:
        searched, t = self._searched, self._step_before
        if searched is None or not self._searches:
            return descent.lr
        # A step with the same first-order change as the last one had, or (with the formulas for
        # beta) would have had if it had been the best one on a parabola.
        ratio = self._slope / line.slope
        if self.beta == "shanno":
            first = min(1.0, t * ratio)
        else:
            first = -t * self._slope / self._d_y * ratio
            if searched.first is not None:
                # The two differ by orders of magnitude where scales do; neither is always right.
                first = sqrt(first) * sqrt(searched.first)
        first *= descent.lr
        return first if 0.0 < first < inf else descent.lr

    def _preconditioned(self, v: Tensor) -> Tensor:
        """`P v`; the tensor is not to be changed."""
        P = self.preconditioner
        assert P is not None
        product = P.matvec(v) if isinstance(P, LinearOperator) else P(v)
        if not isinstance(product, Tensor) or product.shape != v.shape:
            found = tuple(product.shape) if isinstance(product, Tensor) else type(product).__name__
            raise ValueError(
                f"the preconditioner must return a tensor of shape {tuple(v.shape)}, got {found}"
            )
        return product.detach().to(v)

    def _check_positive(self, name: str, square: float) -> None:
        if self.preconditioner is None:
            return
        if isnan(square):
            raise ValueError("the preconditioner returned numbers that are not finite")
        if -inf < square < 0.0:
            raise ValueError(
                f"the preconditioner is not positive definite: {name}'P {name} is {square}"
            )

    # What a step teaches.

    def _learn(self, descent: Descent, line: Line, t: float, before: Point, to: Candidate) -> None:
        assert to.point is not None and to.point.grad is not None and before.grad is not None
        searched, self._searched = self._searched, None
        y, d_y, y_y = to.y, to.y_d, to.y_y
        if y is None:
            y = to.point.grad - before.grad
        if not torch.finfo(y.dtype).tiny < y_y < inf and y.dtype == torch.float32:
            # The square is beyond the range of float32.
            (y_y,) = descent.space.to_host(sums=[y.double() @ y.double()])
        rounding = 10 * torch.finfo(y.dtype).eps * sqrt(line.square) * sqrt(y_y)
        if not rounding < d_y < inf:
            if self._restart():
                self._restart_reason = "the last step showed no curvature"
            return
        if searched is None:
            # The first direction is a multiple of -g. With a search, P is that multiple of the
            # identity: squares of gradients may be beyond the range of float32, those of steps are
            # not. Without one, P is the identity and `lr` the step; the formulas see no difference
            # between a multiple of d and one of d'g.
            plain = self.preconditioner is None
            self._unit = line.square / -line.slope if plain and self._searches else 1.0
            square = line.square if plain and not self._searches else -line.slope
            searched = _Searched(-line.slope, square, None)
        self._g_P_g, self._square = searched.g_P_g, searched.square
        self._direction_before, self._difference = line.direction, y
        self._step_before, self._slope, self._d_y, self._y_y = t, line.slope, d_y, y_y
        self._age += 1

    def _restart(self) -> bool:
        if self._direction_before is None:
            return False
        self._direction_before = self._difference = None
        self._base_step = self._base_difference = None
        self._restarts += 1
        return True

    def _note_restart(self, reason: str) -> None:
        self._restarts += 1
        self._restart_reason = reason
