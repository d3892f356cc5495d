"""Standard losses as negative log-likelihoods: their curvature by the outputs in closed form.

For each the Fisher information of the output. Where the loss takes logits or predictions it equals
the Hessian of the loss. Where it takes probabilities or their logarithms the Hessian would depend
on how the model came by them (it is zero for `nll_loss`); the information does not, and gives the
same products as the same model written with logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_secondorder._autograd.graph import Output
from torch_secondorder.curvature._random import Noise


class _Labels(NamedTuple):
    """The way in which labels are drawn from the model.

    Attributes:
        noise: The random numbers that they are made from.
        score: From these the gradient of the loss by the output, for unit information.
    """

    noise: Noise
    score: Callable[[Tensor], Tensor]


class Independent:
    """Outputs whose entries are independent given the model: a diagonal.

    Args:
        information: The second derivative of the total loss by each entry, shaped like the output.
        labels: How labels are drawn; None for random signs in their place.

    Attributes:
        information: The same.
    """

    def __init__(self, information: Tensor, labels: _Labels | None = None) -> None:
        self.information = information
        self._labels = labels

    def product(self, tangent: Tensor) -> Tensor:
        """The curvature times `(..., *output.shape)`."""
        return self.information * tangent

    def noise(self, *, labels: bool = False) -> Noise:
        """The random numbers that `root` is made from."""
        if labels and self._labels is not None:
            return self._labels.noise
        return Noise.like(self.information)

    def root(self, drawn: Tensor, *, labels: bool = False) -> Tensor:
        """A random tensor `q`, shaped like the output, with `E[q q']` equal to the curvature.

        Args:
            drawn: Of the kind that `noise` says.
            labels: Whether `q` is the gradient of the loss for a label drawn from the model; else
                one of less variance, where there is one.

        A negative curvature, that of a loss to be maximized, counts by its magnitude.
        """
        if labels and self._labels is not None:
            drawn = self._labels.score(drawn)
        return self.information.abs().sqrt() * drawn

    def product_by_root(self, root: Tensor, tangent: Tensor) -> Tensor:
        """The curvature estimated from one root, times `(..., *output.shape)`."""
        return torch.copysign(root.square(), self.information) * tangent


class Categorical:
    """Logits of a softmax: `w (diag(p) - p p')` at each position.

    Args:
        logits: The output.
        weight: The weight `w` of each position in the total loss, of the logits' shape but with one
            entry for the classes.
        dim: The dimension of the classes, counted from the end.

    Attributes:
        weight: The same.
    """

    def __init__(self, logits: Tensor, weight: Tensor, dim: int) -> None:
        self._dim = dim
        self.weight = weight
        self._p = torch.softmax(logits, dim)
        self._weighted = self._p * weight

    def product(self, tangent: Tensor) -> Tensor:
        """See `Independent.product`."""
        scaled = self._weighted * tangent
        return scaled.sub_(self._p * scaled.sum(self._dim, keepdim=True))

    def noise(self, *, labels: bool = True) -> Noise:
        """See `Independent.noise`; always for labels."""
        return _noise_of_class(self._p, self._dim)

    def root(self, drawn: Tensor, *, labels: bool = True) -> Tensor:
        """See `Independent.root`; always from labels."""
        label = _class(self._p, self._dim, drawn)
        root = self._p.scatter_add(self._dim, label, -torch.ones_like(label, dtype=self._p.dtype))
        return self.weight.abs().sqrt() * root

    def product_by_root(self, root: Tensor, tangent: Tensor) -> Tensor:
        """See `Independent.product_by_root`."""
        return self.weight.sign() * root * (root * tangent).sum(self._dim, keepdim=True)


Likelihood = Independent | Categorical


def likelihood_of(output: Output, coefficient: Tensor) -> Likelihood | None:
    """The likelihood behind a standard loss; None where there is no closed form.

    Args:
        output: Found at a standard loss.
        coefficient: The derivative of the total loss by what the standard loss returned, of that
            shape.
    """
    arguments = output.arguments
    make = _KNOWN.get((output.loss, output.argument))
    # The two older ways of choosing a reduction are left to automatic differentiation.
    older = arguments.get("size_average") is not None or arguments.get("reduce") is not None
    if make is None or older:
        return None
    z = output.values
    if z.dtype in (torch.float16, torch.bfloat16):
        z = z.float()
    return make(z, arguments, coefficient.detach().to(z.dtype))


def _squared_error(z: Tensor, arguments: dict[str, Any], c: Tensor) -> Likelihood | None:
    if z.shape != arguments["target"].shape or arguments.get("weight") is not None:
        return None
    return _gaussian(2 * elementwise(z, arguments, c))


def _gaussian(information: Tensor) -> Independent:
    return Independent(information, _Labels(Noise.like(information, "normal"), lambda drawn: drawn))


def _gaussian_mean(z: Tensor, arguments: dict[str, Any], c: Tensor) -> Likelihood | None:
    var = arguments["var"]
    if z.shape != arguments["target"].shape or not isinstance(var, Tensor) or var.shape != z.shape:
        return None
    var = var.detach().to(z.dtype).clamp(min=arguments["eps"])
    return _gaussian(elementwise(z, arguments, c) / var)


def _gaussian_variance(z: Tensor, arguments: dict[str, Any], c: Tensor) -> Likelihood | None:
    if z.shape != arguments["input"].shape or z.shape != arguments["target"].shape:
        return None
    information = elementwise(z, arguments, c) / (2 * z.clamp(min=arguments["eps"]).square())
    return Independent(information)


def _bernoulli_logits(z: Tensor, arguments: dict[str, Any], c: Tensor) -> Likelihood:
    p, target = torch.sigmoid(z), arguments["target"].detach().to(z.dtype)
    factor = elementwise(z, arguments, c)
    if arguments["weight"] is not None:
        factor = factor * arguments["weight"]
    if arguments["pos_weight"] is not None:
        factor = factor * (1 + (arguments["pos_weight"] - 1) * target)
    return Independent(factor * p * (1 - p), _bernoulli_labels(p))


def _bernoulli(z: Tensor, arguments: dict[str, Any], c: Tensor) -> Likelihood:
    factor = elementwise(z, arguments, c)
    if arguments["weight"] is not None:
        factor = factor * arguments["weight"]
    # At certainty the information is infinite, and what it multiplies zero.
    variance = (z * (1 - z)).clamp(min=torch.finfo(z.dtype).eps)
    return Independent(factor / variance, _bernoulli_labels(z))


def _bernoulli_labels(p: Tensor) -> _Labels:
    """Labels drawn with probabilities `p`, and their standardized score."""

    def score(drawn: Tensor) -> Tensor:
        spread = (p * (1 - p)).clamp(min=torch.finfo(p.dtype).eps).sqrt()
        return (p - (drawn < p).to(p.dtype)) / spread

    return _Labels(Noise.like(p, "uniform"), score)


def _cross_entropy(z: Tensor, arguments: dict[str, Any], c: Tensor) -> Likelihood:
    dim = -1 if z.dim() == 1 else 1 - z.dim()
    weight = _target_weights(z, arguments, dim)
    if arguments["reduction"] == "mean":
        weight = weight / _mean_divisor(weight, arguments, dim)
    return Categorical(z, weight * _at_positions(c, dim), dim)


def _target_weights(z: Tensor, arguments: dict[str, Any], dim: int) -> Tensor:
    """The factor of the log-partition function at each position."""
    target: Tensor = arguments["target"].detach()
    smoothing: float = arguments["label_smoothing"]
    classes = z.shape[dim]
    weight = arguments["weight"]
    per_class = torch.ones(classes, dtype=z.dtype, device=z.device) if weight is None else weight
    per_class = per_class.detach().to(z.dtype)
    if target.is_floating_point():
        target = target.to(z.dtype) * (1 - smoothing) + smoothing / classes
        shape = [classes] + [1] * (-dim - 1)
        return (target * per_class.view(shape)).sum(dim, keepdim=True)
    target = target.long().unsqueeze(dim)
    counted: Tensor = target != arguments["ignore_index"]
    chosen = per_class[torch.where(counted, target, 0)]
    total = (1 - smoothing) * chosen + smoothing * per_class.mean()
    return total * counted


def _mean_divisor(weight: Tensor, arguments: dict[str, Any], dim: int) -> Tensor | int:
    """The divisor of `reduction="mean"`."""
    target: Tensor = arguments["target"]
    per_class: Tensor | None = arguments["weight"]
    if target.is_floating_point():
        return weight.numel()
    target = target.long()
    counted: Tensor = target != arguments["ignore_index"]
    if per_class is None:
        return counted.sum()
    chosen = per_class.detach()[torch.where(counted, target, 0)] * counted
    return chosen.sum().to(weight.dtype)


def _log_probabilities(z: Tensor, arguments: dict[str, Any], c: Tensor) -> Likelihood:
    dim = -1 if z.dim() == 1 else 1 - z.dim()
    weight = _target_weights(z, {**arguments, "label_smoothing": 0.0}, dim)
    if arguments["reduction"] == "mean":
        weight = weight / _mean_divisor(weight, arguments, dim)
    p = z.exp()

    def score(drawn: Tensor) -> Tensor:
        label = _class(p, dim, drawn)
        # What was not drawn is zero even where its probability is.
        return torch.zeros_like(p).scatter_(dim, label, p.gather(dim, label).rsqrt())

    return Independent(weight * _at_positions(c, dim) * p, _Labels(_noise_of_class(p, dim), score))


def _log_probabilities_of_kl(z: Tensor, arguments: dict[str, Any], c: Tensor) -> Likelihood | None:
    # Targets add up to one along the classes, whichever dimension that is.
    if z.shape != arguments["target"].shape:
        return None
    if arguments["reduction"] == "batchmean":
        c = c / (len(z) if z.dim() else 1)
    return Independent(elementwise(z, arguments, c) * z.exp())


def elementwise(z: Tensor, arguments: dict[str, Any], c: Tensor) -> Tensor:
    """The derivative of the total loss by each entry's own loss."""
    factor = c / z.numel() if arguments["reduction"] == "mean" else c
    return factor.expand(z.shape)


def _at_positions(c: Tensor, dim: int) -> Tensor:
    """The coefficient with a dimension for the classes; a number as it is."""
    return c.unsqueeze(dim) if c.dim() else c


def _noise_of_class(p: Tensor, dim: int) -> Noise:
    """A number for each position."""
    return Noise.like(p.movedim(dim, -1)[..., :1], "uniform")


def _class(p: Tensor, dim: int, drawn: Tensor) -> Tensor:
    """Class indices with probabilities `p` from uniform numbers, one entry along `dim`."""
    last = p.movedim(dim, -1)
    cumulated = last.cumsum(-1)
    # Not `multinomial`: it takes several times as long, and at most 2**24 classes.
    chosen = torch.searchsorted(cumulated, drawn * cumulated[..., -1:], right=True)
    return chosen.clamp_(max=last.shape[-1] - 1).movedim(-1, dim)


_Make = Callable[[Tensor, dict[str, Any], Tensor], Likelihood | None]
_KNOWN: dict[tuple[Any, str], _Make] = {
    (F.mse_loss, "input"): _squared_error,
    (F.mse_loss, "target"): _squared_error,
    (F.cross_entropy, "input"): _cross_entropy,
    (F.nll_loss, "input"): _log_probabilities,
    (F.kl_div, "input"): _log_probabilities_of_kl,
    (F.binary_cross_entropy, "input"): _bernoulli,
    (F.binary_cross_entropy_with_logits, "input"): _bernoulli_logits,
    (F.gaussian_nll_loss, "input"): _gaussian_mean,
    (F.gaussian_nll_loss, "var"): _gaussian_variance,
}
