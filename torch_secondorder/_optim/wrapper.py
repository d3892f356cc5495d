"""Optimizers that wrap any optimizer and add a term to the loss that it minimizes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_secondorder._autograd.backward_hook import (
    backward_from,
    is_outermost,
    keep_patched,
    patched_backward,
)
from torch_secondorder._closure.runner import GradientTrace
from torch_secondorder._closure.validation import (
    STANDARD_CLOSURE,
    check_is_closure,
    lost_graph,
    scalar,
)
from torch_secondorder._foundation.private_torch import OPTIMIZER_HOOKS, steps_are_seen
from torch_secondorder._foundation.subclasses import plain
from torch_secondorder._objective.functional import FunctionalObjective
from torch_secondorder._optim.base import makes_state_only
from torch_secondorder._optim.present import Scaling
from torch_secondorder.dataset import DatasetClosure

# The loss of a step without a closure.
_NAN = torch.tensor(torch.nan, device="cpu")


class Values(Protocol):
    """Values of a term during one evaluation.

    Attributes:
        taken: The values that were taken so far, detached.
    """

    taken: list[Tensor]

    def take(self) -> Tensor | None:  # pragma: no cover - a protocol
        """The value since the last call, with its graph; None if there is none."""

    def seeds(self) -> tuple[Tensor, Tensor] | None:  # pragma: no cover - a protocol
        """Takes the value without a graph of its own, if one suffices.

        Returns:
            Tensors that the value is a function of, as one vector with its graph, and the value's
            derivative by them; None if the value has to be taken with its graph, or if there is
            none.
        """


class Term(Protocol):
    """A term that is added to the loss of each evaluation."""

    def watching(
        self, seed: int, tree: Any = None
    ) -> AbstractContextManager[Values]:  # pragma: no cover - a protocol
        """A context around one forward pass, which collects the term's values.

        Args:
            seed: The seed of random numbers, the same for all evaluations of a step.
            tree: The argument of a `FunctionalObjective`'s function; None in a closure, where the
                parameters themselves are differentiated.
        """

    def missing(self) -> RuntimeError:  # pragma: no cover - a protocol
        """The error for an evaluation in which the term had no value."""


class PenalizedLoss:
    """Adds a term to closures and functions; one object for all steps.

    Args:
        term: The term.

    Attributes:
        first: Loss and term in the first evaluation of the step, the term without its factor.
    """

    def __init__(self, term: Term) -> None:
        self.first: tuple[Tensor, Tensor] | None = None
        #: The name of an optimizer that leaves `backward()` to the closure; empty for others.
        self.leaves_backward = ""
        self._term = term
        self._params: Sequence[Tensor] = ()
        self._factor, self._seed = 0.0, 0
        self._partial: tuple[Tensor, Tensor] | None = None  # of the first pass over a data set

    def begin(self, params: Sequence[Tensor], factor: float, seed: int) -> None:
        """Begins a step.

        Args:
            params: The parameters.
            factor: The factor of the term.
            seed: See `Term.watching`.
        """
        self.first = self._partial = None
        self._params, self._factor, self._seed = params, factor, seed

    def closure(self, closure: Any) -> Any:
        """A closure, `DatasetClosure` or `FunctionalObjective` with the term."""
        # Partial functions of methods of this object: the optimizer inside recognizes the closure
        # at the next step, and uses again what it has learned about it.
        if isinstance(closure, FunctionalObjective):
            return closure.with_function(partial(self._evaluate_function, closure.function))
        if isinstance(closure, DatasetClosure):
            return closure.amended(self._evaluate_batch)
        check_is_closure(closure)
        return partial(self._evaluate, closure)

    def _evaluate(self, closure: Callable[[], Any]) -> Tensor:
        """The closure's loss with the term, which each `loss.backward()` inside adds as well."""
        before = GradientTrace(self._params)
        with (
            self._term.watching(self._seed) as values,
            patched_backward(partial(self._backward, values)),
        ):
            loss = scalar(closure())
        if values.taken:
            taken = values.taken
            return self._sum(loss, taken[0] if len(taken) == 1 else torch.stack(taken).sum())
        if before.shows_backward(self._params):
            raise self._term.missing() if values.take() is None else lost_graph()
        if self.leaves_backward:
            raise RuntimeError(
                f"the closure did not call backward(), and {self.leaves_backward} does not either: "
                f"the loss would have no gradient. Pass a closure like\n{STANDARD_CLOSURE}"
            )
        # The caller differentiates the loss that it gets.
        return self._sum(loss, self._taken(values))

    def _evaluate_function(self, function: Callable[[Any], Tensor], tree: Any) -> Tensor:
        with self._term.watching(self._seed, tree) as values:
            loss = scalar(function(tree))
        return self._sum(loss, self._taken(values))

    def _evaluate_batch(
        self, compute: Callable[[], Tensor], weight: float, share: float, last: bool
    ) -> Tensor:
        """The loss of a part of the data, with its part of the mean that the term is."""
        with self._term.watching(self._seed) as values:
            loss = compute()
        value = self._taken(values)
        if self.first is None:
            so_far = self._partial or (0.0, 0.0)
            found = so_far[0] + weight * loss.detach(), so_far[1] + share * value.detach()
            self._partial, self.first = (None, found) if last else (found, None)
        return loss + self._factor * (share / weight) * value

    def _sum(self, loss: Tensor, value: Tensor) -> Tensor:
        if self.first is None:
            self.first = loss.detach(), value.detach() if value.requires_grad else value
        return loss + self._scaled(value)

    def _scaled(self, value: Tensor) -> Tensor:
        return value if self._factor == 1.0 else self._factor * value

    def _taken(self, values: Values) -> Tensor:
        value = values.take()
        if value is None:
            raise self._term.missing()
        return value

    def _backward(
        self, values: Values, loss: Tensor, gradient: Tensor | None = None, *args: Any, **more: Any
    ) -> None:
        """Stands in for `loss.backward()` inside a closure."""
        plainly = not (args or more) and gradient is None and type(loss) is Tensor
        if plainly and self._factor == 1.0 and is_outermost():
            seeds = values.seeds()
            if seeds is not None:
                backward_from(*seeds, loss)
                return
        value = values.take()
        loss, gradient = plain(loss), plain(gradient)
        if value is not None:
            if gradient is not None:
                loss, gradient = (loss * gradient).sum(), None
            loss = loss + self._scaled(value)
        loss.backward(gradient, *args, **more)

    def add_to_gradients(
        self, present: Callable[[], Tensor], seeds: Callable[[], Any], scale: Tensor | None = None
    ) -> None:
        """Adds the gradient of the term to `p.grad`, for a step without a closure.

        Args:
            present: Returns the term, with its graph.
            seeds: See `WrapperOptimizer._present_seeds`.
            scale: What the gradients are scaled by, of one entry; None for nothing.
        """
        grads = [p.grad for p in self._params if p.grad is not None]
        graph = any(g.grad_fn is not None for g in grads)
        with torch.enable_grad():
            found = seeds() if self._factor == 1.0 and scale is None and not graph else None
            if found is not None:
                values, derivative, value = found
                backward_from(values, derivative)
            else:
                value = present()
                term = self._factor * value
                if scale is not None:
                    term = term * scale.to(term.device).reshape(())
                term.backward(create_graph=graph)
        self.first = _NAN, value.detach()


class WrapperOptimizer(Optimizer, ABC):
    """Base class of optimizers that wrap another one and add a term to its loss.

    A subclass implements `_factor` and `_present_term`, and names its entry in checkpoints and the
    attributes that go there. The groups and the state are those of the optimizer inside, so
    schedulers may be given either; so is every attribute that this class does not have itself.

    Args:
        optimizer: Any optimizer, of this package or another.
        term: The term.
        seed: The seed of random numbers; each step adds one to it.

    Attributes:
        optimizer: The optimizer inside.

    Raises:
        TypeError: The optimizer is no `torch.optim.Optimizer`.
    """

    #: The name of the wrapper's entry in checkpoints.
    _entry: str
    #: The attributes in that entry, by their names there.
    _saved: ClassVar[dict[str, str]] = {"seed": "_seed", "steps": "_steps"}
    #: The attributes that pickling and `copy.deepcopy` carry along.
    _carried: tuple[str, ...] = ("_inside", "_penalized", "_seed", "_steps")
    _step_supports_amp_scaling = True  # otherwise a `GradScaler` would stay unnoticed

    def __init__(self, optimizer: Optimizer, term: Term, seed: int = 0) -> None:
        # Not `super().__init__()`: groups and state are those of the optimizer inside.
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer is what trains the model, got {type(optimizer).__name__}: make it "
                f"first, as in {type(self).__name__}(torch.optim.Adam(model.parameters()), ...)"
            )
        self._inside = optimizer
        self._penalized = PenalizedLoss(term)
        self._seed, self._steps = seed, 0
        self._set_up()

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Puts hooks and the profiler's entry around `step`; see `torch.optim.Optimizer`.

        Where nobody looks, the call goes on directly: the optimizer inside has all this as well.
        """
        hooked: Callable[..., Any] = Optimizer.profile_hook_step(func)

        @wraps(func)
        def step(self: WrapperOptimizer, *args: Any, **kwargs: Any) -> Any:
            hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
            return (hooked if hooks or steps_are_seen() else func)(self, *args, **kwargs)

        return step

    def _set_up(self) -> None:
        """Makes everything that copies do not share: hooks, here as in torch."""
        for name in OPTIMIZER_HOOKS:
            setattr(self, name, OrderedDict())
        self._patch_step_function()
        self._keeps_patched = False
        self._innermost = list(self._wrappers())[-1]._inside
        kind = type(self._innermost)
        if kind.__module__.startswith("torch.optim"):
            self._penalized.leaves_backward = f"torch.optim.{kind.__name__}"

    def _wrappers(self) -> Iterator[WrapperOptimizer]:
        """The wrappers from this one inwards."""
        optimizer: Optimizer = self
        while isinstance(optimizer, WrapperOptimizer):
            yield optimizer
            optimizer = optimizer._inside

    # For subclasses.

    @abstractmethod
    def _factor(self) -> float:
        """The factor of the term at this step.

        Raises:
            ValueError: It is out of range.
        """

    @abstractmethod
    def _present_term(self) -> Tensor:
        """The term for the gradients that are there, with its graph: a step without a closure.

        Raises:
            RuntimeError: The loop has to pass a closure.
        """

    def _has_present_term(self) -> bool:
        """True if a step without a closure has a term to add."""
        return True

    def _present_seeds(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """See `Values.seeds`, for `_present_term`; with the term, without a graph, at the end."""
        return None

    def _check_saved(self, own: dict[str, Any]) -> None:
        """Raises a ValueError if the wrapper's entry in a checkpoint does not fit it."""

    def _begin_step(self) -> None:
        """Prepares a step."""

    def _end_step(self) -> None:
        """Cleans up after a step, also after an error."""

    # Delegated to the optimizer inside.

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer inside."""
        # Nothing here reads it: Lightning makes subclasses in which `optimizer` is the wrapper.
        return self._inside

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of the optimizer inside."""
        return self._inside.param_groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        """The state of the optimizer inside."""
        return self._inside.state

    def __getattr__(self, name: str) -> Any:
        if name == "_inside":  # while a copy or pickle is being put together
            raise AttributeError(name)
        return getattr(self._inside, name)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the optimizer inside."""
        self._inside.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients.

        Args:
            set_to_none: See `torch.optim.Optimizer.zero_grad`.
        """
        self._inside.zero_grad(set_to_none)

    # The step.

    def step(self, closure: Any = None, **more: Any) -> Any:
        """Performs a step of the optimizer inside, on the loss with the term.

        Args:
            closure: The argument of the optimizer inside: the standard closure, a
                `FunctionalObjective`, or None if the gradients are there already.
            **more: Further arguments; a `curvature_closure` gets the term as well.

        Returns:
            The value that the optimizer inside returns: mostly the loss with the term.

        Raises:
            RuntimeError: The term has no value, or the loop has to pass a closure.
            ValueError: The factor of the term is out of range.
        """
        factor, groups = self._factor(), self.param_groups
        if closure is None and isinstance(self._inside, torch.optim.LBFGS):
            raise RuntimeError(
                f"torch.optim.LBFGS evaluates the loss several times and needs a closure:\n"
                f"{STANDARD_CLOSURE}"
            )
        present = closure is None and self._has_present_term()
        if closure is not None:
            if "found_inf" in vars(self):  # a GradScaler calls
                Scaling(self).refuse_closure()
        elif not present and makes_state_only(groups):
            return self._inside.step(**more)
        params = [p for group in groups for p in group["params"]]
        if present and all(p.grad is None for p in params):
            return self._inside.step(**more)  # no loss: an error, or nothing to be done
        sign = -1.0 if groups[0].get("maximize") else 1.0
        penalized = self._penalized
        penalized.begin(params, sign * factor, self._seed + self._steps)
        self._begin_step()
        try:
            if closure is None:
                scaling = Scaling(self)
                if self._hands_on(scaling):
                    return self._step_scaled(scaling, more)
                if not self._unscale(scaling, params):
                    return None
                penalized.add_to_gradients(self._present_term, self._present_seeds)
                result = self._inside.step(**more)
            else:
                if not self._keeps_patched:
                    keep_patched(self)
                    self._keeps_patched = True
                if more.get("curvature_closure") is not None:
                    more["curvature_closure"] = penalized.closure(more["curvature_closure"])
                result = self._inside.step(penalized.closure(closure), **more)
        finally:
            self._end_step()
        self._steps += 1
        return result

    def _step_scaled(self, scaling: Scaling, more: dict[str, Any]) -> Any:
        """A step without a closure, with an optimizer inside that takes the scale out itself."""
        found = scaling.inverse is not None and bool(scaling.inverse.isnan())
        if not found:
            self._penalized.add_to_gradients(self._present_term, self._present_seeds, scaling.scale)
        with self._handed_on(scaling):
            result = self._inside.step(**more)
        self._steps += not found
        return result

    def _hands_on(self, scaling: Scaling) -> bool:
        """True if the optimizer inside is to take out the scale of a `GradScaler`.

        It may have seen more than gradients: estimates of the curvature are scaled as well.
        """
        return scaling.active and getattr(self._inside, "_step_supports_amp_scaling", False)

    @contextmanager
    def _handed_on(self, scaling: Scaling) -> Iterator[None]:
        """Gives the optimizer inside what a `GradScaler` has left on this one, for a step."""
        inner: Any = self._inside
        if not self._hands_on(scaling):
            yield
            return
        inner.grad_scale, inner.found_inf = self.grad_scale, self.found_inf
        try:
            yield
        finally:
            for trace in ("grad_scale", "found_inf"):  # after an error they may be gone
                vars(inner).pop(trace, None)

    def _unscale(self, scaling: Scaling, params: Sequence[Tensor]) -> bool:
        """Divides `p.grad` by the scale of a `GradScaler`; False if the step is to be skipped."""
        if scaling.inverse is None:
            return True
        gradients = [p.grad for p in params if p.grad is not None]
        if any(g.grad_fn is not None for g in gradients):
            scaling.forget()
            raise RuntimeError(
                "the gradients have a graph, which a GradScaler's scale cannot be taken out of: "
                "train in bfloat16, which needs no scaler"
            )
        if bool(scaling.inverse.isnan()):
            return False
        for g in gradients:
            g.mul_(scaling.inverse.to(g.device))
        return True

    # Checkpoints, pickling, copying.

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer inside, with an entry for the wrapper's own."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        entry, result = self._entry, dict(self._inside.state_dict())
        own: dict[str, Any] = {name: getattr(self, at) for name, at in self._saved.items()}
        if entry in result:
            own["inside"] = result[entry]
        result[entry] = own
        for group in result["param_groups"]:
            if group["params"]:  # distributed checkpoints keep the groups only
                group[entry] = dict(own)
                break
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, result)
            result = result if changed is None else changed
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state from `state_dict`, or a checkpoint of the optimizer inside alone.

        Raises:
            ValueError: The state does not fit the optimizer inside.
        """
        entry, inner = self._entry, dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, inner)
            inner = inner if changed is None else dict(changed)
        groups = inner["param_groups"]
        found = [inner.pop(entry, None), *(group.get(entry) for group in groups)]
        own = next((dict(value) for value in found if value), None)
        inner["param_groups"] = [{k: v for k, v in g.items() if k != entry} for g in groups]
        if own is not None and "inside" in own:
            inner[entry] = own["inside"]
        if own is not None:
            self._check_saved(own)
        self._inside.load_state_dict(inner)
        if own is not None:
            for name, at in self._saved.items():
                setattr(self, at, own[name])
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        # Without hooks and the `step` of a scheduler, as in torch: they belong to this object.
        return {name: getattr(self, name) for name in self._carried}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "optimizer" in state:  # a pickle of the last release
            state["_inside"] = state.pop("optimizer")
        self.__dict__.update(state)
        self._set_up()
