"""A wrapper that keeps constraints with any optimizer, by multipliers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_secondorder._foundation.checks import check_choice, check_number
from torch_secondorder._foundation.private_torch import pytree
from torch_secondorder._objective.functional import FunctionalObjective
from torch_secondorder._optim.flat import Descent, FlatOptimizer, Iterate
from torch_secondorder._optim.info import Report, StepInfo, StepStatus
from torch_secondorder._optim.wrapper import WrapperOptimizer
from torch_secondorder.constraints._functions import ConstraintFunctions, Constraints
from torch_secondorder.constraints._lagrangian import violations
from torch_secondorder.constraints._program import Program

__all__ = ["Constrained", "ConstrainedInfo"]

Method: TypeAlias = Literal["augmented_lagrangian", "penalty", "sqp"]

# A subproblem counts as solved once its gradient has fallen to this share, or after so many steps.
_ACCURACY = 0.01
_PATIENCE = 30
_UNSOLVED = (StepStatus.MAX_ITERATIONS, StepStatus.MAX_EVALUATIONS)
_IDLE = (StepStatus.NONFINITE_START, StepStatus.NOTHING_TO_TRAIN, StepStatus.ZERO_LEARNING_RATE)


@dataclass(frozen=True, slots=True)
class ConstrainedInfo(Report):
    """Report of one call of `Constrained.step()`.

    Attributes:
        loss: The closure's loss in the first evaluation, without multipliers and penalties; NaN
            without a closure.
        violation: The largest violation of a constraint: at the end of the step beside an optimizer
            that iterates inside a step, at its evaluation beside others.
        most_violated: The name of that constraint; empty if none is violated.
        feasible: Whether no constraint is violated by more than the tolerance.
        multiplier: The largest multiplier.
        penalty: The largest penalty.
        inner: The report of the optimizer inside, if it has one.
    """

    loss: float
    violation: float
    most_violated: str
    feasible: bool
    multiplier: float
    penalty: float
    inner: StepInfo | None


class Constrained(WrapperOptimizer):
    """Keeps equality and inequality constraints, by wrapping an optimizer.

    Args:
        optimizer: Any optimizer, of this package or another.
        equalities: What is to be zero: a function that returns a tensor, a list of functions, or a
            dict of them by name.
        inequalities: What is to be zero or less, likewise.
        method: `"sqp"` for sequential quadratic programming (`LBFGS` and `BFGS`),
            `"augmented_lagrangian"`, or `"penalty"`; by default the first that the optimizer can.
        penalty: The penalties at the start.
        multiplier_lr: The rate of the multipliers, for optimizers with one evaluation a step.
        tolerance: Violations up to here count as none.
        max_penalty: The largest penalty.
        max_multiplier: The largest multiplier.
    """

    _entry = "constrained"
    _saved: ClassVar[dict[str, str]] = {
        "multipliers": "_multipliers",
        "penalties": "_penalties",
        "before": "_before",
        "reference": "_reference",
        "waiting": "_waiting",
        **WrapperOptimizer._saved,
    }
    _carried = (
        *WrapperOptimizer._carried,
        *("_program", "method", "_penalty", "multiplier_lr", "_tolerance", "max_penalty"),
        *("max_multiplier", "_reference", "_waiting"),
    )

    def __init__(
        self,
        optimizer: Optimizer,
        equalities: Constraints = None,
        inequalities: Constraints = None,
        method: Method | None = None,
        *,
        penalty: float = 10.0,
        multiplier_lr: float | None = None,
        tolerance: float | None = None,
        max_penalty: float = 1e8,
        max_multiplier: float = 1e15,
    ) -> None:
        if method is not None:
            check_choice("method", method, Method)
        check_number("penalty", penalty, low=0.0)
        check_number("multiplier_lr", multiplier_lr, low=0.0, optional=True)
        check_number("tolerance", tolerance, low=0.0, optional=True)
        check_number("max_penalty", max_penalty, low=penalty)
        check_number("max_multiplier", max_multiplier, above=0.0)
        self._penalty, self._tolerance = penalty, tolerance
        self.multiplier_lr = multiplier_lr
        self.max_penalty, self.max_multiplier = max_penalty, max_multiplier
        self._program = Program(ConstraintFunctions(equalities, inequalities))
        # The largest gradient at the start of the present subproblem, and its steps so far.
        self._reference, self._waiting = math.inf, 0
        super().__init__(optimizer, _ConstraintTerm(self))
        able = getattr(type(self._innermost), "_takes_constraints", False)
        if method is None:
            method = "sqp" if able else "augmented_lagrangian"
        elif method == "sqp" and not able:
            raise ValueError(
                f"{type(self._innermost).__name__} does not do sequential quadratic programming: "
                "wrap LBFGS or BFGS, or leave method at its default"
            )
        self.method: Method = method

    def _set_up(self) -> None:
        super()._set_up()
        inner = self._inside
        while isinstance(inner, WrapperOptimizer):
            inner = inner._inside
        self._innermost = inner
        self._iterates = isinstance(inner, (FlatOptimizer, torch.optim.LBFGS))
        self._evaluated = False
        self._places: list[int] | None = None

    # What may be read and set.

    @property
    def multipliers(self) -> dict[str, Tensor]:
        """The multipliers, by the names of the functions."""
        y = self._program.multipliers
        return {} if y is None else self._program.functions.split(y.clone())

    @property
    def penalties(self) -> dict[str, Tensor]:
        """The penalties, by the names of the functions."""
        rho = self._program.penalties
        return {} if rho is None else self._program.functions.split(rho.clone())

    @property
    def violations(self) -> dict[str, Tensor]:
        """The violations of the constraints, by the names of the functions."""
        program = self._program
        if program.values is None:
            return {}
        functions = program.functions
        return functions.split(violations(program.values, functions.inequality))

    @property
    def info(self) -> ConstrainedInfo | None:
        """The report of the last step, None before the first."""
        program, first = self._program, self._penalized.first
        if first is None or program.values is None or program.multipliers is None:
            return None
        assert program.penalties is not None
        functions = program.functions
        most, at = violations(program.values, functions.inequality).max(0)
        name = functions.name(int(at)) if most > 0 else ""
        violation = most.item()
        return ConstrainedInfo(
            first[0].item(),
            violation,
            name,
            violation <= self.tolerance,
            program.multipliers.abs().max().item(),
            program.penalties.max().item(),
            getattr(self._inside, "info", None),
        )

    @property
    def tolerance(self) -> float:
        """The violation up to which a constraint counts as kept."""
        if self._tolerance is not None:
            return self._tolerance
        values = self._program.values
        return math.sqrt(torch.finfo(values.dtype if values is not None else torch.float64).eps)

    # The step.

    def step(self, closure: Any = None, **more: Any) -> Any:
        """See `WrapperOptimizer.step`."""
        self._places = self._places_in(closure)
        self._evaluated = False
        result = super().step(closure, **more)
        if self._evaluated and self.method != "sqp":
            with torch.no_grad():
                self._update(closure)
        return result

    def _places_in(self, closure: Any) -> list[int] | None:
        """The places of the trainable parameters in a `FunctionalObjective`'s tree."""
        if not isinstance(closure, FunctionalObjective):
            return None
        places = {id(leaf): i for i, leaf in enumerate(closure._leaves)}
        return [places[id(p)] for p in self._trainable if id(p) in places]

    @property
    def _trainable(self) -> list[Tensor]:
        params = [p for group in self.param_groups for p in group["params"]]
        return [p for p in params if p.requires_grad and p.numel()]

    def _factor(self) -> float:
        return 1.0

    def _begin_step(self) -> None:
        inner: Any = self._innermost
        if self.method == "sqp":
            inner._program = self._program
        elif isinstance(inner, FlatOptimizer):
            self._others_observer = inner._observe
            inner._observe = self._observe

    def _end_step(self) -> None:
        inner: Any = self._innermost
        if self.method == "sqp":
            inner._program = None
        elif isinstance(inner, FlatOptimizer):
            inner._observe = self._others_observer

    def _observe(self, descent: Descent, iterate: Iterate) -> Iterate:
        """Notes the gradient at the start of a subproblem; see `FlatOptimizer._observe`."""
        if not self._waiting:
            self._reference = descent.point.grad_norm
        return iterate if self._others_observer is None else self._others_observer(descent, iterate)

    def _update(self, closure: Any) -> None:
        """Updates multipliers and penalties after a step."""
        program = self._program
        if self.multiplier_lr is not None or not self._iterates:
            if self.method == "augmented_lagrangian":
                rate = self.multiplier_lr
                program.ascend(0.1 if rate is None else rate)
            return
        values = self._values_now(closure)
        program.values = values
        if not bool(values.isfinite().all()):
            return
        self._waiting += 1
        status = getattr(getattr(self._innermost, "info", None), "status", None)
        if status in _IDLE:
            return
        penalties = status not in _UNSOLVED or self._solved()
        if not penalties and self._waiting < _PATIENCE:
            return
        multipliers = self.method == "augmented_lagrangian"
        if penalties:
            most = torch.full_like(values, self.max_penalty)
            program.update(self.tolerance, most, self.max_multiplier, multipliers=multipliers)
        elif multipliers:
            assert program.penalties is not None
            program.ascend(program.penalties)
        self._waiting = 0

    def _solved(self) -> bool:
        """True if the present subproblem is solved accurately enough."""
        return bool(self._innermost.info.grad_norm <= _ACCURACY * self._reference)

    def _values_now(self, closure: Any) -> Tensor:
        """The values of the constraints where the parameters stand."""
        functions = self._program.functions
        values: Tensor
        if isinstance(closure, FunctionalObjective):
            values = closure.with_function(functions).source()
        else:
            values = functions()
        assert self._program.multipliers is not None
        return values.to(self._program.multipliers)

    # See `WrapperOptimizer`.

    def _present_term(self) -> Tensor:
        return self._term_of(())

    def _term_of(self, tree: tuple[Any, ...]) -> Tensor:
        """The term of an evaluation, with its graph."""
        program, functions = self._program, self._program.functions
        if functions.shapes is None:
            values = functions(*tree, params=self._leaves_in(tree))
        else:
            values = functions(*tree)
        self._evaluated = True
        if self.method == "sqp":
            if program.multipliers is None:
                self._begin(values.to("cpu", torch.float64))
            program.record(values, self._leaves_in(tree))
            return values.new_zeros(())
        if values.dtype in (torch.float16, torch.bfloat16):
            values = values.float()
        y = program.multipliers
        if y is None or y.dtype != values.dtype or y.device != values.device:
            self._begin(values)
        program.values = values.detach()
        return program.term(values)

    def _begin(self, values: Tensor) -> None:
        self._program.set_up(values, self._penalty)

    def _leaves_in(self, tree: tuple[Any, ...]) -> list[Tensor]:
        """The trainable parameters, or what stands for them in a tree."""
        if not tree or self._places is None:
            return self._trainable
        leaves = pytree.tree_leaves(tree[0])
        return [leaves[place] for place in self._places]

    # Checkpoints.

    @property
    def _multipliers(self) -> Tensor | None:
        return self._program.multipliers

    @_multipliers.setter
    def _multipliers(self, value: Tensor | None) -> None:
        self._program.multipliers = value
        self._program.changed()

    @property
    def _penalties(self) -> Tensor | None:
        return self._program.penalties

    @_penalties.setter
    def _penalties(self, value: Tensor | None) -> None:
        self._program.penalties = value
        self._program.changed()

    @property
    def _before(self) -> Tensor | None:
        return self._program.before

    @_before.setter
    def _before(self, value: Tensor | None) -> None:
        self._program.before = value

    def __repr__(self) -> str:
        return f"Constrained({self._inside!r}, method={self.method!r})"


class _Values:
    """See `torch_secondorder._optim.wrapper.Values`."""

    def __init__(self, owner: Constrained, tree: tuple[Any, ...]) -> None:
        self.taken: list[Tensor] = []
        self._owner, self._tree = owner, tree

    def take(self) -> Tensor | None:
        if self.taken:  # the constraints count once in an evaluation
            return None
        term = self._owner._term_of(self._tree)
        self.taken.append(term.detach())
        return term


class _ConstraintTerm:
    """See `torch_secondorder._optim.wrapper.Term`."""

    def __init__(self, owner: Constrained) -> None:
        self._owner = owner

    @contextmanager
    def watching(self, seed: int, tree: Any = None) -> Iterator[_Values]:
        yield _Values(self._owner, () if tree is None else (tree,))

    def missing(self) -> RuntimeError:
        return RuntimeError("the constraints have no value")
