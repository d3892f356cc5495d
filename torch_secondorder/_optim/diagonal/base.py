"""Optimizers that scale each coordinate by an estimate of its curvature: what they share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import is_
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from torch_secondorder._foundation.buffer_pool import BufferPool
from torch_secondorder._objective.one_shot import (
    GradientTrace,
    IdleClosure,
    Outcome,
    SingleEvaluation,
)
from torch_secondorder._optim.base import SecondOrderOptimizer, check_number, makes_state_only
from torch_secondorder._optim.diagonal.blocks import Block, BlockLayout, as_real, prepare
from torch_secondorder._optim.diagonal.closureless import WATCHERS
from torch_secondorder._optim.diagonal.fsdp import (
    ShardedEvaluation,
    check_closure,
    held_outcome,
    held_parts,
    part_states,
    whole_states,
)
from torch_secondorder._optim.diagonal.observation import Observation
from torch_secondorder._optim.diagonal.report import DiagonalInfo, Effort, report_of
from torch_secondorder._optim.diagonal.update import FiniteCheck, StepInputs, judge
from torch_secondorder._optim.info import LazyInfo, StepInfo
from torch_secondorder._optim.present import Scaling, present_gradients
from torch_secondorder._params.space import WHOLE, ShardedSpace, is_distributed
from torch_secondorder._params.vector import ParameterVector, max_norm
from torch_secondorder.curvature.diagonal import (
    DiagonalEstimator,
    DiagonalWatch,
    GaussNewtonBartlett,
)

__all__ = ["DiagonalOptimizer", "check_betas"]


class DiagonalOptimizer(SecondOrderOptimizer):
    """An optimizer that evaluates once a step and estimates a diagonal now and then.

    A subclass implements `_update`. All hyperparameters but `update_period`, `seed`,
    `accumulation_steps` and `capturable` may differ between groups; those are read from the first.

    Args:
        params: See `SecondOrderOptimizer`.
        defaults: Hyperparameters.
        estimator: How the diagonal is estimated.
        watch: Whether backward passes outside of closures and contexts are seen.
    """

    _step_supports_amp_scaling = True  # see `Scaling`
    _info_type = DiagonalInfo
    _carried = (*SecondOrderOptimizer._carried, "estimator", "_watches")
    _optional_names: tuple[str, ...] = ("generator",)
    #: How many of the first steps all estimate the curvature, though no more than a period.
    _warm_up = 1
    #: Whether an update takes absolute values of the diagonal.
    _magnitudes = False
    _observation: Observation | None = None
    _undrawn: Tensor | None = None  # the state of the generator before that
    # On a device: of the last step, until one is known to have moved.
    _first: FiniteCheck | None = None
    _moved_once = False
    _watches = True
    # The gradients when it began to see backward passes; None where it did not before this step.
    _before: GradientTrace | None = None

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        estimator: DiagonalEstimator,
        *,
        watch: bool = True,
    ) -> None:
        self.estimator = estimator
        self._watches = False  # until all is there
        self._steps = 0
        self._overdue = 0  # how many of the next steps estimate out of turn
        self._known: Sequence[Tensor] | None = None  # what was trained, frozen parameters left out
        self._generator: torch.Generator | None = None
        self._stale: GradientTrace | None = None
        self._buffer_pool = BufferPool()
        self._arrangement = BlockLayout()
        super().__init__(params, defaults)
        self._watches = watch
        self._listen()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See `SecondOrderOptimizer.add_param_group`; the next step estimates the curvature."""
        super().add_param_group(param_group)
        self._listen()

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for name in ("update_period", "accumulation_steps"):
            check_number(name, group[name], low=1, integer=True)

    @abstractmethod
    def _update(self, block: Block, seen: StepInputs) -> None:
        """Moves the parameters and moments of a block."""

    def _inside(self) -> tuple[Tensor, Tensor] | None:
        """What `SophiaInfo.unclipped` is the ratio of: entries not clipped, and all; 0-dim."""
        return None

    # The step.

    @property
    def curvature_due(self) -> bool:
        """Whether the next step estimates the curvature.

        For loops without a closure that were told `watch=False` and keep the graph themselves:
        `loss.backward(create_graph=optimizer.curvature_due)`. So it is whenever a parameter was
        added or thawed since the last step.
        """
        return self._is_due(self._trainable)

    @property
    def _first_steps(self) -> int:
        """How many of the first steps of a parameter all estimate the curvature."""
        return min(int(self.param_groups[0]["update_period"]), self._warm_up)

    def _is_due(self, params: Sequence[Tensor]) -> bool:
        self._look_at_first()
        period = int(self.param_groups[0]["update_period"])
        in_turn = self._steps % period == 0 or self._steps < self._first_steps
        return bool(params) and (in_turn or self._out_of_turn(params))

    def _out_of_turn(self, params: Sequence[Tensor]) -> bool:
        """Whether there are parameters that cannot wait for the next estimate."""
        return self._overdue > 0 or (self._known is not None and self._has_new(params))

    def _has_new(self, params: Sequence[Tensor]) -> bool:
        """Whether some of the parameters were not trained when the last step was made."""
        known = self._known or ()
        if len(params) == len(known) and all(map(is_, params, known)):
            return False
        return not {id(p) for p in known}.issuperset(map(id, params))

    def _count_step(self, params: Sequence[Tensor]) -> None:
        """Counts a step that moved something."""
        period, arrangement = int(self.param_groups[0]["update_period"]), self._arrangement
        if arrangement.served or (self._known is not None and self._has_new(params)):
            self._overdue = self._first_steps - 1  # this is one of them
        else:
            self._overdue = max(self._overdue - 1, 0)
        if arrangement.waiting:
            # Until it has a gradient again where there is an estimate, or this is in turn.
            self._overdue = period
        self._known = params
        self._steps += 1

    def _estimator_for(self, params: Sequence[Tensor]) -> DiagonalEstimator:
        """What estimates the curvature in the coming step."""
        return self.estimator

    @property
    def is_second_order(self) -> bool:
        """Whether loops that ask may call `loss.backward(create_graph=True)`, as timm's do.

        That gives the same steps as without, and is needed with `watch=False` only.
        """
        return self.curvature_due and self._takes_graphs

    # Backward passes without a closure.

    @property
    def _can_listen(self) -> bool:
        params = (p for group in self.param_groups for p in group["params"])
        first = next(params, None)
        return (
            self._watches
            and first is not None
            and not is_distributed(first)
            # Else micro-batches outside of the closure are not to cost an estimate each.
            and self.param_groups[0]["accumulation_steps"] == 1
        )

    def _listen(self) -> None:
        """Sees backward passes from now on if the next step needs them, and none if not."""
        if self._can_listen and self.curvature_due:
            self._before = GradientTrace(self._trainable)
            WATCHERS.add(self)
        else:
            self._before = None
            WATCHERS.discard(self)

    def observation_of(self, reached: Collection[int]) -> Observation | None:
        """See `torch_secondorder._optim.diagonal.closureless.Watcher`."""
        params = self._trainable
        # What it needs for that may have been written to the groups since it listens.
        if not self._can_listen or not any(id(p) in reached for p in params):
            return None
        with torch.no_grad():
            return self._current_observation(params)

    def note_module(self, module: DistributedDataParallel) -> None:
        """See `torch_secondorder._optim.diagonal.closureless.Watcher`."""
        own = {id(p) for p in self._trainable}
        if any(id(p) in own for p in module.parameters()):
            self._registry.ranks.note(module)

    def _current_observation(self, params: Sequence[Tensor]) -> Observation:
        """The observation of the coming step; a new one if what was seen is no more."""
        if self._observation is not None and not self._observation.continues(params):
            self._drop_observation()
        if self._observation is None:
            _, generator = self._tools(params)
            # A CUDA graph that is being made has no state that could be read.
            self._undrawn = None if _capturing(params[0]) else generator.get_state()
            self._observation = Observation(
                params, self._watch(params), self._registry, everywhere=self in WATCHERS
            )
        return self._observation

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A context for forward and backward pass, in loops that call `step()` without a closure.

        It is needed with `watch=False`, under `DistributedDataParallel(static_graph=True)`, and
        where a forward pass is to choose implementations that have second derivatives: outside of
        it backward passes are seen as well.

        Where the coming step estimates the curvature, `loss.backward()` inside does what it does in
        a closure: the estimate is taken while it runs, no graph is kept, and `p.grad` may be
        clipped or changed afterwards. Else the context does nothing. Micro-batches may run in one
        context, or each in one of its own; what they add to gradients and curvature adds up until
        the step, or until the gradients are zeroed.

        Raises:
            RuntimeError: At `backward()`: a second derivative is missing, or there were gradients
                already. A step whose gradients are not all from inside raises as well.

        >>> from torch_secondorder import AdaHessian
        >>> x = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> optimizer = AdaHessian([x], lr=1.0)
        >>> with optimizer.watching():
        ...     (500 * x[0] ** 2 + x[1] ** 2).backward()
        >>> optimizer.step()
        >>> bool(x.detach().abs().max() < 1e-4)
        True
        """
        params = self._trainable
        if not self._is_due(params):
            yield
            return
        if is_distributed(params[0]):
            check_closure(None, True)
        try:
            with self._current_observation(params):
                yield
        except BaseException:
            self._drop_observation()
            raise

    def _forget_observation(self) -> None:
        if self._observation is not None:
            self._observation.close()
            self._observation = self._undrawn = None

    def _drop_observation(self) -> None:
        """Lets it be as if nothing had been seen, also for what is drawn later."""
        self._undraw()
        self._forget_observation()

    def _undraw(self) -> Tensor | None:
        """Takes back what was drawn for what was seen; returns where the generator was then."""
        if self._observation is None or self._generator is None or self._undrawn is None:
            return None
        drawn = self._generator.get_state()
        self._generator.set_state(self._undrawn)
        return drawn

    def step(self, closure: Any = None) -> Tensor | None:  # type: ignore[override]
        """Performs one step.

        Args:
            closure: The standard closure (zero the gradients, compute the loss, call `backward()`,
                return the loss), or a `FunctionalObjective`. None where gradients are there
                already: made by `loss.backward()`.

        Returns:
            The closure's loss, detached; None without a closure.

        Raises:
            RuntimeError: No gradient reached the parameters, its graph is missing where it is
                needed, or an operation of the model has no second derivative.
            TypeError: The closure returned something else than a loss.
            ValueError: The closure's loss is not a scalar, or a hyperparameter is out of range.
        """
        try:
            for group in self.param_groups:
                self._check_group(group)
            WATCHERS.discard(self)  # what runs in here is seen by other ways
            try:
                return self._one_step(closure)
            finally:
                self._listen()
        except BaseException:
            Scaling(self).forget()
            raise

    def _one_step(self, closure: Any) -> Tensor | None:
        params = self._trainable
        if closure is not None:
            Scaling(self).refuse_closure()
        if not params:
            result: Tensor | None = self._pass(closure)
            return result
        fresh = closure is None and self._observation is None and not self._steps
        if fresh and makes_state_only(self.param_groups):
            self._make_state(params)
            return None
        if is_distributed(params[0]):
            return self._step_sharded(closure, params)
        with torch.no_grad():
            if closure is None:
                self._step_on_present(params)
                return None
            # What was seen before is not of this step, unless the closure is idle.
            drawn = self._undraw()
            watch = self._watch(params) if self._is_due(params) else None
            evaluation = SingleEvaluation(
                closure, params, self._registry, self._stale, self._buffer_pool
            )
            parts = int(self.param_groups[0]["accumulation_steps"])
            try:
                outcome = evaluation.run(watch, accumulates=parts > 1)
            except IdleClosure:  # what Lightning passes for none
                if drawn is not None and self._generator is not None:
                    self._generator.set_state(drawn)
                self._step_on_present(params, watch)
                return None
            self._forget_observation()
            diagonal = self._diagonal(watch, parts if outcome.accumulated else 1.0, None)
            effort = Effort(1, 0 if watch is None else watch.products)
            self._advance(params, outcome, diagonal, effort, undo=evaluation.restore)
            return outcome.loss

    def _step_on_present(
        self, params: Sequence[Tensor], watch: DiagonalWatch | None = None
    ) -> None:
        """A step without a closure; the watch is for gradients that nobody has watched."""
        name, scaling, seen = type(self).__name__, Scaling(self), self._observation
        self._forget_observation()
        due, early, unscaling = self._is_due(params), False, scaling.inverse
        if seen is not None and seen.has_seen(params):
            found = present_gradients(name, params, None, scaling)
            seen.check(name, scaling)
            watch, unscaling = seen.watch, seen.unscaling(scaling)
        elif due and self._is_too_early(params, seen):
            watch, early = None, True
            found = present_gradients(name, params, None, scaling)
        else:
            if watch is None and due:
                watch = self._watch(params)
            found = present_gradients(name, params, watch, scaling, self._why_unseen())
            unscaling = None if unscaling is None else unscaling.sqrt()  # so were the probes
        diagonal = self._diagonal(watch, 1.0, unscaling)
        effort = Effort(0, 0 if watch is None else watch.products)
        self._advance(params, Outcome(None, found), diagonal, effort, scaling.inverse)
        self._overdue = max(self._overdue, int(early))

    def _is_too_early(self, params: Sequence[Tensor], seen: Observation | None) -> bool:
        """Whether the gradients are from before anybody could know that they would be needed.

        Loops that make optimizers as parameters appear have them then, Pyro's for one, and loops
        that thaw parameters between estimates, or after the backward pass. The step goes by older
        curvature, parameters without any wait, and the next one estimates.

        Args:
            params: The trainable parameters.
            seen: What was seen of others.
        """
        grads = [p.grad for p in params if p.grad is not None]
        has_graph = any(g.grad_fn is not None for g in grads) and self._takes_graphs
        if has_graph or not grads or not self._can_listen:
            return False
        if self._before is None:  # nobody says that a parameter is thawed
            return self._known is not None and self._has_new(params)
        return self._before.matches(params) or (seen is not None and seen.calls > 0)

    @property
    def _takes_graphs(self) -> bool:
        """Whether the graph of gradients is all that an estimate takes."""
        return not isinstance(self.estimator, GaussNewtonBartlett)

    def _why_unseen(self) -> str:
        if not self._watches:
            return "it was made with watch=False"
        if self.param_groups[0]["accumulation_steps"] != 1:
            return "accumulation_steps says that a closure comes with each step"
        return (
            "the gradients are not from loss.backward() or torch.autograd.backward(), or from one "
            "that ran before the curvature was due (update_period may have been changed since)"
        )

    def _step_sharded(self, closure: Any, params: Sequence[Tensor]) -> Tensor | None:
        """See `step`; this process has a part of each parameter, its gradient and state."""
        vector, generator = self._tools(params)
        registry, due = self._registry, self._is_due(params)
        check_closure(closure, due)
        with torch.no_grad():
            if closure is None:
                scaling = Scaling(self)
                found = held_parts(present_gradients("", params, None, scaling))
                self._advance(params, Outcome(None, found), None, Effort(0, 0), scaling.inverse)
                return None
            if not due:
                evaluation = SingleEvaluation(closure, params, registry, self._stale)
                try:
                    outcome = held_outcome(evaluation.run(), vector)
                except IdleClosure:
                    return self._step_sharded(None, params)
                self._advance(params, outcome, None, Effort(1, 0), undo=evaluation.restore)
                registry.reshard()
                return outcome.loss
            sharded = ShardedEvaluation(closure, vector, registry, self._stale)
            with sharded.objective as objective:
                estimator = self._estimator_for(params)
                outcome, diagonal = sharded.run(estimator, generator, self._magnitudes)
                effort = Effort(objective.evaluations, estimator.n_samples)
                self._advance(params, outcome, diagonal, effort, undo=objective.abandon)
            return outcome.loss

    def _tools(self, params: Sequence[Tensor]) -> tuple[ParameterVector, torch.Generator]:
        """The vector of the parameters, and where randomness comes from."""
        if self._vector is None or not self._vector.matches(params, None):
            self._vector = ParameterVector(params)
        if self._generator is None:
            self._generator = torch.Generator(self._vector.device)
            self._generator.manual_seed(int(self.param_groups[0]["seed"]))
        return self._vector, self._generator

    def _watch(self, params: Sequence[Tensor]) -> DiagonalWatch:
        watch = self._estimator_for(params).watch(*self._tools(params), self._buffer_pool)
        watch.ranks = self._registry.ranks
        return watch

    def _advance(
        self,
        params: Sequence[Tensor],
        outcome: Outcome,
        diagonal: Tensor | None,
        effort: Effort,
        inverse_scale: Tensor | None = None,
        undo: Callable[[], None] | None = None,
    ) -> None:
        """Updates everything, unless loss or gradient is not finite.

        Args:
            params: The trainable parameters.
            outcome: Of the evaluation.
            diagonal: The estimate, where one was due.
            effort: What that took.
            inverse_scale: What to multiply gradients by.
            undo: Puts buffers back to where they were before the step.
        """
        loss, gradients, whole = outcome.loss, outcome.gradients, outcome.whole
        space = WHOLE if self._vector is None else self._vector.space
        verdict = judge(outcome, diagonal, inverse_scale, self._on_device, space)
        if verdict.known_bad and undo is not None:
            undo()
        if verdict.curvature_known_bad:
            diagonal = None
        if not verdict.known_bad:
            if self._move(params, gradients, whole, diagonal, verdict):
                self._count_step(params)
                if verdict.on_device and not self._moved_once:
                    self._first = verdict
            else:
                self._overdue = max(self._overdue, 1)
        self._stale = GradientTrace(params)
        self._show_names(params)
        # Not a method of this object, which would keep itself alive.
        report = partial(report_of, ref(self), verdict, loss, params, self._stale, effort)
        self.info = LazyInfo(report)
        if isinstance(space, ShardedSpace):
            # Now, for all processes are here; who reads the report may be alone.
            largest = [max_norm(as_real(g)).double() for g in gradients if g is not None]
            inside = [count.double() for count in self._inside() or ()]
            numbers = space.gathered(sums=inside, largest=[torch.stack(largest).amax()])
            self.info = LazyInfo(partial(report, numbers=numbers))

    def _look_at_first(self) -> None:
        """Waits for the device, once: without any curvature no step moves until the next estimate.

        A step that came to nothing does not count, as where all decisions are made on the host.
        """
        verdict = self._first
        if verdict is None or any(map(_capturing, self._trainable[:1])):
            return
        self._first = None
        self._moved_once = verdict.moved
        if not verdict.moved:
            self._steps -= 1
            self._overdue = max(self._overdue, 1)

    def _diagonal(
        self, watch: DiagonalWatch | None, factor: float, inverse_scale: Tensor | None
    ) -> Tensor | None:
        if watch is None:
            return None
        diagonal = watch.diagonal(magnitudes=self._magnitudes)
        if inverse_scale is not None:
            diagonal.mul_(inverse_scale.to(diagonal))
        return diagonal if factor == 1.0 else diagonal.mul_(factor)

    @property
    def _on_device(self) -> bool:
        """Whether all that a step decides stays on the device."""
        capturable = self.param_groups[0]["capturable"]
        if capturable is None:
            return any(p.device.type != "cpu" for p in self._parameters[:1])
        return bool(capturable)

    def _move(
        self,
        params: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        whole: Tensor | None,
        diagonal: Tensor | None,
        verdict: FiniteCheck,
    ) -> bool:
        """Updates parameters and moments block by block; says whether there was anything to."""
        blocks = self._arrangement.of(
            self.param_groups,
            self.state,
            params,
            gradients,
            curved=diagonal is not None,
            on_device=verdict.on_device,
            expected=self._overdue > 0,
        )
        for block in blocks:
            estimate = None
            if diagonal is not None:
                assert self._vector is not None
                estimate = block.part_of(diagonal, partial(self._vector.pieces, diagonal))
            self._update(block, StepInputs(block, gradients, whole, estimate, verdict))
        return bool(blocks)

    # The report, made when it is read.

    @property
    def info(self) -> StepInfo | None:
        """The report of the last step, None before the first."""
        # Nothing is set here: `self` may be a wrapper that stands for this object.
        info: StepInfo | None = self._info() if isinstance(self._info, LazyInfo) else self._info
        return info

    @info.setter
    def info(self, info: Any) -> None:
        self._info = info

    # Checkpoints.

    def _make_state(self, params: Sequence[Tensor]) -> None:
        """Gives each parameter a state, of a step that has not been."""
        for p in params:
            prepare(self.state[p], p, on_device=self._on_device)
        self._show_names()

    def _export_state(self) -> dict[str, Any]:
        self._look_at_first()
        if self._generator is None and self._trainable:
            self._tools(self._trainable)  # there has to be one to load into
        overdue = self._overdue
        if self._known is not None and self._has_new(self._trainable):
            overdue = max(overdue, self._first_steps)
        state: dict[str, Any] = {"steps": self._steps, "overdue": overdue}
        if self._generator is not None:
            # What was seen is not carried along, and was not drawn then.
            undrawn = self._undrawn
            state["generator"] = self._generator.get_state() if undrawn is None else undrawn
        return state

    def _add_state(self, states: dict[int, dict[str, Any]]) -> None:
        if not self._sharded:
            super()._add_state(states)
        elif self._trainable:
            states.update(whole_states(self._parameters, self.state, self._export_state()))

    def _import(self, states: list[dict[str, Any]]) -> None:
        if self._sharded:
            states = [part_states(self._parameters, states, self.state)]
        super()._import(states)

    def _import_state(self, state: dict[str, Any]) -> None:
        vector, saved = self._known_vector(), state.get("generator")
        self._forget_observation()
        self._arrangement = BlockLayout()
        self._steps = int(state.get("steps", 0))
        self._overdue = int(state.get("overdue", 0))
        self._known = self._trainable if self._steps else None
        self._stale = self._generator = self._first = None
        self._buffer_pool = BufferPool()
        self._listen()
        if saved is not None and vector is not None:
            self._generator = torch.Generator(vector.device)
            try:
                self._generator.set_state(saved.cpu())
            except RuntimeError:  # from a device of another type: other probes, as good
                self._generator.manual_seed(int(self.param_groups[0]["seed"]) + self._steps)

    def _finish_loading(self, state_dict: dict[str, Any]) -> None:
        # torch casts state to the parameters' dtype, and a narrow one would lose the rest.
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, p in zip(saved, self._parameters, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor) and name in self.state[p]:
                    self.state[p][name] = value.to(p.device, copy=True)
        super()._finish_loading(state_dict)


def _capturing(parameter: Tensor) -> bool:
    """Whether a CUDA graph is being made, in which nothing can be looked at."""
    return parameter.is_cuda and torch.cuda.is_current_stream_capturing()


def check_betas(betas: Any) -> None:
    """Raises a ValueError unless these are two numbers of at least zero and below one."""
    try:
        fine = len(betas) == 2 and all(0.0 <= float(beta) < 1.0 for beta in betas)
    except TypeError:
        fine = False
    if not fine:
        raise ValueError(f"betas must be two numbers from 0 up to below 1, got {betas!r}")
