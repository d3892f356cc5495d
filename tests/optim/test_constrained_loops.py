"""`Constrained` gives what the same optimizer gives with the term written into the loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from torch_secondorder import (
    LBFGS,
    AdaHessian,
    Constrained,
    Contractive,
    DatasetClosure,
    FunctionalObjective,
    NewtonCG,
    Sophia,
)

INNER: dict[str, Callable[..., Any]] = {
    "adam": partial(torch.optim.Adam, lr=0.01),
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "torch_lbfgs": partial(torch.optim.LBFGS, line_search_fn="strong_wolfe", max_iter=4),
    "lbfgs": partial(LBFGS, max_iter=4),
    "newton": partial(NewtonCG, max_cg_iter=5),
    "newton_hessian": partial(NewtonCG, curvature="hessian"),
    "adahessian": AdaHessian,
    "sophia": partial(Sophia, lr=0.03),
    "sophia_gnb": partial(Sophia, lr=0.03, estimator="gnb"),
}
PENALTY, Y = 3.0, (0.7, 0.4)


class Net(nn.Module):
    """A net, data, and the augmented Lagrangian by hand, with multipliers that stay."""

    def __init__(self, device: Any = "cpu") -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)
        self.to(device, torch.float64)
        self.x = torch.randn(24, 5, dtype=torch.float64, device=device)
        self.y = torch.randint(3, (24,), device=device)
        self.out: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.out = self.second(torch.tanh(self.first(x)))
        return self.out

    def loss(self) -> Tensor:
        return F.cross_entropy(self(self.x), self.y)

    def equality(self) -> Tensor:
        return self.first.weight.sum() - 1

    def inequality(self) -> Tensor:
        return self.second.weight.square().sum() - 0.5

    def term(self, h: Tensor, g: Tensor) -> Tensor:
        y, z = Y
        shifted = (z + PENALTY * g).clamp(min=0)
        return y * h + PENALTY / 2 * h * h + (shifted * shifted - z * z) / (2 * PENALTY)

    def lagrangian(self) -> Tensor:
        return self.loss() + self.term(self.equality(), self.inequality())

    def closure(self, loss: Callable[[], Tensor] | None = None) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            self.zero_grad()
            value = (loss or self.loss)()
            value.backward()
            return value

        return closure


def wrapped(net: Net, inner: Any, **more: Any) -> Constrained:
    """With multipliers that do not move."""
    more = {"penalty": PENALTY, "multiplier_lr": 0.0, "method": "augmented_lagrangian"} | more
    optimizer = Constrained(inner, {"h": net.equality}, {"g": net.inequality}, **more)
    optimizer.multipliers = {"h": Y[0], "g": Y[1]}
    return optimizer


def same(first: nn.Module, second: nn.Module, tolerance: float = 1e-10) -> None:
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", INNER)
def test_it_is_the_term_in_the_loss(name: str, device: torch.device) -> None:
    net, plain = Net(device), Net(device)
    optimizer = wrapped(net, INNER[name](net.parameters()))
    expected = INNER[name](plain.parameters())
    for _ in range(4):
        loss = optimizer.step(net.closure())
        reference = expected.step(plain.closure(plain.lagrangian))
        torch.testing.assert_close(loss, reference, rtol=1e-10, atol=0.0, check_dtype=False)
    same(net, plain)


@pytest.mark.parametrize("name", ["lbfgs", "newton", "adahessian"])
def test_a_closure_without_backward(name: str) -> None:
    net, plain = Net(), Net()
    optimizer = wrapped(net, INNER[name](net.parameters()))
    expected = INNER[name](plain.parameters())
    for _ in range(3):
        optimizer.step(net.loss)
        expected.step(plain.lagrangian)
    same(net, plain)


@pytest.mark.parametrize("compiled", [False, {"backend": "eager"}], ids=["plain", "compiled"])
@pytest.mark.parametrize("name", ["lbfgs", "newton", "adahessian"])
def test_a_function(name: str, compiled: Any) -> None:
    """The constraints take its tree. A compiled function runs uncompiled with them."""
    net, plain = Net(), Net()
    tree = dict(net.named_parameters())

    def function(params: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(net, params, (net.x,)), net.y)

    optimizer = Constrained(
        INNER[name](net.parameters()),
        {"h": lambda params: params["first.weight"].sum() - 1},
        {"g": lambda params: params["second.weight"].square().sum() - 0.5},
        "augmented_lagrangian",
        penalty=PENALTY,
        multiplier_lr=0.0,
    )
    optimizer.multipliers = {"h": Y[0], "g": Y[1]}
    expected = INNER[name](plain.parameters())
    objective = FunctionalObjective(function, tree, compile=compiled)
    for _ in range(3):
        optimizer.step(objective)
        expected.step(plain.closure(plain.lagrangian))
    same(net, plain, 1e-9)


def test_a_function_and_the_method_of_multipliers() -> None:
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = Constrained(
        LBFGS([x]), lambda p: p[0].sum() - 1, lambda p: p[0][0] - 0.2, "augmented_lagrangian"
    )
    objective = FunctionalObjective(lambda p: (p[0] ** 2).sum(), [x])
    for _ in range(20):
        optimizer.step(objective)
    torch.testing.assert_close(x.tolist(), [0.2, 0.8], rtol=1e-7, atol=0.0)
    assert optimizer.multipliers["equalities"].item() == pytest.approx(-1.6, rel=1e-6)


@pytest.mark.parametrize("name", ["adam", "lbfgs", "newton", "sophia"])
def test_a_data_set(name: str) -> None:
    net, plain = Net(), Net()
    loader = [(net.x[:10], net.y[:10]), (net.x[10:], net.y[10:])]
    optimizer = wrapped(net, INNER[name](net.parameters()))
    expected = INNER[name](plain.parameters())
    for _ in range(2):
        optimizer.step(DatasetClosure(net, F.cross_entropy, loader))
        expected.step(plain.closure(plain.lagrangian))
    same(net, plain, 1e-8 if name != "sophia" else 1e-1)


@pytest.mark.parametrize("name", ["adam", "sgd", "sophia"])
def test_a_loop_without_a_closure(name: str) -> None:
    net, plain = Net(), Net()
    optimizer = wrapped(net, INNER[name](net.parameters()))
    expected = INNER[name](plain.parameters())
    for _ in range(4):
        optimizer.zero_grad()
        net.loss().backward()
        optimizer.step()
        expected.zero_grad()
        plain.lagrangian().backward()
        expected.step()
    same(net, plain)
    assert optimizer.info.loss != optimizer.info.loss  # not known
    assert optimizer.info.violation > 0


def test_without_a_closure_batch_constraints_are_refused() -> None:
    net = Net()
    optimizer = Constrained(INNER["adam"](net.parameters()), lambda: net.out.mean())
    net.loss().backward()
    with pytest.raises(RuntimeError, match="constraints have to be functions of the parameters"):
        optimizer.step()


@pytest.mark.parametrize("name", ["adam", "lbfgs", "newton"])
def test_constraints_on_what_the_closure_has_computed(name: str) -> None:
    net, plain = Net(), Net()
    optimizer = Constrained(
        INNER[name](net.parameters()),
        {"h": lambda: net.out[:, 0].mean() - 1},
        {"g": lambda: net.out[:, 1].mean() - 0.5},
        "augmented_lagrangian",
        penalty=PENALTY,
        multiplier_lr=0.0,
    )
    optimizer.multipliers = {"h": Y[0], "g": Y[1]}
    expected = INNER[name](plain.parameters())

    def lagrangian() -> Tensor:
        loss = plain.loss()
        return loss + plain.term(plain.out[:, 0].mean() - 1, plain.out[:, 1].mean() - 0.5)

    for _ in range(3):
        optimizer.step(net.closure())
        expected.step(plain.closure(lagrangian))
    same(net, plain, 1e-9)


def test_several_backward_calls_count_the_constraints_once() -> None:
    net, plain = Net(), Net()
    optimizer = wrapped(net, INNER["adam"](net.parameters()))
    expected = INNER["adam"](plain.parameters())

    def closure() -> Tensor:
        net.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for part in (slice(0, 12), slice(12, 24)):
            loss = F.cross_entropy(net(net.x[part]), net.y[part]) / 2
            loss.backward()
            total += loss.detach()
        return total

    for _ in range(3):
        loss = optimizer.step(closure)
        reference = expected.step(plain.closure(plain.lagrangian))
        torch.testing.assert_close(loss, reference)
    same(net, plain)


@pytest.mark.parametrize("more", [{}, {"retain_graph": True}])
def test_arguments_of_backward(more: dict[str, bool]) -> None:
    net, plain = Net(), Net()
    optimizer = wrapped(net, INNER["sgd"](net.parameters()))
    expected = INNER["sgd"](plain.parameters())

    def closure() -> Tensor:
        net.zero_grad()
        loss = net.loss()
        loss.backward(**more)
        return loss.detach()

    for _ in range(2):
        optimizer.step(closure)
        expected.step(plain.closure(plain.lagrangian))
    same(net, plain)


def test_clipping_in_the_closure_applies_to_the_sum() -> None:
    net, plain = Net(), Net()
    optimizer = wrapped(net, INNER["sgd"](net.parameters()))
    expected = INNER["sgd"](plain.parameters())
    for some, best, loss in ((net, optimizer, net.loss), (plain, expected, plain.lagrangian)):
        plainly = some.closure(loss)

        def closure(some: Net = some, plainly: Any = plainly) -> Tensor:
            value = plainly()
            nn.utils.clip_grad_norm_(some.parameters(), 0.1)
            return value

        best.step(closure)
    same(net, plain)


@pytest.mark.parametrize("order", ["around", "inside"])
@pytest.mark.parametrize("name", ["adam", "lbfgs"])
def test_with_another_wrapper(name: str, order: str) -> None:
    net, plain = Net(), Net()
    inner = INNER[name](net.parameters())
    if order == "inside":
        optimizer: Any = wrapped(net, Contractive(inner, net.first, 0.1))
    else:
        optimizer = Contractive(wrapped(net, inner), net.first, 0.1)
    reference = Contractive(INNER[name](plain.parameters()), plain.first, 0.1)
    for _ in range(3):
        optimizer.step(net.closure())
        reference.step(plain.closure(plain.lagrangian))
    same(net, plain)


def test_wrapped_twice() -> None:
    net, plain = Net(), Net()
    more = {"penalty": PENALTY, "multiplier_lr": 0.0}
    inside = Constrained(INNER["lbfgs"](net.parameters()), {"h": net.equality}, **more)
    method = "augmented_lagrangian"
    inside = Constrained(
        INNER["lbfgs"](net.parameters()), {"h": net.equality}, None, method, **more
    )
    inside.multipliers = {"h": Y[0]}
    outside = Constrained(inside, None, {"g": net.inequality}, method, **more)
    outside.multipliers = {"g": Y[1]}
    expected = INNER["lbfgs"](plain.parameters())
    for _ in range(3):
        outside.step(net.closure())
        expected.step(plain.closure(plain.lagrangian))
    same(net, plain)
    assert outside.info.inner is not None
    outside.load_state_dict(outside.state_dict())
    assert outside.multipliers["g"].item() == Y[1] and inside.multipliers["h"].item() == Y[0]


def test_a_curvature_closure_gets_the_term_as_well() -> None:
    net, plain = Net(), Net()
    optimizer = wrapped(net, NewtonCG(net.parameters(), curvature="hessian"))
    expected = NewtonCG(plain.parameters(), curvature="hessian")

    def part(some: Net) -> Tensor:
        return F.cross_entropy(some(some.x[:8]), some.y[:8])

    optimizer.step(net.closure(), curvature_closure=lambda: part(net))
    expected.step(
        plain.closure(plain.lagrangian),
        curvature_closure=lambda: part(plain) + plain.term(plain.equality(), plain.inequality()),
    )
    same(net, plain)


def test_frozen_parameters_and_groups() -> None:
    net, plain = Net(), Net()
    for some in (net, plain):
        some.second.bias.requires_grad_(False)
    groups = [
        [{"params": n.first.parameters(), "lr": 0.5}, {"params": n.second.parameters()}]
        for n in (net, plain)
    ]
    optimizer = wrapped(net, LBFGS(groups[0], max_iter=3))
    expected = LBFGS(groups[1], max_iter=3)
    for _ in range(3):
        optimizer.step(net.closure())
        expected.step(plain.closure(plain.lagrangian))
    same(net, plain)


def test_buffers_and_random_numbers_stand_still_between_steps() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))
    x = torch.randn(8, 3)
    optimizer = Constrained(
        LBFGS(model.parameters(), max_iter=2),
        lambda: model(x).mean() - 1,
        None,
        "augmented_lagrangian",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    torch.manual_seed(0)
    closure()  # what one evaluation of the closure and its constraints draws
    model(x)
    expected = torch.rand(1)
    model[1].reset_running_stats()
    torch.manual_seed(0)
    optimizer.step(closure)
    assert torch.equal(torch.rand(1), expected) and model[1].num_batches_tracked == 2
