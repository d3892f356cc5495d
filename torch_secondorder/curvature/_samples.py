"""Gradients of the loss by the outputs, sample by sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_secondorder._autograd.graph import Output
from torch_secondorder.curvature._output_space import OutputSpace, Tensors
from torch_secondorder.curvature._random import Noise

_CLASSIFYING = (F.cross_entropy, F.nll_loss)
_OF_LABELS = (*_CLASSIFYING, F.binary_cross_entropy, F.binary_cross_entropy_with_logits)


class Samples:
    """The second moment of the samples' own gradients: the empirical Fisher matrix in output space.

    Samples are the entries of the first dimension of an output; for cross-entropy and `nll_loss`
    all positions that are not ignored. The loss is taken to be the mean of the samples' own,
    unless a standard loss with `reduction="sum"` says otherwise. What multiplies a mean or a
    cross-entropy is a weight of its samples and multiplies the matrix, so that micro-batches add
    up; what multiplies a sum of squares belongs to the samples' losses.

    Args:
        space: The outputs.
        coefficients: What multiplies each standard loss, where that is known.
    """

    def __init__(self, space: OutputSpace, coefficients: Tensors) -> None:
        self._outputs = space.outputs
        self._gradients = [None if g is None else g.detach() for g in space.gradient(space.tensors)]
        # Of samples' losses l with weights w the loss is sum(w l), the gradients are w l', and the
        # matrix is sum(w l' l'').
        self._inverse_weights = [
            _inverse_weight(o, c) for o, c in zip(space.outputs, coefficients, strict=True)
        ]

    def product(self, index: int, tangent: Tensor) -> Tensor | None:
        """The empirical Fisher matrix of one output times `(..., *output.shape)`."""
        gradient = self._gradients[index]
        if gradient is None:
            return None
        dims = _sample_dims(self._outputs[index])
        product = gradient * tangent
        if dims:
            product = product.sum(dims, keepdim=True)
        return gradient * (product * self._inverse_weights[index]).to(gradient.dtype)

    def noise(self, index: int) -> Noise | None:
        """The random signs that `signed_root` takes: one for each sample."""
        gradient = self._gradients[index]
        if gradient is None:
            return None
        dims = _sample_dims(self._outputs[index])
        return Noise.like(gradient.sum(dims, keepdim=True) if dims else gradient)

    def signed_root(self, index: int, signs: Tensor) -> Tensor:
        """A random `q` with `E[q q']` equal to that matrix: each sample with a random sign."""
        gradient = self._gradients[index]
        assert gradient is not None
        scale = torch.as_tensor(self._inverse_weights[index]).abs().sqrt()
        return gradient * (signs * scale).to(gradient.dtype)


def _sample_dims(output: Output) -> tuple[int, ...]:
    """The dimensions of one sample's own entries, counted from the end."""
    dims = output.values.dim()
    if output.loss in _CLASSIFYING:
        return (-1 if dims == 1 else 1 - dims,)
    return tuple(range(1 - dims, 0))


def _inverse_weight(output: Output, coefficient: Tensor | None) -> Tensor | float:
    """One over the weight of a sample's loss in the total, one number or one for each sample."""
    reduction = output.arguments.get("reduction")
    if reduction == "sum":
        weighs = output.loss in _OF_LABELS
        return 1 / coefficient if weighs and coefficient is not None else 1
    if reduction == "mean":
        return _count(output) if coefficient is None else _count(output) / coefficient
    if output.loss in _CLASSIFYING and coefficient is not None:
        (dim,) = _sample_dims(output)
        inverse = torch.where(coefficient == 0, 0.0, 1 / coefficient)
        return inverse.unsqueeze(dim) if inverse.dim() else inverse
    return _count(output)


def _count(output: Output) -> Tensor | int:
    """The number of samples."""
    target = output.arguments.get("target")
    if output.loss in _CLASSIFYING and target is not None and not target.is_floating_point():
        counted: Tensor = target != output.arguments["ignore_index"]
        return counted.sum()
    values = output.values
    count = values.numel()
    for dim in _sample_dims(output):
        count //= values.shape[dim]
    return count
