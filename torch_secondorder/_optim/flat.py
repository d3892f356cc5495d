"""Base class of optimizers that see all parameters as one flat vector."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from torch_secondorder._closure.validation import STANDARD_CLOSURE
from torch_secondorder._objective.base import Objective, Regularization
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder._objective.evaluation import Evaluation
from torch_secondorder._objective.functional import FunctionalObjective
from torch_secondorder._optim.base import SecondOrderOptimizer, copied, makes_state_only
from torch_secondorder._optim.descent import Descent, DescentInfo, Point
from torch_secondorder._optim.info import StepStatus
from torch_secondorder._optim.present import Scaling
from torch_secondorder._params.vector import ParameterVector, max_norm
from torch_secondorder.dataset._objective import DatasetObjective
from torch_secondorder.dataset.closure import DatasetClosure

__all__ = ["FlatOptimizer", "Rows", "check_size"]


class FlatOptimizer(SecondOrderOptimizer):
    """Base class of optimizers that see all parameters as one flat vector.

    One call of `step()` evaluates the closure, calls `_iterate` until something ends the step, and
    reports. The base class runs that loop, maps the groups to the vector (with their own `lr` and
    `weight_decay`; all other hyperparameters are read from the first group), handles a start that
    is not finite, decides when the step has converged, and carries the state through checkpoints,
    DDP and FSDP.

    A subclass implements:

    - `__init__`: checks its arguments and passes the hyperparameters on. `lr`, `max_iter`,
      `tolerance_grad`, `tolerance_change`, `weight_decay` and `maximize` have a meaning here; a
      hyperparameter that is left out has the default of `LBFGS`.
    - `_iterate`: one iteration. `descent.point` is the current point. A line search along a
      direction goes by way of `Line`, whose `accept` moves the parameters.
    - `_forget`: drops what was learned, when other parameters are trained.
    - its state, see `_export_state`.

    It may override `_evaluate` and `_begin`, name the class of its report in `_info_type`, and give
    the report's further fields in `_details`.

    Args:
        params: See `SecondOrderOptimizer`.
        defaults: Hyperparameters.
    """

    _step_supports_amp_scaling = True  # else a `GradScaler` would not let itself be noticed
    _carried = (*SecondOrderOptimizer._carried, "_master")
    _optional_names: tuple[str, ...] = ("master",)
    _info_type: type[DescentInfo] = DescentInfo
    #: The position in work precision, where parameters are held in less.
    _master: Tensor | None = None
    #: Whether `torch.distributed.checkpoint` has asked for the state.
    _for_distributed = False
    #: The largest entry of all gradients at the starts of steps.
    _largest_gradient = 0.0

    # For subclasses.

    @abstractmethod
    def _iterate(self, descent: Descent) -> StepStatus | None:
        """One iteration from `descent.point` on.

        Returns:
            The reason to end the step; None to go on. The loop itself ends the step where it has
            converged or the budget is spent.
        """

    @abstractmethod
    def _forget(self, reason: str) -> None:
        """Drops what was learned about a parameter vector that is no longer trained."""

    def _evaluate(self, objective: Objective) -> tuple[Evaluation, Point]:
        """Evaluates the objective at the start of a step, with one synchronization."""
        evaluation = objective.evaluate()
        grad = evaluation.grad
        grad_norm, loss = objective.vector.space.to_host(
            largest=(max_norm(grad),), whole=(evaluation.loss,)
        )
        return evaluation, Point(loss, grad_norm, grad)

    def _begin(self, descent: Descent) -> None:
        """Prepares the first iteration of a step."""

    def _details(self) -> dict[str, Any]:
        """Fields of the report beside those that `DescentInfo` has."""
        return {}

    def _refuse_start(self) -> dict[str, Any]:
        """Reacts to a start that is not finite; returns the details of the report."""
        self._forget("the loss or gradient at the start of a step was not finite")
        return {}

    # Steps.

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
        return self._run(closure)

    def _run(self, closure: Any, curvature_closure: Any = None) -> Tensor | None:
        if hasattr(self, "found_inf"):  # a GradScaler calls
            Scaling(self).refuse_closure()
        params, rates, decays = self._trained()
        if not params:
            result: Tensor | None = self._pass(closure)
            return result
        if closure is None:
            self._prepare_state()
            return None
        objective = self._objective(params, rates, decays, closure, curvature_closure)
        self._show_names(params)  # before there is a history, which would be copied
        # The objective notes a surrounding autocast for the closure; our sums are not to be cast.
        with torch.no_grad(), objective, ExitStack() as stack:
            for device_type in objective.autocast:
                stack.enter_context(torch.autocast(device_type, enabled=False))
            loss = self._step(objective, max(map(float, rates)))
        if objective.vector.needs_master:
            self._master = objective.position
        return loss

    def _prepare_state(self) -> None:
        """Makes the state that `torch.distributed.checkpoint` asks for."""
        if not makes_state_only(self.param_groups):
            raise RuntimeError(
                f"{type(self).__name__}.step() evaluates the loss more than once and needs a "
                f"closure:\n{STANDARD_CLOSURE}\nIn a loop that passes none, use AdaHessian or "
                "Sophia, which need none."
            )
        self._for_distributed = True
        self._show_names()

    def _step(self, objective: Objective, lr: float) -> Tensor:
        """One step on an objective; sets `self.info`, returns the closure's loss at the start.

        Args:
            objective: The function that is minimized.
            lr: The largest learning rate of the groups. The others are relative to it, by the
                scale of the vector.
        """
        evaluation, point = self._evaluate(objective)
        loss, grad_norm = point.loss, point.grad_norm
        # A copy: a closure may use one tensor for all its losses.
        returned = evaluation.closure_loss.clone()
        del evaluation
        if not point.finite:
            objective.abandon()
            details = self._refuse_start()
            status, evaluations = StepStatus.NONFINITE_START, objective.evaluations
            self.info = self._info_type(status, loss, loss, grad_norm, 0, evaluations, **details)
            return returned
        self._largest_gradient = max(self._largest_gradient, grad_norm)
        group = self.param_groups[0]
        tolerance_grad = group.get("tolerance_grad")
        if tolerance_grad is None:
            tolerance_grad = 1e-7 * min(1.0, self._largest_gradient)
        tolerance_change = group.get("tolerance_change", 1e-9)
        descent = Descent(
            objective, point, lr, group.get("max_iter", 20), tolerance_grad, tolerance_change
        )
        del point  # a gradient, and perhaps a graph, that the iterations need not hold for long
        self._begin(descent)
        ending = None
        while ending is None:
            ending = descent.ending() or self._iterate(descent)
        self.info = self._info_type(
            ending,
            loss,
            descent.point.loss,
            descent.point.grad_norm,
            descent.count,
            objective.evaluations,
            step_length=descent.step_length,
            search_status=descent.search_status,
            nonfinite_trials=descent.nonfinite_trials,
            **self._details(),
        )
        return returned

    def _trained(self) -> tuple[list[Tensor], list[Any], list[Any]]:
        """The trainable parameters, with the `lr` and `weight_decay` of each."""
        params, rates, decays = [], [], []
        for group in self.param_groups:
            lr, weight_decay = group["lr"], group["weight_decay"]
            for p in group["params"]:
                if p.requires_grad and p.numel():
                    params.append(p)
                    rates.append(lr)
                    decays.append(weight_decay)
        return params, rates, decays

    def _objective(
        self,
        params: Sequence[Tensor],
        rates: Sequence[Any],
        decays: Sequence[Any],
        closure: Any,
        curvature_closure: Any,
    ) -> Objective:
        """The function that a step minimizes."""
        maximize = set()
        for group in self.param_groups:
            if group["params"]:
                maximize.add(bool(group["maximize"]))
            self._check_group(group)
        if len(maximize) > 1:
            values = [group["maximize"] for group in self.param_groups if group["params"]]
            raise ValueError(
                "maximize must be the same in all parameter groups: a line search needs one loss; "
                f"got {values}"
            )
        decays = tuple(map(float, decays))
        vector = self._current_vector(params, list(map(float, rates)))
        decay = decays[0] if len(set(decays)) == 1 else decays
        regularization, master = Regularization(maximize.pop(), decay), self._master
        if isinstance(closure, FunctionalObjective):
            if curvature_closure is not None:
                raise TypeError(
                    "a curvature_closure goes with a closure, not with a FunctionalObjective"
                )
            return closure.bind(vector, regularization, master)
        over_data = any(isinstance(c, DatasetClosure) for c in (closure, curvature_closure))
        kind = DatasetObjective if over_data else ClosureObjective
        return kind.for_step(
            closure, vector, regularization, master, self._registry, curvature_closure
        )

    def _current_vector(self, params: Sequence[Tensor], rates: Sequence[float]) -> ParameterVector:
        """The vector of the trainable parameters; what was learned about another one is dropped."""
        scale = None
        if len(set(rates)) > 1:
            # Rounded: a scheduler that multiplies all rates leaves their ratios alone but for the
            # last digits.
            scale = [math.sqrt(float(f"{rate / max(rates):.9e}")) for rate in rates]
        if self._vector is None or not self._vector.matches(params, scale):
            if self._vector is not None:
                self._forget("the trainable parameters or their relative learning rates changed")
                self._master = None
            self._vector = ParameterVector(params, scale)
            if self._master is not None and self._master.numel() != self._vector.size:
                self._master = None  # what is trained has changed since it was loaded
        return self._vector

    # Checkpoints.

    def _import(self, states: list[dict[str, Any]]) -> None:
        if is_cut_up(states) or self._sharded:
            states = [self._gathered_state(states)]
        master = next((s["master"] for s in states if s.get("master") is not None), None)
        vector = self._known_vector()
        if master is not None and vector is not None:
            if self._trainable:
                check_size(master.numel(), vector)
            master = master.to(vector.device, vector.dtype, copy=True)
        self._master = master
        super()._import(states)

    # Checkpoints of sharded parameters: vectors as DTensors, a part under each parameter, so that
    # `torch.distributed.checkpoint` can cut them up anew. That loads into the tensors that a new
    # optimizer shows: so all are there from the beginning, in full size, and numbers are tensors.
    # So are those of whole parameters where there are several processes.

    @property
    def _cuts_up(self) -> bool:
        """Whether checkpoints have a part of each vector under each parameter."""
        several = dist.is_available() and dist.is_initialized()
        return self._sharded or self._for_distributed or several

    def _split_state(self, vector: ParameterVector) -> tuple[dict[str, Any], dict[str, Rows]]:
        """Whole-model state as numbers and small tensors, and vectors by their names."""
        raise NotImplementedError

    def _join_state(
        self, small: dict[str, Any], vectors: dict[str, Tensor], vector: ParameterVector
    ) -> dict[str, Any]:
        """What `_import_state` takes, from what `_split_state` gave."""
        raise NotImplementedError

    def _whole_state(self) -> dict[str, Any]:
        master = {} if self._master is None else {"master": self._master.clone()}
        return self._export_state() | master

    def _whole_names(self) -> set[str]:
        names = super()._whole_names()
        if self._cuts_up and self._trainable:
            names.update(self._split_state(ParameterVector(self._trainable))[0])
        return names

    def _show_names(self, params: Sequence[Tensor] | None = None) -> None:
        named = self._named
        super()._show_names(params)
        if self._named is not named and self._cuts_up and self._trainable:
            vector = ParameterVector(self._trainable)
            names = [*self._split_state(vector)[1], *(["master"] if vector.needs_master else [])]
            for p in vector.params:
                self.state[p].update(dict.fromkeys(_PREFIX + name for name in names))

    def _hide_names(self) -> None:
        super()._hide_names()
        for state in self.state.values():
            for name in [name for name in state if name.startswith(_PREFIX)]:
                del state[name]

    def _add_state(self, states: dict[int, dict[str, Any]]) -> None:
        if not self._cuts_up or not self._trainable:
            super()._add_state(states)
            return
        states.clear()
        params = self._parameters
        vector = ParameterVector(self._trainable)
        small, vectors = self._split_state(vector)
        if vector.needs_master:
            vectors["master"] = Rows(vector.read(self._master))
        numbers = [i for i, p in enumerate(params) if p.requires_grad and p.numel()]
        # Under the first that is trained: distributed checkpoints leave out the others.
        states[numbers[0]] = {name: _as_tensor(value) for name, value in small.items()}
        for name, rows in vectors.items():
            for number, part in zip(numbers, vector.distribute(*rows), strict=True):
                states.setdefault(number, {})[_PREFIX + name] = part
        for number, p in enumerate(params):
            if p.requires_grad:
                states.setdefault(number, {})

    def _gathered_state(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """What `_export_state` gave and a master copy, from a state that `_add_state` cut up."""
        if not any(states) or not self._trainable:
            return {}
        vector = ParameterVector(self._trainable)
        trained = {id(p) for p in vector.params}
        found = [s for p, s in zip(self._parameters, states, strict=True) if id(p) in trained]
        names = [name for name in found[0] if name.startswith(_PREFIX)]
        if not names or any(name not in state for name in names for state in found):
            raise ValueError(
                "this state is not one of sharded parameters, or others were frozen when it was "
                "saved: save it from an optimizer of parameters that are sharded (over one rank "
                "is fine) and trained as here"
            )
        vectors = {
            name.removeprefix(_PREFIX): vector.collect([state[name] for state in found])
            for name in names
        }
        small = {k: _as_number(v) for k, v in found[0].items() if not k.startswith(_PREFIX)}
        master = vectors.pop("master", None)
        state = self._join_state(small, vectors, vector)
        return state if master is None else state | {"master": master}


class Rows(NamedTuple):
    """A vector `(n,)`, or several `(k, n)` in a checkpoint that has room for `rows` of them."""

    vectors: Tensor
    rows: int | None = None


#: What the names of cut-up vectors in a checkpoint begin with.
_PREFIX = "flat_"


def is_cut_up(states: Sequence[dict[str, Any]]) -> bool:
    """Whether states by parameter have parts of vectors."""
    return any(name.startswith(_PREFIX) for state in states for name in state)


def _as_tensor(value: Any) -> Any:
    """A number as a tensor; what is a tensor, or a dict of them, as it is."""
    dtype = torch.float64 if isinstance(value, float) else None
    return torch.tensor(value, dtype=dtype) if isinstance(value, (int, float)) else value


def _as_number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and not value.dim() else copied(value)


def check_size(size: int, vector: ParameterVector) -> None:
    """Raises a ValueError unless a state of `size` parameter entries fits the vector."""
    if size != vector.size:
        raise ValueError(
            f"this state is of {size} parameter entries, the optimizer has {vector.size}: load it "
            "with the model and the frozen parameters that it was saved with"
        )
