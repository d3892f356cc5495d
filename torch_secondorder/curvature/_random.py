"""Random numbers: directions to probe a matrix with, and noise for the outputs of all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from torch_secondorder._closure.data_parallel import Ranks
from torch_secondorder._foundation.buffer_pool import BufferPool
from torch_secondorder._foundation.cached_tensors import cached_tensors

Distribution = Literal["rademacher", "gaussian"]
Kind = Literal["signs", "normal", "uniform"]
_KINDS: tuple[Kind, ...] = ("signs", "normal", "uniform")

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
        size: The length.
        distribution: `"rademacher"` for random signs, the choice of least variance in Hutchinson's
            estimator, or `"gaussian"`.
        generator: The source of random numbers; torch's own if None.
        buffer_pool: The source of memory; None for new memory.
        dtype: The dtype: float32 or float64.
        device: The device.
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
    if buffer_pool is None:
        room = torch.empty(count * 64, dtype=dtype, device=device)
    else:
        room = buffer_pool.empty("signs", count * 64, dtype, device)
    one, shifts = _constants(integer, bits, dtype, device)
    torch.bitwise_left_shift(words, shifts, out=room.view(integer).view(bits, -1))
    # The bits may make any number, NaN included; only its sign is used.
    return torch.copysign(one, room, out=room)[:size]


@cached_tensors
def _constants(
    integer: torch.dtype, bits: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    shifts = torch.arange(bits, dtype=integer, device=device).unsqueeze(1)
    return torch.ones((), dtype=dtype, device=device), shifts


class Noise(NamedTuple):
    """The random numbers that are needed.

    Attributes:
        kind: `"signs"`, `"normal"`, or `"uniform"` in [0, 1).
        shape: The shape, samples first.
        dtype: A floating-point type.
        device: The device that they are for.
    """

    kind: Kind
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def like(cls, tensor: Tensor, kind: Kind = "signs") -> Noise:
        """A request for as many numbers as a tensor has entries."""
        return cls(kind, tensor.shape, tensor.dtype, tensor.device)

    def drawn(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Numbers of this kind, `(count,)`, on the device of the generator."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        device = self.device if generator is None else generator.device
        if self.kind == "signs":
            return rademacher(count, generator, dtype=dtype, device=device)
        room = torch.empty(count, dtype=dtype, device=device)
        if self.kind == "normal":
            return room.normal_(generator=generator)
        return room.uniform_(generator=generator)


class Draws:
    """Draws the same kinds of random numbers again and again, on all ranks alike.

    The generators of all ranks are in the same state and stay so: each rank draws for the samples
    of all ranks, in their order, and keeps its own share. Two ranks with half a batch each thus
    draw the numbers that one process draws for the whole batch, and no two samples share numbers.

    If closures differ between ranks, so that they need numbers of different kinds, each rank draws
    those of the first rank, then those of the second, and so on.

    Args:
        needed: The requests of this rank; None for nothing.
        generator: The source of random numbers; torch's own if None.
        ranks: The ranks.
    """

    def __init__(
        self,
        needed: Sequence[Noise | None],
        generator: torch.Generator | None,
        ranks: Ranks | None = None,
    ) -> None:
        self._needed = needed
        self._generator = generator
        ranks = ranks or Ranks()
        self._own = ranks.own
        noises = [noise for noise in needed if noise is not None]
        device = noises[0].device if noises else generator.device if generator else None
        own = [number for noise in noises for number in _described(noise)]
        # For each rank the kinds and numbers of what it needs.
        self._all = [
            (row[::2], row[1::2])
            for row in (ranks.gather(own, device) if ranks.count > 1 else [own])
        ]
        self._alike = all(kinds == self._all[0][0] for kinds, _ in self._all)

    def __call__(self) -> list[Tensor | None]:
        """One draw: a tensor for each request."""
        drawn = iter(self._together() if self._alike else self._in_turn())
        return [
            None if noise is None else next(drawn).to(noise.device, noise.dtype).view(noise.shape)
            for noise in self._needed
        ]

    def _together(self) -> list[Tensor]:
        found = []
        noises = [noise for noise in self._needed if noise is not None]
        for place, noise in enumerate(noises):
            counts = [row[place] for _, row in self._all]
            values = noise.drawn(sum(counts), self._generator)
            start = sum(counts[: self._own])
            found.append(values[start : start + counts[self._own]])
        return found

    def _in_turn(self) -> list[Tensor]:
        found = []
        for rank, (kinds, counts) in enumerate(self._all):
            for kind, count in zip(kinds, counts, strict=True):
                values = _noise(kind, self._generator).drawn(count, self._generator)
                if rank == self._own:
                    found.append(values)
        return found


def _described(noise: Noise) -> tuple[int, int]:
    wide = torch.promote_types(noise.dtype, torch.float32) == torch.float64
    return 2 * _KINDS.index(noise.kind) + wide, math.prod(noise.shape)


def _noise(number: int, generator: torch.Generator | None) -> Noise:
    """A request made from the number of its kind, without a shape."""
    device = torch.device("cpu") if generator is None else generator.device
    dtype = torch.float64 if number % 2 else torch.float32
    return Noise(_KINDS[number // 2], torch.Size(), dtype, device)
