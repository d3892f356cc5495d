"""Kronecker factors of layers, and the diagonal of all else, from one backward pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_secondorder._autograd.graph import Graph, added, explained
from torch_secondorder._autograd.parameter_uses import Unsupported
from torch_secondorder._closure.data_parallel import Ranks
from torch_secondorder._foundation.buffer_pool import BufferPool
from torch_secondorder._foundation.checks import check_choice
from torch_secondorder._foundation.private_torch import plainly
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.curvature._layers import Layer, LayerRows, Layers, layers_of
from torch_secondorder.curvature._output_space import LossCurvature, OutputSpace
from torch_secondorder.curvature._samples import Samples
from torch_secondorder.curvature.diagonal import DiagonalEstimator, DiagonalWatch
from torch_secondorder.curvature.fisher import Labels
from torch_secondorder.curvature.gauss_newton import random_roots

__all__ = ["Bases", "KroneckerEstimator", "KroneckerWatch", "LayerFactors", "side_sizes"]

#: Entries of gradients of single samples that are in memory at a time.
_CHUNK = 2**24


class Bases(NamedTuple):
    """Orthogonal matrices whose columns are the coordinates of a layer; None for its own.

    Attributes:
        left: Shape `(a, a)`, for the first dimension of the weight.
        right: Shape `(b, b)`, for its other dimensions, and the bias at the end.
    """

    left: Tensor | None
    right: Tensor | None


def side_sizes(p: Tensor) -> tuple[int, int]:
    """The sizes of both sides of a parameter as a matrix, with a place for a bias on the right."""
    return p.shape[0], p.numel() // p.shape[0] + 1


class LayerFactors(NamedTuple):
    """The block of a layer, `left (x) right` for the weight as a matrix `(a, b)`.

    Attributes:
        weight: Which of the parameters.
        bias: Which of the parameters, if it is a part of the block: the last column.
        left: Shape `(a, a)`, or the diagonal `(a,)` of a side that is too large.
        right: Shape `(b, b)`, or the diagonal `(b,)`.
    """

    weight: int
    bias: int | None
    left: Tensor
    right: Tensor


class KroneckerEstimator(DiagonalEstimator):
    """Kronecker factors of the layers of a model, and the diagonal of its Gauss-Newton matrix.

    The factors are those of Martens and Grosse 2015 for matrices, and of Grosse and Martens 2016,
    "A Kronecker-factored approximate Fisher matrix for convolution layers", for convolutions, whose
    places count as rows that are independent of each other. So do the positions of a sequence, and
    the calls of a layer that is called several times ("expand" in Eschenhagen et al. 2023,
    "Kronecker-factored approximate curvature for modern neural network architectures").

    The diagonal of a layer is that of its block in the coordinates of `KroneckerWatch.bases`
    (George et al. 2018, "Fast approximate natural gradient descent in a Kronecker-factored
    eigenbasis"): the second moments of the samples' gradients there. In convolutions they are
    those of whole samples; elsewhere rows count as samples.

    Args:
        labels: `"sampled"` for labels drawn from the model's prediction, see `GaussNewtonBartlett`;
            `"empirical"` for those of the data.

    Raises:
        ValueError: `labels` is unknown.
    """

    signed = False
    n_samples = 1

    def __init__(self, labels: Labels = "sampled") -> None:
        check_choice("labels", labels, Labels)
        self.labels: Labels = labels

    def watch(
        self,
        vector: ParameterVector,
        generator: torch.Generator | None,
        buffer_pool: BufferPool | None = None,
    ) -> KroneckerWatch:
        """See `DiagonalEstimator.watch`."""
        return KroneckerWatch(self, vector, generator)


@dataclass(slots=True)
class _Sums:
    """Sums over the rows of a layer.

    Attributes:
        bias: See `Layer`.
        inputs_first: See `Layer`.
        left: The sum of `l l'`, or of `l * l`.
        right: Likewise.
        moments: Second moments in the layer's coordinates, `(a, b)`; None where there are none.
        rows: The number of rows.
    """

    bias: int | None
    inputs_first: bool
    left: Tensor
    right: Tensor
    moments: Tensor | None
    rows: int = 0

    def add(self, rows: LayerRows, bases: Bases | None) -> None:
        for total, side in ((self.left, rows.left), (self.right, rows.right)):
            if total.dim() == 2:
                total.addmm_(side.T, side)
            else:
                total.add_(side.square().sum(0))
        self.rows += len(rows.left)
        if self.moments is not None:
            assert bases is not None
            _add_moments(self.moments, rows, bases)

    @property
    def tensors(self) -> list[Tensor]:
        found = [self.left, self.right]
        return found if self.moments is None else [*found, self.moments]

    @property
    def diagonal(self) -> Tensor:
        """The diagonal of the block, `(a, b)`."""
        if self.moments is not None:
            return self.moments
        left, right = (t.diagonal() if t.dim() == 2 else t for t in (self.left, self.right))
        return torch.outer(left, right / max(self.rows, 1))


class KroneckerWatch(DiagonalWatch):
    """Takes factors and diagonal while `backward()` runs.

    Attributes:
        bases: The coordinates that the diagonals of layers are wanted in, by their weights. Layers
            that are not there get the diagonal of `left (x) right`.
        largest: For each parameter the size of the largest factor; longer sides of its layer get
            none. The right side of a weight counts a bias, whether there is one or not.
        layers: The factors, once `diagonal` was called.
    """

    twice, outputs = False, True

    def __init__(
        self,
        estimator: KroneckerEstimator,
        vector: ParameterVector,
        generator: torch.Generator | None,
    ) -> None:
        self._estimator = estimator
        self._vector = vector
        self._generator = generator
        self._pulled: list[Tensor | None] = [None] * len(vector.params)
        self._sums: dict[int, _Sums] = {}
        self._unclear: set[int] = set()  # weights that are not the same layer in all passes
        self.bases: Mapping[int, Bases] = {}
        self.largest: Sequence[float] = [math.inf] * len(vector.params)
        self.layers: list[LayerFactors] = []

    def observe(self, graph: Graph, retain: bool) -> None:
        """See `DiagonalWatch.observe`."""
        space = OutputSpace(graph)
        curvature = LossCurvature(space)
        samples = cache(partial(Samples, space, curvature.coefficients))
        likelihoods = list(curvature.likelihoods)
        if self._estimator.labels == "empirical":
            likelihoods = [None] * len(likelihoods)
        (root,) = random_roots(space, likelihoods, samples, 1, self._generator, self.ranks)
        pairs = [(z, q) for z, q in zip(space.tensors, root, strict=True) if q is not None]
        self.products += 1
        if not pairs:
            return
        tensors, weights = zip(*pairs, strict=True)
        found = _layers(space.tensors, graph.params)
        covered = {i for layer in found.layers for i in (layer.weight, layer.bias)}
        others = [i for i, p in enumerate(graph.params) if i not in covered and p.requires_grad]
        edges = found.edges()
        inputs: list[Any] = [*edges, *(graph.params[i] for i in others)]
        try:
            with plainly():
                gradients = torch.autograd.grad(
                    tensors, inputs, weights, retain_graph=True, allow_unused=True
                )
        except RuntimeError as error:
            raise explained(error) from error
        for i, gradient in zip(others, gradients[len(edges) :], strict=True):
            self._pulled[i] = added(self._pulled[i], gradient)
        rest = iter(gradients)
        for layer in found.layers:
            for rows in found.rows(layer, [next(rest) for _ in layer.uses]):
                self._add(layer, rows)

    def _add(self, layer: Layer, rows: LayerRows) -> None:
        sums = self._sums.get(layer.weight)
        if sums is None:
            sizes = rows.left.shape[1], rows.right.shape[1]
            sums = self._begin(layer.weight, layer.bias, layer.inputs_first, sizes)
        if (sums.bias, sums.inputs_first) == (layer.bias, layer.inputs_first):
            sums.add(rows, self.bases.get(layer.weight))
        else:
            self._unclear.add(layer.weight)

    def _begin(
        self, weight: int, bias: int | None, inputs_first: bool, sizes: tuple[int, int]
    ) -> _Sums:
        p = self._vector.params[weight]
        kind = torch.promote_types(p.dtype, torch.float32)
        fits = (n <= self.largest[weight] for n in side_sizes(p))
        shapes = [(n, n) if fit else (n,) for n, fit in zip(sizes, fits, strict=True)]
        left, right = (torch.zeros(shape, dtype=kind, device=p.device) for shape in shapes)
        moments = None
        if weight in self.bases and _fits(self.bases[weight], sizes):
            moments = torch.zeros(sizes, dtype=kind, device=p.device)
        sums = self._sums[weight] = _Sums(bias, inputs_first, left, right, moments)
        return sums

    def diagonal(self, *, magnitudes: bool = False) -> Tensor:
        """See `DiagonalWatch.diagonal`; that of each layer in its own coordinates."""
        vector, ranks = self._vector, self.ranks
        if ranks is not None and ranks.count > 1:
            self._join(ranks)
        flat = vector.gather(self._pulled)
        if ranks is not None:
            flat = ranks.join_roots_(flat)
        flat.square_()
        ends = [0, *accumulate(p.numel() * (1 + p.is_complex()) for p in vector.params)]
        self.layers = []
        for weight, sums in sorted(self._sums.items()):
            found = sums.diagonal.to(flat)
            count = ends[weight + 1] - ends[weight]
            width = count // max(len(found), 1)
            flat[ends[weight] : ends[weight + 1]].view(-1, width).add_(found[:, :width])
            if sums.bias is not None:
                flat[ends[sums.bias] : ends[sums.bias + 1]].add_(found[:, -1])
            if weight not in self._unclear:
                right = sums.right.div_(max(sums.rows, 1))
                self.layers.append(LayerFactors(weight, sums.bias, sums.left, right))
        return flat

    def _join(self, ranks: Ranks) -> None:
        """Joins the sums of all ranks."""
        own = [
            number
            for weight, sums in sorted(self._sums.items())
            for number in (
                weight,
                -1 if sums.bias is None else sums.bias,
                int(sums.inputs_first),
                sums.rows,
                int(weight in self._unclear),
            )
        ]
        kinds: dict[int, tuple[int, int]] = {}
        counts: dict[int, int] = {}
        for row in ranks.gather(own, self._vector.device):
            for weight, bias, first, count, unclear in zip(
                *(row[i::5] for i in range(5)), strict=True
            ):
                if unclear or kinds.setdefault(weight, (bias, first)) != (bias, first):
                    self._unclear.add(weight)
                counts[weight] = counts.get(weight, 0) + count
        messages: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for weight, (bias, first) in sorted(kinds.items()):
            sums = self._sums.get(weight)
            known = None if bias < 0 else bias
            if sums is None or (sums.bias, sums.inputs_first) != (known, bool(first)):
                p = self._vector.params[weight]
                sizes = p.shape[0], p.numel() // p.shape[0] + (known is not None)
                sums = self._begin(weight, known, bool(first), sizes)
            sums.rows = counts[weight]
            kind = sums.left.dtype, sums.left.device
            messages.setdefault(kind, []).extend(sums.tensors)
            # Of the sides the one is a mean over all rows, the other a mean over the ranks.
            sums.right *= ranks.count
        for tensors in messages.values():
            joined = ranks.average_(torch.cat([t.reshape(-1) for t in tensors]))
            for t, part in zip(tensors, joined.split([t.numel() for t in tensors]), strict=True):
                t.copy_(part.view_as(t))


def _fits(bases: Bases, sizes: Sequence[int]) -> bool:
    """True if bases are of a layer of these sizes: a bias may have come or gone since."""
    return all(b is None or len(b) == n for b, n in zip(bases, sizes, strict=True))


def _layers(outputs: Sequence[Tensor], params: Sequence[Tensor]) -> Layers:
    """The layers of a graph; none where it cannot be read."""
    try:
        return layers_of(outputs, params)
    except Unsupported:
        return Layers(None, [])


def _add_moments(moments: Tensor, rows: LayerRows, bases: Bases) -> None:
    """Adds the second moments of samples' gradients in some coordinates."""
    left, right = rows.left, rows.right
    left = left if bases.left is None else left @ bases.left
    right = right if bases.right is None else right @ bases.right
    samples = rows.samples
    if samples is None or samples == len(left):
        moments.addmm_(left.square().T, right.square())
        return
    size = max(1, _CHUNK // moments.numel())
    by_sample = (t.unflatten(0, (samples, -1)).split(size) for t in (left, right))
    for d, x in zip(*by_sample, strict=True):
        moments += torch.bmm(d.mT, x).square_().sum(0)
