"""Extra runs of a module's `training_step`, without a trace in logs, metrics or random numbers."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from torch_secondorder._foundation.private_torch import pytree


def loss_of(trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> Callable[[], Any]:
    """A closure for the loss of a batch, in the trainer's precision and over all of its ranks.

    Args:
        trainer: The trainer, while it is fitting.
        pl_module: Its module, with automatic optimization.
        batch: The batch, on the device.
        batch_idx: Its number.

    Raises:
        TypeError: From the closure: `training_step` returned no loss.
    """
    takes_index = len(inspect.signature(pl_module.training_step).parameters) > 1
    arguments = (batch, batch_idx) if takes_index else (batch,)

    def closure() -> Any:
        # Cloned, so that in-place changes of the batch do not reach the actual step.
        output = trainer.strategy.training_step(*cloned(arguments))
        loss = output.get("loss") if isinstance(output, dict) else output
        if loss is None:
            raise TypeError("training_step returned no loss, so there is no curvature")
        return loss

    return closure


def cloned(batch: Any) -> Any:
    """A copy of a batch with cloned tensors."""
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, batch)


@contextmanager
def unnoticed(pl_module: Any) -> Iterator[None]:
    """A context in which nothing is logged; restores metrics and random states on exit.

    Random states are those of torch, NumPy and Python. Gradients and buffers are not restored here:
    diagnostics do that.

    Args:
        pl_module: The module.
    """
    with ExitStack() as stack:
        stack.enter_context(_random_states_kept(pl_module))
        for name in ("log", "log_dict"):
            stack.enter_context(replaced(pl_module, name, lambda *_, **__: None))
        for module in pl_module.modules():
            if _is_metric(module):
                kept = {k: _copied(v) for k, v in vars(module).items()}
                stack.callback(vars(module).update, kept)
        yield


def _random_states_kept(pl_module: Any) -> Any:
    """Lightning's context that restores random states."""
    for kind in type(pl_module).__mro__:
        if kind.__name__ == "LightningModule":
            package = kind.__module__.rpartition(".core.")[0]
            return importlib.import_module(f"{package}.utilities.seed").isolate_rng()
    raise TypeError(f"{type(pl_module).__name__} is not a LightningModule")


@contextmanager
def replaced(instance: Any, name: str, value: Any) -> Iterator[None]:
    """A context in which an instance has another attribute."""
    own = vars(instance)
    missing = object()
    before = own.get(name, missing)
    own[name] = value
    try:
        yield
    finally:
        if before is missing:
            del own[name]
        else:
            own[name] = before


def _is_metric(module: nn.Module) -> bool:
    """True for metrics of torchmetrics, which keep their state in plain attributes."""
    return any(
        kind.__name__ == "Metric" and kind.__module__.startswith("torchmetrics.")
        for kind in type(module).__mro__
    )


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return list(value) if isinstance(value, list) else value
