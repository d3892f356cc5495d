"""Gradients that are there already, with their graph: loops without a closure, and scaled ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torch_secondorder._autograd.graph import Graph
from torch_secondorder._closure.runner import without_autocast
from torch_secondorder._closure.validation import STANDARD_CLOSURE
from torch_secondorder.curvature.diagonal import DiagonalWatch

_WATCHING = "run forward and backward pass in `with optimizer.watching():`"


class Scaling:
    """The traces that a `torch.amp.GradScaler` has left on the optimizer for this step.

    It leaves the gradients of an optimizer that says so as they are, and tells what they were
    scaled by and whether it found infinity.

    Args:
        optimizer: The optimizer, in its `step()`.

    Attributes:
        active: Whether a scaler is at work.
        scale: What gradients and products are scaled by; None for nothing, or where the scaler has
            taken it out of the gradients already.
        inverse: What to multiply gradients by, NaN where infinity was found; None without a scaler.
    """

    def __init__(self, optimizer: Any) -> None:
        self.active = "found_inf" in vars(optimizer)
        self.scale: Tensor | None = None
        self.inverse: Tensor | None = None
        if self.active:
            self.scale, found = optimizer.grad_scale, optimizer.found_inf
            inverse = torch.ones_like(found) if self.scale is None else 1 / self.scale.to(found)
            self.inverse = torch.where(found > 0, torch.nan, inverse)
        self._optimizer = optimizer

    def refuse_closure(self) -> None:
        """Raises a RuntimeError if a scaler is at work, for a step that was given a closure.

        What `scaler.scale(loss)` makes inside are gradients of another loss than is returned.
        """
        if not self.active:
            return
        self.forget()
        raise RuntimeError(
            f"{type(self._optimizer).__name__}.step() was called by a GradScaler, whose scale "
            "would be in the gradients of the closure but not in its loss: call "
            "optimizer.step(closure) yourself and loss.backward() without a scaler, and train in "
            "bfloat16, which needs none (optimizers that evaluate once a step, such as SOAP or "
            "AdaHessian, also take scaled gradients without a closure)"
        )

    def forget(self) -> None:
        """Takes from the optimizer what the scaler left, which it does not do after an error."""
        if self.active:
            del self._optimizer.grad_scale, self._optimizer.found_inf


def present_gradients(
    name: str,
    params: Sequence[Tensor],
    watch: DiagonalWatch | None,
    scaling: Scaling,
    unseen: str = "",
) -> Sequence[Tensor | None]:
    """The gradients in `p.grad`; a graph that they have is shown to the watch and dropped.

    Args:
        name: The optimizer's.
        params: The parameters.
        watch: Estimates the curvature; None where that is not due.
        scaling: Of the gradients.
        unseen: Why the optimizer has not seen the backward pass that made them.

    Raises:
        RuntimeError: There is no gradient, or no graph where one is needed.
    """
    gradients = [p.grad for p in params]
    if all(g is None for g in gradients):
        raise RuntimeError(
            "no gradient reached any of the optimizer's parameters: without a closure "
            f"{name}.step() comes after loss.backward() of a loss that is computed from them, and "
            "zero_grad() not between"
        )
    if watch is not None:
        _check(name, gradients, watch, scaling, unseen)
        if scaling.scale is not None:
            # Between gradients, which the scale keeps from underflow, and the loss itself.
            watch.scale_probes(scaling.scale.rsqrt())
        with without_autocast(params):
            watch.observe(Graph(params, gradients=[tuple(gradients)]), retain=False)
    for p in params:
        if p.grad is None:
            continue
        if p.grad.grad_fn is not None:
            p.grad = p.grad.detach()
        if scaling.active and p.grad.layout is not torch.strided:
            p.grad = p.grad.to_dense()  # the scale is taken out in place
    return [p.grad for p in params]


def _check(
    name: str,
    gradients: Sequence[Tensor | None],
    watch: DiagonalWatch,
    scaling: Scaling,
    unseen: str,
) -> None:
    if not watch.twice:
        raise RuntimeError(
            f"{name}.step() looks at the model's outputs at this step, and the optimizer has seen "
            f"no backward pass, for {unseen}: {_WATCHING}, or pass the closure:\n"
            f"{STANDARD_CLOSURE}"
        )
    if not any(g is not None and g.grad_fn is not None for g in gradients):
        raise RuntimeError(
            f"{name}.step() estimates the curvature at this step and finds no graph on the "
            f"gradients, and the optimizer has not seen the backward pass, for {unseen}: "
            f"{_WATCHING}, call loss.backward(create_graph=True) where optimizer.curvature_due "
            f"says so, or pass the closure:\n{STANDARD_CLOSURE}"
        )
    if _averaged_by_ddp(gradients):
        raise RuntimeError(
            f"{name}.step() finds gradients that DistributedDataParallel has averaged, and their "
            "graph is of this rank's loss alone (PyTorch averages no graphs), so that each rank "
            "would go its own way: pass the closure to step(), where curvature is averaged too "
            "and loss.backward() needs no create_graph=True, or run forward and backward pass in "
            f"`with optimizer.watching():`, likewise:\n{STANDARD_CLOSURE}"
        )
    if scaling.active and scaling.scale is None:
        raise unscaled()


def unscaled() -> RuntimeError:
    """The error for gradients that were unscaled behind the curvature's back."""
    return RuntimeError(
        "the gradients were unscaled by scaler.unscale_(optimizer), but their graph was not, so "
        "that the curvature would be wrong: leave unscale_ out in steps where "
        "optimizer.curvature_due, or train in bfloat16, which needs no scaler"
    )


def _averaged_by_ddp(gradients: Sequence[Tensor | None]) -> bool:
    """True if gradients with a graph have been through the buckets of DistributedDataParallel.

    It copies each into a bucket, averages that behind autograd's back, and copies it back, or with
    `gradient_as_bucket_view` makes the gradient a view of it.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return False
    nodes = [g.grad_fn for g in gradients if g is not None and g.grad_fn is not None]
    return any(
        following is not None and (_kind(node), _kind(following)) in _THROUGH_BUCKETS
        for node in nodes
        for following, _ in node.next_functions
    )


_THROUGH_BUCKETS = {("CopyBackwards", "CopyBackwards"), ("AsStridedBackward0", "CopySlices")}


def _kind(node: Any) -> str:
    name: str = node.name()
    return name.rsplit(":", 1)[-1]
