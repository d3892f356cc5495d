"""A wrapper that keeps constraints with any optimizer, by multipliers."""

from __future__ import annotations

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
from torch_secondorder._optim.info import Report, StepInfo
from torch_secondorder._optim.wrapper import WrapperOptimizer
from torch_secondorder.constraints._functions import ConstraintFunctions, Constraints
from torch_secondorder.constraints._lagrangian import augmented, next_multipliers, violations
from torch_secondorder.constraints._program import Program

__all__ = ["Constrained", "ConstrainedInfo"]

Method: TypeAlias = Literal["augmented_lagrangian", "penalty", "sqp"]


@dataclass(frozen=True, slots=True)
class ConstrainedInfo(Report):
    """Report of one call of `Constrained.step()`.

    Attributes:
        loss: The closure's loss in the first evaluation, without multipliers and penalties.
        violation: The largest violation of a constraint, at the end of the step.
        most_violated: The name of that constraint; empty if none is violated.
        inner: The report of the optimizer inside, if it has one.
    """

    loss: float
    violation: float
    most_violated: str
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
    """

    _entry = "constrained"
    _saved: ClassVar[dict[str, str]] = {
        "multipliers": "_multipliers",
        "penalties": "_penalties",
        **WrapperOptimizer._saved,
    }
    _carried = (*WrapperOptimizer._carried, "_program", "method", "_penalty")

    def __init__(
        self,
        optimizer: Optimizer,
        equalities: Constraints = None,
        inequalities: Constraints = None,
        method: Method | None = None,
        *,
        penalty: float = 10.0,
    ) -> None:
        if method is not None:
            check_choice("method", method, Method)
        check_number("penalty", penalty, above=0.0)
        self._penalty = penalty
        self._program = Program(ConstraintFunctions(equalities, inequalities))
        super().__init__(optimizer, _ConstraintTerm(self))
        if method is None:
            able = getattr(type(optimizer), "_takes_constraints", False)
            method = "sqp" if able else "augmented_lagrangian"
        self.method: Method = method

    @property
    def multipliers(self) -> dict[str, Tensor]:
        """The multipliers, by the names of the functions."""
        y = self._program.multipliers
        return {} if y is None else self._program.functions.split(y)

    @property
    def info(self) -> ConstrainedInfo | None:
        """The report of the last step, None before the first."""
        if self._penalized.first is None or self._program.values is None:
            return None
        functions = self._program.functions
        violated = violations(self._program.values, functions.inequality)
        most, at = violated.max(0)
        name = functions.name(int(at)) if most > 0 else ""
        inner = getattr(self.optimizer, "info", None)
        return ConstrainedInfo(self._penalized.first[0].item(), most.item(), name, inner)

    @property
    def _multipliers(self) -> Tensor | None:
        return self._program.multipliers

    @_multipliers.setter
    def _multipliers(self, value: Tensor | None) -> None:
        self._program.multipliers = value

    @property
    def _penalties(self) -> Tensor | None:
        return self._program.penalties

    @_penalties.setter
    def _penalties(self, value: Tensor | None) -> None:
        self._program.penalties = value

    def step(self, closure: Any = None, **more: Any) -> Any:
        """See `WrapperOptimizer.step`."""
        self._places = self._places_in(closure)
        return super().step(closure, **more)

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
        if self.method == "sqp":
            self.optimizer._program = self._program  # type: ignore[attr-defined]

    def _end_step(self) -> None:
        if self.method == "sqp":
            self.optimizer._program = None  # type: ignore[attr-defined]
        elif self.method == "augmented_lagrangian" and self._program.values is not None:
            program = self._program
            with torch.no_grad():
                values = program.functions().to("cpu", torch.float64)
            mask = program.functions.inequality
            assert program.multipliers is not None and program.penalties is not None
            program.values = values
            program.multipliers = next_multipliers(
                values, program.multipliers, program.penalties, mask
            )

    def _has_present_term(self) -> bool:
        return True

    def _present_term(self) -> Tensor:
        return self._term_of(())

    def _term_of(self, tree: tuple[Any, ...]) -> Tensor:
        """The term of an evaluation, with its graph."""
        program = self._program
        values = program.functions(*tree)
        if program.multipliers is None:
            program.multipliers = torch.zeros(len(values), dtype=torch.float64)
            program.penalties = torch.full_like(program.multipliers, self._penalty)
        assert program.penalties is not None
        if self.method == "sqp":
            params = self._trainable
            if tree and self._places is not None:
                leaves = pytree.tree_leaves(tree[0])
                params = [leaves[place] for place in self._places]
            program.record(values, params)
            return values.new_zeros(())
        program.values = values.detach().to("cpu", torch.float64)
        y, rho = (v.to(values) for v in (program.multipliers, program.penalties))
        return augmented(values, y, rho, program.functions.inequality.to(values.device))

    def __repr__(self) -> str:
        return f"Constrained({self.optimizer!r}, method={self.method!r})"


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
