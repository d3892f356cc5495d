"""Where the model's outputs are, what lies beside them, and the terms of the objective."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.oracles import (
    assert_matrix,
    dense_gauss_newton,
    dense_hessian,
    labels,
    make_case,
    numbers,
    outputs_of,
    theta_on,
)
from torch_secondorder import mark_outputs
from torch_secondorder._objective.base import Regularization
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder._objective.functional import FunctionalObjective
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.curvature import Fisher, GaussNewton

CPU = torch.device("cpu")


def gauss_newton(loss: Callable[..., Tensor], *params: Tensor, **options: Any) -> GaussNewton:
    objective = ClosureObjective(lambda: loss(*params), params)
    return GaussNewton(objective.evaluate(curvature=True), **options)


def cross_entropy(z: Tensor) -> Tensor:
    return F.cross_entropy(z, labels(z))


def squares(z: Tensor) -> Tensor:
    return F.mse_loss(z, numbers(z))


# Several outputs: the losses are functions of independent outputs, the outputs of the parameters.


def two_heads(t: Tensor) -> Sequence[Tensor]:
    return outputs_of(t, 5, 4), outputs_of(t, 3, 2, 1)


def one_after_the_other(t: Tensor) -> Sequence[Tensor]:
    first = mark_outputs(outputs_of(t, 4, 3))
    return first, mark_outputs((first**2).sum(1).sin())


def parts(t: Tensor) -> Sequence[Tensor]:
    return outputs_of(t, 5, 8).chunk(2, dim=1)


def rows(t: Tensor) -> Sequence[Tensor]:
    return outputs_of(t, 3, 4).unbind()


SEVERAL: dict[str, tuple[Callable[[Tensor], Sequence[Tensor]], Callable[..., Tensor]]] = {
    "two heads": (two_heads, lambda a, b: cross_entropy(a) + 0.5 * squares(b)),
    "marked heads": (two_heads, lambda a, b: (mark_outputs(a).exp().sum() * squares(b)).log()),
    "one of the other": (
        one_after_the_other,
        lambda a, b: a.cosh().sum() + (a.sum() * b).exp().sum(),
    ),
    "standard losses along the way": (
        one_after_the_other,
        lambda a, b: cross_entropy(a) + squares(b),
    ),
    "parts": (parts, lambda a, b: cross_entropy(a) + squares(b)),
    "one part used": (parts, lambda a, b: cross_entropy(b)),
    "rows": (rows, lambda a, b, c: cross_entropy(a) + squares(b) + cross_entropy(c)),
    "input and target": (two_heads, lambda a, b: F.mse_loss(a[:3, :2], b[..., 0])),
    "a parameter itself": (lambda t: [t], squares),
    "a marked parameter": (lambda t: [t], lambda t: mark_outputs(t).cosh().sum()),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_outputs_against_dense(name: str) -> None:
    outputs, loss = SEVERAL[name]
    theta = theta_on(CPU)
    operator = gauss_newton(lambda t: loss(*outputs(t)), theta)
    assert not operator.bypassed
    assert_matrix(operator, dense_gauss_newton(outputs, loss, [theta]))


def test_the_mark_wins_over_what_is_made_of_it() -> None:
    theta = theta_on(CPU)

    def through(z: Tensor) -> Tensor:
        return squares((z**2).sum(1))

    operator = gauss_newton(lambda t: through(mark_outputs(outputs_of(t, 4, 3))), theta)
    marked = dense_gauss_newton(lambda t: [outputs_of(t, 4, 3)], through, [theta])
    seen = dense_gauss_newton(lambda t: [(outputs_of(t, 4, 3) ** 2).sum(1)], squares, [theta])
    assert not torch.allclose(marked, seen)
    assert_matrix(operator, marked)


def test_an_output_that_the_loss_does_not_use_is_ignored() -> None:
    theta = theta_on(CPU)

    def loss(t: Tensor) -> Tensor:
        z, other = mark_outputs(outputs_of(t, 5, 4)), mark_outputs(outputs_of(t, 2, 2))
        squares(other)
        return cross_entropy(z)

    operator = gauss_newton(loss, theta)
    expected = dense_gauss_newton(lambda t: [outputs_of(t, 5, 4)], cross_entropy, [theta])
    assert_matrix(operator, expected)


# What bypasses the outputs.

A, B = (5, 4), (3, 2)
REMAINDERS: dict[str, Callable[[Tensor, Sequence[Tensor]], Tensor]] = {
    "squares": lambda t, z: 0.1 * t.square().sum(),
    "nonlinear": lambda t, z: t.exp().prod(),
    "another part of the network": lambda t, z: outputs_of(t, *B).cosh().sum(),
    "another part of one node": lambda t, z: z[1].cosh().sum(),
}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", REMAINDERS)
def test_what_bypasses_the_outputs_is_added_exactly(name: str, in_place: bool) -> None:
    theta, penalty = theta_on(CPU), REMAINDERS[name]

    def loss(t: Tensor) -> Tensor:
        z = parts(t)
        value = cross_entropy(z[0])
        if in_place:
            value += penalty(t, z)
            return value
        return value + penalty(t, z)

    expected = dense_gauss_newton(lambda t: parts(t)[:1], cross_entropy, [theta])
    ignoring = gauss_newton(loss, theta, remainder="ignore")
    assert ignoring.bypassed
    assert_matrix(ignoring, expected)
    operator = gauss_newton(loss, theta)
    assert operator.bypassed
    expected = expected + dense_hessian(lambda t: penalty(t, parts(t)), [theta])
    assert_matrix(operator, expected)
    assert_matrix(GaussNewton(FunctionalObjective(loss, theta).evaluate(curvature=True)), expected)


@pytest.mark.parametrize("standard", [False, True])
def test_a_learned_weight_of_a_loss(standard: bool) -> None:
    """By the outputs at fixed `s`, by `s` at fixed outputs, and no cross terms."""
    theta, s = theta_on(CPU), nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def by_output(z: Tensor) -> Tensor:
        return cross_entropy(z) if standard else z.cosh().mean()

    def loss(t: Tensor, s: Tensor) -> Tensor:
        z = outputs_of(t, *A)
        return (-s).exp() * by_output(z if standard else mark_outputs(z)) + s

    operator = gauss_newton(loss, theta, s)
    assert operator.bypassed
    assert (operator._curvature.likelihoods[0] is not None) == standard
    block = dense_gauss_newton(lambda t: [outputs_of(t, *A)], by_output, [theta])
    factor = (-s).exp().detach()
    last = factor * by_output(outputs_of(theta, *A)).detach()
    assert_matrix(operator, torch.block_diag(factor * block, last))


def test_leaves_that_are_not_optimized_do_not_count_as_bypassing() -> None:
    theta, other = theta_on(CPU), torch.ones(3, requires_grad=True)
    operator = gauss_newton(lambda t: cross_entropy(outputs_of(t, *A)) + other.sum(), theta)
    assert not operator.bypassed


# The objective around it.


@pytest.mark.parametrize("maximize", [False, True])
def test_regularization_and_scale_are_included(maximize: bool) -> None:
    case, sign = make_case("mlp", CPU), -1.0 if maximize else 1.0
    params, scale, decay = case.params(), [1.0, 0.5, 2.0, 0.25], (0.1, 0.2, 0.3, 0.4)
    vector = ParameterVector(params, scale)
    s, d = vector.expand(scale), vector.expand(decay)
    plain = gauss_newton(lambda *_: case.value(), *params)
    dense = plain @ torch.eye(plain.size, dtype=torch.float64)
    objective = ClosureObjective.for_step(
        lambda: sign * case.value(), vector, Regularization(maximize=maximize, weight_decay=decay)
    )
    evaluation = objective.evaluate(curvature=True)
    assert_matrix(GaussNewton(evaluation), s[:, None] * (dense + torch.diag(d)) * s)
    # As a log-likelihood to be maximized, the estimates are of the same matrix.
    diagonal = GaussNewton(evaluation).diagonal(3000)
    torch.testing.assert_close(diagonal, s * (dense.diagonal() + d) * s, rtol=0.3, atol=1e-3)
    fisher = Fisher(evaluation, n_samples=300) @ torch.eye(plain.size, dtype=torch.float64)
    assert torch.linalg.eigvalsh(fisher).min() >= 0
    empirical = Fisher(evaluation, labels="empirical")
    product = empirical @ torch.eye(plain.size, dtype=torch.float64)
    assert torch.linalg.eigvalsh(product).min() >= 0


@pytest.mark.parametrize("kind", [GaussNewton, Fisher])
def test_trials_between_evaluation_and_products(kind: Callable[..., GaussNewton]) -> None:
    case = make_case("rnn", CPU)

    def closure() -> Tensor:
        return case.value() + case.params()[0].pow(4).sum()

    objective = ClosureObjective(closure, case.params())
    evaluation = objective.evaluate(curvature=True)
    v = torch.randn(objective.vector.size, dtype=torch.float64)

    def made() -> GaussNewton:
        torch.manual_seed(0)
        return kind(evaluation)

    def diagonal(operator: GaussNewton) -> Tensor:
        return operator.diagonal(2, torch.Generator().manual_seed(0))

    operator = made()
    for use in (lambda: operator @ v, lambda: diagonal(operator), lambda: made() @ v):
        before = use()
        objective.trial(v)
        torch.testing.assert_close(use(), before)
    objective.accept(v)
    for use in (made, lambda: operator @ v, operator.diagonal):
        with pytest.raises(RuntimeError, match="the parameters have moved"):
            use()


def test_no_graph_outlives_an_operator() -> None:
    case = make_case("mlp", CPU)

    def closure() -> Tensor:  # one output of each kind, and a remainder
        z = mark_outputs(case.model(case.x).square())
        return z.mean() + case.value() + case.params()[0].pow(4).sum()

    objective = ClosureObjective(closure, case.params())
    v = torch.randn(objective.vector.size, dtype=torch.float64)

    def use() -> None:
        evaluation = objective.evaluate(curvature=True)
        operator = GaussNewton(evaluation)
        operator @ v
        operator.diagonal()
        Fisher(evaluation, labels="empirical") @ v

    def tensors() -> int:
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    use()
    gc.collect()
    before = tensors()
    gc.disable()
    try:
        for _ in range(5):
            use()
        assert tensors() <= before
    finally:
        gc.enable()


# Precision and size.


@pytest.mark.parametrize("name", ["mlp", "cnn", "attention"])
def test_products_under_autocast(name: str, device: torch.device) -> None:
    case = make_case(name, device, torch.float32)
    exact = gauss_newton(lambda *_: case.value(), *case.params())

    def closure() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss = case.value()
        loss.backward()
        return loss

    operator = GaussNewton(ClosureObjective(closure, case.params()).evaluate(curvature=True))
    eye = torch.eye(operator.size, device=device)
    dense = exact @ eye
    assert torch.linalg.norm(operator @ eye - dense) < 0.03 * torch.linalg.norm(dense)
    torch.testing.assert_close(operator @ eye[0], (operator @ eye)[:, 0], rtol=0.05, atol=1e-3)


def test_a_vocabulary_of_classes(device: torch.device) -> None:
    """A matrix over the classes would take 10 GB for each position."""
    x, y = torch.randn(8, 4, device=device), torch.arange(8, device=device)
    head = nn.Parameter(torch.randn(4, 50_000, device=device))
    objective = ClosureObjective(lambda: F.cross_entropy(x @ head, y), [head])
    evaluation = objective.evaluate(curvature=True)
    operator = GaussNewton(evaluation)
    v = torch.randn_like(head.detach())
    p, change = (x @ head.detach()).softmax(1), x @ v
    expected = x.T @ (p * (change - (p * change).sum(1, keepdim=True))) / 8
    torch.testing.assert_close((operator @ v.view(-1)).view_as(v), expected)
    assert operator.diagonal().shape == (200_000,)
    assert torch.isfinite(Fisher(evaluation) @ v.view(-1)).all()


# What is refused.


def test_losses_without_outputs_are_refused() -> None:
    theta = theta_on(CPU)
    for loss in (lambda t: t.exp().sum(), lambda t: (mark_outputs(t * 2), t.exp().sum())[1]):
        with pytest.raises(RuntimeError, match=r'(?s)mark_outputs.*curvature="hessian"'):
            gauss_newton(loss, theta)


def test_complex_outputs_are_refused() -> None:
    theta = theta_on(CPU)
    with pytest.raises(ValueError, match=r"must be real: mark torch\.view_as_real\(z\)"):
        gauss_newton(lambda t: mark_outputs(t * 1j).abs().square().sum(), theta)
    operator = gauss_newton(
        lambda t: mark_outputs(torch.view_as_real(t * 1j)).square().sum(), theta
    )
    assert_matrix(operator, 2 * torch.eye(6, dtype=torch.float64))


def test_evaluations_without_curvature_and_unknown_remainders_are_refused() -> None:
    theta = theta_on(CPU)
    objective = FunctionalObjective(lambda t: squares(t), theta)
    with pytest.raises(ValueError, match=r"evaluate\(curvature=True\)"):
        GaussNewton(objective.evaluate())
    with pytest.raises(ValueError, match="'hessian', 'ignore', got 'drop'"):
        GaussNewton(objective.evaluate(curvature=True), remainder="drop")  # type: ignore[arg-type]


@pytest.mark.parametrize("recorded", [False, True])
def test_outputs_changed_in_place_after_the_loss_are_refused(recorded: bool) -> None:
    def loss(t: Tensor) -> Tensor:
        z = outputs_of(t, *A) * 1
        value = cross_entropy(z)
        with torch.set_grad_enabled(recorded):
            z.mul_(2)
        return value

    with pytest.raises(RuntimeError, match="an argument of cross_entropy was changed in place"):
        gauss_newton(loss, theta_on(CPU))


def test_an_operation_without_second_derivative_is_explained() -> None:
    bag = nn.EmbeddingBag(5, 3).double()
    rows = torch.tensor([[0, 1], [2, 3]])
    with pytest.raises(RuntimeError, match="has no second derivative"):
        gauss_newton(lambda *_: squares(bag(rows)), *bag.parameters()) @ torch.ones(15).double()


class Both(torch.autograd.Function):
    """Two results, and a backward that is told which gradients are missing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return x**3, x**2

    @staticmethod
    def backward(ctx: Any, cubed: Tensor | None, squared: Tensor | None) -> Tensor | None:
        (x,) = ctx.saved_tensors
        terms = [(cubed, 3 * x**2), (squared, 2 * x)]
        kept = [gradient * factor for gradient, factor in terms if gradient is not None]
        return sum(kept[1:], kept[0]) if kept else None


def test_custom_functions() -> None:
    theta = theta_on(CPU)

    def loss(t: Tensor, function: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        a, b = function(outputs_of(t, *A))
        return cross_entropy(a) + b.square().sum()

    custom = gauss_newton(lambda t: loss(t, Both.apply), theta)
    plain = gauss_newton(lambda t: loss(t, lambda x: (x**3, x**2)), theta)
    assert custom.bypassed
    assert_matrix(custom, plain @ torch.eye(6, dtype=torch.float64))
