"""Inverse roots of stacks of positive semidefinite matrices."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.host_reads import HostReads
from torch_secondorder._optim.kronecker.inverse_roots import (
    RootMethodName,
    eigendecomposed,
    exact_fraction,
    inverse_powers,
    inverse_roots,
)

DOUBLE = torch.float64
ROOT_METHODS = get_args(RootMethodName)
POWERS = [1.0, 1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 8, 3 / 8]


def stack(spectrum: Tensor, count: int = 3, seed: int = 0) -> Tensor:
    """Matrices with given eigenvalues, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, len(spectrum), len(spectrum))
    q = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=DOUBLE))[0]
    return q @ torch.diag(spectrum.to(DOUBLE)) @ q.mT


def expected(matrices: Tensor, power: float, ridge: float = 0.0) -> Tensor:
    """Matrix by matrix, by a singular value decomposition in double precision."""
    found = []
    for matrix in matrices.to(DOUBLE):
        u, values, _ = torch.linalg.svd(matrix)
        found.append(u @ torch.diag((values + ridge * values.max()) ** -power) @ u.T)
    return torch.stack(found)


def relative(found: Tensor, wanted: Tensor) -> float:
    """The largest error of a matrix, relative to its largest entry."""
    scale = wanted.abs().amax((-2, -1))
    return float(((found.to(DOUBLE) - wanted).abs().amax((-2, -1)) / scale).amax())


@pytest.mark.parametrize("method", ROOT_METHODS)
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("size", [1, 2, 5, 24])
def test_roots_are_those_of_a_dense_oracle(
    method: Any, power: float, size: int, device: torch.device
) -> None:
    matrices = stack(torch.logspace(0, -6, size, dtype=DOUBLE)).to(device)
    found = inverse_roots(matrices, power, method=method)
    # The ridge in the precision's units, and rounding errors, relative to the smallest eigenvalue.
    assert relative(found.cpu(), expected(matrices.cpu(), power)) < 2e-8


@pytest.mark.parametrize("method", ROOT_METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_the_root_is_undone_by_its_power(method: Any, dtype: torch.dtype) -> None:
    matrices = stack(torch.linspace(0.1, 3, 12)).to(dtype)
    root = inverse_roots(matrices, 1 / 4, method=method)
    identity = torch.eye(12, dtype=dtype).expand(3, 12, 12)
    accuracy = 1e-4 if dtype == torch.float32 else 1e-11
    product = root @ root @ root @ root @ matrices
    torch.testing.assert_close(product, identity, rtol=0, atol=accuracy)


@pytest.mark.parametrize("method", ROOT_METHODS)
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-20, 1e-6, 1.0, 1e12, 1e30, 1e37])
def test_the_scale_of_float32_matrices_does_not_matter(method: Any, scale: float) -> None:
    matrix = torch.tensor([[[2.0, 0.0], [0.0, 8.0]]]) * scale  # exact where numbers are denormal
    found = inverse_roots(matrix, 1 / 4, method=method)
    wanted = expected(matrix, 1 / 4)
    assert bool(found.isfinite().all()) and relative(found, wanted) < 1e-5


@pytest.mark.parametrize("method", ROOT_METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("rank", [1, 3, 31])
def test_singular_matrices_have_bounded_roots(method: Any, dtype: torch.dtype, rank: int) -> None:
    torch.manual_seed(rank)
    ranges = torch.linalg.qr(torch.randn(4, 32, rank, dtype=DOUBLE))[0]
    rows = ranges * torch.linspace(1, 2, rank, dtype=DOUBLE)
    matrices = (rows @ rows.mT).to(dtype)
    found = inverse_roots(matrices, 1 / 4, 1e-4, method)
    largest = torch.linalg.eigvalsh(found.to(DOUBLE))
    bound = (1e-4 * torch.linalg.eigvalsh(matrices.to(DOUBLE)).amax(-1)) ** -0.25
    assert bool((largest.amax(-1) <= 1.001 * bound).all())
    assert bool((largest.amin(-1) > 0).all())
    if method == "eigh":
        assert relative(found, expected(rows @ rows.mT, 1 / 4, 1e-4)) < (
            1e-3 if dtype == torch.float32 else 1e-9
        )
    # On the range the ridge hardly matters; rounding errors of products are multiplied by it.
    fourth = torch.linalg.matrix_power(found.to(DOUBLE), 4) @ rows @ rows.mT @ ranges
    torch.testing.assert_close(fourth, ranges, rtol=0, atol=2e-2)


@pytest.mark.parametrize("method", ROOT_METHODS)
@pytest.mark.parametrize(
    ("bad", "where"),
    [(0.0, "whole"), (-1.0, "whole")]
    + [
        (bad, where)
        for bad in (torch.inf, -torch.inf, torch.nan)
        for where in ("whole", "entry", "diagonal")
    ],
)
def test_matrices_without_a_root(method: Any, bad: float, where: str) -> None:
    matrices = stack(torch.linspace(1, 2, 4)).float()
    wanted = inverse_roots(matrices, 1 / 2, method=method)
    if where == "entry":
        matrices[1, 2, 3] = matrices[1, 3, 2] = bad
    elif where == "diagonal":
        matrices[1, 2, 2] = bad
    else:
        matrices[1] = bad * torch.eye(4) if bad in (0.0, -1.0) else bad
    found = inverse_roots(matrices, 1 / 2, method=method)
    nothing = bad in (0.0, -1.0)
    torch.testing.assert_close(found[1], torch.eye(4) if nothing else torch.zeros(4, 4))
    torch.testing.assert_close(found[::2], wanted[::2])


@given(
    seed=st.integers(0, 1000),
    size=st.integers(1, 9),
    digits=st.floats(0, 8),
    power=st.floats(0.05, 1.0),
)
def test_powers_add_up_and_follow_rotations(
    seed: int, size: int, digits: float, power: float
) -> None:
    matrices = stack(torch.logspace(0, -digits, size, dtype=DOUBLE), 2, seed)
    root = inverse_roots(matrices, power)
    whole = expected(matrices, power)
    assert relative(root, whole) < 1e-14 * 10 ** (digits + 2)
    q = torch.linalg.qr(torch.randn(size, size, dtype=DOUBLE))[0]
    rotated = inverse_roots(q @ matrices @ q.T, power)
    assert relative(rotated, q @ whole @ q.T) < 1e-14 * 10 ** (digits + 2)
    # Symmetric, and positive.
    assert relative(root, root.mT) < 1e-13
    assert bool((torch.linalg.eigvalsh(root) > 0).all())


def test_rounding_errors_below_zero_count_as_zero() -> None:
    values = torch.tensor([[-1e-9, 1.0, 4.0], [0.0, 0.0, 0.0]])
    found = inverse_powers(values, 0.5, ridge=1e-4)
    torch.testing.assert_close(found[0], torch.tensor([50.0, 1.0, 0.5]), rtol=1e-3, atol=0)
    assert torch.equal(found[1], torch.ones(3))
    # Without a ridge, the precision takes its place.
    assert float(inverse_powers(values, 0.5)[0, 0]) < 1e4


def test_narrow_matrices_have_roots_in_float32() -> None:
    matrices = stack(torch.linspace(1, 2, 4)).bfloat16()
    found = inverse_roots(matrices, 1 / 2)
    assert found.dtype == torch.float32
    assert torch.equal(found, inverse_roots(matrices.float(), 1 / 2))


@pytest.mark.parametrize("method", ROOT_METHODS)
@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 0)])
def test_empty_stacks(method: Any, shape: tuple[int, ...]) -> None:
    assert inverse_roots(torch.zeros(shape), 1 / 2, method=method).shape == shape


def test_double_precision_is_tried_where_single_precision_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrices, eigh = stack(torch.linspace(1, 2, 4)).float(), torch.linalg.eigh

    def failing(a: Tensor) -> Any:
        if a.dtype == torch.float32:
            raise torch.linalg.LinAlgError("failed to converge")
        return eigh(a)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    values, vectors = eigendecomposed(matrices)
    assert values.dtype == vectors.dtype == torch.float32
    torch.testing.assert_close(vectors * values[:, None] @ vectors.mT, matrices)


def test_newton_needs_a_fraction() -> None:
    assert inverse_roots(torch.eye(2)[None], 0.3).shape == (1, 2, 2)
    with pytest.raises(ValueError, match=r"fraction of small integers, such as 1/4, got 0\.3"):
        inverse_roots(torch.eye(2)[None], 0.3, method="newton")
    assert [exact_fraction(power) for power in (5.0, 0.0, -0.5, 1 / 9)] == [None] * 4


def test_newton_reads_nothing_on_the_host() -> None:
    matrices = stack(torch.linspace(1, 2, 4))
    with HostReads() as counted:
        inverse_roots(matrices, 1 / 4, 1e-6, "newton")
    assert counted.count == 0
