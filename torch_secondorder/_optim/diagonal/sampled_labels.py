"""Backward passes for labels drawn from the model, in ordinary closures.

They give the diagonal of the Gauss-Newton matrix if gradients come from `backward()` alone, as with
`fully_shard`: see `torch_secondorder.curvature.GaussNewtonBartlett`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._autograd.graph import Graph
from torch_secondorder._closure.capture import Capture
from torch_secondorder._closure.validation import differentiable, scalar
from torch_secondorder.curvature._output_space import LossCurvature, OutputSpace
from torch_secondorder.curvature._samples import Samples
from torch_secondorder.curvature.gauss_newton import random_roots


class DrawnLabels:
    """A closure whose losses can be replaced by those of labels drawn from the model.

    Args:
        closure: The closure.
        params: The parameters that get the gradients.

    Attributes:
        generator: The source of the labels; None for the closure unchanged.
    """

    def __init__(self, closure: Callable[[], Any], params: Sequence[Tensor]) -> None:
        self.generator: torch.Generator | None = None
        self._closure = closure
        self._params = params

    def __call__(self) -> Any:
        """Calls the closure.

        Raises:
            RuntimeError: There is a generator, and no output was found.
        """
        if self.generator is None:
            return self._closure()
        with _LabelCapture(self._params, self.generator) as capture:
            loss = scalar(self._closure())
            if not capture.calls:
                capture.backward(differentiable(loss))
        return loss


class _LooksAtOutputs:
    """A receiver of `Capture` that asks for outputs and receives nothing."""

    twice, outputs = False, True

    def __call__(self, graph: Graph, retain: bool) -> Sequence[Tensor | None]:
        raise NotImplementedError


class _LabelCapture(Capture):
    """Replaces `loss.backward()` by a backward pass from the model's outputs."""

    def __init__(self, params: Sequence[Tensor], generator: torch.Generator) -> None:
        super().__init__(params, _LooksAtOutputs())
        self._generator = generator

    def backward(
        self,
        loss: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        """See `Capture.backward`; the engine that fills `p.grad`, with all hooks, runs as usual."""
        self.calls += 1
        graph = Graph(self.graph.params, [loss], [gradient], outputs=[*self.graph.outputs])
        space = OutputSpace(graph)
        curvature = LossCurvature(space)
        samples = cache(partial(Samples, space, curvature.coefficients))
        (roots,) = random_roots(space, curvature.likelihoods, samples, 1, self._generator)
        pairs = [(t, r) for t, r in zip(space.tensors, roots, strict=True) if r is not None]
        tensors, weights = zip(*pairs, strict=True)
        torch.autograd.backward(tensors, weights, retain_graph=retain_graph)
