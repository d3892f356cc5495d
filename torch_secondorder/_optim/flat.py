"""Optimizers of one flat vector: what they share."""

from __future__ import annotations

import math
from abc import abstractmethod
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._closure.validation import STANDARD_CLOSURE
from torch_secondorder._objective.closure import ClosureObjective, FunctionalObjective
from torch_secondorder._objective.evaluation import Objective, Regularization
from torch_secondorder._optim.base import SecondOrderOptimizer, makes_state_only
from torch_secondorder._optim.present import Scaling
from torch_secondorder._optim.state import Pieces, Vector, declare
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.dataset import DatasetClosure, DatasetObjective

__all__ = ["FlatOptimizer"]


class _Master(Vector):
    """The position in work precision, where parameters are held in less."""

    of_vector = False  # it is dropped with its vector only, not when an optimizer begins anew

    def bind(self, name: str) -> None:
        """See `Field.bind`."""
        super().bind(name)
        self.small_names = ()

    def cut(self, optimizer: FlatOptimizer) -> Pieces:
        """See `ModelField.cut`; the parameters stand for a position that is missing."""
        vector = ParameterVector(optimizer._trainable)
        if not vector.needs_master:
            return {}, {}
        return {}, {self.name: (vector.read(self.get(optimizer)), None)}


class FlatOptimizer(SecondOrderOptimizer):
    """An optimizer of one flat vector, which may evaluate the closure several times a step.

    A subclass implements `_step(objective)`. `lr` and `weight_decay` may differ between groups, all
    other hyperparameters are read from the first.

    Args:
        params: See `SecondOrderOptimizer`.
        defaults: Hyperparameters.
    """

    _step_supports_amp_scaling = True  # else a `GradScaler` would not let itself be noticed
    _state_fields = declare(master=_Master())
    _master: Tensor | None

    @abstractmethod
    def _step(self, objective: Objective) -> Tensor:
        """One step; sets `self.info`, returns the closure's loss at the start."""

    def _forget(self, reason: str) -> None:
        """Drops state that belongs to a parameter vector: all declared vectors and matrices.

        Args:
            reason: A clause for the report.
        """
        for field in self._model_fields:
            if field.of_vector:
                field.set(self, field.initial())

    def step(self, closure: Any = None) -> Tensor | None:  # type: ignore[override]
        """Performs one step.

        Args:
            closure: The standard closure (zero the gradients, compute the loss, call `backward()`,
                return the loss), or a `FunctionalObjective`.

        Returns:
            The closure's loss at the start of the step, detached.

        Raises:
            RuntimeError: There is no closure, or no gradient reached the parameters.
            TypeError: The closure returned something else than a loss.
            ValueError: The closure's loss is not a scalar.
        """
        return self._start(closure)

    def _start(self, closure: Any, curvature_closure: Any = None) -> Tensor | None:
        Scaling(self).refuse_closure()
        params = self._trainable
        if not params:
            result: Tensor | None = self._pass(closure)
            return result
        if closure is not None:
            objective = self._objective(closure, curvature_closure)
            self._show_names(params)  # before there is a history, which would be copied
            return self._run(objective)
        if not makes_state_only(self.param_groups):
            raise RuntimeError(
                f"{type(self).__name__}.step() evaluates the loss more than once and needs a "
                f"closure:\n{STANDARD_CLOSURE}\nIn a loop that passes none, use AdaHessian or "
                "Sophia, which need none."
            )
        self._for_distributed = True
        self._show_names()
        return None

    def _run(self, objective: Objective) -> Tensor:
        """Performs one step on an objective."""
        # The objective notes a surrounding autocast for the closure; our sums are not to be cast.
        with torch.no_grad(), objective, ExitStack() as stack:
            for device_type in objective.autocast:
                stack.enter_context(torch.autocast(device_type, enabled=False))
            loss = self._step(objective)
        if objective.vector.needs_master:
            self._master = objective.position
        return loss

    @property
    def _learning_rate(self) -> float:
        """The largest of the groups'; the others are relative to it through the vector's scale."""
        return max(self._per_parameter("lr"))

    def _objective(self, closure: Any, curvature_closure: Any = None) -> Objective:
        groups = [group for group in self.param_groups if group["params"]]
        maximize = {bool(group["maximize"]) for group in groups}
        if len(maximize) > 1:
            raise ValueError(
                "maximize must be the same in all parameter groups: a line search needs one loss; "
                f"got {[group['maximize'] for group in groups]}"
            )
        for group in self.param_groups:
            self._check_group(group)
        decay = self._per_parameter("weight_decay")
        vector = self._current_vector()
        regularization = Regularization(
            maximize.pop(), decay[0] if len(set(decay)) == 1 else tuple(decay)
        )
        master = self._master
        if isinstance(closure, FunctionalObjective):
            if curvature_closure is not None:
                raise TypeError(
                    "a curvature_closure goes with a closure, not with a FunctionalObjective"
                )
            return closure.bind(vector, regularization, master)
        over_data = any(isinstance(c, DatasetClosure) for c in (closure, curvature_closure))
        kind = DatasetObjective if over_data else ClosureObjective
        return kind(closure, vector, regularization, master, self._registry, curvature_closure)

    def _per_parameter(self, name: str) -> list[float]:
        """A group hyperparameter, repeated for each trainable parameter."""
        return [
            float(group[name])
            for group in self.param_groups
            for p in group["params"]
            if p.requires_grad and p.numel()
        ]

    def _current_vector(self) -> ParameterVector:
        """The vector of what is trainable now; what was learned of another one is dropped."""
        params = self._trainable
        scale, rates = None, self._per_parameter("lr")
        if len(set(rates)) > 1:
            # Rounded: a scheduler that multiplies all rates leaves their ratios alone but for the
            # last digits.
            scale = [math.sqrt(float(f"{rate / max(rates):.9e}")) for rate in rates]
        if self._vector is None or not self._vector.matches(params, scale):
            if self._vector is not None:
                self._forget("the trainable parameters or their relative learning rates changed")
                self._master = None
            self._vector = ParameterVector(params, scale)
            for field in self._model_fields:  # others may be frozen than when it was loaded
                if isinstance(field, Vector) and not field.fits(self, self._vector):
                    field.set(self, None)
        return self._vector
