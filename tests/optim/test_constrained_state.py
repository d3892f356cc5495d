"""State and bad input of `Constrained`: checkpoints, copies, settable multipliers, errors."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_secondorder import LBFGS, AdaHessian, Constrained, NewtonCG

INNER: dict[str, Callable[..., Any]] = {
    "adam": partial(torch.optim.Adam, lr=0.05),
    "torch_lbfgs": partial(torch.optim.LBFGS, max_iter=3),
    "lbfgs": partial(LBFGS, max_iter=3),
    "newton_cg": NewtonCG,
    "adahessian": AdaHessian,
}


class Net(nn.Module):
    """A small regression whose weights have a bounded norm and a fixed sum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2).double()
        self.x, self.y = torch.randn(20, 3).double(), torch.randn(20, 2).double()

    def sums(self) -> Tensor:
        return self.layer.weight.sum(1) - 1

    def norm(self) -> Tensor:
        return self.layer.weight.square().sum() - 0.8

    def closure(self, optimizer: Any) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(self.layer(self.x), self.y)
            loss.backward()
            return loss

        return closure

    def optimizer(self, name: str = "adam", **more: Any) -> Constrained:
        more = {"method": "augmented_lagrangian"} | more
        inner = INNER[name](self.parameters())
        return Constrained(inner, {"sums": self.sums}, {"norm": self.norm}, **more)


def steps(net: Net, optimizer: Constrained, count: int) -> None:
    for _ in range(count):
        optimizer.step(net.closure(optimizer))


def saved(optimizer: Constrained) -> Any:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(first: Net, one: Constrained, second: Net, other: Constrained) -> None:
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    for name, y in one.multipliers.items():
        assert torch.equal(y, other.multipliers[name])
        assert torch.equal(one.penalties[name], other.penalties[name])


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("before", [1, 4])
def test_training_resumes_bit_for_bit(name: str, before: int) -> None:
    net = Net()
    optimizer = net.optimizer(name)
    steps(net, optimizer, before)
    state, weights = saved(optimizer), copy.deepcopy(net.state_dict())
    steps(net, optimizer, 9)

    again = Net()
    again.load_state_dict(weights)
    resumed = again.optimizer(name)
    resumed.load_state_dict(state)
    steps(again, resumed, 9)
    same(net, optimizer, again, resumed)


@pytest.mark.parametrize("name", ["adam", "lbfgs"])
def test_a_copy_goes_its_own_way(name: str) -> None:
    net = Net()
    optimizer = net.optimizer(name)
    steps(net, optimizer, 3)
    again, copied = copy.deepcopy((net, optimizer))
    steps(net, optimizer, 3)
    steps(again, copied, 3)
    same(net, optimizer, again, copied)


def test_a_checkpoint_of_the_optimizer_inside_alone() -> None:
    net = Net()
    plain = INNER["adam"](net.parameters())
    plain.step(net.closure(plain))
    optimizer = net.optimizer()
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.state[net.layer.weight]["step"] == 1 and optimizer.multipliers == {}


def test_a_checkpoint_of_other_constraints_changes_nothing() -> None:
    net = Net()
    optimizer = net.optimizer()
    steps(net, optimizer, 2)
    state = saved(optimizer)
    inner = INNER["adam"](net.parameters())
    other = Constrained(inner, {"sums": net.sums})
    with pytest.raises(ValueError, match=r"and these are \['sums'\]"):
        other.load_state_dict(state)
    assert not inner.state

    total = Constrained(inner, {"sums": lambda: net.sums().sum()}, {"norm": net.norm})
    total.step(net.closure(total))
    before = copy.deepcopy(inner.state_dict())
    with pytest.raises(ValueError, match=r"shapes \[\(2,\), \(\)\], and these have \[\(\), \(\)\]"):
        total.load_state_dict(state)
    assert str(inner.state_dict()) == str(before)

    fresh = Constrained(inner, {"sums": lambda: net.sums().sum()}, {"norm": net.norm})
    fresh.load_state_dict(state)  # shapes are not known yet
    weights = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match=r"sums returned a tensor of shape \(\) after one of"):
        fresh.step(net.closure(fresh))
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in weights.items())


@pytest.mark.parametrize("known", [False, True])
def test_multipliers_and_penalties_can_be_set(known: bool) -> None:
    net = Net()
    optimizer = net.optimizer("lbfgs")
    if known:
        steps(net, optimizer, 1)
    else:
        assert optimizer.multipliers == {} and optimizer.violations == {}
        assert optimizer.info is None
    optimizer.multipliers = {"sums": torch.tensor([1.0, -2.0]), "norm": 3}
    optimizer.penalties = {"norm": 7.0}
    term = optimizer._penalized.closure(net.closure(optimizer))
    optimizer._penalized.begin(list(net.parameters()), 1.0, 0)
    loss = term().item()
    with torch.no_grad():
        h, g = net.sums(), net.norm()
        expected = nn.functional.mse_loss(net.layer(net.x), net.y)
        expected = expected + h @ torch.tensor([1.0, -2.0]).double() + 5 * h @ h
        expected = expected + 3 * g + 3.5 * g * g if 3 + 7 * g > 0 else expected - 9 / 14
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    assert optimizer.penalties["sums"].tolist() == [10.0, 10.0]
    assert Net().optimizer("adam")._penalty == 1.0


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("multipliers", 3, "must be a dict by name, got int"),
        ("multipliers", {"size": 1}, "there is no constraint 'size'"),
        ("multipliers", {"sums": torch.ones(3)}, r"of shape \(2,\), got shape \(3,\)"),
        ("multipliers", {"norm": -1.0}, "must not be negative"),
        ("multipliers", {"norm": float("nan")}, "must be finite"),
        ("penalties", {"sums": -1.0}, "must not be negative"),
    ],
)
def test_multipliers_that_do_not_fit(kind: str, given: Any, message: str) -> None:
    net = Net()
    optimizer = net.optimizer("lbfgs")
    steps(net, optimizer, 1)
    before = {k: v.clone() for k, v in getattr(optimizer, kind).items()}
    with pytest.raises((TypeError, ValueError), match=message):
        setattr(optimizer, kind, given)
    assert all(torch.equal(v, before[k]) for k, v in getattr(optimizer, kind).items())


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "there is no constraint"),
        ({"equalities": []}, ValueError, "there is no constraint"),
        (
            {"equalities": 3},
            TypeError,
            "equalities must be a function",
        ),
        ({"inequalities": ["norm"]}, TypeError, r"inequalities\[0\] must be a function"),
        (
            {"equalities": {"a": lambda: 0}, "inequalities": {"a": lambda: 0}},
            ValueError,
            "both called 'a'",
        ),
        ({"equalities": lambda: 0, "method": "lagrange"}, ValueError, "method must be one of"),
        ({"equalities": lambda: 0, "penalty": -1.0}, ValueError, "penalty must be a finite number"),
        ({"equalities": lambda: 0, "multiplier_lr": -1.0}, ValueError, "multiplier_lr must"),
        ({"equalities": lambda: 0, "tolerance": -1.0}, ValueError, "tolerance must"),
        (
            {"equalities": lambda: 0, "penalty": 2.0, "max_penalty": 1.0},
            ValueError,
            "max_penalty must",
        ),
        ({"equalities": lambda: 0, "max_multiplier": 0.0}, ValueError, "max_multiplier must"),
        ({"equalities": lambda: 0, "method": "sqp"}, ValueError, "Adam does no sequential"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    optimizer = torch.optim.Adam([torch.zeros(2, requires_grad=True)])
    with pytest.raises(error, match=message):
        Constrained(optimizer, **arguments)


def test_what_is_wrapped_must_be_an_optimizer() -> None:
    with pytest.raises(TypeError, match="optimizer is what trains the model"):
        Constrained([torch.zeros(2, requires_grad=True)], lambda: 0)  # type: ignore[arg-type]


_OTHER = torch.ones(2, requires_grad=True)


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize(
    ("constraint", "error", "message"),
    [
        (lambda x: None, TypeError, "must return a tensor of real numbers, got NoneType"),
        (lambda x: 0.5, TypeError, "must return a tensor of real numbers, got float"),
        (
            lambda x: x.long(),
            TypeError,
            "must return .* got dtype torch.int64",
        ),
        (
            lambda x: torch.complex(x, x),
            TypeError,
            "must return .* got dtype torch.comp",
        ),
        (lambda x: x[:0], ValueError, r"returned a tensor of shape \(0,\), which has no entry"),
        (lambda x: x.detach(), RuntimeError, "returned a tensor without a graph"),
        (lambda x: _OTHER.sum(), RuntimeError, "depends on none of the parameters"),
    ],
)
def test_constraints_that_are_none(
    name: str, constraint: Callable[[Tensor], Any], error: type[Exception], message: str
) -> None:
    x = torch.ones(2, requires_grad=True)
    optimizer = Constrained(
        INNER[name]([x]), {"bad": lambda: constraint(x)}, method="augmented_lagrangian"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = x.square().sum()
        loss.backward()
        return loss

    with pytest.raises(error, match="the constraint bad " + message):
        optimizer.step(closure)
    assert x.tolist() == [1.0, 1.0] and not optimizer.multipliers.get("bad", torch.zeros(1)).any()


def test_a_shape_that_changes() -> None:
    x = torch.ones(4, requires_grad=True)
    count = 4
    optimizer = Constrained(torch.optim.SGD([x], 0.1), lambda: x[:count])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = x.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    count, before = 3, x.tolist()
    with pytest.raises(RuntimeError, match=r"shape \(3,\) after one of shape \(4,\)"):
        optimizer.step(closure)
    assert x.tolist() == before


@pytest.mark.parametrize("name", INNER)
def test_a_constraint_that_is_nan_at_the_start(name: str) -> None:
    x = torch.full((2,), -1.0, dtype=torch.float64, requires_grad=True)
    optimizer = Constrained(
        INNER[name]([x]), None, {"log": lambda: x.log().sum()}, "augmented_lagrangian"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = x.square().sum()
        loss.backward()
        return loss

    if name in ("adam", "torch_lbfgs"):
        with pytest.raises(RuntimeError, match="the constraint log is nan at the start of a step"):
            optimizer.step(closure)
    else:
        optimizer.step(closure)
        info = optimizer.info
        assert not info.feasible and info.most_violated == "log" and "is nan" in info.note
    assert x.tolist() == [-1.0, -1.0] and not optimizer.multipliers.get("log", torch.zeros(1)).any()


@pytest.mark.parametrize("name", ["lbfgs", "newton_cg", "torch_lbfgs"])
def test_a_constraint_that_is_nan_at_a_trial(name: str) -> None:
    """It is undefined below zero, where the loss pulls to."""
    x = torch.full((1,), 3.0, dtype=torch.float64, requires_grad=True)
    optimizer = Constrained(
        INNER[name]([x]), None, {"root": lambda: 0.5 - x.sqrt()}, "augmented_lagrangian"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 10 * x.sum()
        loss.backward()
        return loss

    for _ in range(30):
        optimizer.step(closure)
        assert x.isfinite().all() and optimizer.multipliers["root"].isfinite()
    if name != "torch_lbfgs":
        assert x.item() == pytest.approx(0.25, rel=1e-6)


@pytest.mark.parametrize("name", ["lbfgs", "newton_cg"])
def test_infeasible_constraints_are_reported(name: str) -> None:
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = Constrained(
        INNER[name]([x]),
        {"one": lambda: x.sum() - 1, "two": lambda: x.sum() - 2},
        None,
        "augmented_lagrangian",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = x.square().sum()
        loss.backward()
        return loss

    sizes = []
    for _ in range(60):
        optimizer.step(closure)
        sizes.append(optimizer.info.multiplier)
    info = optimizer.info
    assert not info.feasible and info.violation == pytest.approx(0.5, abs=1e-3)
    assert sizes[-1] > 100 * sizes[3] and x.isfinite().all()
    assert "stays" in info.note and "may contradict each other" in info.note
    assert "note" in str(info) and "feasible" in str(info)


@pytest.mark.parametrize("name", ["lbfgs", "newton_cg"])
def test_dependent_constraints_are_kept(name: str) -> None:
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = Constrained(
        INNER[name]([x]),
        {"one": lambda: x.sum() - 1, "two": lambda: 2 * x.sum() - 2},
        None,
        "augmented_lagrangian",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = x.square().sum()
        loss.backward()
        return loss

    for _ in range(30):
        optimizer.step(closure)
    torch.testing.assert_close(x.tolist(), [0.5, 0.5], rtol=1e-7, atol=0.0)
    y = optimizer.multipliers
    assert (y["one"] + 2 * y["two"]).item() == pytest.approx(-1.0, rel=1e-6)


@pytest.mark.parametrize("method", ["sqp", "augmented_lagrangian"])
@pytest.mark.parametrize("at", range(1, 10))
def test_an_error_leaves_multipliers_with_their_parameters(method: Any, at: int) -> None:
    x = torch.tensor([2.0, -1.5, 0.5], dtype=torch.float64, requires_grad=True)
    calls = 0

    def ball() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyError("gone")
        return x @ x - 1

    optimizer = Constrained(LBFGS([x], max_iter=3), inequalities=ball, method=method)
    optimizer.multipliers = {"inequalities": 0.3}

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = x[0] ** 4 - x[1] + x.exp().sum()
        loss.backward()
        return loss

    for _ in range(10):
        before = x.detach().clone(), optimizer.multipliers, optimizer.penalties
        try:
            optimizer.step(closure)
        except KeyError:
            break
    assert method != "sqp" or torch.equal(x, before[0])
    assert optimizer.multipliers == before[1] and optimizer.penalties == before[2]
    if not before[1]:  # in the first step
        assert optimizer.info is None
        assert optimizer._pending == {"multipliers": {"inequalities": 0.3}}
    for _ in range(30):
        optimizer.step(closure)
    assert optimizer.info is not None and optimizer.info.feasible
