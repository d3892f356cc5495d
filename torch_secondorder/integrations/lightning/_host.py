"""The base class of the callbacks, accepted by both Lightning packages, and the optimizers."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch_secondorder.optim import SecondOrderOptimizer

#: The same code under two names; neither accepts objects of the other.
_HOSTS = ("lightning.pytorch", "pytorch_lightning")


def found_bases(hosts: tuple[str, ...] = _HOSTS) -> tuple[type, ...]:
    """The `Callback` classes of all installed Lightning packages.

    Args:
        hosts: Names of the packages.

    Raises:
        ImportError: None is installed.
    """
    found: list[type] = []
    for name in hosts:
        try:
            first = not found and not any(host in sys.modules for host in hosts)
            with nullcontext() if first else _logger_kept():
                found.append(importlib.import_module(f"{name}.callbacks").Callback)
        except ImportError as error:
            reason = error
    if not found:
        raise ImportError(
            "torch_secondorder.integrations.lightning needs Lightning: pip install lightning"
        ) from reason
    return tuple(found)


@contextmanager
def _logger_kept() -> Iterator[None]:
    """Restores the logger that both packages share; importing one sets it to its own."""
    shared: Any = importlib.import_module("lightning_utilities.core.rank_zero")
    before = shared.log
    try:
        yield
    finally:
        shared.log = before


if TYPE_CHECKING:

    class Callback:
        """Lightning's base class, from either package."""

else:
    Callback = type(
        "Callback",
        found_bases(),
        {"__doc__": "A callback of every installed Lightning.", "__module__": __name__},
    )


def our_optimizers(trainer: Any) -> dict[str, SecondOrderOptimizer]:
    """The trainer's optimizers that belong to this package, by unique names.

    Args:
        trainer: A trainer from either package, with its optimizers set up.
    """
    found: dict[str, SecondOrderOptimizer] = {}
    for optimizer in trainer.optimizers:
        # `configure_optimizers` may return them in Lightning's wrapper.
        bare = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(bare, SecondOrderOptimizer):
            continue
        name = type(bare).__name__
        same = sum(type(other) is type(bare) for other in found.values())
        found[f"{name}-{same}" if same else name] = bare
    return found
