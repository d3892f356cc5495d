"""Reports: frozen dataclasses that print as a table."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from torch import Tensor

#: Vectors with at most this many entries are shown whole.
_SHORT = 4


@dataclass(frozen=True, slots=True)
class Report:
    """Base of the reports on what was computed: prints as a table, converts to a dict."""

    def as_dict(self) -> dict[str, Any]:
        """The fields as numbers and strings, for loggers.

        Enumerations are given by their names, tensors as numbers and lists of them.
        """
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    def __str__(self) -> str:
        """A table of the fields that have a value, one to a line."""
        rows = [(field.name, getattr(self, field.name)) for field in fields(self)]
        shown = [(name, _shown(value)) for name, value in rows if value is not None and value != ""]
        width = max(len(name) for name, _ in shown)
        indent = "\n" + " " * (width + 4)
        lines = [f"  {name:<{width}}  " + text.replace("\n", indent) for name, text in shown]
        return "\n".join([type(self).__name__, *lines])


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Tensor):
        return value.tolist()
    return value.as_dict() if isinstance(value, Report) else value


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return _shown_tensor(value)
    if isinstance(value, Enum):
        return f"{value.name}: {value.value}" if isinstance(value.value, str) else value.name
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _shown_tensor(tensor: Tensor) -> str:
    """The entries of a short vector; of others their range and the shape."""
    if not tensor.dim():
        return _shown(tensor.item())
    if tensor.dim() == 1 and len(tensor) <= _SHORT:
        return f"[{', '.join(map(_shown, tensor.tolist()))}]"
    shape = f"shape {tuple(tensor.shape)}"
    if not tensor.numel():
        return shape
    return f"from {_shown(tensor.min().item())} to {_shown(tensor.max().item())}, {shape}"
