"""Facts about one point: loss, gradient, and what curvature is made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

from torch import Tensor

from torch_secondorder._autograd.graph import Graph, Multiply
from torch_secondorder._closure.data_parallel import Ranks
from torch_secondorder._closure.runner import Run
from torch_secondorder._params.vector import ParameterVector

__all__ = ["Evaluation", "Linearization", "Slot"]


class Evaluation:
    """Loss, gradient and, on request, the retained graph at one point.

    The operators of `torch_secondorder.curvature` are made from an evaluation with curvature. You
    get one from a `ClosureObjective`, or from a `FunctionalObjective` if your loss is a pure
    function. It is valid until the parameters move.

    Args:
        flatten: Computes `grad`, when it is first read.

    Attributes:
        loss: The loss that is minimized, regularization included: 0-dim, detached, in work
            precision.
        closure_loss: The loss as the closure returned it (averaged over ranks), detached.
        linearization: The retained graph, present only where curvature was asked for.

    >>> import torch
    >>> from torch_secondorder import ClosureObjective
    >>> from torch_secondorder.curvature import GaussNewton
    >>> model, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0]])
    >>> def closure():
    ...     return torch.nn.functional.mse_loss(model(x), torch.zeros(1, 1))
    >>> evaluation = ClosureObjective(closure, model.parameters()).evaluate(curvature=True)
    >>> GaussNewton(evaluation) @ torch.tensor([1.0, 0.0])
    tensor([2., 4.])
    """

    def __init__(
        self,
        loss: Tensor,
        closure_loss: Tensor,
        flatten: Callable[[], Tensor],
        linearization: Linearization | None = None,
    ) -> None:
        self.loss = loss
        self.closure_loss = closure_loss
        self.linearization = linearization
        self._flatten: Callable[[], Tensor] | None = flatten

    @cached_property
    def grad(self) -> Tensor:
        """The gradient in the work space, shape `(n,)`.

        It is flattened when you first read it, at the latest before the next evaluation: an
        optimizer that works on `p.grad` does not pay for it.
        """
        flatten, self._flatten = self._flatten, None
        assert flatten is not None
        return flatten()


class Slot(NamedTuple):
    """A parameter's place in the work vector, from `start` to `stop`.

    Attributes:
        start: Its first entry.
        stop: The entry after its last one.
        scale: What its part of the work vector is multiplied by.
        decay: What weight decay adds to the diagonal of the curvature there.
    """

    start: int
    stop: int
    scale: float
    decay: float


class Owner(Protocol):
    """The objective that made a linearization.

    Attributes:
        vector: Maps the parameters to the work vector.
        generation: The number of moves so far.
        ranks: The ranks that the loss is averaged over.
    """

    vector: ParameterVector
    generation: int
    ranks: Ranks

    def settle(self, place: Tensor | None = None) -> None:  # pragma: no cover - a protocol
        """Puts the parameters back to where the graph was made."""

    def product(self, direction: Tensor, products: Sequence[Tensor | None]) -> Tensor:
        """Turns a product with the loss's curvature into one with the objective's."""
        ...  # pragma: no cover - a protocol

    def diagonal(self, roots: Sequence[Tensor | None], count: int) -> Tensor:
        """See `Linearization.diagonal`."""
        ...  # pragma: no cover - a protocol

    def slots(self) -> list[Slot]:
        """See `Linearization.slots`."""
        ...  # pragma: no cover - a protocol

    def evaluated_again(self) -> Run | None:
        """The same evaluation with a graph of copies; None where there can be none."""
        ...  # pragma: no cover - a protocol


class Linearization:
    """The second-order information at one evaluated point, valid until the parameters move on.

    It hides everything that lies between the work vector and the graph from operators: scale, sign,
    weight decay, the average over ranks.

    Args:
        objective: The objective that stands at the point.
        graph: The retained graph of the loss.
        copies: Whether the graph has saved copies.
        place: The position that the graph belongs to, if the closure has moved parameters.

    Attributes:
        graph: The retained graph.
        ranks: The ranks that the loss is averaged over.
        size: `n`.
    """

    def __init__(
        self,
        objective: Owner,
        graph: Graph,
        *,
        copies: bool = False,
        place: Tensor | None = None,
    ) -> None:
        self.graph = graph
        self.ranks = objective.ranks
        self.size = objective.vector.size
        self._copies, self._place = copies, place
        self._objective = objective
        self._generation = objective.generation

    def suspend(self) -> None:
        """Marks this as of a point where the objective does not stand yet."""
        self._generation = -1

    def resume(self) -> None:
        """Marks this as of the point where the objective stands now."""
        self._generation = self._objective.generation

    def hessian_product(self, v: Tensor) -> Tensor:
        """The Hessian of the objective times `v`.

        Args:
            v: Shape `(n,)`, or `(k, n)` for `k` products in one vectorized pass.

        Raises:
            RuntimeError: The parameters have moved since the evaluation, or an operation of the
                model has no second derivative.
        """
        return self.product(v, self.graph.hessian_product)

    def product(self, v: Tensor, multiply: Multiply) -> Tensor:
        """The product of a curvature of the objective with `v`, from one of the loss.

        Args:
            v: Shape `(n,)`, or `(k, n)` for `k` products in one vectorized pass.
            multiply: Takes tensors shaped like the parameters and whether they are batched, and
                returns the product, None for zeros.

        Raises:
            RuntimeError: The parameters have moved since the evaluation.
        """
        objective = self._objective
        if objective.generation != self._generation:
            self.check()
        objective.settle(self._place)
        vector = objective.vector
        direction = v if vector.scale is None else v * vector.scale
        products = multiply(vector.split(direction), v.dim() == 2)
        return objective.product(direction, products)

    def diagonal(self, roots: Sequence[Tensor | None], count: int) -> Tensor:
        """The diagonal of a curvature of the loss, from random roots of it.

        Args:
            roots: `k` samples `q` with `E[q q']` equal to the curvature, in parts `(k, ...)` shaped
                like the parameters; None for zeros. The roots of other ranks are independent.
            count: `k`.

        Returns:
            The mean of `q * q` with the diagonal of the regularization, `(n,)`, not negative.
        """
        self.check()
        return self._objective.diagonal(roots, count)

    def slots(self) -> list[Slot]:
        """The place of each parameter in the work vector."""
        return self._objective.slots()

    def check(self) -> None:
        """Makes the graph usable: puts the parameters back to where it was made.

        Raises:
            RuntimeError: The parameters have moved since the evaluation.
        """
        if self._objective.generation != self._generation:
            raise RuntimeError(
                "this evaluation belongs to an earlier point: the parameters have moved since, "
                "evaluate(curvature=True) again"
            )
        self._objective.settle(self._place)

    def renew(self) -> bool:
        """Makes the graph again, of copies that nobody writes; says whether it is another one.

        It is for graphs whose products raise `Overwritten`.
        """
        self.check()
        again = None if self._copies else self._objective.evaluated_again()
        if again is None or again.graph is None:
            return False
        self.graph, self._copies, self._place = again.graph, again.copies, again.place
        return True
