"""K-FAC as an optimizer, against its algorithm written down layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.diagonal_references import assert_moved, assert_same, values
from tests.support.kfac_reference import PlainKFAC, Problem
from torch_secondorder import KFAC, StepStatus

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "often": {"update_period": 1, "basis_period": 1},
    "every third": {"update_period": 3, "basis_period": 6},
    "eigenbases": {"ekfac": True, "update_period": 2, "basis_period": 8},
    "no bound": {"max_precond_dim": None},
    "one-sided": {"max_precond_dim": 6, "update_period": 2},
    "one-sided eigenbases": {
        "max_precond_dim": 6,
        "ekfac": True,
        "update_period": 2,
        "basis_period": 4,
    },
    "labels of the data": {"labels": "empirical", "update_period": 2},
    "no clipping": {"kl_clip": None, "lr": 1e-3},
    "clipping": {"kl_clip": 1e-3, "lr": 0.1},
    "no momentum": {"momentum": 0.0},
    "weight decay": {"weight_decay": 3.0},
    "damping": {"damping": 0.3, "factor_decay": 0.5},
    "maximize": {"maximize": True},
    "seed": {"seed": 7},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_trajectory_is_that_of_the_plain_algorithm(options: dict[str, Any]) -> None:
    ours, plain = Problem(), Problem()
    optimizer, reference = (
        KFAC(ours.model.parameters(), **options),
        PlainKFAC(plain.model, **options),
    )
    before = values(ours.model)
    for turn in range(12):
        ours.turn = plain.turn = turn
        optimizer.step(ours.closure(optimizer))
        reference.step(plain.loss)
    assert_same(ours.model, plain.model, 1e-9)
    assert_moved(values(ours.model), before)


def test_loops_without_a_closure_and_micro_batches_make_the_same_steps() -> None:
    ours, loop, parts = Problem(), Problem(), Problem()
    options = {"update_period": 2, "lr": 0.01, "labels": "empirical"}
    by_closure = KFAC(ours.model.parameters(), **options)
    by_loop = KFAC(loop.model.parameters(), **options)
    by_parts = KFAC(parts.model.parameters(), **options)

    def halves() -> Tensor:
        by_parts.zero_grad()
        total = torch.zeros(())
        for half in (slice(0, 20), slice(20, 40)):
            tokens, y = parts.tokens[parts.turn % 3][half], parts.y[parts.turn % 3][half]
            loss = F.cross_entropy(parts.model(tokens), y) / 2
            loss.backward()
            total = total + loss.detach()
        return total

    for turn in range(6):
        ours.turn = loop.turn = parts.turn = turn
        by_closure.step(ours.closure(by_closure))
        by_loop.zero_grad()
        loop.loss().backward()
        by_loop.step()
        if not turn:
            by_parts.step(halves)
        assert_same(ours.model, loop.model)
        if not turn:
            for one, other in zip(ours.model.parameters(), parts.model.parameters(), strict=True):
                for name in ("factor_left", "factor_right"):
                    if name in by_closure.state[one]:
                        expected = by_closure.state[one][name]
                        torch.testing.assert_close(by_parts.state[other][name], expected)


@pytest.mark.parametrize("options", [{}, {"ekfac": True}, {"max_precond_dim": 6}])
@pytest.mark.parametrize("stop", [1, 2, 5, 7])
def test_a_checkpoint_goes_on_bit_for_bit(
    options: dict[str, Any], stop: int, tmp_path: Path
) -> None:
    options = {"update_period": 3, "basis_period": 3, **options}
    whole, halted, resumed = Problem(), Problem(), Problem()
    optimizers = [KFAC(p.model.parameters(), **options) for p in (whole, halted)]
    for turn in range(stop):
        for problem, optimizer in zip((whole, halted), optimizers, strict=True):
            problem.turn = turn
            optimizer.step(problem.closure(optimizer))
    torch.save([halted.model.state_dict(), optimizers[1].state_dict()], tmp_path / "saved.pt")
    model, state = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed.model.load_state_dict(model)
    other = KFAC(resumed.model.parameters())
    other.load_state_dict(state)
    for turn in range(stop, stop + 6):
        for problem, optimizer in ((whole, optimizers[0]), (resumed, other)):
            problem.turn = turn
            optimizer.step(problem.closure(optimizer))
    assert_same(whole.model, resumed.model, 0.0)


def test_nothing_is_left_on_the_model() -> None:
    problem = Problem()
    optimizer = KFAC(problem.model.parameters())
    optimizer.step(problem.closure(optimizer))
    for module in problem.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
    assert all(not p._backward_hooks for p in problem.model.parameters())


def test_one_linear_layer_takes_exact_natural_gradient_steps() -> None:
    """With one sample the Gauss-Newton matrix of a layer is a Kronecker product."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2).double()
    x, y = torch.randn(1, 3).double(), torch.randn(1, 2).double()
    before = torch.cat([layer.weight, layer.bias[:, None]], 1).detach().clone()
    optimizer = KFAC(
        layer.parameters(), 1.0, 0.0, damping=1e-2, kl_clip=None, ekfac=True, update_period=1
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x), y, reduction="sum")
        loss.backward()
        return loss

    optimizer.step(closure)
    a = torch.cat([x[0], torch.ones(1).double()])
    gradient = torch.outer(2 * (before @ a - y[0]), a)
    # Labels drawn as signs give `q q'`, the mean of which is the Hessian by the outputs, 2 I.
    q = 2**0.5 * torch.sign(optimizer.state[layer.weight]["factor_left"][0, 1])
    signs = torch.stack([torch.ones(()).double() * 2**0.5, q])
    matrix = torch.kron(torch.outer(signs, signs), torch.outer(a, a))
    step = torch.linalg.solve(matrix + 1e-2 * torch.eye(8).double(), gradient.flatten())
    after = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
    torch.testing.assert_close(after, before - step.view(2, 4), rtol=1e-9, atol=1e-9)


def test_the_report_says_what_the_bound_left() -> None:
    problem = Problem()
    optimizer = KFAC(problem.model.parameters(), kl_clip=1e-4)
    optimizer.step(problem.closure(optimizer))
    assert optimizer.info is not None
    assert 0 < optimizer.info.unclipped < 1
    assert optimizer.info.products == 1
    assert "unclipped" in str(optimizer.info)
    for group in optimizer.param_groups:
        group["kl_clip"] = None
    optimizer.step(problem.closure(optimizer))
    assert optimizer.info.unclipped is None


def test_a_direction_is_shorter_by_the_bound() -> None:
    """`kl_clip` multiplies all parameters by one factor."""
    free, bound = Problem(), Problem()
    before = values(free.model)
    for problem, clip in ((free, None), (bound, 1e-3)):
        optimizer = KFAC(problem.model.parameters(), momentum=0.0, kl_clip=clip)
        optimizer.step(problem.closure(optimizer))
    assert optimizer.info is not None
    for start, one, other in zip(before, values(free.model), values(bound.model), strict=True):
        torch.testing.assert_close(other - start, optimizer.info.unclipped * (one - start))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr"),
        ({"momentum": 1.0}, "momentum"),
        ({"momentum": -0.1}, "momentum"),
        ({"damping": 0.0}, "damping"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"kl_clip": 0.0}, "kl_clip"),
        ({"factor_decay": 1.0}, "factor_decay"),
        ({"update_period": 0}, "update_period"),
        ({"basis_period": 0}, "basis_period"),
        ({"max_precond_dim": 0}, "max_precond_dim"),
        ({"labels": "guessed"}, "labels"),
        ({"accumulation_steps": 0}, "accumulation_steps"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KFAC([torch.zeros(2, 2, requires_grad=True)], **options)


def test_a_loss_without_outputs_is_refused_before_anything_changes() -> None:
    problem = Problem()
    optimizer = KFAC(problem.model.parameters())
    before = values(problem.model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.model(problem.tokens[0]).square().sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="mark"):
        optimizer.step(closure)
    assert_same(values(problem.model), before, 0.0)


def test_an_estimate_that_is_not_finite_leaves_the_factors() -> None:
    problem = Problem()
    optimizer = KFAC(problem.model.parameters(), update_period=1)
    optimizer.step(problem.closure(optimizer))
    weight = problem.model.first.weight
    held = optimizer.state[weight]["factor_left"].clone()
    problem.model.last.weight.data[0, 0] = torch.inf
    before = values(problem.model)
    optimizer.step(problem.closure(optimizer))
    assert optimizer.info is not None
    assert optimizer.info.status is StepStatus.NONFINITE_START
    assert_same(values(problem.model), before, 0.0)
    assert torch.equal(optimizer.state[weight]["factor_left"], held)


def test_weights_that_change_their_use_change_their_coordinates() -> None:
    torch.manual_seed(0)
    a = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    x, y = torch.randn(8, 3).double(), torch.randn(8, 4).double()
    optimizer = KFAC([a], update_period=1, ekfac=True)
    mode = "layer"

    def closure() -> Tensor:
        optimizer.zero_grad()
        z = x @ a.T if mode == "layer" else x @ a.T + a.sum()
        loss = F.mse_loss(z, y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert int(optimizer.state[a]["layer"]) == 1
    mode = "otherwise"
    optimizer.step(closure)
    assert int(optimizer.state[a]["layer"]) == 0
    mode = "layer"
    optimizer.step(closure)
    assert int(optimizer.state[a]["layer"]) == 1
    assert torch.isfinite(a).all()


@pytest.mark.parametrize("frozen", ["first.bias", "first.weight", "conv.weight"])
def test_parameters_may_be_frozen_and_thawed(frozen: str) -> None:
    problem = Problem()
    p = problem.model.get_parameter(frozen)
    optimizer = KFAC(problem.model.parameters(), update_period=2)
    for turn in range(6):
        problem.turn = turn
        p.requires_grad_(turn not in (2, 3))
        before = p.detach().clone()
        optimizer.step(problem.closure(optimizer))
        assert torch.equal(p, before) is (turn in (2, 3))
    assert all(torch.isfinite(q).all() for q in problem.model.parameters())


def test_half_precision_trains() -> None:
    problem = Problem(torch.bfloat16)
    optimizer = KFAC(problem.model.parameters(), lr=0.3)
    losses = [float(optimizer.step(problem.closure(optimizer))) for _ in range(25)]
    assert losses[-1] < 0.8 * losses[0]
    assert optimizer.state[problem.model.first.weight]["factor_left"].dtype is torch.float32


@pytest.mark.parametrize("options", [{}, {"kl_clip": None}, {"ekfac": True}])
def test_directions_that_overflow_move_nothing(options: dict[str, Any]) -> None:
    problem = Problem(torch.float32)
    optimizer = KFAC(problem.model.parameters(), update_period=2, **options)
    for _ in range(3):  # the next step divides by the old curvature
        optimizer.step(problem.closure(optimizer))
    before, held = values(problem.model), problem.loss
    problem.loss = lambda: held() * 1e35  # type: ignore[method-assign]
    optimizer.step(problem.closure(optimizer))
    assert_same(values(problem.model), before, 0.0)
    problem.loss = held  # type: ignore[method-assign]
    optimizer.step(problem.closure(optimizer))
    assert all(torch.isfinite(p).all() for p in problem.model.parameters())
    assert_moved(values(problem.model), before)


@pytest.mark.parametrize("options", [{"ekfac": True}, {"ekfac": True, "max_precond_dim": 6}])
def test_a_bias_may_come_and_go_where_layers_have_bases(options: dict[str, Any]) -> None:
    problem = Problem()
    first = problem.model.first
    optimizer = KFAC(problem.model.parameters(), update_period=2, **options)
    for turn in range(8):
        problem.turn = turn
        first.bias.requires_grad_(turn not in (3, 4, 5))
        before = first.weight.detach().clone()
        optimizer.step(problem.closure(optimizer))
        assert first.weight.isfinite().all()
        assert not torch.equal(first.weight, before)
    assert int(optimizer.state[first.weight]["layer"]) > 1


@pytest.mark.parametrize("sizes", [(6, 1024), (1024, 6), (2, 6)])
@pytest.mark.parametrize("ekfac", [False, True])
def test_the_largest_size_may_change(sizes: tuple[int, int], ekfac: bool) -> None:
    problem = Problem()
    optimizer = KFAC(
        problem.model.parameters(),
        update_period=2,
        max_precond_dim=sizes[0],
        ekfac=ekfac,
        kl_clip=1e-3,
    )
    for turn in range(10):
        problem.turn = turn
        if turn == 3:
            optimizer.param_groups[0]["max_precond_dim"] = sizes[1]
        optimizer.step(problem.closure(optimizer))
    fresh = KFAC(problem.model.parameters(), max_precond_dim=sizes[1])
    fresh.step(problem.closure(fresh))
    for p, state in fresh.state.items():
        if int(state["layer"]):
            held = optimizer.state[p]
            names = {name for name in state if name.startswith(("factor_", "basis_"))}
            assert {name for name in held if name.startswith(("factor_", "basis_"))} == names
            assert all(held[name].shape == state[name].shape for name in names)
            assert all(held[name].isfinite().all() for name in names)


@pytest.mark.parametrize(
    "options", [{}, {"ekfac": True}, {"max_precond_dim": 6}, {"max_precond_dim": 2}]
)
def test_a_first_estimate_that_is_not_finite_leaves_nothing_on_a_device(
    options: dict[str, Any],
) -> None:
    problem = Problem()
    optimizer = KFAC(problem.model.parameters(), capturable=True, **options)
    before, held = values(problem.model), problem.loss
    problem.loss = lambda: held() * float("inf")  # type: ignore[method-assign]
    optimizer.step(problem.closure(optimizer))
    assert_same(values(problem.model), before, 0.0)
    problem.loss = held  # type: ignore[method-assign]
    losses = [float(optimizer.step(problem.closure(optimizer))) for _ in range(12)]
    assert losses[-1] < losses[0]
    for state in optimizer.state.values():
        assert all(t.isfinite().all() for t in state.values() if isinstance(t, Tensor))


@pytest.mark.parametrize("options", [{}, {"ekfac": True}, {"max_precond_dim": 6}])
@pytest.mark.parametrize("loads", [False, True])
def test_a_model_may_go_on_in_another_precision(options: dict[str, Any], loads: bool) -> None:
    problem = Problem(torch.float32)
    optimizer = KFAC(problem.model.parameters(), update_period=2, **options)
    for _ in range(4):
        optimizer.step(problem.closure(optimizer))
    problem.model.double()
    if loads:
        state = optimizer.state_dict()
        optimizer = KFAC(problem.model.parameters())
        optimizer.load_state_dict(state)
    before = values(problem.model)
    for _ in range(3):
        optimizer.step(problem.closure(optimizer))
    assert_moved(values(problem.model), before)
    assert optimizer.state[problem.model.first.weight]["basis_left"].dtype is torch.float64


def test_a_step_that_moves_nothing_reports_no_bound() -> None:
    problem = Problem()
    optimizer = KFAC(problem.model.parameters())
    optimizer.step(problem.closure(optimizer))
    assert optimizer.info is not None
    assert optimizer.info.unclipped is not None
    held = problem.loss
    problem.loss = lambda: held() * float("nan")  # type: ignore[method-assign]
    optimizer.step(problem.closure(optimizer))
    assert optimizer.info.status is StepStatus.NONFINITE_START
    assert optimizer.info.unclipped is None
