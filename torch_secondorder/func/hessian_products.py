"""Products with the second derivatives of pure functions, and their diagonal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import grad

from torch_secondorder._autograd.twice_differentiable import with_second_derivatives
from torch_secondorder._foundation.checks import check_integer
from torch_secondorder._foundation.memory import check_fits
from torch_secondorder.func._trees import basis, flatten, like, numels, scalar, spans, unflatten
from torch_secondorder.func.transforms import derivative, pullback, vectorized

__all__ = ["ggnvp", "hessian_diagonal", "hvp", "vhp"]


def hvp(f: Callable[[Any], Tensor], x: Any, v: Any) -> Any:
    """The Hessian times a vector, forward over reverse.

    Costs about two gradients, and stores no more than one (Pearlmutter 1994, "Fast exact
    multiplication by the Hessian"). Each operation in `f` needs a rule for forward mode; `vhp`
    does not.

    Args:
        f: A function of a tree of tensors that returns a scalar.
        x: Where the Hessian is taken.
        v: A tree like `x`.

    Returns:
        A tree like `x`.

    Raises:
        TypeError: A leaf of `x` is no tensor of real numbers.
        ValueError: `f(x)` is no scalar, or `v` is not like `x`.
        NotImplementedError: An operation in `f` has no rule for forward mode.

    >>> hvp(lambda x: x[0] ** 2 * x[1], torch.tensor([3.0, 5.0]), torch.tensor([1.0, 0.0]))
    tensor([10.,  6.])
    """
    leaves, spec = flatten(x, "x")
    like(v, leaves, spec, "v")
    return derivative(grad(scalar(f)), (x,), (v,))


def vhp(f: Callable[[Any], Tensor], x: Any, v: Any) -> Any:
    """A vector times the Hessian, reverse over reverse: the same numbers as those of `hvp`.

    For functions with operations that have no forward mode.

    Args:
        f: A function of a tree of tensors that returns a scalar.
        x: Where the Hessian is taken.
        v: A tree like `x`.

    Returns:
        A tree like `x`.

    Raises:
        TypeError: A leaf of `x` is no tensor of real numbers.
        ValueError: `f(x)` is no scalar, or `v` is not like `x`.

    >>> vhp(lambda x: x[0] ** 2 * x[1], torch.tensor([3.0, 5.0]), torch.tensor([1.0, 0.0]))
    tensor([10.,  6.])
    """
    leaves, spec = flatten(x, "x")
    like(v, leaves, spec, "v")
    return pullback(grad(scalar(f)), x)[1](v)[0]


def ggnvp(f: Callable[[Any], Any], loss: Callable[[Any], Tensor], x: Any, v: Any) -> Any:
    """The generalized Gauss-Newton matrix `J'B J` times a vector.

    `J` is the Jacobian of the model by its parameters, `B` the Hessian of the loss by the model's
    output (Schraudolph 2002, "Fast curvature matrix-vector products for second-order gradient
    descent"). `f` is called twice; it has to return the same both times.

    Args:
        f: The model as a function of a tree of parameters, which returns a tree of tensors.
        loss: A scalar function of what `f` returns.
        x: The parameters.
        v: A tree like `x`.

    Returns:
        A tree like `x`.

    Raises:
        TypeError: A leaf of `x` or `f(x)` is no tensor of real numbers.
        ValueError: The loss is no scalar, or `v` is not like `x`.
        NotImplementedError: An operation has no rule for forward mode.

    >>> w, inputs = torch.ones(2), torch.tensor([[1.0, 2.0]])
    >>> ggnvp(lambda w: inputs @ w, lambda z: z.square().sum(), w, torch.tensor([1.0, 0.0]))
    tensor([2., 4.])
    """
    leaves, spec = flatten(x, "x")
    like(v, leaves, spec, "v")
    f = with_second_derivatives(f)
    outputs, pull = pullback(f, x)
    flatten(outputs, "f(x)")
    change = derivative(f, (x,), (v,))
    return pull(hvp(loss, outputs, change))[0]


def hessian_diagonal(f: Callable[[Any], Tensor], x: Any, *, chunk_size: int | None = None) -> Any:
    """The exact diagonal of the Hessian, by products with all unit vectors, many at once.

    It takes as many products as `x` has entries; `torch_secondorder.curvature.Hutchinson`
    estimates it with a few.

    Args:
        f: A function of a tree of tensors that returns a scalar.
        x: Where the Hessian is taken.
        chunk_size: Products done at once, which needs memory for as many sets of activations; all
            by default.

    Returns:
        A tree like `x`.

    Raises:
        TypeError: A leaf of `x` is no tensor of real numbers.
        ValueError: `f(x)` is no scalar, or `chunk_size` below one.
        MemoryError: The unit vectors done at once take more memory than is free.
        RuntimeError: `f` draws random numbers.

    >>> hessian_diagonal(lambda x: x[0] ** 2 * x[1] ** 3, torch.tensor([3.0, 5.0]))
    tensor([250., 270.])
    """
    check_integer("chunk_size", chunk_size, optional=True)
    leaves, spec = flatten(x, "x")
    sizes = numels(leaves)
    count = sum(sizes)
    if count == 0:
        return unflatten([leaf.clone() for leaf in leaves], spec)
    _check_units(count, leaves[0], chunk_size)

    gradient = grad(scalar(f))

    def forward(*unit: Tensor) -> list[Tensor]:
        return flatten(derivative(gradient, (x,), (unflatten(unit, spec),)), "H")[0]

    def backward(*unit: Tensor) -> list[Tensor]:
        return flatten(pullback(gradient, x)[1](unflatten(unit, spec))[0], "H")[0]

    try:
        parts = _diagonals(forward, leaves, chunk_size)
    except NotImplementedError:  # an operation without forward mode
        parts = _diagonals(backward, leaves, chunk_size)
    whole = (parts[0] if len(parts) == 1 else torch.cat(parts)).split(sizes)
    shaped = [part.view(x.shape).to(x.dtype) for part, x in zip(whole, leaves, strict=True)]
    return unflatten(shaped, spec)


def _diagonals(
    product: Callable[..., list[Tensor]], leaves: Sequence[Tensor], chunk_size: int | None
) -> list[Tensor]:
    """Consecutive parts of the diagonal, one for each chunk of unit vectors."""
    parts = []
    for start, stop in spans(sum(numels(leaves)), chunk_size):
        rows = vectorized(product, *basis(leaves, start, stop))
        flat = torch.cat([row.reshape(stop - start, -1) for row in rows], dim=1)
        parts.append(flat.diagonal(start))
    return parts


def _check_units(count: int, leaf: Tensor, chunk_size: int | None) -> None:
    if torch.compiler.is_compiling():
        return
    check_fits(
        "the matrix of unit vectors",
        (count if chunk_size is None else min(chunk_size, count), count),
        leaf.dtype,
        leaf.device,
        "pass a smaller chunk_size, the number of products done at once",
    )
