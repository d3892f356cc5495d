"""Eigenpairs, definiteness, traces and spectral densities against dense matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.oracles import dense_hessian, make_case
from torch_secondorder.curvature import Diagonal, LinearOperator
from torch_secondorder.diagnostics import (
    definiteness,
    eigenpairs,
    from_model,
    spectral_density,
    trace,
)


class Dense(LinearOperator):
    """A matrix that counts its products."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.size = matrix, len(matrix)
        self.dtype, self.device = matrix.dtype, matrix.device
        self.products = 0

    def matvec(self, v: Tensor) -> Tensor:
        self.products += 1
        return self.matrix @ v


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    n = len(eigenvalues)
    q = torch.linalg.qr(normal(n, n, seed=seed))[0]
    a = (q * eigenvalues.double()) @ q.T
    return (a + a.T) / 2


def ordered(eigenvalues: Tensor, which: str) -> Tensor:
    keys = {"largest": -eigenvalues, "smallest": eigenvalues, "magnitude": -eigenvalues.abs()}
    return eigenvalues[keys[which].argsort()]


# Eigenpairs.


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
@pytest.mark.parametrize("subspace", [None, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigenpairs_agree_with_dense_ones(
    dtype: torch.dtype, subspace: int | None, which: Any, device: torch.device
) -> None:
    """With and without restarts."""
    eigenvalues = torch.linspace(-9, 8, 120).double() ** 3
    a = symmetric(eigenvalues).to(device, dtype)
    operator = Dense(a)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-7
    found = eigenpairs(operator, 5, which, tolerance=tolerance, subspace=subspace)
    expected = ordered(eigenvalues, which)[:5]
    assert found.converged and found.products == operator.products
    torch.testing.assert_close(found.values, expected, rtol=1e-5, atol=0)
    v = found.vectors
    assert v.shape == (120, 5) and v.dtype == dtype and v.device.type == device.type
    torch.testing.assert_close(v.T @ v, torch.eye(5, dtype=dtype, device=device), rtol=0, atol=1e-5)
    left = torch.linalg.vector_norm(a @ v - v * found.values.to(v), dim=0).cpu().double()
    assert (left <= 1.1 * tolerance * expected.abs() + 1e-5 * 729).all()
    if dtype == torch.float64:
        torch.testing.assert_close(found.residuals, left, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("name", ["mlp", "cnn", "batchnorm", "rnn"])
def test_eigenpairs_of_a_model(name: str, device: torch.device) -> None:
    case = make_case(name, device)
    eigenvalues = torch.linalg.eigvalsh(dense_hessian(case.pure(), case.params())).cpu()
    problem = from_model(case.model, case.loss, (case.x, case.y))
    for which in ("largest", "smallest"):
        found = eigenpairs(problem, 3, which, tolerance=1e-6)
        expected = ordered(eigenvalues, which)[:3]
        torch.testing.assert_close(found.values, expected, rtol=1e-8, atol=1e-10)
        assert found.converged


@given(
    size=st.integers(2, 24), distinct=st.integers(1, 4), k=st.integers(1, 23), seed=st.integers(0)
)
@settings(deadline=None, max_examples=60)
def test_repeated_eigenvalues_are_all_found(size: int, distinct: int, k: int, seed: int) -> None:
    """The Krylov space of one vector ends early here, and holds each eigenvalue once."""
    eigenvalues = (torch.arange(size) % distinct).double()
    found = eigenpairs(Dense(symmetric(eigenvalues, seed % 1000)), min(k, size - 1))
    expected = ordered(eigenvalues, "largest")[: min(k, size - 1)]
    torch.testing.assert_close(found.values, expected, rtol=1e-9, atol=1e-9)


def test_a_large_matrix_of_low_rank_takes_few_products(device: torch.device) -> None:
    factor = normal(3000, 3).to(device)

    class LowRank(Diagonal):
        def matvec(self, v: Tensor) -> Tensor:
            return factor @ (factor.T @ v)

    found = eigenpairs(LowRank(torch.ones(3000, device=device).double()), 10)
    assert found.converged and found.products <= 20
    torch.testing.assert_close(
        found.values[:3], torch.linalg.eigvalsh(factor.T @ factor).flip(0).cpu()
    )
    assert found.values[3:].abs().max() < 1e-8 * found.values[0]


def test_eigenpairs_take_less_than_half_the_products_of_power_iteration() -> None:
    eigenvalues = torch.cat([torch.logspace(0, 2, 10), torch.linspace(0, 0.5, 190)]).double()
    a = symmetric(eigenvalues)
    expected, products, vectors = ordered(eigenvalues, "largest"), 0, []
    for value in expected[:10]:  # stopped by an oracle, as early as can be
        v, quotient = normal(200, seed=products), math.inf
        while abs(quotient - value) > 1e-3 * value:
            for u in vectors:
                v = v - (u @ v) * u
            v = v / v.norm()
            products += 1
            v, quotient = a @ v, float(v @ (a @ v))
        vectors.append(v / v.norm())
    found = eigenpairs(Dense(a), 10, tolerance=1e-3)
    assert ((found.values - expected[:10]) / expected[:10]).abs().max() < 1e-3
    assert found.products <= 0.5 * products


def test_too_few_products_are_reported_as_not_converged() -> None:
    found = eigenpairs(
        Dense(symmetric(torch.linspace(0, 1, 100))), 4, max_products=6, tolerance=1e-6
    )
    assert not found.converged and found.products == 6 and found.values.shape == (4,)


def test_the_start_vector_comes_from_the_generator() -> None:
    operator = Dense(symmetric(torch.linspace(0, 1, 100)))
    first, again = (eigenpairs(operator, 1, tolerance=0.1).values for _ in range(2))
    other = eigenpairs(
        operator, 1, tolerance=0.1, generator=torch.Generator().manual_seed(7)
    ).values
    assert torch.equal(first, again) and not torch.equal(first, other)


# Definiteness.


@given(size=st.integers(1, 25), lowest=st.floats(-2, 2), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_the_verdict_is_right(size: int, lowest: float, seed: int) -> None:
    eigenvalues = torch.linspace(lowest, 3, size).double()
    a = symmetric(eigenvalues, seed)
    answer = definiteness(Dense(a))
    magnitude = float(eigenvalues.abs().max())
    if abs(lowest) > 1e-12 * magnitude or lowest == 0:
        assert answer.semidefinite == (float(eigenvalues.min()) >= 0)
    v = answer.direction
    assert float(v.norm()) == pytest.approx(1.0)
    assert float(v @ a @ v) == pytest.approx(answer.curvature, abs=1e-10)
    left = float((a @ v - answer.curvature * v).norm())
    assert left == pytest.approx(answer.residual, abs=1e-10)


def test_one_negative_curvature_among_many_is_found(device: torch.device) -> None:
    """With a proof, or with the bound on missed curvature if there is none."""
    entries = torch.linspace(0.0, 10.0, 2000, device=device).double()
    clean = definiteness(Diagonal(entries), tolerance=1e-2)
    assert clean.semidefinite and clean.failure_probability <= 1e-3
    assert clean.products == 58  # log(1.648 sqrt(2000) / 1e-3) / (2 sqrt(1e-2)), and one more
    assert 0 <= clean.curvature < 0.02 and clean.magnitude == pytest.approx(10, rel=1e-3)
    entries[1234] = -0.1
    for seed in range(20):  # a residual alone would let it pass
        generator = torch.Generator().manual_seed(seed)
        found = definiteness(Diagonal(entries), tolerance=1e-2, generator=generator)
        assert found.semidefinite is False and found.curvature < 0
        v = found.direction
        assert float(v @ (entries * v)) == pytest.approx(found.curvature)


def test_a_small_subspace_gives_no_verdict_but_finds_negative_curvature() -> None:
    entries = torch.linspace(0.0, 10.0, 2000).double()
    answer = definiteness(Diagonal(entries), tolerance=1e-2, subspace=8, max_products=100)
    assert answer.semidefinite is None and answer.products == 100
    assert answer.failure_probability == 1.0
    entries[1234] = -0.5
    answer = definiteness(Diagonal(entries), tolerance=1e-2, subspace=8)
    assert answer.semidefinite is False and answer.products > 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 700])
def test_matrices_of_zeros_and_ones_are_semidefinite(size: int, dtype: torch.dtype) -> None:
    for number in (0.0, 1.0):
        answer = definiteness(Diagonal(torch.full((size,), number, dtype=dtype)))
        assert answer.semidefinite is True
        assert answer.curvature == pytest.approx(number) and answer.products <= 5


def test_an_undecided_verdict_is_none() -> None:
    answer = definiteness(Diagonal(torch.logspace(-6, 0, 500).double()), max_products=5)
    assert answer.semidefinite is None and answer.products == 5
    assert answer.failure_probability == 1.0


def test_definiteness_of_a_model_at_a_saddle_and_of_its_gauss_newton_matrix() -> None:
    case = make_case("mlp", torch.device("cpu"))
    data = (case.x, case.y)
    hessian = dense_hessian(case.pure(), case.params())
    lowest = float(torch.linalg.eigvalsh(hessian)[0])
    assert lowest < -1e-2
    answer = definiteness(from_model(case.model, case.loss, data))
    assert answer.semidefinite is False and lowest - 1e-12 <= answer.curvature < 0
    gauss_newton = from_model(case.model, case.loss, data, curvature="ggn")
    assert definiteness(gauss_newton).semidefinite is True


# Traces.


@pytest.mark.parametrize("rank", [0, 1, 5, 20])
@pytest.mark.parametrize("n_products", [60, 500])
def test_traces_are_exact_for_low_rank_and_small_size(rank: int, n_products: int) -> None:
    eigenvalues = torch.zeros(200).double()
    eigenvalues[:rank] = torch.linspace(-3, 5, rank)
    operator = Dense(symmetric(eigenvalues))
    estimate = trace(operator, n_products)
    exact = float(eigenvalues.sum())
    assert estimate.value == pytest.approx(exact, abs=1e-9)
    assert estimate.standard_error == pytest.approx(0.0, abs=1e-9)
    assert estimate.products == operator.products == min(n_products, 200)


def test_the_standard_error_of_a_trace_matches_its_spread_over_draws() -> None:
    eigenvalues = torch.arange(1.0, 301.0).double() ** -2
    operator, exact = Dense(symmetric(eigenvalues)), float(eigenvalues.sum())
    errors, stated = [], []
    for seed in range(200):
        estimate = trace(operator, 30, generator=torch.Generator().manual_seed(seed))
        errors.append(estimate.value - exact)
        stated.append(estimate.standard_error**2)
    mean_square = torch.tensor(errors).square().mean().item()
    assert abs(sum(errors) / 200) < 3 * math.sqrt(mean_square / 200)
    assert sum(stated) / 200 == pytest.approx(mean_square, rel=0.35)
    # Hutchinson's variance with as many random signs, which a fast decay leaves behind.
    matrix = operator.matrix
    plain = 2 * (matrix.square().sum() - matrix.diagonal().square().sum()) / 30
    assert mean_square < 0.1 * float(plain)


def test_the_trace_of_a_model(device: torch.device) -> None:
    case = make_case("cnn", device)
    exact = float(dense_hessian(case.pure(), case.params()).trace())
    estimate = trace(from_model(case.model, case.loss, (case.x, case.y)))
    assert estimate.value == pytest.approx(exact, rel=1e-10)


def test_a_single_random_sample_has_no_standard_error() -> None:
    assert math.isnan(trace(Diagonal(torch.ones(10)), 3).standard_error)


# Spectral densities.


def test_the_density_of_all_eigenvalues(device: torch.device) -> None:
    """With enough steps the nodes are the eigenvalues, and many vectors weigh them alike."""
    eigenvalues = torch.tensor([-2.0, 0.0, 1.0, 5.0]).double()
    found = spectral_density(Dense(symmetric(eigenvalues).to(device)), 600, 10)
    torch.testing.assert_close(found.nodes, eigenvalues.expand(600, 4), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(600).double())
    torch.testing.assert_close(
        found.weights.mean(0), torch.full((4,), 0.25).double(), atol=0.04, rtol=0
    )
    assert found.products == 2400 and found.size == 4
    grid = torch.linspace(-4, 7, 2001).double()
    density = found.density(grid, 0.1)
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1.0, abs=1e-6)
    at = found.density(eigenvalues, 0.1)
    expected = 0.25 / (0.1 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(at, torch.full((4,), expected).double(), rtol=0.1, atol=0)


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_averages_are_moments_of_the_spectrum(reorthogonalize: bool) -> None:
    eigenvalues = torch.cat([torch.linspace(0.1, 1, 290), torch.linspace(5, 50, 10)]).double()
    found = spectral_density(Dense(symmetric(eigenvalues)), 30, 40, reorthogonalize=reorthogonalize)
    assert found.nodes.shape == (30, 40) and found.products == 1200
    for function in (lambda t: t, torch.log, lambda t: t**2):
        mean, error = found.average(function)
        assert abs(mean - float(function(eigenvalues).mean())) < 4 * error
        assert error < 0.3 * abs(mean)
    assert math.isnan(spectral_density(Diagonal(torch.ones(5)), 1, 2).average(torch.exp)[1])


def test_rows_of_different_lengths_are_padded_with_weight_zero() -> None:
    from torch_secondorder.diagnostics.spectrum import SpectralDensity, _stacked

    rows = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
    nodes = _stacked(rows, repeat_last=True)
    assert nodes.tolist() == [[1.0, 2.0], [3.0, 3.0]]
    weights = _stacked([torch.tensor([0.5, 0.5]), torch.tensor([1.0])], repeat_last=False)
    assert weights.tolist() == [[0.5, 0.5], [1.0, 0.0]]
    spectrum = SpectralDensity(nodes.double(), weights.double(), 5, 3)
    assert spectrum.average(lambda t: t)[0] == pytest.approx(2.25)
    # Nodes of weight zero do not count, even if the function is not finite there.
    nodes, weights = torch.tensor([[0.0, 1.0]]).double(), torch.tensor([[0.0, 1.0]]).double()
    assert SpectralDensity(nodes, weights, 2, 2).average(torch.log)[0] == 0.0


def test_a_plot(device: torch.device) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = spectral_density(Diagonal(torch.arange(20.0, device=device)), 2, 10)
    ax = found.plot()
    assert ax.get_yscale() == "log" and len(ax.lines) == 1
    assert found.plot(ax, width=0.5) is ax and len(ax.lines) == 2
    pyplot.close("all")


# Errors.

TEN = Diagonal(torch.arange(10.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: eigenpairs(TEN, 10), "k must be below the number of parameters, 10, got 10"),
        (lambda: eigenpairs(TEN, 0), "k must be an integer of at least 1, got 0"),
        (lambda: eigenpairs(TEN, 2.0), "k must be an integer .* got 2.0"),
        (lambda: eigenpairs(TEN, 3, max_products=2), "max_products .* at least 3, got 2"),
        (lambda: eigenpairs(TEN, 3, "lowest"), "which must be one of .*'magnitude'.* got 'lowest'"),
        (lambda: eigenpairs(TEN, 3, tolerance=-1.0), r"tolerance must lie in \[0, 1\), got -1.0"),
        (lambda: eigenpairs(TEN, 3, subspace=4), r"subspace must be at least k \+ 2 = 5, got 4"),
        (lambda: definiteness(TEN, max_products=1), "max_products .* at least 2, got 1"),
        (
            lambda: definiteness(TEN, tolerance=math.nan),
            r"must lie in \(0, 1\), got nan",
        ),
        (
            lambda: definiteness(TEN, failure_probability=0),
            r"failure_probability must lie in \(0, 1\), got 0",
        ),
        (lambda: definiteness(TEN, subspace=3), "subspace must be .* at least 4 or None, got 3"),
        (lambda: trace(TEN, 2), "n_products must be an integer of at least 3, got 2"),
        (lambda: spectral_density(TEN, 0), "n_vectors .* at least 1, got 0"),
        (lambda: spectral_density(TEN, 1, 0), "n_steps .* at least 1, got 0"),
        (
            lambda: spectral_density(TEN, 1, 2).density(torch.ones(2), 0.0),
            "width must be a finite number above 0, got 0.0",
        ),
    ],
)
def test_arguments_out_of_range(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("ask", [eigenpairs, definiteness, trace, spectral_density])
def test_products_that_are_not_finite_raise(ask: Callable[[Any], object]) -> None:
    entries = torch.ones(20)
    entries[3] = math.inf
    with pytest.raises(RuntimeError, match=r"product \d with the curvature is not finite"):
        ask(Diagonal(entries))
