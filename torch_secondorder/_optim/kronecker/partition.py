"""The matrix that a parameter is seen as, and the blocks that the matrix is cut into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from math import prod
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tile:
    """Equal blocks of a matrix, `grid[0]` below and `grid[1]` beside each other.

    Attributes:
        rows: The number of rows of a block.
        cols: The number of columns of a block.
        count: The number of matrices.
        grid: The number of blocks along rows and along columns of each matrix.
        corner: The first row and column of the first block.
        left: Whether blocks have a factor for their rows.
        right: Whether blocks have a factor for their columns.
    """

    rows: int
    cols: int
    count: int
    grid: tuple[int, int]
    corner: tuple[int, int]
    left: bool
    right: bool

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return self.count * self.grid[0] * self.grid[1]

    @property
    def numel(self) -> int:
        """The number of entries of all blocks."""
        return self.blocks * self.rows * self.cols

    @property
    def sides(self) -> dict[str, int]:
        """The sizes of the factors by the names of their sides."""
        sizes = {"left": self.rows if self.left else 0, "right": self.cols if self.right else 0}
        return {side: size for side, size in sizes.items() if size}

    def view(self, matrices: Tensor) -> Tensor:
        """The blocks of matrices `(count, m, n)`, a view `(count, *grid, rows, cols)`."""
        top, first = self.corner
        part = matrices[:, top : top + self.grid[0] * self.rows]
        part = part[:, :, first : first + self.grid[1] * self.cols]
        part = part.unflatten(2, (self.grid[1], self.cols)).unflatten(1, (self.grid[0], self.rows))
        blocks: Tensor = part.transpose(2, 3)
        return blocks


@dataclass(frozen=True, slots=True)
class Partition:
    """The blocks of a parameter.

    A tensor in *block order* has the entries of a parameter tile by tile and block by block. It is
    contiguous and shaped like the parameter, but its entries are in other places, unless blocks
    have all columns of the matrix.

    Attributes:
        matrices: The number of matrices that the parameter is seen as, their rows and columns.
        tiles: The tiles, which have each entry once.
    """

    matrices: tuple[int, int, int]
    tiles: tuple[Tile, ...]

    @property
    def is_plain(self) -> bool:
        """True if the entries in block order are in their own places."""
        return len(self.tiles) == 1 and self.tiles[0].grid[1] == 1

    def views(self, tensor: Tensor) -> list[Tensor]:
        """The blocks of a tensor shaped like the parameter: a view for each tile.

        Args:
            tensor: One whose dimensions can be joined without a copy, as those of contiguous ones.

        Returns:
            Tensors `(count, *grid, rows, cols)`.
        """
        matrices = tensor.view(self.matrices)
        return [tile.view(matrices) for tile in self.tiles]

    def ordered(self, tensor: Tensor) -> list[Tensor]:
        """The same of a tensor in block order."""
        flat, ends = tensor.view(-1), accumulate((t.numel for t in self.tiles), initial=0)
        return [
            flat[start : start + t.numel].view(t.count, *t.grid, t.rows, t.cols)
            for start, t in zip(ends, self.tiles, strict=False)
        ]


def partition_of(p: Tensor, group: Mapping[str, Any]) -> Partition | None:
    """The blocks of a parameter with the hyperparameters of its group.

    Args:
        p: The parameter.
        group: Has `block_size`, `max_precond_dim` and `merge_dims`.

    Returns:
        See `partition`.
    """
    shape = tuple(p.shape) + ((2,) if p.is_complex() and p.dim() > 1 else ())
    return partition(
        shape,
        block_size=group["block_size"],
        max_precond_dim=group["max_precond_dim"],
        merge_dims=group["merge_dims"],
        pairs=p.is_complex(),
    )


@cache
def partition(
    shape: tuple[int, ...],
    *,
    block_size: int | None,
    max_precond_dim: int | None,
    merge_dims: bool = True,
    pairs: bool = False,
) -> Partition | None:
    """Cuts a parameter into blocks.

    Sides of matrices that are longer than `block_size` are cut into the least number of parts, of
    equal length if that is possible with up to twice as many, else of two lengths that differ by
    one. A side above `max_precond_dim` is not cut and has no factor.

    Args:
        shape: The parameter's shape.
        block_size: The longest side of a block with a factor; None for no bound.
        max_precond_dim: The longest side of a matrix that has factors; None for no bound.
        merge_dims: Whether all dimensions but the first are the columns of one matrix. If not, the
            last two are rows and columns, and the others count matrices.
        pairs: Whether the last dimension of the shape has real and imaginary parts, which are
            columns of their own.

    Returns:
        The blocks; None if the parameter has less than two dimensions, or no side has a factor.

    >>> blocks = partition((300, 128), block_size=256, max_precond_dim=1000)
    >>> [(tile.rows, tile.cols, tile.blocks) for tile in blocks.tiles]
    [(150, 128, 2)]
    """
    if len(shape) - pairs < 2 or not prod(shape):
        return None
    if merge_dims:
        count, rows, cols = 1, shape[0], prod(shape[1:])
    else:
        own = shape[:-1] if pairs else shape
        count, rows, cols = prod(own[:-2]), own[-2], own[-1] * (2 if pairs else 1)
    left, right = (
        size > 1 and (max_precond_dim is None or size <= max_precond_dim) for size in (rows, cols)
    )
    if not left and not right:
        return None
    tiles = [
        Tile(m, n, count, (down, across), (top, first), left, right)
        for top, m, down in _cuts(rows, block_size if left else None)
        for first, n, across in _cuts(cols, block_size if right else None)
    ]
    return Partition((count, rows, cols), tuple(tiles))


def _cuts(size: int, longest: int | None) -> list[tuple[int, int, int]]:
    """Runs of equal parts: the first index, the length of a part, and the number of parts."""
    if longest is None or size <= longest:
        return [(0, size, 1)]
    least = -(-size // longest)
    for parts in range(least, 2 * least + 1):
        if size % parts == 0:
            return [(0, size // parts, parts)]
    length, longer = divmod(size, least)
    return [
        run
        for run in ((0, length + 1, longer), (longer * (length + 1), length, least - longer))
        if run[2]
    ]
