"""Blocks of equal shape of all parameters, stacked: one call of linear algebra for each shape.

A `Block` of parameters that have matrices keeps its moments in block order: the entries of each
parameter are sorted by the blocks of its `Partition`, and parameters with blocks of one shape are
neighbors. All blocks of one shape are then one contiguous tensor `(B, m, n)`, a `Stack`, in the
gradient and in each moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._optim.kronecker.partition import Partition, Tile

#: Half the size of the smallest matrices whose products are made in parts.
_LEAST_HALF = 64


class Side:
    """The matrices of one side of the blocks of a stack.

    Attributes:
        dim: 0 for the rows of the blocks (from the left), 1 for the columns (from the right).
        size: The size of the matrices.
        matrices: By the names of the declared `BlockMatrices`, `(B, size, size)`; the optimizer's
            state has views of them.
    """

    def __init__(self, dim: int, size: int, matrices: dict[str, Tensor]) -> None:
        self.dim, self.size, self.matrices = dim, size, matrices

    def __getitem__(self, name: str) -> Tensor:
        return self.matrices[name]

    def average_gram(
        self, name: str, blocks: Tensor, beta: float, weight: float | Tensor = 1.0
    ) -> None:
        """`F = beta F + (1 - beta) G G'` or `G' G`, in one call for matrices of full precision.

        Args:
            name: Of the matrices.
            blocks: `(B, m, n)`.
            beta: The decay rate.
            weight: On a device zero if nothing is to change; see `StepInputs.weight`.
        """
        matrices = self.matrices[name]
        first, second = (blocks, blocks.mT) if self.dim == 0 else (blocks.mT, blocks)
        if isinstance(weight, Tensor):
            share = ((1 - beta) * weight).to(matrices.dtype)
            matrices.lerp_(torch.bmm(first, second).to(matrices.dtype), share)
        else:
            wide = matrices.to(blocks.dtype)  # no copy for the same precision
            _average_symmetric(wide, first, second, beta)
            if wide is not matrices:
                matrices.copy_(wide)


def _average_symmetric(matrices: Tensor, first: Tensor, second: Tensor, beta: float) -> None:
    """`M = beta M + (1 - beta) A A'` for symmetric matrices, `second` being `A'`, in place.

    On a CPU a quarter of a large product is copied from another one, which takes a fifth less time.
    """
    half, odd = divmod(matrices.shape[-1], 2)
    if matrices.device.type != "cpu" or odd or half < _LEAST_HALF:
        matrices.baddbmm_(first, second, beta=beta, alpha=1 - beta)
        return
    corner, below = matrices[:, :half, :half], matrices[:, half:]
    corner.baddbmm_(first[:, :half], second[:, :, :half], beta=beta, alpha=1 - beta)
    below.baddbmm_(first[:, half:], second, beta=beta, alpha=1 - beta)
    matrices[:, :half, half:] = below[:, :, :half].mT


class Stack:
    """All blocks of one shape.

    Attributes:
        rows: The number of rows of each.
        cols: The number of columns of each.
        start: The place of the first entry in a vector in block order.
        blocks: The number of blocks.
        sides: The sides that have matrices, from the left first.
        gradient: The blocks of `Stacks.gradient`, `(B, rows, cols)`.
        direction: The blocks of `Stacks.direction`, likewise.
    """

    gradient: Tensor
    direction: Tensor

    def __init__(self, tile: Tile, start: int, blocks: int, sides: Sequence[Side]) -> None:
        self.rows, self.cols, self.start, self.blocks = tile.rows, tile.cols, start, blocks
        self.sides = list(sides)

    @property
    def numel(self) -> int:
        """The number of entries."""
        return self.blocks * self.rows * self.cols

    def of(self, flat: Tensor) -> Tensor:
        """The blocks of a vector in block order, a view `(B, rows, cols)`."""
        part = flat[self.start : self.start + self.numel]
        return part.view(self.blocks, self.rows, self.cols)


class Stacks:
    """The stacks of a `Block` of parameters.

    Args:
        reals: The parameters, real ones (complex numbers as pairs), those with matrices first, in
            the order of `sorted_by_blocks`.
        partitions: The partition of each; None for those without matrices.
        states: The state of each.
        names: The names of the declared `BlockMatrices`.
        dtype: Of the moments.

    Attributes:
        stacks: The stacks.
        vectors: The slice of the entries that have no matrices, in a vector in block order.
        pieces: The entries of the optimizer's state that are views: state, name, tensor.
        gradient: A vector in block order `(n,)`, reused by each step.
        direction: Another one.
    """

    def __init__(
        self,
        reals: Sequence[Tensor],
        partitions: Sequence[Partition | None],
        states: Sequence[dict[str, Any]],
        names: Sequence[str],
        dtype: torch.dtype,
    ) -> None:
        self._reals, self._partitions = reals, partitions
        self._sizes = [real.numel() for real in reals]
        total, device = sum(self._sizes), reals[0].device
        self.pieces: list[tuple[dict[str, Any], str, Tensor]] = []
        self.stacks: list[Stack] = []
        start = 0
        members = zip(partitions, states, strict=True)
        for tiles, found in groupby(members, key=lambda member: _kind(member[0])):
            entries = [(blocks, state) for blocks, state in found if blocks is not None]
            if not entries:
                break
            if len(tiles) == 1:
                start = self._add([(p.tiles[0], state) for p, state in entries], 0, start, names)
            else:
                for blocks, state in entries:
                    for k, tile in enumerate(blocks.tiles):
                        start = self._add([(tile, state)], k, start, names)
        self.vectors = slice(start, total)
        self.gradient = torch.empty(total, dtype=dtype, device=device)
        self.direction = torch.empty_like(self.gradient)
        for stack in self.stacks:
            stack.gradient, stack.direction = stack.of(self.gradient), stack.of(self.direction)
        self._slots = self._parts(self.gradient)
        self._moves = self._parts(self.direction)

    def __iter__(self) -> Iterator[Stack]:
        return iter(self.stacks)

    def _add(
        self,
        members: Sequence[tuple[Tile, dict[str, Any]]],
        number: int,
        start: int,
        names: Sequence[str],
    ) -> int:
        """Adds a stack.

        Args:
            members: The tiles that it consists of, with the states of their parameters.
            number: The number of the tile in its partition.
            start: The place of the first entry.
            names: The names of the matrices.

        Returns:
            The place after the last entry.
        """
        tile = members[0][0]
        counts = [tile.blocks for tile, _ in members]
        sides = []
        for dim, (side, size) in enumerate((("left", tile.left), ("right", tile.right))):
            if not size:
                continue
            matrices = {}
            for name in names:
                key = f"{name}_{side}_{number}"
                matrices[name] = torch.cat([state[key] for _, state in members])
                parts = matrices[name].split(counts)
                for (_, state), part in zip(members, parts, strict=True):
                    state[key] = part
                    self.pieces.append((state, key, part))
            sides.append(Side(dim, tile.cols if dim else tile.rows, matrices))
        stack = Stack(tile, start, sum(counts), sides)
        self.stacks.append(stack)
        return start + stack.numel

    def _parts(self, flat: Tensor) -> list[list[Tensor]]:
        """The part of each parameter in a vector in block order.

        Shaped like the parameter if the entries are in their own places, else a tensor for each
        tile as in `Partition.ordered`.
        """
        found = []
        for real, blocks, part in zip(
            self._reals, self._partitions, flat.split(self._sizes), strict=True
        ):
            plain = blocks is None or blocks.is_plain
            found.append([part.view(real.shape)] if plain else blocks.ordered(part))  # type: ignore[union-attr]
        return found

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """Copies tensors into `gradient`, in block order; returns that.

        Args:
            tensors: Shaped like the parameters.
        """
        sources: list[Tensor] = []
        slots: list[Tensor] = []
        for tensor, blocks, slot in zip(tensors, self._partitions, self._slots, strict=True):
            plain = blocks is None or blocks.is_plain
            sources += [tensor] if plain else blocks.views(tensor.contiguous())  # type: ignore[union-attr]
            slots += slot
        torch._foreach_copy_(slots, sources)
        return self.gradient

    def forget_infinite(self, mean: Tensor, squares: Tensor, matrices: Sequence[str] = ()) -> None:
        """Sets moments to zero where a square has overflowed; else they would not move again.

        A block begins anew as a whole: matrices mix its entries.

        Args:
            mean: The averages, in block order.
            squares: The averages of squares.
            matrices: The names of matrices to set to zero with a block; those that have
                overflowed themselves, by their diagonal, count as well.
        """
        for stack in self.stacks:
            bad = ~stack.of(squares).isfinite().all(-1).all(-1)[:, None, None]
            held = [side[name] for side in stack.sides for name in matrices]
            for matrix in held:
                bad |= ~matrix.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)[:, None, None]
            for entries in (stack.of(mean), stack.of(squares), *held):
                entries.masked_fill_(bad, 0.0)
        bad = ~squares[self.vectors].isfinite()
        for moment in (mean, squares):
            moment[self.vectors].masked_fill_(bad, 0.0)

    def add_to(self, targets: Sequence[Tensor], alpha: float) -> None:
        """`target += alpha * direction` for tensors shaped like the parameters.

        Args:
            targets: One for each parameter.
            alpha: The factor.
        """
        places: list[Tensor] = []
        steps: list[Tensor] = []
        for target, blocks, parts in zip(targets, self._partitions, self._moves, strict=True):
            if blocks is None or blocks.is_plain:
                places.append(target)
                steps += parts
            elif target.is_contiguous():
                places += blocks.views(target)
                steps += parts
            else:  # no view has its blocks
                whole = torch.empty(target.shape, dtype=parts[0].dtype, device=target.device)
                torch._foreach_copy_(blocks.views(whole), parts)
                places.append(target)
                steps.append(whole)
        torch._foreach_add_(places, steps, alpha=alpha)


def _kind(blocks: Partition | None) -> tuple[Tile, ...]:
    """The shape of the blocks of a parameter, equal for those of one stack."""
    if blocks is None:
        return ()
    if len(blocks.tiles) > 1:
        return blocks.tiles
    tile = blocks.tiles[0]
    return (Tile(tile.rows, tile.cols, 0, (0, 0), (0, 0), tile.left, tile.right),)


def sorted_by_blocks(partitions: Sequence[Partition | None]) -> list[int]:
    """The order of parameters in a vector in block order: a permutation of their numbers.

    Parameters with blocks of one shape are neighbors, and those without matrices are the last.
    """
    first: dict[tuple[Tile, ...], int] = {}
    for blocks in partitions:
        first.setdefault(_kind(blocks), len(first))
    first[()] = len(first) + 1
    return sorted(range(len(partitions)), key=lambda number: first[_kind(partitions[number])])
