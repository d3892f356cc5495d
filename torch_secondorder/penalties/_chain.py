"""Norms of Jacobians that are products of matrices, `D_L W_L ... D_1 W_1` for each sample.

For one layer the squared norm is a sum over units, without any matrix product (Rifai et al. 2011).
For several layers the product is formed from the cheaper end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from torch_secondorder.penalties._squares import squared_sum


class Chain(NamedTuple):
    """Jacobians `D_L W_L ... D_1 W_1`, one for each entry of a batch.

    Attributes:
        weights: `W_k`, each of shape `(units, inputs)`.
        slopes: The diagonals of `D_k`, each of shape `(entries, units)`.
    """

    weights: list[Tensor]
    slopes: list[Tensor]


def changes(values: Tensor, n: int) -> Tensor:
    """Differences between later entries and the first `n`; the entries themselves if there are `n`.

    Args:
        values: Shape `(n, ...)`; or `(n + k n, ...)`, for a batch and `k` noisy copies of it.
        n: Number of samples in the batch.

    Returns:
        Shape `(n, ...)` or `(k n, ...)`.
    """
    if len(values) == n:
        return values
    others = values[n:].view(-1, *values[:n].shape)
    return (others - values[:n]).flatten(0, 1)


def mean_squared_norm(chain: Chain, n: int) -> Tensor:
    """Mean over the batch of `|J|^2`, or of `|J - J'|^2` if the chain includes noisy copies.

    Args:
        chain: The Jacobians, with entries as for `changes`.
        n: Number of samples in the batch.
    """
    weights = chain.weights
    if len(weights) == 1:
        change = changes(chain.slopes[0], n)
        # Summed over the batch first, so that one pass over the weights suffices.
        return (squared_sum(change, 0) * squared_sum(weights[0], 1)).sum() / len(change)
    if not _output_first(weights):
        jacobian = changes(_from_input(chain), n)
        return squared_sum(jacobian) / len(jacobian)
    left, first = changes(_from_output(chain), n), weights[0]
    if first.shape[0] < first.shape[1]:  # |M W|^2 = <M (W W'), M>
        return ((left @ (first @ first.T)) * left).sum() / len(left)
    return squared_sum(left @ first) / len(left)


def largest(weights: Sequence[Tensor]) -> int:
    """Elements per sample of the largest array in `mean_squared_norm`."""
    if len(weights) == 1:
        return weights[0].shape[0]
    if _output_first(weights):
        first = weights[0]
        return weights[-1].shape[0] * max(*(w.shape[1] for w in weights[1:]), min(first.shape))
    return weights[0].shape[1] * max(w.shape[0] for w in weights)


def _output_first(weights: Sequence[Tensor]) -> bool:
    """True if the product takes fewer multiplications from the output side."""
    between = [w.numel() for w in weights[1:]]
    first, last = weights[0], weights[-1]
    from_output = last.shape[0] * (sum(between[:-1]) + first.shape[0] * min(first.shape))
    return from_output <= first.shape[1] * sum(between)


def _from_output(chain: Chain) -> Tensor:
    """The product without the first matrix, `D_L W_L ... W_2 D_1`: `(entries, outputs, units)`."""
    weights, slopes = chain
    product = slopes[-1].unsqueeze(2) * weights[-1]
    for weight, slope in zip(weights[-2:0:-1], slopes[-2:0:-1], strict=True):
        product = (product * slope.unsqueeze(1)) @ weight
    return product * slopes[0].unsqueeze(1)


def _from_input(chain: Chain) -> Tensor:
    """The Jacobians, shape `(entries, outputs, inputs)`."""
    weights, slopes = chain
    product = slopes[0].unsqueeze(2) * weights[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        product = slope.unsqueeze(2) * (weight @ product)
    return product
