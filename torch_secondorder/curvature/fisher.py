"""The Fisher information, estimated from labels."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_choice, check_integer
from torch_secondorder._objective.base import Evaluation
from torch_secondorder.curvature._output_space import Tensors
from torch_secondorder.curvature._random import Draws
from torch_secondorder.curvature.gauss_newton import GaussNewton, Remainder, random_roots

__all__ = ["Fisher"]

#: Where the labels come from.
Labels: TypeAlias = Literal["sampled", "empirical"]


class Fisher(GaussNewton):
    """The Fisher information matrix at an evaluated point, estimated from labels.

    With labels drawn from the model it is an unbiased estimate of the Fisher matrix, which for
    cross-entropy and squared error is the Gauss-Newton matrix itself: what `GaussNewton` gives
    without the noise. With the data's own labels it is the empirical Fisher matrix, the second
    moment of the samples' gradients, which is another matrix and no approximation of the Hessian
    far from a good fit (Kunstner, Balles and Hennig 2019, "Limitations of the empirical Fisher
    approximation for natural gradient descent").

    Labels are drawn once, so that all products are with one matrix. Samples, and what of the loss
    bypasses the outputs, are as in `GaussNewton`.

    Args:
        evaluation: Made by `Objective.evaluate(curvature=True)`, or with `curvature="jacobian"`.
        labels: `"sampled"` or `"empirical"`.
        n_samples: Labels drawn for each sample.
        generator: Where labels come from; torch's own by default.
        remainder: See `GaussNewton`.

    Raises:
        RuntimeError: No output was found, or labels cannot be drawn for one.
        ValueError: An argument is out of range, or the evaluation was made without curvature.

    >>> from torch_secondorder import FunctionalObjective
    >>> x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0]])
    >>> def loss(w):
    ...     return 0.5 * torch.nn.functional.mse_loss(x @ w, y, reduction="sum")
    >>> evaluation = FunctionalObjective(loss, torch.ones(2, 1)).evaluate(curvature=True)
    >>> Fisher(evaluation, labels="empirical") @ torch.eye(2)  # the residual is 3
    tensor([[ 9., 18.],
            [18., 36.]])
    """

    def __init__(
        self,
        evaluation: Evaluation,
        *,
        labels: Labels = "sampled",
        n_samples: int = 1,
        generator: torch.Generator | None = None,
        remainder: Remainder = "hessian",
    ) -> None:
        check_choice("labels", labels, Labels)
        check_integer("n_samples", n_samples)
        super().__init__(evaluation, remainder=remainder)
        if labels == "sampled":
            self._require_outputs()
        self._roots = None if labels == "empirical" else self._draw(n_samples, generator)

    def _draw(self, n_samples: int, generator: torch.Generator | None) -> list[list[Tensor]]:
        """For each output, `n_samples` gradients for drawn labels."""
        likelihoods = []
        for output, likelihood in zip(
            self._space.outputs, self._curvature.likelihoods, strict=True
        ):
            if likelihood is None:
                name = "a marked output"
                if output.loss is not None:
                    name = f"that of {output.loss.__name__}"
                raise RuntimeError(
                    f"no labels can be drawn for {name}: sampled labels need one of the standard "
                    "likelihoods (cross_entropy, nll_loss, binary_cross_entropy, mse_loss, "
                    "gaussian_nll_loss) alone on its output; use curvature='ggn', or empirical "
                    "labels"
                )
            likelihoods.append(likelihood)
        needed = [likelihood.noise(labels=True) for likelihood in likelihoods]
        draws = Draws(needed, generator, self._linearization.ranks)
        sets = [
            [
                likelihood.root(drawn, labels=True)
                for likelihood, drawn in zip(likelihoods, draws(), strict=True)
                if drawn is not None
            ]
            for _ in range(n_samples)
        ]
        return [list(roots) for roots in zip(*sets, strict=True)]

    def _random_roots(self, count: int, generator: torch.Generator | None) -> list[Tensors]:
        if self._roots is not None:
            return super()._random_roots(count, generator)
        likelihoods = [None] * len(self._space.outputs)
        ranks = self._linearization.ranks
        return random_roots(
            self._space, likelihoods, lambda: self._samples, count, generator, ranks
        )

    def _at_outputs(self, changes: Tensors, batched: bool) -> Tensors:
        products: list[Tensor | None] = [None] * len(changes)
        if self._roots is None:
            for i, change in enumerate(changes):
                products[i] = None if change is None else self._samples.product(i, change)
            return products
        known = self._curvature.likelihoods
        for i, (likelihood, change) in enumerate(zip(known, changes, strict=True)):
            if likelihood is None or change is None:
                continue
            terms = [likelihood.product_by_root(root, change) for root in self._roots[i]]
            products[i] = (sum(terms[1:], terms[0]) / len(terms)).to(change.dtype)
        return products
