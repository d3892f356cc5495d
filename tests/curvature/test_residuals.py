"""The residuals of a loss: `J'J` against dense Gauss-Newton matrices, `J'r` against gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.losses import CLOSED, EQUAL, bce, ce, mse
from tests.support.oracles import dense_gauss_newton, numbers, outputs_of, theta_on
from torch_secondorder import mark_outputs
from torch_secondorder._foundation.memory import TooLarge
from torch_secondorder._objective.base import Evaluation
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder._objective.functional import FunctionalObjective
from torch_secondorder.curvature import GaussNewton, InseparableLoss, UnknownOutputs
from torch_secondorder.curvature._residual_roots import (
    BlockRoot,
    DiagonalRoot,
    SoftmaxRoot,
)
from torch_secondorder.curvature._residuals import Residuals

CPU = torch.device("cpu")
DOUBLE = torch.float64
Loss = Callable[[Tensor], Tensor]


def evaluate(loss: Callable[..., Tensor], *params: Tensor) -> Evaluation:
    return ClosureObjective(lambda: loss(*params), params).evaluate(curvature="jacobian")


def residuals_of(loss: Callable[..., Tensor], *params: Tensor) -> Residuals:
    evaluation = evaluate(loss, *params)
    assert evaluation.linearization is not None
    return Residuals(evaluation.linearization.graph)


def flat(parts: Any, like: Tensor) -> Tensor:
    """The pullback by a single parameter, dense."""
    (part,) = parts
    return torch.zeros_like(like) if part is None else part.detach().reshape(-1)


def jacobian(residuals: Residuals, theta: Tensor) -> Tensor:
    """`J` by one parameter, row by row."""
    rows = []
    for block in residuals.blocks:
        unit = torch.zeros_like(block.values)
        for row in range(unit.numel()):
            unit.view(-1)[row] = 1
            cotangents: list[Tensor | None] = [None] * len(residuals.space.values)
            for place, part in zip(block.outputs, block.spread(unit), strict=True):
                cotangents[place] = part
            rows.append(flat(residuals.space.pull(cotangents), theta))
            unit.zero_()
    return torch.stack(rows) if rows else torch.zeros(0, len(theta), dtype=theta.dtype)


def values_of(residuals: Residuals) -> Tensor:
    return torch.cat([block.values.reshape(-1) for block in residuals.blocks])


def assert_gradient(residuals: Residuals, gradient: Tensor, theta: Tensor) -> Tensor:
    """`J'r` and the rest add up to the gradient; returns `J`."""
    J = jacobian(residuals, theta)
    found = J.T @ values_of(residuals)
    rest = residuals.rest_gradient()
    if rest is not None:
        found = found + flat(rest, theta)
    scale = float(gradient.abs().max())
    torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-10 * max(scale, 1e-3))
    return J


def assert_residuals(loss: Loss, expected: Tensor | None, theta: Tensor, **options: Any) -> Any:
    """Checks the residuals of `loss(theta)` against a dense `J'BJ` and the gradient."""
    evaluation = evaluate(loss, theta)
    assert evaluation.linearization is not None
    residuals = Residuals(evaluation.linearization.graph)
    assert residuals.finite
    J = assert_gradient(residuals, evaluation.grad, theta)
    if expected is not None:
        scale = float(expected.abs().max())
        torch.testing.assert_close(J.T @ J, expected, rtol=1e-10, atol=1e-10 * scale)
    return residuals


# Standard losses.


def kl(z: Tensor, **options: Any) -> Tensor:
    target = numbers(z).softmax(1)
    if options.get("log_target"):
        target = target.log()
    return F.kl_div(z.log_softmax(1), target, **{"reduction": "batchmean", **options})


def weighted(value: Tensor) -> Tensor:
    return (value * numbers(value)).sum()


# A convex loss by an output each; the curvature is the Hessian by this output.
STANDARD: dict[str, tuple[tuple[int, ...], Loss]] = {
    **{name: case for name, case in CLOSED.items() if name != "ce negative"},
    "mse, broadcast": ((5, 1), lambda z: F.mse_loss(z, numbers(z.new_zeros(5, 3)))),
    "mse, weight": ((5, 3), lambda z: F.mse_loss(z, numbers(z), weight=numbers(z))),
    "mse, a factor": ((5, 3), lambda z: 0.3 * mse(reduction="sum")(z)),
    "mse none, the mean of samples": (
        (5, 3),
        lambda z: F.mse_loss(z, numbers(z), reduction="none").sum(1).mean(),
    ),
    "mse of a vector": ((7,), mse()),
    "mse of images": ((2, 3, 2, 2), mse()),
    "mse halved, log": ((5, 3), lambda z: F.mse_loss(z, numbers(z)) / 2 + 5),
    "poisson": ((5, 3), lambda z: F.poisson_nll_loss(z, numbers(z, 0, 4))),
    "soft margin": ((5, 3), lambda z: F.soft_margin_loss(z, numbers(z).sub(0.5).sign())),
    "multilabel": ((5, 3), lambda z: F.multilabel_soft_margin_loss(z, numbers(z).round())),
    "two on one output": ((5, 3), lambda z: mse()(z) + bce()(z)),
}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("name", STANDARD)
def test_residuals_of_standard_losses(name: str, device: torch.device) -> None:
    shape, loss = STANDARD[name]
    theta = theta_on(device)
    expected = dense_gauss_newton(lambda t: [outputs_of(t, *shape)], loss, [theta])
    residuals = assert_residuals(lambda t: loss(outputs_of(t, *shape)), expected, theta)
    assert residuals.rest_gradient() is None
    (block,) = residuals.blocks
    if name.startswith("ce"):
        classes = shape[0] if len(shape) == 1 else shape[1]
        assert block.channels * block.samples == outputs_of(theta, *shape).numel() // classes * (
            classes - 1
        )


@pytest.mark.parametrize("name", [*EQUAL, "kl log", "kl sum", "kl of images"])
def test_logarithms_of_probabilities_give_what_logits_give(name: str) -> None:
    more: dict[str, tuple[Loss, Loss, tuple[int, ...]]] = {
        "kl log": (lambda z: kl(z, log_target=True), lambda z: kl(z), (5, 4)),
        "kl sum": (lambda z: kl(z, reduction="sum"), lambda z: 5 * kl(z), (5, 4)),
        "kl of images": (kl, kl, (2, 4, 3)),
    }
    loss, with_logits, shape = {**EQUAL, **more}[name]
    theta = theta_on(CPU)
    expected = dense_gauss_newton(lambda t: [outputs_of(t, *shape)], with_logits, [theta])
    assert_residuals(lambda t: loss(outputs_of(t, *shape)), expected, theta)


def test_nll_of_a_mean_and_a_variance() -> None:
    theta = theta_on(CPU)

    def loss(t: Tensor) -> Tensor:
        mean, variance = outputs_of(t, 4, 2), outputs_of(t, 2, 2, 2).view(4, 2).exp()
        return F.gaussian_nll_loss(mean, numbers(mean), variance)

    expected = GaussNewton(evaluate(loss, theta)).dense()
    residuals = assert_residuals(loss, expected, theta)
    assert [block.outputs for block in residuals.blocks] == [(0,), (1,)]


# Errors between two outputs, and losses that grow linearly.

PAIRS: dict[str, tuple[Loss, Loss]] = {
    "mse": (F.mse_loss, lambda e: e.square().mean()),
    "mse sum": (lambda a, b: F.mse_loss(a, b, reduction="sum"), lambda e: e.square().sum()),
    "mse none": (
        lambda a, b: weighted(F.mse_loss(a, b, reduction="none")),
        lambda e: weighted(e.square()),
    ),
    "huber inside": (lambda a, b: F.huber_loss(a, b, delta=9.0), lambda e: e.square().mean() / 2),
    "smooth l1 inside": (
        lambda a, b: F.smooth_l1_loss(a, b, beta=9.0, reduction="sum"),
        lambda e: e.square().sum() / 18,
    ),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("shape", [(5, 3), (4,), (), (2, 3, 2)], ids=str)
def test_parameters_in_the_target_too(name: str, shape: tuple[int, ...]) -> None:
    theta = theta_on(CPU)
    loss, of_error = PAIRS[name]

    def two(t: Tensor) -> tuple[Tensor, Tensor]:
        return outputs_of(t, *shape), outputs_of(t.flip(0), *shape).sin()

    expected = dense_gauss_newton(lambda t: [two(t)[0] - two(t)[1]], of_error, [theta])
    residuals = assert_residuals(lambda t: loss(*two(t)), expected, theta)
    (block,) = residuals.blocks
    assert block.outputs == (0, 1) and block.scale is None
    assert residuals.rest_gradient() is None


def test_a_target_made_from_the_input() -> None:
    theta = theta_on(CPU)

    def loss(t: Tensor) -> Tensor:
        z = outputs_of(t, 5, 3)
        return F.mse_loss(z, z.sin())

    def errors(t: Tensor) -> list[Tensor]:
        z = outputs_of(t, 5, 3)
        return [z - z.sin()]

    assert_residuals(loss, dense_gauss_newton(errors, lambda e: e.square().mean(), [theta]), theta)


def test_a_compared_output_with_another_use() -> None:
    theta = theta_on(CPU)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return F.mse_loss(a, b) + b.cosh().sum()

    def outputs(t: Tensor) -> list[Tensor]:
        return [outputs_of(t, 4, 2), outputs_of(t.flip(0), 4, 2)]

    expected = dense_gauss_newton(outputs, loss, [theta])
    residuals = assert_residuals(lambda t: loss(*outputs(t)), expected, theta)
    (block,) = residuals.blocks
    assert isinstance(block.root, BlockRoot) and block.outputs == (0, 1)


ROBUST: dict[str, tuple[Loss, Callable[[Tensor], Tensor]]] = {
    "huber": (
        lambda z, y: F.huber_loss(z, y, delta=0.5),
        lambda e: (0.5 / e.abs()).clamp(max=1) / e.numel(),
    ),
    "huber none": (
        lambda z, y: weighted(F.huber_loss(z, y, delta=0.5, reduction="none")),
        lambda e: (0.5 / e.abs()).clamp(max=1) * numbers(e),
    ),
    "smooth l1": (
        lambda z, y: F.smooth_l1_loss(z, y, beta=0.5, reduction="sum"),
        lambda e: 1 / e.abs().clamp(min=0.5),
    ),
    "l1": (lambda z, y: F.l1_loss(z, y), lambda e: 1 / e.abs() / e.numel()),
    "smooth l1 without a bend": (
        lambda z, y: F.smooth_l1_loss(z, y, beta=0.0),
        lambda e: 1 / e.abs() / e.numel(),
    ),
    "marked, l1": (
        lambda z, y: mark_outputs(z - y).abs().sum(),
        lambda e: 1 / e.abs(),
    ),
    "marked, flat far off": (
        lambda z, y: F.huber_loss(mark_outputs(z - y) * 1, torch.zeros_like(y), delta=0.5),
        lambda e: (0.5 / e.abs()).clamp(max=1) / e.numel(),
    ),
}


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("side", ["input", "target"])
def test_losses_that_grow_linearly_have_weights(name: str, side: str) -> None:
    loss, weights = ROBUST[name]
    theta = theta_on(CPU)

    def errors(t: Tensor) -> tuple[Tensor, Tensor]:
        y = numbers(outputs_of(t, 5, 3))
        z = y + 0.5 * outputs_of(t, 5, 3)
        return (z, y) if side == "input" else (y, z)

    z, y = errors(theta.detach())
    assert ((z - y).abs() > 0.5).any() and ((z - y).abs() < 0.5).any()
    fixed = weights(z - y)
    expected = dense_gauss_newton(
        lambda t: [errors(t)[0] - errors(t)[1]],
        lambda e: (fixed * e.square()).sum() / 2,
        [theta],
    )
    residuals = assert_residuals(lambda t: loss(*errors(t)), expected, theta)
    assert residuals.rest_gradient() is None


@pytest.mark.parametrize("loss", [F.l1_loss, F.huber_loss, F.smooth_l1_loss, F.mse_loss])
def test_errors_of_zero_have_finite_weights(loss: Callable[..., Tensor]) -> None:
    theta = theta_on(CPU)

    def some_fitted(t: Tensor) -> Tensor:
        z = outputs_of(t, 4, 2)
        return loss(z, z.detach() + torch.tensor([0.0, 1.0], dtype=DOUBLE))

    residuals = assert_residuals(some_fitted, None, theta)
    assert residuals.blocks[0].scale is not None and bool((residuals.blocks[0].scale > 0).all())
    whole = assert_residuals(
        lambda t: loss(outputs_of(t, 4, 2), outputs_of(t, 4, 2).detach()), None, theta
    )
    assert not values_of(whole).any()


def test_a_weighted_robust_loss_is_differentiated() -> None:
    theta = theta_on(CPU)

    def loss(t: Tensor) -> Tensor:
        z = outputs_of(t, 5, 3)
        return F.huber_loss(z, numbers(z), delta=0.5, weight=numbers(z))

    residuals = assert_residuals(loss, GaussNewton(evaluate(loss, theta)).dense(), theta)
    assert residuals.rest_gradient() is not None


# Marked outputs.

MARKED: dict[str, tuple[tuple[int, ...], Loss]] = {
    "mean of squares": ((5, 3), lambda z: z.square().mean()),
    "weighted squares": ((5, 3), lambda z: (numbers(z) * z.square()).sum() / 7),
    "one number": ((), lambda z: 3 * z.square()),
    "power four": ((5,), lambda z: z.pow(4).sum()),
    "log cosh": ((5, 3), lambda z: z.cosh().log().mean()),
    "softplus": ((5, 3), lambda z: F.softplus(z).sum()),
    "softmax": ((5, 4), lambda z: -z.log_softmax(1)[:, 1].mean()),
    "images": ((2, 3, 2), lambda z: z.square().sum((1, 2)).cosh().sum()),
    "squares of sums": ((5, 3), lambda z: z.sum(1).square().mean()),
    "sum of all": ((1, 6), lambda z: z.square().sum().cosh()),
    "squares of differences": (
        (5, 3),
        lambda z: (z[:, 1:] - z[:, :-1]).square().sum() + z.square().mean(),
    ),
}


@pytest.mark.parametrize("kind", ["closure", "function"])
@pytest.mark.parametrize("name", MARKED)
def test_residuals_of_marked_outputs(name: str, kind: str, device: torch.device) -> None:
    shape, loss = MARKED[name]
    theta = theta_on(device)
    expected = dense_gauss_newton(lambda t: [outputs_of(t, *shape)], loss, [theta])

    def marked(t: Tensor) -> Tensor:
        return loss(mark_outputs(outputs_of(t, *shape)))

    if kind == "function":
        objective = FunctionalObjective(marked, theta)
        evaluation = objective.evaluate(curvature="jacobian")
        assert evaluation.linearization is not None
        residuals = Residuals(evaluation.linearization.graph)
        J = assert_gradient(residuals, evaluation.grad, theta)
        torch.testing.assert_close(J.T @ J, expected, rtol=1e-10, atol=1e-10)
        return
    residuals = assert_residuals(marked, expected, theta)
    assert residuals.rest_gradient() is None


def test_a_softmax_written_by_hand_has_a_channel_less() -> None:
    theta = theta_on(CPU)
    residuals = residuals_of(
        lambda t: -mark_outputs(outputs_of(t, 5, 4)).log_softmax(1)[:, 1].mean(), theta
    )
    assert residuals.blocks[0].channels == 3


def test_several_residuals_with_weights() -> None:
    theta = theta_on(CPU)

    def outputs(t: Tensor) -> list[Tensor]:
        return [outputs_of(t, 7), outputs_of(t, 4, 2), outputs_of(t, 3, 1, 1)]

    def loss(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return 10 * a.square().mean() + b.square().mean() + F.mse_loss(c, numbers(c))

    def marked(t: Tensor) -> Tensor:
        a, b, c = outputs(t)
        return loss(mark_outputs(a), mark_outputs(b), c)

    residuals = assert_residuals(marked, dense_gauss_newton(outputs, loss, [theta]), theta)
    assert [(b.samples, b.channels) for b in residuals.blocks] == [(7, 1), (4, 2), (3, 1)]


def test_outputs_that_a_loss_couples_within_samples() -> None:
    theta = theta_on(CPU)

    def outputs(t: Tensor) -> list[Tensor]:
        return [outputs_of(t, 5, 2), outputs_of(t, 5).exp()]

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return ((a - 1).square().sum(1) / b).sum()  # convex

    residuals = assert_residuals(
        lambda t: loss(*map(mark_outputs, outputs(t))),
        dense_gauss_newton(outputs, loss, [theta]),
        theta,
    )
    (block,) = residuals.blocks
    assert block.outputs == (0, 1) and block.samples == 5


# What has no residual.


def positive_part(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0) @ vectors.T


CONCAVE: dict[str, Loss] = {
    "predictions, not residuals": lambda z: (z - numbers(z, 3, 4)).square().log1p().mean(),
    "sine": lambda z: z.sin().sum(),
    "linear": lambda z: (numbers(z) * z).sum(),
    "negative squares": lambda z: -z.square().mean(),
    "negative standard loss": lambda z: -F.binary_cross_entropy_with_logits(z, numbers(z)),
    "flat in parts": lambda z: F.relu(z - 0.5).square().sum() + F.relu(-z - 1).sum(),
}


@pytest.mark.parametrize("name", CONCAVE)
def test_entries_without_positive_curvature_are_left_to_the_gradient(name: str) -> None:
    loss, theta = CONCAVE[name], theta_on(CPU)
    z = outputs_of(theta.detach(), 5, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(z), z, create_graph=True)
    second = torch.zeros_like(z)
    if gradient.requires_grad:
        (second,) = torch.autograd.grad(gradient.sum(), z)
    assert bool((second <= 0).any())
    kept = second.clamp(min=0).detach()
    expected = dense_gauss_newton(
        lambda t: [outputs_of(t, 5, 3)], lambda z: (kept * z.square()).sum() / 2, [theta]
    )
    residuals = assert_residuals(lambda t: loss(mark_outputs(outputs_of(t, 5, 3))), expected, theta)
    assert residuals.rest_gradient() is not None
    assert not residuals.blocks[0].values.view_as(z)[second <= 0].any()


@pytest.mark.parametrize("loss", [ce(), mse(), bce()])
def test_standard_losses_that_are_maximized_have_no_residuals(loss: Loss) -> None:
    theta = theta_on(CPU)
    residuals = assert_residuals(
        lambda t: -loss(outputs_of(t, 5, 3)), torch.zeros(6, 6, dtype=DOUBLE), theta
    )
    assert residuals.rest_gradient() is not None and not values_of(residuals).any()


def test_blocks_that_are_not_definite_keep_their_positive_part() -> None:
    theta = theta_on(CPU)

    def loss(z: Tensor) -> Tensor:
        return (z[:, 0] * z[:, 1]).sum()

    def parted(z: Tensor) -> Tensor:  # of [[0, 1], [1, 0]]
        return (z[:, 0] + z[:, 1]).square().sum() / 4

    expected = dense_gauss_newton(lambda t: [outputs_of(t, 5, 2)], parted, [theta])
    residuals = assert_residuals(lambda t: loss(mark_outputs(outputs_of(t, 5, 2))), expected, theta)
    assert residuals.blocks[0].channels == 1 and residuals.rest_gradient() is not None


def cauchy(z: Tensor) -> Tensor:
    return (2 * z).square().log1p().sum()


def test_marked_residuals_of_a_robust_loss_have_weights_where_it_is_not_convex() -> None:
    theta = theta_on(CPU)
    z = outputs_of(theta.detach(), 40)
    second = torch.func.grad(lambda z: torch.func.grad(cauchy)(z).sum())(z)
    psi = torch.func.grad(cauchy)(z) / z
    weights = torch.where(second < 0.1 * psi, psi, second)
    assert bool((second < 0).any()) and bool((second > psi / 2).any())
    expected = dense_gauss_newton(
        lambda t: [outputs_of(t, 40)], lambda z: (weights * z.square()).sum() / 2, [theta]
    )
    residuals = assert_residuals(lambda t: cauchy(mark_outputs(outputs_of(t, 40))), expected, theta)
    assert residuals.rest_gradient() is None


def test_lengths_of_vectors_have_weights_too() -> None:
    theta = theta_on(CPU)
    lengths = outputs_of(theta.detach(), 5, 3).norm(dim=1, keepdim=True)
    expected = dense_gauss_newton(
        lambda t: [outputs_of(t, 5, 3)], lambda z: (z.square() / lengths).sum() / 2, [theta]
    )
    residuals = assert_residuals(
        lambda t: mark_outputs(outputs_of(t, 5, 3)).norm(dim=1).sum(), expected, theta
    )
    assert residuals.rest_gradient() is None


PENALTIES: dict[str, tuple[Loss, Callable[[Tensor], Tensor] | None]] = {
    "squares": (lambda t: 0.1 * t.square().sum(), lambda t: torch.full_like(t, 0.2)),
    "powers": (lambda t: t.pow(4).sum(), lambda t: 12 * t.square()),
    "not convex": (lambda t: t.sin().sum(), lambda t: (-t.sin()).clamp(min=0)),
    "linear": (lambda t: t.sum(), lambda t: torch.zeros_like(t)),
    "coupled": (lambda t: t.exp().prod(), None),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_terms_beside_the_outputs(name: str) -> None:
    penalty, diagonal = PENALTIES[name]
    theta = theta_on(CPU)

    def loss(t: Tensor) -> Tensor:
        z = outputs_of(t, 5, 3)
        return F.mse_loss(z, numbers(z)) + penalty(t)

    expected = dense_gauss_newton(lambda t: [outputs_of(t, 5, 3)], mse(), [theta])
    residuals = assert_residuals(loss, expected, theta)
    assert residuals.bypassed
    gradient = torch.func.grad(penalty)(theta.detach())
    torch.testing.assert_close(flat(residuals.rest_gradient(), theta), gradient)
    found = residuals.rest_diagonal()
    if diagonal is None:
        assert found is None
    else:
        torch.testing.assert_close(flat(found, theta), diagonal(theta.detach()))


def test_nothing_beside_the_outputs() -> None:
    theta = theta_on(CPU)
    residuals = residuals_of(lambda t: mse()(outputs_of(t, 5, 3)), theta)
    assert not residuals.bypassed
    assert residuals.rest_gradient() is None and residuals.rest_diagonal() is None


def test_a_penalty_on_complex_parameters_and_on_those_without_outputs() -> None:
    w = nn.Parameter(torch.tensor([1.0 + 2.0j, 0.5 - 1.0j], dtype=torch.complex128))
    v, u = nn.Parameter(torch.ones(2, dtype=DOUBLE)), nn.Parameter(torch.ones(3, dtype=DOUBLE))

    def loss(w: Tensor, v: Tensor, u: Tensor) -> Tensor:
        z = torch.view_as_real(w * v) + 0 * u.sum()
        return F.mse_loss(z, torch.zeros_like(z)) + 3 * torch.view_as_real(w).square().sum()

    residuals = residuals_of(loss, w, v, u)
    found = residuals.rest_diagonal()
    assert found is not None and found[0] is not None
    torch.testing.assert_close(found[0], torch.full_like(w, 6 + 6j).detach())
    assert all(part is None or not part.any() for part in found[1:])


def test_a_penalty_with_sparse_gradients() -> None:
    table = nn.Embedding(5, 2, sparse=True).double()

    def loss(*_: Tensor) -> Tensor:
        z = table(torch.tensor([0, 1, 3]))
        return F.mse_loss(z, torch.zeros_like(z)) + table(torch.tensor([2, 3])).pow(4).sum()

    residuals = residuals_of(loss, table.weight)
    used = torch.zeros(5, 1, dtype=DOUBLE)
    used[2:4] = 1
    (gradient,), (diagonal,) = residuals.rest_gradient(), residuals.rest_diagonal()
    weight = table.weight.detach()
    torch.testing.assert_close(gradient.to_dense(), used * 4 * weight**3)
    torch.testing.assert_close(diagonal, used * 12 * weight**2)


# Several backward passes, scales, precision.


def test_micro_batches_and_scaled_losses() -> None:
    theta = theta_on(CPU)

    def whole(t: Tensor) -> Tensor:
        z = outputs_of(t, 6, 3)
        return F.mse_loss(z, numbers(z)) + F.cross_entropy(2 * z, torch.arange(6) % 3)

    def closure() -> Tensor:
        z, total = outputs_of(theta, 6, 3), torch.zeros((), dtype=DOUBLE)
        for part, y, c in zip(
            z.split(2), numbers(z.detach()).split(2), (torch.arange(6) % 3).split(2), strict=True
        ):
            first, second = F.mse_loss(part, y) / 3, F.cross_entropy(2 * part, c)
            (8 * first).backward(torch.tensor(1 / 8), retain_graph=True)
            second.backward(torch.tensor(1 / 3, dtype=DOUBLE), retain_graph=True)
            total += first.detach() + second.detach() / 3
        return total

    evaluation = ClosureObjective(closure, [theta]).evaluate(curvature="jacobian")
    assert evaluation.linearization is not None
    residuals = Residuals(evaluation.linearization.graph)
    J = assert_gradient(residuals, evaluation.grad, theta)
    torch.testing.assert_close(J.T @ J, GaussNewton(evaluate(whole, theta)).dense())


def test_a_loss_that_is_scaled_by_a_parameter() -> None:
    theta = nn.Parameter(torch.randn(7, dtype=DOUBLE))

    def loss(t: Tensor) -> Tensor:
        z = outputs_of(t[:6], 5, 3)
        return t[6].exp() * F.mse_loss(z, numbers(z)) - t[6]

    scale = theta[6].detach().exp()
    expected = dense_gauss_newton(
        lambda t: [outputs_of(t[:6], 5, 3)], lambda z: scale * mse()(z), [theta]
    )
    residuals = assert_residuals(loss, expected, theta)
    assert residuals.bypassed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("loss", ["mse", "ce", "marked", "pair", "coupled"])
def test_narrow_outputs_have_wide_residuals(loss: str, dtype: torch.dtype) -> None:
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "mse": lambda z: F.mse_loss(z, numbers(z)),
        "ce": lambda z: F.cross_entropy(z, torch.arange(len(z)) % 3),
        "marked": lambda z: mark_outputs(z).square().mean(),
        "pair": lambda z: F.mse_loss(z, z.flip(0)),
        "coupled": lambda z: mark_outputs(z).sum(1).square().mean(),
    }
    theta = nn.Parameter(torch.randn(6))

    def value(t: Tensor) -> Tensor:
        return losses[loss](outputs_of(t.double(), 6, 3).to(dtype))

    residuals = residuals_of(value, theta)
    assert residuals.finite and residuals.rest_gradient() is None
    for block in residuals.blocks:
        assert block.values.dtype is torch.float32
        assert all(part.dtype is dtype for part in block.spread(block.values))
    exact = nn.Parameter(theta.detach().double())

    def reference(t: Tensor) -> Tensor:
        return losses[loss](outputs_of(t, 6, 3))

    J = jacobian(residuals, theta)
    expected = GaussNewton(evaluate(reference, exact)).dense().float()
    limit = 10 * torch.finfo(dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(J.T @ J, expected, rtol=0, atol=limit)


# Shapes and indices.

EMPTY: dict[str, Loss] = {
    "mse": lambda z: F.mse_loss(z, torch.zeros_like(z), reduction="sum"),
    "ce": lambda z: F.cross_entropy(z, torch.zeros(len(z), dtype=torch.long), reduction="sum"),
    "marked": lambda z: mark_outputs(z).square().sum(),
    "coupled": lambda z: mark_outputs(z).sum(1).cosh().sum(),
    "l1": lambda z: F.l1_loss(z, torch.zeros_like(z), reduction="sum"),
    "pair": lambda z: F.mse_loss(z, z.sin(), reduction="sum"),
}


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0)], ids=str)
def test_empty_outputs_have_no_residuals(name: str, shape: tuple[int, ...]) -> None:
    theta = theta_on(CPU)

    def loss(t: Tensor) -> Tensor:
        z = outputs_of(t, 4, 3)[: shape[0], : shape[1]]
        if name == "ce" and not shape[1]:
            z = z.sum(1, keepdim=True)  # one class, and nothing to choose
        return EMPTY[name](z)

    residuals = residuals_of(loss, theta)
    assert residuals.finite
    (block,) = residuals.blocks
    assert block.values.numel() == 0 and block.samples == shape[0]
    assert all(part.numel() == 0 or not part.any() for part in block.spread(block.values))


def test_the_parts_of_a_block_fit_together() -> None:
    theta = theta_on(CPU)

    def loss(t: Tensor) -> Tensor:
        a, b = outputs_of(t, 5, 3), outputs_of(t, 2, 4, 3)
        value = F.cross_entropy(b, torch.arange(6).view(2, 3) % 4) + F.mse_loss(a, a.sin())
        c = mark_outputs(outputs_of(t, 4))
        d = mark_outputs(outputs_of(t, 3, 2))
        return value + c.square().sum() + d.square().sum(1).cosh().sum()

    residuals = residuals_of(loss, theta)
    kinds = {type(block.root) for block in residuals.blocks}
    assert kinds == {DiagonalRoot, SoftmaxRoot, BlockRoot}
    for block in residuals.blocks:
        u = torch.randn(2, *block.values.shape, dtype=DOUBLE)
        spread = block.spread(u)
        for i in range(2):
            for part, one in zip(spread, block.spread(u[i]), strict=True):
                torch.testing.assert_close(part[i], one)
        # Q' is the transpose of Q.
        t = [torch.randn_like(part) for part in spread]
        inner = sum((p * q).flatten(1).sum(1) for p, q in zip(spread, t, strict=True))
        torch.testing.assert_close((block.collect(t) * u).sum((1, 2)), inner)
        only = [t[0], *[None] * (len(t) - 1)]
        zeros = [t[0], *map(torch.zeros_like, t[1:])]
        torch.testing.assert_close(block.collect(only), block.collect(zeros))
        # Channels one by one.
        for channel in range(block.channels):
            unit = torch.zeros_like(block.values)
            unit[:, channel] = 1
            for root, part in zip(
                block.roots(channel, channel + 1), block.spread(unit), strict=True
            ):
                torch.testing.assert_close(root[0], part)
        assert all(len(root) == block.channels for root in block.roots())
        if block.scale is not None:
            (part,) = block.spread(torch.ones_like(block.values))
            torch.testing.assert_close(part, block.scale)


# Probabilities at the end of what numbers can express.


@example([0.0, -200.0], 1, torch.float32, 1.0)
@example([0.0, -1480.0, -1480.0], 2, DOUBLE, 1.0)
@given(
    st.lists(st.floats(-2000, 2000), min_size=2, max_size=5),
    st.integers(0, 4),
    st.sampled_from([torch.float32, DOUBLE]),
    st.floats(1e-3, 1e3),
)
@settings(max_examples=150, deadline=None)
def test_a_softmax_never_overflows(
    logits: list[float], label: int, dtype: torch.dtype, weight: float
) -> None:
    z = torch.tensor([logits], dtype=dtype)
    g = z.softmax(1)
    g[0, label % z.shape[1]] -= 1
    g *= weight
    root = SoftmaxRoot(z, torch.full((1, 1), weight, dtype=dtype))
    values, left = root.solve(g)
    assert bool(values.isfinite().all()) and values.shape == (1, z.shape[1] - 1)
    (spread,) = root.spread(values)
    limit = 20 * torch.finfo(dtype).eps * weight
    torch.testing.assert_close(spread + left, g, rtol=0, atol=limit)
    p = z.softmax(1)
    columns = root.spread(torch.eye(root.channels, dtype=dtype).unsqueeze(1))[0].squeeze(1)
    B = weight * (torch.diag(p[0]) - p.T @ p)
    torch.testing.assert_close(columns.T @ columns, B, rtol=0, atol=limit)
    if float(p.min()) > torch.finfo(dtype).tiny:
        assert not left.any()


@given(
    st.floats(-1000, 1000),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([torch.float32, DOUBLE]),
)
@settings(max_examples=60, deadline=None)
def test_a_sigmoid_never_overflows(logit: float, target: float, dtype: torch.dtype) -> None:
    theta = nn.Parameter(torch.tensor([logit], dtype=dtype))

    def loss(t: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(t * 1, torch.full_like(t, target))

    residuals = residuals_of(loss, theta)
    assert residuals.finite and bool(values_of(residuals).isfinite().all())
    J = jacobian(residuals, theta)
    found = J.T @ values_of(residuals)
    rest = residuals.rest_gradient()
    found = found if rest is None else found + flat(rest, theta)
    torch.testing.assert_close(found, evaluate(loss, theta).grad)


shapes = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


@given(
    shapes,
    st.sampled_from(["mean", "sum", "none"]),
    st.floats(0.01, 100.0),
    st.sampled_from(["mse", "huber", "smooth", "l1", "bce"]),
    st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_any_shape_reduction_and_weight(
    shape: tuple[int, ...], reduction: str, factor: float, name: str, masked: bool
) -> None:
    losses: dict[str, Callable[..., Tensor]] = {
        "mse": F.mse_loss,
        "huber": lambda z, y, **o: F.huber_loss(z, y, delta=0.7, **o),
        "smooth": lambda z, y, **o: F.smooth_l1_loss(z, y, beta=0.7, **o),
        "l1": F.l1_loss,
        "bce": F.binary_cross_entropy_with_logits,
    }
    theta = theta_on(CPU)

    def loss(t: Tensor) -> Tensor:
        z = outputs_of(t, *shape)
        value = losses[name](z, numbers(z), reduction=reduction)
        if reduction == "none":
            value = (value * (numbers(z).round() if masked else numbers(z))).sum()
        return factor * value

    expected = None
    if name in ("mse", "bce"):
        expected = GaussNewton(evaluate(loss, theta)).dense()
    residuals = assert_residuals(loss, expected, theta)
    assert residuals.rest_gradient() is None


@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from(["mean", "sum", "none"]),
    st.booleans(),
    st.sampled_from([0.0, 0.2]),
    st.sampled_from([-100, 0]),
)
@settings(max_examples=60, deadline=None)
def test_any_cross_entropy(
    samples: int, classes: int, reduction: str, weights: bool, smoothing: float, ignored: int
) -> None:
    loss = ce(
        reduction=reduction, weighted=weights, label_smoothing=smoothing, ignore_index=ignored
    )
    theta = theta_on(CPU)

    def value(t: Tensor) -> Tensor:
        return loss(outputs_of(t, samples, classes))

    if not bool(value(theta).isfinite()):  # a mean over nothing
        assert not residuals_of(value, theta).finite
        return
    residuals = assert_residuals(value, GaussNewton(evaluate(value, theta)).dense(), theta)
    assert residuals.blocks[0].channels == classes - 1


# Errors.


def contrast(z: Tensor) -> Tensor:
    return -(z @ z.T).log_softmax(1).diagonal().mean()


INSEPARABLE: dict[str, Loss] = {
    "rmse": lambda z: F.mse_loss(z, numbers(z)).sqrt(),
    "log of a sum": lambda z: F.mse_loss(z, numbers(z)).log(),
    "marked norm": lambda z: mark_outputs(z).norm(),
    "product of means": lambda z: mark_outputs(z)[:, 0].cosh().mean() * z[:, 1].square().mean(),
    "contrastive": lambda z: contrast(mark_outputs(z)),
    "softmax over the batch": lambda z: -mark_outputs(z).log_softmax(0)[0].mean(),
    "differences of neighbours": lambda z: mark_outputs(z).diff(dim=0).square().sum(),
    "two outputs": lambda z: (
        (mark_outputs(z * 1).mean(1) * mark_outputs(z[:2] * 2).sum()).cosh().sum()
    ),
    "variance": lambda z: mark_outputs(z).var(),
}


@pytest.mark.parametrize("name", INSEPARABLE)
@pytest.mark.parametrize("samples", [2, 40])
def test_losses_that_are_no_sum_over_samples(name: str, samples: int) -> None:
    theta = theta_on(CPU)
    evaluation = evaluate(lambda t: INSEPARABLE[name](outputs_of(t, samples, 3)), theta)
    assert evaluation.linearization is not None
    with pytest.raises(InseparableLoss, match="not a sum over samples") as error:
        Residuals(evaluation.linearization.graph)
    for remedy in ("mse_loss(z, y) for mse_loss(z, y).sqrt()", "mark_outputs(r)", "NewtonCG"):
        assert remedy in str(error.value)


@pytest.mark.parametrize("pair", [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)], ids=str)
def test_two_samples_that_are_coupled_are_found(pair: tuple[int, int]) -> None:
    theta = theta_on(CPU)

    def loss(t: Tensor) -> Tensor:
        z = mark_outputs(outputs_of(t, 4, 2))
        return z.square().sum() + z[pair[0]].sum() * z[pair[1]].sum()

    with pytest.raises(InseparableLoss):
        residuals_of(loss, theta)


def test_a_coupling_is_found_before_blocks_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_secondorder._foundation.memory.free_memory", lambda _: 1e6)
    theta = theta_on(CPU)
    with pytest.raises(InseparableLoss):
        residuals_of(lambda t: mark_outputs(outputs_of(t, 4, 2000)).square().sum().sqrt(), theta)


def test_a_weak_coupling_of_many_samples_is_found() -> None:
    theta = nn.Parameter(torch.randn(6, dtype=DOUBLE))
    weights = torch.randn(500_000, 6)

    def loss(t: Tensor) -> Tensor:
        return mark_outputs(weights @ t.float()).square().mean().sqrt()

    with pytest.raises(InseparableLoss):
        residuals_of(loss, theta)


def test_a_loss_without_residuals() -> None:
    theta = theta_on(CPU)
    with pytest.raises(UnknownOutputs, match="shows no residuals") as error:
        residuals_of(lambda t: outputs_of(t, 5, 3).square().sum(), theta)
    for remedy in ("nn.functional.mse_loss(model(x), y)", "mark_outputs(residual(model, x))"):
        assert remedy in str(error.value)


def test_samples_that_are_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_secondorder._foundation.memory.free_memory", lambda _: 1e6)
    theta = theta_on(CPU)
    with pytest.raises(TooLarge, match=r"4 x 2,000 x 2,000 .*mark the residuals"):
        residuals_of(lambda t: mark_outputs(outputs_of(t, 4, 2000)).sum(1).square().sum(), theta)


NONFINITE: dict[str, Loss] = {
    "output": lambda z: F.mse_loss(z / torch.zeros_like(z), torch.zeros_like(z)),
    "target": lambda z: F.mse_loss(z, torch.full_like(z, torch.nan)),
    "weight": lambda z: (F.mse_loss(z, z.detach(), reduction="none") * torch.nan).sum(),
    "marked": lambda z: (mark_outputs(z) / 0).square().sum(),
    "curvature alone": lambda z: mark_outputs(z - z.detach()).abs().pow(1.5).sum(),
    "logits": lambda z: F.cross_entropy(z * torch.inf, torch.zeros(len(z), dtype=torch.long)),
    "class weights": lambda z: F.cross_entropy(
        z, torch.zeros(len(z), dtype=torch.long), weight=torch.full((3,), torch.nan, dtype=DOUBLE)
    ),
    "ignored": lambda z: F.cross_entropy(z, torch.zeros(len(z), dtype=torch.long), ignore_index=0),
    "coupled": lambda z: (mark_outputs(z) * torch.nan).sum(1).square().sum(),
    "pair": lambda z: F.mse_loss(z, z.sin() * torch.nan),
    "curvature of a standard loss alone": lambda z: F.kl_div(z.abs() * 1e4, numbers(z)),
    "products of the curvature alone": lambda z: (
        7.5e307 * mark_outputs(1e-3 * z).diff(dim=1).square().sum()
    ),
}


@pytest.mark.filterwarnings("ignore:reduction")
@pytest.mark.parametrize("name", NONFINITE)
def test_numbers_that_are_not_finite_are_reported(name: str) -> None:
    theta = theta_on(CPU)
    residuals = residuals_of(lambda t: NONFINITE[name](outputs_of(t, 5, 3)), theta)
    assert not residuals.finite


def test_random_numbers_are_left_alone() -> None:
    theta = theta_on(CPU)
    evaluation = evaluate(lambda t: mark_outputs(outputs_of(t, 5, 3)).sum(1).square().sum(), theta)
    assert evaluation.linearization is not None
    torch.manual_seed(1)
    Residuals(evaluation.linearization.graph)
    found = torch.rand(())
    torch.manual_seed(1)
    assert torch.equal(found, torch.rand(()))
