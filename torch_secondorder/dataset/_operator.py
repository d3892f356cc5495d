"""The curvature of a data set: a sum over batches, which are evaluated again for each product."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from torch_secondorder._autograd.graph import Graph, Overwritten
from torch_secondorder._closure.runner import without_autocast
from torch_secondorder._objective.base import (
    Curvature,
    Evaluation,
    Linearization,
    Objective,
    Slot,
)
from torch_secondorder.curvature import FromOutputs, KroneckerFactors, LinearOperator
from torch_secondorder.dataset._objective import DatasetObjective

#: Makes the curvature operator of an evaluation; random numbers come from the generator.
Kind: TypeAlias = Callable[[Evaluation, torch.Generator | None], LinearOperator]

_T = TypeVar("_T")

_PRODUCT = "product with the curvature"


def curvature_at(
    objective: Objective,
    evaluation: Evaluation,
    kind: Kind,
    generator: torch.Generator | None = None,
) -> LinearOperator:
    """The curvature operator at an objective's current position.

    Args:
        objective: An objective of any kind; one over a data set gives a `BatchSum`.
        evaluation: The evaluation there, made by `evaluate(curvature=True)`.
        kind: Makes the operator of an evaluation.
        generator: Source of random numbers for `kind`.
    """
    if isinstance(objective, DatasetObjective):
        return BatchSum(objective, kind, generator)
    return kind(evaluation, generator)


class BatchSum(LinearOperator):
    """The sum of the curvatures of all batches.

    Each product makes a pass over the loader: it evaluates a batch with its graph, multiplies, and
    frees the graph. Several products at once take one pass. The graphs of the first batches can be
    kept (`DatasetClosure.keep_graphs`); those batches are not evaluated again.

    Args:
        objective: The objective at its current position. The operator ends when parameters move.
        kind: Makes the operator of one batch; every pass draws the same random numbers.
        generator: Source of the seed for these.
        curvature: The kind of curvature that batches are evaluated with, see `Objective.evaluate`.
    """

    def __init__(
        self,
        objective: DatasetObjective,
        kind: Kind,
        generator: torch.Generator | None = None,
        curvature: Curvature = True,
    ) -> None:
        vector = objective.vector
        self.size, self.dtype, self.device = vector.size, vector.dtype, vector.device
        self._objective = objective
        self._kind, self._curvature = kind, curvature
        self._draws: torch.Generator | None = None
        if generator is not None:
            self._draws = torch.Generator(generator.device)
            seed = torch.randint(2**62, (), generator=generator, device=generator.device)
            self._seed = int(seed)
        self._validity = Linearization(objective, Graph(vector.params))
        # Jacobians are taken in one pass, and no graph is needed again.
        self._keep = objective.passes.closure.keep_graphs if curvature is True else 0
        self._kept: list[tuple[LinearOperator, float]] = []
        self._after_kept: Callable[[], None] = lambda: None
        self._all_kept = False

    def matvec(self, v: Tensor) -> Tensor:
        """See `LinearOperator.matvec`."""
        return self._objective.complete(self._sum(v, lambda A: A.matvec(v), _PRODUCT), v)

    def matmat(self, V: Tensor) -> Tensor:
        """See `LinearOperator.matmat`; one pass over the loader for all columns."""
        total = self._sum(V, lambda A: A.matmat(V), _PRODUCT)
        return self._objective.complete(total.T, V.T).T

    def evaluate_batches(self) -> None:
        """Makes the operators of all batches once, without a product."""
        self.retried(lambda: self.for_each_operator(lambda operator, weight: None, "curvature"))

    # The protocol `FromOutputs`, for preconditioners.

    def slots(self) -> list[Slot]:
        """See `GaussNewton.slots`."""
        return self._objective.slots()

    def diagonal(self, n_samples: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """See `GaussNewton.diagonal`.

        Raises:
            TypeError: The batches' operators are not made from model outputs.
        """
        ones = torch.ones(self.size, dtype=self.dtype, device=self.device)

        def of_batch(operator: LinearOperator) -> Tensor:
            return _from_outputs(operator).diagonal(n_samples, generator)

        total = self._sum(ones, of_batch, "diagonal of the curvature", generator)
        return self._objective.complete(total, ones)

    def factors(
        self, generator: torch.Generator | None = None, largest: float = math.inf
    ) -> list[KroneckerFactors]:
        """See `GaussNewton.factors`; leaves out layers that not all batches use in the same way.

        Raises:
            TypeError: The batches' operators are not made from model outputs.
        """
        return self.retried(lambda: self._factors(generator, largest), generator)

    def _factors(self, generator: torch.Generator | None, largest: float) -> list[KroneckerFactors]:
        sums: dict[tuple[int, int | None], KroneckerFactors] = {}
        uses: Counter[tuple[int, int | None]] = Counter()
        batches = 0

        def add(operator: LinearOperator, weight: float) -> None:
            nonlocal batches
            batches += 1
            for found in _from_outputs(operator).factors(generator, largest):
                layer = found.weight, found.bias
                uses[layer] += 1
                # The factor of the inputs is a mean over rows, that of the outputs a sum.
                inputs, outputs, rows = found.inputs * found.rows, found.outputs * weight, 0
                if layer in sums:
                    inputs, outputs = inputs + sums[layer].inputs, outputs + sums[layer].outputs
                    rows = sums[layer].rows
                sums[layer] = replace(found, inputs=inputs, outputs=outputs, rows=rows + found.rows)

        self.for_each_operator(add, "Kronecker factors")
        average = self._objective.ranks.average
        return [
            replace(f, inputs=average(f.inputs / f.rows), outputs=average(f.outputs))
            for layer, f in sums.items()
            if uses[layer] == batches
        ]

    # Passes over the batches.

    def _sum(
        self,
        like: Tensor,
        term: Callable[[LinearOperator], Tensor],
        label: str,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The weighted sum of a term of each batch's operator, shaped like a given tensor."""

        def summed() -> Tensor:
            total = torch.zeros_like(like)

            def add(operator: LinearOperator, weight: float) -> None:
                total.add_(term(operator), alpha=weight)

            self.for_each_operator(add, label)
            return total

        return self.retried(summed, generator)

    def retried(self, summed: Callable[[], _T], generator: torch.Generator | None = None) -> _T:
        """A sum over the batches; computed again with copies if a closure overwrote kept graphs.

        Args:
            summed: Computes the sum.
            generator: Its source of random numbers, which are the same the second time.
        """
        state = None if generator is None else generator.get_state()
        try:
            return summed()
        except Overwritten:
            if not self._objective.copy_saved():
                raise
            if generator is not None and state is not None:
                generator.set_state(state)
            self._kept.clear()
            self._all_kept = False
            return summed()

    def for_each_operator(self, use: Callable[[LinearOperator, float], None], label: str) -> None:
        """Calls `use` with the operator of each batch and its weight.

        Raises:
            RuntimeError: The parameters have moved since this operator was made.
        """
        self._validity.check()
        skipped = len(self._kept)
        with self._outside_model():
            for kept in self._kept:
                use(*kept)
        if self._all_kept:
            return
        index = 0

        def one(evaluate: Callable[[], Evaluation], weight: float) -> None:
            nonlocal index
            index += 1
            if index > skipped:
                operator = self._made(index, evaluate)
                with self._outside_model():
                    use(operator, weight)
                if index <= self._keep:
                    self._kept.append((operator, weight))
                    if index == self._keep:
                        self._after_kept = self._objective.replay.mark()
            elif index == skipped:
                self._after_kept()

        self._objective.for_each_batch(one, label, self._curvature)
        self._all_kept = len(self._kept) == index

    def _made(self, index: int, evaluate: Callable[[], Evaluation]) -> LinearOperator:
        evaluation = evaluate()
        if self._draws is not None:
            self._draws.manual_seed(self._seed + index)
        with self._outside_model():
            return self._kind(evaluation, self._draws)

    @contextmanager
    def _outside_model(self) -> Iterator[None]:
        """A context for products, which keep off the model's random numbers and autocast."""
        params = self._objective.vector.params
        with torch.no_grad(), without_autocast(params), self._objective.replay.aside():
            yield


def _from_outputs(operator: LinearOperator) -> FromOutputs:
    if not isinstance(operator, FromOutputs):
        raise TypeError(
            f"{type(operator).__name__} is not made from model outputs, which the preconditioners "
            "'kfac' and 'martens' need; use curvature='ggn', or preconditioner='nystrom'"
        )
    return operator
