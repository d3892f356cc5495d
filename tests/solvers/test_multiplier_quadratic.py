"""The multipliers of a quadratic program: against the conditions that determine them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_secondorder.solvers._multiplier_quadratic import solve

F64 = torch.float64


def left_over(W, b, inequality, y, limit=torch.inf):
    """How far multipliers are from the conditions of first order, relative to what cancels there.

    With `D` the diagonal of `W`, this is the largest entry of the projected gradient of the problem
    in `D^(1/2) y`.
    """
    roots = W.diagonal().clamp(min=0).sqrt()
    some = roots > 0
    roots, y, b = roots[some], y[some], b[some]
    W, inequality = W[some][:, some], inequality[some]
    slopes = (W @ y - b) / roots
    high = limit * roots
    low = torch.where(inequality, 0, -high)
    z = y * roots
    assert ((z >= low * (1 + 1e-12)) & (z <= high * (1 + 1e-12))).all()
    moved = z - (z - slopes).clamp(low, high)
    terms = ((W.abs() @ y.abs()) / roots).max() + (b / roots).abs().max() if len(b) else 1.0
    return (moved.abs().max() / max(terms, 1e-300)).item() if len(b) else 0.0


def problem(seed, m, rank, n_equal, spread=0.0):
    """A consistent problem: `b` is in the range of `W`."""
    generator = torch.Generator().manual_seed(seed)
    J = torch.randn(m, rank, generator=generator, dtype=F64)
    J *= 10 ** (spread * torch.randn(m, 1, generator=generator, dtype=F64))
    b = J @ torch.randn(rank, generator=generator, dtype=F64)
    inequality = torch.arange(m) >= n_equal
    return J @ J.T, b, inequality


@given(
    st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 12), st.integers(0, 12), st.booleans()
)
@settings(max_examples=100, deadline=None)
def test_conditions_of_first_order(seed, m, rank, n_equal, spread):
    W, b, inequality = problem(seed, m, rank, n_equal, 2.0 if spread else 0.0)
    y = solve(W, b, inequality)
    assert (y[inequality] >= 0).all()
    assert left_over(W, b, inequality, y) < 1e-8


@given(st.integers(0, 10**6), st.integers(2, 10), st.integers(0, 10))
@settings(max_examples=50, deadline=None)
def test_contradictions_within_a_limit(seed, m, n_equal):
    W, _, inequality = problem(seed, m, max(1, m // 2), n_equal)
    generator = torch.Generator().manual_seed(seed + 1)
    b = torch.randn(m, generator=generator, dtype=F64)
    y = solve(W, b, inequality, limit=1e3)
    assert y.abs().max() <= 1e3 * (1 + 1e-12)
    assert left_over(W, b, inequality, y, 1e3) < 1e-8


def test_repeated_constraints_share_a_multiplier():
    W = torch.ones(3, 3, dtype=F64)
    y = solve(W, torch.full((3,), 6.0, dtype=F64), torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(y, torch.full((3,), 2.0, dtype=F64), atol=1e-8, rtol=0)


def test_stays_close_to_the_start_where_multipliers_are_not_unique():
    W = torch.ones(2, 2, dtype=F64)
    start = torch.tensor([5.0, 1.0], dtype=F64)
    y = solve(W, torch.full((2,), 4.0, dtype=F64), torch.zeros(2, dtype=torch.bool), start=start)
    torch.testing.assert_close(y, torch.tensor([4.0, 0.0], dtype=F64), atol=1e-8, rtol=0)


def test_constraints_without_a_gradient_get_no_multiplier():
    W = torch.tensor([[0.0, 0.0], [0.0, 4.0]], dtype=F64)
    y = solve(W, torch.tensor([1.0, 2.0], dtype=F64), torch.zeros(2, dtype=torch.bool), limit=10.0)
    assert y.tolist() == [0.0, 0.5]


def test_no_constraint():
    empty = torch.zeros(0, dtype=F64)
    assert not len(solve(empty.reshape(0, 0), empty, empty.bool()))


@pytest.mark.parametrize("m", [50, 200])
def test_many_constraints(m):
    W, b, inequality = problem(1, m, m // 2, 5)
    y = solve(W, b, inequality)
    assert left_over(W, b, inequality, y) < 1e-8


def test_a_matrix_of_lower_precision():
    W, b, inequality = problem(3, 20, 10, 4)
    W = W.float().double()
    y = solve(W, b, inequality)
    assert (y[inequality] >= 0).all()
    assert left_over(W, b, inequality, y) < 1e-5
