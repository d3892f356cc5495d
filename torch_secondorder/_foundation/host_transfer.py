"""Numbers brought from a device to the host, several in one transfer."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

_is_on_cpu = attrgetter("is_cpu")
_ROOM = 1024  # bytes of page-locked memory for each thread; more numbers than that go without


class _Landing(threading.local):
    """Page-locked memory of one thread, used again for each transfer.

    A copy into ordinary memory goes through a buffer of the driver, and needs a new tensor.
    """

    def __init__(self) -> None:
        self._views: dict[tuple[torch.dtype, int], Tensor] = {}
        self._memory: Tensor | None = None

    def view(self, dtype: torch.dtype, count: int, *, pinned: bool = True) -> Tensor | None:
        """Memory for `count` numbers; None if they do not fit."""
        found = self._views.get((dtype, count))
        if found is None and count * dtype.itemsize <= _ROOM:
            # An inference tensor could not be written to later.
            with torch.inference_mode(False):
                if self._memory is None:
                    self._memory = torch.empty(
                        _ROOM, dtype=torch.uint8, device="cpu", pin_memory=pinned
                    )
                found = self._memory[: count * dtype.itemsize].view(dtype)
            self._views[dtype, count] = found
        return found


_landing = _Landing()


def read_numbers(*numbers: Tensor) -> list[float]:
    """Brings 0-dim tensors to the host as Python numbers, with one wait for all of them.

    Use it wherever two or more numbers are read: each `item()` on a GPU waits for all kernels
    before it, so that the next ones cannot be prepared meanwhile.

    Args:
        numbers: Real, of any dtypes, on any devices. Integers beyond 2**53 are rounded if they are
            brought together with other dtypes.

    >>> read_numbers(torch.tensor(0.5), torch.tensor(7))
    [0.5, 7]
    """
    if all(map(_is_on_cpu, numbers)):
        return list(map(Tensor.item, numbers))  # quicker than joining them
    return read_vector(joined(numbers))


def joined(numbers: Sequence[Tensor]) -> Tensor:
    """0-dim tensors as one vector on the device of the first that is on one.

    Their dtype is kept if they share it; if not, they become float64, which holds all of them but
    integers beyond 2**53.
    """
    device = next((n.device for n in numbers if not n.is_cpu), numbers[0].device)
    dtype = numbers[0].dtype
    if any(number.dtype != dtype for number in numbers):
        dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.stack([number.to(device, dtype) for number in numbers])


def read_vector(vector: Tensor) -> list[float]:
    """Brings a short vector to the host as Python numbers.

    Args:
        vector: Shape `(n,)`.

    >>> read_vector(torch.tensor([0.5, 0.25]))
    [0.5, 0.25]
    """
    landing = None
    if vector.is_cuda and type(vector) is Tensor:  # not so for tensors without memory (fake ones)
        landing = _landing.view(vector.dtype, len(vector))
    if landing is None:
        result: list[float] = vector.tolist()
        return result
    landing.copy_(vector.detach(), non_blocking=True)
    torch.cuda.current_stream(vector.device).synchronize()
    result = landing.tolist()
    return result
