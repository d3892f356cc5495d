"""Products of a Jacobian with its transpose, by half of the symmetric matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from torch_secondorder._foundation.private_torch import matmul_transposed
from torch_secondorder.curvature._jacobian_columns import Columns, FactoredColumns, Pair, Rows

__all__ = ["add_gram", "kernel", "mirror_"]

# Rows of a symmetric matrix that are made at a time, from the diagonal on; the rest is copied.
_TILE = 256
# Elements of a dense part of the Jacobian.
_LARGEST = 2**25


def add_gram(matrix: Tensor, A: Tensor, B: Tensor | None = None) -> None:
    """Adds `A B'` to the lower half of a symmetric matrix, with `B = A` by default.

    Args:
        matrix: Shape `(k, k)`; above the diagonal something else is left.
        A: Shape `(k, m)`.
        B: Shape `(k, m)`, such that the product is symmetric.
    """
    B = A if B is None else B
    for begin in range(0, len(A), _TILE):
        end = min(begin + _TILE, len(A))
        matrix[begin:end, :end] += matmul_transposed(A[begin:end], B[:end])


def mirror_(matrix: Tensor) -> Tensor:
    """Copies the lower half of a square matrix to the upper one."""
    for begin in range(0, len(matrix), _TILE):
        end = min(begin + _TILE, len(matrix))
        tile = matrix[begin:end, begin:end]
        tile.copy_(tile.tril() + tile.tril(-1).T)
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
        product = _Product.of(part, rows, weights, products)
        if product is None:
            dense.append(part)
        elif product not in products:
            products.append(product)
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


class _Product:
    """A part of the kernel as an entrywise product `(A A') o G`, where `G` is of samples.

    Attributes:
        A: Shape `(N, p)`, for each row.
        G: Shape `(samples, samples)`.
    """

    def __init__(self, A: Tensor, G: Tensor) -> None:
        self.A, self.G = A, G

    @classmethod
    def of(
        cls, part: Columns, rows: Sequence[Rows], weights: Tensor | None, known: Sequence[_Product]
    ) -> _Product | None:
        """The columns of a tensor that each sample uses once; None if a matrix is cheaper.

        Args:
            part: The columns.
            rows: The rows of the residuals.
            weights: Shape `(n,)`; None for ones.
            known: Products met; the result may be one of them, to which the columns were added.
        """
        if not isinstance(part, FactoredColumns):
            return None
        weight: Tensor | float = 1.0
        if weights is not None:
            own = weights[part.start : part.stop]
            weight = own[0]
            if not bool((own == weight).all()):
                return None
        sides = {i: _by_rows_and_samples(pair) for i, pair in part.pairs.items()}
        if any(side is None for side in sides.values()):
            return None
        A = _joined(sides, rows, 0)
        if part.pairs and all(pair.right is None for pair in part.pairs.values()):
            # A bias: the same as the weight beside it, with inputs of one.
            for product in known if len(rows) == len(part.pairs) else ():
                if _same(product.A, A):
                    product.G += weight
                    return product
            return None
        X = _joined(sides, rows, 1)
        p, q, share = A.shape[1], X.shape[1], (len(X) / len(A)) ** 2
        if p + q * share + 4 > p * q:
            return None
        return cls(A, matmul_transposed(X, X) * weight)


_Sides = tuple[Tensor, Tensor]


def _by_rows_and_samples(pair: Pair) -> _Sides | None:
    """The factor that differs by channels, and the other one, each `(samples, channels, width)`."""
    left, right = pair.left, pair.right
    if pair.each > 1 or left.shape[2] > 1:
        return None
    if right is None:
        right = torch.ones_like(left[:, :1, :, :, :1])
    if left.shape[1] == 1:
        left, right = (left, right) if right.shape[1] == 1 else (right, left)
    if right.shape[1] > 1:
        return None
    return left[:, :, 0, 0], right[:, :, 0, 0]


def _joined(sides: Mapping[int, _Sides | None], rows: Sequence[Rows], which: int) -> Tensor:
    """One factor for all rows in order, or for all samples where one block has them all."""
    parts = []
    for i, own in enumerate(rows):
        side = sides.get(i)
        if side is None:
            found = next(s for s in sides.values() if s is not None)[which]
            part = found.new_zeros(1, 1, 1).expand(own.samples, own.channels, found.shape[-1])
        else:
            part = side[which]
        if len(rows) > 1:
            part = part.expand(-1, own.channels, -1)
        if own.by_channels:
            part = part.transpose(0, 1)
        parts.append(part.reshape(-1, part.shape[-1]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _same(first: Tensor, second: Tensor) -> bool:
    return (first.data_ptr(), first.shape, first.stride()) == (
        second.data_ptr(),
        second.shape,
        second.stride(),
    )


def _add_products(products: Sequence[_Product], rows: Sequence[Rows], like: Tensor) -> Tensor:
    """The lower half of the sum of products."""
    total, samples = rows[-1].stop, len(products[0].G)
    result = like.new_empty(total, total)
    channels, by_channels = total // samples, rows[0].by_channels and len(rows) == 1
    if by_channels and channels > 1 and samples > _TILE:
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
            stop, shape = end, (-1, channels, end // channels, channels)
            chosen = slice(begin // channels, end // channels)
        out = result[begin:end, :stop].unflatten(1, shape[2:]).unflatten(0, shape[:2])
        for k, product in enumerate(products):
            made = matmul_transposed(product.A[begin:end], product.A[:stop]).view(shape)
            G = product.G[chosen]
            G = G[None, :, None, :] if by_channels else G[:, None, : end // channels, None]
            if k == 0:
                torch.mul(made, G, out=out)
            else:
                out.addcmul_(made, G)
    return result
