"""One evaluation with its graph, and many backward passes through it at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from torch_secondorder._autograd.vectorized import several
from torch_secondorder._foundation.private_torch import (
    BATCHES_DIRECTLY,
    add_batch_dim,
    begin_batch,
    end_batch,
    engine_run_backward,
    innermost_transform,
    remove_batch_dim,
)

# Why there is one evaluation, and batched cotangents. The Jacobian of a 500-100(relu)-10(softmax)
# network, float32, medians over that of torch.func.jacrev (0.41 ms for one input) and of
# vmap(jacrev) (3.1 ms for a batch of 256), on a Xeon with torch 2.13 and others measuring beside it
# (`python scripts/bench.py jacobian`, all that has to be checked included):
#
#                                                     one input    batch
#   batched cotangents, engine called directly             0.39     0.86   <- here
#   batched cotangents, torch.autograd.grad                0.46     0.87
#   input replicated over the output rows                  0.43     1.94
#   the same, without the evaluation that counts rows      0.25        -
#   vmap(f) on a replicated input, likewise                0.65        -
#   vmap of vjp                                            0.90     1.0
#   autograd.functional.jacobian: one by one               1.6      1.3
#   NumPy, closed form                                     0.06     0.75
#
# Replicating the input is right only for a function that takes rows one by one, and nothing that
# looks at one input can tell. The first line is right for every function: `f` is called once, on
# the very input that was given, and random numbers drawn inside are the same for all rows. What
# `torch.autograd.grad(..., is_grads_batched=True)` adds are checks of shapes in Python, each of
# which goes through vmap. For the batch all that matters is one product of matrices, 2560 x 100 by
# 100 x 500, which takes 1.6 ms alone, as many operations as any of these ways needs there.


def composing(tensors: Sequence[Tensor]) -> bool:
    """True inside a transformation of torch.func or torch.compile.

    The graph is theirs then, and derivatives have to be taken with the means of torch.func.
    """
    if torch.compiler.is_compiling():
        return True
    if not BATCHES_DIRECTLY or innermost_transform() is not None:
        return True
    return any(type(t) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer) for t in tensors)


class Recorded:
    """The value of a function with its graph.

    Derivatives can be differentiated again if gradients are enabled where this is made, and the
    inputs or anything that the function closes over require them; else nothing is recorded.

    Args:
        f: A function of tensors, whose outputs are tensors.
        inputs: What it is called with.

    Attributes:
        outputs: What it returned.
    """

    def __init__(self, f: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> None:
        again = torch.is_grad_enabled()
        with _recording():
            if again and any(x.requires_grad for x in inputs):
                # A view, so that what else the caller made of the tensor has no part in this.
                self._inputs = [x.view_as(x) if x.requires_grad else _leaf(x) for x in inputs]
                self._create_graph = True
            else:
                self._inputs = [_leaf(x) for x in inputs]
                self._create_graph = False
            self.outputs = f(*self._inputs)
        if again and not self._create_graph:
            self._create_graph = self._closes_over_parameters()

    def pull(self, cotangents: Sequence[Tensor]) -> list[Tensor]:
        """The products of many cotangents with the Jacobian.

        Args:
            cotangents: For each output a tensor of shape `(k, *output.shape)`.

        Returns:
            For each input a tensor of shape `(k, *input.shape)`; zeros for an input that no output
            depends on.
        """
        used = [(y, c) for y, c in zip(self.outputs, cotangents, strict=True) if y.requires_grad]
        if not used:
            return [x.new_zeros(len(cotangents[0]), *x.shape) for x in self._inputs]
        outputs, directions = [y for y, _ in used], [c for _, c in used]
        with _recording():
            found = several(partial(self._multiply, outputs), directions)
        return cast("list[Tensor]", found)

    def _multiply(
        self, outputs: Sequence[Tensor], directions: Sequence[Tensor], batched: bool
    ) -> list[Tensor]:
        if not batched:
            found = self._backward(outputs, directions)
            return [
                torch.zeros_like(x) if g is None else g
                for g, x in zip(found, self._inputs, strict=True)
            ]
        count = len(directions[0])
        level = begin_batch(count, "error")
        try:
            found = self._backward(outputs, [add_batch_dim(c, 0, level) for c in directions])
            return [
                x.new_zeros(count, *x.shape) if g is None else remove_batch_dim(g, level, count, 0)
                for g, x in zip(found, self._inputs, strict=True)
            ]
        finally:
            end_batch()

    def _backward(
        self, outputs: Sequence[Tensor], directions: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        # The graph is kept for the next chunk, or direction; it goes with this object.
        return engine_run_backward(
            tuple(outputs),
            tuple(directions),
            True,
            self._create_graph,
            tuple(self._inputs),
            allow_unreachable=True,
            accumulate_grad=False,
        )

    def _closes_over_parameters(self) -> bool:
        """True if a leaf other than the inputs is in the graph."""
        own = {id(x) for x in self._inputs}
        to_do: list[Any] = [y.grad_fn for y in self.outputs if y.grad_fn is not None]
        seen = set(to_do)
        while to_do:
            node = to_do.pop()
            for parent, _ in node.next_functions:
                if parent is None or parent in seen:
                    continue
                if type(parent).__name__ == "AccumulateGrad":
                    if id(parent.variable) not in own:
                        return True
                else:
                    seen.add(parent)
                    to_do.append(parent)
        return False


def _leaf(x: Tensor) -> Tensor:
    return (x.clone() if x.is_inference() else x.detach()).requires_grad_()


def _recording() -> AbstractContextManager[Any]:
    """Gradients are recorded, whatever the caller's mode is."""
    if not torch.is_inference_mode_enabled():
        return torch.enable_grad()
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.enable_grad())
    return stack
