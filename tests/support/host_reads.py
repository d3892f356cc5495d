"""Counts numbers that are read on the host."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class HostReads(TorchDispatchMode):
    """Counts numbers that leave a device for the host. On the CPU all numbers are on the host.

    Args:
        optimizer: Its count of steps is on the host also on a device, and is left out.
    """

    def __init__(self, optimizer: Any = None) -> None:
        super().__init__()
        states = () if optimizer is None else optimizer.state.values()
        self.host = {state["host_step"].data_ptr() for state in states if "host_step" in state}
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal"):
            self.count += args[0].data_ptr() not in self.host
        return func(*args, **(kwargs or {}))
