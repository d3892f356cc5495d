"""Layers with Kronecker factors: their state, and products with their inverse curvature."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._optim.state import Group, ParameterField
from torch_secondorder.curvature._layer_factors import side_sizes

#: Both sides of a parameter as a matrix: its first dimension, and all others with a bias.
SIDES = ("left", "right")


def largest_side(group: Mapping[str, Any]) -> float:
    """The longest side of a layer that has a factor."""
    bound: int | None = group["max_precond_dim"]
    return math.inf if bound is None else bound


class SideMatrices(ParameterField):
    """A square matrix for each side of each parameter that may be the weight of a layer.

    The names are those of the field and of the side, as in `factor_left`. The matrix of the right
    side has a row and a column for a bias, whether there is one or not, so that shapes follow from
    the parameter alone.

    Sides longer than the hyperparameter `max_precond_dim` get none.

    Args:
        scale: What the identity is multiplied by at first.
    """

    sharded = False

    def __init__(self, scale: float = 0.0) -> None:
        self.scale = scale

    def names(self, p: Tensor, group: Group = None) -> Iterable[str]:
        """See `ParameterField.names`."""
        if p.dim() < 2 or p.is_complex() or not p.numel():
            return []
        largest = math.inf if group is None else largest_side(group)
        sides = zip(SIDES, side_sizes(p), strict=True)
        return [f"{self.name}_{side}" for side, size in sides if size <= largest]

    def prepare(
        self, state: dict[str, Any], p: Tensor, *, on_device: bool, group: Group = None
    ) -> None:
        """See `ParameterField.prepare`."""
        dtype = torch.promote_types(p.dtype, torch.float32)
        for name in self.names(p, group):
            held = state.get(name)
            initial = self.scale * torch.eye(self.shape(p, name)[0]) if held is None else held
            state[name] = initial.to(p.device, dtype)

    def shape(self, p: Tensor, name: str, group: Group = None) -> torch.Size:
        """See `ParameterField.shape`."""
        size = side_sizes(p)[SIDES.index(name.rpartition("_")[2])]
        return torch.Size((size, size))

    def begin(self, state: dict[str, Any], p: Tensor, group: Group) -> None:
        """Makes matrices as at first, also where `max_precond_dim` has changed since."""
        names = set(self.names(p, group))
        for name in {f"{self.name}_{side}" for side in SIDES} - names:
            state.pop(name, None)
        self.prepare(state, p, on_device=False, group=group)
        for name in names:
            state[name].zero_().diagonal().fill_(self.scale)


class LayerMatrix:
    """A weight and its bias as one matrix `(a, b)`, with declared `SideMatrices` of the weight.

    Args:
        weight: The weight.
        bias: The bias, which is the last column; None for none.
        rotates: Whether the matrices of the field `basis` are bases, and not inverses.
        state: Of the weight.

    Attributes:
        weight: The same.
        bias: The same.
        rotates: The same.
        sizes: `a` and `b`.
        state: The same.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, rotates: bool, state: dict[str, Any]
    ) -> None:
        self.weight, self.bias, self.rotates, self.state = weight, bias, rotates, state
        left, right = side_sizes(weight)
        self.sizes = left, right if bias is not None else right - 1

    def is_in(self, pieces: Mapping[int, Tensor]) -> bool:
        """True if there are pieces for weight and bias."""
        return id(self.weight) in pieces and (self.bias is None or id(self.bias) in pieces)

    def read(self, pieces: Mapping[int, Tensor]) -> Tensor:
        """The matrix of pieces of a vector, by the ids of their parameters; a view without bias."""
        matrix = pieces[id(self.weight)].view(self.sizes[0], -1)
        if self.bias is None:
            return matrix
        return torch.cat([matrix, pieces[id(self.bias)][:, None]], dim=1)

    def write(self, pieces: Mapping[int, Tensor], matrix: Tensor) -> None:
        """Puts a matrix into the pieces."""
        if self.bias is not None:
            pieces[id(self.bias)].copy_(matrix[:, -1])
            matrix = matrix[:, :-1]
        pieces[id(self.weight)].view(self.sizes[0], -1).copy_(matrix)

    def sides(self, name: str) -> list[Tensor | None]:
        """The matrices of both sides, views without the place of a bias that is not there.

        Args:
            name: That of the field.
        """
        held = [self.state.get(f"{name}_{side}") for side in SIDES]
        sizes = zip(held, self.sizes, strict=True)
        return [None if matrix is None else matrix[:n, :n] for matrix, n in sizes]

    def sides_like_now(self, name: str) -> list[Tensor | None]:
        """The same in the dtype and on the device that the weight has now.

        The state follows the weight in the update only, and estimates come before it.
        """
        kind, device = torch.promote_types(self.weight.dtype, torch.float32), self.weight.device
        return [None if matrix is None else matrix.to(device, kind) for matrix in self.sides(name)]


def transformed(matrix: Tensor, sides: Sequence[Tensor | None], *, back: bool = False) -> Tensor:
    """`left' matrix right`, or `left matrix right'` on the way back; None for the identity."""
    left, right = sides
    if left is not None:
        matrix = (left if back else left.mT) @ matrix
    if right is not None:
        matrix = matrix @ (right.mT if back else right)
    return matrix


def eigenbasis(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, none of them negative, and eigenvectors of a symmetric matrix.

    Where they cannot be found, the diagonal and the identity take their place.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except RuntimeError:  # it did not converge
        values, vectors = matrix.diagonal(), torch.eye(len(matrix)).to(matrix)
    return values.clamp(min=0), vectors


def moments_in(moments: Tensor, changes: Sequence[Tensor | None]) -> Tensor:
    """Second moments in new coordinates, where those in the old ones are taken for independent.

    Args:
        moments: In the old coordinates, `(a, b)`.
        changes: For each side the products of old and new basis vectors; None for no change.
    """
    return transformed(moments, [None if c is None else c.square() for c in changes])


def damped_inverses(left: Tensor, right: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Inverses of both factors, damped so that `left (x) right` is damped about as asked for.

    Martens and Grosse 2015, section 6.3: the damping is shared out by the means of the factors'
    eigenvalues.
    """
    tiny = torch.finfo(left.dtype).tiny
    means = [side.diagonal().mean().clamp(min=tiny) for side in (left, right)]
    balance = (means[0] / means[1]).sqrt()
    root = damping**0.5
    return _inverse(left, root * balance), _inverse(right, root / balance)


def _inverse(matrix: Tensor, shift: Tensor) -> Tensor:
    rounding = 10 * torch.finfo(matrix.dtype).eps * matrix.diagonal().sum()
    shifted = matrix.clone()
    shifted.diagonal().add_(torch.maximum(shift, rounding))
    factor, failed = torch.linalg.cholesky_ex(shifted)
    inverse = torch.cholesky_inverse(factor)
    plain = shifted.diagonal().reciprocal().diag()
    inverse = torch.where(failed == 0, inverse, plain)
    return (inverse + inverse.mT) / 2
