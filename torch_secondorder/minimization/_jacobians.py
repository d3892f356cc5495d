"""Residuals whose Jacobian comes from the user or from finite differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, prod
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._closure.capture import uncaptured
from torch_secondorder._foundation.private_torch import pytree
from torch_secondorder.minimization._bounds import Bound

#: A function of a tree that returns residuals.
Function = Callable[[Any], Any]

_SCHEMES = {"2-point": 1 / 2, "3-point": 1 / 3}


class WithJacobian:
    """Residuals with a Jacobian that autograd does not make.

    Args:
        fun: Returns residuals for a tree; a number or an array of them will do.
        jac: Returns their Jacobian for the tree, a tree like it of tensors `(*residuals, *leaf)`.

    Attributes:
        evaluations: Calls of `fun`.
        jacobians: Calls of `jac`.
    """

    def __init__(self, fun: Function, jac: Function) -> None:
        self._fun, self._jac = fun, jac
        self.evaluations = self.jacobians = 0

    def __call__(self, x: Any) -> Tensor:
        """The residuals, with the Jacobian as their derivative."""
        leaves, structure = pytree.tree_flatten(x)
        here = pytree.tree_unflatten([leaf.detach().clone() for leaf in leaves], structure)
        with uncaptured():
            r = self._residuals(here, leaves[0])
            found = self._jacobian(here, r)
        matrices = self._matrices(found, r, leaves)
        joined: Tensor = _Linear.apply(r, *leaves, *matrices)  # type: ignore[no-untyped-call]
        return joined

    def _residuals(self, x: Any, like: Tensor) -> Tensor:
        self.evaluations += 1
        return as_residuals(self._fun(x), like)

    def _jacobian(self, x: Any, r: Tensor) -> Any:
        self.jacobians += 1
        return self._jac(x)

    def _matrices(self, found: Any, r: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
        """The Jacobian by each leaf as a matrix."""
        parts = pytree.tree_leaves(found)
        if len(parts) != len(leaves):
            raise ValueError(
                f"jac returned {len(parts)} tensors, and x has {len(leaves)}: return a tree like x"
            )
        matrices = []
        for part, leaf in zip(parts, leaves, strict=True):
            J = torch.as_tensor(part).detach().to(leaf)
            if J.numel() != r.numel() * leaf.numel() or J.shape[: r.dim()] != r.shape:
                raise ValueError(
                    f"jac returned a tensor of shape {tuple(J.shape)}; for residuals of shape "
                    f"{tuple(r.shape)} and x of shape {tuple(leaf.shape)} it must be "
                    f"{(*r.shape, *leaf.shape)}"
                )
            matrices.append(J.reshape(r.numel(), leaf.numel()))
        return matrices


class Differences(WithJacobian):
    """Residuals whose Jacobian is estimated by finite differences.

    The step of a coordinate is `|x|` times `eps^(1/2)` for `"2-point"` and `eps^(1/3)` for
    `"3-point"`, where `x` is not zero, and that power itself where it is. Within bounds it changes
    its direction where the point would be outside, and `"3-point"` is one-sided there.

    Args:
        fun: See `WithJacobian`.
        scheme: `"2-point"` or `"3-point"`.
        limits: The bounds of each leaf; None for none.
        rel_step: The step relative to `|x|`, in place of that power; None for the rule above.
    """

    def __init__(
        self,
        fun: Function,
        scheme: str,
        limits: Sequence[tuple[Bound, Bound]] | None,
        rel_step: float | None = None,
    ) -> None:
        super().__init__(fun, fun)
        self._central, self._power = scheme == "3-point", _SCHEMES[scheme]
        self._limits, self._rel_step = limits, rel_step

    def _jacobian(self, x: Any, r: Tensor) -> Any:
        self.jacobians += 1
        leaves, structure = pytree.tree_flatten(x)
        limits = self._limits or [(None, None)] * len(leaves)
        found = []
        for place, (leaf, (low, high)) in enumerate(zip(leaves, limits, strict=True)):
            lower, upper = (
                torch.as_tensor(end if bound is None else bound).to(leaf).broadcast_to(leaf.shape)
                for bound, end in ((low, -inf), (high, inf))
            )
            columns = []
            for k in range(leaf.numel()):

                def at(shift: float, place: int = place, k: int = k) -> Tensor:
                    moved = [one.clone() for one in leaves]
                    moved[place].view(-1)[k] += shift
                    return self._residuals(pytree.tree_unflatten(moved, structure), leaves[0])

                value = float(leaf.reshape(-1)[k])
                room = (float(lower.reshape(-1)[k]) - value, float(upper.reshape(-1)[k]) - value)
                columns.append(self._slope(at, value, room, r))
            found.append(torch.stack(columns, -1).reshape(*r.shape, *leaf.shape))
        return pytree.tree_unflatten(found, structure)

    def _slope(
        self, at: Callable[[float], Tensor], x: float, room: tuple[float, float], r: Tensor
    ) -> Tensor:
        """The derivative by one entry.

        Args:
            at: The residuals where the entry is shifted.
            x: The entry.
            room: How far it may be shifted down and up.
            r: The residuals where it is not.
        """
        low, high = room
        relative = self._rel_step or torch.finfo(r.dtype).eps ** self._power
        h = (abs(x) or 1.0) * relative
        h = (x + h) - x  # a difference of two numbers that there are
        slope: Tensor
        if self._central and -low >= h and high >= h:
            slope = (at(h) - at(-h)) / (2.0 * h)
            return slope
        outward = h if x >= 0.0 else -h
        if not low <= outward <= high:
            outward = -outward
        if not low <= outward <= high:  # the bounds are closer than a step
            outward = high if high >= -low else low
        if not outward:
            return torch.zeros_like(r)
        if self._central:
            slope = (4.0 * at(0.5 * outward) - at(outward) - 3.0 * r) / outward
        else:
            slope = (at(outward) - r) / outward
        return slope


class _Linear(torch.autograd.Function):
    """Residuals with known matrices as their derivatives: `apply(r, *leaves, *matrices)`."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, *tensors: Tensor) -> Tensor:
        half = len(tensors) // 2
        ctx.shapes = [leaf.shape for leaf in tensors[:half]]
        ctx.save_for_backward(*tensors[half:])
        return r.clone()

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        flat = u.reshape(prod(u.shape))
        parts = [
            (J.T @ flat.to(J)).reshape(shape)
            for J, shape in zip(ctx.saved_tensors, ctx.shapes, strict=True)
        ]
        return None, *parts, *(None for _ in parts)


def as_residuals(found: Any, like: Tensor) -> Tensor:
    """Residuals of a function that may return an array or a number, without a graph.

    Args:
        found: What it returned.
        like: A tensor of the parameters, whose precision Python's numbers get.
    """
    if isinstance(found, Tensor):
        return found.detach()
    try:
        r = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"fun must return residuals, got {type(found).__name__}") from None
    return r.to(like) if not hasattr(found, "dtype") else r.to(like.device)
