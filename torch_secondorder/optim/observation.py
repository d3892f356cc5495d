"""The curvature of one step, seen while a loop without a closure calls `backward()`."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack

from torch import Tensor

from torch_secondorder.capture import Capture
from torch_secondorder.curvature.diagonal import DiagonalWatch
from torch_secondorder.graph import Graph
from torch_secondorder.optim.present import Scaling
from torch_secondorder.replay import Surroundings
from torch_secondorder.single import averaged, nonzero, without_autocast

__all__ = ["Observation"]


class Observation:
    """Shows a watch the `backward()` calls of one step, over as many contexts as that takes.

    Args:
        params: The parameters.
        watch: Estimates the curvature.
        surroundings: What earlier steps learned of the modules that are called.

    Attributes:
        params: The parameters.
        watch: The same.
        calls: How many times `backward()` was seen.
        open: Whether its context is.
    """

    def __init__(
        self, params: Sequence[Tensor], watch: DiagonalWatch, surroundings: Surroundings
    ) -> None:
        self.params = params
        self.watch = watch
        self.calls = 0
        self.open = False
        self.twice, self.outputs = watch.twice, watch.outputs
        self._surroundings = surroundings
        self._stack = ExitStack()
        # What got a gradient past the watch, until the step is made. One is enough to know.
        self._missed: deque[Tensor] = deque(maxlen=1)
        self._hooks = [p.register_post_accumulate_grad_hook(self._missed.append) for p in params]

    def __enter__(self) -> None:
        capture = Capture(self.params, self)
        with ExitStack() as stack:
            stack.enter_context(capture)
            stack.enter_context(self._surroundings.ranks.quiet())
            stack.enter_context(self._surroundings.watch({}))
            self._stack = stack.pop_all()
        self.open = True

    def __exit__(self, *exception: object) -> None:
        self.open = False
        self._stack.close()

    def continues(self, params: Sequence[Tensor]) -> bool:
        """Whether the parameters are the same, and what was seen is still in their gradients."""
        same = len(params) == len(self.params) and all(map(_is, params, self.params))
        return same and any(p.grad is not None and nonzero(p.grad) for p in params)

    def close(self) -> None:
        """Ends it."""
        for hook in self._hooks:
            hook.remove()

    def check(self, name: str, scaling: Scaling) -> None:
        """Raises a RuntimeError where the estimate would not be that of the gradients.

        Args:
            name: The optimizer's.
            scaling: Of the gradients.
        """
        if self.open:
            raise RuntimeError(
                f"{name}.step() was called inside `with optimizer.watching()`: the context goes "
                "around forward and backward pass of one step, and step() comes after it"
            )
        if self._missed:
            raise _partly("loss.backward() was called outside of it, or torch.autograd.backward()")
        if scaling.active:
            raise RuntimeError(
                "`with optimizer.watching()` does not go with a GradScaler, whose scale it cannot "
                "take out of the curvature: train in bfloat16, which needs none, or leave watching "
                "out and call loss.backward(create_graph=optimizer.curvature_due)"
            )

    def __call__(self, graph: Graph, retain: bool) -> Sequence[Tensor | None]:
        """See `torch_secondorder.capture.Receiver`."""
        params = self.params
        if not self.calls and any(p.grad is not None and nonzero(p.grad) for p in params):
            raise _partly("there were gradients before it")
        self.calls += 1
        graph.check_once(self._surroundings.graphs, self.twice)
        with without_autocast(params):
            self.watch.observe(graph, retain)
        # Copies: the graph goes on using the gradients' memory.
        if self._surroundings.ranks.count > 1:
            return averaged(graph.gradients[0], params, self._surroundings.ranks)[0]
        return [None if g is None else g.detach().clone() for g in graph.gradients[0]]


def _is(first: Tensor, second: Tensor) -> bool:
    return first is second


def _partly(why: str) -> RuntimeError:
    return RuntimeError(
        "the gradients of this step are not all from inside `with optimizer.watching()`, so that "
        f"the curvature would be that of a part of the loss: {why}. Run each forward and "
        "loss.backward() of the step inside, and zero the gradients before"
    )
