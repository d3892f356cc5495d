"""Base class of optimizers that scale each coordinate by an estimate of its curvature.

A step goes through these stages, each in a file of its own:

1. `schedule.py` decides whether the step estimates the curvature.
2. The closure is evaluated once. If an estimate is due, a `DiagonalWatch` of the estimator (see
   `torch_secondorder.curvature.diagonal`) takes it while `backward()` runs.
3. `update.py` checks that loss, gradients and estimate are finite.
4. `blocks.py` joins the parameters and their state to flat vectors, and `_update` of the subclass
   moves them.
5. `report.py` makes `info` when it is read.

`sampled_labels.py`, `fsdp.py` and the files about loops without a closure replace stage 2 where
there is no closure, or parameters are sharded.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, ClassVar, overload
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from torch_secondorder._closure.data_parallel import ModuleNotice, Ranks, several_processes
from torch_secondorder._closure.runner import GradientTrace, IdleClosure
from torch_secondorder._foundation.buffer_pool import BufferPool
from torch_secondorder._foundation.checks import check_integer
from torch_secondorder._foundation.types import ParamsT
from torch_secondorder._objective.one_shot import Outcome, SingleEvaluation
from torch_secondorder._optim.base import SecondOrderOptimizer, StepClosure, makes_state_only
from torch_secondorder._optim.diagonal.blocks import Block, BlockLayout
from torch_secondorder._optim.diagonal.closureless import WATCHERS, predates, why_unseen
from torch_secondorder._optim.diagonal.fsdp import (
    ShardedEvaluation,
    check_closure,
    held_outcome,
    held_parts,
)
from torch_secondorder._optim.diagonal.observation import Observation
from torch_secondorder._optim.diagonal.owners import Owners, check_not_whole, make_state, owners_of
from torch_secondorder._optim.diagonal.report import DiagonalInfo, Made, gathered_numbers, report_of
from torch_secondorder._optim.diagonal.schedule import (
    EstimateSchedule,
    GeneratorBefore,
    OutOfTurn,
    capturing,
)
from torch_secondorder._optim.diagonal.settings import DEFAULTS, settings_of
from torch_secondorder._optim.diagonal.update import FiniteCheck, StepInputs
from torch_secondorder._optim.present import Scaling, present_gradients
from torch_secondorder._optim.state import (
    BlockMatrices,
    Count,
    MasterCopy,
    Moment,
    Number,
    declare,
)
from torch_secondorder._params.bounds import no_bounds
from torch_secondorder._params.space import WHOLE, ShardedSpace, is_distributed
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.curvature.diagonal import (
    DiagonalEstimator,
    DiagonalWatch,
    GaussNewtonBartlett,
)


class DiagonalOptimizer(SecondOrderOptimizer):
    """An optimizer that evaluates once a step and estimates a diagonal now and then.

    A subclass implements one method, `_update(block, inputs)`: it moves the parameters of a block
    and their moments. The block (`blocks.Block`) has the moments `exp_avg` and `exp_hessian` as
    flat vectors, and methods that move the parameters (`decay`, `divide`, `move`). The inputs
    (`update.StepInputs`) have the learning rate, gradient, estimate and counts. This class brings
    groups, checkpoints, closures, loops without a closure, DDP, FSDP and `info`:

        class Newton(DiagonalOptimizer):
            def __init__(self, params, lr=1.0):
                super().__init__(params, {"lr": lr}, Hutchinson())

            def _update(self, block, inputs):
                if inputs.estimate is not None:
                    block.exp_hessian.copy_(inputs.estimate)
                block.move(inputs.lr, inputs.gradient / block.exp_hessian.abs().clamp_(min=1e-4))

    More moments than these two are declared as in `_optim.state`, and are then in `block.moments`.
    An optimizer that works on whole parameters by shape, as Kronecker-factored methods do, declares
    `Factors` and goes over `block.members(inputs.gradient)`: the state of each parameter and its
    gradient. If it needs no estimate of the diagonal, it sets `_estimates = False`:

        class Shampoo(DiagonalOptimizer):
            _estimates = False
            _state_fields = declare(factor=Factors(scale=1e-6))

            def __init__(self, params, lr=0.1):
                super().__init__(params, {"lr": lr})

            def _update(self, block, inputs):
                direction = inputs.gradient.clone()
                for state, piece in block.members(direction):
                    piece.copy_(precondition(piece, state))
                block.move(inputs.lr, direction)

    Further hooks: `_check_group` for hyperparameters of its own, `_shares` for the report, and the
    class attributes below. All hyperparameters may differ between groups, except `update_period`,
    `seed`, `accumulation_steps` and `capturable`, which are read from the first.

    Args:
        params: See `SecondOrderOptimizer`.
        defaults: Hyperparameters.
        estimator: Estimates the diagonal; None for a class with `_estimates = False`.
        watch: Whether the optimizer sees backward passes outside of closures and contexts.

    Attributes:
        estimator: The same.
    """

    _step_supports_amp_scaling = True  # see `Scaling`
    _info_type = DiagonalInfo
    _carried: ClassVar[tuple[str, ...]] = ("estimator", "_watches", "_owners")
    _state_fields = declare(
        steps=Number(0, "_schedule.steps"),
        overdue=OutOfTurn(0, "_schedule.out_of_turn"),
        generator=GeneratorBefore(),
        step=Count(),
        curvature_step=Count(),
        host_step=Count(on_host=True),
        exp_avg=Moment(),
        exp_hessian=Moment(),
        master=MasterCopy(),
    )
    #: Whether it estimates the curvature. If not, there is no `exp_hessian` and nothing waits.
    _estimates = True
    #: The number of first steps that all estimate the curvature, at most a period.
    _warm_up = 1
    #: The least number of labels that `GaussNewtonBartlett` draws for the first estimate.
    _first_labels = 1
    #: Whether an update takes absolute values of the diagonal.
    _magnitudes = False
    # The curvature seen in loops without a closure, and the generator's state from before that.
    _observation: Observation | None = None
    _generator_before: Tensor | None = None
    # The gradients when it began to listen for backward passes; None if it does not.
    _listening_since: GradientTrace | None = None
    _watches = True
    _stepping = False
    _checked: list[object] | None = None  # the hyperparameters that were checked last
    _owners: Owners | None = None  # of sharded parameters that steps need whole
    _made: Made | None = None  # by the last step
    _set_by_steps: tuple[str, ...] = ()  # attributes, for the report
    #: Whether updates divide work over the ranks of DistributedDataParallel, see `_ranks`.
    _divides = False
    _notice: ModuleNotice | None = None

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        estimator: DiagonalEstimator | None = None,
        *,
        watch: bool = True,
    ) -> None:
        self.estimator: DiagonalEstimator = estimator  # type: ignore[assignment]
        self._watches = False  # until everything is set up
        self._schedule = EstimateSchedule(self._warm_up, active=self._estimates)
        self._last_trace: GradientTrace | None = None  # of the gradients that the last step left
        self._buffer_pool = BufferPool()
        self._layout = BlockLayout(self._parameter_fields)
        super().__init__(params, {**DEFAULTS, **defaults})
        self._watches = watch
        self._listen()
        if self._divides and several_processes() and not self._sharded:
            self._notice = ModuleNotice(self.note_module)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        fields = cls._parameter_fields
        if not cls._estimates:
            fields = tuple(f for f in fields if f.name not in ("exp_hessian", "curvature_step"))
        if not any(isinstance(field, BlockMatrices) for field in fields):
            fields = tuple(field for field in fields if field.name != "host_step")
        cls._parameter_fields = fields

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See `SecondOrderOptimizer.add_param_group`; the next step estimates the curvature."""
        super().add_param_group(param_group)
        self._listen()

    # For subclasses.

    @abstractmethod
    def _update(self, block: Block, inputs: StepInputs) -> None:
        """Moves the parameters of a block, and its moments.

        Args:
            block: Parameters with equal hyperparameters, `block.group`.
            inputs: Gradient, estimate and counts of this step.
        """

    def _update_all(self, steps: Iterable[tuple[Block, StepInputs]]) -> None:
        """Calls `_update` for each block; for methods that look at all of them before."""
        for block, inputs in steps:
            self._update(block, inputs)

    def _finished_estimate(
        self, watch: DiagonalWatch | None, factor: Tensor | float | None
    ) -> Tensor | None:
        """The diagonal that a watch has seen, if there is one; times a factor, if there is one."""
        diagonal = None if watch is None else watch.diagonal(magnitudes=self._magnitudes)
        if diagonal is not None and isinstance(factor, Tensor):
            diagonal.mul_(factor.to(diagonal))
        elif diagonal is not None and factor not in (None, 1):
            diagonal.mul_(factor)
        return diagonal

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group.get("bounds") is not None:
            raise no_bounds(type(self).__name__)
        for name in ("update_period", "accumulation_steps"):
            check_integer(name, group[name], whole_floats=True)
        if self._estimates:
            check_not_whole(type(self).__name__, self._parameter_fields, group)

    @property
    def _ranks(self) -> Ranks:
        """The ranks that make this same step, for `_optim.kronecker.division`."""
        if self._notice is not None:  # modules have been called by now
            self._notice.end()
            self._notice = None
        return self._registry.ranks

    def _shares(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Fields of the report that are ratios: numerator and denominator of each, 0-dim."""
        return {}

    # The step.

    @property
    def curvature_due(self) -> bool:
        """True if the next step estimates the curvature.

        It is for loops without a closure, with `watch=False`, that keep the graph themselves:
        `loss.backward(create_graph=optimizer.curvature_due)`. An added or thawed parameter makes
        an estimate due as well.
        """
        return self._schedule.is_due(self._trainable, self.param_groups[0])

    @property
    def is_second_order(self) -> bool:
        """True if a loop that asks, as timm's do, may call `loss.backward(create_graph=True)`.

        The steps are the same with and without. It is needed with `watch=False` only.
        """
        return self.curvature_due and self._uses_graphs

    @overload  # type: ignore[override]
    def step(self, closure: StepClosure) -> Tensor: ...

    @overload
    def step(self, closure: StepClosure | None = None) -> Tensor | None: ...

    def step(self, closure: Any = None) -> Tensor | None:
        """Performs one step.

        Args:
            closure: The standard closure (zero the gradients, compute the loss, call `backward()`,
                return the loss), or a `FunctionalObjective`. None if `loss.backward()` has made the
                gradients already.

        Returns:
            The closure's loss, detached; None without a closure.

        Raises:
            RuntimeError: No gradient reached the parameters, its graph is missing where it is
                needed, or an operation of the model has no second derivative.
            TypeError: The closure returned something else than a loss.
            ValueError: The closure's loss is not a scalar, or a hyperparameter is out of range.
        """
        try:
            self._check_groups()
            self._stepping = True  # backward passes in here are seen by other ways
            try:
                return self._one_step(closure)
            except BaseException:
                self._listen()
                raise
            finally:
                self._stepping = False
        except BaseException:
            Scaling(self).forget()
            raise

    def _check_groups(self) -> None:
        """Checks the hyperparameters of all groups, unless nothing has changed since last time."""
        settings = settings_of(self.param_groups, self.defaults)
        if settings != self._checked:
            for group in self.param_groups:
                self._check_group(group)
            self._checked = settings

    def _one_step(self, closure: Any) -> Tensor | None:
        params = self._trainable
        if closure is not None and hasattr(self, "found_inf"):  # a GradScaler makes this step
            Scaling(self).refuse_closure()
        if not params:
            result: Tensor | None = self._pass(closure)
            self._listen()
            return result
        fresh = closure is None and self._observation is None and not self._schedule.steps
        if fresh and makes_state_only(self.param_groups):
            self._make_state(params)
            self._listen()
            return None
        if type(params[0]) is not Parameter and is_distributed(params[0]):
            return self._step_sharded(closure, params)
        with torch.no_grad():
            if closure is None:
                self._step_on_present(params)
                return None
            # The closure makes gradients of its own, unless it is idle: an estimate that was taken
            # before the step is not of these.
            generator_after = None if self._observation is None else self._rewind_generator()
            due = self._schedule.is_due(params, self.param_groups[0])
            watch = self._watch(params) if due else None
            evaluation = SingleEvaluation(
                closure, params, self._registry, self._last_trace, self._buffer_pool
            )
            parts = int(self.param_groups[0]["accumulation_steps"])
            try:
                outcome = evaluation.run(watch, accumulates=parts > 1)
            except IdleClosure:  # as Lightning passes where the user gives none
                if generator_after is not None and self._generator is not None:
                    self._generator.set_state(generator_after)
                self._step_on_present(params, watch)
                return None
            if self._observation is not None:
                self._forget_observation()
            diagonal = self._finished_estimate(watch, parts if outcome.accumulated else 1)
            products = 0 if watch is None else watch.products
            self._advance(params, outcome, diagonal, (1, products), undo=evaluation.restore)
            return outcome.loss

    def _step_on_present(
        self, params: Sequence[Tensor], watch: DiagonalWatch | None = None
    ) -> None:
        """A step without a closure.

        Args:
            params: The trainable parameters.
            watch: Takes the estimate from the graph of the gradients, if no backward pass was seen.
        """
        name, scaling, observation = type(self).__name__, Scaling(self), self._observation
        self._forget_observation()
        due = self._schedule.is_due(params, self.param_groups[0])
        too_early, unscaling = False, scaling.inverse
        if observation is not None and observation.has_seen(params):
            gradients = present_gradients(name, params, None, scaling)
            observation.check(name, scaling)
            watch, unscaling = observation.watch, observation.unscaling(scaling)
        elif due and self._can_listen and self._predates(params, observation):
            watch, too_early = None, True
            gradients = present_gradients(name, params, None, scaling)
        else:
            if watch is None and due:
                watch = self._watch(params)
            unseen = why_unseen(self._watches, self.param_groups[0])
            gradients = present_gradients(name, params, watch, scaling, unseen)
            # The probes were multiplied by the other root.
            unscaling = None if unscaling is None else unscaling.sqrt()
        diagonal = self._finished_estimate(watch, unscaling)
        products = 0 if watch is None else watch.products
        self._advance(params, Outcome(None, gradients), diagonal, (0, products), scaling.inverse)
        if too_early:
            self._listen_if(self._schedule.repeat(), params, self._last_trace)

    def _step_sharded(self, closure: Any, params: Sequence[Tensor]) -> Tensor | None:
        """See `step`; this process has a part of each parameter, of its gradient and state."""
        vector, generator = self._vector_and_generator(params)
        registry, due = self._registry, self._schedule.is_due(params, self.param_groups[0])
        check_closure(closure, due)
        with torch.no_grad():
            if closure is None:
                scaling = Scaling(self)
                found = held_parts(present_gradients("", params, None, scaling))
                self._advance(params, Outcome(None, found), None, (0, 0), scaling.inverse)
                return None
            if not due:
                evaluation = SingleEvaluation(closure, params, registry, self._last_trace)
                try:
                    outcome = held_outcome(evaluation.run(), vector)
                except IdleClosure:
                    return self._step_sharded(None, params)
                self._advance(params, outcome, None, (1, 0), undo=evaluation.restore)
                registry.reshard()
                return outcome.loss
            sharded = ShardedEvaluation(closure, vector, registry, self._last_trace)
            with sharded.objective as objective:
                estimator = self._estimator_for(params)
                outcome, diagonal = sharded.run(estimator, generator, self._magnitudes)
                effort = objective.evaluations, estimator.n_samples
                self._advance(params, outcome, diagonal, effort, undo=objective.abandon)
            return outcome.loss

    def _advance(
        self,
        params: Sequence[Tensor],
        outcome: Outcome,
        diagonal: Tensor | None,
        effort: tuple[int, int],
        inverse_scale: Tensor | None = None,
        undo: Callable[[], None] | None = None,
    ) -> None:
        """Updates parameters and state, unless loss or gradients are not finite.

        Args:
            params: The trainable parameters.
            outcome: The outcome of the evaluation.
            diagonal: The estimate, if one was due.
            effort: The numbers of evaluations and products, for the report.
            inverse_scale: A factor for the gradients.
            undo: Restores buffers of modules to their values from before the step.
        """
        loss, gradients, whole = outcome.loss, outcome.gradients, outcome.whole
        vector, schedule, layout = self._vector, self._schedule, self._layout
        space = WHOLE if vector is None else vector.space
        check = FiniteCheck(outcome, diagonal, inverse_scale, self._on_device, space)
        if not check.failed:
            if check.estimate_failed:
                diagonal = None
            owners = self._find_owners() if isinstance(space, ShardedSpace) else None
            brought = owners.gather(params, gradients, self.state) if owners else gradients
            blocks = layout.arrange(
                self.param_groups,
                self.state,
                params,
                brought,
                has_estimate=diagonal is not None,
                on_device=check.on_device,
                notes_first=schedule.out_of_turn > 0,
                wholes=owners.wholes if owners else {},
            )
            steps = (StepInputs(b, brought, whole, diagonal, vector, check) for b in blocks)
            self._update_all(zip(blocks, steps, strict=True))
            if owners:
                owners.scatter(check)
            if check.moves:
                due = schedule.count(params, self.param_groups[0], check, layout)
            else:
                due = schedule.repeat()
        else:
            due = schedule.is_due(params, self.param_groups[0])
            if undo is not None:
                undo()
        if self._named is None or self.state.get(params[0]) is not self._named:
            self._show_names(params)
        # All processes are here now; the report may be read by one alone.
        numbers = gathered_numbers(self._shares, gradients, space)
        self._conclude(params, (check, loss, effort, numbers))
        self._listen_if(due, params, self._last_trace)

    def _conclude(self, params: Sequence[Tensor], made: Made) -> None:
        """Notes the gradients that a step left, and shows its report."""
        self._last_trace, self._made = GradientTrace(params), made
        # A weak reference: the optimizer holds its report, and would keep itself alive.
        self._info = cache(partial(report_of, ref(self), params, self._last_trace, *made))

    def _has_decisions(self, step: int, group: dict[str, Any]) -> bool:
        """True if the host decides in this step of a block, so no CUDA graph can repeat it."""
        return False

    def _prepare_capture(self) -> None:
        """Drops what a CUDA graph has to compute in each step."""

    @property
    def _on_device(self) -> bool:
        """True if all decisions of a step stay on the device."""
        capturable = self.param_groups[0]["capturable"]
        if capturable is not None:
            return bool(capturable)
        for group in self.param_groups:
            for p in group["params"]:
                return bool(p.device.type != "cpu")
        return False

    # Estimates.

    def _estimator_for(self, params: Sequence[Tensor]) -> DiagonalEstimator:
        """The estimator of the coming step; the first estimate may draw more labels."""
        estimator, schedule = self.estimator, self._schedule
        if type(estimator) is not GaussNewtonBartlett:
            return estimator
        if schedule.steps and not schedule.is_out_of_turn(params):
            return estimator
        return GaussNewtonBartlett(max(self._first_labels, estimator.n_samples))

    def _vector_and_generator(
        self, params: Sequence[Tensor]
    ) -> tuple[ParameterVector, torch.Generator]:
        """The vector of the parameters, and the source of random numbers."""
        vector, generator = self._vector, self._generator
        if vector is None or generator is None or not vector.matches(params, None):
            self._vector = vector = ParameterVector(params)
            generator = self._random(vector.device)
        return vector, generator

    def _watch(self, params: Sequence[Tensor]) -> DiagonalWatch:
        """A watch that takes the estimate of the coming step."""
        vector, generator = self._vector_and_generator(params)
        watch = self._estimator_for(params).watch(vector, generator, self._buffer_pool)
        watch.ranks = self._registry.ranks
        return watch

    # Backward passes without a closure.

    @property
    def _can_listen(self) -> bool:
        # With several parts, micro-batches outside of the closure would cost an estimate each.
        if not self._watches or self.param_groups[0]["accumulation_steps"] != 1:
            return False
        for group in self.param_groups:
            for p in group["params"]:
                return type(p) is Parameter or not is_distributed(p)
        return False

    def _listen(self) -> None:
        """Begins to see backward passes if the next step estimates the curvature; else stops."""
        params = self._trainable
        self._listen_if(self._schedule.is_due(params, self.param_groups[0]), params)

    def _listen_if(
        self, due: bool, params: Sequence[Tensor], trace: GradientTrace | None = None
    ) -> None:
        """Begins to see backward passes, or stops.

        Args:
            due: Whether the next step estimates the curvature.
            params: The trainable parameters.
            trace: The trace of their gradients as they are now, if there is one.
        """
        if due and self._can_listen:
            if self._listening_since is None or (dist.is_available() and dist.is_initialized()):
                WATCHERS.discard(self)  # anew: there may be a process group now
                WATCHERS.add(self)
            self._listening_since = trace or GradientTrace(params)
        elif self._listening_since is not None:
            self._listening_since = None
            WATCHERS.discard(self)

    def observation_of(self, reached: Collection[int]) -> Observation | None:
        """See `torch_secondorder._optim.diagonal.closureless.Watcher`."""
        if self._stepping:
            return None
        params = self._trainable
        # Hyperparameters may have changed since it began to listen.
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
        """The observation of the coming step; a new one if its gradients are gone."""
        if self._observation is not None and not self._observation.continues(params):
            self._drop_observation()
        if self._observation is None:
            _, generator = self._vector_and_generator(params)
            # The state cannot be read while a CUDA graph is captured.
            self._generator_before = None if capturing(params[0]) else generator.get_state()
            self._observation = Observation(
                params, self._watch(params), self._registry, everywhere=self in WATCHERS
            )
        return self._observation

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A context for forward and backward pass, in loops that call `step()` without a closure.

        You need it with `watch=False`, under `DistributedDataParallel(static_graph=True)`, and if a
        forward pass should choose implementations that have second derivatives. Otherwise the
        optimizer sees backward passes without it.

        If the coming step estimates the curvature, `loss.backward()` inside does the same as in a
        closure: it takes the estimate while it runs and keeps no graph, and `p.grad` may be clipped
        or changed afterwards. If not, the context does nothing. Micro-batches may run in one
        context, or each in its own; their gradients and curvature add up until the step, or until
        the gradients are zeroed.

        Raises:
            RuntimeError: At `backward()`: a second derivative is missing, or there were gradients
                already. A step raises as well if some of its gradients are not from inside.

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
        if not self._schedule.is_due(params, self.param_groups[0]):
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
            self._observation = self._generator_before = None

    def _drop_observation(self) -> None:
        """Drops an observation together with the random numbers that were drawn for it."""
        self._rewind_generator()
        self._forget_observation()

    def _rewind_generator(self) -> Tensor | None:
        """Takes back random numbers that were drawn for an observation.

        Returns:
            The state of the generator after they were drawn; None if there were none.
        """
        if self._observation is None or self._generator is None or self._generator_before is None:
            return None
        after = self._generator.get_state()
        self._generator.set_state(self._generator_before)
        return after

    def _predates(self, params: Sequence[Tensor], observation: Observation | None) -> bool:
        """See `predates`."""
        since, schedule = self._listening_since, self._schedule
        return predates(params, observation, since, schedule, uses_graphs=self._uses_graphs)

    @property
    def _uses_graphs(self) -> bool:
        """True if the graph of the gradients is enough for an estimate."""
        return not isinstance(self.estimator, GaussNewtonBartlett)

    # Checkpoints.

    def _make_state(self, params: Sequence[Tensor]) -> None:
        """Gives each parameter a state, of a step that has not been."""
        make_state(self._parameter_fields, self.param_groups, self.state, params, self._on_device)
        self._show_names()

    @property
    def _seed(self) -> int:  # type: ignore[override]
        return int(self.param_groups[0]["seed"])

    def _before_saving(self) -> None:
        self._schedule.confirm(self._trainable)

    def _find_owners(self) -> Owners | None:
        """The owners of sharded parameters that steps need whole."""
        self._owners = owners_of(self._parameter_fields, self.param_groups, self._owners)
        return self._owners

    def _state_in_parts(self) -> Mapping[Tensor, dict[str, Any]]:
        owners = self._find_owners()
        return owners.in_parts(self.state) if owners else self.state

    def _finish_loading(self, state_dict: dict[str, Any]) -> None:
        super()._finish_loading(state_dict)
        if owners := self._find_owners():
            owners.loaded(self.state)

    def _reset_state(self) -> None:
        super()._reset_state()
        self._forget_observation()
        self._layout = BlockLayout(self._parameter_fields)
        self._schedule = EstimateSchedule(self._warm_up, active=self._estimates)
        self._last_trace = None
        self._buffer_pool = BufferPool()

    def _import_state(self, found: dict[str, Any]) -> None:
        super()._import_state(found)
        self._schedule.trained = self._trainable if self._schedule.steps else None
        self._listen()
