"""Hessian products without second derivatives: differences of gradients."""

from __future__ import annotations

from math import hypot, inf, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from torch_secondorder._objective.base import Objective
from torch_secondorder._params.space import Space
from torch_secondorder.curvature._random import draw
from torch_secondorder.curvature.base import LinearOperator
from torch_secondorder.curvature.diagonal import Hutchinson

__all__ = ["FiniteDifference", "diagonal_by_differences"]


def diagonal_by_differences(
    estimator: Hutchinson, objective: Objective, generator: torch.Generator | None = None
) -> Tensor:
    """Hutchinson's estimate of the Hessian's diagonal where an objective stands, shape `(n,)`.

    Its products are differences of gradients, two evaluations each, see `FiniteDifference`. The
    random vectors do not depend on how the parameters are sharded.

    Args:
        estimator: Whose random vectors and whose mean.
        objective: Ends at a trial; `settle` puts the parameters back.
        generator: Where randomness comes from; torch's own by default.
    """
    operator, vector = FiniteDifference(objective), objective.vector
    device = vector.device

    def one(size: int) -> Tensor:
        return draw(size, estimator.distribution, generator, dtype=vector.dtype, device=device)

    probes = [vector.drawn(one) for _ in range(estimator.n_samples)]
    return estimator.mean(probes, [operator.matvec(z) for z in probes])


class FiniteDifference(LinearOperator):
    """The Hessian of an objective where it stands, by central differences of its gradient.

    `H v` is `(g(theta + h v) - g(theta - h v)) / 2h`: two evaluations, and nothing is asked of the
    closure but gradients. The step is relative to the parameters, `h |v| = eps^(1/3) |theta|`,
    which balances rounding, of order `eps / h`, with truncation, of order `h^2` (Nocedal and Wright
    2006, section 8.1). About two thirds of the digits are right in float64, and three to four
    digits of float32: enough for a Newton step, too little for a spectrum. Under autocast in
    bfloat16, and with a policy of `fully_shard` to compute in it, one digit is.

    Where variables are of very different sizes, no one step suits them all: those whose sizes
    differ by more than 1e4 are multiplied one group after the other, at two evaluations for each.
    The entries of a tensor count as alike, unless more of them are that much smaller than the rest
    than chance would have. A tensor of zeros is taken for as large as all others are in the mean,
    or for one.

    A step that leads to where the gradient is not finite is shortened.

    Args:
        objective: Where it stands when a product is made counts.
        sizes: Those of the variables, shape `(n,)`, without the scale; by default what they are
            where the objective stands. A variable that is zero by chance has a size all the same.

    >>> from torch_secondorder import FunctionalObjective
    >>> x = torch.tensor([3.0, 5.0], dtype=torch.float64)
    >>> objective = FunctionalObjective(lambda x: x[0] ** 2 * x[1], x)
    >>> (FiniteDifference(objective) @ torch.eye(2, dtype=torch.float64)).round(decimals=6)
    tensor([[10.,  6.],
            [ 6.,  0.]], dtype=torch.float64)
    """

    def __init__(self, objective: Objective, sizes: Tensor | None = None) -> None:
        self._objective = objective
        vector = objective.vector
        self.size, self.dtype, self.device = vector.size, vector.dtype, vector.device
        self.space = vector.space
        self._sizes = sizes
        self._of: Tensor | None = None  # the position that the groups are of
        self._groups: list[_Group] = []

    def matvec(self, v: Tensor) -> Tensor:
        """See `LinearOperator.matvec`."""
        (largest,) = self.space.to_host(largest=[v])
        if not 0 < largest < inf:
            return v * 0.0
        unit = v / largest  # the squares of v itself may leave the range of float32
        if self._of is not self._objective.position:
            self._of = self._objective.position
            self._groups = _groups(
                self._objective, self._of if self._sizes is None else self._sizes
            )
        if len(self._groups) == 1:
            return self._difference(unit, self._groups[0].size).mul_(largest)
        product = torch.zeros_like(v)
        for size, members in self._groups:
            assert members is not None
            product += self._difference(unit * members, size)
        return product.mul_(largest)

    def _difference(self, v: Tensor, size: float) -> Tensor:
        """The product with a vector whose variables are of some size, the norm of them all."""
        objective = self._objective
        (norm,) = self.space.to_host(norms=[torch.linalg.vector_norm(v)])
        if not norm:
            return v
        h = objective.precision ** (1 / 3) * size / norm
        for attempt in range(_ATTEMPTS):
            step = v * h
            product = objective.trial(step).grad - objective.trial(step, -1.0).grad
            if attempt + 1 < _ATTEMPTS:  # the last one is returned as it is
                (most,) = self.space.to_host(largest=[product])
                if most < inf:
                    break
                h *= _SHORTER
        return product.div_(2 * h)


# How often a product is made, and what its step is multiplied by where it was not finite.
_ATTEMPTS = 4
_SHORTER = 0.05
# Sizes that differ by less have one step: it is off by the root of that at most, in each direction.
_ALIKE = 1e4
# The share of a tensor's entries below which being so small is chance.
_CHANCE = 0.01


class _Group(NamedTuple):
    """Variables of about one size.

    Attributes:
        size: The norm of their sizes.
        members: One for each variable among them, zero for the others; None for all.
    """

    size: float
    members: Tensor | None


def _groups(objective: Objective, position: Tensor) -> list[_Group]:
    """Variables that one step suits, largest first."""
    space = objective.vector.space
    magnitudes = position.abs()
    slots = objective.vector.slots()
    norms = [torch.linalg.vector_norm(magnitudes[start:stop]) for start, stop, _ in slots]
    whole = magnitudes.new_tensor([float(stop - start) for start, stop, _ in slots])
    numbers = space.to_host(norms=norms, sums=whole.unbind())
    counts, lengths = numbers[: len(slots)], numbers[len(slots) :]
    known = [i for i, length in enumerate(lengths) if 0 < length < inf]
    total = hypot(*(lengths[i] for i in known))
    mean = total / sqrt(sum(counts[i] for i in known)) if known else 1.0
    typical = [
        length / sqrt(count) if 0 < length < inf else mean
        for length, count in zip(lengths, counts, strict=True)
    ]
    small = [
        ((part := magnitudes[start:stop]) > 0).logical_and_(part < size / _ALIKE)
        for (start, stop, _), size in zip(slots, typical, strict=True)
    ]
    chances = space.to_host(sums=[entries.sum().to(position.dtype) for entries in small])
    own = [chance > _CHANCE * count for chance, count in zip(chances, counts, strict=True)]
    if not any(own) and max(typical) <= _ALIKE * min(typical):
        return [_Group(hypot(*(s * sqrt(c) for s, c in zip(typical, counts, strict=True))), None)]
    sizes = torch.empty_like(position)
    for (start, stop, _), size, entries, differs in zip(slots, typical, small, own, strict=True):
        sizes[start:stop] = size
        if differs:
            sizes[start:stop] = torch.where(entries, magnitudes[start:stop], size)
    return _by_size(sizes, space)


def _by_size(sizes: Tensor, space: Space) -> list[_Group]:
    groups: list[_Group] = []
    (largest,) = space.to_host(largest=[sizes])
    sizes.clamp_(min=largest * _ALIKE**-4)  # a group more for each power of that, and no end
    left = torch.ones_like(sizes, dtype=torch.bool)
    while True:
        (largest,) = space.to_host(largest=[sizes * left])
        if not largest:
            return groups
        members = left & (sizes > largest / _ALIKE)
        left &= ~members
        chosen = members.to(sizes.dtype)
        (length,) = space.to_host(norms=[torch.linalg.vector_norm(sizes * chosen)])
        groups.append(_Group(length, chosen))
