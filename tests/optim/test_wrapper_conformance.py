"""Promises of the wrappers that keep constraints, around several optimizers."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from torch_secondorder import (
    BFGS,
    LBFGS,
    AdaHessian,
    Constrained,
    FunctionalObjective,
    LevenbergMarquardt,
    Newton,
    NewtonCG,
    NonlinearCG,
    Projected,
    Sophia,
    StepStatus,
)
from torch_secondorder._optim.flat import FlatOptimizer
from torch_secondorder.constraints import Box, NormBall, UnitNorm

#: The optimizers inside, with numbers that make progress in a few steps.
INNER: dict[str, Callable[..., Any]] = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.5),
    "Adam": partial(torch.optim.Adam, lr=0.05),
    "torch.LBFGS": partial(
        torch.optim.LBFGS, line_search_fn="strong_wolfe", max_iter=4, history_size=5
    ),
    "LBFGS": partial(LBFGS, max_iter=4),
    "BFGS": partial(BFGS, max_iter=4),
    "NonlinearCG": partial(NonlinearCG, max_iter=4),
    "Newton": partial(Newton, max_iter=2),
    "NewtonCG": partial(NewtonCG, max_cg_iter=10),
    "LevenbergMarquardt": partial(LevenbergMarquardt, damping=1.0),
    "AdaHessian": partial(AdaHessian, lr=0.05),
    "Sophia": partial(Sophia, lr=0.01),
}
#: Those that take gradients which are there already.
WITHOUT_CLOSURE = ["SGD", "Adam", "AdaHessian", "Sophia"]
#: Those that make several evaluations in a step.
ITERATING = [name for name in INNER if name not in WITHOUT_CLOSURE]
OURS = [name for name in INNER if name not in ("SGD", "Adam", "torch.LBFGS")]
#: The penalty is no sum of residuals, and this one says so.
pytestmark = pytest.mark.filterwarnings("ignore:a term of the loss is in none of the residuals")


class Net(nn.Module):
    """A small classifier with its data, and constraints on its weights and on its outputs."""

    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
        layers: tuple[nn.Module, ...] = (),
    ) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), *layers, nn.Linear(6, 3))
        self.to(device, dtype)
        self.x = torch.randn(12, 4).to(device, dtype)
        self.y = torch.randint(3, (12,)).to(device)
        torch.manual_seed(6)

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.x).float(), self.y)

    def centred(self) -> Tensor:  # an equality
        return self.model[-1].bias.sum() - 0.3

    def short(self) -> Tensor:  # inequalities, of which some are violated at the start
        return self.model[0].weight.square().sum(1) - 0.25

    def fair(self) -> Tensor:  # on the outputs
        p = self.model(self.x).float().softmax(-1).mean(0)
        return p[0] - p[1]

    def closure(self, loss: Callable[[], Tensor] | None = None) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            self.zero_grad()
            value = (loss or self.loss)()
            value.backward()
            return value

        return closure

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters()]

    def violation(self) -> float:
        with torch.no_grad():
            return max(self.centred().abs().item(), self.short().max().item())


def constrained(inner: Any, net: Net) -> Constrained:
    return Constrained(
        inner, equalities=net.centred, inequalities={"short": net.short}, penalty=10.0
    )


def sets_of(inner: Any, net: Net) -> list[tuple[Tensor, Any]]:
    """Sets that the optimizer takes; the parameters go there."""
    rows = Box(-0.3, 0.3) if isinstance(inner, LevenbergMarquardt) else UnitNorm(dim=1)
    sets: list[tuple[Tensor, Any]] = [(net.model[0].weight, rows)]
    if not isinstance(inner, FlatOptimizer):
        sets.append((net.model[-1].weight, NormBall(0.5, dim=1)))
    with torch.no_grad():
        for p, found in sets:
            p.copy_(found.project(p))
    return sets


def projected(inner: Any, net: Net) -> Projected:
    return Projected(inner, sets_of(inner, net))


WRAPPERS: dict[str, Callable[[Any, Net], Any]] = {
    "Constrained": constrained,
    "Projected": projected,
}


@pytest.fixture(params=WRAPPERS)
def make(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Makes an optimizer by its name, in the wrapper under test."""

    def make(name: str, net: Net, groups: Any = None, **arguments: Any) -> Any:
        inner = INNER[name](groups or net.parameters(), **arguments)
        return WRAPPERS[request.param](inner, net)

    make.constrains = request.param == "Constrained"
    return make


def identical(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def multipliers(optimizer: Any) -> list[Tensor]:
    if isinstance(optimizer, Projected):
        return []
    return [value.clone() for value in optimizer.multipliers.values()]


def run(optimizer: Any, net: Net, steps: int = 3) -> list[Tensor]:
    for _ in range(steps):
        optimizer.step(net.closure())
    return [*net.values(), *multipliers(optimizer)]


inside = pytest.mark.parametrize("name", INNER)
ours = pytest.mark.parametrize("name", OURS)


@inside
def test_the_loss_goes_down_and_the_constraints_are_kept(
    make: Any, name: str, device: torch.device
) -> None:
    net = Net(device)
    optimizer = make(name, net)
    assert optimizer.info is None
    loss, violation = net.loss().item(), net.violation()
    run(optimizer, net, 20 if name in ITERATING else 60)
    assert net.loss().item() < loss
    assert optimizer.info is not None
    if make.constrains:
        assert net.violation() < (0.1 if name in ITERATING else 0.5) * violation
        assert set(optimizer.multipliers) == {"equalities", "short"}
        assert (optimizer.multipliers["short"] >= 0).all()
        assert math.isfinite(optimizer.info.loss)
    else:
        assert optimizer.info.violation < 1e-12


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_checkpoint_goes_on_bit_for_bit(make: Any, name: str, dtype: torch.dtype) -> None:
    net = Net(dtype=dtype, layers=(nn.Dropout(0.2),))
    optimizer = make(name, net)
    run(optimizer, net)
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict(), torch.get_rng_state()), file)
    file.seek(0)
    expected = run(optimizer, net)
    other = Net(dtype=dtype, layers=(nn.Dropout(0.2),))
    resumed = make(name, other)
    weights, state, random = torch.load(file, weights_only=True)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    torch.set_rng_state(random)
    assert identical(run(resumed, other), expected)
    assert resumed.info == optimizer.info


@inside
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_goes_its_own_way(make: Any, name: str, way: str) -> None:
    if name == "torch.LBFGS":
        pytest.skip("has no copies: its list of parameters stays behind")
    net = Net()
    optimizer = make(name, net)
    run(optimizer, net, 1)
    pair = net, optimizer
    twin, copied = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    before = [*net.values(), *multipliers(optimizer)]
    random = torch.get_rng_state()
    ended = run(copied, twin, 2)
    assert identical([*net.values(), *multipliers(optimizer)], before)
    torch.set_rng_state(random)
    assert identical(run(optimizer, net, 2), ended)


@ours
def test_maximize_is_minimizing_the_negative(make: Any, name: str) -> None:
    if name == "LevenbergMarquardt":
        pytest.skip("refuses to maximize")
    net, other = Net(), Net()
    expected = run(make(name, net), net)
    optimizer = make(name, other, maximize=True)
    for _ in range(3):
        optimizer.step(other.closure(lambda: -other.loss()))
    assert identical([*other.values(), *multipliers(optimizer)], expected)


@inside
def test_groups_have_their_own_rate(make: Any, name: str) -> None:
    if name == "torch.LBFGS":
        pytest.skip("has no groups")
    net = Net()
    first, last = net.model[0], net.model[-1]
    groups = [{"params": first.parameters(), "lr": 0.0}, {"params": last.parameters()}]
    optimizer = make(name, net, groups)
    before = net.values()
    run(optimizer, net)
    torch.testing.assert_close(net.values()[:2], before[:2], rtol=0, atol=1e-15)
    assert not identical(before[2:], net.values()[2:])


@ours
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_loss_that_is_not_finite(make: Any, name: str, steps_before: int) -> None:
    net = Net()
    optimizer = make(name, net)
    run(optimizer, net, steps_before)
    before = [*net.values(), *multipliers(optimizer)]
    optimizer.step(net.closure(lambda: net.loss() * math.nan))
    assert optimizer.info.inner.status is StepStatus.NONFINITE_START
    after = [*net.values(), *multipliers(optimizer)]
    assert identical(after[: len(before)], before)
    assert all(value.isfinite().all() for value in after)
    loss, violation = net.loss().item(), net.violation()
    run(optimizer, net, 10)
    if make.constrains:
        assert net.violation() < violation
    else:
        assert net.loss().item() < loss


@inside
@pytest.mark.parametrize("steps_before", [0, 2])
def test_an_exception_leaves_parameters_and_multipliers(
    make: Any, name: str, steps_before: int
) -> None:
    net = Net(layers=(nn.BatchNorm1d(6),))
    optimizer = make(name, net)
    run(optimizer, net, steps_before)
    before = [*net.values(), *multipliers(optimizer)]
    buffers = [b.clone() for b in net.buffers()]

    def broken() -> Tensor:
        net.closure()()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        optimizer.step(broken)
    after = [*net.values(), *multipliers(optimizer)]
    assert identical(after[: len(before)], before)
    if name in OURS:
        assert identical(list(net.buffers()), buffers)
    run(optimizer, net, 1)
    assert not identical(net.values(), before[: len(net.values())])


@pytest.mark.parametrize("name", WITHOUT_CLOSURE)
def test_a_loop_without_a_closure(make: Any, name: str) -> None:
    net, other = Net(), Net()
    expected = run(make(name, net), net, 5)
    optimizer = make(name, other)
    for _ in range(5):
        other.closure()()
        optimizer.step()
    if name in ("SGD", "Adam") or not make.constrains:
        # The curvature of constraints is not seen here.
        found = [*other.values(), *multipliers(optimizer)]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    if make.constrains:
        run(optimizer, other, 100)
        assert other.violation() < 0.1
    else:
        assert optimizer.info.violation < 1e-12


@ours
def test_a_function_in_place_of_the_closure(make: Any, name: str) -> None:
    net, other = Net(), Net()
    prefixed = dict(other.named_parameters())

    def called(function: Callable[[Net], Tensor]) -> Callable[[dict[str, Tensor]], Tensor]:
        return lambda tree: function(_Functional(other, tree))

    optimizer = make(name, other)
    if make.constrains:
        optimizer = Constrained(
            INNER[name](other.parameters()),
            equalities=called(lambda n: n.model[-1].bias.sum() - 0.3),
            inequalities={"short": called(lambda n: n.model[0].weight.square().sum(1) - 0.25)},
            penalty=10.0,
        )
    objective = FunctionalObjective(called(lambda n: n.loss()), prefixed)
    for _ in range(3):
        optimizer.step(objective)
    found, expected = [*other.values(), *multipliers(optimizer)], run(make(name, net), net)
    # Beside a function, estimates of the curvature are those along the set.
    if make.constrains or name not in ("AdaHessian", "Sophia"):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


class _Functional:
    """A network whose parameters are those of a tree."""

    def __init__(self, net: Net, tree: dict[str, Tensor]) -> None:
        first = _Layer(tree["model.0.weight"], tree["model.0.bias"])
        self.model = [first, _Layer(tree["model.2.weight"], tree["model.2.bias"])]
        self._net, self._tree = net, tree

    def loss(self) -> Tensor:
        short = {name.removeprefix("model."): value for name, value in self._tree.items()}
        logits = functional_call(self._net.model, short, self._net.x)
        return F.cross_entropy(logits.float(), self._net.y)


class _Layer:
    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias


@inside
@pytest.mark.parametrize("outer", [True, False])
def test_a_scheduler(make: Any, name: str, outer: bool) -> None:
    net = Net()
    optimizer = make(name, net)
    rate = optimizer.param_groups[0]["lr"]
    scheduled = optimizer if outer else optimizer.optimizer
    scheduler = torch.optim.lr_scheduler.StepLR(scheduled, step_size=1, gamma=0.5)
    for _ in range(4):
        run(optimizer, net, 1)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate / 16)


@inside
def test_statistics_move_once_and_masks_stay_within_a_step(name: str) -> None:
    """Although the constraints call the model too, for their values at the end."""
    net = Net(layers=(nn.BatchNorm1d(6), nn.Dropout(0.3)))
    optimizer = Constrained(INNER[name](net.parameters()), inequalities=net.fair)
    reference = Net(layers=(nn.BatchNorm1d(6), nn.Dropout(0.3)))
    other = INNER[name](reference.parameters())
    draws: list[list[float]] = []

    def loss() -> Tensor:
        value = net.loss()
        draws[-1].append(torch.rand(()).item())
        return value

    for step in range(1, 4):
        draws.append([])
        optimizer.step(net.closure(loss))
        other.step(reference.closure())
        if name in OURS:
            assert len(set(draws[-1])) == 1
            # One pass for the loss and one for the constraints.
            assert int(net.model[2].num_batches_tracked) == 2 * step
    assert len({row[0] for row in draws}) == 3


@pytest.mark.parametrize("name", ["Adam", "LBFGS", "NonlinearCG", "NewtonCG", "AdaHessian"])
def test_no_tensor_outlives_a_step(make: Any, name: str) -> None:
    net = Net()
    optimizer = make(name, net)
    closure = net.closure()
    for _ in range(12):  # until buffers have grown to their full size
        optimizer.step(closure)
    counts = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            for _ in range(3):
                optimizer.step(closure)
            # But for what goes on to the next step.
            kept = sum(isinstance(v, Tensor) for v in tree_leaves(optimizer.state_dict()))
            counts.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()) - kept)
    finally:
        gc.enable()
    assert counts[-1] <= counts[0] + 1  # within a few steps, a leak adds more
    assert all(p.grad is None or p.grad.grad_fn is None for p in net.parameters())


@inside
def test_a_step_under_no_grad(make: Any, name: str) -> None:
    net, other = Net(), Net()
    expected = run(make(name, net), net)
    with torch.no_grad():
        optimizer = make(name, other)
        for _ in range(3):
            optimizer.step(torch.enable_grad()(other.closure()))
    assert identical([*other.values(), *multipliers(optimizer)], expected)


@ours
def test_a_step_under_autocast_is_one_with_autocast_in_the_closure(make: Any, name: str) -> None:
    inside, around = Net(dtype=torch.float32), Net(dtype=torch.float32)

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return inside.loss()

    optimizer = make(name, inside)
    for _ in range(3):
        optimizer.step(inside.closure(loss))
    expected = [*inside.values(), *multipliers(optimizer)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert identical(run(make(name, around), around), expected)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdaHessian", "Sophia"])
def test_a_gradient_scaler(make: Any, name: str) -> None:
    """Without a closure the scale is taken out before the constraints come in."""
    net = Net()
    optimizer = make(name, net)
    for _ in range(4):
        net.closure()()
        optimizer.step()
    other = Net()
    scaled, scaler = make(name, other), torch.amp.GradScaler("cpu", init_scale=256.0)
    for _ in range(4):
        other.zero_grad()
        scaler.scale(other.loss()).backward()
        scaler.step(scaled)
        scaler.update()
    torch.testing.assert_close(other.values(), net.values(), rtol=1e-8, atol=1e-10)
    before = [*other.values(), *multipliers(scaled)]
    other.zero_grad()
    scaler.scale(other.loss() * math.inf).backward()
    scaler.step(scaled)  # finds infinity, and skips
    scaler.update()
    assert identical([*other.values(), *multipliers(scaled)], before)
    assert scaler.get_scale() == 128.0


def test_a_gradient_scaler_and_a_closure_are_refused(make: Any) -> None:
    net = Net()
    optimizer, scaler = make("LBFGS", net), torch.amp.GradScaler("cpu")
    before = net.values()
    scaler.scale(net.loss()).backward()
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        scaler.step(optimizer, net.closure())
    assert identical(net.values(), before)
