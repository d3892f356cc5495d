"""Gauss-Newton blocks of linear layers as Kronecker products (K-FAC)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_secondorder.graph import LinearCall

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
    """

    weight: int
    bias: int | None
    inputs: Tensor
    outputs: Tensor
    rows: int = 1


def kronecker_factors(
    calls: Sequence[LinearCall],
    outputs: Sequence[Tensor],
    root: Sequence[Tensor | None],
    largest: float = math.inf,
) -> list[KroneckerFactors]:
    """The factors of Martens and Grosse 2015, "Optimizing neural networks with K-FAC".

    They take the inputs of a layer for independent of the gradients by its outputs, and the
    gradients of different rows for independent of each other. A layer that was called several times
    counts as one with more samples.

    Args:
        calls: The calls met in an evaluation.
        outputs: The model's outputs.
        root: A random vector `q` in output space with `E[q q'] = B`.
        largest: Layers with more inputs or outputs are left out.
    """
    pairs = [(z, q) for z, q in zip(outputs, root, strict=True) if q is not None]
    if not calls or not pairs:
        return []
    tensors, weights = zip(*pairs, strict=True)
    gradients = torch.autograd.grad(
        tensors, [c.output for c in calls], weights, retain_graph=True, allow_unused=True
    )
    layers: dict[int, list[tuple[Tensor, Tensor]]] = {}
    together: set[tuple[int, int | None]] = set()
    for call, gradient in zip(calls, gradients, strict=True):
        if gradient is not None and _width(call, gradient) <= largest:
            layers.setdefault(call.weight, []).append((_rows(call.input), _rows(gradient)))
            together.add((call.weight, call.bias))
    # No parameter is in two blocks: a bias that is not always with one weight is in none.
    uses = Counter(weight for weight, _ in together), Counter(bias for _, bias in together)
    biases = {w: b for w, b in together if uses[0][w] == uses[1][b] == 1}
    found = []
    for weight, met in layers.items():
        bias = biases.get(weight)
        a, d = (torch.cat(rows) for rows in zip(*met, strict=True))
        if bias is not None:
            a = torch.cat([a, a.new_ones(len(a), 1)], dim=1)
        found.append(KroneckerFactors(weight, bias, a.T @ a / len(a), d.T @ d, len(a)))
    return found


def _width(call: LinearCall, gradient: Tensor) -> int:
    return max(call.input.shape[-1], gradient.shape[-1])


def _rows(tensor: Tensor) -> Tensor:
    """All positions as rows, in single precision or better."""
    tensor = tensor.detach().reshape(-1, tensor.shape[-1])
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
