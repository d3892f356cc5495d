"""The Gauss-Newton matrix against dense `J'BJ`, for all ways of writing a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.support.losses import CLOSED, EQUAL, ce, mse
from tests.support.oracles import (
    CASES,
    assert_matrix,
    dense_gauss_newton,
    labels,
    make_case,
    numbers,
    outputs_of,
    theta_on,
)
from torch_secondorder import mark_outputs
from torch_secondorder._objective.base import Objective
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder._objective.functional import FunctionalObjective
from torch_secondorder.curvature import GaussNewton

CPU = torch.device("cpu")


def gauss_newton(loss: Callable[..., Tensor], *params: Tensor, **options: Any) -> GaussNewton:
    return GaussNewton(evaluate(loss, *params), **options)


def evaluate(loss: Callable[..., Tensor], *params: Tensor) -> Any:
    return ClosureObjective(lambda: loss(*params), params).evaluate(curvature=True)


def likelihoods(operator: GaussNewton) -> list[Any]:
    return operator._curvature.likelihoods


# Models.


@pytest.mark.parametrize("kind", ["closure", "function"])
@pytest.mark.parametrize("name", CASES)
def test_products_against_dense(name: str, kind: str, device: torch.device) -> None:
    case = make_case(name, device)
    names = [name for name, _ in case.model.named_parameters()]

    def outputs(*params: Tensor) -> Sequence[Tensor]:
        named = dict(zip(names, params, strict=True))
        return [functional_call(case.model, named, (case.x,))]

    expected = dense_gauss_newton(outputs, lambda z: case.loss(z, case.y), case.params())
    pure, params = case.pure(), case.params()
    objective: Objective = ClosureObjective(case.closure(), params)
    if kind == "function":
        objective = FunctionalObjective(lambda p: pure(*p), params)
    operator = GaussNewton(objective.evaluate(curvature=True))
    assert_matrix(operator, expected)
    assert not operator.bypassed


def test_dropout_keeps_its_mask() -> None:
    net = nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.4), nn.Tanh(), nn.Linear(6, 2)).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    names = [name for name, _ in net.named_parameters()]

    def outputs(*params: Tensor) -> Sequence[Tensor]:
        torch.manual_seed(4)
        return [functional_call(net, dict(zip(names, params, strict=True)), (x,))]

    expected = dense_gauss_newton(outputs, lambda z: F.cross_entropy(z, y), [*net.parameters()])
    torch.manual_seed(4)
    objective = ClosureObjective(lambda: F.cross_entropy(net(x), y), net.parameters())
    operator = GaussNewton(objective.evaluate(curvature=True))
    objective.trial(torch.randn(operator.size, dtype=torch.float64))
    assert_matrix(operator, expected)


def test_marked_residuals_of_a_differential_equation() -> None:
    case = make_case("pinn", CPU)
    case.y = torch.zeros_like(case.y)
    standard = GaussNewton(ClosureObjective(case.value, case.params()).evaluate(curvature=True))

    def marked() -> Tensor:
        return mark_outputs(case.model(case.x)).square().mean()

    operator = GaussNewton(ClosureObjective(marked, case.params()).evaluate(curvature=True))
    assert_matrix(operator, standard @ torch.eye(standard.size, dtype=torch.float64))


@pytest.mark.parametrize("where", ["body", "loss", "penalty"])
def test_checkpointed_modules(where: str) -> None:
    body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.3)).double()
    head = nn.Linear(4, 3).double()
    params = [*body.parameters(), *head.parameters()]
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.arange(5) % 3

    def loss(run: Callable[..., Tensor]) -> Tensor:
        torch.manual_seed(4)
        if where == "loss":
            return run(lambda x: F.cross_entropy(head(body(x)), y), x)
        value = F.cross_entropy(head(run(body, x)), y)
        return value + params[0].pow(4).sum() if where == "penalty" else value

    plain = gauss_newton(lambda *_: loss(lambda f, x: f(x)), *params)
    operator = gauss_newton(
        lambda *_: loss(lambda f, x: checkpoint(f, x, use_reentrant=False)), *params
    )
    assert_matrix(operator, plain @ torch.eye(plain.size, dtype=torch.float64))
    # Random numbers are drawn again inside: there is no vectorized pass.
    diagonals = [g.diagonal(3, torch.Generator().manual_seed(0)) for g in (operator, plain)]
    torch.testing.assert_close(*diagonals)


# Standard losses.


@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms_are_hessians_of_the_loss(name: str, device: torch.device) -> None:
    shape, loss = CLOSED[name]
    theta = theta_on(device)
    expected = dense_gauss_newton(lambda t: [outputs_of(t, *shape)], loss, [theta])
    operator = gauss_newton(lambda t: loss(outputs_of(t, *shape)), theta)
    assert likelihoods(operator)[0] is not None and not operator.bypassed
    assert_matrix(operator, expected)
    # A mark ahead of what the loss is given wins, and there is no closed form for it.
    marked = gauss_newton(lambda t: loss(mark_outputs(outputs_of(t, *shape)) * 1), theta)
    assert likelihoods(marked) == [None]
    assert_matrix(marked, expected)


@pytest.mark.parametrize("name", EQUAL)
def test_probabilities_and_their_logarithms_give_what_logits_give(name: str) -> None:
    loss, with_logits, shape = EQUAL[name]
    theta = theta_on(CPU)
    operator = gauss_newton(lambda t: loss(outputs_of(t, *shape)), theta)
    assert likelihoods(operator)[0] is not None
    assert_matrix(
        operator, dense_gauss_newton(lambda t: [outputs_of(t, *shape)], with_logits, [theta])
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gaussian_with_a_variance_has_the_fisher_information_of_both(reduction: str) -> None:
    theta = theta_on(CPU)

    def outputs(t: Tensor) -> Sequence[Tensor]:
        return outputs_of(t, 4, 2), outputs_of(t, 2, 2, 2).view(4, 2).exp()

    mean, var = (z.detach() for z in outputs(theta))
    share = 1 / 8 if reduction == "mean" else 1.0

    def second_order(m: Tensor, v: Tensor) -> Tensor:
        return share * ((m / var.sqrt()).square() + (v / var).square() / 2).sum() / 2

    def loss(t: Tensor) -> Tensor:
        m, v = outputs(t)
        return F.gaussian_nll_loss(m, torch.ones_like(mean), v, reduction=reduction)

    operator = gauss_newton(loss, theta)
    assert None not in likelihoods(operator)
    assert_matrix(operator, dense_gauss_newton(outputs, second_order, [theta]))


@pytest.mark.parametrize("weighted", [False, True])
def test_micro_batches_add_up(weighted: bool) -> None:
    theta, y = theta_on(CPU), labels(torch.empty(6, 4))

    def closure() -> Tensor:
        z = outputs_of(theta, 6, 4)
        for rows, share in ((slice(0, 2), 1 / 3), (slice(2, 6), 2 / 3)):
            value = F.cross_entropy(z[rows], y[rows])
            if weighted:
                value.backward(torch.tensor(share, dtype=value.dtype))
            else:
                value *= share  # in place: what the loss returned is not what it was
                value.backward()
        return torch.zeros(())

    operator = GaussNewton(ClosureObjective(closure, [theta]).evaluate(curvature=True))
    assert len(likelihoods(operator)) == 2 and None not in likelihoods(operator)
    assert_matrix(operator, dense_gauss_newton(lambda t: [outputs_of(t, 6, 4)], ce(), [theta]))


# By automatic differentiation of the loss.

Z = (5, 4)
AUTODIFF: dict[str, Callable[[Tensor], Tensor]] = {
    "huber": lambda z: F.huber_loss(z, numbers(z)),
    "poisson": lambda z: F.poisson_nll_loss(z, numbers(z), log_input=True),
    "soft margin": lambda z: F.soft_margin_loss(z, numbers(z).sub(0.5).sign()),
    "marked": lambda z: mark_outputs(z).cosh().log().mean() + z[0].exp().sum(),
    "not linear in the standard loss": lambda z: ce()(z).exp(),
    "product of two losses": lambda z: ce()(z) * mse()(z),
    "one output, two losses": lambda z: ce()(z) + 0.3 * ce(label_smoothing=0.5)(z),
    "logits in a penalty": lambda z: ce()(z) + (z**2).mean(),
    "legacy reduction": lambda z: F.mse_loss(z, numbers(z), size_average=False),
}


@pytest.mark.filterwarnings("ignore:size_average and reduce")
@pytest.mark.parametrize("name", AUTODIFF)
def test_other_losses_are_differentiated(name: str, device: torch.device) -> None:
    loss, theta = AUTODIFF[name], theta_on(device)
    operator = gauss_newton(lambda t: loss(outputs_of(t, *Z)), theta)
    assert likelihoods(operator) == [None] and not operator.bypassed
    assert_matrix(operator, dense_gauss_newton(lambda t: [outputs_of(t, *Z)], loss, [theta]))


def test_a_loss_for_the_report_only_changes_nothing() -> None:
    theta, seen = theta_on(CPU), []

    def loss(t: Tensor) -> Tensor:
        z = outputs_of(t, *Z)
        seen.append(F.l1_loss(z, numbers(z)).item())
        with torch.no_grad():
            seen.append(F.cross_entropy(z, labels(z)).item())
        return ce()(z)

    operator = gauss_newton(loss, theta)
    assert None not in likelihoods(operator)
    assert_matrix(operator, dense_gauss_newton(lambda t: [outputs_of(t, *Z)], ce(), [theta]))
