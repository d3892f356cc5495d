"""Gauss-Newton blocks of linear layers as Kronecker products (K-FAC)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_secondorder._autograd.graph import Graph, LinearCall, Overwritten, explained
from torch_secondorder._closure.data_parallel import Ranks
from torch_secondorder._foundation.private_torch import plainly

__all__ = ["KroneckerFactors", "kronecker_factors"]


@dataclass(frozen=True, slots=True)
class KroneckerFactors:
    """The block of a linear layer, `outputs (x) inputs` for the weight as an `(out, in)` matrix.

    Attributes:
        weight: Which of the parameters.
        bias: Which of the parameters; None without one, or for one that is not of this layer alone.
        inputs: The second moment `A` of the layer's inputs, `(in, in)`; with a bias `in + 1`, the
            last input being one.
        outputs: The second moment `S` of the gradients by its outputs, summed over the samples,
            `(out, out)`.
        rows: How many inputs the second moment `A` is the mean of.

    >>> factors = KroneckerFactors(0, None, inputs=torch.eye(3), outputs=2 * torch.eye(2))
    >>> torch.kron(factors.outputs, factors.inputs).shape  # the block of a weight of 2 x 3
    torch.Size([6, 6])
    """

    weight: int
    bias: int | None
    inputs: Tensor
    outputs: Tensor
    rows: int = 1


def kronecker_factors(
    graph: Graph,
    outputs: Sequence[Tensor],
    root: Sequence[Tensor | None],
    largest: float = math.inf,
    ranks: Ranks | None = None,
) -> list[KroneckerFactors]:
    """The factors of Martens and Grosse 2015, "Optimizing neural networks with K-FAC".

    They take the inputs of a layer for independent of the gradients by its outputs, and the
    gradients of different rows for independent of each other. A layer that was called several times
    counts as one with more samples.

    Args:
        graph: Of an evaluation.
        outputs: The model's outputs.
        root: A random vector `q` in output space with `E[q q'] = B`.
        largest: Layers with more inputs or outputs are left out.
        ranks: Those that the loss is the mean over; a layer counts that any of them has called.
    """
    met = _met(graph.linear_calls(), outputs, root, largest)
    together, rows = _on_all_ranks(met, ranks or Ranks(), graph.params[0].device)
    # No parameter is in two blocks: a bias that is not always with one weight is in none.
    uses = Counter(weight for weight, _ in together), Counter(bias for _, bias in together)
    biases = {w: b for w, b in together if uses[0][w] == uses[1][b] == 1}
    return [
        _factors(
            graph.params[weight], weight, biases.get(weight), met.get(weight, []), counts, ranks
        )
        for weight, counts in rows.items()
    ]


_Rows = list[tuple[int | None, Tensor, Tensor]]


def _met(
    calls: Sequence[LinearCall],
    outputs: Sequence[Tensor],
    root: Sequence[Tensor | None],
    largest: float,
) -> dict[int, _Rows]:
    """For each weight the calls with it: the bias, the inputs, the gradients by the outputs."""
    pairs = [(z, q) for z, q in zip(outputs, root, strict=True) if q is not None]
    layers: dict[int, _Rows] = {}
    if not calls or not pairs:
        return layers
    tensors, weights = zip(*pairs, strict=True)
    try:
        with plainly():
            gradients = torch.autograd.grad(
                tensors, [c.output for c in calls], weights, retain_graph=True, allow_unused=True
            )
    except RuntimeError as error:
        raise explained(error) from error
    for call, gradient in zip(calls, gradients, strict=True):
        if gradient is not None and _width(call, gradient) <= largest:
            if not call.intact:
                raise Overwritten("the input of a linear layer was changed in place since")
            rows = call.bias, _rows(call.input), _rows(gradient)
            layers.setdefault(call.weight, []).append(rows)
    return layers


def _on_all_ranks(
    met: dict[int, _Rows], ranks: Ranks, device: torch.device
) -> tuple[set[tuple[int, int | None]], dict[int, list[int]]]:
    """Pairs of weight and bias, and for each weight the number of rows on each rank."""
    own = [
        (weight, -1 if bias is None else bias, len(a))
        for weight, calls in met.items()
        for bias, a, _ in calls
    ]
    flat = [number for call in own for number in call]
    found = ranks.gather(flat, device)
    together: set[tuple[int, int | None]] = set()
    rows: dict[int, list[int]] = {}
    for rank, numbers in enumerate(found):
        for weight, bias, count in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True):
            together.add((weight, None if bias < 0 else bias))
            rows.setdefault(weight, [0] * len(found))[rank] += count
    return together, rows


def _factors(
    param: Tensor,
    weight: int,
    bias: int | None,
    met: _Rows,
    counts: Sequence[int],
    ranks: Ranks | None,
) -> KroneckerFactors:
    """The factors of one layer, from what this rank has of it and the others'."""
    if met:
        _, inputs, gradients = zip(*met, strict=True)
        a, d = torch.cat(inputs), torch.cat(gradients)
    else:
        a, d = _rows(param)[:0], _rows(param.T)[:0]
    if bias is not None:
        a = torch.cat([a, a.new_ones(len(a), 1)], dim=1)
    A, S = a.T @ a / sum(counts), d.T @ d
    if ranks is not None and ranks.count > 1:
        A, S = ranks.average_(A).mul_(ranks.count), ranks.average_(S)
    return KroneckerFactors(weight, bias, A, S, sum(counts))


def _width(call: LinearCall, gradient: Tensor) -> int:
    return max(call.input.shape[-1], gradient.shape[-1])


def _rows(tensor: Tensor) -> Tensor:
    """All positions as rows, in single precision or better."""
    tensor = tensor.detach().reshape(-1, tensor.shape[-1])
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
