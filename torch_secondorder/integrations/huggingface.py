"""The Hugging Face Trainer: AdaHessian and Sophia in its loop, which has no closure.

    sophia = (Sophia, {"lr": 1e-3})
    trainer = Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=sophia)
    trainer.add_callback(SecondOrderCallback(trainer))
    trainer.train()

Loops written with accelerate need nothing from here. Every optimizer takes a closure there, with
`accelerator.backward(loss)` in the place of `loss.backward()` and all micro-batches inside:

    model, optimizer = accelerator.prepare(model, LBFGS(model.parameters()))
    optimizer.step(closure)

AdaHessian and Sophia also go without: forward and backward pass of each micro-batch run inside
`with accelerator.accumulate(model), sophia.watching():`, where `sophia` is what was prepared.

This module needs `transformers` and `accelerate`; nothing else of the package imports it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from transformers import Trainer, TrainerCallback

from torch_secondorder._optim.diagonal.base import DiagonalOptimizer
from torch_secondorder.optim import SecondOrderOptimizer

__all__ = ["SecondOrderCallback", "unwrapped"]

_ENGINES = {DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM}


class SecondOrderCallback(TrainerCallback):
    """Lets AdaHessian and Sophia see the backward passes of a `transformers.Trainer`.

    While it trains, `trainer.training_step` runs inside `optimizer.watching()`: in steps where the
    curvature is due it is estimated as the trainer calls `backward()`, over all micro-batches of
    gradient accumulation, and no graph is kept. All other steps run untouched, and so does what the
    trainer does with gradients, clipping for one. At the start of training the configuration is
    checked. Other optimizers than those of this package are let alone.

    Give the optimizer to the trainer as `optimizer_cls_and_kwargs=(Sophia, {"lr": 1e-3})`, with all
    its arguments but `weight_decay`, which `TrainingArguments` has, or as `optimizers=(optimizer,
    None)`.

    Args:
        trainer: The trainer that it is added to, also one of a subclass of `transformers.Trainer`
            whose `training_step` runs both forward and backward pass.

    Raises:
        TypeError: Not a `transformers.Trainer`.
        RuntimeError: At the start of training: something in its configuration cannot work.
    """

    def __init__(self, trainer: Trainer) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(
                f"SecondOrderCallback takes the trainer that it is added to, got "
                f"{type(trainer).__name__}: trainer.add_callback(SecondOrderCallback(trainer))"
            )
        self._trainer = trainer
        self._inside: Callable[..., Any] | None = None  # what stands in for its training_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks the configuration, and begins to watch."""
        self._leave()  # an exception may have ended an earlier training
        optimizer = unwrapped(self._trainer.optimizer)
        if not isinstance(optimizer, SecondOrderOptimizer):
            return
        optimizer = self._checked(optimizer)
        training_step = self._trainer.training_step

        def watched_training_step(*args: Any, **kwargs: Any) -> Any:
            with optimizer.watching():
                return training_step(*args, **kwargs)

        # On the instance: a context that callbacks opened and closed would survive an exception.
        self._inside = watched_training_step
        vars(self._trainer)["training_step"] = watched_training_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leaves the trainer as it was."""
        self._leave()

    def _leave(self) -> None:
        if self._inside is not None and vars(self._trainer).get("training_step") is self._inside:
            del vars(self._trainer)["training_step"]
        self._inside = None

    def _checked(self, optimizer: SecondOrderOptimizer) -> DiagonalOptimizer:
        name, accelerator = type(optimizer).__name__, self._trainer.accelerator
        if not isinstance(optimizer, DiagonalOptimizer):
            raise RuntimeError(
                f"{name} evaluates the loss more than once a step, and the Trainer, which passes "
                "no closure, evaluates it once: use AdaHessian or Sophia here, or write the loop "
                f"with accelerate, where optimizer.step(closure) works for {name}"
            )
        if accelerator.distributed_type in _ENGINES:
            raise RuntimeError(
                f"{name} under {accelerator.distributed_type.value}: its backward pass does not "
                "show the gradients' graph, so that there would be no curvature; use "
                "DistributedDataParallel"
            )
        if accelerator.scaler is not None or accelerator.mixed_precision == "fp16":
            raise RuntimeError(
                f"{name} with fp16=True: the scale of float16's losses cannot be taken out of the "
                "curvature; train with bf16=True, which needs none"
            )
        return optimizer


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside what `accelerator.prepare` made of it, with `info` and `watching`.

    Args:
        optimizer: Wrapped or not; `trainer.optimizer` for instance.
    """
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer
