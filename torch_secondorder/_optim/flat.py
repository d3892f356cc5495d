"""Optimizers of one flat vector: what they share."""

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
from torch_secondorder._objective.closure import ClosureObjective, FunctionalObjective
from torch_secondorder._objective.evaluation import Objective, Regularization
from torch_secondorder._optim.base import SecondOrderOptimizer, copied, makes_state_only
from torch_secondorder._optim.present import Scaling
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.dataset._objective import DatasetObjective
from torch_secondorder.dataset.closure import DatasetClosure

__all__ = ["FlatOptimizer", "Rows", "check_size"]


class FlatOptimizer(SecondOrderOptimizer):
    """An optimizer of one flat vector, which may evaluate the closure several times a step.

    A subclass implements `_step(objective)`. `lr` and `weight_decay` may differ between groups, all
    other hyperparameters are read from the first.

    Args:
        params: See `SecondOrderOptimizer`.
        defaults: Hyperparameters.
    """

    _step_supports_amp_scaling = True  # else a `GradScaler` would not let itself be noticed
    _carried = (*SecondOrderOptimizer._carried, "_master")
    _optional_names: tuple[str, ...] = ("master",)
    #: The position in work precision, where parameters are held in less.
    _master: Tensor | None = None
    #: Whether `torch.distributed.checkpoint` has asked for the state.
    _for_distributed = False

    @abstractmethod
    def _step(self, objective: Objective) -> Tensor:
        """One step; sets `self.info`, returns the closure's loss at the start."""

    @abstractmethod
    def _forget(self, reason: str) -> None:
        """Drops what was learned of a parameter vector that is no more."""

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
