"""What all optimizers share: groups, checkpoints, and the report."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from torch_secondorder.optim.info import StepInfo
from torch_secondorder.replay import Surroundings
from torch_secondorder.space import is_distributed
from torch_secondorder.vector import ParameterVector, check_parameters

__all__ = ["SecondOrderOptimizer", "check_number", "copied"]


class SecondOrderOptimizer(Optimizer):
    """Base class of the optimizers, driven by a standard closure.

    A subclass checks its own arguments, implements `step`, and keeps what belongs to the whole
    model through `_export_state` and `_import_state`. There are two kinds: `FlatOptimizer` and
    `DiagonalOptimizer`.

    Args:
        params: Parameters or groups, as for any `torch.optim.Optimizer`.
        defaults: Hyperparameters; which may differ between groups is up to the subclass.

    Attributes:
        info: The report of the last step, None before the first.

    Raises:
        TypeError: A parameter is neither floating-point nor complex.
        ValueError: A parameter is empty, or a hyperparameter out of range.
    """

    info: StepInfo | None  # of no class: Lightning's wrappers look there before they ask the object
    #: A hyperparameter that tells this optimizer's checkpoints, and those it can read, from others.
    _recognized_by = "lr"
    #: Attributes besides torch's own that pickling and `copy.deepcopy` carry along.
    _carried: tuple[str, ...] = ("info",)

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._vector: ParameterVector | None = None
        self._surroundings = Surroundings()
        self.info = None
        super().__init__(params, defaults)
        if is_distributed(self.param_groups[0]["params"][0]):
            # There is a state from now on, and distributed checkpoints need no step to make one.
            _ = self._model_state

    # For subclasses.

    @abstractmethod
    def _export_state(self) -> dict[str, Any]:
        """Whole-model state: tensors, numbers, and lists or dicts of them."""

    @abstractmethod
    def _import_state(self, state: dict[str, Any]) -> None:
        """Takes over what `_export_state` gave; empty for none. Raises ValueError on misfits."""

    # Gradients and groups.

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
    def _trainable(self) -> list[Tensor]:
        return [p for g in self.param_groups for p in g["params"] if p.requires_grad]

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raises on numbers out of range; asked at each step, for users write to groups."""
        for name in ("lr", "weight_decay"):
            check_number(name, group[name], low=0.0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, see `torch.optim.Optimizer.add_param_group`."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_parameters(group["params"])
            self._check_group(group)
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
        self._add_state(result["state"])
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
            self._import(_by_parameter(state_dict))
        except (KeyError, ValueError):
            self._load(before)
            self._import(_by_parameter(before))
            raise

    def _load(self, state_dict: dict[str, Any]) -> None:
        Optimizer.load_state_dict(self, state_dict)
        self._vector = None
        # A checkpoint of a peer lacks what only we have. On loading torch adds a default of its
        # own, which is none of ours: a state that was saved again would differ.
        self.defaults.pop("differentiable", None)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def _add_state(self, states: dict[int, dict[str, Any]]) -> None:
        """Adds whole-model state to a state dict, under the number of the first parameter."""
        # Beside the parameter's own state, not in it: the tensors may be replaced.
        states[0] = {**states.get(0, {}), **self._export_state()}

    def _import(self, states: list[dict[str, Any]]) -> None:
        """Takes whole-model state from the original: torch has cast it to the parameter's dtype.

        Args:
            states: One for each parameter.
        """
        self._import_state({k: copied(v) for k, v in states[0].items()})

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        carried = {name: getattr(self, name) for name in self._carried}
        return state | carried | {"model_state": self._export_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        model_state = state.pop("model_state", None)
        if "info" in state:
            self.info = state.pop("info")
        super().__setstate__(state)
        if model_state is not None:  # unpickled or copied; torch also comes here to load a state
            self._vector = None
            self._surroundings = Surroundings()
            try:
                self._import_state(model_state)
            except ValueError:  # parameters were frozen since the last step
                self._import_state({})


def _by_parameter(state_dict: dict[str, Any]) -> list[dict[str, Any]]:
    """The states in the order of the parameters, which are numbers, or names in checkpoints."""
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    return [state_dict["state"].get(key, {}) for key in keys]


def check_number(name: str, value: Any, *, low: float, integer: bool = False) -> None:
    """Raises a ValueError that shows `value` unless it is a finite number of at least `low`."""
    kind = "an integer" if integer else "a finite number"
    try:
        number = float(value)
    except (RuntimeError, TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= low) or (integer and int(number) != value):
        raise ValueError(f"{name} must be {kind} of at least {low:g}, got {value!r}")


def copied(value: Any) -> Any:
    """A copy of tensors, and of lists and dicts of them."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    if isinstance(value, list):
        return [copied(v) for v in value]
    return value
