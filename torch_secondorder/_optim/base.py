"""Base class of all optimizers: groups, declared state and its checkpoints, and the report."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from torch_secondorder._closure.runner import ModuleRegistry, nonzero
from torch_secondorder._closure.validation import check_is_closure, scalar
from torch_secondorder._foundation.checks import check_number
from torch_secondorder._foundation.types import Closure, ParamsT
from torch_secondorder._objective.functional import FunctionalObjective
from torch_secondorder._optim.checkpoint import add_state, hide_names, show_names, take_state
from torch_secondorder._optim.info import StepInfo, StepStatus
from torch_secondorder._optim.state import Field, ModelField, ParameterField
from torch_secondorder._params.space import is_distributed
from torch_secondorder._params.vector import ParameterVector, check_parameters

#: What an optimizer's `step()` takes.
StepClosure: TypeAlias = Closure | FunctionalObjective


class SecondOrderOptimizer(Optimizer):
    """Base class of the optimizers, driven by a standard closure.

    A subclass checks its own arguments, implements `step`, and declares its state in
    `_state_fields`, from which checkpoints, copies and pickles are made. Two subclasses have more
    to build on: `FlatOptimizer` and `DiagonalOptimizer`.

    Args:
        params: Parameters or groups, as for any `torch.optim.Optimizer`.
        defaults: Hyperparameters; which may differ between groups is up to the subclass.

    Attributes:
        info: The report of the last step, None before the first.

    Raises:
        TypeError: A parameter is neither floating-point nor complex.
        ValueError: A hyperparameter is out of range.

    >>> from torch_secondorder import LBFGS, SOAP
    >>> issubclass(LBFGS, SecondOrderOptimizer), issubclass(SOAP, SecondOrderOptimizer)
    (True, True)
    >>> x = torch.ones(3, 2, requires_grad=True)
    >>> optimizer = SOAP([x])
    >>> optimizer.info is None
    True
    >>> x.square().sum().backward()
    >>> optimizer.step()
    >>> optimizer.info.status.name
    'MOVED'
    """

    #: The state that checkpoints have besides the groups, by name; see `_optim.state`. A subclass
    #: lists its own, those of its bases are added.
    _state_fields: ClassVar[dict[str, Field]] = {}
    _model_fields: ClassVar[tuple[ModelField, ...]] = ()
    _parameter_fields: tuple[ParameterField, ...] = ()
    #: Attributes besides torch's own that pickling and `copy.deepcopy` carry along; likewise.
    _carried: ClassVar[tuple[str, ...]] = ("info",)
    #: The class of its reports.
    _info_type: type[StepInfo] = StepInfo
    #: New names of hyperparameters by their old names, which groups and checkpoints may still have.
    _renamed: ClassVar[dict[str, str]] = {}
    #: A hyperparameter that tells this optimizer's checkpoints, and those it can read, from others.
    _recognized_by = "lr"
    #: One that only others have, if their groups have all of the names of this one.
    _told_apart_by: str | None = None
    #: The state that has the names of whole-model state, in `optimizer.state`.
    _named: dict[str, Any] | None = None
    #: Whether `torch.distributed.checkpoint` has asked for the state.
    _for_distributed = False
    #: For optimizers that declare a `Random`.
    _generator: torch.Generator | None = None
    _seed = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        fields: dict[str, Field] = {}
        carried: list[str] = []
        for base in reversed(cls.__mro__):
            fields |= vars(base).get("_state_fields", {})
            carried += vars(base).get("_carried", ())
        cls._model_fields = tuple(f for f in fields.values() if isinstance(f, ModelField))
        cls._parameter_fields = tuple(f for f in fields.values() if isinstance(f, ParameterField))
        cls._carried = tuple(dict.fromkeys(carried))

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._vector: ParameterVector | None = None
        self._registry = ModuleRegistry()
        self.info = None
        self._start_fields()
        super().__init__(params, defaults)
        if self._sharded:
            for field in self._model_fields:
                field.check_sharded(type(self).__name__)
            # There is a state from now on, and distributed checkpoints need no step to make one.
            self._show_names()

    def _start_fields(self) -> None:
        for field in self._model_fields:
            if not field.held and field.at not in vars(self):
                setattr(self, field.at, field.initial)

    @abstractmethod
    def step(self, closure: StepClosure | None = None) -> Tensor | None:  # type: ignore[override]
        """Performs one step; see the subclasses."""

    @property
    def info(self) -> StepInfo | None:
        """The report of the last step, None before the first."""
        # A function makes it when it is first read, and remembers it. Nothing is set here: `self`
        # may be a wrapper that stands for this object.
        info: StepInfo | None = self._info() if callable(self._info) else self._info
        return info

    @info.setter
    def info(self, info: Any) -> None:
        self._info = info

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
        """True if the parameters are DTensors."""
        return any(is_distributed(p) for p in self._parameters[:1])

    def _known_vector(self) -> ParameterVector | None:
        """The vector of what is trainable, else of all parameters; None where there are none."""
        params = self._trainable or [p for p in self._parameters if p.numel()]
        return ParameterVector(params) if params else None

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raises on numbers out of range; users may write to groups between steps."""
        for old, new in self._renamed.items():
            if old in group:
                warnings.warn(
                    f"the hyperparameter {old!r} of {type(self).__name__} is called {new!r} now; "
                    "the old name will be gone in the next release",
                    DeprecationWarning,
                    stacklevel=3,
                )
                group[new] = group.pop(old)
        for name in ("lr", "weight_decay"):
            value = group[name]
            # Asked at each step: an ordinary number needs no call.
            if type(value) is not float or not 0.0 <= value < math.inf:
                check_number(name, value, low=0.0)

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
            check_is_closure(source)
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
            add_state(self, state_dict["state"])

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
                if self._told_apart_by in group:
                    raise ValueError(
                        f"this is no state of {type(self).__name__}: its groups have "
                        f"{self._told_apart_by!r}, which is of another optimizer"
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
        """Loads declared state, after torch has loaded the rest."""
        self._vector = None
        # A checkpoint of a peer lacks our own hyperparameters. On loading torch adds a default of
        # its own, which is none of ours: a state that was saved again would differ.
        self.defaults.pop("differentiable", None)
        for group in self.param_groups:
            for old, new in self._renamed.items():
                if old in group:
                    group[new] = group.pop(old)
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        take_state(self, state_dict)
        hide_names(self)  # torch has left values there
        self._show_names()

    def _show_names(self, params: Sequence[Tensor] | None = None) -> None:
        """See `show_names`; for each step, with its trainable parameters if they are at hand."""
        show_names(self, params or self._trainable or self._parameters)

    @property
    def _in_pieces(self) -> bool:
        """True if checkpoints have a part of each vector under each parameter."""
        if self._sharded:
            return True
        several = self._for_distributed or (dist.is_available() and dist.is_initialized())
        return several and any(field.vector_names for field in self._model_fields)

    def _before_saving(self) -> None:
        """Waits for what a state has to have."""

    def _state_in_parts(self) -> Mapping[Tensor, dict[str, Any]]:
        """The state of sharded parameters, as this process has it in a checkpoint."""
        return self.state

    def _export_state(self) -> dict[str, Any]:
        """The declared state of the whole model, as tensors, numbers, and lists and dicts."""
        return {k: v for field in self._model_fields for k, v in field.save(self).items()}

    def _import_state(self, found: dict[str, Any]) -> None:
        """Takes over what `_export_state` gave; what is not there begins anew.

        Raises:
            ValueError: The state does not fit; nothing has changed.
        """
        loaded = {
            field: field.load(found, self)
            for field in self._model_fields
            if any(name in found for name in field.names)
        }
        self._reset_state()
        for field, value in loaded.items():
            field.set(self, value)

    def _reset_state(self) -> None:
        """Gives all declared state of the whole model its initial value.

        A subclass that keeps some in objects replaces these.
        """
        for field in self._model_fields:
            if not field.held:
                field.set(self, field.initial)

    def _random(self, device: torch.device) -> torch.Generator:
        """The generator of random numbers on a device, see `Random`; made of `_seed` at first."""
        if self._generator is None or self._generator.device.type != device.type:
            self._generator = torch.Generator(device).manual_seed(int(self._seed))
        return self._generator

    def __getstate__(self) -> dict[str, Any]:
        self._before_saving()
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
            self._start_fields()
            try:
                self._import_state(model_state)
            except ValueError:  # parameters were frozen since the last step
                self._import_state({})
            for field in self._model_fields:
                # Pickles of the last release have some state as attributes.
                if not field.held and field.at in state and not set(field.names) & set(model_state):
                    field.set(self, state[field.at])


def makes_state_only(groups: Sequence[dict[str, Any]]) -> bool:
    """True if a step without a closure would move nothing, for any curvature.

    `torch.distributed.checkpoint` makes a new optimizer fill in its state by such a step, with
    gradients and learning rates of zero.
    """
    if any(float(group["lr"]) != 0 for group in groups):
        return False
    params = [p for group in groups for p in group["params"] if p.requires_grad]
    return all(
        p.grad is not None and p.grad.grad_fn is None and not nonzero(p.grad) for p in params
    )
