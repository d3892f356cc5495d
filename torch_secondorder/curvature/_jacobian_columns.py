"""Columns of a Jacobian, those of one tensor, as sums of outer products or as a matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements of a temporary result, and the width of a narrow matrix.
_CACHED, _NARROW = 2**16, 4

__all__ = ["Columns", "DenseColumns", "FactoredColumns", "Pair", "Rows"]


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of some residuals: `samples * channels` of them, from `start` on.

    Attributes:
        start: The first row.
        samples: How many samples.
        channels: Rows of a sample.
        by_channels: Whether all rows of a channel come before the next channel; else all rows of a
            sample come before the next sample.
    """

    start: int
    samples: int
    channels: int
    by_channels: bool = False

    @property
    def stop(self) -> int:
        """The row after the last one."""
        return self.start + self.samples * self.channels

    def of(self, tensor: Tensor) -> Tensor:
        """The part of `(N, ...)` as a view `(samples, channels, ...)`."""
        own = tensor[self.start : self.stop]
        if self.by_channels:
            return torch.unflatten(own, 0, (self.channels, self.samples)).transpose(0, 1)
        return torch.unflatten(own, 0, (self.samples, self.channels))


class Columns(ABC):
    """Some columns of a Jacobian.

    Args:
        start: The first column.
        stop: The column after the last one.
    """

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop

    @property
    def width(self) -> int:
        """The number of columns."""
        return self.stop - self.start

    @abstractmethod
    def write(self, out: Tensor, output: int, begin: int = 0, end: int | None = None) -> None:
        """Fills `(samples, channels, width)` with the rows of some samples of one output."""

    @abstractmethod
    def pull(self, u: Tensor) -> Tensor:
        """`J'u`, from `(N,)` to `(width,)`."""

    @abstractmethod
    def add_push(self, v: Tensor, result: Tensor) -> None:
        """Adds `J v` to `(N,)`, with `v` of shape `(width,)`."""

    @abstractmethod
    def square(self) -> Tensor:
        """The square of a bound of the Frobenius norm."""

    @abstractmethod
    def squares(self) -> Tensor:
        """The sums of squares of each column, `(width,)`."""

    def some(self, vector: Tensor) -> tuple[Columns, Tensor]:
        """The columns or, where there are many, sums of some; with their part of `(n,)`."""
        return self, vector[self.start : self.stop]

    def pieces(self, widest: int) -> Iterator[Columns]:
        """The same columns in parts of at most so many, as far as they can be cut."""
        yield self


class DenseColumns(Columns):
    """Columns as a matrix.

    Args:
        start: The first column.
        matrix: Shape `(N, width)`.
        rows: Those of the outputs.
    """

    def __init__(self, start: int, matrix: Tensor, rows: Sequence[Rows]) -> None:
        super().__init__(start, start + matrix.shape[1])
        self._matrix, self._rows = matrix, rows

    def write(self, out: Tensor, output: int, begin: int = 0, end: int | None = None) -> None:
        """See `Columns.write`."""
        out.copy_(self._rows[output].of(self._matrix)[begin:end])

    def pull(self, u: Tensor) -> Tensor:
        """See `Columns.pull`."""
        return self._matrix.T @ u

    def add_push(self, v: Tensor, result: Tensor) -> None:
        """See `Columns.add_push`."""
        result.addmv_(self._matrix, v)

    def square(self) -> Tensor:
        """See `Columns.square`."""
        return self._matrix.square().sum()

    def squares(self) -> Tensor:
        """See `Columns.squares`."""
        return self._matrix.square().sum(0)


@dataclass(frozen=True, slots=True)
class Pair:
    """Rows as sums of outer products: `(n, c)` is `sum_s left[n, c, g, s] (x) right[n, c, g, s]`.

    Attributes:
        left: Shape `(samples, channels or 1, groups, each, p)`.
        right: Shape `(samples, channels or 1, groups, each, q)`; None for ones with `q = 1`.
    """

    left: Tensor
    right: Tensor | None

    @property
    def each(self) -> int:
        """The number of products in a sum."""
        return self.left.shape[-2]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Groups, `p` and `q`."""
        q = 1 if self.right is None else self.right.shape[-1]
        return self.left.shape[2], self.left.shape[-1], q

    def upright(self) -> Pair:
        """The same with `q = 1` where it is a vector that is multiplied with a number."""
        if self.right is not None and self.shape[:2] == (1, 1):
            return Pair(self.right, self.left)
        return self

    def squared(self) -> Pair:
        """The squares of all entries, of rows that are one product each."""
        right = self.right
        return Pair(self.left.square(), None if right is None else right.square())

    def narrow(self, begin: int, end: int | None) -> Pair:
        """The same for some of the samples."""
        if begin == 0 and end is None:
            return self
        right = self.right
        return Pair(self.left[begin:end], None if right is None else right[begin:end])

    def matrix(self) -> Tensor:
        """Shape `(samples, channels, groups * p * q)`, a view where that is possible."""
        left, right = self.left, self.right
        if right is None:
            return (left.sum(-2) if self.each > 1 else left.squeeze(-2)).flatten(2)
        return (left.mT * right if self.each == 1 else left.mT @ right).flatten(2)

    def write(self, out: Tensor) -> None:
        """Fills `(samples, channels, groups * p * q)`."""
        left, right = self.left, self.right
        if right is None:
            out.copy_(self.matrix())
            return
        groups, p, q = self.shape
        out = torch.unflatten(out, -1, self.shape)
        if self.each == 1:
            torch.mul(left.mT, right, out=out)
            return
        # Temporary results that caches hold.
        step = max(1, _CACHED // (groups * p * q * out.shape[1]))
        for begin in range(0, len(left), step):
            some, others = left[begin : begin + step], right[begin : begin + step]
            # Products of small matrices take less time with the long side last.
            made = (others.mT @ some).mT if q <= _NARROW < p else some.mT @ others
            out[begin : begin + step] = made

    def combined(self, u: Tensor) -> Tensor:
        """The sum of all rows with weights `(samples, channels)`, flattened."""
        weights = u[:, :, None, None, None]
        left, right = self.left, self.right
        if right is None:
            return (left * weights).sum((0, 1, 3)).reshape(-1)
        if right.shape[1] == 1:
            left = (left * weights).sum(1, keepdim=True)
        elif left.shape[1] == 1:
            right = (right * weights).sum(1, keepdim=True)
        else:
            left = left * weights
        # Groups first, then all that is summed over, then a factor.
        left = left.movedim(2, 0).reshape(left.shape[2], -1, left.shape[-1])
        right = right.movedim(2, 0).reshape(right.shape[2], -1, right.shape[-1])
        return (left.mT @ right).reshape(-1)

    def product(self, v: Tensor) -> Tensor:
        """The inner products of all rows with a vector: `(samples, channels)`."""
        left, right = self.left, self.right
        groups, p = left.shape[2], left.shape[-1]
        if right is None:
            return (left.sum(-2) * v.view(groups, p)).sum((-1, -2))
        moved = right @ v.view(groups, p, -1).mT
        return (left * moved).sum((-1, -2, -3))

    def square(self) -> Tensor:
        """The square of a bound of the Frobenius norm."""
        norms = torch.linalg.vector_norm(self.left, dim=-1)
        if self.right is not None:
            norms = norms * torch.linalg.vector_norm(self.right, dim=-1)
        total: Tensor = norms.sum(-1).square().sum()
        return total


class FactoredColumns(Columns):
    """The columns of a tensor as sums of outer products.

    Args:
        start: The first column.
        stop: The column after the last one.
        rows: Those of the outputs.
        pairs: By outputs; those that do not depend on the tensor have none.
    """

    def __init__(
        self, start: int, stop: int, rows: Sequence[Rows], pairs: Mapping[int, Pair]
    ) -> None:
        super().__init__(start, stop)
        self.rows, self.pairs = rows, pairs

    def write(self, out: Tensor, output: int, begin: int = 0, end: int | None = None) -> None:
        """See `Columns.write`."""
        pair = self.pairs.get(output)
        if pair is None:
            out.zero_()
        else:
            pair.narrow(begin, end).write(out)

    def pull(self, u: Tensor) -> Tensor:
        """See `Columns.pull`."""
        total: Tensor | None = None
        for output, pair in self.pairs.items():
            part = pair.combined(self.rows[output].of(u))
            total = part if total is None else total + part
        return u.new_zeros(self.width) if total is None else total

    def add_push(self, v: Tensor, result: Tensor) -> None:
        """See `Columns.add_push`."""
        for output, pair in self.pairs.items():
            self.rows[output].of(result).add_(pair.product(v))

    def square(self) -> Tensor:
        """See `Columns.square`."""
        return torch.stack([pair.square() for pair in self.pairs.values()]).sum()

    def squares(self) -> Tensor:
        """See `Columns.squares`."""
        found: list[Tensor] = []
        for output, pair in self.pairs.items():
            rows = self.rows[output]
            if pair.each == 1:
                ones = pair.left.new_ones(rows.samples, rows.channels)
                found.append(pair.squared().combined(ones))
            else:
                matrix = pair.left.new_empty(rows.samples, rows.channels, self.width)
                pair.write(matrix)
                found.append(matrix.square_().sum((0, 1)))
        return torch.stack(found).sum(0)

    def some(self, vector: Tensor) -> tuple[Columns, Tensor]:
        """See `Columns.some`."""
        whole, part = super().some(vector)
        groups, p, q = next(iter(self.pairs.values())).shape
        size = sum(pair.left.numel() for pair in self.pairs.values())
        if size <= _CACHED or p == 1 or groups > 1:
            return whole, part
        # One sum of all with weights, in which what is wrong about any of them shows.
        numbers = torch.arange(p, device=vector.device, dtype=torch.float64)
        weights = (0.5 + numbers * 0.6180339887498949 % 1).to(vector)
        weights[1::2] *= -1
        part = (weights @ part.view(p, q)).reshape(-1)
        cut: dict[int, Pair] = {}
        for i, pair in self.pairs.items():
            # Gradients lie in memory channel by channel.
            left = (pair.left.transpose(0, 1) @ weights).transpose(0, 1)
            cut[i] = Pair(left[..., None], pair.right)
        return FactoredColumns(0, len(part), self.rows, cut), part

    def pieces(self, widest: int) -> Iterator[Columns]:
        """See `Columns.pieces`."""
        first = next(iter(self.pairs.values()))
        p = first.left.shape[-1]
        q = 1 if first.right is None else first.right.shape[-1]
        if self.width <= widest or first.left.shape[2] > 1:
            yield self
            return
        step = max(1, widest // q)
        for begin in range(0, p, step):
            end = min(begin + step, p)
            cut = {i: Pair(pair.left[..., begin:end], pair.right) for i, pair in self.pairs.items()}
            yield FactoredColumns(self.start + begin * q, self.start + end * q, self.rows, cut)
