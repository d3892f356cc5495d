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


def multiply(stack: Stack, blocks: Tensor, spare: Tensor, *, forth: bool) -> None:
    """Brings blocks into the coordinates of the bases, `Q_L' X Q_R`, or back, `Q_L X Q_R'`.

    Args:
        stack: The stack.
        blocks: `(B, m, n)`, overwritten by the result.
        spare: Memory of the same shape, which is overwritten, too.
        forth: Whether into the coordinates of the bases; else out of them.
    """
    source, target = blocks, spare
    for side in stack.sides:
        basis = side["basis"]
        if side.dim == 0:
            torch.bmm(basis.mT if forth else basis, source, out=target)
        else:
            torch.bmm(source, basis if forth else basis.mT, out=target)
        source, target = target, source
    if source is not blocks:
        blocks.copy_(source)


def eigenvectors(basis: Tensor, factor: Tensor) -> Tensor:
    """The eigenvectors of factors, those of the largest eigenvalues first.

    They are unit vectors where a factor is not finite, which becomes zero, or where they are not
    found.

    Args:
        basis: Has the dtype that is asked for.
        factor: Symmetric matrices `(B, m, m)`.
    """
    _forget_infinite(factor)
    scaled = factor.to(basis.dtype) / _divisor(factor).to(basis.dtype)
    scaled.diagonal(dim1=-2, dim2=-1).add_(_ramp(scaled))
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


def powered(side: Side, *, on_device: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The products of factors with their bases, columns sorted by the eigenvalues they estimate.

    Args:
        side: The side of a stack.
        on_device: Whether no decision may wait for the device.

    Returns:
        `F Q`, each up to a factor; the order of its columns `(B, size)`, the largest eigenvalue
        first; and two sums for each factor: of its squared entries off the diagonal in the present
        basis, and of all.
    """
    factor, basis = side["factor"], side["basis"]
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    largest = diagonal.amax(-1)
    if on_device or not bool(largest.amax() < torch.inf):
        _forget_infinite(factor)
    kept = diagonal.clone()
    divisor = _divisor(factor).to(basis.dtype)
    diagonal.add_(divisor[:, 0] * _ramp(basis))
    # Transposed: the columns that are sorted are rows, and a QR decomposition wants them so.
    product = torch.bmm(basis.mT, factor.to(basis.dtype)).div_(divisor)
    diagonal.copy_(kept)
    eigenvalues = (basis.mT * product).sum(-1)
    whole = torch.linalg.vector_norm(product.flatten(1), dim=1).square_()
    left = (whole - eigenvalues.square().sum(-1)).clamp_(min=0)
    order = eigenvalues.argsort(dim=-1, descending=True, stable=True)
    return sorted_rows(product, order).mT, order, left, whole


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


def reorder(stack: Stack, blocks: Tensor, orders: Sequence[Tensor]) -> None:
    """Sorts rows and columns of blocks, in place; overwrites gradient and direction.

    Args:
        stack: The stack.
        blocks: `(B, m, n)`.
        orders: The order for each side, `(B, m)` or `(B, n)`.
    """
    for side, order in zip(stack.sides, orders, strict=True):
        if side.dim == 0:
            sorted_rows(blocks, order, out=stack.direction)
        else:
            index = order.unsqueeze(-2).expand_as(blocks)
            torch.gather(blocks, -1, index, out=stack.direction)
        blocks.copy_(stack.direction)


def sorted_rows(blocks: Tensor, order: Tensor, out: Tensor | None = None) -> Tensor:
    """The rows of each block in another order; faster than `gather`.

    Args:
        blocks: `(B, m, n)`.
        order: `(B, m)`.
        out: Where they go, `(B, m, n)`.
    """
    count, rows, cols = blocks.shape
    first = torch.arange(0, count * rows, rows, device=order.device)
    index = (order + first[:, None]).flatten()
    flat = None if out is None else out.view(-1, cols)
    found = torch.index_select(blocks.view(-1, cols), 0, index, out=flat)
    return found.view(count, rows, cols)


def _forget_infinite(factor: Tensor) -> None:
    """Sets factors to zero that are not finite: then some diagonal entry is not."""
    bad = ~factor.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
    factor.masked_fill_(bad[:, None, None], 0.0)


def _divisor(factor: Tensor) -> Tensor:
    """The largest diagonal entry of each factor, `(B, 1, 1)`; one where it is zero."""
    largest = factor.diagonal(dim1=-2, dim2=-1).amax(-1)
    return torch.where(largest > 0, largest, 1.0)[:, None, None]


def _ramp(like: Tensor) -> Tensor:
    """Tiny numbers for the diagonals of matrices that have ones there, `(m,)`.

    They determine the eigenvectors where eigenvalues are zero: rounding would choose others on each
    machine.
    """
    height = torch.finfo(like.dtype).eps ** 0.75
    return torch.linspace(height, 0, like.shape[-1], dtype=like.dtype, device=like.device)
