"""Estimates of a curvature's diagonal from products with random vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._autograd.graph import Graph, added
from torch_secondorder._autograd.vectorized import hessian_products, vectorizing_pays
from torch_secondorder._closure.data_parallel import Ranks
from torch_secondorder._foundation.buffer_pool import BufferPool
from torch_secondorder._foundation.checks import check_choice, check_integer
from torch_secondorder._objective.base import Evaluation
from torch_secondorder._params.space import WHOLE, Space
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.curvature._output_space import LossCurvature, OutputSpace
from torch_secondorder.curvature._random import Distribution, draw
from torch_secondorder.curvature._samples import Samples
from torch_secondorder.curvature.base import LinearOperator
from torch_secondorder.curvature.gauss_newton import GaussNewton, random_roots

__all__ = [
    "DiagonalEstimator",
    "DiagonalWatch",
    "GaussNewtonBartlett",
    "Hutchinson",
    "exact_diagonal",
    "resolve_estimator",
    "row_norms",
]

Parts = Sequence[Tensor | None]


class DiagonalWatch(ABC):
    """Estimates the diagonal of the curvature of one evaluation, while its `backward()` runs.

    Attributes:
        twice: Whether it needs gradients that can be differentiated again.
        outputs: Whether it needs the model's outputs.
        products: The number of products so far, or of backward passes in their place.
        ranks: The ranks that the loss is the mean over; None for one.
    """

    twice: bool
    outputs: bool
    products: int = 0
    ranks: Ranks | None = None

    def scale_probes(self, factor: Tensor) -> None:
        """Multiplies the random directions by a number, and so the products."""
        raise NotImplementedError(f"{type(self).__name__} multiplies with no directions")

    @abstractmethod
    def observe(self, graph: Graph, retain: bool) -> None:
        """Takes what one `backward()` adds; see `torch_secondorder._objective.one_shot.Watch`."""

    @abstractmethod
    def diagonal(self, *, magnitudes: bool = False) -> Tensor:
        """The estimate for the loss of all ranks, `(n,)`, in the work precision of the vector.

        Args:
            magnitudes: Whether the caller uses the root mean square of `|z * A z|` over random
                signs `z`, which are the norms of the rows of `A`. Signs may then be wrong.
        """


class DiagonalEstimator(ABC):
    """A way to estimate the diagonal of a curvature.

    Attributes:
        n_samples: Random vectors for one estimate; the variance falls with their number.
        signed: Whether the estimate changes its sign with the loss.

    >>> from torch_secondorder.curvature import Diagonal
    >>> estimator: DiagonalEstimator = Hutchinson(n_samples=2)
    >>> estimator(Diagonal(torch.tensor([3.0, 1.0]))), estimator.signed
    (tensor([3., 1.]), True)
    """

    n_samples: int
    signed: bool

    @abstractmethod
    def watch(
        self,
        vector: ParameterVector,
        generator: torch.Generator | None,
        buffer_pool: BufferPool | None = None,
    ) -> DiagonalWatch:
        """Begins an estimate of the diagonal for one evaluation of an optimizer.

        Args:
            vector: The parameters' vector.
            generator: The source of random numbers; torch's own if None.
            buffer_pool: The source of memory, which is valid for one step.
        """


class Hutchinson(DiagonalEstimator):
    """`E[z * A z]` with independent entries of `z` of mean zero and variance one.

    Unbiased for every symmetric `A` (Bekas, Kokiopoulou and Saad 2007, "An estimator for the
    diagonal of a matrix"). With random signs the variance of entry `i` is the sum of `A_ij ** 2`
    over `j != i`, divided by the number of samples; Gaussian probes add `2 A_ii ** 2`.

    Args:
        n_samples: Random vectors.
        distribution: `"rademacher"` (random signs) or `"gaussian"`.
        weighted: Whether to divide by the sum of `z * z` instead of its expectation, the form of
            Bekas and others. The same for signs; for Gaussian probes it takes most of the added
            variance away, for a bias that vanishes with the number of samples where there is one.

    Raises:
        ValueError: An argument is out of range.

    >>> from torch_secondorder.curvature import Diagonal
    >>> Hutchinson()(Diagonal(torch.tensor([1.0, -2.0])))
    tensor([ 1., -2.])
    """

    signed = True

    def __init__(
        self,
        n_samples: int = 1,
        *,
        distribution: Distribution = "rademacher",
        weighted: bool = False,
    ) -> None:
        check_integer("n_samples", n_samples)
        check_choice("distribution", distribution, Distribution)
        self.n_samples = n_samples
        self.distribution: Distribution = distribution
        self.weighted = weighted

    def __call__(
        self, operator: LinearOperator, generator: torch.Generator | None = None
    ) -> Tensor:
        """An estimate of the operator's diagonal, shape `(n,)`.

        Args:
            operator: A symmetric operator; its `matmat` multiplies all random vectors at once.
            generator: The source of random numbers; torch's own by default.
        """
        probes = self._draw(operator.size, generator, operator.dtype, operator.device)
        if self.n_samples == 1:
            products = [operator.matvec(probes[0])]
        else:
            products = list(operator.matmat(torch.stack(probes, 1)).unbind(1))
        return self.mean(probes, products)

    def watch(
        self,
        vector: ParameterVector,
        generator: torch.Generator | None,
        buffer_pool: BufferPool | None = None,
    ) -> DiagonalWatch:
        """See `DiagonalEstimator.watch`."""
        return _HutchinsonWatch(self, vector, generator, buffer_pool)

    def _draw(
        self,
        size: int,
        generator: torch.Generator | None,
        dtype: torch.dtype,
        device: torch.device,
        buffer_pool: BufferPool | None = None,
    ) -> list[Tensor]:
        return [
            draw(size, self.distribution, generator, buffer_pool, dtype=dtype, device=device)
            for _ in range(self.n_samples)
        ]

    def mean(self, probes: Sequence[Tensor], products: Sequence[Tensor]) -> Tensor:
        """The estimate. Products are left unchanged: they may belong to the operator."""
        total = products[0] * probes[0]
        for z, product in zip(probes[1:], products[1:], strict=True):
            total.addcmul_(z, product)
        if not self.weighted:
            return total.div_(self.n_samples) if self.n_samples > 1 else total
        weight = probes[0].square()
        for z in probes[1:]:
            weight.addcmul_(z, z)
        return total.div_(weight)


class _HutchinsonWatch(DiagonalWatch):
    twice, outputs = True, False

    def __init__(
        self,
        estimator: Hutchinson,
        vector: ParameterVector,
        generator: torch.Generator | None,
        buffer_pool: BufferPool | None,
    ) -> None:
        self._estimator = estimator
        self._vector = vector
        # Each name in a pool stands for one vector.
        self._buffer_pool = buffer_pool if estimator.n_samples == 1 and vector.is_large else None
        self._probes = estimator._draw(
            vector.size, generator, vector.dtype, vector.device, self._buffer_pool
        )
        self._tangents = list(map(vector.split, self._probes))
        self._sums: list[list[Tensor | None]] = []

    def scale_probes(self, factor: Tensor) -> None:
        self._tangents = [self._vector.split(z * factor) for z in self._probes]

    def observe(self, graph: Graph, retain: bool) -> None:
        products: list[Sequence[Tensor | None]]
        if len(self._tangents) == 1:
            products = [graph.hessian_product(self._tangents[0], retain=retain)]
        else:
            pays = vectorizing_pays(self._vector.size, self._vector.device)
            products = hessian_products(graph, self._tangents, pays, retain)
        self.products += len(products)
        if self._sums:
            self._sums = [_sum(a, b) for a, b in zip(self._sums, products, strict=True)]
        else:
            self._sums = list(map(list, products))

    def diagonal(self, *, magnitudes: bool = False) -> Tensor:
        gather = partial(self._vector.gather, buffer_pool=self._buffer_pool)
        products = list(map(gather, self._sums))
        if self.ranks is not None and self.ranks.met and self.ranks.count > 1:
            # Each with its own probes, should they differ.
            return self.ranks.average_(self._estimator.mean(self._probes, products))
        if magnitudes and len(products) == 1 and self._estimator.distribution == "rademacher":
            return products[0]  # a sign changes no magnitude
        return self._estimator.mean(self._probes, products)


class GaussNewtonBartlett(DiagonalEstimator):
    """The diagonal of the Gauss-Newton matrix, from gradients for labels drawn from the model.

    By Bartlett's second identity a random gradient `q` of the loss by the outputs, for labels drawn
    from the model's own prediction, has `E[q q']` equal to the Gauss-Newton `B`; one backward pass
    turns it into `J'q`, whose square is unbiased for the diagonal of `J'B J` and never negative
    (Liu et al. 2023, "Sophia: a scalable stochastic second-order optimizer for language model
    pre-training"). No second derivative is needed.

    Labels are drawn for cross-entropy; where entries of the output are independent, as for squared
    error and binary cross-entropy, random signs of the right size take their place, which have the
    same second moment and a smaller fourth. A marked output whose loss is not a standard one gets
    the gradient of the loss itself with a random sign for each sample: the diagonal of the
    empirical Fisher matrix. Loss terms that do not depend on the outputs are left out.

    Args:
        n_samples: Labels drawn for each sample.

    Raises:
        ValueError: `n_samples` is below one.

    >>> from torch_secondorder import FunctionalObjective
    >>> x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0]])
    >>> def loss(w):
    ...     return torch.nn.functional.mse_loss(x @ w, y, reduction="sum")
    >>> evaluation = FunctionalObjective(loss, torch.ones(2, 1)).evaluate(curvature=True)
    >>> GaussNewtonBartlett()(evaluation).round()
    tensor([2., 8.])
    """

    signed = False

    def __init__(self, n_samples: int = 1) -> None:
        check_integer("n_samples", n_samples)
        self.n_samples = n_samples

    def __call__(self, evaluation: Evaluation, generator: torch.Generator | None = None) -> Tensor:
        """An estimate of the diagonal at an evaluated point, shape `(n,)`.

        Args:
            evaluation: Made by `Objective.evaluate(curvature=True)`; regularization is included.
            generator: The source of random numbers; torch's own by default.

        Raises:
            RuntimeError: No output was found.
        """
        return GaussNewton(evaluation, remainder="ignore").diagonal(self.n_samples, generator)

    def watch(
        self,
        vector: ParameterVector,
        generator: torch.Generator | None,
        buffer_pool: BufferPool | None = None,
    ) -> DiagonalWatch:
        """See `DiagonalEstimator.watch`."""
        return _BartlettWatch(self, vector, generator)


class _BartlettWatch(DiagonalWatch):
    twice, outputs = False, True

    def __init__(
        self,
        estimator: GaussNewtonBartlett,
        vector: ParameterVector,
        generator: torch.Generator | None,
    ) -> None:
        self._count = estimator.n_samples
        self._vector = vector
        self._generator = generator
        self._sums: list[Tensor | None] = []

    def observe(self, graph: Graph, retain: bool) -> None:
        space = OutputSpace(graph)
        curvature = LossCurvature(space)
        samples = cache(partial(Samples, space, curvature.coefficients))
        roots = random_roots(
            space, curvature.likelihoods, samples, self._count, self._generator, self.ranks
        )
        # Micro-batches are independent: their roots add up to one of the sum.
        pulled = space.pull_each(roots)
        self.products += self._count
        self._sums = _sum(self._sums, pulled) if self._sums else list(pulled)

    def diagonal(self, *, magnitudes: bool = False) -> Tensor:
        flat = self._vector.gather(self._sums, batch=(self._count,))
        if self.ranks is not None:
            flat = self.ranks.join_roots_(flat)
        return row_norms(flat) if magnitudes else flat.square_().mean(0)


_NAMED: dict[str, Callable[[int], DiagonalEstimator]] = {
    "hutchinson": Hutchinson,
    "gnb": GaussNewtonBartlett,
}


def resolve_estimator(estimator: Any, n_samples: int = 1) -> DiagonalEstimator:
    """An estimator from its name, or the one that was given.

    Args:
        estimator: `"hutchinson"`, `"gnb"` or an instance.
        n_samples: Random vectors for each estimate, for one given by name.

    Raises:
        ValueError: The name is unknown, or `n_samples` below one.
        TypeError: It is neither a name nor an estimator.
    """
    if isinstance(estimator, DiagonalEstimator):
        return estimator
    check_choice("estimator", estimator, _NAMED, "a DiagonalEstimator")
    return _NAMED[estimator](n_samples)


def exact_diagonal(operator: LinearOperator) -> Tensor:
    """The diagonal of an operator from `n` products, for small models and as an oracle.

    Args:
        operator: A symmetric operator.

    Returns:
        Shape `(n,)`.

    >>> from torch_secondorder.curvature import Diagonal
    >>> exact_diagonal(Diagonal(torch.tensor([1.0, -2.0])))
    tensor([ 1., -2.])
    """
    result = torch.empty(operator.size, dtype=operator.dtype, device=operator.device)
    for places in torch.arange(operator.size, device=operator.device).split(64):
        columns = torch.zeros(
            operator.size, len(places), dtype=operator.dtype, device=operator.device
        )
        each = torch.arange(len(places), device=operator.device)
        columns[places, each] = 1.0
        result[places] = operator.matmat(columns)[places, each]
    return result


def _sum(first: Parts, second: Parts) -> list[Tensor | None]:
    return list(map(added, first, second))


def row_norms(roots: Tensor, space: Space = WHOLE) -> Tensor:
    """The norms of the rows of `A = mean_k r_k r_k'`, shape `(n,)`.

    Args:
        roots: The `r_k`, shape `(k, n)`.
        space: Where they live.
    """
    count = len(roots)
    inner = space.total(roots @ roots.T)
    # Divided by the largest, or squares of curvatures may have no place.
    largest = inner.diagonal().amax().sqrt().clamp(min=torch.finfo(roots.dtype).tiny)
    scaled, inner = roots / largest, inner / largest / largest
    squares = torch.mul(inner @ scaled, scaled).sum(0)
    return squares.clamp_(min=0).sqrt_().mul_(largest).mul_(largest / count)
