"""Runs a module's `training_step` once more without a trace in logs, metrics or random numbers."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from torch_secondorder._foundation.private_torch import pytree

__all__ = ["cloned", "loss_of", "unnoticed"]


def loss_of(trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> Callable[[], Any]:
    """A closure that gives the loss of a batch, in the trainer's precision, over all of its ranks.

    Args:
        trainer: While it is fitting.
        pl_module: Its module, under automatic optimization.
        batch: On the device.
        batch_idx: Its number.

    Raises:
        TypeError: From the closure: `training_step` returned no loss.
    """
    takes_index = len(inspect.signature(pl_module.training_step).parameters) > 1
    arguments = (batch, batch_idx) if takes_index else (batch,)

    def closure() -> Any:
        # In place changes of the batch are not to be seen by the step itself.
        output = trainer.strategy.training_step(*cloned(arguments))
        loss = output.get("loss") if isinstance(output, dict) else output
        if loss is None:
            raise TypeError("training_step returned no loss, so that there is no curvature of it")
        return loss

    return closure


def cloned(batch: Any) -> Any:
    """The batch with copies of its tensors."""
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, batch)


@contextmanager
def unnoticed(pl_module: Any) -> Iterator[None]:
    """Within, nothing is logged; after it, metrics and random states are as before.

    Random states are those of torch, NumPy and Python. The parameters' gradients and the buffers
    are left to whoever evaluates.

    Args:
        pl_module: The module.
    """
    with ExitStack() as stack:
        stack.enter_context(_isolated(pl_module))
        for name in ("log", "log_dict"):
            stack.enter_context(_replaced(pl_module, name, _nothing))
        for module in pl_module.modules():
            if _is_metric(module):
                kept = {k: _copied(v) for k, v in vars(module).items()}
                stack.callback(vars(module).update, kept)
        yield


def _isolated(pl_module: Any) -> Any:
    """Lightning's own context for random states."""
    for kind in type(pl_module).__mro__:
        if kind.__name__ == "LightningModule":
            package = kind.__module__.rpartition(".core.")[0]
            return importlib.import_module(f"{package}.utilities.seed").isolate_rng()
    raise TypeError(f"{type(pl_module).__name__} is no LightningModule")


def _nothing(*_: Any, **__: Any) -> None:
    pass


@contextmanager
def _replaced(pl_module: Any, name: str, value: Any) -> Iterator[None]:
    own = vars(pl_module)
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
    """Whether this is a metric of torchmetrics, whose state is in plain attributes."""
    return any(
        kind.__name__ == "Metric" and kind.__module__.startswith("torchmetrics.")
        for kind in type(module).__mro__
    )


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return list(value) if isinstance(value, list) else value
