"""The curvature of one step, seen while a loop without a closure calls `backward()`."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from operator import is_

import torch
from torch import Tensor

from torch_secondorder._autograd.graph import Graph, MissingSecondDerivative
from torch_secondorder._closure.capture import Capture
from torch_secondorder._closure.data_parallel import Ranks
from torch_secondorder._closure.runner import (
    GradientTrace,
    ModuleRegistry,
    any_nonzero,
    gradients_of,
)
from torch_secondorder._closure.validation import STANDARD_CLOSURE
from torch_secondorder._objective.one_shot import WatchSink
from torch_secondorder._optim.present import Scaling, unscaled
from torch_secondorder.curvature.diagonal import DiagonalWatch


class Observation(WatchSink):
    """Shows a watch the `backward()` calls of one step, over as many contexts as that takes.

    Args:
        params: The parameters.
        watch: Estimates the curvature.
        registry: The record of modules and ranks.
        everywhere: Whether calls outside of contexts are seen as well.

    Attributes:
        watch: Estimates the curvature.
        calls: The number of `backward()` calls seen.
        open: Whether its context is open.
        failure: The reason why there is no curvature, if there is none.
    """

    watch: DiagonalWatch

    def __init__(
        self,
        params: Sequence[Tensor],
        watch: DiagonalWatch,
        registry: ModuleRegistry,
        *,
        everywhere: bool = False,
    ) -> None:
        super().__init__(params, registry, watch)
        self.calls = 0
        self.open = False
        self.failure: RuntimeError | None = None
        self._everywhere = everywhere
        self._stack = ExitStack()
        self._factor: Tensor | None = None  # of the probes
        self._left: GradientTrace | None = None  # the gradients after the last pass seen
        # A parameter that got a gradient past the watch since the last step; one is enough.
        self._missed: deque[Tensor] = deque(maxlen=1)
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._missed.append)
            for p in (() if everywhere else params)
        ]

    def __enter__(self) -> None:
        capture = Capture(self.params, self)
        with ExitStack() as stack:
            stack.enter_context(capture)
            stack.enter_context(self._registry.ranks.quiet())
            stack.enter_context(self._registry.watch({}))
            self._stack = stack.pop_all()
        self.open = True

    def __exit__(self, *exception: object) -> None:
        self.open = False
        self._stack.close()
        self._left = None

    @property
    def ranks(self) -> Ranks:
        """The ranks that share the batch."""
        return self._registry.ranks

    def continues(self, params: Sequence[Tensor]) -> bool:
        """True if the parameters are the same, and the passes seen are still in their gradients."""
        if not self._is_of(params):
            return False
        untouched = self._left is not None and self._left.matches(params)
        return untouched or any_nonzero(gradients_of(params))

    def has_seen(self, params: Sequence[Tensor]) -> bool:
        """True if a backward pass of these parameters was seen, or failed to be."""
        return bool(self.calls or self.failure is not None) and self._is_of(params)

    def _is_of(self, params: Sequence[Tensor]) -> bool:
        return len(params) == len(self.params) and all(map(is_, params, self.params))

    def settle(self) -> None:
        """Notes that the passes seen are in the gradients now."""
        self._left = GradientTrace(self.params)

    def close(self) -> None:
        """Ends it."""
        for hook in self._hooks:
            hook.remove()

    def refuse(self, why: str | RuntimeError | Exception) -> None:
        """Notes why there will be no curvature."""
        if self.failure is None:
            # Not the error itself, which holds the graph.
            kind = MissingSecondDerivative if isinstance(why, MissingSecondDerivative) else None
            self.failure = (kind or RuntimeError)(str(why))

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
        if self.failure is not None:
            raise type(self.failure)(
                f"{name}.step() estimates the curvature at this step, and loss.backward() gave "
                f"none: {self.failure}. If it is an operation that has no second derivative, run "
                f"the forward pass inside `with optimizer.watching():` or in a closure, where "
                f"PyTorch's own operations use implementations that have one:\n"
                f"{STANDARD_CLOSURE}"
            )
        if scaling.active and scaling.scale is None:
            raise unscaled()

    def unscaling(self, scaling: Scaling) -> Tensor | None:
        """The factor to multiply the estimate by; None for one."""
        inverse = scaling.inverse
        if self._factor is None:
            return inverse
        return 1 / self._factor if inverse is None else inverse / self._factor.to(inverse)

    def see(self, graph: Graph, retain: bool) -> None:
        """See `WatchSink.see`."""
        if not self.calls and any_nonzero(gradients_of(self.params)):
            raise _partly("there were gradients before it", self._everywhere)
        self.calls += 1
        if self.calls == 1 and self.twice:
            with suppress(NotImplementedError):  # of other estimators than this package's
                self._scale_probes(graph.losses[0])
        super().see(graph, retain)

    def _scale_probes(self, loss: Tensor) -> None:
        """Keeps products within the range of float16 where the loss is multiplied by a number.

        That is what `GradScaler.scale` does; which number it is will be known at the step only. The
        probes get a power of two, which changes no digit.
        """
        node = loss.grad_fn
        if type(node).__name__ != "MulBackward0":
            return
        scale = getattr(node, "_saved_other", None)
        if isinstance(scale, Tensor) and scale.dtype == torch.float32 and not scale.dim():
            scale = scale.detach().abs().clamp(1.0, 2.0**100)
            factor = torch.exp2(-(scale.log2() / 2).floor())
            self.watch.scale_probes(factor)
            self._factor = factor


def _partly(why: str, everywhere: bool = False) -> RuntimeError:
    if everywhere:
        return RuntimeError(
            "the gradients of this step are not all from backward passes that the optimizer has "
            f"seen, so that the curvature would be that of a part of the loss: {why}. Zero the "
            "gradients after each step"
        )
    return RuntimeError(
        "the gradients of this step are not all from inside `with optimizer.watching()`, so that "
        f"the curvature would be that of a part of the loss: {why}. Run each forward and "
        "loss.backward() of the step inside, and zero the gradients before"
    )
