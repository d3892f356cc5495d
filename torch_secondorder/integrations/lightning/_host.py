"""The base class of the callbacks, accepted by both Lightning packages, and the optimizers."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch_secondorder._optim.wrapper import WrapperOptimizer
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
    """The trainer's optimizers that belong to this package, by unique names, without wrappers.

    Args:
        trainer: A trainer from either package, with its optimizers set up.
    """
    found = [layers[-1] for layers in _layers(trainer)]
    return _named([each for each in found if isinstance(each, SecondOrderOptimizer)])


def our_wrappers(trainer: Any) -> dict[str, WrapperOptimizer]:
    """The wrappers of this package around the trainer's optimizers, likewise; see `innermost`."""
    found = [layer for layers in _layers(trainer) for layer in layers[:-1]]
    return _named([each for each in found if isinstance(each, WrapperOptimizer)])


def innermost(optimizer: Any) -> Any:
    """The optimizer inside all wrappers, this package's and Lightning's."""
    while (inside := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inside
    return optimizer


def _layers(trainer: Any) -> Iterator[list[Any]]:
    """Each optimizer of the trainer: its wrappers from outside in, and what they wrap."""
    for optimizer in trainer.optimizers:
        # `configure_optimizers` may return them in Lightning's wrapper, which takes on the class.
        layers = [optimizer]
        while (inside := getattr(layers[-1], "optimizer", None)) is not None:
            layers.append(inside)
        classes = type(optimizer).__mro__
        lightnings = any(each.__name__ == "LightningOptimizer" for each in classes)
        yield layers[1:] if lightnings else layers


def _named(found: list[Any]) -> dict[str, Any]:
    """Objects by the names of their classes, numbered where there are several of one class."""
    named: dict[str, Any] = {}
    for each in found:
        name = type(each).__name__
        same = sum(type(other) is type(each) for other in named.values())
        named[f"{name}-{same}" if same else name] = each
    return named
