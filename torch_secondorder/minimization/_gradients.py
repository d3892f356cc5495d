"""Functions whose gradient comes from autograd, from the user, or from finite differences.

All become functions of a tree with a value that autograd can differentiate, so that optimizers need
not know where a gradient comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._autograd.graph import MissingSecondDerivative
from torch_secondorder._closure.capture import uncaptured
from torch_secondorder._foundation.private_torch import pytree
from torch_secondorder._foundation.random_state import random_state, set_random_state

#: A function of a tree; its value has a graph.
Function = Callable[[Any], Tensor]
#: The lower and the upper bound of a leaf, as flat real vectors or numbers.
Limits = tuple["Tensor | float", "Tensor | float"]

# Points that are made at a time for differences.
_ROWS = 64

_BY_DIFFERENCES = "or pass jac='2-point' for finite differences, which need no graph"


@dataclass
class Counts:
    """Calls of a function and of its gradient, as far as the evaluations do not tell them."""

    functions: int = 0
    gradients: int = 0


def recorded(fun: Callable[[Any], Any], x: Any) -> Any:
    """The value of a function whose operations autograd records.

    Raises:
        TypeError: It hands a tensor with a graph to NumPy.
    """
    try:
        return fun(x)
    except (RuntimeError, TypeError) as error:
        if "numpy() on Tensor that requires grad" not in str(error):
            raise
        raise TypeError(
            "the function hands x to NumPy, which autograd cannot follow: use operations of torch "
            "(torch.exp for np.exp, torch.stack for np.array) and tensors for the data, such as "
            f"torch.as_tensor(t) for an array t, {_BY_DIFFERENCES}"
        ) from error


def exact(fun: Callable[[Any], Any]) -> Function:
    """The function itself, checked to have a value that autograd can differentiate."""

    def checked(x: Any) -> Tensor:
        value = recorded(fun, x)
        if not isinstance(value, Tensor) or value.dim() or value.is_complex():
            return differentiable(value)
        return value if value.requires_grad else differentiable(value)

    return checked


def differentiable(value: Any) -> Tensor:
    """The value of a function, if it is a scalar with a graph.

    Raises:
        TypeError: The value is not a tensor.
        ValueError: It is not a real scalar, or has no graph.
    """
    if not isinstance(value, Tensor):
        if hasattr(value, "__float__"):
            raise TypeError(
                f"fun returned {value!r}, a {type(value).__name__}, which has no derivatives: "
                "compute the value by operations of torch and return the tensor, without .item() "
                f"or float(); {_BY_DIFFERENCES}"
            )
        raise _no_value(value)
    if not _scalar(value).requires_grad:
        raise ValueError(
            "the value of fun does not depend on x by operations that autograd records: do not use "
            f".detach(), .data, NumPy, torch.no_grad() or torch.inference_mode(), {_BY_DIFFERENCES}"
        )
    return value


def _no_value(value: Any) -> TypeError:
    return TypeError(f"fun must return a scalar, got {type(value).__name__} ({value!r:.60})")


def _scalar(value: Tensor) -> Tensor:
    if value.numel() != 1 or value.is_complex():
        raise ValueError(
            f"fun must return a real scalar, got shape {tuple(value.shape)} and dtype "
            f"{value.dtype}; reduce it, for instance with .sum(), or call least_squares if they "
            "are residuals"
        )
    return value


def _number(value: Any) -> Tensor | float:
    """A value without its graph."""
    if isinstance(value, Tensor):
        return _scalar(value).detach().reshape(())
    if isinstance(value, (str, type(None))) or not hasattr(value, "__float__"):
        raise _no_value(value)
    try:
        return float(value)
    except TypeError:  # an array with several entries
        raise _no_value(value) from None


class _WithGradient(torch.autograd.Function):
    """A value with a gradient that is known: `apply(value, *leaves, *gradients)`.

    The gradient of the gradient is that of the tensors given, so second derivatives are right
    wherever these have a graph.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[len(tensors) // 2 :])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        gradients: Sequence[Tensor] = ctx.saved_tensors
        if torch.is_grad_enabled() and not all(g.requires_grad for g in gradients):
            raise MissingSecondDerivative(
                "the gradient that jac gave has no graph, so there are no second derivatives: "
                "compute it from x by operations of torch (torch.func.grad(fun) does), leave jac "
                "out for derivatives by autograd, or use a method that needs the gradient only, "
                "such as 'lbfgs'"
            )
        # 0-dim weights take the dtype and the device of what they multiply.
        return None, *(weight * g for g in gradients), *(None for _ in gradients)


def _join(value: Tensor | float, leaves: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    if not isinstance(value, Tensor):
        value = torch.tensor(value, dtype=torch.float64)
    joined: Tensor = _WithGradient.apply(  # type: ignore[no-untyped-call]
        value.detach(), *leaves, *gradients
    )
    return joined


def _flatten(tree: Any) -> tuple[list[Any], Any]:
    """The leaves and the structure, None for one tensor: going through pytree takes longer."""
    return ([tree], None) if isinstance(tree, Tensor) else pytree.tree_flatten(tree)


def _unflatten(leaves: Sequence[Any], structure: Any) -> Any:
    return leaves[0] if structure is None else pytree.tree_unflatten(list(leaves), structure)


def given(
    fun: Callable[[Any], Any],
    jac: Callable[[Any], Any] | None,
    counts: Counts,
    *,
    twice: bool,
) -> Function:
    """A function whose gradient is given by the user.

    Args:
        fun: Returns the value; without `jac` a pair of value and gradient.
        jac: Returns the gradient, a tree like the function's argument.
        counts: Where calls are counted.
        twice: Whether second derivatives are going to be taken: `jac` then sees tensors with a
            graph.
    """

    def joined(x: Any) -> Tensor:
        leaves, structure = _flatten(x)
        counts.functions += 1
        counts.gradients += 1
        with uncaptured():  # outputs that a loss inside shows are not those of this value
            # Never the leaves themselves: what is called may write into what it gets.
            seen = [leaf.view_as(leaf) if twice else leaf.detach().clone() for leaf in leaves]
            at = _unflatten(seen, structure)
            if jac is None:
                value, gradient = _pair(fun(at))
            else:
                value = _number(
                    fun(_unflatten([leaf.detach().clone() for leaf in leaves], structure))
                )
                gradient = jac(at)
            found = _like(gradient, leaves, structure, "jac" if jac is not None else "fun")
        return _join(value, leaves, found if twice else [g.detach() for g in found])

    return joined


def _pair(found: Any) -> tuple[Tensor | float, Any]:
    if not (isinstance(found, (tuple, list)) and len(found) == 2):
        raise TypeError(
            f"with jac=True, fun must return the pair (value, gradient), got {type(found).__name__}"
        )
    value, gradient = found
    if isinstance(value, Tensor) and value.numel() != 1 and _is_number(gradient):
        raise ValueError(
            "with jac=True, fun must return (value, gradient), and here the gradient comes first: "
            "torch.func.grad_and_value returns them in that order, swap them"
        )
    return _number(value), gradient


def _is_number(value: Any) -> bool:
    return value.numel() == 1 if isinstance(value, Tensor) else hasattr(value, "__float__")


def _like(gradient: Any, leaves: Sequence[Tensor], structure: Any, source: str) -> list[Tensor]:
    """The leaves of a gradient, as tensors like those of the point."""
    if structure is None:
        found = [gradient]
    else:
        found, its = pytree.tree_flatten(gradient)
        if its != structure:
            raise ValueError(f"{source} returned a gradient {its}, but x0 is {structure}")
    return [_tensor_like(g, leaf, source) for g, leaf in zip(found, leaves, strict=True)]


def _tensor_like(g: Any, leaf: Tensor, source: str) -> Tensor:
    if not isinstance(g, Tensor):
        try:
            g = torch.as_tensor(g)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"{source} must return a gradient like x0, got {type(g).__name__} for a tensor"
            ) from error
    if g.shape != leaf.shape or (g.is_complex() and not leaf.is_complex()):
        raise ValueError(
            f"{source} returned a gradient of shape {tuple(g.shape)} and dtype {g.dtype} for a "
            f"tensor of shape {tuple(leaf.shape)} and dtype {leaf.dtype}"
        )
    dense: Tensor = g if g.layout is torch.strided else g.to_dense()
    return dense.to(leaf.device, leaf.dtype)


class Differences:
    """A function whose gradient is estimated by finite differences, after SciPy's rules.

    The step in a coordinate is `max(1, |x|)` times `eps^(1/2)` for `"2-point"` and `eps^(1/3)` for
    `"3-point"`, in the direction of its sign. Within bounds it changes its direction, and
    `"3-point"` becomes one-sided, where the point would be outside. All evaluations of one gradient
    draw the same random numbers.

    Args:
        fun: Returns the value, as a tensor or a number.
        scheme: `"2-point"` or `"3-point"`.
        counts: Where calls are counted.
        rel_step: The step relative to `|x|`; None for the rule above.
        limits: The bounds of each leaf.
        at_once: Whether many points are evaluated in one call, by `torch.func.vmap`.
    """

    def __init__(
        self,
        fun: Callable[[Any], Any],
        scheme: str,
        counts: Counts,
        rel_step: float | None = None,
        limits: Sequence[Limits] | None = None,
        *,
        at_once: bool = False,
    ) -> None:
        self._fun, self._scheme, self._counts = fun, scheme, counts
        self._rel_step, self._limits, self._at_once = rel_step, limits, at_once

    def __call__(self, x: Any) -> Tensor:
        """The value, with the estimated gradient as its derivative."""
        leaves, structure = _flatten(x)
        limits = self._limits
        here = [leaf.detach() for leaf in leaves]
        devices = {torch.device("cpu"), *(leaf.device for leaf in leaves)}
        states = [(device, random_state(device)) for device in devices]

        def value_at(place: int, moved: Tensor) -> Tensor | float:
            """The function where one leaf is replaced."""
            point = [moved if i == place else leaf.clone() for i, leaf in enumerate(here)]
            return _number(self._fun(_unflatten(point, structure)))

        def at(place: int, moved: Tensor) -> Sequence[Tensor | float]:
            """The function for each of several tensors in the place of one leaf."""
            self._counts.functions += len(moved)
            if self._at_once:
                _reset(states)
                one_by_one: Any = torch.func.vmap(partial(value_at, place), randomness="same")
                try:
                    found: Tensor = one_by_one(moved)
                except RuntimeError as error:
                    raise RuntimeError(
                        f"torch.func.vmap cannot evaluate fun ({error}): leave the option "
                        "finite_diff_vmap out"
                    ) from error
                return found.unbind()
            values: list[Tensor | float] = []
            for one in moved.unbind():
                _reset(states)
                values.append(value_at(place, one))
            return values

        with uncaptured():
            self._counts.functions += 1
            self._counts.gradients += 1
            value = _number(self._fun(_unflatten([leaf.clone() for leaf in here], structure)))
            gradients = [
                self._gradient(partial(at, i), value, leaf, None if limits is None else limits[i])
                for i, leaf in enumerate(here)
            ]
        return _join(value, leaves, gradients)

    def _gradient(
        self,
        at: Callable[[Tensor], Sequence[Tensor | float]],
        value: Tensor | float,
        leaf: Tensor,
        limits: Limits | None,
    ) -> Tensor:
        """The gradient with respect to a leaf, from the function of that leaf alone."""
        real = _real(leaf)
        flat = real.reshape(-1)
        eps = torch.finfo(flat.dtype).eps
        if isinstance(value, Tensor) and value.is_floating_point():
            eps = max(eps, torch.finfo(value.dtype).eps)

        def along(rows: Tensor) -> Sequence[Tensor | float]:
            entries = rows.view(-1, *real.shape)
            return at(torch.view_as_complex(entries) if leaf.is_complex() else entries)

        moves = self._moves(flat, eps, limits)
        slopes = _slopes(along, value, flat, moves, bounded=limits is not None)
        gradient = slopes.to(flat).view_as(real)
        return torch.view_as_complex(gradient) if leaf.is_complex() else gradient

    def _moves(self, x: Tensor, eps: float, limits: Limits | None) -> list[Tensor]:
        """The points of the scheme beside each coordinate: one, or the nearer and the farther."""
        central = self._scheme == "3-point"
        size = x.abs()
        h = size.clamp(min=1.0).mul_(eps ** (1 / 3 if central else 1 / 2))
        if self._rel_step is not None:
            wanted = self._rel_step * size
            h = torch.where(x + wanted == x, h, wanted)
        if limits is None:
            return [x - h, x + h] if central else [x + h.copysign_(x)]
        if not central:
            h.copysign_(x)
        low, high = limits
        below, above = x - low, high - x
        if not central:
            fits = torch.where(h >= 0, above >= h, below >= -h)
            turned = torch.where(h >= 0, below >= h, above >= -h)
            room = torch.where(above >= below, above, -below)
            points = [x + torch.where(fits, h, torch.where(turned, -h, room))]
            return [_within(p, low, high) for p in points]
        both = (below >= h) & (above >= h)
        # One-sided where there is more room, unless a shorter step fits on both sides as well.
        one_sided = torch.where(
            above >= below, torch.minimum(h, above / 2), -torch.minimum(h, below / 2)
        )
        shorter = torch.minimum(below, above)
        two_sided = both | (one_sided.abs() <= shorter)
        h = torch.where(both, h, torch.where(two_sided, shorter, one_sided))
        points = [torch.where(two_sided, x - h, x + h), torch.where(two_sided, x + h, x + 2 * h)]
        return [_within(p, low, high) for p in points]


def _within(x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """The points without what rounding has added beyond the bounds."""
    return x.clamp(min=low).clamp(max=high)


def _reset(states: Sequence[tuple[torch.device, Tensor]]) -> None:
    for device, state in states:
        set_random_state(device, state)


def _slopes(
    at: Callable[[Tensor], Sequence[Tensor | float]],
    value: Tensor | float,
    x: Tensor,
    moves: list[Tensor],
    *,
    bounded: bool,
) -> Tensor:
    """The derivative in each coordinate from the points beside it; zero where there is no room."""
    columns = []
    for moved in moves:
        column: list[Tensor | float] = [value] * len(x)
        for start in range(0, len(x), _ROWS):
            stop = min(start + _ROWS, len(x))
            rows = x.expand(stop - start, -1).clone()
            rows.diagonal(start).copy_(moved[start:stop])
            places: Sequence[int] = range(start, stop)
            if bounded:
                moves_here = (moved != x)[start:stop]
                rows = rows[moves_here]
                places = [i for i, there in zip(places, moves_here.tolist(), strict=True) if there]
            for i, value_there in zip(places, at(rows) if places else (), strict=True):
                column[i] = value_there
        columns.append(_stacked(column))
    like = columns[0]
    dx = [(moved - x).to(like) for moved in moves]
    if len(moves) == 1:
        slopes = (like - value) / dx[0]
    else:
        near, far = dx
        slopes = (columns[1] - like) / (far - near)  # x - h and x + h
        if bounded:  # x + h and x + 2h
            one_sided = (4 * like - 3 * value - columns[1]) / far
            slopes = torch.where(near * far < 0, slopes, one_sided)
    return torch.where(dx[-1] == 0, torch.zeros_like(slopes), slopes) if bounded else slopes


def _stacked(values: Sequence[Tensor | float]) -> Tensor:
    if values and all(isinstance(v, Tensor) for v in values):
        return torch.stack(list(values))  # type: ignore[arg-type]
    return torch.tensor([float(v) for v in values], dtype=torch.float64)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
