"""Choice of the curvature and the preconditioner of NewtonCG, by name or automatically."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_secondorder._autograd.graph import MissingSecondDerivative
from torch_secondorder._objective.base import Evaluation, Objective
from torch_secondorder.curvature import (
    FiniteDifference,
    Fisher,
    FromOutputs,
    GaussNewton,
    Hessian,
    LinearOperator,
    UnknownOutputs,
)
from torch_secondorder.dataset._objective import DatasetObjective
from torch_secondorder.dataset._operator import BatchSum, curvature_at
from torch_secondorder.solvers import KFAC, Martens, Preconditioner

Factory: TypeAlias = Callable[[Evaluation], LinearOperator]

CurvatureName: TypeAlias = Literal["auto", "ggn", "hessian", "fisher", "empirical_fisher"]
DIFFERENCES = "hessian by differences"
#: All kinds of curvature; checkpoints have the position in this list.
KINDS = ("", "ggn", "hessian", DIFFERENCES, "fisher", "empirical_fisher", "own")

#: The preconditioners that `"auto"` may choose, likewise; the first is none.
SUITED = ("", "kfac", "nystrom")

# A note about compiled functions whose first product found no outputs.
_NO_OUTPUTS = "no outputs"
# Steps after which a closure that needed differences is tried again. A try takes about two
# evaluations, and a step by differences at least five.
_LOOK_AGAIN = 20
# Piecewise linear losses: their second derivative with respect to the outputs is zero.
_LINEAR = (F.l1_loss, F.multi_margin_loss, F.multilabel_margin_loss)
# Up to so many parameters no preconditioner, or a sketch, is chosen; see `suited_preconditioner`.
_TINY = 100
_FEW = 2_000
# Most iterations of conjugate gradients. With Kronecker factors few are enough.
_MOST_ITERATIONS = 250
_WITH_FACTORS = 5
# The share of the parameters in linear layers from which Kronecker factors are chosen.
_MOST = 0.5


class CurvatureChoice:
    """The curvature at a point, of the kind that you asked for or that suits the closure.

    With `"auto"` this is the Gauss-Newton matrix if model outputs are found; else the Hessian; and
    if the graph has no second derivative, the Hessian by differences of gradients. If part of the
    loss bypasses the outputs, or its form is unknown, the Gauss-Newton matrix may be indefinite.
    The Hessian replaces it from the first direction of negative curvature on.

    Args:
        spec: A name, or a function from an `Evaluation` to a `LinearOperator`.
        by_differences: Whether products are differences of gradients in any case.
        preconditioner: The preconditioner that you asked for. One made from model outputs needs a
            curvature made from them, indefinite or not.
        counts_layers: Whether `linear_layers` and `linear_share` are needed, to choose a
            preconditioner.

    Attributes:
        automatic: Whether another kind may take the place of one that has no products.
        kind: The kind of the last operator, one of `KINDS`.
        indefinite: Whether the Gauss-Newton matrix has met negative curvature.
        linear_layers: Weights of linear layers, as far as the last operator shows them.
        linear_share: The share of the parameters that these are.
    """

    def __init__(
        self,
        spec: CurvatureName | Factory,
        by_differences: bool,
        preconditioner: Preconditioner | None = None,
        counts_layers: bool = False,
    ) -> None:
        self.automatic = spec == "auto" and not by_differences
        self._counts_layers = counts_layers
        self._needs_outputs = isinstance(preconditioner, (KFAC, Martens))
        self.kind = ""
        self.indefinite = False
        self.linear_layers = 0
        self.linear_share = 0.0
        self._spec = spec
        self._by_differences = by_differences
        self._semidefinite = False
        self._age = 0
        self._seen_batches = False

    def begin(self, objective: Objective) -> None:
        """Begins a step."""
        if self.automatic and self._needs_differences(objective):
            self._age += 1
            if self._age % _LOOK_AGAIN == 0:
                objective.registry.forget(objective.source, DIFFERENCES)

    def captures(self, objective: Objective) -> bool:
        """True if products come from the graph of an evaluation."""
        if self._by_differences:
            return False
        return not (self.automatic and self._needs_differences(objective))

    def evaluate(self, objective: Objective) -> Evaluation:
        """Evaluates an objective at its position, with a graph if products need one."""
        if not self.captures(objective):
            return objective.evaluate()
        try:
            return objective.evaluate(curvature=True)
        except MissingSecondDerivative as error:
            if not self.falls_back(error, objective):
                raise
            try:
                return objective.evaluate()
            except RuntimeError as other:
                if "does not require grad" not in str(other):
                    raise
                raise error from other  # there is no gradient either, for the same reason

    def falls_back(self, error: RuntimeError, objective: Objective) -> bool:
        """Turns to another kind of curvature after an error; returns False if there is none."""
        if not self.automatic:
            return False
        self._seen_batches = False
        if isinstance(error, MissingSecondDerivative):
            objective.registry.note(objective.source, DIFFERENCES)
            self._age = 0
            return True
        objective.registry.note(objective.source, _NO_OUTPUTS)
        return isinstance(error, UnknownOutputs) and self.kind == "ggn"

    def operator(
        self,
        objective: Objective,
        evaluation: Evaluation,
        generator: torch.Generator,
        sizes: Callable[[Tensor], Tensor],
    ) -> LinearOperator:
        """The curvature at an evaluated point.

        Args:
            objective: The objective at that point.
            evaluation: Made by `evaluate`.
            generator: Source of the random numbers of a Fisher matrix.
            sizes: Computes the sizes of the parameters from the position, for differences.
        """
        if not self.captures(objective):
            self.kind, self.linear_layers, self.linear_share = DIFFERENCES, 0, 0.0
            sharded = objective.vector.sharded
            return FiniteDifference(objective, None if sharded else sizes(objective.position))
        operator: LinearOperator
        if isinstance(objective, DatasetObjective):
            operator = BatchSum(objective, partial(self._of, objective), generator)
            if not self._seen_batches:
                operator.evaluate_batches()  # their kind of curvature is known afterwards
            self._seen_batches = True
        else:
            operator = self._of(objective, evaluation, generator)
            self._seen_batches = False
        if objective.ranks.count > 1:
            self._agree(objective)
        return operator

    def _agree(self, objective: Objective) -> None:
        """Agrees with all ranks on the facts that later choices depend on.

        Graphs may differ between ranks. A rank with another preconditioner or globalization would
        wait for the others forever.
        """
        ranks = objective.ranks
        own = [KINDS.index(self.kind), self.linear_layers, round(1e6 * self.linear_share)]
        kinds, layers, shares = zip(*ranks.gather(own, objective.vector.device), strict=True)
        self.kind = KINDS[max(kinds)]
        self.linear_layers, self.linear_share = min(layers), 1e-6 * min(shares)

    def met(self, negative_curvature: float) -> None:
        """Notes the lowest curvature along any direction of a step."""
        settled = self._semidefinite or self._needs_outputs
        doubtful = self.automatic and self.kind == "ggn" and not settled
        if doubtful and negative_curvature < 0.0:
            self.indefinite, self._seen_batches = True, False

    def _needs_differences(self, objective: Objective) -> bool:
        return objective.registry.knows(objective.source, DIFFERENCES)

    def _of(
        self, objective: Objective, evaluation: Evaluation, generator: torch.Generator | None
    ) -> LinearOperator:
        spec = self._spec
        operator: LinearOperator
        if callable(spec):
            self.kind, operator = "own", spec(evaluation)
        elif spec == "auto":
            operator = self._best(objective, evaluation)
        else:
            self.kind = spec
            if spec == "hessian":
                operator = Hessian(evaluation)
            elif spec == "ggn":
                operator = GaussNewton(evaluation)
            elif spec == "empirical_fisher":
                operator = Fisher(evaluation, labels="empirical")
            else:
                operator = Fisher(evaluation, generator=generator)
        if self._counts_layers:
            self.linear_layers, self.linear_share = _linear(operator, evaluation)
        return operator

    def _best(self, objective: Objective, evaluation: Evaluation) -> LinearOperator:
        """The Gauss-Newton matrix if it exists and is not zero, else the Hessian."""
        found = None
        known = objective.registry.knows(objective.source, _NO_OUTPUTS)
        if not (known or self.indefinite):
            with suppress(UnknownOutputs, ValueError):  # none, or complex ones
                found = GaussNewton(evaluation)
        if found is not None and found.vanishes(_LINEAR):
            found = None
        linearization = evaluation.linearization
        assert linearization is not None
        ranks = linearization.ranks
        if ranks.count > 1:  # all must take the same, or they would wait for each other
            answers = ranks.gather([int(found is not None)], evaluation.grad.device)
            found = found if all(answer for (answer,) in answers) else None
        if found is None:
            self.kind = "hessian"
            return Hessian(evaluation)
        self.kind, self._semidefinite = "ggn", found.semidefinite
        return found


def _linear(operator: LinearOperator, evaluation: Evaluation) -> tuple[int, float]:
    """The number of linear layers in an operator, and their weights' share of the parameters."""
    linearization = evaluation.linearization
    if linearization is None or not isinstance(operator, FromOutputs):
        return 0, 0.0
    graph = linearization.graph
    weights = {call.weight for call in graph.linear_calls()}
    covered = sum(graph.params[i].numel() for i in weights)
    return len(weights), covered / max(linearization.size, 1)


def hessian_at(objective: Objective, evaluation: Evaluation) -> LinearOperator:
    """The Hessian where an objective stands, a sum over batches for a data set.

    Args:
        objective: The objective at that point.
        evaluation: Made there with its graph.
    """
    return curvature_at(objective, evaluation, lambda batch, _: Hessian(batch))


def most_iterations(preconditioner: Preconditioner | None) -> int:
    """The default for the most iterations of conjugate gradients."""
    return _WITH_FACTORS if isinstance(preconditioner, KFAC) else _MOST_ITERATIONS


def suited_preconditioner(curvature: CurvatureChoice, size: int) -> str | None:
    """The name of the preconditioner that `"auto"` chooses.

    For the Gauss-Newton matrix of a network of two linear layers or more, with half of the
    parameters in their weights, this is `"nystrom"` from 100 to 2,000 parameters and `"kfac"`
    above. In all other cases there is none: for Fisher matrices, whose draws differ from step to
    step; for the Hessian; for differences (a sketch takes 120 evaluations); for compiled functions;
    for few parameters; and for one linear layer, whose problem is convex and needs exact solutions.

    Args:
        curvature: The choice, after the last operator was made.
        size: The number of parameters.
    """
    if curvature.kind != "ggn":
        return None
    if curvature.linear_layers < 2 or curvature.linear_share < _MOST or size < _TINY:
        return None
    return "nystrom" if size <= _FEW else "kfac"
