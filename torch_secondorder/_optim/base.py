"""What all optimizers share: groups, checkpoints, and the report."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from torch_secondorder._closure.replay import ModuleRegistry
from torch_secondorder._closure.validation import check_callable, scalar
from torch_secondorder._objective.functional import FunctionalObjective
from torch_secondorder._objective.one_shot import nonzero
from torch_secondorder._optim.info import StepInfo, StepStatus
from torch_secondorder._params.space import is_distributed
from torch_secondorder._params.vector import ParameterVector, check_parameters

__all__ = ["SecondOrderOptimizer", "check_number", "copied", "makes_state_only"]


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
        ValueError: A hyperparameter is out of range.
    """

    info: StepInfo | None  # of no class: Lightning's wrappers look there before they ask the object
    #: The class of its reports.
    _info_type: type[StepInfo] = StepInfo
    #: Names of whole-model state that is not always there.
    _optional_names: tuple[str, ...] = ()
    #: Names of it in checkpoints of peers.
    _foreign_names: tuple[str, ...] = ()
    #: The state that has the names of all of it, in `optimizer.state`.
    _named: dict[str, Any] | None = None
    #: A hyperparameter that tells this optimizer's checkpoints, and those it can read, from others.
    _recognized_by = "lr"
    #: Attributes besides torch's own that pickling and `copy.deepcopy` carry along.
    _carried: tuple[str, ...] = ("info",)

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._vector: ParameterVector | None = None
        self._registry = ModuleRegistry()
        self.info = None
        super().__init__(params, defaults)
        if self._sharded:
            # There is a state from now on, and distributed checkpoints need no step to make one.
            _ = self.state[self._parameters[0]]

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
    def _parameters(self) -> list[Tensor]:
        """All parameters in the order of the groups, some of which may be empty."""
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def _trainable(self) -> list[Tensor]:
        """The parameters that a step may move; without entries there is nothing to."""
        groups = self.param_groups
        return [p for g in groups for p in g["params"] if p.requires_grad and p.numel()]

    @property
    def _sharded(self) -> bool:
        """Whether the parameters are."""
        return any(is_distributed(p) for p in self._parameters[:1])

    def _known_vector(self) -> ParameterVector | None:
        """The vector of what is trainable, else of all parameters; None where there are none."""
        params = self._trainable or [p for p in self._parameters if p.numel()]
        return ParameterVector(params) if params else None

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raises on numbers out of range; asked at each step, for users write to groups."""
        for name in ("lr", "weight_decay"):
            check_number(name, group[name], low=0.0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, see `torch.optim.Optimizer.add_param_group`.

        Parameters without entries are fine, as is a group without parameters.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        full = [p for p in group["params"] if is_lazy(p) or p.numel()]
        try:
            if full:
                check_parameters(full)
            self._check_group(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    # Steps that move nothing.

    def _pass(self, closure: Any) -> Any:
        """A step with nothing to train: one evaluation, as in `torch.optim`, if there is a closure.

        Args:
            closure: See `step`.

        Returns:
            What the closure returned, detached.
        """
        loss, value = None, math.nan
        if closure is not None:
            source = closure.source if isinstance(closure, FunctionalObjective) else closure
            check_callable(source)
            with torch.enable_grad():
                loss = source()
        if loss is not None:
            loss = scalar(loss).detach()
            value = loss.item()
        evaluations = int(closure is not None)
        status = StepStatus.NOTHING_TO_TRAIN
        self.info = self._info_type(status, value, value, None, evaluations=evaluations)
        return loss

    # Checkpoints, pickling, copying.

    def state_dict(self) -> dict[str, Any]:
        """See `torch.optim.Optimizer.state_dict`; loads with `torch.load(weights_only=True)`."""

        def add(_: Optimizer, state_dict: dict[str, Any]) -> None:
            self._add_state(state_dict["state"])

        # Before all other hooks, which are to see the whole.
        handle = self.register_state_dict_post_hook(add, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer.load_state_dict`; training then goes on bit for bit.

        Raises:
            ValueError: The state is of parameters of another number or shape; nothing has changed.
        """
        before = dict(vars(self))
        final: dict[str, Any] = {}  # what the hooks have made of it

        def check(_: Optimizer, state_dict: dict[str, Any]) -> None:
            final.update(state_dict)
            for group in final["param_groups"]:
                if self._recognized_by not in group:
                    raise ValueError(
                        f"this is no state of {type(self).__name__}: its groups have "
                        f"{sorted(set(group) - {'params'})} and lack {self._recognized_by!r}"
                    )

        def finish(_: Optimizer) -> None:
            try:
                self._finish_loading(final)
            except (KeyError, ValueError):
                vars(self).update(before)
                raise

        handles = (
            self.register_load_state_dict_pre_hook(check),  # after all others
            self.register_load_state_dict_post_hook(finish, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _finish_loading(self, state_dict: dict[str, Any]) -> None:
        """Takes over what torch does not know, after it has loaded the rest."""
        self._vector = None
        # A checkpoint of a peer lacks what only we have. On loading torch adds a default of its
        # own, which is none of ours: a state that was saved again would differ.
        self.defaults.pop("differentiable", None)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._import(_by_parameter(state_dict))
        self._hide_names()  # torch has left values there
        self._show_names()

    def _whole_state(self) -> dict[str, Any]:
        """Whole-model state, as checkpoints have it."""
        return self._export_state()

    def _whole_names(self) -> set[str]:
        """The names of whole-model state, in checkpoints."""
        return {*self._whole_state(), *self._optional_names, *self._foreign_names}

    def _show_names(self, params: Sequence[Tensor] | None = None) -> None:
        """Puts the names of whole-model state where `torch.distributed.checkpoint` looks for them.

        It finds in a flattened checkpoint only what `optimizer.state` has a name for. There is None
        under each; `state_dict` gives values.

        Args:
            params: The trainable parameters, if they are at hand.
        """
        params = params or self._trainable or self._parameters
        if not params or (self._named is not None and self.state.get(params[0]) is self._named):
            return
        self._hide_names()
        self._named = self.state[params[0]]
        names = self._whole_names().difference(self._foreign_names)
        self._named.update(dict.fromkeys(sorted(names)))

    def _hide_names(self) -> None:
        names = self._whole_names()
        for state in self.state.values():
            for name in names.intersection(state):
                del state[name]
        self._named = None

    def _add_state(self, states: dict[int, dict[str, Any]]) -> None:
        """Adds whole-model state to a state dict, under the number of the first that is trained.

        Distributed checkpoints leave the state of others out, and want one of each that is trained.
        """
        params, whole = self._parameters, self._whole_state()
        names = {*whole, *self._optional_names, *self._foreign_names}
        trained = [number for number, p in enumerate(params) if p.requires_grad]
        for number in trained or range(len(params))[:1]:
            states.setdefault(number, {})
        # Beside the parameter's own state, not in it: the tensors may be replaced.
        for number, state in states.items():
            states[number] = {k: v for k, v in state.items() if k not in names and v is not None}
        for number in (trained or range(len(params)))[:1]:
            states[number] = states[number] | whole

    def _import(self, states: list[dict[str, Any]]) -> None:
        """Takes whole-model state from the original: torch has cast it to the parameter's dtype.

        Args:
            states: One for each parameter.
        """
        found: dict[str, Any] = {}
        for name in self._whole_names():
            values = [state[name] for state in states if state.get(name) is not None]
            if values:
                found[name] = copied(values[0])
        self._import_state(found)

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
            self._vector = self._named = None
            self._registry = ModuleRegistry()
            try:
                self._import_state(model_state)
            except ValueError:  # parameters were frozen since the last step
                self._import_state({})


def makes_state_only(groups: Sequence[dict[str, Any]]) -> bool:
    """Whether a step without a closure now moves nothing, whatever the curvature.

    Gradients and learning rates of zero are how `torch.distributed.checkpoint` asks a new optimizer
    for its state.
    """
    params = [p for group in groups for p in group["params"] if p.requires_grad]
    return all(float(group["lr"]) == 0 for group in groups) and all(
        p.grad is not None and p.grad.grad_fn is None and not nonzero(p.grad) for p in params
    )


def _by_parameter(state_dict: dict[str, Any]) -> list[dict[str, Any]]:
    """The states in the order of the parameters, which are numbers, or names in checkpoints."""
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    found = [state_dict["state"].get(key, {}) for key in keys]
    # What a flattened checkpoint has not comes out of it as an empty dict.
    return [
        {
            name: v
            for name, v in state.items()
            if v is not None and not (isinstance(v, dict) and not v)
        }
        for state in found
    ]


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
