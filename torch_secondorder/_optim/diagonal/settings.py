"""Hyperparameters of optimizers that evaluate once a step: defaults, and changes between steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

#: Hyperparameters that every such optimizer has, unless it gives others.
DEFAULTS = {
    "weight_decay": 0.0,
    "update_period": 1,
    "seed": 0,
    "accumulation_steps": 1,
    "maximize": False,
    "capturable": None,
}
#: Types of hyperparameters that do not change in place.
_IMMUTABLE = frozenset({bool, float, int, str, type(None), torch.dtype})


def settings_of(groups: Sequence[dict[str, Any]], names: Iterable[str]) -> list[object]:
    """A list that is equal for two steps only if no hyperparameter has changed between them.

    Args:
        groups: The groups.
        names: The names of the hyperparameters.
    """
    names = list(names)
    settings: list[object] = []
    for group in groups:
        settings += map(type, group["params"][:1])  # parameters may be sharded later
        settings.append(group.get("bounds") is None)
        for name in names:
            value = group.get(name)
            for entry in value if isinstance(value, (list, tuple)) else (value,):
                settings.append(entry if type(entry) in _IMMUTABLE else _mark(entry))
    return settings


def _mark(entry: object) -> object:
    """A number that may change in place; it is checked again if it may have changed."""
    if isinstance(entry, Tensor) and not entry.is_inference():
        return id(entry), entry._version  # reading its value would wait for the device
    return object()
