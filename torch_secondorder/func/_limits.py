"""What can be refused before any work is done: arguments, and results that no memory holds."""

from __future__ import annotations

import os
from typing import Literal, get_args

import torch

__all__ = ["Mode", "check_chunk_size", "check_mode", "check_size", "free_memory", "spans"]

Mode = Literal["auto", "forward", "reverse"]

_SMALL = 2**26  # bytes; below, nobody is asked how much memory is free
_MOST = 2**31  # elements; beyond, indices of many kernels overflow


def check_mode(mode: str) -> None:
    """Raises ValueError for a mode that there is not."""
    if mode not in get_args(Mode):
        raise ValueError(f"mode is one of {get_args(Mode)}, got {mode!r}")


def check_chunk_size(chunk_size: int | None) -> None:
    """Raises ValueError for a number that nothing can be cut into."""
    whole = isinstance(chunk_size, int) and not isinstance(chunk_size, bool)
    if chunk_size is not None and not (whole and chunk_size >= 1):
        raise ValueError(
            f"chunk_size is how many rows or columns are made at once, an integer of at least 1, "
            f"or None for all of them; got {chunk_size!r}"
        )


def check_size(
    name: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device, instead: str
) -> None:
    """Raises where a matrix cannot be held.

    Args:
        name: What the matrix is, for the error.
        rows: Its rows.
        columns: Its columns.
        dtype: That of its entries.
        device: Where it would be.
        instead: What to do instead, for the error.

    Raises:
        MemoryError: It has over 2**31 elements, or takes more than what is free.
    """
    elements = rows * columns
    size = elements * dtype.itemsize
    if size <= _SMALL:
        return
    free = free_memory(device)
    if elements > _MOST or size > free:
        limit = f"{free / 2**30:,.1f} GiB are free" if size > free else "2**31 is the most"
        raise MemoryError(
            f"{name} would have {rows:,} x {columns:,} = {elements:,} elements, "
            f"{size / 2**30:,.1f} GiB, and {limit}: {instead}"
        )


def free_memory(device: torch.device) -> float:
    """Bytes that can be allocated on a device; infinite where nobody says."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    if device.type != "cpu":
        return float("inf")
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = next(line for line in lines if line.startswith("MemAvailable:"))
        return 1024.0 * int(found.split()[1])
    except (OSError, StopIteration, ValueError, IndexError):
        pass
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return float("inf")


def spans(total: int, chunk_size: int | None) -> list[tuple[int, int]]:
    """Ranges of at most `chunk_size` places that cover `total`."""
    step = total if chunk_size is None else chunk_size
    return [(start, min(start + step, total)) for start in range(0, total, max(step, 1))]
