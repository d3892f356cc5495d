"""Sophia against the paper's algorithm, written down parameter by parameter."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.closures import standard
from tests.support.diagonal_references import (
    DEFAULTS,
    PlainSophia,
    PlainSophiaG,
    Task,
    assert_moved,
    assert_same,
    assert_trajectories_agree,
    plain,
    values,
)
from torch_secondorder import Sophia, StepStatus, mark_outputs
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder.curvature import (
    DiagonalEstimator,
    GaussNewton,
    GaussNewtonBartlett,
    Hutchinson,
    exact_diagonal,
)

DOUBLE = torch.float64

# Where about half of the coordinates are clipped.
HALF = {"lr": 0.01, "gamma": 20.0}

GROUPS = (
    {"lr": 0.005, "betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.1},
    {"gamma": 100.0},
    {"gamma": 1.0, "betas": (0.0, 0.9)},
)

OPTIONS: dict[str, tuple[dict[str, Any], tuple[dict[str, Any], ...]]] = {
    "defaults": ({"lr": 1e-3, "gamma": 0.01}, ()),
    "half clipped": ({}, ()),
    "groups": ({}, GROUPS),
    "groups, always": ({"update_period": 1}, GROUPS),
    "weight decay": ({"weight_decay": 0.3}, ()),
    "every third": ({"update_period": 3}, ()),
    "seed": ({"seed": 5}, ()),
    "maximize": ({"maximize": True}, ()),
    "no memory": ({"betas": (0.0, 0.0)}, ()),
    "a large floor": ({"eps": 1.0}, ()),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_fifty_steps_are_those_of_the_paper(name: str, device: torch.device) -> None:
    options, groups = OPTIONS[name]
    options = {**HALF, "update_period": 10, "capturable": False, **options}
    optimizer, reference = assert_trajectories_agree(
        Sophia, PlainSophia, options, *groups, device=device
    )
    assert optimizer.info.unclipped == pytest.approx(reference.unclipped(), abs=1e-12)
    if name in ("half clipped", "groups"):
        assert 0.1 < optimizer.info.unclipped < 0.9


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("maximize", [False, True])
def test_fifty_steps_with_labels_drawn_from_the_model(
    samples: int, maximize: bool, device: torch.device
) -> None:
    options: dict[str, Any] = {"lr": 0.01, "gamma": 5.0, "maximize": maximize, "update_period": 4}
    options |= {"capturable": False, "n_samples": samples}
    optimizer, reference = assert_trajectories_agree(
        lambda params, n_samples, **rest: Sophia(
            params, estimator=GaussNewtonBartlett(n_samples), **rest
        ),
        PlainSophiaG,
        options,
        device=device,
    )
    assert optimizer.info.unclipped == pytest.approx(reference.unclipped(), abs=1e-12)
    assert 0.02 < optimizer.info.unclipped < 0.98


@pytest.mark.parametrize("name", ["groups", "maximize", "every third"])
def test_without_looking_at_the_host_it_is_the_same(name: str, device: torch.device) -> None:
    options, groups = OPTIONS[name]
    options = {**HALF, "update_period": 10, "capturable": True, **options}
    assert_trajectories_agree(Sophia, PlainSophia, options, *groups, device=device, tolerance=1e-4)


def test_the_defaults_are_those_of_the_paper() -> None:
    signature = inspect.signature(Sophia).parameters
    for name, value in DEFAULTS[PlainSophia].items():
        assert signature[name].default == (None if name == "gamma" else value)
    p = nn.Parameter(torch.ones(2))
    gammas = {
        "hutchinson": 0.01,
        "gnb": 0.05,
        Hutchinson(3): 0.01,
        GaussNewtonBartlett(2): 0.05,
    }
    for estimator, gamma in gammas.items():
        optimizer = Sophia([p], estimator=estimator)  # type: ignore[arg-type]
        assert optimizer.param_groups[0]["gamma"] == gamma
        if isinstance(estimator, DiagonalEstimator):
            assert optimizer.estimator is estimator
    assert Sophia([p], gamma=0.5, estimator="gnb").param_groups[0]["gamma"] == 0.5


def assert_both_train(
    loss: Callable[..., Tensor],
    *tensors: Tensor,
    steps: int = 20,
    tolerance: float = 1e-12,
    **options: Any,
) -> None:
    ours, theirs = ([nn.Parameter(t.clone()) for t in tensors] for _ in range(2))
    options = {**HALF, "update_period": 3, **options}
    optimizer = Sophia(ours, **options)
    reference = plain(PlainSophia, [{"params": theirs}], options)
    for _ in range(steps):
        optimizer.step(standard(optimizer, lambda: loss(*ours)))
        reference.step(lambda: loss(*theirs))
        assert_same(ours, theirs, tolerance)
    assert_moved(ours, list(tensors))


def test_kernels_and_complex_parameters(device: torch.device) -> None:
    kernel = torch.randn(2, 3, 2, dtype=DOUBLE, device=device)
    number = torch.randn(2, 2, dtype=torch.complex128, device=device)
    x = torch.randn(2, 3, 4, dtype=DOUBLE, device=device)

    def loss(w: Tensor, c: Tensor) -> Tensor:
        return F.conv1d(x, w).tanh().square().mean() * (c @ c).abs().square().sum()

    assert_both_train(loss, kernel, number, capturable=False)


def test_a_mix_of_dtypes(device: torch.device) -> None:
    wide = torch.randn(3, 2, dtype=DOUBLE, device=device)
    narrow = torch.randn(3, device=device)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return (b.double() @ a).square().sum().log1p()

    assert_both_train(loss, wide, narrow, tolerance=1e-4, capturable=False)


def test_bfloat16_keeps_float32_copies(device: torch.device) -> None:
    start = torch.linspace(0.5, 1.5, 12, device=device).bfloat16().view(3, 4)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {"lr": 1e-4, "gamma": 0.4, "weight_decay": 0.1}
    optimizer = Sophia([ours], **options)
    reference = plain(PlainSophia, [{"params": [theirs]}], {**options, "update_period": 10})
    for _ in range(40):
        optimizer.step(standard(optimizer, lambda: ours.square().sum()))
        reference.step(lambda: theirs.square().sum())
    state = optimizer.state[ours]
    assert torch.equal(state["master"].bfloat16(), ours)
    torch.testing.assert_close(state["master"], reference.state[theirs]["theta"])


@pytest.mark.parametrize("estimator", ["hutchinson", "gnb"])
def test_frozen_and_thawed_between_steps(estimator: str, device: torch.device) -> None:
    kind = PlainSophia if estimator == "hutchinson" else PlainSophiaG
    options = {**HALF, "update_period": 3, "capturable": False}
    ours, theirs = Task(device), Task(device)
    optimizer = Sophia(ours.groups(), estimator=estimator, **options)  # type: ignore[arg-type]
    reference = plain(kind, theirs.groups(), options)
    for step in range(20):
        for task in (ours, theirs):
            task.model.embedding.weight.requires_grad_(step % 7 > 2)
            task.model.linear.weight.requires_grad_(step >= 5)
        optimizer.step(standard(optimizer, ours.loss))
        reference.step(theirs.loss)
        assert_same(ours.model, theirs.model)


def test_groups_may_differ_in_what_they_maximize() -> None:
    first, second = (nn.Parameter(torch.ones(1, dtype=DOUBLE)) for _ in range(2))
    groups = [{"params": [first]}, {"params": [second], "maximize": True}]
    optimizer = Sophia(groups, lr=0.1)
    optimizer.step(standard(optimizer, lambda: (first**2 - second**2).sum()))
    assert second.item() == first.item() < 1


# The size of a move.


def test_no_coordinate_moves_further_than_the_rate() -> None:
    task = Task()
    optimizer = Sophia(task.model.parameters(), lr=0.01, gamma=1e-6)
    for _ in range(5):
        before = values(task.model)
        optimizer.step(standard(optimizer, task.loss))
        for a, b in zip(values(task.model), before, strict=True):
            assert (a - b).abs().max() <= 0.01 * (1 + 1e-12)


def test_negative_curvature_is_a_sign_update() -> None:
    p = nn.Parameter(torch.tensor([0.5, -0.5, 0.0], dtype=DOUBLE))
    optimizer = Sophia([p], lr=0.1)
    optimizer.step(standard(optimizer, lambda: -(p**2).sum()))
    torch.testing.assert_close(p.detach(), torch.tensor([0.6, -0.6, 0.0], dtype=DOUBLE))
    assert optimizer.info.unclipped == pytest.approx(1 / 3)


def test_the_share_that_is_not_clipped_is_of_what_moved() -> None:
    p = nn.Parameter(torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=DOUBLE))
    slopes = torch.tensor([0.1, 0.5, 2.0, 10.0], dtype=DOUBLE)
    # m = (1 - b1) slope, gamma h = (1 - b2) gamma: at 4.1 slopes of gamma / 4 are at the edge.
    optimizer = Sophia([p], lr=0.1, gamma=4.0)

    def loss() -> Tensor:
        return (p - 1 + slopes).square().sum() / 2

    optimizer.step(standard(optimizer, loss))
    assert optimizer.info.unclipped == 0.5
    moved = (1 - p.detach()) / 0.1
    assert [x < 1 - 1e-12 for x in moved.tolist()] == [True, True, False, False]


def test_reading_the_share_later_reads_that_of_the_step() -> None:
    first, second = Task(), Task()
    optimizers = [Sophia(task.model.parameters(), **HALF) for task in (first, second)]
    for _ in range(3):
        shares = []
        for optimizer, task in zip(optimizers, (first, second), strict=True):
            optimizer.step(standard(optimizer, task.loss))
            if optimizer is optimizers[1]:
                optimizer.param_groups[0]["gamma"] *= 1.0
            shares.append(optimizer.info.unclipped)
        assert shares[0] == shares[1]
    info = optimizers[0].info
    optimizers[0].step(standard(optimizers[0], first.loss))
    assert info is not optimizers[0].info


# Estimators.


def test_labels_drawn_from_the_model_average_to_the_gauss_newton_diagonal(
    device: torch.device,
) -> None:
    """With betas of (0, 0) the moment is the estimate; means within six standard errors.

    By chance one of the entries, fewer than a hundred, fails once in a hundred thousand times, and
    for the fixed seed never.
    """
    torch.manual_seed(0)
    model = nn.Linear(3, 3).to(device, DOUBLE)
    x = torch.randn(6, 3, dtype=DOUBLE, device=device)
    y = torch.randint(3, (6,), device=device)
    objective = ClosureObjective(lambda: F.cross_entropy(model(x), y), list(model.parameters()))
    expected = exact_diagonal(GaussNewton(objective.evaluate(curvature=True)))
    optimizer = Sophia(
        model.parameters(), lr=0.0, betas=(0.0, 0.0), estimator="gnb", update_period=1
    )
    drawn = []
    for _ in range(400):
        optimizer.step(standard(optimizer, lambda: F.cross_entropy(model(x), y)))
        state = [optimizer.state[p]["exp_hessian"].flatten() for p in model.parameters()]
        drawn.append(torch.cat(state).clone())
    drawn = torch.stack(drawn)
    error = drawn.std(0) / 20
    assert (drawn >= 0).all()
    assert ((drawn.mean(0) - expected).abs() < 6 * error).all()
    assert ((drawn.mean(0) - 2 * expected).abs() > 6 * error).any()


def test_micro_batches_add_up_for_labels_drawn_from_the_model() -> None:
    """The mean over many draws is that of the whole batch."""
    torch.manual_seed(0)
    model = nn.Linear(2, 3).double()
    x, y = torch.randn(6, 2, dtype=DOUBLE), torch.randint(3, (6,))
    objective = ClosureObjective(lambda: F.cross_entropy(model(x), y), list(model.parameters()))
    expected = exact_diagonal(GaussNewton(objective.evaluate(curvature=True)))
    optimizer = Sophia(
        model.parameters(),
        lr=0.0,
        betas=(0.0, 0.0),
        estimator=GaussNewtonBartlett(8),
        update_period=1,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        for part in (slice(0, 2), slice(2, 6)):
            share = len(x[part]) / len(x)
            (F.cross_entropy(model(x[part]), y[part]) * share).backward()
        return F.cross_entropy(model(x), y)

    drawn = []
    for _ in range(100):
        optimizer.step(closure)
        state = [optimizer.state[p]["exp_hessian"].flatten() for p in model.parameters()]
        drawn.append(torch.cat(state).clone())
    drawn = torch.stack(drawn)
    error = drawn.std(0) / 10
    assert ((drawn.mean(0) - expected).abs() < 6 * error).all()
    assert ((drawn.mean(0) - 1.7 * expected).abs() > 6 * error).any()


class Squares(DiagonalEstimator):
    """One of somebody else's: knows the answer."""

    n_samples = 1

    def watch(self, vector: Any, generator: Any, buffer_pool: Any = None) -> Any:
        return Hutchinson(2, distribution="gaussian").watch(vector, generator, buffer_pool)


def test_any_estimator_can_be_given() -> None:
    for estimator in (
        Hutchinson(4),
        Hutchinson(2, distribution="gaussian", weighted=True),
        Squares(),
    ):
        task = Task()
        before = task.loss().item()
        optimizer = Sophia(task.model.parameters(), lr=0.02, estimator=estimator)
        for _ in range(20):
            optimizer.step(standard(optimizer, task.loss))
        assert task.loss().item() < before
        assert optimizer.info.status is StepStatus.MOVED


def test_the_number_of_products_is_reported() -> None:
    for estimator, expected in ((Hutchinson(4), 4), ("gnb", 1), ("hutchinson", 1)):
        task = Task()
        optimizer = Sophia(task.model.parameters(), estimator=estimator, update_period=2)
        counts = []
        for _ in range(4):
            optimizer.step(standard(optimizer, task.loss))
            counts.append(optimizer.info.products)
        assert counts == [expected, 0, expected, 0]


def test_a_loss_of_ones_own_needs_a_mark_for_labels() -> None:
    task = Task()

    def own() -> Tensor:
        z = task.model(task.tokens)
        return (z - F.one_hot(task.y, 3)).pow(4).mean()

    def marked() -> Tensor:
        z = mark_outputs(task.model(task.tokens))
        return (z - F.one_hot(task.y, 3)).pow(4).mean()

    optimizer = Sophia(task.model.parameters(), estimator="gnb")
    before = values(task.model)
    with pytest.raises(RuntimeError, match="mark_outputs"):
        optimizer.step(standard(optimizer, own))
    assert_same(task.model, before, 0)
    optimizer.step(standard(optimizer, marked))
    assert_moved(values(task.model), before)


def test_labels_need_the_closure() -> None:
    task = Task()
    optimizer = Sophia(task.model.parameters(), estimator="gnb", watch=False)
    task.loss().backward()
    with pytest.raises(RuntimeError, match=r"looks at the model.s outputs(.|\n)*watching"):
        optimizer.step()


# What is refused.

BAD: dict[str, list[Any]] = {
    "lr": [-0.1, math.inf],
    "betas": [(0.9,), (1.0, 0.9), (0.9, -0.1), 0.9],
    "gamma": [-0.1, math.nan, "large"],
    "eps": [0.0, -1.0, math.nan],
    "weight_decay": [-1.0],
    "update_period": [0, 1.5],
    "accumulation_steps": [0],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, bad in BAD.items() for value in bad]
)
def test_bad_numbers_are_shown(name: str, value: Any) -> None:
    p = nn.Parameter(torch.ones(2))
    for make in (
        lambda: Sophia([p], **{name: value}),
        lambda: Sophia([{"params": [p], name: value}]),
    ):
        with pytest.raises(ValueError, match=name) as caught:
            make()
        assert repr(value) in str(caught.value)


@pytest.mark.parametrize("estimator", ["fisher", None, 3, Hutchinson])
def test_unknown_estimators(estimator: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"estimator must be one of.*gnb"):
        Sophia([nn.Parameter(torch.ones(2))], estimator=estimator)
