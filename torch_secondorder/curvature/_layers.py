"""The linear and convolutional layers of a graph, found by the operations that use parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from torch_secondorder._autograd.convolution import geometry_of
from torch_secondorder._autograd.parameter_uses import (
    Survey,
    Unsupported,
    Use,
    made_alone,
    params_below,
    surveyed,
    uses_of,
)
from torch_secondorder._autograd.use_factors import factors_of, unfolded

__all__ = ["Layer", "LayerRows", "Layers", "layers_of"]

_CONVOLUTIONS = ("ConvolutionBackward0", "_ConvolutionBackward")
#: For operations that multiply with a matrix: where it may stand, and where a bias does.
_MATRICES: dict[str, tuple[Sequence[int], int | None]] = {
    "MmBackward0": ((0, 1), None),
    "AddmmBackward0": ((1, 2), 0),
    "LinearBackward0": ((1,), 2),
    **dict.fromkeys(_CONVOLUTIONS, ((1,), 2)),
}
#: Operations that a weight may pass through on the way; those that transpose it.
_PASSING = frozenset({"AliasBackward0", "CloneBackward0", "ToCopyBackward0"})
_TRANSPOSING = frozenset({"TBackward0", "TransposeBackward0"})
#: Entries of the patches of a convolution that are in memory at a time.
_CHUNK = 2**24
#: The least number of rows that a convolution's factors are made of, in sizes of the larger one,
#: and the least number of samples.
_ROWS_PER_SIDE, _SAMPLES = 16, 32


class Layer(NamedTuple):
    """A parameter that is a matrix, or the kernels of a convolution, in all of its uses.

    Attributes:
        weight: Which of the parameters.
        bias: Which of the parameters is added wherever the weight is used, and nowhere else; None
            for none.
        uses: The operations with the weight.
        inputs_first: Whether the weight is `(in, out)`, and not `(out, in)`.
    """

    weight: int
    bias: int | None
    uses: Sequence[Use]
    inputs_first: bool


class LayerRows(NamedTuple):
    """Rows whose outer products add up to a layer's gradient, as a matrix `(a, b)`.

    The matrix consists of the first dimension of the weight and of all others together.

    Attributes:
        left: Shape `(rows, a)`: gradients by the results, or inputs where these stand first.
        right: Shape `(rows, b)`, the others; with a bias `b + 1`, and ones at the end.
        samples: The number of samples that the rows are of, equal shares of adjacent rows; None
            where that is not known, as in products of matrices.
    """

    left: Tensor
    right: Tensor
    samples: int | None


class Layers(NamedTuple):
    """The layers of a graph.

    Attributes:
        survey: The graph; None without layers.
        layers: The layers.
    """

    survey: Survey | None
    layers: Sequence[Layer]

    def edges(self) -> list[GradientEdge]:
        """The places of all results of all layers in the graph, in order."""
        survey = self.survey
        if survey is None:
            return []
        return [survey.edge(use) for layer in self.layers for use in layer.uses]

    def rows(self, layer: Layer, gradients: Sequence[Tensor | None]) -> Iterator[LayerRows]:
        """The rows of a layer, in parts.

        Args:
            layer: The layer.
            gradients: For each use the gradient by its result; None for zeros.

        Raises:
            Overwritten: An input of the layer was changed in place.
            Unsupported: A node does not have any more what it had saved.
        """
        assert self.survey is not None
        for use, gradient in zip(layer.uses, gradients, strict=True):
            if gradient is None:
                continue
            node = self.survey.nodes[use.node]
            if type(node).__name__ in _CONVOLUTIONS:
                found = _patches(node, gradient, use.shape)
            else:
                found = iter([_products(node, use, gradient)])
            for inputs, by_results, samples in found:
                x, d = _wide(inputs), _wide(by_results)
                if layer.bias is not None:
                    x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
                yield LayerRows(*((x, d) if layer.inputs_first else (d, x)), samples)


def layers_of(outputs: Sequence[Tensor], params: Sequence[Tensor]) -> Layers:
    """The layers below some outputs.

    A weight counts only if all operations on it are products of matrices, or convolutions in one
    group, each with the whole weight, which stands the same way round in all of them.

    Args:
        outputs: They; none of them a leaf.
        params: Leaves.

    Raises:
        Unsupported: The graph cannot be read.
    """
    survey = surveyed(outputs, params)
    uses: dict[int, list[tuple[Use, bool] | None]] = {}
    if alone := made_alone(survey):  # what is in a penalty is not in layers alone
        for number in alone:
            uses |= {index: [None] for index in params_below(survey, survey.outputs[number])}
        survey = surveyed([z for i, z in enumerate(outputs) if i not in alone], params)
    places = {node: i for i, node in enumerate(survey.nodes)}
    for use in uses_of(survey):
        origin = _origin(survey, places, use)
        if origin is None:
            for index in params_below(survey, use.source):
                uses.setdefault(index, []).append(None)
        else:
            uses.setdefault(origin[0], []).append((use, origin[1]))
    known = {i: [u for u in of if u is not None] for i, of in uses.items() if None not in of}
    weights: dict[int, bool] = {}
    for index, of in known.items():
        found = {_inputs_first(survey, use, swapped, params[index]) for use, swapped in of}
        if len(found) == 1 and (first := found.pop()) is not None:
            weights[index] = first
    biases = _biases(survey, known, weights, params)
    return Layers(
        survey,
        [
            Layer(index, biases.get(index), [use for use, _ in known[index]], first)
            for index, first in weights.items()
        ],
    )


def _origin(survey: Survey, places: Mapping[Any, int], use: Use) -> tuple[int, bool] | None:
    """The parameter that a use takes, and whether transposed; None for more than a parameter."""
    at, swapped = use.source, False
    while at not in survey.params:
        node = survey.nodes[at]
        name = type(node).__name__
        if name in _TRANSPOSING:
            swapped = not swapped
        elif name == "PermuteBackward0" and len(node._saved_dims) == 2:  # as `weight.T` makes it
            swapped = swapped is (node._saved_dims[0] == 0)
        elif name not in _PASSING:
            return None
        at = places[node.next_functions[0][0]]
    return survey.params[at], swapped


def _inputs_first(survey: Survey, use: Use, swapped: bool, param: Tensor) -> bool | None:
    """See `Layer.inputs_first`; None for a use that is no product with a real weight."""
    node = survey.nodes[use.node]
    name = type(node).__name__
    if param.is_complex() or use.slot not in _MATRICES.get(name, ((), None))[0]:
        return None
    if name in _CONVOLUTIONS:
        if swapped or name == "_ConvolutionBackward":
            return None if swapped or node.geometry[3] != 1 else False
        return None if node._saved_transposed or node._saved_groups != 1 else False
    if name == "AddmmBackward0" and (node._saved_alpha != 1 or node._saved_beta != 1):
        return None
    if param.dim() != 2:
        return None
    # In a product `x @ w` the weight stands second, and its first dimension is that of the inputs.
    second = name != "LinearBackward0" and use.slot == _MATRICES[name][0][1]
    return second is not swapped


def _biases(
    survey: Survey,
    known: Mapping[int, Sequence[tuple[Use, bool]]],
    weights: Mapping[int, bool],
    params: Sequence[Tensor],
) -> dict[int, int]:
    """The biases by weights: one that is added to all products with a weight, and to no other."""
    owners: dict[tuple[int, ...], list[int]] = {}
    for index, inputs_first in weights.items():
        # In front of its inputs, a weight has its results below each other, and a vector is added
        # to rows.
        in_front = any(
            use.slot == 1 and type(survey.nodes[use.node]).__name__ == "AddmmBackward0"
            for use, _ in known[index]
        )
        if not inputs_first and not in_front:
            nodes = tuple(use.node for use, _ in known[index])
            owners.setdefault(nodes, []).append(index)
    biases: dict[int, int] = {}
    for index, of in known.items():
        if params[index].dim() != 1:
            continue
        names = [(type(survey.nodes[use.node]).__name__, use.slot) for use, _ in of]
        if any(slot != _MATRICES.get(name, ((), None))[1] for name, slot in names):
            continue
        for weight in owners.get(tuple(use.node for use, _ in of), ()):
            w, b = params[weight], params[index]
            alike = b.shape[0] == w.shape[0] and b.device == w.device
            if alike and _kind(b) == _kind(w):  # they are columns of one matrix
                biases[weight] = index
    return biases


_Found = tuple[Tensor, Tensor, int | None]


def _products(node: Any, use: Use, gradient: Tensor) -> _Found:
    factors = factors_of(node, use.slot, gradient[None], use.shape)
    if factors is None or factors.x is None:
        raise Unsupported(node.name())
    return factors.x[0], factors.delta[0, 0], None


def _patches(node: Any, gradient: Tensor, shape: Sequence[int]) -> Iterator[_Found]:
    """Inputs and gradients at each place of a convolution, as many samples at a time as fit.

    There may be many more places than a small factor needs. Then evenly spaced samples stand for
    those in between, and their gradients are scaled up accordingly.
    """
    found = geometry_of(node)
    assert found is not None
    x, (stride, padding, dilation, groups) = found
    places, width = math.prod(gradient.shape[2:]), math.prod(shape[1:])
    needed = max(_SAMPLES, -(-_ROWS_PER_SIDE * max(shape[0], width) // max(places, 1)))
    step = max(1, len(x) // needed)
    if step > 1:
        count = len(x)
        x, gradient = x[::step], gradient[::step]
        gradient = gradient * (count / len(x)) ** 0.5
    size = max(1, _CHUNK // max(1, places * width))
    for part, d in zip(x.split(size), gradient.split(size), strict=True):
        patches = unfolded(part, (stride, padding, dilation), groups, shape[2:])
        rows = len(part) * places
        by_results = d.flatten(2).transpose(1, 2).reshape(rows, -1)
        yield patches.reshape(rows, width), by_results, len(part)


def _kind(tensor: Tensor) -> torch.dtype:
    """Single precision or better."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _wide(tensor: Tensor) -> Tensor:
    """In single precision or better, without a graph."""
    return tensor.detach().to(_kind(tensor))
