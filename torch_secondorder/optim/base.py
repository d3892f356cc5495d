"""What all optimizers share: groups, the objective of a step, checkpoints, and the report."""

from __future__ import annotations

import math
from abc import abstractmethod
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_secondorder.evaluation import Objective, Regularization
from torch_secondorder.objective import STANDARD_CLOSURE, ClosureObjective, FunctionalObjective
from torch_secondorder.optim.info import StepInfo
from torch_secondorder.replay import Surroundings
from torch_secondorder.vector import ParameterVector, check_parameters

__all__ = ["SecondOrderOptimizer", "check_number", "check_size"]


class SecondOrderOptimizer(Optimizer):
    """Base class: an optimizer of one flat vector, driven by a standard closure.

    A subclass checks its own arguments, implements `_step(objective)`, and keeps what belongs to
    the whole model through `_export_state` and `_import_state`.

    Args:
        params: Parameters or groups, as for any `torch.optim.Optimizer`.
        defaults: Hyperparameters; `lr`, `weight_decay` may differ between groups, the others are
            read from the first.

    Attributes:
        info: The report of the last step, None before the first.

    Raises:
        TypeError: A parameter is neither floating-point nor complex.
        ValueError: A parameter is empty, or a hyperparameter out of range.
    """

    info: StepInfo | None = None
    #: A hyperparameter that tells this optimizer's checkpoints, and those it can read, from others.
    _recognized_by = "lr"
    #: Attributes besides torch's own that pickling and `copy.deepcopy` carry along.
    _carried: tuple[str, ...] = ("info",)

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._vector: ParameterVector | None = None
        self._surroundings = Surroundings()
        super().__init__(params, defaults)

    # For subclasses.

    @abstractmethod
    def _step(self, objective: Objective) -> Tensor:
        """One step; sets `self.info`, returns the closure's loss at the start."""

    @abstractmethod
    def _export_state(self) -> dict[str, Any]:
        """Whole-model state: tensors, numbers, and lists or dicts of them."""

    @abstractmethod
    def _import_state(self, state: dict[str, Any]) -> None:
        """Takes over what `_export_state` gave; empty for none. Raises ValueError on misfits."""

    @abstractmethod
    def _forget(self, reason: str) -> None:
        """Drops what was learned of a parameter vector that is no more."""

    # The step.

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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See `torch.optim.Optimizer.zero_grad`; here without a profiler range, which takes time.

        Args:
            set_to_none: Whether gradients are dropped instead of filled with zeros.
        """
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            return
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

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
        for group in groups:  # schedulers and users write to them
            for name in ("lr", "weight_decay"):
                check_number(name, group[name], low=0.0)
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
        return ClosureObjective(
            closure, vector, regularization, master, self._surroundings, curvature_closure
        )

    def _per_parameter(self, name: str) -> list[float]:
        """A group hyperparameter, repeated for each trainable parameter."""
        return [float(g[name]) for g in self.param_groups for p in g["params"] if p.requires_grad]

    @property
    def _trainable(self) -> list[Tensor]:
        return [p for g in self.param_groups for p in g["params"] if p.requires_grad]

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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, see `torch.optim.Optimizer.add_param_group`."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_parameters(group["params"])
            for name in ("lr", "weight_decay"):
                check_number(name, group[name], low=0.0)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    # Checkpoints, pickling, copying.

    @property
    def _model_state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.state[self.param_groups[0]["params"][0]]
        return state

    def state_dict(self) -> dict[str, Any]:
        """See `torch.optim.Optimizer.state_dict`; loads with `torch.load(weights_only=True)`."""
        result: dict[str, Any] = super().state_dict()
        # Under the first parameter; beside its own state, not in it: the tensors may be replaced.
        result["state"][0] = {**result["state"].get(0, {}), **self._export_state()}
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer.load_state_dict`; training then goes on bit for bit.

        Raises:
            ValueError: The state is of parameters of another number or shape; nothing has changed.
        """
        for group in state_dict["param_groups"]:
            if self._recognized_by not in group:
                raise ValueError(
                    f"this is no state of {type(self).__name__}: its groups have "
                    f"{sorted(set(group) - {'params'})} and lack {self._recognized_by!r}"
                )
        before = self.state_dict()
        self._load(state_dict)
        try:
            self._import(state_dict["state"].get(0, {}))
        except (KeyError, ValueError):
            self._load(before)
            self._import(before["state"][0])
            raise

    def _load(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._vector = None
        for group in self.param_groups:  # a checkpoint of a peer lacks what only we have
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def _import(self, state: dict[str, Any]) -> None:
        """Takes whole-model state from the original: torch has cast it to the parameter's dtype."""
        master = state.get("master")
        if master is not None:
            vector = self._current_vector()
            check_size(master.numel(), vector)
            self._model_state["master"] = master.to(vector.device, copy=True)
        self._import_state({k: _copied(v) for k, v in state.items() if k != "master"})

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        carried = {name: getattr(self, name) for name in self._carried}
        return state | carried | {"model_state": self._export_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        model_state = state.pop("model_state", None)
        super().__setstate__(state)
        if model_state is not None:  # unpickled or copied; torch also comes here to load a state
            self._vector = None
            self._surroundings = Surroundings()
            try:
                self._import_state(model_state)
            except ValueError:  # parameters were frozen since the last step
                self._import_state({})


def check_number(name: str, value: Any, *, low: float, integer: bool = False) -> None:
    """Raises a ValueError that shows `value` unless it is a finite number of at least `low`."""
    kind = "an integer" if integer else "a finite number"
    try:
        number = float(value)
    except (RuntimeError, TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= low) or (integer and int(number) != value):
        raise ValueError(f"{name} must be {kind} of at least {low:g}, got {value!r}")


def check_size(size: int, vector: ParameterVector) -> None:
    """Raises a ValueError unless a state of `size` parameter entries fits the vector."""
    if size != vector.size:
        raise ValueError(
            f"this state is of {size} parameter entries, the optimizer has {vector.size}: load it "
            "with the model and the frozen parameters that it was saved with"
        )


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_copied(v) for v in value]
    return value
