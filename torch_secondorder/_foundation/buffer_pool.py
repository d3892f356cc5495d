"""Memory that is used again from step to step."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_secondorder._foundation.private_torch import shares_storage

_SMALL = 2**20  # bytes; below, the C library keeps the memory anyway


class BufferPool:
    """Vectors that are written anew at each step.

    On a CPU the pages of a new vector of megabytes take longer to come by than the arithmetic on
    it. On a device, whose allocator keeps what is freed, each is a new one.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    @staticmethod
    def pays(size: int, dtype: torch.dtype, device: torch.device) -> bool:
        """True for a vector so large that its memory is better used again."""
        return device.type == "cpu" and size * dtype.itemsize > _SMALL

    def empty(self, name: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A vector with arbitrary entries, the same one at the next call with this name.

        Not the same one if somebody else still sees its memory.
        """
        kept = self._kept.get(name)
        fits = kept is not None and kept.numel() == size and kept.dtype == dtype
        if kept is None or not fits or kept.device != device or shares_storage(kept):
            kept = torch.empty(size, dtype=dtype, device=device)
            if device.type == "cpu":
                self._kept[name] = kept
        return kept
