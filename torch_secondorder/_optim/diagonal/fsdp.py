"""Steps that evaluate once, on sharded parameters: gradients, estimates and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torch_secondorder._closure.runner import GradientTrace, ModuleRegistry, without_autocast
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder._objective.one_shot import Outcome
from torch_secondorder._optim.diagonal.sampled_labels import DrawnLabels
from torch_secondorder._params.space import local
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.curvature.diagonal import (
    DiagonalEstimator,
    GaussNewtonBartlett,
    Hutchinson,
    row_norms,
)
from torch_secondorder.curvature.finite_difference import diagonal_by_differences


def check_closure(closure: Any, due: bool) -> None:
    """Raises a RuntimeError where there is no closure and an estimate of the curvature is due."""
    if closure is None and due:
        raise RuntimeError(
            "the curvature is due at this step (optimizer.curvature_due), and on sharded "
            "parameters it is made of differences of gradients: pass the closure"
        )


def _without_adding(
    closure: Callable[[], Any], params: Sequence[Tensor], stale: GradientTrace | None
) -> Callable[[], Any]:
    """The closure, which raises where it adds to gradients from before the step.

    They would count once more with each evaluation. What the last step left does not count.

    Args:
        closure: The closure.
        params: The parameters.
        stale: The gradients that the last step left.
    """
    before = [p.grad for p in params]
    ours = stale is not None and stale.matches(params)
    if ours or not any(g is not None and bool(g.any()) for g in before):
        return closure

    def checked() -> Any:
        for p, gradient in zip(params, before, strict=False):
            p.grad = gradient
        result = closure()
        if any(g is not None and p.grad is g for p, g in zip(params, before, strict=False)):
            raise RuntimeError(
                "the closure adds to gradients from before this step, and on sharded parameters a "
                "step that estimates the curvature evaluates more than once: set them to None "
                "before, and run all micro-batches in the closure"
            )
        before.clear()
        return result

    return checked


def check_averaging(params: Sequence[Any], block: Any) -> None:
    """Raises a ValueError where entries that are averaged are cut apart.

    Args:
        params: Sharded parameters.
        block: See `torch_secondorder.AdaHessian`.
    """
    if type(block) is int:
        raise ValueError(
            f"average_block={block} averages neighboring entries, which may be in different "
            "processes where parameters are sharded: use 'spatial' or None"
        )
    dims = {placement.dim for p in params for placement in p.placements if placement.is_shard()}
    if block == "spatial" and any(dim > 1 for dim in dims):
        raise ValueError(
            f"parameters are sharded along dimension {max(dims)}, and average_block='spatial' "
            "averages over the dimensions from the third: shard along the first, or use None"
        )


class ShardedEvaluation:
    """An evaluation of a closure with an estimate of the curvature; a context for one step.

    The hooks of `fully_shard` let neither a second derivative through nor one that `backward()`
    does not take itself; so further evaluations take the place of products.

    Args:
        closure: The closure.
        vector: The parameters.
        registry: See `Objective`.
        stale: The gradients that the last step left; others that the closure adds to are refused.
    """

    def __init__(
        self,
        closure: Callable[[], Any],
        vector: ParameterVector,
        registry: ModuleRegistry,
        stale: GradientTrace | None,
    ) -> None:
        params = vector.params
        self._labels = DrawnLabels(_without_adding(closure, params, stale), params)
        self._vector = vector
        self.objective = ClosureObjective.for_step(self._labels, vector, registry=registry)

    def run(
        self, estimator: DiagonalEstimator, generator: torch.Generator, magnitudes: bool = False
    ) -> tuple[Outcome, Tensor]:
        """Evaluates once and estimates: the outcome in this process, and the estimate, `(n,)`.

        Parameters and gradients are then as after that evaluation.

        Args:
            estimator: Estimates the diagonal.
            generator: Where randomness comes from.
            magnitudes: See `torch_secondorder.curvature.diagonal.DiagonalWatch.diagonal`.

        Raises:
            TypeError: The estimator is not one of this package's.
        """
        estimate: Callable[[], Tensor]
        if isinstance(estimator, Hutchinson):
            estimate = partial(diagonal_by_differences, estimator, self.objective, generator)
        elif isinstance(estimator, GaussNewtonBartlett):
            estimate = partial(self._by_labels, estimator.n_samples, generator, magnitudes)
        else:
            raise TypeError(
                f"{type(estimator).__name__} works inside of backward(), which does not go with "
                "sharded parameters: use estimator='hutchinson' or 'gnb'"
            )
        params = self._vector.params
        with without_autocast(params):
            evaluation = self.objective.evaluate()
            gradients = [p.grad for p in params]
            diagonal = estimate()
            self.objective.settle()
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        return Outcome(evaluation.closure_loss, held_parts(gradients)), diagonal

    def _by_labels(self, n_samples: int, generator: torch.Generator, magnitudes: bool) -> Tensor:
        """See `GaussNewtonBartlett`: squares of gradients for labels drawn from the model.

        The mean of `R` ranks' independent roots of their own curvatures is one of the mean
        curvature, over the root of `R`.
        """
        seed = torch.randint(2**62, (), generator=generator, device=generator.device)
        own = torch.Generator(generator.device)
        self._labels.generator = own.manual_seed(int(seed) + dist.get_rank())
        space = self._vector.space
        total = torch.zeros_like(self.objective.position)
        roots = []
        for _ in range(n_samples):
            root = self.objective.evaluate().grad
            if magnitudes:
                roots.append(root * math.sqrt(space.processes))
            else:
                total.addcmul_(root, root, value=space.processes / n_samples)
        self._labels.generator = None
        return row_norms(torch.stack(roots), space) if magnitudes else total


def held_outcome(outcome: Outcome, vector: ParameterVector) -> Outcome:
    """The part that this process holds, with the mean of the losses."""
    loss = outcome.loss
    assert loss is not None
    loss = loss.to(vector.device, torch.promote_types(vector.dtype, loss.dtype))
    return Outcome(vector.space.mean(loss), held_parts(outcome.gradients))


def held_parts(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """The part of each that this process holds."""
    return [None if tensor is None else local(tensor) for tensor in tensors]
