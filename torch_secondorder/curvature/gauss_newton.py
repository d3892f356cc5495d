"""The generalized Gauss-Newton matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from copy import copy
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from torch_secondorder._autograd.graph import Graph, Multiply, Overwritten, added
from torch_secondorder._closure.data_parallel import Ranks
from torch_secondorder._foundation.checks import check_choice
from torch_secondorder._objective.base import Evaluation, Slot
from torch_secondorder.curvature._likelihoods import Likelihood
from torch_secondorder.curvature._output_space import LossCurvature, OutputSpace, Tensors
from torch_secondorder.curvature._random import Draws
from torch_secondorder.curvature._samples import Samples
from torch_secondorder.curvature.base import Linearized
from torch_secondorder.curvature.kronecker import KroneckerFactors, kronecker_factors

#: The treatment of loss terms that do not depend on the outputs.
Remainder: TypeAlias = Literal["hessian", "ignore"]

__all__ = ["GaussNewton"]


class GaussNewton(Linearized):
    """The generalized Gauss-Newton matrix `J'B J` at an evaluated point.

    `J` is the Jacobian of the model's outputs by the parameters, `B` the Hessian of the loss by the
    outputs (Schraudolph 2002, "Fast curvature matrix-vector products for second-order gradient
    descent"). It is positive semidefinite where the loss is convex in the outputs. A product is a
    retained double-vjp for `J v`, the product with `B` at each output, and a backward pass for
    `J'u`: about one gradient, and nothing of the forward pass is repeated.

    The outputs are what standard losses took as arguments, or what `mark_outputs` was called on.
    `B` is in closed form for cross-entropy, binary cross-entropy, squared error and a few others,
    without a matrix for a sample; else by differentiating the loss.

    Where a part of the loss does not pass through the outputs, such as a penalty on the weights
    written into it, that part's own Hessian is added. Regularization of the optimizer is included.

    Args:
        evaluation: Made by `Objective.evaluate(curvature=True)`, or with `curvature="jacobian"`.
        remainder: `"hessian"` to add the Hessian of what bypasses the outputs, `"ignore"` to leave
            it out.

    Attributes:
        bypassed: Whether a part of the loss bypasses the outputs; not there where the evaluation
            was compiled.

    Raises:
        UnknownOutputs: No output was found, a RuntimeError.
        ValueError: The evaluation was made without curvature, `remainder` is unknown, or an output
            is complex.

    >>> from torch_secondorder import FunctionalObjective
    >>> x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0]])
    >>> def loss(w):
    ...     return torch.nn.functional.mse_loss(x @ w, y, reduction="sum")
    >>> evaluation = FunctionalObjective(loss, torch.ones(2, 1)).evaluate(curvature=True)
    >>> GaussNewton(evaluation) @ torch.eye(2)
    tensor([[2., 4.],
            [4., 8.]])
    """

    _twice = False

    def __init__(self, evaluation: Evaluation, *, remainder: Remainder = "hessian") -> None:
        check_choice("remainder", remainder, Remainder)
        super().__init__(evaluation)
        self._adds_remainder = remainder == "hessian"
        self._whole: Multiply | None = None
        graph = self._linearization.graph
        self._whole = graph.compiled((type(self), remainder), self._built_on)
        if self._whole is None:
            try:
                self._attach(graph)
            except Overwritten:
                if not self._renewed():
                    raise

    @property
    def semidefinite(self) -> bool:
        """True if it is known to be positive semidefinite, for any parameters."""
        return self._whole is None and not self.bypassed and not self._curvature.unknown

    def vanishes(self, linear: Collection[Callable[..., Any]]) -> bool:
        """True if it is zero: the loss consists of standard losses that are linear in the outputs.

        Args:
            linear: These losses.
        """
        if self._whole is not None or self.bypassed:
            return False
        return all(output.loss in linear for output in self._space.outputs)

    def _attach(self, graph: Graph) -> None:
        self.__dict__.pop("_samples", None)  # those of another graph
        self._linearization.check_transposable()
        self._space = OutputSpace(graph)
        self._curvature = LossCurvature(self._space)
        self.bypassed = self._curvature.bypassed
        adds = self.bypassed and self._adds_remainder
        self._remainder = self._space.remainder() if adds else None

    def _built_on(self, graph: Graph) -> Multiply:
        """The same product, made from another graph of the same evaluation."""
        twin = copy(self)
        twin._whole = None
        twin._attach(graph)
        return twin._multiply

    @cached_property
    def _samples(self) -> Samples:
        return Samples(self._space, self._curvature.coefficients)

    def diagonal(self, n_samples: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """An unbiased estimate of the diagonal of `J'B J`, without the remainder.

        One backward pass gives `n_samples` random vectors `J'q` with `E[q q'] = B` (Bartlett's
        second identity, with labels drawn from the model); the mean of their squares is the
        estimate. Where `B` is not in closed form, `q` is the gradient of the loss by the outputs,
        with a random sign for each sample, which makes it the diagonal of the empirical Fisher
        matrix (the preconditioner of Martens 2010).

        Args:
            n_samples: Random vectors.
            generator: Where they come from.

        Returns:
            Shape `(n,)`, not negative, regularization included.
        """
        self._linearization.check()
        self._require_outputs()
        roots = self._retried(lambda: self._random_roots(n_samples, generator))
        pulled = self._retried(lambda: self._space.pull_each(roots))
        return self._linearization.diagonal(pulled, n_samples)

    def factors(
        self, generator: torch.Generator | None = None, largest: float = math.inf
    ) -> list[KroneckerFactors]:
        """Kronecker factors of the blocks of linear layers, from one backward pass.

        Args:
            generator: Where the random vector comes from, see `diagonal`.
            largest: Layers with more inputs or outputs are left out.

        Returns:
            One for each weight that `torch.nn.functional.linear` was called with.
        """
        linearization = self._linearization
        linearization.check()
        self._require_outputs()
        (root,) = self._retried(lambda: self._random_roots(1, generator))
        return self._retried(
            lambda: kronecker_factors(
                linearization.graph, self._space.tensors, root, largest, linearization.ranks
            )
        )

    def slots(self) -> list[Slot]:
        """The place of each parameter in the vectors multiplied."""
        return self._linearization.slots()

    def _require_outputs(self) -> None:
        _ = self._linearization.graph.outputs  # a compiled evaluation says that it has none

    def _random_roots(self, count: int, generator: torch.Generator | None) -> list[Tensors]:
        likelihoods, ranks = self._curvature.likelihoods, self._linearization.ranks
        return random_roots(
            self._space, likelihoods, lambda: self._samples, count, generator, ranks
        )

    def _multiply(self, tangents: Sequence[Tensor], batched: bool) -> Tensors:
        if self._whole is not None:
            return self._whole(tangents, batched)
        products = self._space.sandwiched(self._at_outputs, tangents, batched)
        if self._remainder is None:
            return products
        others = self._space.remainder_product(self._remainder, tangents, batched)
        return list(map(added, products, others))

    def _at_outputs(self, changes: Tensors, batched: bool) -> Tensors:
        """The product with `B`."""
        return self._curvature.product(changes, batched)


def random_roots(
    space: OutputSpace,
    likelihoods: Sequence[Likelihood | None],
    samples: Callable[[], Samples],
    count: int,
    generator: torch.Generator | None,
    ranks: Ranks | None = None,
) -> list[Tensors]:
    """Several random `q` in output space with `E[q q'] = B`, see `GaussNewton.diagonal`.

    Args:
        space: The outputs.
        likelihoods: Theirs; for None the samples' gradients are taken with random signs.
        samples: Gives these gradients.
        count: How many.
        generator: Where randomness comes from.
        ranks: Who draws: all draw for all samples, see `Draws`.
    """
    draws = Draws(
        [
            samples().noise(i) if likelihood is None else likelihood.noise()
            for i, likelihood in enumerate(likelihoods)
        ],
        generator,
        ranks,
    )

    def root(place: int, drawn: Tensor | None) -> Tensor | None:
        likelihood = likelihoods[place]
        if drawn is None:
            return None
        if likelihood is None:
            return samples().signed_root(place, drawn)
        return likelihood.root(drawn).to(space.values[place].dtype)

    return [[root(i, drawn) for i, drawn in enumerate(draws())] for _ in range(count)]
