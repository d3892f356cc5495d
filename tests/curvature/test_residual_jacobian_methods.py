"""The ways to the Jacobian of residuals, and what each of them notices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.oracles import rows_of
from torch_secondorder import ClosureObjective, FunctionalObjective, mark_outputs
from torch_secondorder._closure.runner import ModuleRegistry
from torch_secondorder._foundation.memory import TooLarge
from torch_secondorder._objective.base import Evaluation, Regularization
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.curvature import (
    GaussNewton,
    ResidualJacobian,
    UnknownOutputs,
    _graph_jacobian,
    residual_jacobian,
)
from torch_secondorder.curvature._sample_layout import Probe, layouts

CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def network(*layers: nn.Module) -> nn.Module:
    net = nn.Sequential(*layers).double()
    for i, p in enumerate(net.parameters()):
        with torch.no_grad():
            p.copy_(0.5 * randn(*p.shape, seed=10 + i))
    return net


def half_square(z: Tensor) -> Tensor:
    loss = mark_outputs(z).square().sum() / 2
    loss.backward()
    return loss


def jacobian_of(closure: Callable[[], Tensor], params: Any) -> tuple[ResidualJacobian, Tensor]:
    evaluation = ClosureObjective(closure, params).evaluate(curvature="jacobian")
    return ResidualJacobian(evaluation), rows_of(evaluation)


# Rows that depend on several samples.


def batch_norm() -> tuple[Callable[[], Tensor], nn.Module]:
    net = network(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    x = randn(60, 3)
    return lambda: half_square(net(x)), net


def attention_over_samples() -> tuple[Callable[[], Tensor], nn.Module]:
    net = nn.ModuleList([nn.Linear(3, 4), nn.MultiheadAttention(4, 2)]).double()
    x = randn(60, 3)

    def closure() -> Tensor:
        h = net[0](x)
        return half_square(net[1](h, h, h, need_weights=False)[0].sum(1))

    return closure, net


def centered() -> tuple[Callable[[], Tensor], nn.Module]:
    net = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x = randn(60, 3)

    def closure() -> Tensor:
        z = net(x)
        return half_square(z - z.mean(0))

    return closure, net


def weakly_centered() -> tuple[Callable[[], Tensor], nn.Module]:
    net = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x = randn(60, 3)

    def closure() -> Tensor:
        h = net[0](x)
        return half_square(net[1:](h - 1e-5 * h.mean(0)))

    return closure, net


def differences() -> tuple[Callable[[], Tensor], nn.Module]:
    net = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x = randn(60, 3)
    return lambda: half_square(net(x).diff(dim=0)), net


@pytest.mark.parametrize(
    "make", [batch_norm, attention_over_samples, centered, weakly_centered, differences]
)
def test_samples_that_depend_on_one_another(
    make: Callable[[], tuple[Callable[[], Tensor], nn.Module]],
) -> None:
    closure, net = make()
    J, expected = jacobian_of(closure, net.parameters())
    assert J.method in ("rows", "columns")
    assert "several samples" in J.reason
    torch.testing.assert_close(J.dense(), expected, **CLOSE)


def test_rows_mixed_after_the_structure_was_seen() -> None:
    net = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x, A = randn(60, 3), torch.eye(60, dtype=torch.float64)
    objective = ClosureObjective(lambda: half_square(A @ net(x)), net.parameters())
    first = ResidualJacobian(objective.evaluate(curvature="jacobian"))
    assert first.method == "graph"
    A.copy_(torch.eye(60) + 1e-3 * randn(60, 60, seed=3))
    evaluation = objective.evaluate(curvature="jacobian")
    J = ResidualJacobian(evaluation)
    assert J.method == "columns"
    assert J.reason
    torch.testing.assert_close(J.dense(), rows_of(evaluation), **CLOSE)


def test_rows_mixed_behind_residuals_that_are_all_the_same() -> None:
    net = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    with torch.no_grad():
        net[2].weight.zero_()
        net[2].bias.zero_()
    x, A = randn(60, 3), torch.eye(60, dtype=torch.float64)
    objective = ClosureObjective(lambda: half_square(A @ net(x) - 1), net.parameters())
    assert ResidualJacobian(objective.evaluate(curvature="jacobian")).method == "graph"
    A.copy_(torch.full((60, 60), 1 / 60))
    evaluation = objective.evaluate(curvature="jacobian")
    J = ResidualJacobian(evaluation)
    assert J.method == "columns"
    torch.testing.assert_close(J.dense(), rows_of(evaluation), **CLOSE)


def test_batch_norm_that_begins_to_train() -> None:
    closure, net = batch_norm()
    net.eval()
    objective = ClosureObjective(closure, net.parameters())
    assert ResidualJacobian(objective.evaluate(curvature="jacobian")).method == "graph"
    net.train()
    evaluation = objective.evaluate(curvature="jacobian")
    J = ResidualJacobian(evaluation)
    assert J.method == "columns"
    torch.testing.assert_close(J.dense(), rows_of(evaluation), **CLOSE)


def test_an_order_that_changes() -> None:
    net = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, order = randn(60, 3), torch.arange(60)
    objective = ClosureObjective(lambda: half_square(net(x)[order]), net.parameters())
    for shift in range(3):
        order.copy_(torch.arange(60).roll(shift))
        evaluation = objective.evaluate(curvature="jacobian")
        J = ResidualJacobian(evaluation)
        assert J.method == "graph"
        torch.testing.assert_close(J.dense(), rows_of(evaluation), **CLOSE)


def test_units_that_come_to_life() -> None:
    net = network(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    x = randn(60, 3)
    with torch.no_grad():
        net[0].bias.fill_(-1.0)
    registry = ModuleRegistry()
    for bias in (-1.0, 0.0, 2.0):
        with torch.no_grad():
            net[0].bias.fill_(bias)
        objective = ClosureObjective.for_step(
            lambda: half_square(net(x)), net.parameters(), registry=registry
        )
        evaluation = objective.evaluate(curvature="jacobian")
        J = ResidualJacobian(evaluation)
        assert J.method == "graph"
        torch.testing.assert_close(J.dense(), rows_of(evaluation), **CLOSE)


# Operations that are not known.


def test_unknown_operations_are_named() -> None:
    net = nn.ModuleList([nn.Bilinear(3, 3, 2)]).double()
    x = randn(5, 3)
    J, expected = jacobian_of(lambda: half_square(net[0](x, x)), net.parameters())
    assert (J.method, J.reason) == ("rows", "TrilinearBackward0")
    torch.testing.assert_close(J.dense(), expected, **CLOSE)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.ConvTranspose1d(3, 2, 2), "transposed convolution"),
        (lambda: nn.Embedding(9, 2, padding_idx=0), "padding_idx"),
    ],
)
def test_operations_made_in_an_unknown_way(make: Callable[[], nn.Module], reason: str) -> None:
    net = make().double()
    x = torch.tensor([[0, 1], [3, 2]]) if isinstance(net, nn.Embedding) else randn(4, 3, 5)
    J, expected = jacobian_of(lambda: half_square(net(x).sum((1, 2))), net.parameters())
    assert J.method == "rows"
    assert reason in J.reason
    torch.testing.assert_close(J.dense(), expected, **CLOSE)


def test_residuals_made_of_parameters_alone() -> None:
    w = randn(4).requires_grad_()
    J, expected = jacobian_of(lambda: half_square(torch.stack([w[0] - 1, w[1] * w[2]])), [w])
    assert (J.method, J.reason) == ("rows", "StackBackward0")
    torch.testing.assert_close(J.dense(), expected, **CLOSE)


def test_complex_parameters() -> None:
    w = torch.view_as_complex(randn(3, 2)).requires_grad_()
    x = torch.view_as_complex(randn(5, 3, 2, seed=1))
    evaluation = ClosureObjective(lambda: half_square(torch.view_as_real(x @ w)), [w]).evaluate(
        curvature="jacobian"
    )
    J = ResidualJacobian(evaluation)
    assert J.method == "rows"
    assert "complex128" in J.reason
    torch.testing.assert_close(J.dense().T @ J.residuals, evaluation.grad, **CLOSE)
    torch.testing.assert_close(J.normal_matrix(), GaussNewton(evaluation).dense(), **CLOSE)


def test_half_precision() -> None:
    net = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).bfloat16()
    x = randn(5, 3).bfloat16()
    evaluation = ClosureObjective(lambda: half_square(net(x)), net.parameters()).evaluate(
        curvature="jacobian"
    )
    J = ResidualJacobian(evaluation)
    assert J.method == "rows"
    assert J.dense().dtype == torch.float32
    torch.testing.assert_close(J.pull(J.residuals), evaluation.grad, rtol=0.05, atol=0.05)


def test_columns_where_there_are_fewer() -> None:
    w = randn(2).requires_grad_()
    x = randn(9, 2, seed=1)

    def closure() -> Tensor:
        z = torch.tanh(x @ w)
        return half_square(z - z.mean())

    J, expected = jacobian_of(closure, [w])
    assert J.method == "columns"
    torch.testing.assert_close(J.dense(), expected, **CLOSE)


def test_operations_without_a_batching_rule() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return torch.from_numpy(2 * g.numpy())

    net = network(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    x = randn(5, 3)
    J, expected = jacobian_of(lambda: half_square(Doubled.apply(net(x))), net.parameters())
    assert J.method == "rows"
    torch.testing.assert_close(J.dense(), expected, **CLOSE)
    net.eval()
    J, expected = jacobian_of(lambda: half_square(Doubled.apply(net(x))), net.parameters())
    assert J.method == "graph"
    torch.testing.assert_close(J.dense(), expected, **CLOSE)


def test_an_input_that_is_written_afterwards() -> None:
    net = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x = randn(5, 3)
    evaluation = ClosureObjective(lambda: half_square(net(x)), net.parameters()).evaluate(
        curvature="jacobian"
    )
    x.add_(0)  # the same numbers, which nobody can know
    J = ResidualJacobian(evaluation)
    assert J.method == "graph"
    torch.testing.assert_close(J.dense(), rows_of(evaluation), **CLOSE)


def test_checkpoints() -> None:
    net = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x = randn(5, 3)
    J, _ = jacobian_of(
        lambda: half_square(
            torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)  # type: ignore[attr-defined]
        ),
        net.parameters(),
    )
    plain, expected = jacobian_of(lambda: half_square(net(x)), net.parameters())
    assert plain.method == "graph"
    torch.testing.assert_close(J.dense(), expected, **CLOSE)


# Losses.


@pytest.mark.parametrize("channels_pay", [True, False])
@pytest.mark.parametrize("samples", [3, 300])
def test_cross_entropy(samples: int, channels_pay: bool) -> None:
    net = network(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 4 if channels_pay else 2))
    x, y = randn(samples, 8), torch.arange(samples) % 2
    evaluation = ClosureObjective(
        lambda: _backward(F.cross_entropy(net(x), y)), net.parameters()
    ).evaluate(curvature=True)
    J = ResidualJacobian(evaluation)
    assert J.method == "graph"
    D = J.dense()
    torch.testing.assert_close(D.T @ D, GaussNewton(evaluation).dense(), **CLOSE)
    torch.testing.assert_close(D.T @ J.residuals, evaluation.grad, **CLOSE)
    torch.testing.assert_close(J.kernel(), D @ D.T, **CLOSE)
    other = ResidualJacobian(evaluation, method="rows")
    torch.testing.assert_close(other.dense(), D, **CLOSE)
    torch.testing.assert_close(other.residuals, J.residuals, **CLOSE)


def _backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss


def test_several_outputs_of_one_network() -> None:
    net = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = randn(5, 3), randn(5, 3, seed=1)
    evaluation = ClosureObjective(
        lambda: _backward(F.mse_loss(net(x), y) + F.huber_loss(net(2 * x), y)), net.parameters()
    ).evaluate(curvature=True)
    J = ResidualJacobian(evaluation)
    assert J.method == "graph"
    D = J.dense()
    torch.testing.assert_close(D.T @ J.residuals, evaluation.grad, **CLOSE)
    torch.testing.assert_close(J.kernel(), D @ D.T, **CLOSE)


def test_prediction_and_target_of_one_loss() -> None:
    a, b = network(nn.Linear(3, 2)), network(nn.Linear(3, 2))
    x = randn(5, 3)
    params = [*a.parameters(), *b.parameters()]
    evaluation = ClosureObjective(
        lambda: _backward(F.mse_loss(a(x), b(x).tanh())), params
    ).evaluate(curvature="jacobian")
    J = ResidualJacobian(evaluation)
    assert J.method == "graph"
    torch.testing.assert_close(
        J.dense(), ResidualJacobian(evaluation, method="rows").dense(), **CLOSE
    )
    torch.testing.assert_close(J.pull(J.residuals), evaluation.grad, **CLOSE)


# The work space.


def test_scale_and_weight_decay() -> None:
    net = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = randn(5, 3)
    params = list(net.parameters())
    objective = ClosureObjective.for_step(
        lambda: half_square(net(x)),
        ParameterVector(params, [1.0, 2.0, 0.5, 3.0]),
        Regularization(weight_decay=(0.1, 0.0, 0.2, 0.3)),
    )
    evaluation = objective.evaluate(curvature=True)
    J = ResidualJacobian(evaluation)
    assert J.method == "graph"
    assert isinstance(J.rest_diagonal, Tensor)
    assert J.rest_gradient is not None
    expected = GaussNewton(evaluation).dense()
    torch.testing.assert_close(J.normal_matrix() + torch.diag(J.rest_diagonal), expected, **CLOSE)
    gradient = J.pull(J.residuals) + J.rest_gradient
    torch.testing.assert_close(gradient, evaluation.grad, **CLOSE)
    for method in ("rows", "columns"):
        other = ResidualJacobian(evaluation, method=method)
        torch.testing.assert_close(other.dense(), J.dense(), **CLOSE)


def test_a_penalty_on_the_weights() -> None:
    net = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = randn(5, 3)

    def closure() -> Tensor:
        penalty = sum(p.square().sum() for p in net.parameters())
        loss = mark_outputs(net(x)).square().sum() / 2 + 0.1 * penalty
        return _backward(loss)

    evaluation = ClosureObjective(closure, net.parameters()).evaluate(curvature=True)
    J = ResidualJacobian(evaluation)
    assert J.method == "graph"
    assert J.rest_gradient is not None
    torch.testing.assert_close(J.pull(J.residuals) + J.rest_gradient, evaluation.grad, **CLOSE)
    torch.testing.assert_close(
        J.rest_diagonal, torch.full((J.size,), 0.2, dtype=torch.float64), **CLOSE
    )


def test_mixed_dtypes() -> None:
    net = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    net[0].float()
    x = randn(5, 3).float()

    def closure() -> Tensor:
        return half_square(net[2](net[1](net[0](x)).double()))

    J, expected = jacobian_of(closure, net.parameters())
    assert J.method == "graph", J.reason
    assert J.dense().dtype == torch.float64
    torch.testing.assert_close(J.dense(), expected.double(), rtol=1e-5, atol=1e-5)


def test_functions() -> None:
    net = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x, y = randn(5, 3), randn(5, 1, seed=1)

    def loss(params: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(torch.func.functional_call(net, params, (x,)), y, reduction="sum") / 2

    objective = FunctionalObjective(loss, dict(net.named_parameters()))
    for _ in range(2):
        evaluation = objective.evaluate(curvature="jacobian")
        J = ResidualJacobian(evaluation)
        assert J.method == "graph", J.reason
        torch.testing.assert_close(J.dense(), rows_of(evaluation), **CLOSE)


def test_change_to_another_point() -> None:
    net = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = randn(5, 3)
    objective = ClosureObjective(lambda: half_square(net(x)), net.parameters())
    J = ResidualJacobian(objective.evaluate(curvature="jacobian"))
    step = 1e-6 * randn(J.size, seed=4)
    there = objective.trial(step, curvature="jacobian")
    torch.testing.assert_close(J.change_to(there), J.push(step), rtol=1e-4, atol=1e-9)
    with pytest.raises(ValueError, match="has no graph"):
        J.change_to(objective.trial(step))


def test_nothing_random_is_drawn() -> None:
    net = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = randn(5, 3)
    evaluation = ClosureObjective(lambda: half_square(net(x)), net.parameters()).evaluate(
        curvature="jacobian"
    )
    before = torch.get_rng_state()
    ResidualJacobian(evaluation).kernel()
    assert torch.equal(before, torch.get_rng_state())


# Bad input.


def one_layer(loss: Callable[[Tensor], Tensor] = half_square, **options: Any) -> Evaluation:
    net = network(nn.Linear(3, 2))
    x = randn(options.pop("samples", 5), 3)
    curvature = options.pop("curvature", "jacobian")
    objective = ClosureObjective.for_step(lambda: loss(net(x)), net.parameters(), **options)
    return objective.evaluate(curvature=curvature)


def test_refused() -> None:
    with pytest.raises(ValueError, match="has no graph: make it with evaluate"):
        ResidualJacobian(one_layer(curvature=False))
    with pytest.raises(ValueError, match="cannot be maximized"):
        ResidualJacobian(one_layer(regularization=Regularization(maximize=True)))
    with pytest.raises(ValueError, match="'vmap'"):
        ResidualJacobian(one_layer(), method="vmap")  # type: ignore[arg-type]
    with pytest.raises(UnknownOutputs):
        ResidualJacobian(one_layer(lambda z: _backward(z.square().sum())))
    with pytest.raises(ValueError, match="no residual: the outputs of the loss are empty"):
        ResidualJacobian(one_layer(samples=0))
    with pytest.raises(ValueError, match=r"does not work for this loss: .*several samples"):
        ResidualJacobian(one_layer(lambda z: half_square(z - z.mean(0))), method="graph")
    J = ResidualJacobian(one_layer())
    with pytest.raises(ValueError, match=r"pull takes a vector of shape \(10,\), got \(8,\)"):
        J.pull(torch.ones(8))
    with pytest.raises(ValueError, match=r"push takes a vector of shape \(8,\), got \(10,\)"):
        J.push(torch.ones(10))
    with pytest.raises(ValueError, match=r"kernel takes a vector of shape \(8,\), got \(10,\)"):
        J.kernel(torch.ones(10))


def test_residuals_that_are_not_finite() -> None:
    J = ResidualJacobian(one_layer(lambda z: half_square(z / 0.0)))
    assert not J.finite
    assert J.method != "graph"


def test_derivatives_that_are_not_finite_are_forgotten() -> None:
    net = network(nn.Linear(3, 1))
    x, shift = randn(5, 3), torch.zeros(5, 1, dtype=torch.float64)

    def closure() -> Tensor:
        z = net(x)
        return half_square((z - z.detach() + shift).sqrt())

    objective = ClosureObjective(closure, net.parameters())
    J = ResidualJacobian(objective.evaluate(curvature="jacobian"))
    assert (J.method, J.reason) == ("rows", "gradients that are not finite")
    shift.add_(1)
    assert ResidualJacobian(objective.evaluate(curvature="jacobian")).method == "graph"


def test_matrices_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    J = ResidualJacobian(one_layer())

    def refuse(name: str, *_: Any) -> None:
        raise TooLarge(name)

    monkeypatch.setattr(residual_jacobian, "check_size", refuse)
    with pytest.raises(TooLarge, match="J'J"):
        J.normal_matrix()
    with pytest.raises(TooLarge, match="JJ'"):
        J.kernel()


def test_plans_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual_jacobian, "_REMEMBERED", 3)
    net, x, times = network(nn.Linear(3, 3)), randn(5, 3), [1]

    def closure() -> Tensor:
        z = x
        for _ in range(times[0]):
            z = net(z).tanh()
        return half_square(z)

    objective = ClosureObjective(closure, net.parameters())
    for times[0] in range(1, 9):
        evaluation = objective.evaluate(curvature="jacobian")
        J = ResidualJacobian(evaluation)
        assert J.method == "graph"
        torch.testing.assert_close(J.dense(), rows_of(evaluation), **CLOSE)
        assert len(objective.registry.jacobians) <= 4


# Layouts.


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-1, 5), min_size=1, max_size=12), st.integers(0, 3))
def test_layouts_collect_the_rows_of_each_sample(owners: list[int], seed: int) -> None:
    owner = torch.tensor(owners)
    rows = randn(len(owners), 2, seed=seed)
    rows[owner < 0] = 0
    counts = (2, 4)
    found, _ = layouts(owner, counts)
    begin = 0
    for i, samples in enumerate(counts):
        for sample in range(samples):
            expected = rows[owner == begin + sample].sum(0)
            got = found[i].of(rows).sum(-2)[sample] if i in found else torch.zeros(2).double()
            torch.testing.assert_close(got, expected)
        begin += samples


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probes_tell_many_samples_apart(dtype: torch.dtype) -> None:
    samples = 70_000
    probe = Probe(samples, dtype)
    weights = probe.weights(torch.device("cpu")).to(dtype)
    deltas = randn(samples, 3).to(dtype)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(0))
    owner = probe.owners(deltas[order], [(deltas * w[:, None])[order] for w in weights])
    assert owner is not None
    assert torch.equal(owner, order)
    mixed = deltas + 0.01 * deltas.roll(1, 0)
    assert probe.owners(mixed, [_mixed(deltas, w) for w in weights]) is None


def _mixed(deltas: Tensor, w: Tensor) -> Tensor:
    weighted = deltas * w[:, None]
    return weighted + 0.01 * weighted.roll(1, 0)


# Graphs of all kinds.

STEPS = ["linear", "left", "tanh", "relu", "gain", "shift", "norm", "skip", "square", "repeat"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.sampled_from(STEPS), min_size=1, max_size=6),
    st.sampled_from(["value", "derivative", "both"]),
    st.integers(1, 4),
)
def test_graphs_of_all_kinds(steps: list[str], kind: str, samples: int) -> None:
    width = 3
    W, b, g = (randn(*s, seed=i).requires_grad_() for i, s in enumerate([(3, 3), (3,), (3,)]))
    x = randn(samples, width, seed=7).requires_grad_()

    def model(h: Tensor) -> Tensor:
        first = h
        for step in steps:
            if step == "linear":
                h = F.linear(h, W, b)
            elif step == "left":
                h = (W @ h.T).T
            elif step == "tanh":
                h = h.tanh()
            elif step == "relu":
                h = h.relu() + 0.1 * h
            elif step == "gain":
                h = h * g
            elif step == "shift":
                h = h - b.exp()
            elif step == "norm":
                h = F.layer_norm(h, (width,), g, b)
            elif step == "skip":
                h = h + first
            elif step == "square":
                h = 0.1 * h**2
            else:
                h = torch.cat([h, 2 * h])[samples:]
        return h @ W[0] + b.sum()

    def closure() -> Tensor:
        u = model(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        parts = {"value": [u], "derivative": [du[:, 0] + u], "both": [u, du.sum(1) + 0 * u]}[kind]
        total = sum((mark_outputs(part).square().sum() / 2 for part in parts), torch.zeros(()))
        return _backward(total)

    J, expected = jacobian_of(closure, [W, b, g])
    scale = 1 + float(expected.abs().max())
    torch.testing.assert_close(J.dense(), expected, rtol=1e-10, atol=1e-10 * scale)
    assert J.method == "graph", J.reason


def test_probes_with_rounding_errors() -> None:
    samples = 2000
    probe = Probe(samples, torch.float32)
    exact = randn(samples, 1)
    exact[::100] *= 1e-5  # nearly zero
    noise = 1e-6 * randn(1 + probe.count, samples, 1, seed=1)
    weights = probe.weights(torch.device("cpu"))
    deltas = (exact + noise[0]).float()
    weighted = [(exact * w[:, None] + e).float() for w, e in zip(weights, noise[1:], strict=True)]
    owner = probe.owners(deltas, weighted)
    assert owner is not None
    unknown = owner < 0
    assert torch.equal(owner[~unknown], torch.arange(samples)[~unknown])
    assert layouts(owner, [samples])[0][0].of(deltas).shape == (samples, 1, 1)
    # Not where they are many, or large.
    exact[::20] *= 1e-5
    weighted = [(exact * w[:, None] + e).float() for w, e in zip(weights, noise[1:], strict=True)]
    assert probe.owners((exact + noise[0]).float(), weighted) is None
    weighted[0][7] *= 1.01
    assert probe.owners(deltas, weighted) is None


@pytest.mark.parametrize("loss", [F.cross_entropy, F.mse_loss])
def test_on_every_device(loss: Callable[..., Tensor], device: torch.device) -> None:
    net = network(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)).float().to(device)
    x, y = randn(20, 3).float().to(device), randn(20, 4, seed=1).float().to(device)
    y = y.argmax(1) if loss is F.cross_entropy else y
    evaluation = ClosureObjective(lambda: _backward(loss(net(x), y)), net.parameters()).evaluate(
        curvature="jacobian"
    )
    J, by_rows = ResidualJacobian(evaluation), ResidualJacobian(evaluation, method="rows")
    assert J.method == "graph", J.reason
    D, close = by_rows.dense(), {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(J.kernel(), D @ D.T, **close)
    torch.testing.assert_close(J.normal_matrix(), D.T @ D, **close)
    torch.testing.assert_close(J.dense(), D, **close)
    torch.testing.assert_close(J.pull(J.residuals), evaluation.grad, **close)


def test_complex_numbers_on_the_way() -> None:
    net = network(nn.Linear(4, 4), nn.Tanh())
    w = randn(3, 2).requires_grad_()
    x = randn(20, 4)

    def closure() -> Tensor:
        spectrum = torch.fft.rfft(net(x), dim=1) * torch.view_as_complex(w)
        return half_square(torch.fft.irfft(spectrum, n=4, dim=1))

    J, expected = jacobian_of(closure, [*net.parameters(), w])
    assert J.method in ("rows", "columns")
    assert J.reason == "gradients that are complex"
    torch.testing.assert_close(J.dense(), expected, **CLOSE)


def test_parts_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *_: Any) -> None:
        raise TooLarge(name)

    net = network(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)))
    x = randn(5, 3)
    monkeypatch.setattr(_graph_jacobian, "check_fits", refuse)
    J, expected = jacobian_of(lambda: half_square(net(x)), net.parameters())
    assert (J.method, J.reason) == ("rows", "a part that does not fit: a part of the Jacobian")
    torch.testing.assert_close(J.dense(), expected, **CLOSE)


def test_errors_on_the_way_lead_to_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no such thing\nas this")

    monkeypatch.setattr(_graph_jacobian, "surveyed", fail)
    net, x = network(nn.Linear(3, 4)), randn(5, 3)
    J, expected = jacobian_of(lambda: half_square(net(x)), net.parameters())
    assert (J.method, J.reason) == ("rows", "no such thing")
    torch.testing.assert_close(J.dense(), expected, **CLOSE)


@pytest.mark.parametrize("curvature", [True, "jacobian"])
def test_convolutions_with_classes(curvature: Any) -> None:
    net = network(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(8, 3))
    x, y = randn(6, 1, 4, 4), torch.arange(6) % 3
    evaluation = ClosureObjective(
        lambda: _backward(F.cross_entropy(net(x), y)), net.parameters()
    ).evaluate(curvature=curvature)
    J, by_rows = ResidualJacobian(evaluation), ResidualJacobian(evaluation, method="rows")
    assert J.method == "graph", J.reason
    torch.testing.assert_close(J.dense(), by_rows.dense(), **CLOSE)
    torch.testing.assert_close(J.kernel(), by_rows.kernel(), **CLOSE)


def test_another_loss_of_the_same_outputs() -> None:
    net, registry = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), ModuleRegistry()
    x, y = randn(6, 3), torch.arange(6) % 3
    losses: list[Callable[[Tensor], Tensor]] = [
        lambda z: F.mse_loss(z, F.one_hot(y, 3).double()),
        lambda z: F.cross_entropy(z, y),
    ]
    for loss in [*losses, *losses]:
        objective = ClosureObjective.for_step(
            lambda loss=loss: _backward(loss(net(x))), net.parameters(), registry=registry
        )
        evaluation = objective.evaluate(curvature="jacobian")
        J, by_rows = ResidualJacobian(evaluation), ResidualJacobian(evaluation, method="rows")
        assert J.method == "graph", J.reason
        torch.testing.assert_close(J.dense(), by_rows.dense(), **CLOSE)
