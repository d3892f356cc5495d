"""The closure contract, row by row, and the same numbers from a pure function."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.support.oracles import CASES, dense_hessian, flat, make_case
from torch_secondorder._objective.base import Objective, Regularization
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder._objective.functional import FunctionalObjective
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.curvature import Hessian

KINDS = ["closure", "function"]


def objective_of(case, kind: str, regularization: Regularization | None = None) -> Objective:
    params = case.params()
    if kind == "closure":
        return ClosureObjective.for_step(case.closure(), params, regularization)
    pure = case.pure()
    objective = FunctionalObjective(lambda p: pure(*p), params)
    return objective.bind(ParameterVector(params), regularization)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_loss_gradient_and_hessian_against_dense(
    name: str, kind: str, device: torch.device
) -> None:
    case = make_case(name, device)
    reference = dense_hessian(case.pure(), case.params())
    gradient = flat(torch.autograd.grad(case.value(), case.params()))
    loss = case.value()
    evaluation = objective_of(case, kind).evaluate(curvature=True)
    hessian = Hessian(evaluation)
    torch.testing.assert_close(evaluation.loss, loss.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(evaluation.grad, gradient, rtol=1e-10, atol=1e-12)
    eye = torch.eye(hessian.size, dtype=torch.float64, device=device)
    one_by_one = torch.stack([hessian @ e for e in eye], dim=1)
    torch.testing.assert_close(one_by_one, reference, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(hessian @ eye, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("curvature", [False, True])
def test_regularization_is_part_of_loss_gradient_and_hessian(kind: str, curvature: bool) -> None:
    case = make_case("mlp", torch.device("cpu"))
    decay = tuple(0.1 * (i + 1) for i in range(4))
    regularization = Regularization(maximize=True, weight_decay=decay)

    def reference(*params: Tensor) -> Tensor:
        penalty = sum(d * p.square().sum() / 2 for d, p in zip(decay, params, strict=True))
        return penalty - case.pure()(*params)

    objective = objective_of(case, kind, regularization)
    evaluation = objective.evaluate(curvature=curvature)
    expected = reference(*case.params())
    gradient = flat(torch.autograd.grad(expected, case.params()))
    torch.testing.assert_close(evaluation.loss, expected.detach())
    torch.testing.assert_close(evaluation.closure_loss, case.value().detach())
    torch.testing.assert_close(evaluation.grad, gradient)
    if curvature:
        eye = torch.eye(objective.vector.size, dtype=torch.float64)
        dense = dense_hessian(reference, case.params())
        torch.testing.assert_close(Hessian(evaluation) @ eye, dense, rtol=1e-10, atol=1e-10)


def test_the_scaled_space_has_the_scaled_derivatives() -> None:
    case = make_case("mlp", torch.device("cpu"))
    scale = [1.0, 0.5, 2.0, 0.25]
    vector = ParameterVector(case.params(), scale)
    plain = ClosureObjective(case.closure(), case.params()).evaluate(curvature=True)
    scaled = ClosureObjective.for_step(case.closure(), vector, Regularization(weight_decay=0.0))
    evaluation = scaled.evaluate(curvature=True)
    s = vector.expand(scale)
    torch.testing.assert_close(evaluation.grad, s * plain.grad)
    v = torch.randn(vector.size, dtype=torch.float64)
    torch.testing.assert_close(Hessian(evaluation) @ v, s * (Hessian(plain) @ (s * v)))
    step = torch.randn_like(v)
    before = vector.read()
    scaled.accept(step)
    torch.testing.assert_close(vector.read(), before + s * step)


@pytest.mark.parametrize("curvature", [False, True])
def test_several_backward_calls_add_up(curvature: bool) -> None:
    case = make_case("mlp", torch.device("cpu"))

    def micro_batches() -> Tensor:
        case.model.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for x, y in zip(case.x.split(3), case.y.split(3), strict=True):
            loss = F.cross_entropy(case.model(x), y, reduction="sum") / len(case.x)
            loss.backward()
            total += loss.detach()
        return total

    whole = ClosureObjective(case.closure(), case.params()).evaluate(curvature=True)
    parts = ClosureObjective(micro_batches, case.params()).evaluate(curvature=curvature)
    torch.testing.assert_close(parts.loss, whole.loss)
    torch.testing.assert_close(parts.grad, whole.grad)
    if curvature:
        v = torch.randn_like(whole.grad)
        torch.testing.assert_close(Hessian(parts) @ v, Hessian(whole) @ v)


@pytest.mark.parametrize("curvature", [False, True])
def test_a_closure_without_backward_is_differentiated(curvature: bool) -> None:
    case = make_case("mlp", torch.device("cpu"))
    with_backward = ClosureObjective(case.closure(), case.params()).evaluate(curvature=True)
    without = ClosureObjective(case.value, case.params()).evaluate(curvature=curvature)
    torch.testing.assert_close(without.grad, with_backward.grad)
    if curvature:
        v = torch.randn_like(without.grad)
        torch.testing.assert_close(Hessian(without) @ v, Hessian(with_backward) @ v)


@pytest.mark.parametrize("curvature", [False, True])
def test_a_closure_that_never_zeroes_does_not_accumulate(curvature: bool) -> None:
    case = make_case("mlp", torch.device("cpu"))

    def closure() -> Tensor:
        loss = case.value()
        loss.backward()
        return loss

    objective = ClosureObjective(closure, case.params())
    first = objective.evaluate(curvature=curvature)
    again = objective.evaluate(curvature=curvature)
    assert torch.equal(first.grad, again.grad)


@pytest.mark.parametrize("curvature", [False, True])
@pytest.mark.parametrize("returned", ["detached", "number", "one element"])
def test_what_a_closure_may_return(returned: str, curvature: bool) -> None:
    case = make_case("mlp", torch.device("cpu"))

    def closure():
        case.model.zero_grad()
        loss = case.value()
        loss.backward()
        return {
            "detached": loss.detach(),
            "number": loss.item(),
            "one element": loss.detach().view(1, 1),
        }[returned]

    evaluation = ClosureObjective(closure, case.params()).evaluate(curvature=curvature)
    assert evaluation.loss.shape == () and not evaluation.loss.requires_grad
    torch.testing.assert_close(evaluation.loss, case.value().detach())


def test_torch_autograd_backward_is_refused_where_curvature_is_needed() -> None:
    case = make_case("mlp", torch.device("cpu"))

    def closure() -> Tensor:
        loss = case.value()
        torch.autograd.backward(loss)
        return loss

    objective = ClosureObjective(closure, case.params())
    assert objective.evaluate().grad.any()
    with pytest.raises(RuntimeError, match=r"loss\.backward\(\) instead of torch\.autograd"):
        objective.evaluate(curvature=True)


@pytest.mark.parametrize(
    ("closure", "kind", "message"),
    [
        (lambda p: None, TypeError, "NoneType"),
        (lambda p: (p.sum(), p), TypeError, "tuple"),
        (lambda p: p * 2, ValueError, r"shape \(3,\)"),
        (lambda p: (p * 1j).sum(), ValueError, "complex"),
        (lambda p: torch.ones(()), RuntimeError, "no gradient reached"),
        (lambda p: torch.ones((), requires_grad=True) * 2, RuntimeError, "no gradient reached"),
        (lambda p: 3.0, RuntimeError, "no gradient reached"),
    ],
)
@pytest.mark.parametrize("curvature", [False, True])
def test_bad_closures(
    closure: Callable, kind: type[Exception], message: str, curvature: bool
) -> None:
    p = nn.Parameter(torch.ones(3))
    objective = ClosureObjective(lambda: closure(p), [p])
    with pytest.raises(kind, match=message):
        objective.evaluate(curvature=curvature)
    assert torch.equal(p, torch.ones(3))


def test_a_closure_must_be_callable() -> None:
    with pytest.raises(TypeError, match="must be callable, got Tensor"):
        ClosureObjective(torch.ones(()), [torch.ones(1)])


def test_a_tree_without_the_optimizers_parameters_is_refused() -> None:
    p = nn.Parameter(torch.ones(3))
    objective = FunctionalObjective(lambda q: q.sum(), p.detach().clone())
    with pytest.raises(ValueError, match="holds none of the optimizer's"):
        objective.bind(ParameterVector([p]), Regularization(), None)


@pytest.mark.parametrize("tried", [False, True])
def test_a_graph_of_the_users_notices_a_move(tried: bool) -> None:
    case = make_case("mlp", torch.device("cpu"))
    objective = ClosureObjective(case.closure(), case.params())
    mine = case.value()
    step = torch.ones(objective.vector.size, dtype=torch.float64)
    if tried:
        objective.trial(step)
    objective.accept(step)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        mine.backward()


# Trials, moves, and what they may not leave behind.


@pytest.mark.parametrize("kind", KINDS)
def test_a_trial_puts_the_parameters_back_and_products_still_hold(kind: str) -> None:
    case = make_case("mlp", torch.device("cpu"))
    objective = objective_of(case, kind)
    evaluation = objective.evaluate(curvature=True)
    v = torch.randn(objective.vector.size, dtype=torch.float64)
    product = Hessian(evaluation) @ v
    before = [p.detach().clone() for p in case.params()]
    trial = objective.trial(v)
    assert torch.equal(Hessian(evaluation) @ v, product)
    assert all(torch.equal(p, q) for p, q in zip(case.params(), before, strict=True))
    objective.trial(v)
    objective.settle()
    assert all(torch.equal(p, q) for p, q in zip(case.params(), before, strict=True))
    with objective:
        objective.trial(v)
    assert all(torch.equal(p, q) for p, q in zip(case.params(), before, strict=True))
    objective.accept(v)
    torch.testing.assert_close(objective.evaluate().loss, trial.loss, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="the parameters have moved"):
        Hessian(evaluation) @ v


@pytest.mark.parametrize("kind", KINDS)
def test_short_positions_are_kept_and_long_ones_computed_again(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(short: bool) -> tuple[list[Tensor], int]:
        torch.manual_seed(3)
        case = make_case("mlp", torch.device("cpu"))
        objective = objective_of(case, kind)
        objective.vector.is_short = short
        moves, places = 0, []
        moved = ParameterVector.move

        def move(vector: ParameterVector, flat: Tensor) -> None:
            nonlocal moves
            moves += 1
            moved(vector, flat)

        monkeypatch.setattr(ParameterVector, "move", move)
        with objective:
            step = torch.randn(objective.vector.size, dtype=torch.float64)
            for t in (0.3, 0.1, 0.2):
                objective.trial(step, 2.0 * t)
                trial = objective.trial(step, t)
                objective.accept(step, t)
                places += [objective.position.clone(), flat(case.params()).detach(), trial.grad]
                # Others do not see it change, however it was made.
                assert objective.evaluate().loss == trial.loss
            objective.trial(step)
            objective.accept(step, 0.5)  # another one than was tried
            places += [objective.position, flat(case.params()).detach()]
        monkeypatch.undo()
        return places, moves

    (kept, moves_kept), (again, moves_again) = run(True), run(False)
    assert all(map(torch.equal, kept, again))
    for position, params in zip(kept[0:9:3], kept[1:9:3], strict=True):
        assert torch.equal(position, params)
    assert moves_kept <= moves_again


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_leaves_the_grad_mode_as_it_was(kind: str, enabled: bool) -> None:
    case = make_case("mlp", torch.device("cpu"))

    def broken(*_: Any) -> Tensor:
        assert torch.is_grad_enabled()
        raise KeyError("mine")

    with torch.set_grad_enabled(enabled):
        objective_of(case, kind).evaluate()
        assert torch.is_grad_enabled() is enabled
        objective = (
            ClosureObjective(broken, case.params())
            if kind == "closure"
            else FunctionalObjective(broken, case.params())
        )
        with pytest.raises(KeyError, match="mine"):
            objective.evaluate()
        assert torch.is_grad_enabled() is enabled


def test_a_step_that_was_tried_is_not_held_once_the_parameters_are_back() -> None:
    objective = objective_of(make_case("mlp", torch.device("cpu")), "closure")
    step = torch.full((objective.vector.size,), 1e-3, dtype=torch.float64)
    held = weakref.ref(step)
    objective.trial(step)
    objective.settle()
    del step
    assert held() is None


@pytest.mark.parametrize("where", ["evaluate", "trial", "after a move"])
def test_an_exception_leaves_the_parameters_as_before(where: str) -> None:
    case = make_case("batchnorm", torch.device("cpu"))
    broken = False

    def closure() -> Tensor:
        loss = case.closure()()
        if broken:
            raise KeyError("mine")
        return loss

    params = [p.detach().clone() for p in case.params()]
    buffers = [b.clone() for b in case.model.buffers()]
    objective = ClosureObjective(closure, case.params())
    step = torch.ones(objective.vector.size, dtype=torch.float64)
    with pytest.raises(KeyError, match="mine"), objective:
        if where == "after a move":
            objective.evaluate()
            objective.accept(step)
        broken = True
        objective.evaluate() if where == "evaluate" else objective.trial(step)
    assert all(torch.equal(p, q) for p, q in zip(case.params(), params, strict=True))
    assert all(torch.equal(b, c) for b, c in zip(case.model.buffers(), buffers, strict=True))


def test_gradients_in_p_grad_are_copies() -> None:
    case = make_case("mlp", torch.device("cpu"))
    plain = ClosureObjective(case.closure(), case.params()).evaluate(curvature=True)
    v = torch.randn_like(plain.grad)
    product = Hessian(plain) @ v

    def clipping() -> Tensor:
        loss = case.closure()()
        nn.utils.clip_grad_norm_(case.params(), 1e-3)
        return loss

    clipped = ClosureObjective(clipping, case.params()).evaluate(curvature=True)
    torch.testing.assert_close(Hessian(clipped) @ v, product)
    # The gradient is what the closure left, with and without curvature.
    assert torch.linalg.vector_norm(clipped.grad) < 1.01e-3
    without = ClosureObjective(clipping, case.params()).evaluate()
    torch.testing.assert_close(without.grad, clipped.grad)
    assert all(p.grad is not None and p.grad.grad_fn is None for p in case.params())


def test_a_gradient_only_evaluation_keeps_no_graph() -> None:
    case = make_case("mlp", torch.device("cpu"))
    evaluation = ClosureObjective(case.closure(), case.params()).evaluate()
    assert evaluation.linearization is None
    with pytest.raises(ValueError, match=r"evaluate\(curvature=True\)"):
        Hessian(evaluation)


@pytest.mark.parametrize("kind", KINDS)
def test_complex_parameters(kind: str, device: torch.device) -> None:
    z = nn.Parameter(torch.randn(3, dtype=torch.complex128, device=device))
    w = nn.Parameter(torch.randn(2, dtype=torch.float64, device=device))

    def function(z: Tensor, w: Tensor) -> Tensor:
        return ((z**3).abs().square().sum() + (z.real.sum() * w).sin().sum()).real

    if kind == "closure":
        objective: Objective = ClosureObjective(lambda: function(z, w), [z, w])
    else:
        objective = FunctionalObjective(lambda t: function(t["z"], t["w"]), {"z": z, "w": w})
    evaluation = objective.evaluate(curvature=True)
    reference = dense_hessian(function, [z, w])
    eye = torch.eye(8, dtype=torch.float64, device=device)
    torch.testing.assert_close(Hessian(evaluation) @ eye, reference, rtol=1e-10, atol=1e-10)
    numeric = torch.stack(
        [(objective.trial(1e-6 * e).loss - objective.trial(-1e-6 * e).loss) / 2e-6 for e in eye]
    )
    torch.testing.assert_close(evaluation.grad, numeric, rtol=1e-6, atol=1e-6)


def test_a_loss_linear_in_a_parameter_has_a_zero_product_there() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    evaluation = ClosureObjective(lambda: (a**2).sum() + b.sum(), [a, b]).evaluate(curvature=True)
    assert (Hessian(evaluation) @ torch.ones(4)).tolist() == [2, 2, 0, 0]
    linear = ClosureObjective(lambda: a.sum() + b.sum(), [a, b]).evaluate(curvature=True)
    assert (Hessian(linear) @ torch.ones(4)).tolist() == [0, 0, 0, 0]
    assert (Hessian(linear) @ torch.ones(4, 3)).shape == (4, 3)


def test_an_operator_refuses_other_shapes() -> None:
    a = nn.Parameter(torch.ones(2))
    hessian = Hessian(ClosureObjective(lambda: (a**2).sum(), [a]).evaluate(curvature=True))
    with pytest.raises(ValueError, match=r"multiplies shapes \(2,\) and \(2, k\), got \(3,\)"):
        hessian @ torch.ones(3)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * 2


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_custom_function_without_second_derivative_is_refused(kind: str, deep: bool) -> None:
    """PyTorch leaves its part out of the product and says nothing."""
    a = nn.Parameter(torch.ones(2))

    def function(a: Tensor) -> Tensor:
        return (_Once.apply(a**2 if deep else a) ** 2).sum()

    if kind == "closure":
        objective: Objective = ClosureObjective(lambda: function(a), [a])
    else:
        objective = FunctionalObjective(function, a)
    assert objective.evaluate().grad.any()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"no second derivative: .*once_differentiable"):
            objective.evaluate(curvature=True)


def test_products_of_operations_without_a_batching_rule_come_one_by_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(3, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    objective = ClosureObjective(lambda: model(x).square().mean(), model.parameters())
    hessian = Hessian(objective.evaluate(curvature=True))
    eye = torch.eye(hessian.size, dtype=torch.float64)
    product = hessian @ eye
    torch.testing.assert_close(product, product.T, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(product[:, 3], hessian @ eye[3])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_right_or_refused(reentrant: bool) -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double()
    head = nn.Linear(4, 1).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    params = [*body.parameters(), *head.parameters()]

    def checkpointed() -> Tensor:
        return head(checkpoint(body, x, use_reentrant=reentrant)).square().mean()

    objective = ClosureObjective(checkpointed, params)
    if reentrant:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"use_reentrant=True"):
                objective.evaluate(curvature=True)
        return
    plain = ClosureObjective(lambda: head(body(x)).square().mean(), params)
    v = torch.randn(objective.vector.size, dtype=torch.float64)
    torch.testing.assert_close(
        Hessian(objective.evaluate(curvature=True)) @ v,
        Hessian(plain.evaluate(curvature=True)) @ v,
    )


def test_a_backward_that_is_not_captured_beside_one_that_is() -> None:
    w = nn.Parameter(torch.ones(3))

    def closure() -> Tensor:
        a, b = (w**2).sum(), (w**3).sum()
        a.backward()
        torch.autograd.backward(b)
        return a.detach() + b.detach()

    objective = ClosureObjective(closure, [w])
    assert objective.evaluate().grad.tolist() == [5, 5, 5]
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"instead of torch\.autograd\.backward"):
            objective.evaluate(curvature=True)


@pytest.mark.parametrize(
    "number", [1.5, 2, np.float32(1.5), np.array(1.5)], ids=lambda n: type(n).__name__
)
def test_numbers_of_any_kind_are_losses(number: Any) -> None:
    w = nn.Parameter(torch.ones(3))

    def closure() -> Any:
        w.sum().backward()
        return number

    assert ClosureObjective(closure, [w]).evaluate().loss == float(number)


def test_constants_in_the_tree_of_a_function() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    x = torch.randn(4, 2)
    tree = {**dict(model.named_parameters()), **dict(model.named_buffers()), "scale": 2.0}

    def function(tree: dict[str, Any]) -> Tensor:
        tree = dict(tree)
        return tree.pop("scale") * functional_call(model, tree, (x,)).square().mean()

    objective = FunctionalObjective(function, tree)
    bound = objective.bind(ParameterVector(model.parameters()), Regularization(), None)
    assert bound.evaluate().grad.shape == (sum(p.numel() for p in model.parameters()),)
