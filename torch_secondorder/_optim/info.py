"""The report of a step: how it ended, and what it did."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from torch_secondorder._foundation.report import Report as Report


class StepStatus(Enum):
    """The ways a step can end, each with a sentence."""

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
    #: If there are bounds, the gradient is the projected one. With constraints in `LBFGS` and
    #: `BFGS` it is that of the Lagrangian, and the constraints hold.
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
    INFEASIBLE = (
        "the constraints contradict each other, at least near these parameters: no small move "
        "lessens the sum of the squared violations, and the multipliers have grown; start "
        "elsewhere, or relax a constraint"
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
    STOPPED = "the callback of `minimize` ended it; the parameters are at the last iterate"


#: Fields that the reports of all optimizers had in the last release, with the values that they had
#: for optimizers to which they do not apply.
_FORMER_FIELDS = {
    "step_length": 0.0,
    "search_status": None,
    "nonfinite_trials": 0,
    "skipped_pairs": 0,
    "damped_pairs": 0,
    "history_reset": "",
    "products": 0,
    "solver_status": None,
    "solver_iterations": 0,
    "gain_ratio": None,
    "damping": 0.0,
    "trust_radius": 0.0,
    "negative_curvature": 0.0,
    "unclipped": None,
    "curvature": "",
    "preconditioner": "",
    "repair": "",
}


@dataclass(frozen=True, slots=True)
class StepInfo(Report):
    """Report of one call of `step()`; `optimizer.info` holds the last one.

    Each optimizer has a subclass with the fields that mean something there.

    Attributes:
        status: The way it ended; `status.value` is a sentence.
        loss: The minimized function at the start of the step: the closure's loss, negated if you
            `maximize`, with weight decay.
        loss_after: The same at the end; None if the step did not evaluate it.
        grad_norm: Largest absolute entry of the last gradient; None if the gradients are gone
            (`AdaHessian` and `Sophia` look at `p.grad` when you read `info`).
        iterations: Accepted moves.
        evaluations: Closure evaluations.

    >>> print(StepInfo(StepStatus.MAX_ITERATIONS, 12.5, 0.25, 0.5, iterations=20, evaluations=23))
    StepInfo
      status       MAX_ITERATIONS: all max_iter iterations were done; call step() again to go on
      loss         12.5
      loss_after   0.25
      grad_norm    0.5
      iterations   20
      evaluations  23
    """

    status: StepStatus
    loss: float
    loss_after: float | None
    grad_norm: float | None
    iterations: int = 0
    evaluations: int = 0

    if not TYPE_CHECKING:  # a type checker reports such fields

        def __getattr__(self, name: str) -> Any:
            """The former default of a field that does not apply to the optimizer."""
            kind = type(self).__name__
            if name not in _FORMER_FIELDS:
                raise AttributeError(f"{kind!r} object has no attribute {name!r}")
            warnings.warn(
                f"{kind} has no field {name!r}, which does not apply to its optimizer; the value "
                "of the last release will be gone in the next one: read info.as_dict().get("
                f"{name!r}) if the optimizer may be any",
                DeprecationWarning,
                stacklevel=2,
            )
            return _FORMER_FIELDS[name]
