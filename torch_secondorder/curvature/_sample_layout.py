"""The rows of an operation that belong to each sample of the outputs, found by trying."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Layout", "Probe", "layouts"]

# Rows whose gradient is so much smaller than the largest are rounding errors of zeros.
_NOTHING = 1e-12
# The share of rows that may be unclear.
_UNCLEAR = 0.02
# Digits that a ratio of two gradients is sure to tell apart, how far it may be off, and an odd
# number that spreads the digits: samples beside one another get weights far apart.
_PRECISION = {torch.float64: (2**16, 1e-8, 40503), torch.float32: (2**6, 1e-3, 37)}


@dataclass(frozen=True, slots=True)
class Layout:
    """The places of the rows of each sample among all rows of an operation.

    Attributes:
        samples: How many samples.
        total: The number of all rows.
        each: The number of rows of a sample; those with fewer are filled up with zeros.
        start: The first row of the first sample, where `index` is None.
        inner: Whether a sample's rows follow one another; else they are `samples` rows apart.
        index: The rows, `(samples * each,)`; the number after the last row for one of zeros. None
            where they are regular.
        padded: Whether the index has rows of zeros.
    """

    samples: int
    total: int
    each: int
    start: int = 0
    inner: bool = True
    index: Tensor | None = None
    padded: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """From `(..., rows, width)` to `(..., samples, each, width)`."""
        if self.index is not None:
            if self.padded:
                tensor = torch.cat([tensor, torch.zeros_like(tensor[..., :1, :])], dim=-2)
            return torch.unflatten(tensor[..., self.index, :], -2, (self.samples, self.each))
        count = self.samples * self.each
        if count != tensor.shape[-2]:
            tensor = tensor.narrow(-2, self.start, count)
        if self.inner:
            return torch.unflatten(tensor, -2, (self.samples, self.each))
        return torch.unflatten(tensor, -2, (self.each, self.samples)).transpose(-3, -2)


class Probe:
    """Weights of samples that tell which sample a gradient belongs to.

    A gradient by a row that depends on one sample alone is multiplied by the weight of that sample.
    The weights are digits of the number of the sample in some base, so that rounding errors do not
    matter.

    Args:
        samples: How many samples.
        dtype: Of the outputs.
    """

    def __init__(self, samples: int, dtype: torch.dtype) -> None:
        self._base, self._tolerance, self._spread = _PRECISION[dtype]
        self._samples = samples
        self.count = max(1, math.ceil(math.log(max(samples, 2), self._base) - 1e-9))

    def weights(self, device: torch.device) -> Tensor:
        """Shape `(count, samples)`, between one and two."""
        rest = torch.arange(self._samples, device=device)
        rows = []
        for _ in range(self.count):
            rows.append(1 + (rest * self._spread % self._base).double() / self._base)
            rest = rest // self._base
        return torch.stack(rows)

    def owners(
        self, deltas: Tensor, weighted: Sequence[Tensor], noise: float = 0.0
    ) -> Tensor | None:
        """The sample that each row belongs to; -1 for none; None where a row is of several.

        Args:
            deltas: Gradients `(rows, width)`.
            weighted: The same with the samples weighted, `count` of them.
            noise: Rows of smaller norm may be rounding errors.
        """
        largest = deltas.abs().amax() if deltas.numel() else deltas.new_zeros(())
        scale = torch.where(largest > 0, largest, 1.0)
        deltas = deltas / scale
        squares = deltas.square().sum(1)
        norms = squares.sqrt()
        least = torch.maximum(_NOTHING * norms.amax(), noise / scale) if len(norms) else scale
        nothing = norms <= least
        owner = torch.zeros_like(squares, dtype=torch.long)
        fits = torch.ones_like(nothing)
        unit, gathered = 1, pow(self._spread, -1, self._base)
        for other in weighted:
            other = other / scale
            ratio = (other * deltas).sum(1) / torch.where(squares > 0, squares, 1.0)
            digit = ((ratio - 1) * self._base).round()
            expected = (1 + digit / self._base)[:, None] * deltas
            error = torch.linalg.vector_norm(other - expected, dim=1)
            fits &= (error <= self._tolerance * norms) & (digit >= 0) & (digit < self._base)
            owner += digit.nan_to_num().long() * gathered % self._base * unit
            unit *= self._base
        fits &= owner < self._samples
        # Of gradients that are nearly zero, by cancellation, the digits may be wrong as well: few
        # of them are taken for unknown, and get the sample that the pattern of all others says.
        unclear = ~(fits | nothing)
        large = norms > self._tolerance**0.5 * norms.amax() if len(norms) else unclear
        several, wrong = torch.stack([unclear.sum(), (unclear & large).sum()]).tolist()
        if wrong or several > _UNCLEAR * len(norms):
            return None
        return torch.where(fits & (norms > 0), owner, -1)


def layouts(owner: Tensor, counts: Sequence[int]) -> tuple[dict[int, Layout], Tensor]:
    """The layouts of several outputs, from the owners of all rows.

    Args:
        owner: Shape `(rows,)`, samples of all outputs counted in order; -1 for none.
        counts: The number of samples of each output.

    Returns:
        One for each output that owns a row; and the rows of which nothing is known, without those
        that a pattern of most of the samples says.
    """
    found: dict[int, Layout] = {}
    begin = 0
    silent = owner < 0
    for i, samples in enumerate(counts):
        own = torch.where((owner >= begin) & (owner < begin + samples), owner - begin, -1)
        (rows,) = (own >= 0).nonzero(as_tuple=True)
        if len(rows):
            alone = not bool(((owner >= 0) & (own < 0)).any())
            # Those of other outputs are in no pattern.
            known = torch.where((owner >= 0) & (own < 0), samples, own)
            layout = _regular(known, rows, samples, alone) or _irregular(own, rows, samples)
            # A few rows fit into many patterns.
            if layout.index is None and 2 * len(own[rows].unique()) > samples:
                silent[layout.start : layout.start + samples * layout.each] = False
            found[i] = layout
        begin += samples
    return found, silent.nonzero(as_tuple=True)[0]


def _regular(own: Tensor, rows: Tensor, samples: int, alone: bool) -> Layout | None:
    """A layout without an index, if the rows that are known fit into one.

    Rows whose gradient happens to be zero belong to nobody yet; they are taken along, as they would
    be zeros again or turn out to be what the pattern says.
    """
    ranges = [(int(rows[0]), int(rows[-1]) + 1)]
    if alone:
        ranges.insert(0, (0, len(own)))
    for first, last in ranges:
        each, rest = divmod(last - first, samples)
        if rest or not each:
            continue
        known = own[first:last]
        numbers = torch.arange(len(known), device=own.device)
        for inner, expected in ((True, numbers // each), (False, numbers % samples)):
            if bool(((known == expected) | (known < 0)).all()):
                return Layout(samples, len(own), each, first, inner)
    return None


def _irregular(own: Tensor, rows: Tensor, samples: int) -> Layout:
    owners = own[rows]
    order = owners.argsort(stable=True)
    counts = torch.bincount(owners, minlength=samples)
    each = int(counts.amax())
    index = torch.full((samples, each), len(own), device=own.device)
    owners, rows = owners[order], rows[order]
    starts = counts.cumsum(0) - counts
    index[owners, torch.arange(len(rows), device=own.device) - starts[owners]] = rows
    return Layout(
        samples, len(own), each, index=index.reshape(-1), padded=len(rows) != samples * each
    )
