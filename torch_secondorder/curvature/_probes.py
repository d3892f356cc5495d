"""Random vectors to probe a matrix with."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

from torch_secondorder._foundation.buffer_pool import BufferPool

__all__ = ["Distribution", "draw", "rademacher"]

Distribution = Literal["rademacher", "gaussian"]

# For each dtype an integer of its size, and its bits.
_INTEGERS = {torch.float32: (torch.int32, 32), torch.float64: (torch.int64, 64)}


def draw(
    size: int,
    distribution: Distribution,
    generator: torch.Generator | None,
    buffer_pool: BufferPool | None = None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """A random vector with independent entries of mean zero and variance one, `(size,)`.

    Args:
        size: Its length.
        distribution: `"rademacher"` for random signs, the choice of least variance in Hutchinson's
            estimator, or `"gaussian"`.
        generator: Where randomness comes from; torch's own if None.
        buffer_pool: Where to take memory from.
        dtype: Of the vector: float32 or float64.
        device: Of the vector.
    """
    if distribution == "rademacher":
        return rademacher(size, generator, buffer_pool, dtype=dtype, device=device)
    source = device if generator is None else generator.device
    return torch.randn(size, dtype=dtype, device=source, generator=generator).to(device)


def rademacher(
    size: int,
    generator: torch.Generator | None,
    buffer_pool: BufferPool | None = None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Random signs, `(size,)`, one random bit for each.

    Drawing a number for each sign takes longer than a small network's gradient. Words of 64 random
    bits are shifted so that each bit comes to stand where a floating-point number has its sign.
    """
    integer, bits = _INTEGERS[dtype]
    source = device if generator is None else generator.device
    count = -(-size // 64)
    words = torch.empty(count, dtype=torch.int64, device=source)
    words = words.random_(-(2**63), None, generator=generator).to(device).view(integer)
    room = (buffer_pool or BufferPool()).empty("signs", count * 64, dtype, device)
    one, shifts = _constants(integer, bits, dtype, device)
    torch.bitwise_left_shift(words, shifts, out=room.view(integer).view(bits, -1))
    # Whatever number the bits make, NaN included, its sign is theirs.
    return torch.copysign(one, room, out=room)[:size]


@cache
def _constants(
    integer: torch.dtype, bits: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    shifts = torch.arange(bits, dtype=integer, device=device).unsqueeze(1)
    return torch.ones((), dtype=dtype, device=device), shifts
