"""Settings of a trainer that an optimizer cannot be right with, and what to do instead."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch_secondorder._optim.flat import FlatOptimizer
from torch_secondorder.optim import SecondOrderOptimizer

__all__ = ["accumulates", "check_settings"]

#: Strategies by the names of their classes, which are the same in both packages, and the reason.
_UNSUPPORTED = {
    "FSDPStrategy": "keeps parts of flattened parameters on each rank, of which no closure gives "
    "the curvature",
    "ModelParallelStrategy": "splits parameters by a plan that is not known to the optimizer",
    "DeepSpeedStrategy": "puts an optimizer of its own in the place of this one",
    "XLAStrategy": "runs operations later, and the optimizer decides by their values",
    "XLAFSDPStrategy": "runs operations later, and the optimizer decides by their values",
}


def check_settings(
    trainer: Any, pl_module: Any, optimizers: dict[str, SecondOrderOptimizer]
) -> None:
    """Looks at the trainer's settings, for each optimizer.

    Args:
        trainer: The trainer, at the start of fitting.
        pl_module: Its module.
        optimizers: By their names.

    Raises:
        ValueError: Something would go wrong; the message has all of it, and what to do.
    """
    for name, optimizer in optimizers.items():
        problems = [*_of_all(trainer), *_of_automatic(trainer, pl_module, optimizer)]
        if problems:
            listed = "".join(f"\n- {problem}" for problem in problems)
            raise ValueError(f"{name} cannot train with these settings:{listed}")


def accumulates(trainer: Any) -> bool:
    """Whether gradients of several batches are added up, now or in a later epoch."""
    if trainer.accumulate_grad_batches > 1:
        return True
    return any(
        callback.going_to_accumulate_grad_batches()
        for callback in trainer.callbacks
        if hasattr(callback, "going_to_accumulate_grad_batches")
    )


def _of_all(trainer: Any) -> Iterator[str]:
    """What no optimizer of this package works with."""
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        yield (
            "precision='16-mixed': its gradient scaler runs the closure outside of the "
            "optimizer's step, where no curvature can be taken; use precision='bf16-mixed', which "
            "needs no scaler, or '32-true'"
        )
    for kind in type(trainer.strategy).__mro__:
        reason = _UNSUPPORTED.get(kind.__name__)
        if reason is not None:
            yield (
                f"{kind.__name__} {reason}; use strategy='ddp', which averages loss, gradient and "
                "curvature over the ranks, or a single device"
            )
            return


def _of_automatic(trainer: Any, pl_module: Any, optimizer: SecondOrderOptimizer) -> Iterator[str]:
    """What an optimizer that evaluates several times a step does not work with."""
    if not isinstance(optimizer, FlatOptimizer) or not pl_module.automatic_optimization:
        return
    if accumulates(trainer):
        yield (
            f"accumulate_grad_batches={trainer.accumulate_grad_batches}: a step evaluates its "
            "closure several times, and only the last of the batches is in it; use "
            "accumulate_grad_batches=1 with larger batches, or AdaHessian or Sophia, which "
            "evaluate once"
        )
    if trainer.gradient_clip_val:
        yield (
            f"gradient_clip_val={trainer.gradient_clip_val}: a clipped gradient is not that of the "
            "loss, and what compares the two goes wrong; leave it out: a line search, damping or "
            "a trust region bounds the steps already"
        )
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        yield (
            "training_step(dataloader_iter): each evaluation of a step would fetch another batch; "
            "take (batch, batch_idx)"
        )
