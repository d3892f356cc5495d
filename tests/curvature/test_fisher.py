"""Fisher matrices from labels, and random estimates of diagonals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from tests.support.oracles import (
    assert_matrix,
    dense_jacobian,
    labels,
    numbers,
    outputs_of,
    theta_on,
)
from torch_secondorder import mark_outputs
from torch_secondorder._objective.base import Evaluation, Regularization
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.curvature import Fisher, GaussNewton

CPU = torch.device("cpu")


def evaluate(loss: Callable[..., Tensor], *params: Tensor) -> Evaluation:
    return ClosureObjective(lambda: loss(*params), params).evaluate(curvature=True)


def dense(operator: GaussNewton) -> Tensor:
    return operator @ torch.eye(operator.size, dtype=torch.float64)


def assert_unbiased(draw: Callable[[], Tensor], expected: Tensor) -> None:
    """Forty means of a hundred draws: each entry's mean is within six of its own standard errors.

    By chance an entry fails once in two million times (Student's t, 39 degrees of freedom).
    """
    means = torch.stack([draw() for _ in range(40)])
    error = means.std(0) / 40**0.5
    assert ((means.mean(0) - expected).abs() <= 6 * error + 1e-12).all()
    # The test has power: it tells the matrix from one half as large again.
    assert ((means.mean(0) - 1.5 * expected).abs() > 6 * error).any()


def bernoulli(z: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(
        z, numbers(z, 0, 1), weight=numbers(z[0]), pos_weight=numbers(z[0], 0.5, 3.0)
    )


def gaussian(z: Tensor) -> Tensor:
    mean, var = z.chunk(2, 1)
    return F.gaussian_nll_loss(mean, numbers(mean), var.exp())


def weighted(z: Tensor) -> Tensor:
    """The label's weights depend on nothing but the data: they are kept when labels are drawn."""
    return F.cross_entropy(z, labels(z), weight=numbers(z[0, :, 0]), ignore_index=1)


SAMPLED: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "categorical": ((3, 4), lambda z: F.cross_entropy(z, labels(z))),
    "categorical of one sample": ((4,), lambda z: F.cross_entropy(z, labels(z))),
    "weighted images": ((2, 3, 3), weighted),
    "negative": ((3, 4), lambda z: -F.cross_entropy(z, labels(z))),
    "nll": ((2, 4, 2), lambda z: F.nll_loss(z.log_softmax(1), labels(z))),
    "kl": ((3, 4), lambda z: F.kl_div(z.log_softmax(1), numbers(z).softmax(1), reduction="sum")),
    "bernoulli": ((3, 2), bernoulli),
    "probabilities": ((3, 2), lambda z: F.binary_cross_entropy(z.sigmoid(), numbers(z, 0, 1))),
    "squares": ((3, 2), lambda z: F.mse_loss(z, numbers(z), reduction="sum")),
    "negative squares": ((3, 2), lambda z: -F.mse_loss(z, numbers(z))),
    "gaussian": ((3, 2), gaussian),
    "two losses": (
        (3, 4),
        lambda z: 2 * bernoulli(z[:, :2] * 1) + F.mse_loss(z[:, 2:], z.new_ones(3, 2)),
    ),
}


@pytest.mark.parametrize("what", ["matrix", "diagonal"])
@pytest.mark.parametrize("name", SAMPLED)
def test_samples_are_unbiased(name: str, what: str) -> None:
    shape, loss = SAMPLED[name]
    evaluation = evaluate(lambda t: loss(outputs_of(t, *shape)), theta_on(CPU))
    operator = GaussNewton(evaluation)
    expected = dense(operator)
    if what == "matrix":
        assert_unbiased(lambda: dense(Fisher(evaluation, n_samples=100)), expected)
    else:
        assert_unbiased(lambda: operator.diagonal(100), expected.diagonal().abs())


def test_sampled_labels_are_labels() -> None:
    """One label for each sample: the matrix has that rank, where the expectation has more."""
    evaluation = evaluate(
        lambda t: F.cross_entropy(outputs_of(t, 1, 4), labels(t[:1, None])), theta_on(CPU)
    )
    assert torch.linalg.matrix_rank(dense(GaussNewton(evaluation))) == 3
    assert torch.linalg.matrix_rank(dense(Fisher(evaluation))) == 1
    # Of four labels there are four matrices.
    drawn = {round(float(dense(Fisher(evaluation)).trace()), 12) for _ in range(200)}
    assert 2 <= len(drawn) <= 4


def test_all_products_are_with_one_matrix(device: torch.device) -> None:
    shape, loss = SAMPLED["categorical"]
    evaluation = evaluate(lambda t: loss(outputs_of(t, *shape)), theta_on(device))

    def seeded(seed: int) -> Fisher:
        # Where the generator is need not be where the model is.
        return Fisher(evaluation, generator=torch.Generator().manual_seed(seed))

    eye = torch.eye(6, dtype=torch.float64, device=device)
    operator = seeded(1)
    matrix = operator @ eye
    assert_matrix(operator, matrix)
    assert torch.equal(operator @ eye, matrix)
    assert torch.equal(seeded(1) @ eye, matrix)
    assert not torch.allclose(seeded(2) @ eye, matrix)


def test_certain_models_give_finite_samples() -> None:
    z = torch.tensor([[0.0, -2000.0, 1.0], [900.0, -900.0, 0.0]], dtype=torch.float64)
    for loss in (
        lambda z: F.nll_loss(z.log_softmax(1), torch.tensor([0, 1])),
        lambda z: F.cross_entropy(z, torch.tensor([0, 1])),
        lambda z: F.binary_cross_entropy_with_logits(z, torch.ones_like(z)),
        lambda z: F.binary_cross_entropy(z.sigmoid(), torch.ones_like(z)),
    ):
        evaluation = evaluate(loss, z.clone().requires_grad_())
        operator = GaussNewton(evaluation)
        results = [dense(operator), dense(Fisher(evaluation)), operator.diagonal()]
        assert all(torch.isfinite(result).all() for result in results)


# Empirical.


def mlp() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return net, torch.randn(6, 3, dtype=torch.float64)


def split(loss: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Micro-batches, weighted by their sizes."""

    def total(z: Tensor, y: Tensor) -> Tensor:
        return loss(z[:2], y[:2]) / 3 + loss(z[2:], y[2:]) * 2 / 3

    return total


def none(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none").mean()


def square(z: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(z, torch.eye(3, dtype=z.dtype)[y])


def marked(z: Tensor, y: Tensor) -> Tensor:
    return (mark_outputs(z) - torch.eye(3, dtype=z.dtype)[y]).pow(4).sum(1).mean()


EMPIRICAL: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] = {
    "mean": (F.cross_entropy, 1),
    "sum": (lambda z, y: F.cross_entropy(z, y, reduction="sum"), 6),
    "sum, divided": (lambda z, y: F.cross_entropy(z, y, reduction="sum") / len(z), 1),
    "none": (none, 1),
    "scaled": (lambda z, y: 3 * F.cross_entropy(z, y), 3),
    "negative": (lambda z, y: -F.cross_entropy(z, y), -1),
    "micro-batches": (split(F.cross_entropy), 1),
    "nll": (lambda z, y: F.nll_loss(z.log_softmax(1), y), 1),
    "square": (square, 1),
    "squares in micro-batches": (split(square), 1),
    "half the sum of squares": (
        lambda z, y: 0.5 * F.mse_loss(z, torch.eye(3, dtype=z.dtype)[y], reduction="sum"),
        6 * (3 / 2) ** 2,
    ),
    "marked": (marked, 1),
}


@pytest.mark.parametrize("name", EMPIRICAL)
def test_the_empirical_matrix_is_the_mean_over_samples_of_their_gradients(name: str) -> None:
    net, x = mlp()
    y = torch.tensor([0, 1, 2, 2, 0, 1])
    loss, factor = EMPIRICAL[name]
    own = marked if name == "marked" else square if "square" in name else F.cross_entropy

    def of_sample(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return own(functional_call(net, params, (x[None],)), y[None])

    params = {name: p.detach() for name, p in net.named_parameters()}
    gradients = vmap(grad(of_sample), (None, 0, 0))(params, x, y)
    rows = torch.cat([g.flatten(1) for g in gradients.values()], dim=1)
    evaluation = evaluate(lambda *_: loss(net(x), y), *net.parameters())
    operator = Fisher(evaluation, labels="empirical")
    expected = factor * rows.T @ rows / len(x)
    assert_matrix(operator, expected)
    assert_unbiased(lambda: operator.diagonal(100), expected.diagonal().abs())


def ignoring(z: Tensor) -> Tensor:
    return F.cross_entropy(z, labels(z), ignore_index=1)


def masked(z: Tensor) -> Tensor:
    mask = labels(z) != 1
    return (F.cross_entropy(z, labels(z), reduction="none") * mask).sum() / mask.sum()


@pytest.mark.parametrize("loss", [ignoring, masked])
def test_positions_are_samples_for_cross_entropy_and_ignored_ones_are_none(loss: Any) -> None:
    theta = theta_on(CPU)

    def each(t: Tensor) -> Tensor:
        z = outputs_of(t, 2, 4, 3)
        return F.cross_entropy(z, labels(z), reduction="none")[labels(z) != 1]

    rows = dense_jacobian(each, [theta])
    evaluation = evaluate(lambda t: loss(outputs_of(t, 2, 4, 3)), theta)
    assert_matrix(Fisher(evaluation, labels="empirical"), rows.T @ rows / len(rows))


def test_what_bypasses_the_outputs_is_added() -> None:
    theta = theta_on(CPU)

    def loss(t: Tensor) -> Tensor:
        return F.mse_loss(outputs_of(t, 3, 2), torch.ones(3, 2).double()) + t.square().sum()

    evaluation = evaluate(loss, theta)
    without = dense(Fisher(evaluation, labels="empirical", remainder="ignore"))
    operator = Fisher(evaluation, labels="empirical")
    assert_matrix(operator, without + 2 * torch.eye(6, dtype=torch.float64))


# Diagonals.


def test_a_diagonal_without_closed_form_is_that_of_the_empirical_matrix() -> None:
    evaluation = evaluate(lambda t: mark_outputs(outputs_of(t, 4, 3)).cosh().mean(), theta_on(CPU))
    expected = dense(Fisher(evaluation, labels="empirical")).diagonal()
    assert_unbiased(lambda: GaussNewton(evaluation).diagonal(100), expected)


def test_a_diagonal_has_the_regularization_and_the_scale() -> None:
    net, x = mlp()
    scale, decay = [1.0, 0.5, 2.0, 0.25], (0.1, 0.2, 0.3, 0.4)
    objective = ClosureObjective.for_step(
        lambda: F.mse_loss(net(x), torch.ones(6, 3).double()),
        ParameterVector(net.parameters(), scale),
        Regularization(weight_decay=decay),
    )
    operator = GaussNewton(objective.evaluate(curvature=True))
    assert_unbiased(lambda: operator.diagonal(100), dense(operator).diagonal())


def test_diagonals_can_be_repeated(device: torch.device) -> None:
    shape, loss = SAMPLED["categorical"]
    evaluation = evaluate(lambda t: loss(outputs_of(t, *shape)), theta_on(device))
    operator = GaussNewton(evaluation)

    def seeded(seed: int) -> Tensor:
        return operator.diagonal(2, torch.Generator().manual_seed(seed))

    assert torch.equal(seeded(1), seeded(1))
    assert not torch.equal(seeded(1), seeded(2))


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "true"}, "'sampled', 'empirical', got 'true'"),
        ({"n_samples": 0}, "at least 1, got 0"),
        ({"remainder": "drop"}, "'hessian', 'ignore', got 'drop'"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    evaluation = evaluate(lambda t: F.mse_loss(t, torch.ones(6).double()), theta_on(CPU))
    with pytest.raises(ValueError, match=message):
        Fisher(evaluation, **options)


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (lambda z: mark_outputs(z * 1).cosh().mean(), "a marked output"),
        (lambda z: F.huber_loss(z, torch.ones_like(z)), "that of huber_loss"),
        (lambda z: F.mse_loss(z, torch.ones_like(z)).exp(), "that of mse_loss"),
    ],
)
def test_labels_can_only_be_drawn_from_a_likelihood(loss: Callable, name: str) -> None:
    evaluation = evaluate(loss, theta_on(CPU))
    with pytest.raises(RuntimeError, match=f"no labels can be drawn for {name}.*empirical labels"):
        Fisher(evaluation)
    assert dense(Fisher(evaluation, labels="empirical")).any()
