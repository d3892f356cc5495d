"""Preconditioners against the dense matrices they stand for."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.dense_operators import (
    Dense,
    dense,
    seeded,
    smallest_eigenvalue,
    symmetric,
    vector_of,
)
from tests.support.oracles import make_case
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder.curvature import Damped, Diagonal, Fisher, GaussNewton, LinearOperator
from torch_secondorder.solvers import (
    CG,
    Martens,
    Nystrom,
    NystromApproximation,
    SolveStatus,
    resolve_preconditioner,
)

DTYPES = [torch.float32, torch.float64]


def sketched(operator: LinearOperator, rank: int, seed: int = 0) -> Nystrom:
    nystrom = Nystrom(rank)
    nystrom.refresh(operator, seeded(seed))
    return nystrom


# Martens.


def of_model(kind: type[GaussNewton], device: torch.device, **options: Any) -> GaussNewton:
    case = make_case("mlp", device)
    return kind(ClosureObjective(case.value, case.params()).evaluate(curvature=True), **options)


@pytest.mark.parametrize("power", [0.75, 1.0])
@pytest.mark.parametrize("damping", [0.0, 1e-3, 10.0])
def test_martens_is_a_power_of_the_diagonal(
    damping: float, power: float, device: torch.device
) -> None:
    operator = of_model(GaussNewton, device)
    exact = dense(operator).diagonal()
    martens = Martens(power, n_samples=4000)
    assert martens.refresh(operator, torch.Generator(device).manual_seed(1)) == 4000
    inverse = martens.inverse(damping)
    assert isinstance(inverse, Diagonal) and bool((inverse.entries > 0).all())
    # The square of a normal number has twice the variance of its mean: six sigma of 4000.
    damped = exact + damping  # in units of its mean, so that its size does not matter
    found = inverse.entries.pow(-1 / power) * damped.mean()
    torch.testing.assert_close(found, damped, rtol=6 * (2 / 4000) ** 0.5, atol=1e-9)
    again = martens.inverse(damping).entries
    assert torch.equal(again, inverse.entries)  # the diagonal itself is not spoilt
    assert martens.state_dict() == {}


def test_martens_takes_fisher_matrices_and_forgets(device: torch.device) -> None:
    martens = Martens(n_samples=2)
    assert martens.refresh(of_model(Fisher, device), None) == 2
    assert martens.inverse(1.0).size == 51
    martens.load_state_dict({})
    with pytest.raises(AssertionError):
        martens.inverse(1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_martens_without_anything_to_go_by(dtype: torch.dtype, device: torch.device) -> None:
    w = nn.Parameter(torch.zeros(3, dtype=dtype, device=device))

    def loss() -> Tensor:
        return torch.nn.functional.mse_loss(0 * w, torch.ones_like(w))

    operator = GaussNewton(ClosureObjective(loss, [w]).evaluate(curvature=True))
    martens = Martens()
    martens.refresh(operator, None)
    entries = martens.inverse(0.0).matvec(torch.ones_like(w))
    assert bool((entries > 0).all()) and bool(entries.isfinite().all())


# The Nystrom approximation.


@given(
    size=st.integers(1, 30),
    rank=st.integers(1, 30),
    more=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=40)
def test_a_sketch_of_full_rank_is_the_matrix(size: int, rank: int, more: int, seed: int) -> None:
    rank = min(rank, size)
    columns = min(rank + more, size)
    eigenvalues = torch.zeros(size, dtype=torch.float64)
    eigenvalues[:rank] = torch.logspace(-2, 1, rank, dtype=torch.float64)
    a = symmetric(eigenvalues, seed)
    sketch = NystromApproximation.of(Dense(a), columns, seeded(seed))
    torch.testing.assert_close(dense(sketch), a, rtol=0, atol=1e-8)
    exact = eigenvalues.sort(descending=True).values[:columns]
    torch.testing.assert_close(sketch.values, exact, rtol=0, atol=1e-8)
    eye = torch.eye(columns, dtype=torch.float64)
    torch.testing.assert_close(sketch.vectors.T @ sketch.vectors, eye, rtol=0, atol=1e-12)


@pytest.mark.parametrize("decay", [1.0, 2.0])
def test_the_error_of_a_decaying_spectrum(decay: float) -> None:
    """Frangella, Tropp and Udell 2023, proposition 2.2, for the expected error.

    `E |A - A_nys| <= (1 + 2 (k-p) / (p-1)) l_(k-p+1) + 2 e^2 k / (p^2-1) sum_(j>k-p) l_j`
    for `p` of 2 to `k - 2`. The mean of 20 sketches is far below it, see the last line.
    """
    size, k = 100, 20
    eigenvalues = torch.arange(1, size + 1, dtype=torch.float64) ** -decay
    a = symmetric(eigenvalues)
    errors = []
    for seed in range(20):
        sketch = NystromApproximation.of(Dense(a), k, seeded(seed))
        left = torch.linalg.eigvalsh(a - dense(sketch))
        assert float(left[0]) > -1e-12  # it is never above the matrix
        errors.append(float(left[-1]))
    bound = min(
        (1 + 2 * (k - p) / (p - 1)) * float(eigenvalues[k - p])
        + 2 * math.e**2 * k / (p * p - 1) * float(eigenvalues[k - p :].sum())
        for p in range(2, k - 1)
    )
    mean, scatter = sum(errors) / 20, torch.tensor(errors).std().item()
    # No rank-k approximation is better than the next eigenvalue. Means of 20 scatter by `scatter /
    # 20^(1/2)`: one above the bound would be ten standard deviations off.
    assert float(eigenvalues[k]) <= mean <= bound
    assert mean + 10 * scatter / 20**0.5 <= bound


@given(size=st.integers(2, 30), seed=st.integers(0, 1000), lowest=st.floats(-5.0, -1e-8))
@settings(deadline=None, max_examples=60)
def test_indefinite_operators_give_something_of_use(size: int, seed: int, lowest: float) -> None:
    a = symmetric(torch.linspace(lowest, 5.0, size, dtype=torch.float64), seed)
    nystrom = sketched(Dense(a), 10, seed)
    (sketch,) = [nystrom._sketch]
    assert sketch is not None and bool((sketch.values >= 0).all())
    assert bool(sketch.values.isfinite().all())
    for damping in (0.0, 0.1, 10.0):
        assert smallest_eigenvalue(nystrom.inverse(damping)) > 0


@pytest.mark.parametrize("seed", range(5))
def test_no_value_of_an_indefinite_operator_explodes(seed: int) -> None:
    """Values are divided by what the shift leaves of the lowest one: `|A|^2 / |lowest|`."""
    a = symmetric(torch.linspace(-5, 5, 100, dtype=torch.float64), seed)
    assert float(NystromApproximation.of(Dense(a), 20, seeded(seed)).values[0]) < 50
    whole = NystromApproximation.of(Dense(a), 100, seeded(seed)).values
    exact = torch.linspace(5, -5, 100, dtype=torch.float64).clamp(min=0)
    torch.testing.assert_close(whole, exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_the_zero_operator(damping: float, dtype: torch.dtype, device: torch.device) -> None:
    nystrom = sketched(Dense(torch.zeros(5, 5, dtype=dtype, device=device)), 3)
    v = vector_of(5).to(device, dtype)
    torch.testing.assert_close(nystrom.inverse(damping).matvec(v), v)


# Its inverse.


@pytest.mark.parametrize("damping", [0.0, 1e-4, 1e-1, 10.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_inverse_on_what_was_captured(
    dtype: torch.dtype, damping: float, device: torch.device
) -> None:
    eigenvalues = torch.zeros(40, dtype=torch.float64)
    eigenvalues[:8] = torch.logspace(-2, 1, 8, dtype=torch.float64)
    a = symmetric(eigenvalues).to(device, dtype)
    inverse = sketched(Dense(a), 8).inverse(damping)
    values, q = torch.linalg.eigh(a.double().cpu())
    # The largest value is mapped to one, what was not captured like the smallest that was.
    expected = (10 + damping) / (values.clamp(min=0.01) + damping)
    product = q.T @ dense(inverse).double().cpu() @ q
    # In float32 a value a thousand times smaller than the largest is known to a fifth.
    atol = 0.3 if dtype == torch.float32 else 1e-8
    torch.testing.assert_close(
        product / expected.sqrt() / expected.sqrt()[:, None],
        torch.eye(40, dtype=torch.float64),
        rtol=0,
        atol=atol,
    )


@pytest.mark.parametrize("size", [100, 400])
@pytest.mark.parametrize("decades", [3, 8, 12, 30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_inverse_is_positive_definite_in_its_own_precision(
    dtype: torch.dtype, decades: int, size: int, device: torch.device
) -> None:
    a = symmetric(torch.logspace(-decades, 0, size, dtype=torch.float64)).to(device, dtype)
    nystrom = sketched(Dense(a), 60)
    inverse = nystrom.inverse(0.0)
    assert smallest_eigenvalue(inverse) > 0
    assert nystrom._sketch is not None
    for u in nystrom._sketch.vectors.unbind(1):  # where it is smallest
        assert float(u @ inverse.matvec(u)) > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_saves_iterations(dtype: torch.dtype, device: torch.device) -> None:
    eigenvalues = torch.logspace(-6, 3, 100, dtype=torch.float64)
    a, b = symmetric(eigenvalues).to(device, dtype), vector_of(100).to(device, dtype)
    system = Damped(Dense(a), 1e-2)
    tolerance = 1e-8 if dtype == torch.float64 else 1e-4
    plain = CG(2000, tolerance)(system, b)
    inverse = sketched(Dense(a), 60).inverse(1e-2)
    helped = CG(2000, tolerance)(system, b, preconditioner=inverse)
    assert helped.status is SolveStatus.CONVERGED
    assert 5 * helped.iterations < plain.iterations


# Its life.


def test_one_sketch_serves_several_operators(device: torch.device) -> None:
    nystrom = Nystrom(rank=4, period=3)
    operators = [Dense(symmetric(vector_of(9, seed)).to(device)) for seed in range(7)]
    made = [nystrom.refresh(operator, seeded()) for operator in operators]
    assert made == [operator.products for operator in operators] == [4, 0, 0, 4, 0, 0, 4]
    once = Nystrom(rank=4, period=1)
    assert [once.refresh(operator, seeded()) for operator in operators] == [4] * 7


def test_it_is_made_anew_where_the_operator_is_another() -> None:
    nystrom = Nystrom(rank=4, period=5)
    for matrix, products in (
        (torch.eye(9), 4),
        (torch.eye(9), 0),
        (torch.eye(8), 4),
        (torch.eye(3), 3),  # no more columns than there are
        (torch.eye(3), 0),
        (torch.eye(3, dtype=torch.float64), 3),
    ):
        assert nystrom.refresh(Dense(matrix), seeded()) == products
        assert nystrom.inverse(1.0).matvec(matrix[0]).dtype == matrix.dtype


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_its_state(dtype: torch.dtype, saved: bool, device: torch.device) -> None:
    operator = Dense(symmetric(vector_of(9)).to(device, dtype))
    one, other = Nystrom(4, period=3), Nystrom(4, period=3)
    assert one.state_dict() == {}
    for _ in range(2):
        one.refresh(operator, seeded())
    state = one.state_dict()
    if saved:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    other.refresh(Dense(torch.eye(9, dtype=dtype, device=device)), seeded(5))
    other.load_state_dict(state)
    for seed in range(1, 5):  # through the next sketch
        v = vector_of(9, seed).to(device, dtype)
        assert torch.equal(one.inverse(0.1).matvec(v), other.inverse(0.1).matvec(v))
        made = [n.refresh(operator, seeded(seed)) for n in (one, other)]
        assert made == [0 if seed != 2 else 4] * 2
    other.load_state_dict({})
    assert other.state_dict() == {} and other.refresh(operator, seeded()) == 4


def test_the_generator_decides(device: torch.device) -> None:
    operator = Dense(symmetric(vector_of(9)).to(device))
    one, same, other = (
        NystromApproximation.of(operator, 4, seeded(seed)).vectors for seed in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_names() -> None:
    assert resolve_preconditioner(None) is None
    assert isinstance(resolve_preconditioner("martens"), Martens)
    assert isinstance(resolve_preconditioner("nystrom"), Nystrom)
    mine = Nystrom(3)
    assert resolve_preconditioner(mine) is mine


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Martens(0.0), ValueError, r"power must lie in \(0, 1\], got 0.0"),
        (lambda: Martens(1.5), ValueError, r"power must lie in \(0, 1\], got 1.5"),
        (lambda: Martens(math.nan), ValueError, r"power must lie in \(0, 1\], got nan"),
        (lambda: Martens(n_samples=0), ValueError, "n_samples must be .* at least 1, got 0"),
        (lambda: Martens(n_samples=1.5), ValueError, "n_samples must be an integer .* got 1.5"),
        (lambda: Nystrom(0), ValueError, "rank must be an integer of at least 1, got 0"),
        (lambda: Nystrom(2.5), ValueError, "rank must be an integer of at least 1, got 2.5"),
        (lambda: Nystrom(period=0), ValueError, "period must be an integer .* at least 1, got 0"),
        (
            lambda: Martens().refresh(Diagonal(torch.ones(2)), None),
            TypeError,
            "'martens' is made from model outputs, which Diagonal does not know; use curvature=",
        ),
        (
            lambda: Nystrom(3).refresh(Dense(torch.eye(5), spoil=2), None),
            FloatingPointError,
            "a product of the Nystrom sketch was not finite",
        ),
        (
            lambda: resolve_preconditioner("jacobi"),
            ValueError,
            r"preconditioner must be one of 'kfac', 'martens', 'nystrom', or .* None, got 'jacobi'",
        ),
        (
            lambda: resolve_preconditioner(3),  # type: ignore[arg-type]
            TypeError,
            r"one of .* an instance such as Nystrom\(\), or None, got 3",
        ),
    ],
)
def test_errors(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("deviation", [0.0, 30.0, 300.0, 3000.0])
def test_sketches_whose_vectors_are_not_quite_orthonormal(deviation: float) -> None:
    """As those of other libraries are, on a device say: what is left still is definite."""
    eigenvalues = torch.logspace(-1, 1, 40, dtype=torch.float64)
    eigenvalues[::4] = 0.0
    a = Dense(symmetric(eigenvalues))
    exact = NystromApproximation.of(a, 40, torch.Generator().manual_seed(1))
    noise = torch.randn(40, 40, dtype=torch.float64) * torch.finfo(torch.float64).eps / 40**0.5
    preconditioner = Nystrom(40)
    preconditioner.load_state_dict(
        {"vectors": exact.vectors + deviation * noise, "values": exact.values}
    )
    b = a @ vector_of(40)
    result = CG(1000)(a, b, preconditioner=preconditioner.inverse(0.0))
    assert result.iterations <= CG(1000)(a, b).iterations / 2
