"""Evaluations with `curvature="jacobian"`: the graph of the loss, without one of the gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.support.oracles import CASES, assert_matrix, make_case
from torch_secondorder import MissingSecondDerivative
from torch_secondorder._objective.base import Objective
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder._objective.functional import FunctionalObjective
from torch_secondorder.curvature import Fisher, GaussNewton, Hessian

CPU = torch.device("cpu")
KINDS = ["closure", "function"]
SENTENCE = r'with curvature="jacobian", which keeps no graph of the gradient .*curvature=True'


def objective_of(case: Any, kind: str) -> Objective:
    if kind == "closure":
        return ClosureObjective(case.closure(), case.params())
    pure = case.pure()
    return FunctionalObjective(lambda p: pure(*p), case.params())


def dense(operator: GaussNewton) -> Tensor:
    return operator @ torch.eye(operator.size, dtype=operator.dtype, device=operator.device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_a_plain_evaluation(
    name: str, kind: str, device: torch.device
) -> None:
    case = make_case(name, device)
    objective = objective_of(case, kind)
    plain, kept = objective.evaluate(), objective.evaluate(curvature="jacobian")
    torch.testing.assert_close(kept.loss, plain.loss, rtol=0, atol=0)
    torch.testing.assert_close(kept.grad, plain.grad, rtol=1e-14, atol=1e-15)
    assert kept.linearization is not None
    assert not kept.linearization.graph.gradients
    (output,) = kept.linearization.graph.outputs
    assert output.loss is case.loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp", "cnn", "pinn"])
def test_gauss_newton_products_are_those_of_a_full_evaluation(name: str, kind: str) -> None:
    objective = objective_of(make_case(name, CPU), kind)
    expected = dense(GaussNewton(objective.evaluate(curvature=True)))
    evaluation = objective.evaluate(curvature="jacobian")
    assert_matrix(GaussNewton(evaluation), expected)
    labelled = Fisher(evaluation, labels="empirical")
    full = Fisher(objective.evaluate(curvature=True), labels="empirical")
    torch.testing.assert_close(dense(labelled), dense(full))


@pytest.mark.parametrize("kind", KINDS)
def test_trials_can_keep_the_same_graph(kind: str) -> None:
    objective = objective_of(make_case("mlp", CPU), kind)
    step = torch.full((objective.vector.size,), 0.1, dtype=torch.float64)
    trial = objective.trial(step, 0.5, curvature="jacobian")
    with pytest.raises(RuntimeError, match="earlier point"):
        GaussNewton(trial)
    objective.accept(step, 0.5, trial)
    expected = dense(GaussNewton(objective.evaluate(curvature=True)))
    assert_matrix(GaussNewton(trial), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_refused(kind: str) -> None:
    evaluation = objective_of(make_case("mlp", CPU), kind).evaluate(curvature="jacobian")
    with pytest.raises(ValueError, match=SENTENCE):
        Hessian(evaluation)
    assert evaluation.linearization is not None
    with pytest.raises(ValueError, match=SENTENCE):
        evaluation.linearization.hessian_product(torch.ones_like(evaluation.grad))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("curvature", ["hessian", 1, None])
def test_other_kinds_are_refused(kind: str, curvature: Any) -> None:
    objective = objective_of(make_case("mlp", CPU), kind)
    if curvature is None:  # as always: anything false is none
        assert objective.evaluate(curvature=curvature).linearization is None
        return
    message = f"curvature must be one of 'jacobian', or a bool, got {curvature!r}"
    with pytest.raises((ValueError, TypeError), match=message):
        objective.evaluate(curvature=curvature)
    with pytest.raises((ValueError, TypeError), match=message):
        objective.trial(torch.ones(objective.vector.size), curvature=curvature)


def test_several_backward_calls_and_clipping_in_the_closure() -> None:
    case = make_case("mlp", CPU)

    def closure() -> Tensor:
        case.model.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for x, y in zip(case.x.split(3), case.y.split(3), strict=True):
            loss = F.cross_entropy(case.model(x), y, reduction="sum") / len(case.x)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(case.model.parameters(), 1e-3)
        return total

    whole = ClosureObjective(case.closure(), case.params()).evaluate(curvature=True)
    parts = ClosureObjective(closure, case.params()).evaluate(curvature="jacobian")
    torch.testing.assert_close(parts.grad.norm(), torch.tensor(1e-3, dtype=torch.float64))
    assert_matrix(GaussNewton(parts), dense(GaussNewton(whole)))


def test_another_closure_gives_the_graph() -> None:
    case, half = make_case("mlp", CPU), make_case("mlp", CPU)
    half.model, half.x, half.y = case.model, half.x[:3], half.y[:3]
    objective = ClosureObjective(case.closure(), case.params(), curvature_closure=half.closure())
    evaluation = objective.evaluate(curvature="jacobian")
    torch.testing.assert_close(evaluation.grad, objective.evaluate().grad)
    only = ClosureObjective(half.closure(), case.params()).evaluate(curvature=True)
    assert_matrix(GaussNewton(evaluation), dense(GaussNewton(only)))


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


@pytest.mark.parametrize("kind", KINDS)
def test_custom_functions_need_no_second_derivative(kind: str) -> None:
    theta = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))

    def loss(theta: Tensor) -> Tensor:
        return F.mse_loss(Squared.apply(theta), torch.ones_like(theta), reduction="sum")

    objective: Objective = ClosureObjective(lambda: loss(theta), [theta])
    if kind == "function":
        objective = FunctionalObjective(loss, theta)
    evaluation = objective.evaluate(curvature="jacobian")
    torch.testing.assert_close(evaluation.grad, (4 * theta * (theta**2 - 1)).detach())
    # Products `J v` by differentiating the transpose would be zero.
    with pytest.raises(MissingSecondDerivative, match="Squared, marked once_differentiable"):
        GaussNewton(evaluation)
    with pytest.raises(MissingSecondDerivative, match="Squared"):
        objective.evaluate(curvature=True)


def test_fused_attention_stays_as_it_is() -> None:
    x = torch.randn(4, 5, 8, dtype=torch.float64)
    seen: list[str] = []
    attend = F.scaled_dot_product_attention

    def closure() -> Tensor:
        result = attend(*(x.view(4, 5, 2, 4).transpose(1, 2) @ p for p in weights))
        assert result.grad_fn is not None
        seen.append(result.grad_fn.name())
        return F.mse_loss(result, torch.zeros_like(result))

    weights = [nn.Parameter(torch.randn(4, 4, dtype=torch.float64)) for _ in range(3)]
    objective = ClosureObjective(closure, weights)
    plain = objective.evaluate()
    kept = objective.evaluate(curvature="jacobian")
    objective.evaluate(curvature=True)
    assert seen[0] == seen[1] != seen[2]
    torch.testing.assert_close(kept.grad, plain.grad, rtol=0, atol=0)
    with pytest.raises(MissingSecondDerivative, match="scaled_dot_product"):
        _ = GaussNewton(kept) @ kept.grad


def test_reentrant_checkpoints_are_refused() -> None:
    layer, x = nn.Linear(3, 2).double(), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def closure() -> Tensor:
        return checkpoint(layer, x, use_reentrant=True).square().sum()

    with pytest.raises(MissingSecondDerivative, match="use_reentrant=False"):
        ClosureObjective(closure, layer.parameters()).evaluate(curvature="jacobian")


def test_a_compiled_function_shows_no_outputs() -> None:
    w = torch.ones(2)
    objective = FunctionalObjective(lambda w: w.square().sum(), w, compile={"backend": "eager"})
    with pytest.raises(RuntimeError, match=r"and residuals need: .*leave compile out"):
        objective.evaluate(curvature="jacobian")


def test_a_graph_that_the_closure_writes_into_is_made_again() -> None:
    theta = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    buffer = torch.zeros(2, dtype=torch.float64)

    def closure() -> Tensor:
        buffer.copy_(torch.tensor([3.0, 4.0]))
        return F.mse_loss(theta * buffer, torch.ones(2, dtype=torch.float64))

    objective = ClosureObjective(closure, [theta])
    kept = objective.evaluate(curvature="jacobian")
    objective.evaluate()  # writes
    assert_matrix(GaussNewton(kept), torch.diag(torch.tensor([9.0, 16.0], dtype=torch.float64)))
    assert kept.linearization is not None and not kept.linearization.graph.twice
