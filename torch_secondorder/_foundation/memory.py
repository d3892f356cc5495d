"""Estimates of memory, made before anything is allocated."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch

_SMALL = 2**26  # bytes; below, nobody is asked how much memory there is
_MOST = 2**31  # elements; beyond, indices of many kernels overflow


class TooLarge(MemoryError, ValueError):
    """A tensor does not fit into memory. Another argument helps, as the message says."""


def check_fits(
    name: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    instead: str,
    *,
    with_gradient: bool = False,
) -> None:
    """Raises where a tensor cannot be held.

    Args:
        name: The tensor, for the error.
        shape: Its shape.
        dtype: Its dtype.
        device: Its device.
        instead: The way out, for the error.
        with_gradient: Whether its gradient is held as well. As that is made later, when other
            memory is free, both have to fit into all the memory of the device.

    Raises:
        TooLarge: It has over 2**31 elements, or takes more memory than there is.
    """
    elements = math.prod(shape)
    size = elements * dtype.itemsize * (2 if with_gradient else 1)
    if size <= _SMALL:
        return
    room = total_memory(device) if with_gradient else free_memory(device)
    if size > room:
        limit = f"{device} has {_gib(room)}" if with_gradient else f"{_gib(room)} are free"
    elif elements > _MOST and not with_gradient:
        limit = "2**31 is the most"
    else:
        return
    sizes = " x ".join(f"{n:,}" for n in shape)
    also = " with the gradient" if with_gradient else ""
    raise TooLarge(
        f"{name} would have {sizes} = {elements:,} elements, {_gib(size)}{also}, and {limit}: "
        f"{instead}"
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"


def free_memory(device: torch.device) -> float:
    """The bytes that can be allocated on a device; infinity where the system does not tell."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    if device.type != "cpu":
        return math.inf
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = next(line for line in lines if line.startswith("MemAvailable:"))
        return 1024.0 * int(found.split()[1])
    except (OSError, StopIteration, ValueError, IndexError):
        return total_memory(device)


def total_memory(device: torch.device) -> float:
    """The bytes of memory that a device has; infinity where the system does not tell."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return math.inf
