"""The report of a step: how it ended, and what it did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from torch_secondorder.globalization import SearchStatus
from torch_secondorder.solvers import SolveStatus

__all__ = ["LazyInfo", "StepInfo", "StepStatus"]


class StepStatus(Enum):
    """How a step ended, each with what it means."""

    MOVED = "one update was made"
    MOVED_ON_OLD_CURVATURE = (
        "one update was made with the curvature of an earlier step: the new products were not "
        "finite and were left out"
    )
    NO_CURVATURE = (
        "no parameter with a gradient has a curvature yet; the parameters were left alone, and the "
        "next step estimates it"
    )
    NOTHING_TO_TRAIN = (
        "no parameter requires a gradient; the closure was evaluated once and nothing else was done"
    )
    ZERO_LEARNING_RATE = "lr is zero: the loss was evaluated and nothing was moved"
    MAX_ITERATIONS = "all max_iter iterations were done; call step() again to go on"
    MAX_EVALUATIONS = "max_eval closure evaluations were used; call step() again to go on"
    CONVERGED_GRADIENT = "no entry of the gradient is larger than tolerance_grad"
    CONVERGED_CHANGE = (
        "the last iteration changed neither the parameters nor the loss by more than "
        "tolerance_change, relative to their size"
    )
    STALLED = (
        "neither the loss nor the gradient has improved for several iterations: what is left is "
        "rounding error; a wider dtype can get further"
    )
    UNBOUNDED = (
        "the loss falls without end: a trial gave minus infinity, or ten orders of magnitude "
        "farther than the first trial the loss still fell as steeply as at the start; the "
        "parameters are at the lowest point found where all is finite"
    )
    NO_DECREASE = (
        "no lower loss was found, not even along the negative gradient with the history dropped; "
        "the parameters are at the best point found"
    )
    NONFINITE_START = (
        "loss or gradient at the start of the step is not finite; the parameters were left alone, "
        "and an L-BFGS history was dropped"
    )
    NONFINITE_PRODUCTS = (
        "products with the curvature were not finite; the parameters are at the best point found, "
        "which is where the step began if it is the first product"
    )
    NONFINITE_TRIALS = (
        "every trial gave a non-finite loss or gradient, even close to the best point found, where "
        "the parameters are; the history was dropped"
    )


@dataclass(frozen=True, slots=True)
class StepInfo:
    """What one call of `step()` did; `optimizer.info` holds the last one.

    Attributes:
        status: How it ended; `status.value` is a sentence.
        loss: What was minimized at the start of the step: the closure's loss, negated under
            `maximize`, weight decay included.
        loss_after: The same at the end; None where the step did not evaluate it.
        grad_norm: Largest absolute entry of the last gradient; None where it is gone (`AdaHessian`
            and `Sophia` look at `p.grad` when `info` is read).
        iterations: Accepted moves.
        evaluations: Closure evaluations.
        step_length: The last accepted step, as a multiple of its direction.
        search_status: How the last line search ended; None without one.
        nonfinite_trials: Evaluations with a non-finite loss or gradient, stepped back from.
        skipped_pairs: Pairs that failed the curvature test and were left out of the history.
        damped_pairs: Pairs that were changed by Powell's damping.
        history_reset: Why the history was dropped during the step; empty if it was not.
        products: Products with the curvature; those by finite differences show as evaluations.
        solver_status: How the last linear solver ended; None without one.
        solver_iterations: Iterations of linear solvers.
        gain_ratio: What the loss fell by in the last move, over what the quadratic model promised;
            None where that is no number.
        damping: The damping that the next system begins with; 0 without any.
        trust_radius: The radius that the next model begins with; 0 without one.
        unclipped: The share of entries whose update `Sophia` did not clip; None elsewhere.
        negative_curvature: The lowest curvature `p'A p / p'p` along a direction met, if negative.
        curvature: What `NewtonCG` multiplied with last: `"ggn"`, `"hessian"`,
            `"hessian by differences"`, `"fisher"`, `"empirical_fisher"`, or `"own"`.
        preconditioner: The class of its preconditioner; empty for none.
        repair: What of the curvature or its preconditioner was not finite, and what `NewtonCG` did
            about it, the last time in the step; empty if all was finite.
    """

    status: StepStatus
    loss: float
    loss_after: float | None
    grad_norm: float | None
    iterations: int = 0
    evaluations: int = 0
    step_length: float = 0.0
    search_status: SearchStatus | None = None
    nonfinite_trials: int = 0
    skipped_pairs: int = 0
    damped_pairs: int = 0
    history_reset: str = ""
    products: int = 0
    solver_status: SolveStatus | None = None
    solver_iterations: int = 0
    gain_ratio: float | None = None
    damping: float = 0.0
    trust_radius: float = 0.0
    negative_curvature: float = 0.0
    unclipped: float | None = None
    curvature: str = ""
    preconditioner: str = ""
    repair: str = ""


class LazyInfo:
    """A report that is made when it is first asked for, and kept.

    Args:
        make: Makes it.
    """

    def __init__(self, make: Callable[[], StepInfo]) -> None:
        self._make: Callable[[], StepInfo] | None = make
        self._made: StepInfo | None = None

    def __call__(self) -> StepInfo | None:
        """The report."""
        if self._make is not None:
            self._made, self._make = self._make(), None
        return self._made
