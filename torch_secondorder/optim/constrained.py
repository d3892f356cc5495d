"""A wrapper that keeps constraints with any optimizer, by multipliers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from torch_secondorder._closure.capture import mark_outputs
from torch_secondorder._closure.runner import ModuleRegistry
from torch_secondorder._foundation.checks import check_choice, check_number
from torch_secondorder._foundation.host_transfer import read_numbers
from torch_secondorder._foundation.private_torch import pytree
from torch_secondorder._foundation.random_state import random_state, set_random_state
from torch_secondorder._objective.functional import FunctionalObjective
from torch_secondorder._optim.base import SecondOrderOptimizer, makes_state_only
from torch_secondorder._optim.constraint_term import ConstraintTerm
from torch_secondorder._optim.flat import Descent, FlatOptimizer, Iterate
from torch_secondorder._optim.info import Report, StepInfo, StepStatus
from torch_secondorder._optim.sequential_quadratic import SampledConstraints
from torch_secondorder._optim.subproblem import (
    Subproblem,
    Verdict,
    iterations_of,
    largest_gradient,
    restart,
)
from torch_secondorder._optim.wrapper import WrapperOptimizer
from torch_secondorder._params.space import is_distributed
from torch_secondorder.constraints._functions import ConstraintFunctions, Constraints
from torch_secondorder.constraints._lagrangian import violations
from torch_secondorder.constraints._program import Program
from torch_secondorder.constraints.kkt import KKTReport, kkt_residuals
from torch_secondorder.dataset import DatasetClosure
from torch_secondorder.optim.levenberg_marquardt import LevenbergMarquardt

__all__ = ["Constrained", "ConstrainedInfo"]

Method: TypeAlias = Literal["augmented_lagrangian", "penalty", "sqp"]

_PENALTY, _PENALTY_OF_UPDATES = 10.0, 1.0
_MULTIPLIER_LR = 0.1
# A penalty that has been raised so far, in vain, is worth a note.
_MUCH = 1e4
_IDLE = (StepStatus.NONFINITE_START, StepStatus.NOTHING_TO_TRAIN, StepStatus.ZERO_LEARNING_RATE)


@dataclass(frozen=True, slots=True)
class ConstrainedInfo(Report):
    """Report of one call of `Constrained.step()`.

    Attributes:
        loss: The closure's loss in the first evaluation, without multipliers and penalties; NaN
            without a closure.
        violation: The largest violation of a constraint: at the end of the step beside an optimizer
            that iterates inside a step, at its evaluation beside others. NaN if a constraint is
            not finite there.
        most_violated: The name of that constraint; empty if none is violated.
        feasible: Whether no constraint is violated by more than the tolerance.
        multiplier: The largest absolute value of a multiplier.
        penalty: The largest penalty.
        note: A sentence where something has gone wrong, such as constraints that seem to contradict
            each other; otherwise empty.
        inner: The report of the optimizer inside, if it has one.

    >>> from torch_secondorder import LBFGS
    >>> x = torch.tensor([2.0], requires_grad=True)
    >>> optimizer = Constrained(LBFGS([x]), inequalities={"below one": lambda: x - 1})
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = -x.sum()
    ...     loss.backward()
    ...     return loss
    >>> for _ in range(10):
    ...     loss = optimizer.step(closure)
    >>> optimizer.info.feasible, round(optimizer.info.multiplier, 3)
    (True, 1.0)
    """

    loss: float
    violation: float
    most_violated: str
    feasible: bool
    multiplier: float
    penalty: float
    note: str
    inner: StepInfo | None


class Constrained(WrapperOptimizer):
    """Keeps equality and inequality constraints with any optimizer, by wrapping it.

    The closure stays as it is. The constraints are evaluated whenever it calls `backward()`, before
    the graph is freed, and join its loss: line searches see their value, steps their gradient,
    products their curvature, and gradient clipping in the closure applies to the sum. A constraint
    is a function without arguments that returns a tensor, of which every entry is to be zero
    (equalities) or zero or less (inequalities): a method of the model, or a function of what the
    closure has computed, such as the model's outputs for a batch. Beside a `FunctionalObjective` it
    takes the tree of parameters. A closure that calls `backward()` several times gets the
    constraints with the first call. Beside a `DatasetClosure`, and in loops without a closure,
    constraints have to be functions of the parameters alone.

    The methods:

    - `"sqp"`, the default around `LBFGS` and `BFGS`: sequential quadratic programming. The
      constraints are linearized at each iterate, and the optimizer inside learns the curvature of
      the Lagrangian. Eight or more equalities that mostly depend on each other at the start, such
      as a network's values along a boundary, get the next method by default; so does everything
      where `penalty` or `multiplier_lr` is given, which this method has no use for.
    - `"augmented_lagrangian"`, the default around all others: the loss gets `y c + penalty c^2 / 2`
      for a constraint with value `c` and multiplier `y` (for an inequality, this with
      `max(c, -y / penalty)` as `c`).
    - `"penalty"`: the same with multipliers of zero. What violation stays depends on the penalty.

    Multipliers and penalties change between steps, each constraint's by itself. Around optimizers
    that iterate inside a step (`LBFGS`, `NewtonCG`, ..., `torch.optim.LBFGS`) it is the method of
    multipliers: once the gradient has fallen to a hundredth of what it was after the last update,
    `y` grows by `penalty c`, and a penalty becomes ten times as large if its constraint's violation
    did not fall by a factor of four. Call `step()` until `info` says that the constraints are kept
    and the optimizer inside has converged. Around optimizers with one evaluation a step (Adam, SGD,
    `AdaHessian`, ...) each step moves `y` by `multiplier_lr c`, and penalties stay.

    A multiplier is a price: if `c` may be larger by a small amount, the optimal loss falls by `y`
    times that amount.

    Args:
        optimizer: Any optimizer, of this package or another.
        equalities: What is to be zero: a function that returns a tensor, a list of functions, or a
            dict of them by name.
        inequalities: What is to be zero or less, likewise.
        method: `"sqp"`, `"augmented_lagrangian"` or `"penalty"`; by default as said above.
        penalty: The penalties at the start; zero for a Lagrangian without them. By default 10, and
            1 for optimizers with one evaluation a step.
        multiplier_lr: The rate of the multipliers, per unit of constraint and step. Given to an
            optimizer that iterates inside a step, it takes the place of the method of multipliers,
            for mini-batches. By default 0.1 where it is needed.
        tolerance: Violations up to here count as none: they raise no penalties. By default the root
            of the machine epsilon, 1.5e-8 in float64 and 3.5e-4 in float32.
        max_penalty: Penalties do not grow beyond.
        max_multiplier: Multipliers of the method of multipliers do not grow beyond.

    Attributes:
        optimizer: The optimizer inside.
        method: The method; after the first step, the one in use.
        multiplier_lr: See above; you may change it between steps.

    Raises:
        TypeError: The optimizer is no `torch.optim.Optimizer`, or a constraint no function.
        ValueError: Another argument is out of range, there is no constraint, or parameters are
            sharded.

    The point of the unit disk that is nearest to (2, 1), by Newton's method:

    >>> import torch
    >>> from torch_secondorder import NewtonCG
    >>> x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    >>> optimizer = Constrained(NewtonCG([x]), inequalities={"disk": lambda: x @ x - 1})
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = (x - torch.tensor([2.0, 1.0])).square().sum()
    ...     loss.backward()
    ...     return loss
    >>> for _ in range(30):
    ...     loss = optimizer.step(closure)
    >>> [round(value, 6) for value in x.tolist()], round(optimizer.multipliers["disk"].item(), 6)
    ([0.894427, 0.447214], 1.236068)
    >>> optimizer.info.feasible
    True
    """

    _entry = "constrained"
    _saved: ClassVar[dict[str, str]] = {"program": "_state", **WrapperOptimizer._saved}
    _carried = (
        *WrapperOptimizer._carried,
        *("_program", "_subproblem", "_note", "_pending", "method", "_defaulted", "multiplier_lr"),
        *("_penalty", "_tolerance", "max_penalty", "max_multiplier"),
    )

    def __init__(
        self,
        optimizer: Optimizer,
        equalities: Constraints = None,
        inequalities: Constraints = None,
        method: Method | None = None,
        *,
        penalty: float | None = None,
        multiplier_lr: float | None = None,
        tolerance: float | None = None,
        max_penalty: float = 1e8,
        max_multiplier: float = 1e15,
    ) -> None:
        if method is not None:
            check_choice("method", method, Method)
        check_number("penalty", penalty, low=0.0, optional=True)
        check_number("multiplier_lr", multiplier_lr, low=0.0, optional=True)
        check_number("tolerance", tolerance, low=0.0, optional=True)
        check_number("max_penalty", max_penalty, low=penalty or 0.0)
        check_number("max_multiplier", max_multiplier, above=0.0)
        self._tolerance = tolerance
        self.multiplier_lr = multiplier_lr
        self.max_penalty, self.max_multiplier = float(max_penalty), float(max_multiplier)
        self._program = Program(ConstraintFunctions(equalities, inequalities))
        self._program.tolerance = tolerance
        self._subproblem, self._note = Subproblem(), ""
        # Multipliers and penalties that were set before the first evaluation.
        self._pending: dict[str, Mapping[str, Any]] = {}
        given = {"penalty": penalty, "multiplier_lr": multiplier_lr}
        foreign = [name for name, value in given.items() if value is not None]
        super().__init__(optimizer, ConstraintTerm(self))
        if penalty is None:
            # One step on a noisy gradient would be thrown off by penalties as large.
            penalty = min(_PENALTY if self._iterates else _PENALTY_OF_UPDATES, self.max_penalty)
        self._penalty = float(penalty)
        self._refuse_shards()
        able = self._takes_programs()
        self._defaulted = method is None
        if method is None:
            able = able and not foreign and not self._is_sqp_inside()
            method = "sqp" if able else "augmented_lagrangian"
        elif method == "sqp" and foreign:
            raise ValueError(
                f"{foreign[0]} is no argument of method='sqp', which finds penalties and "
                "multipliers by itself: leave it out, or use method='augmented_lagrangian'"
            )
        elif method == "sqp" and not able:
            raise ValueError(
                f"{type(self._inside).__name__} does no sequential quadratic programming: wrap "
                "LBFGS or BFGS, or leave method out"
            )
        elif method == "sqp" and self._is_sqp_inside():
            raise ValueError(
                "the optimizer inside does sequential quadratic programming already: give all "
                "constraints to one Constrained, or leave method out"
            )
        self.method: Method = method
        self._program.may_refuse = self._defaulted and method == "sqp"

    def _set_up(self) -> None:
        super()._set_up()
        # Whether the optimizer looks at losses and gradients that are not finite itself.
        self._looks = isinstance(self._innermost, SecondOrderOptimizer)
        self._registry = ModuleRegistry()
        self._closure: Any = None
        self._evaluated = self._averages = self._dependence_known = False
        self._entry_point: list[Tensor] = []

    def _takes_programs(self) -> bool:
        """True if the optimizer inside can do sequential quadratic programming."""
        if any(getattr(w, "_keeps_sets", False) for w in self._wrappers()):
            return False  # its steps follow sets already
        return bool(getattr(type(self._innermost), "_takes_constraints", False))

    def _is_sqp_inside(self) -> bool:
        others = (w for w in self._wrappers() if w is not self)
        return any(isinstance(w, Constrained) and w.method == "sqp" for w in others)

    def _refuse_shards(self) -> None:
        if any(is_distributed(p) for group in self.param_groups for p in group["params"]):
            raise ValueError(
                "Constrained takes no parameters that fully_shard has distributed: a constraint "
                "would see its part of them alone. Leave fully_shard out "
                "(DistributedDataParallel is fine)"
            )

    # What may be read and set.

    @property
    def multipliers(self) -> dict[str, Tensor]:
        """The multipliers, by the names of the functions; empty before the first evaluation.

        A copy: assign a dict, of all or some, to start from those of a similar problem. Its values
        are tensors of the constraints' shapes, or numbers.

        Raises:
            TypeError: What is set is no dict.
            ValueError: There is no constraint of a name, or a multiplier does not fit.
        """
        return self._by_name(self._program.multipliers)

    @multipliers.setter
    def multipliers(self, given: Mapping[str, Tensor | float]) -> None:
        self._give("multipliers", given)

    @property
    def penalties(self) -> dict[str, Tensor]:
        """The penalties, by the names of the functions; see `multipliers`."""
        return self._by_name(self._program.penalties)

    @penalties.setter
    def penalties(self, given: Mapping[str, Tensor | float]) -> None:
        self._give("penalties", given)

    @property
    def violations(self) -> dict[str, Tensor]:
        """The violations of the constraints after the last step, by the names of the functions."""
        return self._by_name(self._violations)

    @property
    def tolerance(self) -> float:
        """The violation up to which a constraint counts as kept."""
        if self._tolerance is not None:
            return self._tolerance
        values = self._program.values
        return math.sqrt(torch.finfo(values.dtype if values is not None else torch.float64).eps)

    @property
    def info(self) -> ConstrainedInfo | None:
        """The report of the last step, None before the first."""
        program, first, violated = self._program, self._penalized.first, self._violations
        if first is None or violated is None or program.multipliers is None:
            return None
        assert program.penalties is not None
        most, at = violated.max(0)  # NaN counts as the largest
        loss, violation, multiplier, penalty = read_numbers(
            first[0], most, program.multipliers.abs().max(), program.penalties.max()
        )
        return ConstrainedInfo(
            loss,
            violation,
            "" if violation == 0 else program.functions.name(int(at)),
            violation <= self.tolerance,
            multiplier,
            penalty,
            self._note or program.suspicion(violated, self.tolerance, _MUCH * self._penalty),
            getattr(self._inside, "info", None),
        )

    def kkt_residuals(self, closure: Any, **options: Any) -> KKTReport:
        """The certificate of a minimum; see `torch_secondorder.kkt_residuals` for the options."""
        return kkt_residuals(closure, self, **options)

    @property
    def _violations(self) -> Tensor | None:
        program = self._program
        if program.values is None:
            return None
        return violations(program.values, program.functions.inequality)

    def _by_name(self, vector: Tensor | None) -> dict[str, Tensor]:
        return {} if vector is None else self._program.functions.split(vector.clone())

    def _give(self, kind: str, given: Any) -> None:
        """Sets multipliers or penalties, at the first evaluation if shapes are not known yet."""
        if not isinstance(given, Mapping):
            raise TypeError(f"{kind} must be a dict by name, got {type(given).__name__}")
        program = self._program
        names = program.functions.names
        for name in given:
            if name not in names:
                raise ValueError(f"there is no constraint {name!r}: the names are {names}")
        if program.functions.shapes is None or program.multipliers is None:
            self._pending[kind] = dict(given)
            return
        program.set(kind, given)

    # The step.

    def step(self, closure: Any = None, **more: Any) -> Any:
        """See `WrapperOptimizer.step`."""
        if closure is None and isinstance(self._innermost, FlatOptimizer):
            return self._inside.step(None, **more)  # an error that asks for a closure
        self._closure, self._evaluated, self._note = closure, False, ""
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        # Of a data set, ranks may have batches in different numbers.
        self._averages = several and not isinstance(closure, DatasetClosure)
        kept = self._program.kept(), self._pending
        try:
            if self._iterates and not isinstance(self._innermost, FlatOptimizer):
                closure = closure and self._noting(closure)
            if self._averages:
                with self._registry.watch({}):
                    result = self._stepped(closure, more)
            else:
                result = self._stepped(closure, more)
            values = self._program.values
            if self._evaluated and self.method != "sqp" and values is not None:
                if self._iterates:
                    self._update()
                else:
                    self._ascend(values)
        except BaseException:
            # Optimizers undo the step, and multipliers belong to the parameters.
            self._program.take(kept[0])
            self._pending = kept[1]
            self._return_to_entry()
            raise
        finally:
            self._closure, self._entry_point = None, []
        return result

    def _stepped(self, closure: Any, more: dict[str, Any]) -> Any:
        program = self._program
        kept = program.kept(), self._pending
        try:
            result = super().step(closure, **more)
            program.may_refuse = False
            return result
        except SampledConstraints:  # in the first evaluation: nothing has changed
            program.take(kept[0])
            self._pending = kept[1]
            self.method, program.may_refuse = "augmented_lagrangian", False
            return self._stepped(closure, more)
        except RuntimeError as error:
            if closure is not None or "through the graph a second time" not in str(error):
                raise
            raise RuntimeError(
                "a constraint uses what the forward pass has computed, and backward() has freed "
                "that: without a closure, constraints have to be functions of the parameters "
                "alone. Pass the closure to step()"
            ) from error

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the optimizer inside."""
        super().add_param_group(param_group)
        try:
            self._refuse_shards()
        except ValueError:
            self.param_groups.pop()
            raise

    @property
    def _iterates(self) -> bool:
        """True if multipliers are those of the method of multipliers."""
        inner = self._innermost
        return self.multiplier_lr is None and isinstance(inner, (FlatOptimizer, torch.optim.LBFGS))

    @property
    def _trainable(self) -> list[Tensor]:
        params = [p for group in self.param_groups for p in group["params"]]
        return [p for p in params if p.requires_grad and p.numel()]

    def _leaves_in(self, tree: tuple[Any, ...]) -> list[Tensor]:
        """The trainable parameters, or what stands for them in the tree of a function."""
        params, closure = self._trainable, self._closure
        if not tree or not isinstance(closure, FunctionalObjective):
            return params
        places = {id(leaf): i for i, leaf in enumerate(closure._leaves)}
        leaves = pytree.tree_leaves(tree[0])
        return [leaves[places[id(p)]] for p in params if id(p) in places]

    def _factor(self) -> float:
        return 1.0

    def _begin_step(self) -> None:
        inner: Any = self._innermost
        if self.method == "sqp":
            inner._program = self._program
        elif isinstance(inner, FlatOptimizer):
            self._others_observer = inner._observe
            inner._observe = self._observe
        elif isinstance(inner, torch.optim.LBFGS):
            self._entry_point = [p.detach().clone() for p in self._trainable]
            self._n_iter = iterations_of(inner)

    def _end_step(self) -> None:
        inner: Any = self._innermost
        if self.method == "sqp":
            inner._program = None
        elif isinstance(inner, FlatOptimizer):
            inner._observe = self._others_observer

    def _observe(self, descent: Descent, iterate: Iterate) -> Iterate:
        """Notes the start of a subproblem; see `FlatOptimizer._observe`."""
        violated = self._violations
        if not self._subproblem.steps and self._iterates and violated is not None:
            point = descent.point
            self._subproblem.begin(
                self._trainable, point.loss, point.grad_norm, violated.max().item()
            )
        return iterate if self._others_observer is None else self._others_observer(descent, iterate)

    # Multipliers and penalties.

    @torch.no_grad()
    def _update(self) -> None:
        """Updates multipliers and penalties after a step of an optimizer that iterates inside."""
        program, ascends = self._program, self.method == "augmented_lagrangian"
        program.values = self._values_now()
        if not _finite(program.values):
            self._note = self._not_finite(program.values)
            self._return_to_entry()
            return
        info, violated = self._inner_report(), self._violations
        if info is None or info.status in _IDLE or violated is None:
            return
        if info.loss_after is None or info.grad_norm is None:  # one update, which nobody checked
            self._ascend(program.values)
            return
        verdict = self._subproblem.judge(info, violated.max().item())
        entry = self._entry_point  # where PyTorch's L-BFGS still is, if it will never move again
        if verdict is Verdict.GO_ON and entry and all(map(torch.equal, self._trainable, entry)):
            verdict = Verdict.ASCEND
        most = self.max_multiplier
        if verdict is Verdict.UPDATE:
            program.update(self.tolerance, self.max_penalty, most if ascends else None)
        elif verdict is Verdict.ASCEND and ascends:
            assert program.penalties is not None
            program.ascend(program.penalties, most)
        elif verdict is Verdict.GO_BACK:
            self._go_back()
        if verdict is not Verdict.GO_ON:
            self._subproblem.end()
            if isinstance(self._innermost, torch.optim.LBFGS):
                restart(self._innermost)

    def _ascend(self, values: Tensor) -> None:
        """Moves the multipliers by their rate, unless the optimizer inside has refused the step."""
        if self._looks and not _finite(values):
            self._note = self._not_finite(values)
            return
        info: Any = self._innermost.info if self._looks else None  # type: ignore[attr-defined]
        if self.method == "augmented_lagrangian" and (info is None or info.status not in _IDLE):
            rate = self.multiplier_lr
            self._program.ascend(_MULTIPLIER_LR if rate is None else rate)

    def _inner_report(self) -> StepInfo | None:
        """The report of the optimizer inside; one is made for PyTorch's L-BFGS."""
        inner = self._innermost
        if isinstance(inner, FlatOptimizer):
            return inner.info
        done = iterations_of(inner) - self._n_iter
        # It may end for reasons of its own far from the solution: only the gradient tells.
        largest = largest_gradient(self._trainable)
        return StepInfo(StepStatus.MAX_ITERATIONS, 0.0, 0.0, largest, done)

    def _noting(self, closure: Any) -> Any:
        """A closure that notes the start of a subproblem of PyTorch's L-BFGS."""

        def noting() -> Any:
            first = not self._evaluated
            loss = closure()
            violated = self._violations
            if first and not self._subproblem.steps and violated is not None:
                grad_norm, params = largest_gradient(self._trainable), self._trainable
                self._subproblem.begin(params, 0.0, grad_norm, violated.max().item())
            return loss

        return noting

    def _go_back(self) -> None:
        """Begins the subproblem again, with larger penalties."""
        program, inner = self._program, self._innermost
        assert isinstance(inner, FlatOptimizer) and program.values is not None
        self._subproblem.go_back(self._trainable)
        inner._forget("the augmented Lagrangian fell without end")
        inner._master = None
        # All of them: it would fall past the next constraint otherwise.
        program.stiffen(torch.ones_like(program.values, dtype=torch.bool), self.max_penalty)
        program.values = self._values_now()
        self._note = (
            "the augmented Lagrangian fell without end while constraints were violated more and "
            "more: the parameters were moved back, and penalties raised"
        )

    @torch.no_grad()
    def _return_to_entry(self) -> None:
        """Undoes a step of PyTorch's L-BFGS, which does not look at what is not finite itself."""
        for p, before in zip(self._trainable, self._entry_point, strict=False):
            p.copy_(before)
        if self._entry_point:
            self._innermost.state.clear()
            self._note += "; the parameters were moved back"

    def _not_finite(self, values: Tensor) -> str:
        at = int((~values.isfinite()).to(torch.uint8).argmax())
        return f"the constraint {self._program.functions.name(at)} is {values[at].item()}"

    def _values_now(self) -> Tensor:
        """The values of the constraints where the parameters stand.

        Buffers and random numbers are as before afterwards: the steps of training count.
        """
        functions, closure = self._program.functions, self._closure
        before: dict[Any, Tensor] = {}
        devices = {torch.device("cpu"), *(p.device for p in self._trainable)}
        states = [(device, random_state(device)) for device in devices]
        values: Tensor
        with torch.enable_grad(), ModuleRegistry().watch(before):
            if isinstance(closure, FunctionalObjective):
                values = closure.with_function(functions).source()
            else:
                values = functions()
        for slot, value in before.items():
            slot.restore(value)
        for device, state in states:
            set_random_state(device, state)
        assert self._program.multipliers is not None
        return self._averaged(values.detach()).to(self._program.multipliers)

    def _averaged(self, values: Tensor) -> Tensor:
        """The mean over the ranks that share a batch, with the graph of this rank's part."""
        ranks = self._registry.ranks
        if not self._averages or not ranks.met:
            return values
        own = values.detach()
        return values + (ranks.average(own) - own)

    # See `WrapperOptimizer`.

    def _has_present_term(self) -> bool:
        return not makes_state_only(self.param_groups)

    def _present_term(self) -> Tensor:
        return self._term_of(())

    def _present_seeds(self) -> tuple[Tensor, Tensor, Tensor] | None:
        return self._seeds()

    def _term_of(self, tree: tuple[Any, ...]) -> Tensor:
        """The term of an evaluation, with its graph."""
        values = self._evaluate(tree)
        if self.method == "sqp":
            self._program.record(values, self._leaves_in(tree))
            return values.new_zeros(())
        self._program.values = values.detach()
        if isinstance(self._innermost, LevenbergMarquardt) and self._penalty:
            return self._program.squares(values, mark_outputs)
        return self._program.term(values)

    def _seeds(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Values, the term's derivative by them, and the term, for a plain `backward()`."""
        if self._looks:  # it may need the graph
            return None
        values = self._evaluate(())
        now = self._program.values = values.detach()
        return values, *self._program.seeds(now)

    def _evaluate(self, tree: tuple[Any, ...]) -> Tensor:
        """The values of an evaluation, with their graph."""
        functions = self._program.functions
        if self._dependence_known:
            values = functions(*tree)
        else:
            values = functions(*tree, params=self._leaves_in(tree))
            self._dependence_known = True
        if values.dtype in (torch.float16, torch.bfloat16):
            values = values.float()
        if self._averages:
            values = self._averaged(values)
        own = values.detach()
        trusting = not self._evaluated and not self._looks
        if trusting and not _finite(own):  # it would move the parameters to NaN
            raise RuntimeError(
                f"{self._not_finite(own)} at the start of a step; nothing was changed: begin where "
                "all constraints are finite, and keep them so, for instance with a clamp() inside "
                "a logarithm"
            )
        self._prepare(own.to("cpu", torch.float64) if self.method == "sqp" else own)
        self._evaluated = True
        return values

    def _prepare(self, like: Tensor) -> None:
        """Makes multipliers and penalties where values are."""
        program = self._program
        if program.fits(like):
            return
        # Sequential quadratic programming raises penalties as far as needed, from zero.
        program.set_up(like, 0.0 if self.method == "sqp" else self._penalty)
        pending, self._pending = self._pending, {}
        for kind, given in pending.items():
            program.set(kind, given)

    # Checkpoints.

    @property
    def _state(self) -> dict[str, Any]:
        kept = {"subproblem": self._subproblem.state(), "method": self.method}
        return {**self._program.state(), **kept}

    @_state.setter
    def _state(self, state: dict[str, Any]) -> None:
        self._program.load(state)
        self._subproblem.load(state["subproblem"])
        if self._defaulted and state["method"] == "augmented_lagrangian":
            self.method = state["method"]
        if state["multipliers"] is not None:
            self._program.may_refuse = False

    def _check_saved(self, own: dict[str, Any]) -> None:
        """See `WrapperOptimizer`."""
        self._program.check(own["program"])

    def __repr__(self) -> str:
        return f"Constrained({self._inside!r}, method={self.method!r})"


def _finite(values: Tensor) -> bool:
    """True if all values are finite; waits for a device once."""
    return math.isfinite((values if len(values) == 1 else values.sum()).item())
