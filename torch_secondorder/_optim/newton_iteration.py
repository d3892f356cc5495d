"""The iterations of one Newton-CG step, without the optimizer around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf, nan

import torch

from torch_secondorder._autograd.graph import MissingSecondDerivative
from torch_secondorder._objective.base import EvaluationsSpent, Objective
from torch_secondorder._optim.info import StepStatus
from torch_secondorder._optim.newton_choice import DIFFERENCES, Curvature, most_iterations
from torch_secondorder._optim.quadratic_model import Memory, Model, Move, Point, Tally
from torch_secondorder._optim.quadratic_moves import damped, searched, within_radius
from torch_secondorder._optim.stopping import Progress
from torch_secondorder.curvature import LinearOperator
from torch_secondorder.curvature._output_space import UnknownOutputs
from torch_secondorder.globalization import (
    Globalization,
    LevenbergMarquardt,
    SearchStatus,
    TrustRegion,
)
from torch_secondorder.solvers import CG, LinearSolver, Preconditioner, SolveResult

__all__ = ["Iteration", "Settings"]

# Iterations without a new best loss or gradient after which only rounding error is left.
_PATIENCE = 5
# Iterates of conjugate gradients to choose from; each is a vector.
_ITERATES = 4
# Martens' rule for the end of conjugate gradients.
_PROGRESS = 5e-4
# The largest relative residual that a system is solved to, and that of the first one: nothing is
# known of the gradient's fall there.
_FORCING, _FIRST_FORCING = 0.3, 0.5


@dataclass(frozen=True, slots=True)
class Settings:
    """What a step is told; the arguments of `NewtonCG` by their names, all resolved."""

    lr: float
    max_iter: int
    tolerance_grad: float
    tolerance_change: float
    max_cg_iter: int | None  # None for what suits the preconditioner
    solver: LinearSolver | None  # None for conjugate gradients as each iteration needs them
    curvature: Curvature
    suited: Callable[[int], tuple[Globalization, Preconditioner | None]]
    generator: torch.Generator


class Iteration:
    """Goes downhill from a finite point until something ends the step.

    Args:
        objective: What is minimized.
        settings: What the step is told.
        memory: What goes on from step to step.
        start: Where the objective is, evaluated with curvature.

    Attributes:
        point: Where it is now.
        count: Iterations done.
        tally: What they did.
        gain_ratio: Of the last move.
        step_length: Of the last move, as a multiple of its direction.
        search_status: How its search ended.
    """

    def __init__(
        self, objective: Objective, settings: Settings, memory: Memory, start: Point
    ) -> None:
        self.point = start
        self.count = 0
        self.tally = Tally()
        self.gain_ratio = nan
        self.step_length = 0.0
        self.search_status: SearchStatus | None = None
        self._objective = objective
        self._settings = settings
        self._memory = memory
        self._space = objective.vector.space
        (size,) = self._space.to_host(norms=[torch.linalg.vector_norm(objective.position)])
        self._progress = Progress(start.loss, start.grad_norm, size)

    def run(self) -> StepStatus:
        """Iterates; says why it ended."""
        while True:
            status = self._ending() or self._iterate()
            if status is not None:
                return status

    def _iterate(self) -> StepStatus | None:
        # Nothing of an iteration outlives it: its vectors, and its graph above all.
        if self.point.evaluation is None:  # the loss is known from the trial, the graph is not
            try:
                evaluation = self._settings.curvature.evaluate(self._objective)
            except EvaluationsSpent:
                return StepStatus.MAX_EVALUATIONS
            self.point = Point.of(evaluation, self._space)
        found = self._found()
        self._memory.length = self.point.length
        if not isinstance(found, StepStatus):
            self._take(found)
        if self.tally.unbounded:
            return StepStatus.UNBOUNDED
        return found if isinstance(found, StepStatus) else None

    def _ending(self) -> StepStatus | None:
        """Why the step is over at this point, if it is."""
        settings = self._settings
        if self.point.grad_norm <= settings.tolerance_grad:
            return StepStatus.CONVERGED_GRADIENT
        if not settings.lr:
            return StepStatus.ZERO_LEARNING_RATE
        if self._progress.change <= settings.tolerance_change:
            return StepStatus.CONVERGED_CHANGE
        if self._progress.stalled >= _PATIENCE:
            return StepStatus.STALLED
        if self.count >= settings.max_iter:
            return StepStatus.MAX_ITERATIONS
        spent = self._objective.evaluations >= self._objective.limit
        return StepStatus.MAX_EVALUATIONS if spent else None

    def _found(self) -> Move | StepStatus:
        """A move by the curvature that was asked for, or by the next that has products."""
        settings = self._settings
        while True:
            drawn = settings.generator.get_state() if settings.curvature.automatic else None
            before = replace(self._memory, direction=None)  # a vector that is not held for this
            try:
                return self._move()
            except EvaluationsSpent:
                return StepStatus.MAX_EVALUATIONS
            except (MissingSecondDerivative, UnknownOutputs) as error:
                if not settings.curvature.falls_back(error, self._objective):
                    raise
            # As if that had not been tried: another time it may not be.
            self._memory.begin_anew(before)
            if drawn is not None:
                settings.generator.set_state(drawn)

    def _move(self) -> Move | StepStatus:
        settings, memory, objective = self._settings, self._memory, self._objective
        assert self.point.evaluation is not None
        curvature = settings.curvature
        sizes = None
        if not (curvature.captures(objective) or objective.vector.sharded):
            sizes = memory.noted_sizes(objective.position)
        operator = curvature.operator(objective, self.point.evaluation, settings.generator, sizes)
        rule, suited = settings.suited(operator.size)
        preconditioner = self._refreshed(suited, operator)
        model = Model(
            objective,
            self.point,
            operator,
            self._solver(rule, preconditioner),
            None if preconditioner is None else preconditioner.inverse,
            self.tally,
            self.count + 1 < settings.max_iter and self._keeps_graphs(),
        )
        if preconditioner is not suited and isinstance(rule, TrustRegion):
            # The radius is a length in the metric of the one that was left out.
            memory = replace(memory, radius=0.0)
        try:
            if isinstance(rule, LevenbergMarquardt):
                return damped(model, rule, memory, settings.lr)
            if isinstance(rule, TrustRegion):
                return within_radius(model, rule, memory, settings.lr)
            return searched(model, rule, memory, settings.lr)
        finally:
            curvature.met(self.tally.negative_curvature)

    def _refreshed(
        self, preconditioner: Preconditioner | None, operator: LinearOperator
    ) -> Preconditioner | None:
        """The preconditioner, made for an operator; None where what it is made of is not finite."""
        if preconditioner is None:
            return None
        try:
            self.tally.products += preconditioner.refresh(operator, self._settings.generator)
        except FloatingPointError:
            self.tally.repair = "what the preconditioner is made of was not finite, it was left out"
            return None
        return preconditioner

    def _solver(
        self, rule: Globalization, preconditioner: Preconditioner | None
    ) -> Callable[..., SolveResult]:
        """Conjugate gradients that solve as well as this point deserves.

        The relative residual to reach falls with the square of the gradient's own fall (Eisenstat
        and Walker 1996, choice 2), so that convergence is quadratic at the end, and no work is
        wasted before.
        """
        settings = self._settings
        if settings.solver is not None:
            return settings.solver
        memory = self._memory
        forcing = _FIRST_FORCING
        if memory.length < inf:
            fall = self.point.length / memory.length
            forcing = min(_FORCING, max(0.9 * fall**2, 1e-12))
        most = self._most_cg_iterations(preconditioner)
        if not isinstance(rule, LevenbergMarquardt):
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

    def _most_cg_iterations(self, preconditioner: Preconditioner | None) -> int:
        most = self._settings.max_cg_iter
        if most is None:
            most = most_iterations(preconditioner)
        objective = self._objective
        if self._settings.curvature.kind == DIFFERENCES and objective.limit < inf:
            # A product takes two evaluations for each size of variables, and a trial one.
            most = min(most, max(int(objective.limit - objective.evaluations - 1) // 2, 1))
        return most

    def _keeps_graphs(self) -> bool:
        """Whether the graph of a trial has room beside that of the point."""
        if self._settings.curvature.kind == DIFFERENCES:
            return False
        return self._objective.has_room_for_a_graph()

    def _take(self, move: Move) -> None:
        """Goes where a move leads."""
        trial = move.trial
        point: Point = trial.payload
        direction = move.line.direction
        self._objective.accept(direction, trial.t, point.evaluation)
        norm, size = self._space.to_host(
            norms=[torch.linalg.vector_norm(v) for v in (direction, self._objective.position)]
        )
        moved = abs(trial.t) * norm
        # What is lost in the rounding of the parameters is no step that was kept short.
        held = move.line.held and moved > self._objective.vector.precision * size
        self._progress.note(self.point.loss, point.loss, point.grad_norm, moved, held)
        self.point = point
        self.gain_ratio = move.gain_ratio
        self.step_length = trial.t
        self.search_status = move.search_status
        self.count += 1
