"""Eigenbases of the factors of blocks, and moments in their coordinates."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_secondorder._optim.kronecker.stacks import Side, Stack


def project(stack: Stack) -> None:
    """`G = Q_L' G Q_R` for the blocks of the gradient; overwrites the direction."""
    _multiply(stack, stack.gradient, stack.direction, forth=True)


def project_back(stack: Stack) -> None:
    """`D = Q_L D Q_R'` for the blocks of the direction; overwrites the gradient."""
    _multiply(stack, stack.direction, stack.gradient, forth=False)


def rotate(stack: Stack, blocks: Tensor, new: list[Tensor]) -> None:
    """Brings blocks from the coordinates of the bases into those of new ones, in place.

    Overwrites gradient and direction.

    Args:
        stack: The stack.
        blocks: A moment, `(B, m, n)`.
        new: The new basis of each side.
    """
    old = [side["basis"] for side in stack.sides]
    stack.direction.copy_(blocks)
    _multiply(stack, stack.direction, stack.gradient, forth=False, bases=old)
    _multiply(stack, stack.direction, stack.gradient, forth=True, bases=new)
    blocks.copy_(stack.direction)


def carry(stack: Stack, squares: Tensor, new: list[Tensor]) -> None:
    """Brings second moments from the original coordinates into those of bases, in place.

    Args:
        stack: The stack.
        squares: `(B, m, n)`.
        new: The basis of each side.
    """
    shares = [basis.square() for basis in new]
    stack.direction.copy_(squares)
    _multiply(stack, stack.direction, stack.gradient, forth=True, bases=shares)
    squares.copy_(stack.direction)


def _multiply(
    stack: Stack, blocks: Tensor, spare: Tensor, *, forth: bool, bases: list[Tensor] | None = None
) -> None:
    """Multiplies blocks with the bases of all sides, in place.

    Args:
        stack: The stack.
        blocks: `(B, m, n)`.
        spare: Memory of the same shape, which is overwritten.
        forth: Whether into the coordinates of the bases; else out of them.
        bases: Others than those of the stack.
    """
    source, target = blocks, spare
    for number, side in enumerate(stack.sides):
        basis = side["basis"] if bases is None else bases[number]
        if side.dim == 0:
            torch.bmm(basis.mT if forth else basis, source, out=target)
        else:
            torch.bmm(source, basis if forth else basis.mT, out=target)
        source, target = target, source
    if source is not blocks:
        blocks.copy_(source)


def exact(factor: Tensor) -> Tensor:
    """Eigenvectors of symmetric matrices, those of the largest eigenvalues first.

    Where a matrix is not finite, or its eigenvectors are not found, they are the unit vectors.

    Args:
        factor: `(B, m, m)`.
    """
    scaled = _scaled(factor)
    try:
        return torch.linalg.eigh(scaled)[1].flip(-1)
    except torch.linalg.LinAlgError:
        return torch.stack([_one_exact(matrix) for matrix in scaled])


def _one_exact(matrix: Tensor) -> Tensor:
    try:
        return torch.linalg.eigh(matrix.double())[1].flip(-1).to(matrix.dtype)
    except torch.linalg.LinAlgError:
        return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def powered(side: Side) -> tuple[Tensor, Tensor]:
    """The products of the factors with their bases, and the columns' order by eigenvalue.

    Args:
        side: The side of a stack.

    Returns:
        `F Q`, up to a factor for each block, with sorted columns; and the order `(B, size)`, the
        largest eigenvalue first.
    """
    basis = side["basis"]
    product = torch.bmm(_scaled(side["factor"]).to(basis.dtype), basis)
    eigenvalues = (basis * product).sum(-2)
    order = eigenvalues.argsort(dim=-1, descending=True, stable=True)
    return product.take_along_dim(order.unsqueeze(-2), -1), order


def orthonormal(product: Tensor) -> Tensor:
    """The factor `Q` of a QR decomposition, `(B, m, m)`."""
    # `torch.linalg.qr` takes twice as long on a CPU: it makes the other factor, too.
    return torch.linalg.householder_product(*torch.geqrf(product))


def reorder(blocks: Tensor, order: Tensor, dim: int) -> None:
    """Sorts rows or columns of blocks, in place.

    Args:
        blocks: `(B, m, n)`.
        order: `(B, m)` or `(B, n)`.
        dim: 0 for rows, 1 for columns.
    """
    index = order.unsqueeze(-1) if dim == 0 else order.unsqueeze(-2)
    blocks.copy_(blocks.take_along_dim(index, 1 + dim))


def _scaled(factor: Tensor) -> Tensor:
    """Matrices divided by their largest diagonal entry; zeros where they are not finite."""
    factor = torch.where(factor.isfinite().all(-1).all(-1)[:, None, None], factor, 0.0)
    largest = factor.diagonal(dim1=-2, dim2=-1).amax(-1)
    return factor / torch.where(largest > 0, largest, 1.0)[:, None, None]
