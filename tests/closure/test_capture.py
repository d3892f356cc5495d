"""What is seen inside a closure while curvature is captured."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.oracles import make_case
from torch_secondorder import mark_outputs
from torch_secondorder._closure.capture import STANDARD_LOSSES, Capture
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder._objective.functional import FunctionalObjective


def outputs_of(closure, params):
    evaluation = ClosureObjective(closure, params).evaluate(curvature=True)
    return evaluation.linearization.graph.outputs


LOSSES = {
    F.binary_cross_entropy: lambda z: (z.sigmoid(), torch.ones(4, 3)),
    F.binary_cross_entropy_with_logits: lambda z: (z, torch.ones(4, 3)),
    F.cross_entropy: lambda z: (z, torch.zeros(4, dtype=torch.long)),
    F.gaussian_nll_loss: lambda z: (z, torch.ones(4, 3), torch.ones(4, 3)),
    F.huber_loss: lambda z: (z, torch.ones(4, 3)),
    F.kl_div: lambda z: (z.log_softmax(1), torch.full((4, 3), 0.3)),
    F.l1_loss: lambda z: (z, torch.ones(4, 3)),
    F.mse_loss: lambda z: (z, torch.ones(4, 3)),
    F.multi_margin_loss: lambda z: (z, torch.zeros(4, dtype=torch.long)),
    F.multilabel_margin_loss: lambda z: (z, torch.zeros(4, 3, dtype=torch.long)),
    F.multilabel_soft_margin_loss: lambda z: (z, torch.ones(4, 3)),
    F.nll_loss: lambda z: (z.log_softmax(1), torch.zeros(4, dtype=torch.long)),
    F.poisson_nll_loss: lambda z: (z, torch.ones(4, 3)),
    F.smooth_l1_loss: lambda z: (z, torch.ones(4, 3)),
    F.soft_margin_loss: lambda z: (z, torch.ones(4, 3)),
}


def test_every_standard_loss_is_covered_here() -> None:
    assert set(LOSSES) == set(STANDARD_LOSSES)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_the_input_of_a_standard_loss_is_the_output(loss) -> None:
    model, x = nn.Linear(2, 3), torch.randn(4, 2)
    seen: list[Tensor] = []

    def closure() -> Tensor:
        arguments = LOSSES[loss](model(x))
        seen.append(arguments[0])
        value = loss(*arguments)
        value.backward()
        return value

    # A kernel without second derivative still has its output found.
    with Capture(list(model.parameters())) as capture, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the meaning of "mean" in kl_div
        closure()
    (output,) = capture.graph.outputs
    assert output.tensor is seen[-1]
    assert output.loss is loss and output.argument == "input"
    assert output.arguments["reduction"] == "mean"


def test_loss_modules_and_keywords_are_seen_too() -> None:
    model, x, y = nn.Linear(2, 3), torch.randn(4, 2), torch.zeros(4, dtype=torch.long)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    first, second = outputs_of(
        lambda: criterion(model(x), y) + F.mse_loss(input=model(x), target=torch.ones(4, 3)),
        list(model.parameters()),
    )
    assert first.loss is F.cross_entropy and first.arguments["label_smoothing"] == 0.1
    assert second.loss is F.mse_loss and torch.equal(second.tensor, first.tensor)


def test_several_outputs_and_micro_batches_come_in_order() -> None:
    case = make_case("mlp", torch.device("cpu"))

    def closure() -> Tensor:
        for part in case.x.split(3):
            loss = F.cross_entropy(case.model(part), case.y[: len(part)])
            loss.backward()
        return loss

    outputs = outputs_of(closure, case.params())
    assert [len(o.tensor) for o in outputs] == [3, 3, 1]


def test_marked_outputs_are_found_and_marks_do_nothing_elsewhere() -> None:
    model, x = nn.Linear(2, 3), torch.randn(4, 2)

    def loss() -> Tensor:
        return mark_outputs(model(x)).pow(4).mean()

    (output,) = outputs_of(loss, list(model.parameters()))
    assert (
        output.loss is None
        and output.arguments == {}
        and output.argument == ""
        and output.value is None
    )
    objective = FunctionalObjective(lambda p: mark_outputs(p**2).sum(), torch.ones(2))
    graph = objective.evaluate(curvature=True).linearization.graph
    assert graph.outputs[0].tensor.tolist() == [1, 1]
    z = model(x)
    assert mark_outputs(z) is z
    with pytest.raises(TypeError, match="one tensor, got tuple"):
        mark_outputs((z, z))


def test_tensors_without_a_gradient_are_no_outputs() -> None:
    p = nn.Parameter(torch.ones(2))
    outputs = outputs_of(lambda: F.mse_loss(torch.zeros(2), torch.zeros(2)) + p.square().sum(), [p])
    assert outputs == []


def test_every_argument_with_a_gradient_is_an_output() -> None:
    p = nn.Parameter(torch.ones(2))
    target = torch.zeros(2)

    def loss() -> Tensor:
        return F.mse_loss(target, 2 * p) + F.gaussian_nll_loss(p * 1, var=p**2, target=target)

    outputs = outputs_of(loss, [p])
    assert [o.argument for o in outputs] == ["target", "input", "var"]
    assert outputs[0].arguments["input"] is target
    assert outputs[1].arguments is outputs[2].arguments
    assert outputs[1].value is outputs[2].value
    assert all(o.arguments[o.argument] is o.tensor for o in outputs)


@pytest.mark.parametrize("mark", [False, True])
def test_a_leaf_has_a_view_for_an_output(mark: bool) -> None:
    p = nn.Parameter(torch.ones(2))

    def loss() -> Tensor:
        return mark_outputs(p).square().sum() if mark else F.mse_loss(p, torch.zeros(2))

    (output,) = outputs_of(loss, [p])
    assert output.tensor is not p and output.tensor.data_ptr() == p.data_ptr()
    assert output.tensor.grad_fn is not None
    assert mark_outputs(p) is p  # outside


def test_what_a_loss_returned_stays_when_the_closure_adds_to_it() -> None:
    p = nn.Parameter(torch.ones(2))

    def loss() -> Tensor:
        value = F.mse_loss(p * 1, torch.zeros(2))
        value += 5
        return value

    (output,) = outputs_of(loss, [p])
    assert output.value == 1


def test_an_output_knows_whether_its_arguments_were_changed() -> None:
    p, target = nn.Parameter(torch.ones(2)), torch.zeros(2)
    (output,) = outputs_of(lambda: F.mse_loss(p * 1, target), [p])
    assert output.intact
    target += 1
    assert not output.intact


def test_backward_with_a_weight_and_with_inputs() -> None:
    p = nn.Parameter(torch.ones(2))

    def weighted() -> Tensor:
        loss = (p**3).sum()
        loss.backward(torch.tensor(2.0))
        return 2 * loss

    evaluation = ClosureObjective(weighted, [p]).evaluate(curvature=True)
    assert evaluation.grad.tolist() == [6, 6]
    assert evaluation.linearization.hessian_product(torch.ones(2)).tolist() == [12, 12]

    def partial() -> Tensor:
        loss = (p**3).sum()
        loss.backward(inputs=[p])
        return loss

    with pytest.raises(RuntimeError, match="without inputs"):
        ClosureObjective(partial, [p]).evaluate(curvature=True)


def test_an_inner_derivative_in_the_closure_is_left_alone() -> None:
    """A PINN differentiates its network by the inputs before the loss is there."""
    net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.linspace(0, 1, 5, dtype=torch.float64)[:, None].requires_grad_()

    def closure() -> Tensor:
        (u_x,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        loss = (u_x - 1).square().mean()
        loss.backward()
        return loss

    objective = ClosureObjective(closure, net.parameters())
    evaluation = objective.evaluate(curvature=True)
    v = torch.randn_like(evaluation.grad)
    product = evaluation.linearization.hessian_product(v)
    ahead, behind = objective.trial(1e-5 * v).grad, objective.trial(-1e-5 * v).grad
    torch.testing.assert_close(product, (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-7)


def test_no_graph_outlives_an_evaluation() -> None:
    case = make_case("mlp", torch.device("cpu"))
    objective = ClosureObjective(case.closure(), case.params())

    def tensors() -> int:
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    objective.evaluate(curvature=True)
    gc.collect()
    before = tensors()
    gc.disable()
    try:
        for _ in range(5):
            objective.evaluate(curvature=True)
        # Counted without a collection first: nothing may wait for one.
        assert tensors() <= before
    finally:
        gc.enable()


def test_captures_nest_and_restore() -> None:
    p = nn.Parameter(torch.ones(1))
    with Capture([p]) as outer:
        with Capture([p]) as inner:
            mark_outputs(p * 1)
        mark_outputs(p * 2)
    assert len(inner.graph.outputs) == len(outer.graph.outputs) == 1


def test_spent_outputs_are_let_go_and_no_others() -> None:
    model, x = nn.Linear(2, 3), torch.randn(4, 2)
    counts: list[int] = []

    class Receiver:
        twice, outputs = False, True

        def __call__(self, graph, retain):
            counts.append(len(graph.outputs))
            return graph.gradients[0]

    with Capture(list(model.parameters()), Receiver()) as capture:
        z = model(x)
        losses = [z.square().sum(), F.mse_loss(z, x.new_zeros(4, 3))]
        losses.append(F.mse_loss(model(x), x.new_zeros(4, 3)))
        losses[1].backward(retain_graph=True)  # one output here, and one that is still to come
        losses[1].backward()
        losses[2].backward()
        F.mse_loss(model(x), x.new_zeros(4, 3)).backward()
    assert counts == [2, 2, 1, 1]
    assert capture.graph.outputs == []
