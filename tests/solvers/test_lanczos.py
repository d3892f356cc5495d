"""The Lanczos process against dense eigenvalues."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.dense_operators import Dense, Identity
from torch_secondorder._params import space
from torch_secondorder.curvature import Diagonal
from torch_secondorder.solvers.lanczos import Tridiagonal, lanczos

DTYPES = [torch.float32, torch.float64]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    q = torch.linalg.qr(normal(len(eigenvalues), len(eigenvalues), seed=seed))[0]
    a = (q * eigenvalues) @ q.T
    return (a + a.T) / 2


def dense(t: Tridiagonal) -> Tensor:
    return t.diagonal.diag() + t.off_diagonal.diag(1) + t.off_diagonal.diag(-1)


def check_relation(t: Tridiagonal, a: Tensor, relative: float) -> None:
    """`Q'Q = I`, and `A Q = Q T` but for the last column."""
    assert t.basis is not None
    q = t.basis.double().cpu().T
    a = a.double().cpu()
    k = len(t.diagonal)
    assert q.shape == (len(a), k) and t.off_diagonal.shape == (k - 1,)
    assert t.diagonal.dtype == t.off_diagonal.dtype == torch.float64
    torch.testing.assert_close(q.T @ q, torch.eye(k).double(), rtol=0, atol=relative)
    left = a @ q - q @ dense(t)
    magnitude = float(torch.linalg.matrix_norm(a, 2))
    assert float(left[:, :-1].abs().max() if k > 1 else 0) <= relative * magnitude
    assert abs(float(left[:, -1].norm()) - t.residual) <= relative * magnitude


@pytest.mark.parametrize("steps", [1, 2, 10, 40, 60])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_lanczos_relation(dtype: torch.dtype, steps: int, device: torch.device) -> None:
    a = symmetric(torch.linspace(-3, 5, 60, dtype=torch.float64)).to(device, dtype)
    start = normal(60, seed=1).to(device, dtype)
    before = start.clone()
    operator = Dense(a)
    t = lanczos(operator, start, steps)
    assert len(t.diagonal) == operator.products == steps
    assert t.basis.dtype == dtype and t.basis.device.type == device.type
    check_relation(t, a, 1e-5 if dtype == torch.float32 else 1e-13)
    first = start / torch.linalg.vector_norm(start)
    torch.testing.assert_close(t.basis[0], first)
    assert torch.equal(start, before)


def test_the_basis_stays_orthogonal_where_little_is_left(device: torch.device) -> None:
    """Once an eigenvector is found, most of a product lies in the basis, and cancels."""
    a = symmetric(torch.cat([torch.tensor([1e6]), torch.linspace(0, 1, 59)]).double())
    q = lanczos(Dense(a.to(device)), normal(60).to(device), 25).basis
    eye = torch.eye(25, dtype=torch.float64, device=device)
    torch.testing.assert_close(q @ q.T, eye, rtol=0, atol=1e-14)


@pytest.mark.parametrize("seed", range(3))
def test_all_steps_give_the_whole_spectrum(seed: int, device: torch.device) -> None:
    eigenvalues = torch.linspace(-3, 5, 30, dtype=torch.float64)
    a = symmetric(eigenvalues, seed).to(device)
    t = lanczos(Dense(a), normal(30, seed=seed).to(device), 1000)
    values, _ = t.eigh()
    assert values.dtype == torch.float64
    torch.testing.assert_close(values, eigenvalues, rtol=1e-11, atol=1e-11)
    assert t.residual <= 1e-10


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_ends_of_the_spectrum_come_first(reorthogonalize: bool, device: torch.device) -> None:
    eigenvalues = torch.cat([torch.tensor([-2.0, 20.0]), torch.linspace(0, 1, 98)]).double()
    a = symmetric(eigenvalues).to(device)
    t = lanczos(Dense(a), normal(100).to(device), 40, reorthogonalize=reorthogonalize)
    values, _ = t.eigh()
    assert float(values[0]) == pytest.approx(-2.0, abs=1e-10)
    assert float(values[-1]) == pytest.approx(20.0, abs=1e-10)
    assert (t.basis is None) != reorthogonalize
    copies = int(((values - 20.0).abs() < 1e-6).sum())
    assert copies == 1 if reorthogonalize else copies > 1


def test_ritz_vectors_and_their_residuals(device: torch.device) -> None:
    a = symmetric(torch.logspace(-3, 1, 50, dtype=torch.float64)).to(device)
    t = lanczos(Dense(a), normal(50).to(device), 12)
    values, _ = t.eigh()
    bounds = t.residuals()
    y = t.ritz_vectors(range(12))
    assert y.shape == (50, 12) and y.device.type == device.type
    eye = torch.eye(12, dtype=torch.float64, device=device)
    torch.testing.assert_close(y.T @ y, eye, rtol=0, atol=1e-12)
    left = torch.linalg.vector_norm(a @ y - y * values.to(device), dim=0).cpu()
    torch.testing.assert_close(bounds, left, rtol=1e-8, atol=1e-12)
    exact = torch.linalg.eigvalsh(a).cpu()
    nearest = (values[:, None] - exact).abs().min(dim=1).values
    assert (nearest <= bounds + 1e-12).all()
    chosen = t.ritz_vectors([0, -1])
    torch.testing.assert_close(chosen, y[:, [0, 11]])


def test_ritz_vectors_keep_the_dtype(device: torch.device) -> None:
    a = symmetric(torch.linspace(-1, 1, 20, dtype=torch.float64)).to(device, torch.float32)
    t = lanczos(Dense(a), torch.ones(20, device=device), 20)
    (lowest,) = t.ritz_vectors([0]).unbind(1)
    assert lowest.dtype == torch.float32
    assert float(lowest @ (a @ lowest)) == pytest.approx(-1.0, abs=1e-5)


@given(size=st.integers(1, 12), steps=st.integers(1, 12), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=50)
def test_the_quadrature_is_exact_for_polynomials(size: int, steps: int, seed: int) -> None:
    """Gauss quadrature with `k` nodes integrates degrees below `2 k`."""
    a = symmetric(normal(size, seed=seed + 1), seed)
    start = normal(size, seed=seed + 2)
    t = lanczos(Dense(a), start, steps)
    values, first = t.eigh()
    weights = first.square()
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-12)
    v = start / start.norm()
    bound = max(1.0, float(torch.linalg.matrix_norm(a, 2)))
    power = v
    for degree in range(2 * len(t.diagonal)):
        exact = float(v @ power)
        assert abs(float(weights @ values**degree) - exact) <= 1e-10 * bound**degree
        power = a @ power


@given(size=st.integers(1, 30), distinct=st.integers(1, 3), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=50)
def test_it_ends_at_an_invariant_subspace(size: int, distinct: int, seed: int) -> None:
    """With few distinct eigenvalues, a Krylov space has as many dimensions."""
    eigenvalues = (torch.arange(size) % distinct).double() - 1
    t = lanczos(Dense(symmetric(eigenvalues, seed)), normal(size, seed=seed), size)
    different = eigenvalues.unique()
    assert len(t.diagonal) == len(t.basis) == len(different)
    torch.testing.assert_close(t.eigh()[0], different, rtol=1e-9, atol=1e-9)
    assert t.residual <= 1e-9


@pytest.mark.parametrize("reorthogonalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_start_inside_a_subspace(
    dtype: torch.dtype, reorthogonalize: bool, device: torch.device
) -> None:
    entries = torch.arange(1, 9, device=device, dtype=dtype)
    start = torch.zeros(8, device=device, dtype=dtype)
    start[[1, 4, 6]] = 1.0
    t = lanczos(Diagonal(entries), start, 8, reorthogonalize=reorthogonalize)
    values, first = t.eigh()
    torch.testing.assert_close(values, torch.tensor([2.0, 5.0, 7.0]).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(first.square(), torch.full((3,), 1 / 3).double(), rtol=1e-4, atol=0)
    if reorthogonalize:
        assert t.basis.shape == (3, 8) and t.basis.untyped_storage().nbytes() == t.basis.nbytes


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_trivial_operators(reorthogonalize: bool, device: torch.device) -> None:
    ones = torch.ones(5, device=device)
    zero = lanczos(Diagonal(0 * ones), ones, 5, reorthogonalize=reorthogonalize)
    assert zero.diagonal.tolist() == [0.0] and zero.residual == 0.0
    one = lanczos(Identity(), ones.requires_grad_(), 5, reorthogonalize=reorthogonalize)
    assert one.diagonal.tolist() == pytest.approx([1.0])
    assert one.residuals().tolist() == pytest.approx([0.0], abs=1e-6)


def test_the_device_is_waited_for_once_per_step(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = 0

    def counting(*scalars: Tensor) -> list[float]:
        nonlocal waits
        waits += 1
        return space.to_host(*scalars)

    monkeypatch.setattr(sys.modules[lanczos.__module__], "to_host", counting)
    lanczos(Diagonal(torch.arange(20.0, device=device)), torch.ones(20, device=device), 7)
    assert waits == 8


@pytest.mark.parametrize("spoil", [1, 3])
@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_a_product_that_is_not_finite(
    reorthogonalize: bool, spoil: int, device: torch.device
) -> None:
    a = symmetric(torch.linspace(1, 2, 10, dtype=torch.float64)).to(device)
    with pytest.raises(RuntimeError, match=f"the product in step {spoil} is not finite"):
        lanczos(Dense(a, spoil), normal(10).to(device), 5, reorthogonalize=reorthogonalize)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: lanczos(Identity(), torch.ones(5), 0), ValueError, "steps .* at least 1, got 0"),
        (lambda: lanczos(Identity(), torch.ones(5), 2.0), ValueError, "steps .* got 2.0"),
        (
            lambda: lanczos(Identity(), torch.ones(4), 1),
            ValueError,
            r"start must have shape \(5,\), got \(4,\)",
        ),
        (
            lambda: lanczos(Identity(), torch.zeros(5), 1),
            ValueError,
            "start must be finite and not zero, but its norm is 0.0",
        ),
        (
            lambda: lanczos(Identity(), torch.full((5,), math.nan), 1),
            ValueError,
            "start must be finite and not zero, but its norm is nan",
        ),
        (
            lambda: lanczos(Identity(), torch.full((5,), math.inf), 1),
            ValueError,
            "start must be finite and not zero, but its norm is inf",
        ),
        (
            lambda: lanczos(Identity(), torch.ones(5), 1, reorthogonalize=False).ritz_vectors([0]),
            ValueError,
            "Ritz vectors need the basis; call lanczos with reorthogonalize=True",
        ),
        (lambda: lanczos(Identity(), torch.ones(5), 1).ritz_vectors([1]), IndexError, "1"),
    ],
)
def test_errors(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
