"""Estimates of diagonals, and the random vectors that they are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.oracles import CASES, dense_gauss_newton, dense_hessian, make_case
from torch_secondorder import AdaHessian, FunctionalObjective, Sophia, mark_outputs
from torch_secondorder._closure.runner import ModuleRegistry
from torch_secondorder._foundation.buffer_pool import BufferPool
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder._objective.one_shot import SingleEvaluation
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.curvature import (
    Damped,
    Diagonal,
    GaussNewton,
    GaussNewtonBartlett,
    Hessian,
    Hutchinson,
    LinearOperator,
    exact_diagonal,
)
from torch_secondorder.curvature._random import draw, rademacher

CPU = torch.device("cpu")
DOUBLE = torch.float64

#: So many standard errors are exceeded by chance once in 4e11 times, for a normal distribution; by
#: one of 60,000 numbers once in 6e6 times. Seeds are fixed, so that it happens never or always.
K = 7.0


class Dense(LinearOperator):
    """A matrix, as an operator."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.size, self.dtype, self.device = len(matrix), matrix.dtype, matrix.device

    def matvec(self, vector: Tensor) -> Tensor:
        return self.matrix @ vector


def symmetric(size: int, device: torch.device = CPU) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    a = torch.randn(size, size, generator=generator, dtype=DOUBLE)
    return (a + a.T).to(device)


def variance(matrix: Tensor, distribution: str) -> Tensor:
    """Of one sample, entry by entry."""
    off = matrix.square().sum(1) - matrix.diagonal().square()
    return off if distribution == "rademacher" else off + 2 * matrix.diagonal().square()


# Exactly.


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 130])
def test_the_exact_diagonal_of_a_matrix(size: int, device: torch.device) -> None:
    matrix = symmetric(size, device)
    torch.testing.assert_close(exact_diagonal(Dense(matrix)), matrix.diagonal(), rtol=0, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_the_exact_diagonal_of_a_model(name: str, device: torch.device) -> None:
    case = make_case(name, device)
    objective = ClosureObjective(case.closure(), case.params())
    evaluation = objective.evaluate(curvature=True)
    expected = dense_hessian(case.pure(), case.params()).diagonal()
    found = exact_diagonal(Hessian(evaluation))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    damped = exact_diagonal(Damped(Hessian(evaluation), 0.5))
    torch.testing.assert_close(damped, expected + 0.5, rtol=1e-10, atol=1e-10)


# Hutchinson's.


@pytest.mark.parametrize("samples", [1, 3, 10])
@pytest.mark.parametrize(
    ("distribution", "weighted"), [("rademacher", False), ("rademacher", True), ("gaussian", True)]
)
def test_a_diagonal_matrix_is_estimated_without_error(
    distribution: Any, weighted: bool, samples: int, device: torch.device
) -> None:
    entries = torch.linspace(-2, 2, 70, dtype=DOUBLE, device=device)
    estimator = Hutchinson(samples, distribution=distribution, weighted=weighted)
    found = estimator(Diagonal(entries))
    torch.testing.assert_close(found, entries, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("samples", [1, 2, 5])
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_means_are_right_and_spread_as_they_should(
    distribution: Any, samples: int, device: torch.device
) -> None:
    """Mean within K standard errors of the truth, from the known variance; and that variance."""
    matrix = symmetric(9, device)
    operator, estimator = Dense(matrix), Hutchinson(samples, distribution=distribution)
    generator = torch.Generator(device).manual_seed(1)
    count = 2000
    drawn = torch.stack([estimator(operator, generator) for _ in range(count)])
    expected = variance(matrix, distribution) / samples
    error = (expected / count).sqrt()
    assert ((drawn.mean(0) - matrix.diagonal()).abs() <= K * error).all()
    # The variance of a variance of tails like these is at most some tens of its square.
    assert (drawn.var(0) / expected).log().abs().max() < 0.35
    # The test has power.
    assert ((drawn.mean(0) - 2 * matrix.diagonal()).abs() > K * error).any()


def test_the_variance_falls_with_the_number_of_samples() -> None:
    operator = Dense(symmetric(9))
    generator = torch.Generator().manual_seed(2)

    def spread(samples: int) -> float:
        estimator = Hutchinson(samples)
        return float(
            torch.stack([estimator(operator, generator) for _ in range(1500)]).var(0).sum()
        )

    one = spread(1)
    for samples in (2, 4, 16):
        assert spread(samples) * samples / one == pytest.approx(1, abs=0.2)


def test_weights_make_gaussian_probes_as_good_as_signs_on_diagonals() -> None:
    matrix = 10 * torch.eye(6, dtype=DOUBLE) + 0.1 * symmetric(6)
    generator = torch.Generator().manual_seed(3)

    def spread(weighted: bool) -> float:
        estimator = Hutchinson(8, distribution="gaussian", weighted=weighted)
        drawn = torch.stack([estimator(Dense(matrix), generator) for _ in range(300)])
        return float(drawn.var(0).mean())

    assert spread(True) < 0.05 * spread(False)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_an_estimate_is_the_mean_of_probes_times_products(
    distribution: Any, weighted: bool, device: torch.device
) -> None:
    matrix = symmetric(7, device)
    estimator = Hutchinson(4, distribution=distribution, weighted=weighted)
    found = estimator(Dense(matrix), torch.Generator(device).manual_seed(4))
    generator = torch.Generator(device).manual_seed(4)
    probes = [draw(7, distribution, generator, dtype=DOUBLE, device=device) for _ in range(4)]
    above = torch.stack([z * (matrix @ z) for z in probes]).sum(0)
    below = torch.stack([z * z for z in probes]).sum(0) if weighted else torch.full_like(above, 4)
    torch.testing.assert_close(found, above / below, rtol=1e-12, atol=1e-12)


class Same(LinearOperator):
    """The identity that gives back what it was given."""

    size, dtype, device = 5, DOUBLE, CPU

    def matvec(self, vector: Tensor) -> Tensor:
        return vector


class Kept(LinearOperator):
    """Gives back memory of its own: the rows' sums where the vector is all ones."""

    dtype, device = DOUBLE, CPU

    def __init__(self, matrix: Tensor) -> None:
        self.size, self.matrix, self.last = len(matrix), matrix, torch.zeros(len(matrix)).double()

    def matvec(self, vector: Tensor) -> Tensor:
        torch.mv(self.matrix, vector, out=self.last)
        return self.last


@pytest.mark.parametrize("samples", [1, 3])
def test_an_operator_may_return_its_argument(samples: int) -> None:
    estimator = Hutchinson(samples, distribution="gaussian", weighted=True)
    torch.testing.assert_close(estimator(Same()), torch.ones(5, dtype=DOUBLE))


def test_what_an_operator_keeps_is_left_alone() -> None:
    operator = Kept(symmetric(5))
    estimate = Hutchinson()(operator, torch.Generator().manual_seed(5))
    z = rademacher(5, torch.Generator().manual_seed(5), dtype=DOUBLE, device=CPU)
    torch.testing.assert_close(operator.last, operator.matrix @ z)
    torch.testing.assert_close(estimate, z * (operator.matrix @ z))


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_estimates_for_models_are_unbiased(name: str, samples: int, device: torch.device) -> None:
    case = make_case(name, device)
    objective = ClosureObjective(case.closure(), case.params())
    operator = Hessian(objective.evaluate(curvature=True))
    matrix = dense_hessian(case.pure(), case.params())
    estimator, count = Hutchinson(samples), 60
    generator = torch.Generator(device).manual_seed(6)
    mean = torch.stack([estimator(operator, generator) for _ in range(count)]).mean(0)
    error = (variance(matrix, "rademacher") / (count * samples)).sqrt()
    assert ((mean - matrix.diagonal()).abs() <= K * error + 1e-12).all()


@pytest.mark.parametrize("samples", [1, 2, 9])
@pytest.mark.parametrize("name", ["mlp", "cnn", "batchnorm"])
def test_what_is_estimated_in_a_step_is_what_the_operator_gives(
    name: str, samples: int, device: torch.device
) -> None:
    """Inside `backward()`, and from a retained graph; several at once, and one by one."""
    case = make_case(name, device)
    params = case.params()
    operator = Hessian(ClosureObjective(case.closure(), params).evaluate(curvature=True))
    estimator = Hutchinson(samples)
    expected = estimator(operator, torch.Generator(device).manual_seed(7))
    vector, buffer_pool = ParameterVector(params), BufferPool()
    for _ in range(2):
        generator = torch.Generator(device).manual_seed(7)
        watch = estimator.watch(vector, generator, buffer_pool)
        with torch.no_grad():
            SingleEvaluation(case.closure(), params, ModuleRegistry()).run(watch)
        assert watch.products == samples
        found = watch.diagonal()
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


# From labels.


def bartlett_cases() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    return {
        "cross-entropy": F.cross_entropy,
        "summed": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
        "squares": lambda z, y: F.mse_loss(z, F.one_hot(y, 3).to(z.dtype)),
        "binary": lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, 3).to(z.dtype)),
    }


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("name", bartlett_cases())
def test_labels_give_the_diagonal_of_gauss_newton(name: str, samples: int) -> None:
    """Means of 400 estimates within K of their own standard errors."""
    torch.manual_seed(0)
    loss = bartlett_cases()[name]
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    x, y = torch.randn(5, 3, dtype=DOUBLE), torch.randint(3, (5,))
    params = list(model.parameters())

    def outputs(*values: Tensor) -> list[Tensor]:
        w1, b1, w2, b2 = values
        return [F.linear(F.linear(x, w1, b1).tanh(), w2, b2)]

    expected = dense_gauss_newton(outputs, lambda z: loss(z, y), params).diagonal()
    evaluation = ClosureObjective(lambda: loss(model(x), y), params).evaluate(curvature=True)
    estimator, generator = GaussNewtonBartlett(samples), torch.Generator().manual_seed(8)
    drawn = torch.stack([estimator(evaluation, generator) for _ in range(400)])
    error = drawn.std(0) / 20
    assert (drawn >= 0).all()
    assert ((drawn.mean(0) - expected).abs() <= K * error + 1e-12).all()
    assert ((drawn.mean(0) - 1.5 * expected).abs() > K * error).any()
    exact = exact_diagonal(GaussNewton(evaluation))
    torch.testing.assert_close(exact, expected, rtol=1e-10, atol=1e-12)


def test_a_marked_output_gives_the_empirical_diagonal() -> None:
    """Of one sample the estimate is exact: the square of its gradient."""
    torch.manual_seed(0)
    w = torch.randn(3, dtype=DOUBLE)
    x = torch.randn(1, 3, dtype=DOUBLE)
    objective = FunctionalObjective(lambda w: mark_outputs(x @ w).cosh().sum(), w)
    evaluation = objective.evaluate(curvature=True)
    slope = (x @ w).sinh() * x[0]
    torch.testing.assert_close(GaussNewtonBartlett()(evaluation), slope.square())


def test_what_bypasses_the_outputs_is_left_out() -> None:
    x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0]])

    def loss(w: Tensor) -> Tensor:
        return F.mse_loss(x @ w, y, reduction="sum") + 10 * w.square().sum()

    evaluation = FunctionalObjective(loss, torch.ones(2, 1)).evaluate(curvature=True)
    torch.testing.assert_close(GaussNewtonBartlett()(evaluation), torch.tensor([2.0, 8.0]))


def test_labels_need_an_output() -> None:
    evaluation = FunctionalObjective(lambda w: w.square().sum(), torch.ones(2)).evaluate(
        curvature=True
    )
    with pytest.raises(RuntimeError, match="mark_outputs"):
        GaussNewtonBartlett()(evaluation)


# Random signs.

dtypes = pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])


@given(
    size=st.integers(1, 3000),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, DOUBLE]),
)
@settings(max_examples=60, deadline=None)
def test_signs_of_any_number(size: int, seed: int, dtype: torch.dtype) -> None:
    def drawn() -> list[Tensor]:
        generator, buffer_pool = torch.Generator().manual_seed(seed), BufferPool()
        return [rademacher(size, generator, buffer_pool, dtype=dtype, device=CPU) for _ in range(2)]

    first, second = drawn()
    assert first.shape == (size,) and first.dtype == dtype
    assert (first.abs() == 1).all() and (second.abs() == 1).all()
    again = drawn()
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])
    if size > 100:
        assert not torch.equal(first, second)


@dtypes
def test_signs_are_fair_and_independent(dtype: torch.dtype, device: torch.device) -> None:
    """Means of each, and correlations of any two, within one draw and from one to the next."""
    generator = torch.Generator(device).manual_seed(9)
    size, count = 200, 5000
    drawn = torch.stack(
        [rademacher(size, generator, dtype=dtype, device=device) for _ in range(count)]
    ).double()
    assert drawn.mean(0).abs().max() <= K / math.sqrt(count)
    correlations = drawn.T @ drawn / count - torch.eye(size, dtype=DOUBLE, device=device)
    assert correlations.abs().max() <= K / math.sqrt(count)
    # From one draw to the next.
    lagged = drawn[1:].T @ drawn[:-1] / (count - 1)
    assert lagged.abs().max() <= K / math.sqrt(count - 1)
    # Products of three have mean zero as well: bits are no linear functions of others.
    threes = (drawn[:, :-2] * drawn[:, 1:-1] * drawn[:, 2:]).mean(0)
    assert threes.abs().max() <= K / math.sqrt(count)


@dtypes
def test_a_long_vector_has_as_many_of_each(dtype: torch.dtype, device: torch.device) -> None:
    size = 1_000_003
    z = rademacher(size, torch.Generator(device).manual_seed(10), dtype=dtype, device=device)
    assert abs(float(z.double().sum())) <= K * math.sqrt(size)
    for lag in (1, 2, 32, 64, -(-size // 64), 2 * -(-size // 64)):
        assert abs(float((z[lag:] * z[:-lag]).double().sum())) <= K * math.sqrt(size - lag)


@dtypes
def test_signs_are_those_of_the_generator_only(dtype: torch.dtype) -> None:
    def drawn(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return rademacher(100, generator, dtype=dtype, device=CPU)

    first = drawn(1)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert torch.equal(first, drawn(1)) and not torch.equal(first, drawn(2))
    assert torch.equal(torch.get_rng_state(), state)
    rademacher(100, None, dtype=dtype, device=CPU)
    assert not torch.equal(torch.get_rng_state(), state)


@dtypes
def test_memory_is_used_again_where_nobody_looks(dtype: torch.dtype) -> None:
    buffer_pool, generator = BufferPool(), torch.Generator().manual_seed(11)

    def signs(size: int = 1000) -> Tensor:
        return rademacher(size, generator, buffer_pool, dtype=dtype, device=CPU)

    first = signs()
    kept = first.clone()
    second = signs()
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, kept) and not torch.equal(first, second)
    place = second.data_ptr()
    del second
    assert signs().data_ptr() == place
    view = signs()[10:20]
    seen = view.clone()
    signs()
    assert torch.equal(view, seen)
    assert len(signs(10)) == 10 and len(signs(2000)) == 2000


def test_estimates_in_a_workspace_live_on() -> None:
    """A user keeps the diagonals of two steps, and the gradients."""
    for kind in (AdaHessian, Sophia):
        torch.manual_seed(0)
        model = nn.Linear(30, 30).double()
        x = torch.randn(5, 30, dtype=DOUBLE)
        optimizer = (
            kind(model.parameters(), lr=0.01, update_period=1)
            if kind is Sophia
            else kind(model.parameters(), lr=0.01)
        )

        def closure(model: Any = model, optimizer: Any = optimizer, x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss = model(x).tanh().square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        gradient = model.weight.grad
        kept = gradient.clone()
        for _ in range(3):
            optimizer.step(closure)
            assert torch.equal(gradient, kept)
            assert model.weight.grad is not gradient


def test_gaussian_probes_are_normal(device: torch.device) -> None:
    z = draw(
        100_000,
        "gaussian",
        torch.Generator(device).manual_seed(12),
        dtype=DOUBLE,
        device=device,
    )
    assert abs(float(z.mean())) <= K / math.sqrt(len(z))
    assert abs(float(z.square().mean()) - 1) <= K * math.sqrt(2 / len(z))
    assert abs(float(z.pow(4).mean()) - 3) <= K * math.sqrt(96 / len(z))


# What is refused.


@pytest.mark.parametrize("kind", [Hutchinson, GaussNewtonBartlett])
@pytest.mark.parametrize("samples", [0, -3, 2.0, "one", None])
def test_numbers_of_samples(kind: Any, samples: Any) -> None:
    with pytest.raises(ValueError, match="n_samples must be an integer of at least 1") as caught:
        kind(samples)
    assert repr(samples) in str(caught.value)


@pytest.mark.parametrize("distribution", ["uniform", "Rademacher", None, 1])
def test_distributions(distribution: Any) -> None:
    with pytest.raises(
        ValueError, match=r"distribution must be one of 'rademacher', 'gaussian'"
    ) as caught:
        Hutchinson(distribution=distribution)
    assert repr(distribution) in str(caught.value)


def test_probes_that_multiply_nothing_cannot_be_scaled() -> None:
    watch = GaussNewtonBartlett().watch(ParameterVector([torch.ones(2)]), None)
    with pytest.raises(NotImplementedError, match="multiplies with no directions"):
        watch.scale_probes(torch.tensor(2.0))
