"""Manifolds in the space of the parameters: positions that stay there, and gradients along them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from torch_secondorder._params.vector import ParameterVector

# The longest step of a line search, as a share of the size of the point.
_REACH = 0.5
#: Units of relative precision of a loss on a manifold for each one elsewhere. Projections round as
#: well, and the gradient across the manifold, which need not be small, turns that into loss.
NOISE = 4.0

#: A step, a factor of it, and perhaps the position that both lead to.
Tried: TypeAlias = tuple[Tensor, float, Tensor | None]


class Chart(Protocol):
    """A manifold of tensors; see `torch_secondorder.constraints` for the methods."""

    def project(self, tensor: Tensor) -> Tensor: ...  # pragma: no cover - a protocol

    def tangent(self, point: Tensor, v: Tensor) -> Tensor: ...  # pragma: no cover - a protocol

    def differential(self, tensor: Tensor, v: Tensor) -> Tensor: ...  # pragma: no cover

    def weingarten(
        self, point: Tensor, v: Tensor, gradient: Tensor
    ) -> Tensor: ...  # pragma: no cover - a protocol


class _Place(NamedTuple):
    """A parameter on a manifold, and its place in the flat vector."""

    start: int
    stop: int
    shape: torch.Size
    complex: bool
    chart: Chart

    def of(self, flat: Tensor) -> Tensor:
        """The parameter's part of `(..., n)`, a view in its shape."""
        piece = flat[..., self.start : self.stop]
        if self.complex:
            return torch.view_as_complex(piece.view(*piece.shape[:-1], *self.shape, 2))
        return piece.reshape(*piece.shape[:-1], *self.shape)


class Manifold:
    """The positions at which some parameters of a vector lie on manifolds.

    A step from a position `z` leads to `R(v) = project(z + v)` with the tangent part `v` of the
    step. Near `z` this is a smooth map of the tangent space, and the objective a plain function of
    `v`: gradients and products are those of this function. Positions are those of the parameters;
    steps, gradients and products are in the work space, with the scale of the vector.

    Reference: Absil, Mahony and Sepulchre 2008, "Optimization algorithms on matrix manifolds".

    Args:
        vector: The parameters.
        charts: The manifolds, by the `id` of their parameters.
    """

    def __init__(self, vector: ParameterVector, charts: Mapping[int, Chart]) -> None:
        self._scale = vector.scale
        self._places = [
            _Place(start, stop, p.shape, p.is_complex(), charts[id(p)])
            for p, (start, stop, _) in zip(vector.params, vector.slots(), strict=True)
            if id(p) in charts
        ]

    def project(self, position: Tensor) -> Tensor:
        """The point of the manifold next to a position."""
        return self._mapped(position, lambda at, x: at.chart.project(x))

    def moved(self, position: Tensor, step: Tensor, t: float) -> Tensor:
        """The position that `t` times a step leads to."""
        move = self._scaled(step)
        there = torch.add(position, move, alpha=t)
        for at in self._places:
            x = at.of(position)
            v = at.chart.tangent(x, at.of(move))
            at.of(there).copy_(at.chart.project(x + t * v))
        return there

    def longest(self, position: Tensor, step: Tensor) -> float:
        """The largest multiple of a step that a line search is to go; one synchronization.

        Farther out, the map of the tangent space is too bent to learn a curvature from: over PCA
        with several ranks, half of the size of the point took the fewest evaluations.
        """
        if not self._places:
            return inf
        move, norm = self._scaled(step), torch.linalg.vector_norm
        parts = [(norm(at.of(position)), norm(at.of(move))) for at in self._places]
        reach = torch.stack([size / length for size, length in parts]).amin().item()
        return _REACH * reach if reach > 0.0 else inf

    def tangent(self, position: Tensor, v: Tensor) -> Tensor:
        """The tangent part of `(n,)` or `(k, n)`."""

        def of(at: _Place, w: Tensor) -> Tensor:
            return at.chart.tangent(at.of(position), w)

        return self._mapped(v, of)

    def along(self, position: Tensor, tried: Tried | None, gradient: Tensor) -> Tensor:
        """The gradient by the step of a function, from the one by the parameters.

        Args:
            position: The base `z`.
            tried: The step, `(n,)`, and a factor of it; None for no step.
            gradient: By the parameters where the step leads to, `(n,)`.
        """
        if tried is None:
            return self.tangent(position, gradient)
        t, move = tried[1], self._scaled(tried[0])

        def of(at: _Place, g: Tensor) -> Tensor:
            x, chart = at.of(position), at.chart
            there = x + t * chart.tangent(x, at.of(move))
            return chart.tangent(x, chart.differential(there, g))

        return self._mapped(gradient, of)

    def product(
        self, position: Tensor, v: Tensor, image: Tensor, gradient: Tensor | None
    ) -> Tensor:
        """The product with a curvature along the manifold, from the one with it in all space.

        Args:
            position: The point.
            v: What is multiplied, tangent and with the scale: `(n,)` or `(k, n)`.
            image: The curvature times `v`, of the same shape.
            gradient: The gradient by the parameters there, `(n,)`, if the curvature is the Hessian:
                that along the manifold has the curvature of the manifold in it. None for others.
        """
        if gradient is None:
            return self.tangent(position, image)
        result = image.clone()
        for at in self._places:
            x, g, chart = at.of(position), at.of(gradient), at.chart

            def of(w: Tensor, x: Tensor = x, g: Tensor = g, chart: Chart = chart) -> Tensor:
                return chart.weingarten(x, w, g)

            at.of(result).add_(_over_rows(of, at.of(v), batched=v.dim() == 2))
        return self.tangent(position, result)

    def completed(self, position: Tensor, matrix: Tensor) -> Tensor:
        """A matrix `(n, n)` of products on the tangent space, with some curvature across it.

        So it is definite where it is definite on the tangent space.
        """
        eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        across = eye - self.tangent(position, eye)
        return torch.add(matrix, across, alpha=matrix.diagonal().abs().amax().item() or 1.0)

    def _scaled(self, step: Tensor) -> Tensor:
        return step if self._scale is None else step * self._scale

    def _mapped(self, flat: Tensor, function: Callable[[_Place, Tensor], Tensor]) -> Tensor:
        """A copy of `(n,)` or `(k, n)` with the parts on manifolds replaced."""
        result = flat.clone()
        for at in self._places:

            def of(w: Tensor, at: _Place = at) -> Tensor:
                return function(at, w)

            at.of(result).copy_(_over_rows(of, at.of(flat), batched=flat.dim() == 2))
        return result


def _over_rows(function: Callable[[Tensor], Tensor], v: Tensor, *, batched: bool) -> Tensor:
    """A function of a tensor, or of each row of a batch of them."""
    result: Tensor = torch.vmap(function)(v) if batched else function(v)
    return result
