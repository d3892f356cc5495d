"""Base classes of sets of tensors: convex sets and manifolds, with projections onto them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

#: The dimensions of a tensor that a set is about, as in `torch.linalg.vector_norm`: None for all.
Dims: TypeAlias = int | Sequence[int] | None

# How far a tensor may be from a set that it is said to be in, in units of the relative precision
# and of its size.
_ROUNDING = 32.0
# How far the nearest point may be from a tensor that stays as it is, likewise.
_SAME = 8.0


class TensorSet(ABC):
    """A closed set of tensors.

    All methods compute in float32 at least, and return the dtype that they were given. They are
    differentiable as often as the set allows.
    """

    @abstractmethod
    def check(self, tensor: Tensor) -> None:
        """Raises unless the set has tensors of this shape and dtype.

        Args:
            tensor: Any tensor.

        Raises:
            TypeError: Its dtype is not right.
            ValueError: Its shape is not right.
        """

    @abstractmethod
    def _project(self, x: Tensor) -> Tensor:
        """The nearest point, in work precision."""

    @abstractmethod
    def _tangent(self, x: Tensor, v: Tensor) -> Tensor:
        """See `tangent`, in work precision."""

    def project(self, tensor: Tensor) -> Tensor:
        """The point of the set next to a tensor; the tensor itself if it is one up to rounding.

        Args:
            tensor: Any tensor that `check` accepts.
        """
        self.check(tensor)
        return self._nearest(tensor)

    def _nearest(self, tensor: Tensor) -> Tensor:
        """See `project`; for a tensor that has been checked."""
        x = widened(tensor)
        nearest = self._project(x)
        with torch.no_grad():  # so that projecting once more changes no bit
            rounding = _SAME * torch.finfo(x.dtype).eps
            if tensor.dtype != x.dtype:
                rounding += 0.5 * torch.finfo(tensor.dtype).eps
            near = (nearest - x).abs().amax() <= rounding * x.abs().amax()
            point = torch.where(near, self._kept(x), nearest)
        if nearest.requires_grad:  # with the derivative of the projection in any case
            point = point + (nearest - nearest.detach())
        return narrowed(point, tensor.dtype)

    def _kept(self, x: Tensor) -> Tensor:
        """The point `x`, of the set up to rounding, with signs that are right."""
        return x

    def tangent(self, point: Tensor, v: Tensor) -> Tensor:
        """The direction next to `v` in which the set goes on at a point of it.

        Args:
            point: A point of the set.
            v: A direction, of the same shape.
        """
        self.check(point)
        return self._along(point, v)

    def _along(self, point: Tensor, v: Tensor) -> Tensor:
        """See `tangent`; for a point that has been checked."""
        return narrowed(self._tangent(widened(point), widened(v)), v.dtype)

    def distance(self, tensor: Tensor) -> Tensor:
        """The Euclidean distance of a tensor from the set, 0-dim.

        Args:
            tensor: Any tensor that `check` accepts.
        """
        self.check(tensor)
        x = widened(tensor)
        return length(x - self._project(x))

    def contains(self, tensor: Tensor, tolerance: float | None = None) -> bool:
        """True if a tensor is in the set.

        Args:
            tensor: Any tensor that `check` accepts.
            tolerance: The largest distance; by default the rounding of the tensor's dtype.
        """
        with torch.no_grad():
            distance = self.distance(tensor).item()
            if tolerance is None:
                size = torch.linalg.vector_norm(widened(tensor)).item()
                tolerance = _ROUNDING * torch.finfo(tensor.dtype).eps * max(size, 1.0)
        return distance <= tolerance

    def parametrization(self) -> nn.Module:
        """The projection as a module for `torch.nn.utils.parametrize.register_parametrization`.

        The model's weight is the projection of the parameter that is trained then, so any optimizer
        works without a wrapper. It is an alternative to `Projected`.

        >>> from torch.nn.utils.parametrize import register_parametrization
        >>> from torch_secondorder.constraints import UnitNorm
        >>> layer = nn.Linear(3, 2)
        >>> layer = register_parametrization(layer, "weight", UnitNorm(dim=1).parametrization())
        >>> UnitNorm(dim=1).contains(layer.weight)
        True
        """
        return Projection(self)


class ConvexSet(TensorSet):
    """A convex set; at a point inside, every direction is tangent, at its boundary a cone is."""

    def pressed(self, point: Tensor, v: Tensor) -> Tensor | None:
        """A mask of where a point is at a curved boundary that `v` leads out of.

        None for sets without such a boundary.

        Args:
            point: A point of the set.
            v: A direction.
        """
        return None

    def on_boundary(self, tensor: Tensor, where: Tensor) -> Tensor:
        """A point that is on the curved boundary where a mask says so, else in the set.

        Args:
            tensor: Any tensor that `check` accepts.
            where: A mask as `pressed` gives it.
        """
        return self.project(tensor)


class Manifold(TensorSet):
    """A set without a boundary that looks like a linear space near each of its points."""

    @abstractmethod
    def _differential(self, w: Tensor, v: Tensor) -> Tensor:
        """See `differential`, in work precision."""

    @abstractmethod
    def _weingarten(self, x: Tensor, v: Tensor, gradient: Tensor) -> Tensor:
        """See `weingarten`, in work precision."""

    def retract(self, point: Tensor, v: Tensor) -> Tensor:
        """The point of the manifold that a step leads to: the projection of `point + v`.

        It agrees with the geodesic up to second order (Absil and Malick 2012, "Projection-like
        retractions on matrix manifolds").

        Args:
            point: A point of the manifold.
            v: A tangent direction there.
        """
        self.check(point)
        return self._project(widened(point) + widened(v)).to(point.dtype)

    def differential(self, tensor: Tensor, v: Tensor) -> Tensor:
        """The derivative of the projection at a tensor in the direction `v`.

        It is a symmetric linear map of `v`, for every projection is the gradient of a function. So
        it takes gradients of a function `f` on the manifold to those of `f(project(tensor))`.

        Args:
            tensor: Any tensor whose nearest point is unique.
            v: A direction.
        """
        self.check(tensor)
        return self._differential(widened(tensor), widened(v)).to(v.dtype)

    def weingarten(self, point: Tensor, v: Tensor, gradient: Tensor) -> Tensor:
        """The part of a Riemannian Hessian times `v` that the curvature of the manifold adds.

        The whole is `tangent(point, H v) + weingarten(point, v, gradient)` with the Hessian `H` and
        the gradient of a function of tensors (Absil, Mahony and Trumpf 2013, "An extrinsic look at
        the Riemannian Hessian").

        Args:
            point: A point of the manifold.
            v: A tangent direction there.
            gradient: The gradient there; its tangential part does not matter.
        """
        self.check(point)
        result = self._weingarten(widened(point), widened(v), widened(gradient))
        return result.to(v.dtype)


class Projection(nn.Module):
    """The projection onto a set, see `TensorSet.parametrization`.

    Args:
        set: The set.
    """

    def __init__(self, set: TensorSet) -> None:
        super().__init__()
        self.set = set

    def forward(self, tensor: Tensor) -> Tensor:
        """The point of the set next to the parameter."""
        return self.set.project(tensor)

    def right_inverse(self, tensor: Tensor) -> Tensor:
        """The parameter for a weight: the point of the set next to it."""
        return self.set.project(tensor)

    def extra_repr(self) -> str:
        """The set."""
        return repr(self.set)


_WIDE = (torch.float32, torch.float64)


def widened(tensor: Tensor) -> Tensor:
    """A tensor in at least float32."""
    if tensor.dtype in _WIDE:  # the call below takes as long as some operations
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in a dtype again, see `widened`."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def length(x: Tensor) -> Tensor:
    """The Euclidean norm of all entries, 0-dim; no square overflows or vanishes."""
    largest = x.detach().abs().amax()
    unit = torch.where((largest == 0) | largest.isinf(), 1, largest)
    norm: Tensor = torch.linalg.vector_norm(x / unit) * unit
    return norm


def check_numbers(tensor: Tensor, name: str, *, real: bool = False) -> None:
    """Raises a TypeError unless a tensor is of floating-point numbers, or complex ones if allowed.

    Args:
        tensor: Any.
        name: The set's.
        real: Whether complex numbers are refused.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a set of tensors, got {type(tensor).__name__}")
    if tensor.is_complex() and real:
        raise TypeError(
            f"{name} needs an order of numbers, which complex ones lack: hold the parameter as a "
            "real one, by torch.view_as_real"
        )
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise TypeError(f"{name} is a set of floating-point tensors, got one of {tensor.dtype}")


def checked_dims(dim: Dims) -> tuple[int, ...] | None:
    """The argument `dim` as a tuple.

    Raises:
        TypeError: It is no integer, sequence of integers, or None.
        ValueError: It is empty or has a dimension twice.
    """
    if dim is None:
        return None
    dims = (dim,) if isinstance(dim, int) else tuple(dim) if isinstance(dim, Sequence) else (None,)
    if any(not isinstance(d, int) or isinstance(d, bool) for d in dims):
        raise TypeError(f"dim is an integer, a tuple of integers or None, got {dim!r}")
    if not dims or len(set(dims)) < len(dims):
        raise ValueError(f"dim must have one or more dimensions, each once, got {dim!r}")
    return dims


def check_dims(tensor: Tensor, dims: tuple[int, ...] | None, name: str) -> None:
    """Raises a ValueError unless a tensor has some dimensions, and a number along them.

    Args:
        tensor: Any.
        dims: The dimensions; None for all.
        name: The set's.
    """
    if dims is not None:
        for d in dims:
            if not -tensor.dim() <= d < tensor.dim():
                raise ValueError(
                    f"{name} is about dimension {d}, which a tensor of shape "
                    f"{tuple(tensor.shape)} does not have"
                )
        if len({d % tensor.dim() for d in dims}) < len(dims):
            raise ValueError(
                f"{name} is about dimensions {dims}, two of which are the same in a tensor of "
                f"shape {tuple(tensor.shape)}"
            )
    if not tensor.numel():
        raise ValueError(f"{name} has no empty tensor, got shape {tuple(tensor.shape)}")


def all_dims(tensor: Tensor, dims: tuple[int, ...] | None) -> tuple[int, ...]:
    """The dimensions, with None for all of a tensor's."""
    return tuple(range(tensor.dim())) if dims is None else dims


def inner(a: Tensor, b: Tensor, dims: tuple[int, ...] | None) -> Tensor:
    """The real inner products along some dimensions, which are kept."""
    product = (a.conj() * b).real if a.is_complex() or b.is_complex() else a * b
    along = all_dims(a, dims)
    return product.sum(along, keepdim=True) if along else product


def shown(dims: tuple[int, ...] | None) -> str:
    """The argument `dim` in a `repr`."""
    return str(dims[0] if dims is not None and len(dims) == 1 else dims)
