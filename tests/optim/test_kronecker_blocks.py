"""The blocks that parameters are cut into, and their order in vectors."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torch_secondorder._optim.kronecker.eigenbases import eigenvectors, orthonormal
from torch_secondorder._optim.kronecker.partition import Partition, partition
from torch_secondorder._optim.kronecker.stacks import Stacks, sorted_by_blocks
from torch_secondorder._optim.state import BlockMatrices, declare, prepare

SHAPES = st.lists(st.integers(1, 9), min_size=2, max_size=4).map(tuple)
SIZES = st.one_of(st.none(), st.integers(1, 12))


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(float(prod(shape))).view(shape)


@settings(deadline=None, max_examples=60)
@given(SHAPES, SIZES, SIZES, st.booleans())
def test_blocks_have_each_entry_once(
    shape: tuple[int, ...], block_size: int | None, longest: int | None, merge_dims: bool
) -> None:
    blocks = partition(shape, block_size=block_size, max_precond_dim=longest, merge_dims=merge_dims)
    rows, cols = (shape[0], prod(shape[1:])) if merge_dims else shape[-2:]
    has = [n > 1 and (longest is None or n <= longest) for n in (rows, cols)]
    if blocks is None:
        assert not any(has)
        return
    assert blocks.matrices == (prod(shape) // (rows * cols), rows, cols)
    entries = torch.cat([view.reshape(-1) for view in blocks.views(numbered(shape))])
    assert torch.equal(entries.sort().values, numbered((prod(shape),)))
    for tile in blocks.tiles:
        assert [tile.left, tile.right] == has
        for size, side, factor in ((tile.rows, rows, tile.left), (tile.cols, cols, tile.right)):
            assert size <= (side if block_size is None or not factor else min(block_size, side))
            if not factor:
                assert size == side
        assert tile.sides == {
            name: size
            for name, size, factor in (
                ("left", tile.rows, tile.left),
                ("right", tile.cols, tile.right),
            )
            if factor
        }
    for dim in (0, 1):  # no block is longer by more than one
        sizes = {(tile.rows, tile.cols)[dim] for tile in blocks.tiles}
        assert max(sizes) - min(sizes) <= 1
    if blocks.is_plain:
        assert torch.equal(entries, numbered((prod(shape),)))


def test_blocks_are_those_of_the_matrix() -> None:
    matrix = numbered((4, 6))
    blocks = partition((4, 6), block_size=3, max_precond_dim=None)
    assert blocks is not None
    (view,) = blocks.views(matrix)
    assert view.shape == (1, 2, 2, 2, 3)
    assert torch.equal(view[0, 1, 0], matrix[2:, :3])
    assert torch.equal(view[0, 0, 1], matrix[:2, 3:])
    (ordered,) = blocks.ordered(torch.zeros(4, 6))
    ordered.copy_(view)
    assert torch.equal(ordered[0, 1, 1], matrix[2:, 3:])


@pytest.mark.parametrize(
    ("size", "longest", "lengths"),
    [
        (768, 256, [(256, 3)]),
        (300, 256, [(150, 2)]),
        (250, 100, [(50, 5)]),  # equal parts, rather than 84, 83, 83
        (257, 256, [(129, 1), (128, 1)]),
        (7, 3, [(3, 1), (2, 2)]),
        (256, 256, [(256, 1)]),
        (5, 1, [(1, 5)]),
    ],
)
def test_lengths_of_parts(size: int, longest: int, lengths: list[tuple[int, int]]) -> None:
    blocks = partition((size, 2), block_size=longest, max_precond_dim=None)
    assert blocks is not None
    assert list(dict.fromkeys((tile.rows, tile.grid[0]) for tile in blocks.tiles)) == lengths


def test_what_has_no_matrix() -> None:
    for shape in ((), (5,), (1, 1), (1, 1, 1), (0, 3), (3, 0)):
        assert partition(shape, block_size=4, max_precond_dim=None) is None
    assert partition((9, 9), block_size=4, max_precond_dim=8) is None
    assert partition((5, 2), block_size=4, max_precond_dim=None, pairs=True) is None


# Stacks.


def made(
    shapes: list[tuple[int, ...]], **group: Any
) -> tuple[Stacks, list[Partition | None], list[int], list[dict[str, Any]]]:
    group = {"block_size": 4, "max_precond_dim": 8, "merge_dims": True} | group
    cut = [partition(shape, **group) for shape in shapes]
    order = sorted_by_blocks(cut)
    params = [nn.Parameter(torch.zeros(shapes[k])) for k in order]
    states: list[dict[str, Any]] = [{} for _ in order]
    for p, state in zip(params, states, strict=True):
        prepare(declare(factor=BlockMatrices(scale=2.0)).values(), state, p, group=group)
    reals = [p.detach() for p in params]
    partitions = [cut[k] for k in order]
    stacks = Stacks(reals, partitions, states, ["factor"], torch.float32)
    return stacks, partitions, order, states


MIXED = [(4, 3), (5,), (8, 3), (7, 5), (4, 12), (20, 3), (3,), (4, 3, 1)]


def test_blocks_of_one_shape_are_one_stack() -> None:
    stacks, _, order, states = made(MIXED)
    found = [(stack.rows, stack.cols, stack.blocks, len(stack.sides)) for stack in stacks]
    assert found[0] == (4, 3, 4, 2)  # of (4, 3), two of (8, 3), and of (4, 3, 1)
    assert (4, 12, 1, 1) in found  # too many columns for a factor
    assert (20, 3, 1, 1) in found  # too many rows
    assert found[1:5] == [(4, 3, 1, 2), (4, 2, 1, 2), (3, 3, 1, 2), (3, 2, 1, 2)]  # of (7, 5)
    total = sum(prod(shape) for shape in MIXED)
    assert stacks.vectors == slice(total - 8, total)
    assert [MIXED[k] for k in order][-2:] == [(5,), (3,)]
    assert sorted(order) == list(range(len(MIXED)))
    # States have views of the matrices of the stacks.
    for stack in stacks:
        for side in stack.sides:
            side["factor"].fill_(7.0)
    for state in states:
        assert all(bool((matrices == 7).all()) for matrices in state.values())


@settings(deadline=None, max_examples=15)
@given(st.lists(st.lists(st.integers(1, 9), max_size=3).map(tuple), min_size=1, max_size=6))
def test_gathering_and_adding_are_inverse(shapes: list[tuple[int, ...]]) -> None:
    stacks, _, order, _ = made(shapes)
    tensors = [torch.randn(shapes[k]) for k in order]
    stacks.direction.copy_(stacks.gather(tensors))
    targets = [torch.ones(shapes[k]) for k in order]
    stacks.add_to(targets, 2.0)
    for target, tensor in zip(targets, tensors, strict=True):
        torch.testing.assert_close(target, 1 + 2 * tensor)


def test_blocks_of_a_stack_are_blocks_of_parameters() -> None:
    shapes = [(8, 8), (4, 4), (8, 8)]
    stacks, _, order, _ = made(shapes)
    matrices = [torch.randn(shape) for shape in shapes]
    stacks.gather([matrices[k] for k in order])
    (stack,) = stacks
    own = [block for m in matrices for row in m.split(4) for block in row.split(4, 1)]
    assert torch.equal(stack.gradient, torch.stack(own))


@pytest.mark.parametrize("weight", [1.0, torch.tensor(1.0), torch.tensor(0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_of_products(weight: Any, dtype: torch.dtype) -> None:
    stacks, _, _, _ = made([(4, 3)] * 2)
    (stack,) = stacks
    blocks = torch.randn(2, 4, 3)
    for side, gram in zip(stack.sides, (blocks @ blocks.mT, blocks.mT @ blocks), strict=True):
        before = side["factor"].to(dtype)
        side.matrices["factor"] = before.clone()
        side.average_gram("factor", blocks, 0.9, weight)
        expected = before.float() + float(weight) * 0.1 * (gram - before.float())
        tolerance = 1e-6 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(side["factor"].float(), expected, rtol=tolerance, atol=tolerance)
        if not float(weight):
            assert torch.equal(side["factor"], before)


# Eigenvectors.


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_eigenvectors_of_factors(scale: float, device: torch.device) -> None:
    rows = torch.randn(3, 6, 9, dtype=torch.float64, device=device)
    factor = scale * rows @ rows.mT
    vectors = eigenvectors(torch.empty_like(factor), factor.clone())
    inside = vectors.mT @ (factor / scale) @ vectors
    values = inside.diagonal(dim1=-2, dim2=-1)
    assert bool((values.diff() < 0).all())  # the largest ones first
    torch.testing.assert_close(inside, torch.diag_embed(values), rtol=0, atol=1e-10)


def test_eigenvectors_where_there_are_none(device: torch.device) -> None:
    """Zeros, infinite and undefined factors among others: unit vectors, or zero from now on."""
    good = torch.diag(torch.tensor([1.0, 3.0, 2.0]))
    bad = [torch.zeros(3, 3), torch.full((3, 3), torch.inf), torch.full((3, 3), torch.nan)]
    factor = torch.stack([good, *bad]).to(device)
    vectors = eigenvectors(torch.empty_like(factor), factor).cpu()
    assert torch.equal(vectors[0].abs(), torch.eye(3)[:, [1, 2, 0]])
    for basis in vectors[1:]:
        torch.testing.assert_close(basis.abs(), torch.eye(3))
    assert torch.equal(factor[1:].cpu(), torch.zeros(3, 3, 3))


def test_a_decomposition_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.linalg.eigh

    def fails(matrix: torch.Tensor) -> Any:
        if matrix.dim() == 3 or bool(matrix.diagonal().sum() > 100):
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return whole(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    factor = torch.stack([torch.diag(torch.tensor([1.0, 2.0])), torch.eye(2)])
    vectors = eigenvectors(torch.empty_like(factor), factor)
    assert torch.equal(vectors[0].abs(), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))


def test_columns_of_a_decomposition_are_orthonormal(device: torch.device) -> None:
    product = torch.randn(4, 5, 5, device=device) * torch.logspace(0, -12, 5, device=device)
    basis = orthonormal(product)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(5, device=device).expand(4, 5, 5))
    inside = basis.mT @ product  # the first k columns span the same space
    torch.testing.assert_close(inside.tril(-1), torch.zeros_like(inside), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [127, 128, 130])
def test_averages_of_large_products(size: int, device: torch.device) -> None:
    """Those are made in parts on a CPU."""
    stacks, _, _, _ = made([(size, 3)], block_size=None, max_precond_dim=None)
    (stack,) = stacks
    blocks = torch.randn(1, size, 3, device=device)
    side = stack.sides[0]
    before = blocks @ blocks.mT
    side.matrices["factor"] = before.clone()
    more = torch.randn_like(blocks)
    side.average_gram("factor", more, 0.9)
    torch.testing.assert_close(side["factor"], 0.9 * before + 0.1 * more @ more.mT)
