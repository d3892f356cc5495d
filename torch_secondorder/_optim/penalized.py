"""Closures with the contractive penalty of what an encoder gets in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._autograd.backward_hook import intercepting
from torch_secondorder._closure.validation import check_callable, lost_graph, scalar
from torch_secondorder._foundation.subclasses import plain
from torch_secondorder._objective.functional import FunctionalObjective
from torch_secondorder._objective.one_shot import GradientTrace
from torch_secondorder.dataset import DatasetClosure
from torch_secondorder.penalties._encoder import Calls, EncoderPenalty, seeded

__all__ = ["Penalized", "not_called"]


class Penalized:
    """Adds a penalty to closures and functions; one object for all steps.

    Args:
        penalty: Of an encoder.

    Attributes:
        first: Loss and penalty in the first evaluation of the step, without the factor.
    """

    def __init__(self, penalty: EncoderPenalty) -> None:
        self.first: tuple[Tensor, Tensor] | None = None
        self._penalty = penalty
        self._params: Sequence[Tensor] = ()
        self._factor, self._seed = 0.0, 0
        self._so_far: tuple[Tensor, Tensor] | None = None  # in the first pass over a data set

    def begin(self, params: Sequence[Tensor], factor: float, seed: int) -> None:
        """Begins a step.

        Args:
            params: What is optimized.
            factor: What the penalty is multiplied by.
            seed: Of noise and random vectors in each evaluation of the step.
        """
        self.first = self._so_far = None
        self._params, self._factor, self._seed = params, factor, seed

    def closure(self, closure: Any) -> Any:
        """A closure, `DatasetClosure` or `FunctionalObjective` with the penalty."""
        # Partial functions of methods of one object: what was learned of a closure in one step is
        # found again in the next.
        if isinstance(closure, FunctionalObjective):
            return closure.with_function(partial(self._evaluate_function, closure.function))
        if isinstance(closure, DatasetClosure):
            return closure.amended(self._evaluate_batch)
        check_callable(closure)
        return partial(self._evaluate, closure)

    def generator(self) -> Callable[[torch.device], torch.Generator]:
        """Random generators by device, always the same ones within a step."""
        return seeded(self._seed)

    def _evaluate(self, closure: Callable[[], Any]) -> Tensor:
        before = GradientTrace(self._params)
        with (
            self._penalty.watching(self.generator()) as calls,
            intercepting(partial(self._backward, calls)),
        ):
            loss = scalar(closure())
        if calls.taken:
            return self._sum(loss, torch.stack(calls.taken).sum())
        if before.shows_backward(self._params):
            raise not_called() if calls.take() is None else lost_graph()
        # Who asked for the evaluation differentiates what it returns.
        return self._sum(loss, _taken(calls))

    def _evaluate_function(self, function: Callable[[Any], Tensor], tree: Any) -> Tensor:
        with self._penalty.watching(self.generator()) as calls:
            loss = scalar(function(tree))
        return self._sum(loss, _taken(calls))

    def _evaluate_batch(
        self, compute: Callable[[], Tensor], weight: float, share: float, last: bool
    ) -> Tensor:
        """The loss of a part of the data, with its part of the mean that the penalty is."""
        with self._penalty.watching(self.generator()) as calls:
            loss = compute()
        penalty = _taken(calls)
        if self.first is None:
            so_far = self._so_far or (0.0, 0.0)
            found = so_far[0] + weight * loss.detach(), so_far[1] + share * penalty.detach()
            self._so_far, self.first = (None, found) if last else (found, None)
        return loss + self._factor * (share / weight) * penalty

    def _sum(self, loss: Tensor, penalty: Tensor) -> Tensor:
        if self.first is None:
            self.first = loss.detach(), penalty.detach()
        return loss + self._factor * penalty

    def _backward(
        self, calls: Calls, loss: Tensor, gradient: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """What `loss.backward()` does inside a closure."""
        penalty = calls.take()
        loss, gradient = plain(loss), plain(gradient)
        if penalty is not None:
            if gradient is not None:
                loss, gradient = (loss * gradient).sum(), None
            loss = loss + self._factor * penalty
        loss.backward(gradient, *args, **kwargs)


def _taken(calls: Calls) -> Tensor:
    penalty = calls.take()
    if penalty is None:
        raise not_called()
    return penalty


def not_called() -> RuntimeError:
    """The error where there is nothing to penalize."""
    return RuntimeError(
        "the encoder was not called with gradients enabled, so there is nothing to penalize: call "
        "the model that it is part of, not a copy, nor a compiled version of it, which does not "
        "show the calls inside"
    )
