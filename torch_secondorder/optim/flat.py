"""Optimizers of one flat vector: what they share."""

from __future__ import annotations

import math
from abc import abstractmethod
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from torch_secondorder.contract import STANDARD_CLOSURE
from torch_secondorder.dataset import DatasetClosure, DatasetObjective
from torch_secondorder.evaluation import Objective, Regularization
from torch_secondorder.objective import ClosureObjective, FunctionalObjective
from torch_secondorder.optim.base import SecondOrderOptimizer
from torch_secondorder.vector import ParameterVector

__all__ = ["FlatOptimizer", "check_size"]


class FlatOptimizer(SecondOrderOptimizer):
    """An optimizer of one flat vector, which may evaluate the closure several times a step.

    A subclass implements `_step(objective)`. `lr` and `weight_decay` may differ between groups, all
    other hyperparameters are read from the first.

    Args:
        params: See `SecondOrderOptimizer`.
        defaults: Hyperparameters.
    """

    @abstractmethod
    def _step(self, objective: Objective) -> Tensor:
        """One step; sets `self.info`, returns the closure's loss at the start."""

    @abstractmethod
    def _forget(self, reason: str) -> None:
        """Drops what was learned of a parameter vector that is no more."""

    def step(self, closure: Any = None) -> Tensor:  # type: ignore[override]
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
        if closure is None:
            raise RuntimeError(
                f"{type(self).__name__}.step() evaluates the loss more than once and needs a "
                f"closure:\n{STANDARD_CLOSURE}"
            )
        return self._run(self._objective(closure))

    def _run(self, objective: Objective) -> Tensor:
        """Performs one step on an objective."""
        # The objective notes a surrounding autocast for the closure; our sums are not to be cast.
        with torch.no_grad(), objective, ExitStack() as stack:
            for device_type in objective.autocast:
                stack.enter_context(torch.autocast(device_type, enabled=False))
            loss = self._step(objective)
        if objective.vector.needs_master:
            self._model_state["master"] = objective.position
        return loss

    @property
    def _learning_rate(self) -> float:
        """The largest of the groups'; the others are relative to it through the vector's scale."""
        return max(float(group["lr"]) for group in self.param_groups)

    def _objective(self, closure: Any, curvature_closure: Any = None) -> Objective:
        groups = self.param_groups
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
        master = self._model_state.get("master")
        if isinstance(closure, FunctionalObjective):
            if curvature_closure is not None:
                raise TypeError(
                    "a curvature_closure goes with a closure, not with a FunctionalObjective"
                )
            return closure.bind(vector, regularization, master)
        over_data = any(isinstance(c, DatasetClosure) for c in (closure, curvature_closure))
        kind = DatasetObjective if over_data else ClosureObjective
        return kind(closure, vector, regularization, master, self._surroundings, curvature_closure)

    def _per_parameter(self, name: str) -> list[float]:
        """A group hyperparameter, repeated for each trainable parameter."""
        return [float(g[name]) for g in self.param_groups for p in g["params"] if p.requires_grad]

    def _current_vector(self) -> ParameterVector:
        """The vector of what is trainable now; what was learned of another one is dropped."""
        params = self._trainable
        if not params:
            raise RuntimeError("no parameter requires a gradient: all of them are frozen")
        scale, rates = None, self._per_parameter("lr")
        if len(set(rates)) > 1:
            # Rounded: a scheduler that multiplies all rates leaves their ratios alone but for the
            # last digits.
            scale = [math.sqrt(float(f"{rate / max(rates):.9e}")) for rate in rates]
        if self._vector is None or not self._vector.matches(params, scale):
            if self._vector is not None:
                self._forget("the trainable parameters or their relative learning rates changed")
                self._model_state.pop("master", None)
            self._vector = ParameterVector(params, scale)
        return self._vector

    # Checkpoints.

    def _import(self, state: dict[str, Any]) -> None:
        master = state.get("master")
        if master is not None:
            vector = self._current_vector()
            check_size(master.numel(), vector)
            self._model_state["master"] = master.to(vector.device, copy=True)
        super()._import({k: v for k, v in state.items() if k != "master"})


def check_size(size: int, vector: ParameterVector) -> None:
    """Raises a ValueError unless a state of `size` parameter entries fits the vector."""
    if size != vector.size:
        raise ValueError(
            f"this state is of {size} parameter entries, the optimizer has {vector.size}: load it "
            "with the model and the frozen parameters that it was saved with"
        )
