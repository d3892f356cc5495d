"""Eigenbases of the factors of blocks, and moments in their coordinates.

The names of the matrices are those of SOAP: `factor` and `basis`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_secondorder._optim.kronecker.stacks import Side, Stack

#: The share of a factor's squared norm off the diagonal from which a step of the power method is
#: not enough. With a basis refreshed every ten steps, a transformer of width 64 has 0.04 on average
#: and 0.2 in the worst block; a jump of all weights by 30% brings 0.5.
_TOO_FAR = 0.5


def project(stack: Stack) -> None:
    """`G = Q_L' G Q_R` for the blocks of the gradient; overwrites the direction."""
    _multiply(stack.gradient, stack.direction, stack.sides, _bases(stack), forth=True)


def project_back(stack: Stack) -> None:
    """`D = Q_L D Q_R'` for the blocks of the direction; overwrites the gradient."""
    _multiply(stack.direction, stack.gradient, stack.sides, _bases(stack), forth=False)


def rotate(stack: Stack, blocks: Tensor, new: Sequence[Tensor]) -> None:
    """Gives a stack new bases, and brings a moment into their coordinates, both in place.

    Overwrites gradient and direction.

    Args:
        stack: The stack.
        blocks: The moment, `(B, m, n)`.
        new: The new basis of each side.
    """
    work, spare = stack.direction.copy_(blocks), stack.gradient
    _multiply(work, spare, stack.sides, _bases(stack), forth=False)
    _multiply(work, spare, stack.sides, new, forth=True)
    blocks.copy_(work)
    for side, basis in zip(stack.sides, new, strict=True):
        side["basis"].copy_(basis)


def _bases(stack: Stack) -> list[Tensor]:
    return [side["basis"] for side in stack.sides]


def _multiply(
    blocks: Tensor, spare: Tensor, sides: Sequence[Side], bases: Sequence[Tensor], *, forth: bool
) -> None:
    """Multiplies blocks with the bases of all sides, in place.

    Args:
        blocks: `(B, m, n)`.
        spare: Memory of the same shape, which is overwritten.
        sides: The sides.
        bases: The basis of each.
        forth: Whether into the coordinates of the bases; else out of them.
    """
    source, target = blocks, spare
    for side, basis in zip(sides, bases, strict=True):
        if side.dim == 0:
            torch.bmm(basis.mT if forth else basis, source, out=target)
        else:
            torch.bmm(source, basis if forth else basis.mT, out=target)
        source, target = target, source
    if source is not blocks:
        blocks.copy_(source)


def eigenvectors(basis: Tensor, factor: Tensor) -> Tensor:
    """The eigenvectors of factors, those of the largest eigenvalues first.

    They are unit vectors where a factor is not finite, or its eigenvectors are not found.

    Args:
        basis: Has the dtype that is asked for.
        factor: Symmetric matrices `(B, m, m)`.
    """
    scaled = _scaled(factor, basis.dtype)
    try:
        vectors: Tensor = torch.linalg.eigh(scaled)[1].flip(-1)
        return vectors
    except RuntimeError:  # of one of them
        return torch.stack([_eigenvectors(matrix) for matrix in scaled])


def _eigenvectors(matrix: Tensor) -> Tensor:
    try:
        vectors: Tensor = torch.linalg.eigh(matrix.double())[1].flip(-1).to(matrix.dtype)
        return vectors
    except RuntimeError:
        return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def powered(side: Side) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The products of factors with their bases, columns sorted by the eigenvalues they estimate.

    Args:
        side: The side of a stack.

    Returns:
        `F Q`, each up to a factor; the order of its columns `(B, size)`, the largest eigenvalue
        first; and two sums for each factor: of its squared entries off the diagonal in the present
        basis, and of all.
    """
    basis = side["basis"]
    product = torch.bmm(_scaled(side["factor"], basis.dtype), basis)
    eigenvalues = torch.linalg.vecdot(basis, product, dim=-2)
    whole = product.square().sum((-1, -2))
    left = (whole - eigenvalues.square().sum(-1)).clamp_(min=0)
    order = eigenvalues.argsort(dim=-1, descending=True, stable=True)
    return product.take_along_dim(order.unsqueeze(-2), -1), order, (left, whole)


def orthonormal(product: Tensor, *_: Tensor) -> Tensor:
    """The factor `Q` of a QR decomposition of each `(m, m)`."""
    # `torch.linalg.qr` takes up to twice as long on a CPU: it makes the other factor, too.
    basis: Tensor = torch.linalg.householder_product(*torch.geqrf(product))
    return basis


def orthonormal_or_exact(product: Tensor, factor: Tensor, left: Tensor, whole: Tensor) -> Tensor:
    """The same, and exact eigenvectors of factors that have changed too much for it.

    Args:
        product: See `powered`, as all others.
        factor: The factors.
        left: The squared norm off the diagonal.
        whole: The squared norm.
    """
    basis = orthonormal(product)
    too_far = left > _TOO_FAR * whole
    if bool(too_far.any()):
        basis[too_far] = eigenvectors(product, factor[too_far])
    return basis


def reorder(blocks: Tensor, order: Tensor, dim: int) -> None:
    """Sorts rows or columns of blocks, in place.

    Args:
        blocks: `(B, m, n)`.
        order: `(B, m)` or `(B, n)`.
        dim: 0 for rows, 1 for columns.
    """
    index = order.unsqueeze(-1) if dim == 0 else order.unsqueeze(-2)
    blocks.copy_(blocks.take_along_dim(index, 1 + dim))


def forget_infinite(first: Tensor, second: Tensor) -> None:
    """Sets moments to zero where a square has overflowed; else they would not move again."""
    bad = ~second.isfinite()
    first.masked_fill_(bad, 0.0)
    second.masked_fill_(bad, 0.0)


def _scaled(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Factors with a largest diagonal entry of one; zeros where they are not finite, also in place.

    A tiny ramp on the diagonal determines the eigenvectors where eigenvalues are zero: rounding
    would choose others on each machine.
    """
    factor.masked_fill_(~factor.isfinite().all(-1).all(-1)[:, None, None], 0.0)
    largest = factor.diagonal(dim1=-2, dim2=-1).amax(-1)
    scaled = factor.to(dtype) / torch.where(largest > 0, largest, 1.0)[:, None, None].to(dtype)
    size = factor.shape[-1]
    height = torch.finfo(dtype).eps ** 0.75
    scaled.diagonal(dim1=-2, dim2=-1).add_(
        torch.linspace(height, 0, size, dtype=dtype, device=factor.device)
    )
    return scaled
