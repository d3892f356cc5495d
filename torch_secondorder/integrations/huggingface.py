"""Optimizers that evaluate once a step in the Hugging Face Trainer, whose loop has no closure.

    sophia = (Sophia, {"lr": 1e-3})
    trainer = Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=sophia)
    trainer.add_callback(SecondOrderCallback(trainer))
    trainer.train()

SOAP and Shampoo take nothing but gradients, and need no callback.

Loops written with accelerate do not need this module. Pass a closure to any optimizer, with
`accelerator.backward(loss)` instead of `loss.backward()` and all micro-batches inside:

    model, optimizer = accelerator.prepare(model, LBFGS(model.parameters()))
    optimizer.step(closure)

KFAC, AdaHessian and Sophia also work without a closure: run the forward and backward pass of each
micro-batch inside `with accelerator.accumulate(model), sophia.watching():`, where `sophia` is the
prepared optimizer.

This module needs `transformers` and `accelerate`; no other module of the package imports it.
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


def __dir__() -> list[str]:
    return __all__


class SecondOrderCallback(TrainerCallback):
    """Shows KFAC, AdaHessian and Sophia the backward passes of a `transformers.Trainer`.

    During training, `trainer.training_step` runs inside `optimizer.watching()`. In steps that
    update the curvature, the optimizer estimates it when the trainer calls `backward()`, over all
    micro-batches of gradient accumulation, and keeps no graph. All other steps are unchanged, as is
    the trainer's handling of gradients, such as clipping. The configuration is checked at the start
    of training. Optimizers of other packages are ignored.

    Give the optimizer to the trainer as `optimizer_cls_and_kwargs=(Sophia, {"lr": 1e-3})`, with all
    its arguments except `weight_decay`, which belongs to `TrainingArguments`, or as
    `optimizers=(optimizer, None)`.

    Args:
        trainer: The trainer that the callback is added to. It may be of a subclass of
            `transformers.Trainer` whose `training_step` runs both forward and backward pass.

    Raises:
        TypeError: The argument is not a `transformers.Trainer`.
        RuntimeError: At the start of training: the configuration is not supported.
    """

    def __init__(self, trainer: Trainer) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(
                f"SecondOrderCallback takes the trainer that it is added to, got "
                f"{type(trainer).__name__}: trainer.add_callback(SecondOrderCallback(trainer))"
            )
        self._trainer = trainer
        self._replacement: Callable[..., Any] | None = None  # of the trainer's `training_step`

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks the configuration, and replaces the trainer's `training_step`."""
        self._leave()  # an exception may have ended an earlier training
        optimizer = unwrapped(self._trainer.optimizer)
        if not isinstance(optimizer, SecondOrderOptimizer):
            return
        optimizer = self._checked(optimizer)
        training_step = self._trainer.training_step

        def watched_training_step(*args: Any, **kwargs: Any) -> Any:
            with optimizer.watching():
                return training_step(*args, **kwargs)

        # Not a context that callbacks open and close: an exception would leave it open.
        self._replacement = watched_training_step
        vars(self._trainer)["training_step"] = watched_training_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restores the trainer."""
        self._leave()

    def _leave(self) -> None:
        own = vars(self._trainer)
        if self._replacement is not None and own.get("training_step") is self._replacement:
            del own["training_step"]
        self._replacement = None

    def _checked(self, optimizer: SecondOrderOptimizer) -> DiagonalOptimizer:
        name, accelerator = type(optimizer).__name__, self._trainer.accelerator
        if not isinstance(optimizer, DiagonalOptimizer):
            raise RuntimeError(
                f"{name} evaluates the loss more than once a step, and the Trainer, which passes "
                "no closure, evaluates it once: use SOAP, Shampoo, KFAC, AdaHessian or Sophia "
                "here, or write the loop with accelerate and call optimizer.step(closure), which "
                f"works for {name}"
            )
        if not optimizer._estimates:
            self._check_parameters(name)
            return optimizer
        if accelerator.distributed_type in _ENGINES:
            raise RuntimeError(
                f"{name} under {accelerator.distributed_type.value}: its backward pass hides the "
                "graph of the gradients, from which the curvature comes; use "
                "DistributedDataParallel"
            )
        if accelerator.scaler is not None or accelerator.mixed_precision == "fp16":
            raise RuntimeError(
                f"{name} with fp16=True: the loss scale of float16 cannot be removed from the "
                "curvature; train with bf16=True, which needs no loss scale"
            )
        return optimizer

    def _check_parameters(self, name: str) -> None:
        """Raises a RuntimeError where an engine replaces the parameters by flat vectors."""
        accelerator = self._trainer.accelerator
        engine = accelerator.distributed_type
        if engine in _ENGINES and not getattr(accelerator, "is_fsdp2", False):
            raise RuntimeError(
                f"{name} under {engine.value}: it preconditions matrices, which this engine joins "
                "to flat vectors; use DistributedDataParallel, or FSDP with fsdp_version=2"
            )


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside the wrapper that `accelerator.prepare` returns.

    It has `info` and `watching`.

    Args:
        optimizer: The optimizer, wrapped or not; `trainer.optimizer` for instance.

    Returns:
        The optimizer that you passed in.
    """
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer
