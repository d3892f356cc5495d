"""Products of a Jacobian with its transpose, by half of the symmetric matrix."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_secondorder._foundation.private_torch import matmul_transposed
from torch_secondorder.curvature._jacobian_columns import Columns, FactoredColumns, Pair, Rows

__all__ = ["add_gram", "kernel", "mirror_"]

# Rows of a symmetric matrix that are made at a time, from the diagonal on; the rest is copied.
_TILE, _SMALL_TILE = 256, 64
# The narrowest tile of a matrix product.
_NARROW = 48
# Elements of a dense part of the Jacobian.
_LARGEST = 2**25
# What an entrywise product of two matrices costs an entry, in columns of a matrix product.
_ENTRYWISE = 32


def add_gram(matrix: Tensor, A: Tensor, B: Tensor | None = None) -> None:
    """Adds `A B'` to the lower half of a symmetric matrix, with `B = A` by default.

    Args:
        matrix: Shape `(k, k)`; above the diagonal something else is left.
        A: Shape `(k, m)`.
        B: Shape `(k, m)`, such that the product is symmetric.
    """
    B = A if B is None else B
    # Five tiles: fewer make too much of the upper half, more are slow as products.
    tile = min(_TILE, max(_NARROW, len(A) // 5))
    for begin in range(0, len(A), tile):
        end = min(begin + tile, len(A))
        matrix[begin:end, :end] += matmul_transposed(A[begin:end], B[:end])


def mirror_(matrix: Tensor, tile: int = _TILE) -> Tensor:
    """Copies the lower half of a square matrix to the upper one.

    Args:
        matrix: The matrix.
        tile: How many rows are copied at a time.
    """
    for begin in range(0, len(matrix), tile):
        end = min(begin + tile, len(matrix))
        own = matrix[begin:end, begin:end]
        if tile > _SMALL_TILE:
            mirror_(own, _SMALL_TILE)
        else:
            own.copy_(own.tril() + own.tril(-1).T)
        matrix[:begin, begin:end] = matrix[begin:end, :begin].T
    return matrix


def kernel(
    columns: Sequence[Columns], rows: Sequence[Rows], weights: Tensor | None, like: Tensor
) -> Tensor:
    """`J diag(weights) J'`, shape `(N, N)`.

    Args:
        columns: Those of `J` that are not zero.
        rows: The rows of the residuals.
        weights: Shape `(n,)`; None for ones.
        like: Has the dtype and the device.
    """
    total = rows[-1].stop
    products: list[_Product] = []
    dense: list[Columns] = []
    # Weights before biases, which are added to them.
    for part in sorted(columns, key=lambda part: -part.width):
        weight = _weight(part, weights)
        if weight is None or not _taken(part, weight, rows, products):
            dense.append(part)
    if products:
        result = _add_products(products, rows, like)
    else:
        result = like.new_zeros(total, total)
    for some in _chunks(dense, max(1, _LARGEST // total)):
        matrix = like.new_empty(total, sum(part.width for part in some))
        scaled = None if weights is None else torch.cat([weights[p.start : p.stop] for p in some])
        begin = 0
        for part in some:
            for i, own in enumerate(rows):
                part.write(own.of(matrix[:, begin : begin + part.width]), i)
            begin += part.width
        add_gram(result, matrix, None if scaled is None else matrix * scaled)
    return mirror_(result)


def _chunks(columns: Sequence[Columns], widest: int) -> Iterator[list[Columns]]:
    """Columns in groups of about so many."""
    group: list[Columns] = []
    for part in (piece for whole in columns for piece in whole.pieces(widest)):
        if group and sum(p.width for p in group) + part.width > widest:
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def _weight(part: Columns, weights: Tensor | None) -> Tensor | float | None:
    """The weight that all columns of a part have; None if they differ."""
    if weights is None:
        return 1.0
    own = weights[part.start : part.stop]
    return own[0] if bool((own == own[0]).all()) else None


def _taken(
    part: Columns, weight: Tensor | float, rows: Sequence[Rows], products: list[_Product]
) -> bool:
    """Takes columns into the products; False if a matrix is cheaper."""
    if not isinstance(part, FactoredColumns):
        return False
    # The same factor comes first in all blocks.
    swapped = any(_is_swapped(pair) for pair in part.pairs.values())
    known: dict[int, list[_Side]] = {}
    for i, pair in part.pairs.items():
        sides = _sides(pair, swapped)
        if sides is None:
            return False
        known[i] = sides
    if all(pair.right is None for pair in part.pairs.values()):
        # A bias: the same as the weight beside it, with inputs of one.
        return any(product.joined(known, weight) for product in products)
    product = _Product(known, weight)
    if product.cost(rows) > part.width:
        return False
    products.append(product)
    return True


@dataclass(slots=True)
class _Side:
    """One use of a tensor by the samples of a block.

    Attributes:
        left: The factor that may differ by channels, `(samples, channels, p)`.
        right: The other one, `(samples, 1, q)`.
        plus: Whether a bias has the same left factor.
    """

    left: Tensor
    right: Tensor
    plus: bool = False


class _Product:
    """A part of the kernel as a sum of entrywise products `(A_s A_t') o G_st`, `G` of samples.

    Args:
        sides: The uses of a tensor, by blocks.
        weight: That of its columns.
    """

    def __init__(self, sides: Mapping[int, list[_Side]], weight: Tensor | float) -> None:
        self._sides, self._weight = sides, weight
        self._plus: Tensor | float | None = None  # the weight of the bias
        self._kept: dict[tuple[int, int], Tensor] = {}
        self.lefts: list[Tensor] = []
        self._rights: list[Tensor] = []
        self._weighted: list[Tensor] = []

    @property
    def uses(self) -> int:
        """The number of uses of the tensor by one sample."""
        return max(map(len, self._sides.values()))

    @property
    def samples(self) -> int:
        """The number of rows of `G`."""
        return len(self._rights[0])

    def cost(self, rows: Sequence[Rows]) -> float:
        """The cost of an entry, where one column of a matrix costs one."""
        first = next(iter(self._sides.values()))[0]
        share = rows[0].samples / rows[0].stop if len(rows) == 1 else 1.0
        each = first.left.shape[-1] + first.right.shape[-1] * share**2
        return self.uses**2 * (each + _ENTRYWISE)

    def joined(self, bias: Mapping[int, list[_Side]], weight: Tensor | float) -> bool:
        """Takes a bias along if its left factors are among those of the weight."""
        if self._plus is not None or not bias.keys() <= self._sides.keys():
            return False
        found: list[_Side] = []
        for i, sides in bias.items():
            left = list(self._sides[i])  # two uses may have equal factors: each is taken once
            for side in sides:
                at = next((k for k, own in enumerate(left) if _same(own.left, side.left)), None)
                if at is None:
                    return False
                found.append(left.pop(at))
        for own in found:
            own.plus = True
        self._plus = weight
        return True

    def prepare(self, rows: Sequence[Rows]) -> None:
        """Makes the factors of all rows and samples."""
        for use in range(self.uses):
            chosen = {i: sides[use] for i, sides in self._sides.items() if use < len(sides)}
            self.lefts.append(_joined({i: side.left for i, side in chosen.items()}, rows))
            right = _joined({i: side.right for i, side in chosen.items()}, rows)
            weighted = right * self._weight
            if self._plus is not None:
                ones = {
                    i: torch.full_like(side.right[..., :1], float(side.plus))
                    for i, side in chosen.items()
                }
                one = _joined(ones, rows)
                right = torch.cat([right, one], dim=1)
                weighted = torch.cat([weighted, one * self._plus], dim=1)
            self._rights.append(right)
            self._weighted.append(weighted)

    def gram(self, s: int, t: int, begin: int, end: int, stop: int, repeats: int) -> Tensor:
        """Some rows of `G_st`, `(end - begin, stop)`.

        Args:
            s: The use of the rows.
            t: The use of the columns.
            begin: The first row.
            end: The row after the last one.
            stop: The column after the last one.
            repeats: How often each column comes, one after the other; 0 for once, where no rows
                are wanted again.
        """
        if not repeats:
            return matmul_transposed(self._weighted[s][begin:end], self._rights[t][:stop])
        if (s, t) not in self._kept:
            made = matmul_transposed(self._weighted[s], self._rights[t])
            self._kept[s, t] = made if repeats == 1 else made.repeat_interleave(repeats, dim=1)
        return self._kept[s, t][begin:end, :stop]


def _is_swapped(pair: Pair) -> bool:
    """True if the right factor differs by channels, and the left one does not."""
    return pair.right is not None and pair.left.shape[1] == 1 < pair.right.shape[1]


def _sides(pair: Pair, swapped: bool) -> list[_Side] | None:
    """The uses, with the left factor first or the right one; None where the other has channels."""
    left, right = pair.left, pair.right
    if left.shape[2] > 1:
        return None
    if right is None:
        right = torch.ones_like(left[:, :1, :, :, :1])
    if swapped:
        left, right = right, left
    if right.shape[1] > 1:
        return None
    return [_Side(left[:, :, 0, use], right[:, :, 0, use]) for use in range(left.shape[3])]


def _joined(parts: Mapping[int, Tensor], rows: Sequence[Rows]) -> Tensor:
    """A factor for all rows in order, or for all samples where one block has them all."""
    first = next(iter(parts.values()))
    found = []
    for i, own in enumerate(rows):
        part = parts.get(i)
        if part is None:
            part = first.new_zeros(1, 1, 1).expand(own.samples, own.channels, first.shape[-1])
        if len(rows) > 1:
            part = part.expand(-1, own.channels, -1)
        if own.by_channels:
            part = part.transpose(0, 1)
        found.append(part.reshape(-1, part.shape[-1]))
    return found[0] if len(found) == 1 else torch.cat(found)


def _same(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape:
        return False
    same = first.data_ptr() == second.data_ptr() and first.stride() == second.stride()
    return same or torch.equal(first, second)


def _add_products(products: Sequence[_Product], rows: Sequence[Rows], like: Tensor) -> Tensor:
    """The lower half of the sum of products."""
    for product in products:
        product.prepare(rows)
    total, samples = rows[-1].stop, products[0].samples
    result = like.new_empty(total, total)
    channels = total // samples
    by_channels = rows[0].by_channels and channels > 1
    repeats = 0 if channels == 1 else 1 if by_channels else channels
    if by_channels and samples > _TILE:
        # Parts of a channel.
        spans = [
            (c * samples + n, c * samples + min(n + _TILE, samples))
            for c in range(channels)
            for n in range(0, samples, _TILE)
        ]
    else:
        unit = samples if by_channels else channels
        step = max(1, _TILE // unit) * unit
        spans = [(begin, min(begin + step, total)) for begin in range(0, total, step)]
    for begin, end in spans:
        if by_channels:
            # Whole channels, up to the one of the last row.
            first, last = begin % samples, -(-end // samples)
            count = max(1, (end - begin) // samples)
            stop, shape = last * samples, (count, -1, last, samples)
            chosen = slice(first, first + (end - begin) // count)
        else:
            stop, shape = end, (-1, channels, 1, end)
            chosen = slice(begin // channels, end // channels)
        out = result[begin:end, :stop].unflatten(1, shape[2:]).unflatten(0, shape[:2])
        begun = False
        for product in products:
            for s, t in itertools.product(range(product.uses), repeat=2):
                made = matmul_transposed(product.lefts[s][begin:end], product.lefts[t][:stop])
                made = made.view(shape)
                across = samples if by_channels else end
                G = product.gram(s, t, chosen.start, chosen.stop, across, repeats)
                G = G[None, :, None, :] if by_channels else G[:, None, None, :]
                if begun:
                    out.addcmul_(made, G)
                else:
                    torch.mul(made, G, out=out)
                    begun = True
    return result
