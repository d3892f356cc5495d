"""Counts numbers that are read on the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: Operations for which the host waits for a device: numbers, shapes that depend on numbers, and
#: decompositions whose success is checked.
READING = frozenset(
    f"aten::{name}"
    for name in (
        "_local_scalar_dense",
        "equal",
        "allclose",
        "nonzero",
        "masked_select",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "bincount",
        "_linalg_check_errors",
        "_linalg_eigh",
        "_linalg_svd",
        "linalg_eig",
        "linalg_eigvals",
    )
)
#: Those of these that decompose or check.
CHECKING = frozenset(name for name in READING if "linalg" in name)
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


def reads(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True if the host waits for the result of an operation on tensors of a device.

    Copies are left to the caller, who knows where tensors are.
    """
    name = func._schema.name
    if name in READING:
        return True
    if name == "aten::repeat_interleave":
        return kwargs.get("output_size") is None
    if name in _INDEXING:
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return False


class HostReads(TorchDispatchMode):
    """Counts numbers that leave a device for the host. On the CPU all numbers are on the host.

    Copies from a device to the host cannot be told from others on the CPU: `SimulatedDevice`
    counts them.

    Args:
        optimizer: Its count of steps is on the host also on a device, and is left out.
        checks: Whether to count decompositions that check whether they have succeeded. On the CPU
            these cost nothing.
    """

    def __init__(self, optimizer: Any = None, *, checks: bool = False) -> None:
        super().__init__()
        states = () if optimizer is None else optimizer.state.values()
        self.host = {state["host_step"].data_ptr() for state in states if "host_step" in state}
        self.count = 0
        self._checks = checks

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if reads(func, args, kwargs) and (self._checks or func._schema.name not in CHECKING):
            first = args[0]
            self.count += not isinstance(first, Tensor) or first.data_ptr() not in self.host
        return func(*args, **kwargs)
