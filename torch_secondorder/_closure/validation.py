"""Requirements on closures and their losses, and the errors if they are not met."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._foundation.subclasses import plain

STANDARD_CLOSURE = """\
    def closure():
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss
    optimizer.step(closure)"""


def check_is_closure(closure: Any) -> None:
    """Raises a TypeError that shows the standard closure, unless this can be called."""
    if not callable(closure):
        raise TypeError(
            f"the closure must be callable, got {type(closure).__name__}; pass one like\n"
            + STANDARD_CLOSURE
        )


def scalar(loss: Any) -> Tensor:
    """The loss as a 0-dim tensor."""
    if type(loss) is not Tensor:
        loss = plain(loss)
    if not isinstance(loss, Tensor):
        if hasattr(loss, "__float__") and not isinstance(loss, bool):  # NumPy's numbers as well
            return torch.tensor(float(loss), dtype=torch.float64, device="cpu")
        raise TypeError(
            f"the closure must return the loss, got {type(loss).__name__} ({loss!r:.60}); end it "
            "with `return loss`, and under manual optimization in Lightning pass it to step()"
        )
    if loss.numel() != 1 or loss.is_complex():
        raise ValueError(
            f"the closure must return a real scalar loss, got shape {tuple(loss.shape)} and dtype "
            f"{loss.dtype}; reduce it, for instance with .mean()"
        )
    return loss.reshape(()) if loss.dim() else loss


def differentiable(loss: Tensor) -> Tensor:
    """The loss; raises where it has no graph."""
    if not loss.requires_grad:
        raise no_gradient()
    return loss


def backward_of(loss: Tensor) -> None:
    """Calls `backward()` for a closure that has left no gradient at the parameters.

    Raises:
        RuntimeError: The loss has no graph, or the closure has used it up: then it did call
            `backward()`, and no gradient came to the parameters.
    """
    try:
        differentiable(loss).backward()
    except RuntimeError as error:
        if "backward through the graph a second time" in str(error):
            raise no_gradient() from error
        raise


def touched(grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The gradients; raises where there is none."""
    if grads[0] is None and all(g is None for g in grads):
        raise no_gradient()
    return grads


def lost_graph() -> RuntimeError:
    """The error for gradients that came from somewhere else than `loss.backward()`."""
    return RuntimeError(
        "the closure made gradients without loss.backward(), so their graph is lost: call "
        "loss.backward() instead of torch.autograd.backward(loss), or return the loss without any "
        "backward"
    )


class NoGradient(RuntimeError):
    """Raised where no gradient comes from a loss."""


def no_gradient() -> NoGradient:
    """The error for a loss that no gradient comes from."""
    return NoGradient(
        "no gradient reached any of the optimizer's parameters: the closure must compute its loss "
        "from them (not from copies, nor under torch.no_grad(), nor with a model that was made "
        "after the optimizer) and call loss.backward():\n" + STANDARD_CLOSURE
    )
