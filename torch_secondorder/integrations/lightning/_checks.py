"""Trainer settings that are incompatible with an optimizer, with suggested fixes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch_secondorder._optim.diagonal.base import DiagonalOptimizer
from torch_secondorder._optim.flat import FlatOptimizer
from torch_secondorder.optim import SecondOrderOptimizer

#: Unsupported strategies by class name (the same in both packages), with the reason.
_UNSUPPORTED = {
    "FSDPStrategy": "keeps parts of flattened parameters on each rank, whose curvature no closure "
    "gives",
    "ModelParallelStrategy": "splits parameters by a plan that the optimizer does not know",
    "DeepSpeedStrategy": "replaces this optimizer by its own",
    "XLAStrategy": "defers operations whose values the optimizer needs at once",
    "XLAFSDPStrategy": "defers operations whose values the optimizer needs at once",
}


def check_settings(
    trainer: Any, pl_module: Any, optimizers: dict[str, SecondOrderOptimizer]
) -> None:
    """Raises a ValueError for settings of the trainer that are incompatible with an optimizer.

    Args:
        trainer: The trainer, at the start of fitting.
        pl_module: Its module.
        optimizers: The optimizers by name.

    Raises:
        ValueError: The message lists all incompatible settings and suggests fixes.
    """
    for name, optimizer in optimizers.items():
        problems = [
            *_trainer_problems(trainer, optimizer),
            *_loop_problems(trainer, pl_module, optimizer),
        ]
        if problems:
            listed = "".join(f"\n- {problem}" for problem in problems)
            raise ValueError(f"{name} cannot train with these settings:{listed}")


def _accumulates(trainer: Any) -> bool:
    """True if gradients of several batches are accumulated, now or in a later epoch."""
    if trainer.accumulate_grad_batches > 1:
        return True
    return any(
        callback.going_to_accumulate_grad_batches()
        for callback in trainer.callbacks
        if hasattr(callback, "going_to_accumulate_grad_batches")
    )


def _trainer_problems(trainer: Any, optimizer: SecondOrderOptimizer) -> Iterator[str]:
    """Settings that hide the closure, the graph or the parameters from the optimizer."""
    takes_gradients_only = isinstance(optimizer, DiagonalOptimizer) and not optimizer._estimates
    if getattr(trainer.precision_plugin, "scaler", None) is not None and not takes_gradients_only:
        yield (
            "precision='16-mixed': its gradient scaler runs the closure outside of the "
            "optimizer's step, where the curvature is not available; use precision='bf16-mixed', "
            "which needs no scaler, or '32-true'"
        )
    for kind in type(trainer.strategy).__mro__:
        reason = _UNSUPPORTED.get(kind.__name__)
        if kind.__name__ == "ModelParallelStrategy" and takes_gradients_only:
            return  # with fully_shard in `configure_model`
        if reason is not None:
            yield (
                f"{kind.__name__} {reason}; use strategy='ddp', which averages loss, gradient and "
                "curvature over the ranks, or a single device"
            )
            return


def _loop_problems(trainer: Any, pl_module: Any, optimizer: SecondOrderOptimizer) -> Iterator[str]:
    """Settings that optimizers with several evaluations per step do not support."""
    if not isinstance(optimizer, FlatOptimizer) or not pl_module.automatic_optimization:
        return
    if _accumulates(trainer):
        yield (
            f"accumulate_grad_batches={trainer.accumulate_grad_batches}: a step evaluates its "
            "closure several times, and the closure has only the last batch; use "
            "accumulate_grad_batches=1 with larger batches, or SOAP, Shampoo, KFAC, "
            "AdaHessian or Sophia, which evaluate once"
        )
    if trainer.gradient_clip_val:
        yield (
            f"gradient_clip_val={trainer.gradient_clip_val}: a clipped gradient is not the "
            "gradient of the loss, and line searches and trust regions compare the two; remove it: "
            "they bound the steps already, as damping does"
        )
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        yield (
            "training_step(dataloader_iter): each evaluation of a step would fetch another batch; "
            "use the signature (batch, batch_idx)"
        )
