"""AdaSecant: gradient steps whose rates are measured by secants on each mini-batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_choice, check_integer, check_number
from torch_secondorder._foundation.host_transfer import read_numbers
from torch_secondorder._foundation.types import ParamsT
from torch_secondorder._objective.base import Evaluation, Objective
from torch_secondorder._optim.flat import Descent, DescentInfo, FlatOptimizer, Point
from torch_secondorder._optim.info import StepStatus
from torch_secondorder._optim.state import Number, Vector, declare
from torch_secondorder._params.vector import ParameterVector

__all__ = ["AdaSecant", "AdaSecantInfo", "SecantName"]

#: How the numerator of a rate is averaged, see `AdaSecant`.
SecantName: TypeAlias = Literal["block", "coordinate"]

# The rows of the averages: of the gradient, its change and the move, each followed by that of its
# square; of the numerator and the denominator of gamma; and of change times move. Steps that do not
# evaluate twice know the first four.
_GRADIENT, _NUMERATOR, _DENOMINATOR, _CHANGE, _MOVE, _PRODUCT, _ROWS = 0, 2, 3, 4, 6, 8, 9
# Of the paper and its code: the memory after an outlier, and its bounds.
_RESET, _LEAST_MEMORY, _LARGEST_MEMORY = 2.2, 1.5, 1e8
# The share of the mean over a block that is added to E[change^2]: no rate is more than about ten
# times that of its block.
_FLOOR = 1e-2
# A block moves at most so many times as far as it has lately.
_GROWTH = 10.0
# The length of the first probe, relative to that of the parameters.
_PROBE = 1e-3
# A larger change of a gradient, relative to its length, says nothing more.
_LARGEST_CHANGE = 1e6
# Each further trial is so much shorter than one that was not finite.
_SHORTER, _TRIALS = 0.1, 10


@dataclass(frozen=True, slots=True)
class AdaSecantInfo(DescentInfo):
    """Report of one step of `AdaSecant`; `step_length` is below 1 where trials were not finite.

    Attributes:
        rate: The length of the last move over that of the gradient: the learning rate with which
            plain gradient descent would have moved as far.
        gamma: The mean weight of the average gradient against the one at hand; 0 for none.
        memory: The mean number of steps that the averages reach back.
        outliers: The share of coordinates whose memory was reset.
        probes: Evaluations that only measured the curvature of parameters that had not moved yet.

    >>> x = torch.tensor([3.0, 1.0], dtype=torch.float64, requires_grad=True)
    >>> optimizer = AdaSecant([x])
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = (x**2).sum()
    ...     loss.backward()
    ...     return loss
    >>> loss = optimizer.step(closure)
    >>> optimizer.info.rate > 0, optimizer.info.evaluations
    (True, 3)
    """

    rate: float = 0.0
    gamma: float = 0.0
    memory: float = 0.0
    outliers: float = 0.0
    probes: int = 0


class _Blocks:
    """The parameters as blocks of the flat vector, over all processes.

    Args:
        vector: The vector of the parameters.

    Attributes:
        sizes: The number of entries of each block, float64.
    """

    def __init__(self, vector: ParameterVector) -> None:
        self.vector = vector
        self._counts = [stop - start for start, stop, _ in vector.slots()]
        self._repeats = torch.tensor(self._counts, device=vector.device)
        self.sizes = vector.space.total(self._repeats.double())

    def norms(self, flat: Tensor) -> Tensor:
        """The Euclidean norm of each block, in float64, whose squares stay within range."""
        pieces = flat.split(self._counts)
        norms = torch.stack(torch._foreach_norm(pieces, 2, dtype=torch.float64))
        return self.vector.space.total(norms.square_()).sqrt_()

    def means(self, flat: Tensor) -> Tensor:
        """The mean of each block of a vector without negative entries, in float64."""
        sums = torch.stack(torch._foreach_norm(flat.split(self._counts), 1, dtype=torch.float64))
        return self.vector.space.total(sums) / self.sizes

    def spread(self, values: Tensor) -> Tensor:
        """The vector `(n,)` with the value of its block in each entry."""
        if values.dtype != torch.bool:
            values = values.to(self.vector.dtype)
        return values.repeat_interleave(self._repeats, output_size=self.vector.size)


class _Batch(NamedTuple):
    """The gradient of a mini-batch, block by block.

    Attributes:
        gradient: The gradient, each block divided by its norm.
        unit: The norms, `(n,)`; 1 where there is nothing to divide by.
        moves: True in blocks that move: their gradient is not zero, nor is their learning rate.
        rates: The learning rates of the groups, `(n,)`, or one for all.
        length: The norm of the whole gradient, in the blocks that move.
    """

    gradient: Tensor
    unit: Tensor
    moves: Tensor
    rates: Tensor | float
    length: Tensor


class _Known(NamedTuple):
    """Rates and bounds from the averages, until the gradient is evaluated twice again.

    Attributes:
        means: The averages.
        delta_clip: The bound of the rates.
        rate: The rate of each coordinate for normalized gradients, `(n,)`.
        longest: The length of the longest move of each block.
        complete: Whether all blocks have moved.
    """

    means: Tensor
    delta_clip: float | None
    rate: Tensor
    longest: Tensor
    complete: bool


class AdaSecant(FlatOptimizer):
    """Gradient steps for mini-batches, with a rate for each coordinate and none to tune.

    After some of its moves, AdaSecant evaluates the closure once more, on the same mini-batch. The
    change of the gradient tells how far a move may go. With moving averages `E`, the gradient `g`
    and its change `a` (both divided, parameter by parameter, by the norm of `g`), and the move `d`,
    coordinate `i` moves by

        g' = (g + gamma E[g]) / (1 + gamma)
        eta = sqrt(mean E[d^2]) / sqrt(E[a^2]),  d = -lr * eta * g'

    with the mean over the parameter that `i` is in. The corrected gradient `g'` has less variance
    than `g`: with `gamma` in `[0, gamma_clip]` it is as close as the averages know to the gradient
    of the next batch. The averages reach back `tau` steps,

        tau = (1 - E[d]^2 / E[d^2]) tau + 1

    so that steady moves have a short memory. Where `g` or `a` is an outlier, some standard
    deviations away from its average, `tau` is reset to 2.2.

    The paper's own rate is `sqrt(E[d^2] / E[a^2]) - E[a d] / E[a^2]`. On one mini-batch it does not
    settle. The gradient of a coordinate changes mostly because others move: a coordinate that moves
    little sees a large change for its move, and moves less still. With the mean move of the
    parameter, rates are those of an equilibrated preconditioner. The method of the paper is
    `AdaSecant(params, secant="coordinate", update_period=1, outlier_deviations=2.0)`.

    No parameter moves more than ten times as far as it has lately. Before its first move, one
    further evaluation close by measures the curvature. If loss or gradient after a move are not
    finite, the move is shortened; if that shows in the next step only, it is taken back. Dropout
    masks stay the same within a step, and statistics of BatchNorm move once. In a mini-batch loop
    leave `max_iter` at 1. On the full data more are fine; each iteration then takes one evaluation.

    References: Gulcehre, Sotelo, Moczulski and Bengio 2017, "A robust adaptive stochastic gradient
    method for deep learning", https://arxiv.org/abs/1703.00788; Dauphin, de Vries and Bengio 2015,
    "Equilibrated adaptive learning rates for non-convex optimization".

    Args:
        params: Parameters or groups. A group may have its own `lr` and `weight_decay`.
        lr: A factor of all moves, for schedulers. It needs no tuning.
        max_iter: Iterations per `step()`.
        update_period: Updates from one second evaluation to the next; 1 for one in each update, as
            in the paper. The first `update_period` updates all have one, as do all with `max_iter`
            above 1.
        gamma_clip: The largest weight of the average gradient; 0 for no variance reduction.
        secant: `"block"` for the rates above, or `"coordinate"` for those of the paper.
        outlier_deviations: Standard deviations that make an outlier; 2 in the paper, None for none.
        start_var_reduction: Updates before the variance reduction begins.
        delta_clip: The largest rate, for normalized gradients; None for no bound.
        use_adagrad: Whether rates are divided by the root of the sum of all squared corrected
            gradients where that is above 1, so that they go to zero.
        tolerance_grad: The step ends once no entry of the gradient is larger. By default `1e-7`,
            times the largest entry seen so far where that is below one.
        tolerance_change: The step ends once an iteration changes both the loss and the parameters
            by no more than this, relative to their size.
        weight_decay: Coefficient of `|theta|^2 / 2`, added to the loss.
        maximize: Whether to maximize the closure's loss.

    Raises:
        TypeError: A parameter is neither floating-point nor complex.
        ValueError: A hyperparameter is out of range, or a name is unknown.

    >>> x = torch.tensor([-1.0, 2.0], dtype=torch.float64, requires_grad=True)
    >>> optimizer = AdaSecant([x])
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = 10 * x[0] ** 2 + x[1] ** 2
    ...     loss.backward()
    ...     return loss
    >>> for _ in range(60):
    ...     loss = optimizer.step(closure)
    >>> bool(loss < 1e-3), optimizer.info.status.name
    (True, 'MAX_ITERATIONS')
    """

    info: AdaSecantInfo | None
    _info_type = AdaSecantInfo
    _recognized_by = "gamma_clip"
    _carried = ("secant",)
    _state_fields = declare(
        means=Vector(rows=lambda _: _ROWS),
        memory=Vector(),
        gradient=Vector("_gradient_before"),
        adagrad=Vector(),
        untested=Vector(),
        updates=Number(0),
    )
    # The moving averages, `(9, n)`.
    _means: Tensor | None
    _memory: Tensor | None  # tau
    _gradient_before: Tensor | None  # of the last update, normalized
    _adagrad: Tensor | None  # the sum of all squared corrected gradients
    _untested: Tensor | None  # the last move, if nothing was evaluated after it
    _updates: int

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        max_iter: int = 1,
        *,
        update_period: int = 5,
        gamma_clip: float = 1.8,
        secant: SecantName = "block",
        outlier_deviations: float | None = 4.0,
        start_var_reduction: int = 0,
        delta_clip: float | None = None,
        use_adagrad: bool = False,
        tolerance_grad: float | None = None,
        tolerance_change: float = 1e-9,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        check_choice("secant", secant, SecantName)
        self.secant: SecantName = secant
        self._blocks: _Blocks | None = None
        self._own_rates: list[float] = []
        self._summary: dict[str, Any] = {}
        self._last_known: _Known | None = None
        defaults = {
            "lr": lr,
            "max_iter": max_iter,
            "update_period": update_period,
            "gamma_clip": gamma_clip,
            "outlier_deviations": outlier_deviations,
            "start_var_reduction": start_var_reduction,
            "delta_clip": delta_clip,
            "use_adagrad": use_adagrad,
            "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        """See `SecondOrderOptimizer._check_group`."""
        super()._check_group(group)
        check_integer("update_period", group["update_period"])
        check_number("gamma_clip", group["gamma_clip"], low=0.0)
        check_number("outlier_deviations", group["outlier_deviations"], above=0.0, optional=True)
        check_integer("start_var_reduction", group["start_var_reduction"], low=0)
        check_number("delta_clip", group["delta_clip"], above=0.0, optional=True)

    def _start_fields(self) -> None:
        super()._start_fields()
        self._blocks, self._own_rates, self._summary = None, [], {}
        self._last_known = None

    def _trained(self) -> tuple[list[Tensor], list[Any], list[Any]]:
        # Moves are multiplied by the rates. As a scale of the vector, as elsewhere, they would have
        # no effect: normalized gradients and their rates do not depend on a scale.
        params, rates, decays = super()._trained()
        self._own_rates = list(map(float, rates))
        return params, [max(self._own_rates, default=0.0)] * len(params), decays

    def _begin(self, descent: Descent) -> None:
        vector = descent.objective.vector
        if self._blocks is None or self._blocks.vector is not vector:
            self._blocks = _Blocks(vector)
        self._summary = {"probes": 0}

    def _forget(self, reason: str) -> None:
        super()._forget(reason)
        self._updates = 0

    def _finish(self, objective: Objective, descent: Descent | None) -> dict[str, Any]:
        # A mini-batch that is not finite says nothing about the averages: they are kept.
        if descent is None:
            return {}
        summary, self._summary = self._summary, {}
        return summary

    def _step(self, objective: Objective, lr: float) -> Tensor:
        untested = self._untested
        try:
            loss = super()._step(objective, lr)
        except BaseException:
            self._untested = untested  # the parameters go back to where it left them
            raise
        info = self.info
        if self._untested is not None and info is not None and info.iterations:
            self.info = replace(info, loss_after=None)
        return loss

    def _evaluate(self, objective: Objective) -> tuple[Evaluation, Point]:
        """Evaluates the start of a step; takes an untested move back if nothing is finite there.

        If nothing is finite before that move either, it is for the mini-batch, and the move stays.
        """
        found = super()._evaluate(objective)
        move, self._untested = self._untested, None
        if move is None or _is_finite(found[1]):
            return found
        evaluation = objective.trial(move, -1.0)
        grad_norm, loss = objective.vector.space.to_host(
            largest=(evaluation.grad,), whole=(evaluation.loss,)
        )
        point = Point(loss, grad_norm, evaluation.grad)
        if not _is_finite(point):
            objective.settle()
            return found
        objective.accept(move, -1.0)
        self._forget("the last move was taken back")
        return evaluation, point

    # An iteration.

    def _iterate(self, descent: Descent) -> StepStatus | None:
        objective, group = descent.objective, self.param_groups[0]
        if objective.renewed:
            _, descent.point = self._evaluate(objective)
        batch = self._batch(descent)
        if not self._probe(descent, batch):
            return self._give_up()
        blocks, means = self._blocks, self._means
        assert blocks is not None and means is not None
        gamma = self._gamma(group)
        corrected = torch.addcmul(batch.gradient, gamma, means[_GRADIENT]).div_(gamma + 1.0)
        known = self._known(blocks, group)
        move = (known.rate * corrected).mul_(batch.rates).neg_()
        squares = None
        if group["use_adagrad"]:
            squares = corrected.square()
            if self._adagrad is not None:
                squares += self._adagrad
            move /= squares.sqrt().clamp_(min=1.0)
        move.masked_fill_(~batch.moves, 0.0)
        lengths = blocks.norms(move)
        shorter = (known.longest / lengths.clamp(min=1e-300)).clamp_(max=1.0)
        move *= blocks.spread(shorter)
        moved = torch.linalg.vector_norm(shorter * lengths)
        moved, length = read_numbers(moved, batch.length)
        if not isfinite(moved):
            return self._give_up()
        t, point, change = 1.0, descent.point, None
        if self._is_due(descent, group["update_period"]):
            found = self._tried(descent, batch, move)
            if found is None:
                return self._give_up()
            t, point, change = found
        objective.accept(move, t)
        descent.arrive(point, t, t * moved)
        outliers = self._learn(batch, change, move.mul_(t))
        self._untested = move if change is None else None
        if squares is not None:
            self._adagrad = squares
        self._updates += 1
        self._summarize(descent, gamma, outliers, t * moved / length if length else 0.0)
        return None

    def _is_due(self, descent: Descent, period: int) -> bool:
        """True if an update is to be evaluated: some are, as are all of the first ones."""
        return self._updates < period or self._updates % period == 0 or descent.max_iter > 1

    def _give_up(self) -> StepStatus:
        """Ends a step without a finite trial."""
        self._forget("no trial was finite")
        return StepStatus.NONFINITE_TRIALS

    def _summarize(self, descent: Descent, gamma: Tensor, outliers: Tensor, rate: float) -> None:
        assert self._memory is not None
        sums = (gamma.sum(), self._memory.sum(), outliers.sum(dtype=gamma.dtype))
        size = descent.objective.vector.whole_size
        of_gamma, of_memory, of_outliers = descent.space.to_host(sums=sums)
        self._summary |= {
            "rate": rate,
            "gamma": of_gamma / size,
            "memory": of_memory / size,
            "outliers": of_outliers / size,
        }

    def _batch(self, descent: Descent) -> _Batch:
        """The gradient at the current point."""
        blocks, grad = self._blocks, descent.point.grad
        assert blocks is not None and grad is not None
        vector = blocks.vector
        norms = blocks.norms(grad)
        rates = torch.tensor(self._own_rates, dtype=norms.dtype, device=norms.device)
        moves = (norms >= torch.finfo(vector.dtype).tiny) & norms.isfinite() & (rates > 0.0)
        unit = blocks.spread(torch.where(moves, norms, 1.0))
        everywhere = len(set(self._own_rates)) == 1
        return _Batch(
            grad / unit,
            unit,
            blocks.spread(moves),
            self._own_rates[0] if everywhere else blocks.spread(rates),
            torch.linalg.vector_norm(norms * moves),
        )

    def _gamma(self, group: dict[str, Any]) -> Tensor:
        """The weight of the average gradient, `(n,)`."""
        means = self._means
        assert means is not None
        if self._updates < group["start_var_reduction"]:
            return torch.zeros_like(means[0])
        # A denominator that is not positive: two mini-batches have nothing in common but the mean.
        least = torch.finfo(means.dtype).tiny
        gamma = means[_NUMERATOR] / means[_DENOMINATOR].clamp(min=least)
        return gamma.clamp_(0.0, float(group["gamma_clip"]))

    def _known(self, blocks: _Blocks, group: dict[str, Any]) -> _Known:
        """The rates and bounds; computed again only where the averages have changed."""
        known, means, clip = self._last_known, self._means, group["delta_clip"]
        assert means is not None
        if known is not None and known.means is means and known.delta_clip == clip:
            return known
        squares = blocks.sizes * blocks.means(means[_MOVE + 1])
        rate, longest = self._rate(blocks, means, group), _GROWTH * squares.sqrt()
        self._last_known = _Known(means, clip, rate, longest, bool((squares > 0.0).all()))
        return self._last_known

    def _rate(self, blocks: _Blocks, means: Tensor, group: dict[str, Any]) -> Tensor:
        """The rate of each coordinate for normalized gradients, `(n,)`."""
        steps, changes = means[_MOVE + 1], means[_CHANGE + 1]
        least = torch.finfo(means.dtype).eps ** 2  # smaller changes are rounding errors
        changes = changes + blocks.spread(_FLOOR * blocks.means(changes))
        changes.clamp_(min=least)
        if self.secant == "block":
            rate = blocks.spread(blocks.means(steps)).div_(changes).sqrt_()
        else:
            rate = (steps / changes).sqrt_().sub_(means[_PRODUCT] / changes).clamp_(min=0.0)
        if group["delta_clip"] is not None:
            rate.clamp_(max=float(group["delta_clip"]))
        return rate

    def _tried(
        self, descent: Descent, batch: _Batch, move: Tensor
    ) -> tuple[float, Point, Tensor] | None:
        """Evaluates a move, a shorter one where that is not finite.

        Returns:
            The factor of the move, the point there, and the change of the normalized gradient. None
            if no trial was finite.
        """
        objective, before, t = descent.objective, descent.point.grad, 1.0
        assert before is not None
        for _ in range(_TRIALS):
            evaluation = objective.trial(move, t)
            grad = evaluation.grad
            change = torch.sub(grad, before).div_(batch.unit).masked_fill_(~batch.moves, 0.0)
            grad_norm, largest, loss = descent.space.to_host(
                largest=(grad, change), whole=(evaluation.loss,)
            )
            if isfinite(loss) and isfinite(grad_norm) and isfinite(largest):
                change.clamp_(-_LARGEST_CHANGE, _LARGEST_CHANGE)
                return t, Point(loss, grad_norm, grad), change
            descent.nonfinite_trials += 1
            t *= _SHORTER
        objective.settle()
        return None

    # What the averages learn.

    def _probe(self, descent: Descent, batch: _Batch) -> bool:
        """Starts the averages of blocks that have not moved yet; says whether it could.

        The change of the gradient along a short step begins them.
        """
        blocks, means, known = self._blocks, self._means, self._last_known
        if known is not None and known.complete and known.means is means:
            return True
        assert blocks is not None
        if means is None:
            gradient = batch.gradient
            means = self._means = gradient.new_zeros(_ROWS, len(gradient))
            self._memory = torch.full_like(gradient, _RESET)
            self._gradient_before = gradient.clone()
        fresh = batch.moves & ~blocks.spread(blocks.means(means[_MOVE + 1]) > 0.0)
        if not any(descent.space.to_host(largest=(fresh.to(means.dtype),))):
            return True
        sizes = blocks.norms(descent.objective.position) + blocks.sizes.sqrt()
        move = batch.gradient * blocks.spread(-_PROBE * sizes)
        move.masked_fill_(~fresh, 0.0)
        self._summary["probes"] += 1
        found = self._tried(descent, batch, move)
        if found is None:
            return False
        t, _, change = found
        self._last_known = None
        rows = self._rows(batch.gradient, change, move.mul_(t))
        torch.where(fresh, rows, means, out=means)
        assert self._memory is not None and self._gradient_before is not None
        self._memory.masked_fill_(fresh, _RESET)
        torch.where(fresh, batch.gradient, self._gradient_before, out=self._gradient_before)
        return True

    def _rows(self, gradient: Tensor, change: Tensor | None, move: Tensor | None) -> Tensor:
        """The numbers of a step that the averages are of, `(9, n)`; those for gamma are zero."""
        rows = gradient.new_zeros(_ROWS, len(gradient))
        for row, vector in ((_GRADIENT, gradient), (_CHANGE, change), (_MOVE, move)):
            if vector is not None:
                rows[row] = vector
                torch.mul(vector, vector, out=rows[row + 1])
        if change is not None and move is not None:
            torch.mul(change, move, out=rows[_PRODUCT])
        return rows

    def _learn(self, batch: _Batch, change: Tensor | None, move: Tensor) -> Tensor:
        """Updates the averages and the memory; returns the outliers.

        Args:
            batch: The gradient.
            change: Its change over the move; None if it was not evaluated again.
            move: The move.
        """
        means, memory, before = self._means, self._memory, self._gradient_before
        assert means is not None and memory is not None and before is not None
        rows = self._rows(batch.gradient, change, None if change is None else move)
        deviation = before - means[_GRADIENT]
        # From an average of equal numbers it is a rounding error, whose sign would decide.
        rounding = before.abs().mul_(4.0 * torch.finfo(means.dtype).eps)
        deviation.masked_fill_(deviation.abs() <= rounding, 0.0)
        torch.mul(before - batch.gradient, deviation, out=rows[_NUMERATOR])
        torch.mul(batch.gradient - means[_GRADIENT], deviation, out=rows[_DENOMINATOR])
        outliers = self._outliers(means, rows, _GRADIENT)
        if change is not None:
            outliers.logical_or_(self._outliers(means, rows, _CHANGE))
        outliers.logical_and_(batch.moves)
        memory.masked_fill_(outliers, _RESET)
        weight = memory.reciprocal().mul_(batch.moves)
        known = _CHANGE if change is None else _ROWS
        means[:known].lerp_(rows[:known], weight)
        if change is not None:
            self._last_known = None
            least = torch.finfo(means.dtype).tiny
            steady = means[_MOVE].square().div_(means[_MOVE + 1].clamp(min=least))
            tau = (1.0 - steady).mul_(memory).add_(1.0).clamp_(_LEAST_MEMORY, _LARGEST_MEMORY)
            torch.where(batch.moves, tau, memory, out=memory)
        torch.where(batch.moves, batch.gradient, before, out=before)
        return outliers

    def _outliers(self, means: Tensor, rows: Tensor, row: int) -> Tensor:
        """The coordinates where a row lies far from its average."""
        deviations = self.param_groups[0]["outlier_deviations"]
        if deviations is None:
            return torch.zeros_like(means[0], dtype=torch.bool)
        average, squares = means[row], means[row + 1]
        # Of numbers that are all equal, the variance is a rounding error.
        rounding = torch.finfo(means.dtype).eps * squares
        variance = (squares - average.square()).clamp_(min=rounding)
        return (rows[row] - average).square() > float(deviations) ** 2 * variance


def _is_finite(point: Point) -> bool:
    return isfinite(point.loss) and isfinite(point.grad_norm)
