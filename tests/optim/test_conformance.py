"""Promises of every optimizer.

An optimizer in `torch_secondorder.__all__` is found by itself, as are those of the documentation.
For one of your own: `pytest tests/optim/test_conformance.py --optimizer mypackage:MyOptimizer`.
"""

from __future__ import annotations

import copy
import gc
import importlib
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import torch_secondorder
from tests.support.documented import module_of
from tests.support.small_optimizers import Kronecker
from torch_secondorder import FunctionalObjective, SecondOrderOptimizer, StepInfo, StepStatus

#: What an optimizer needs in order to make progress here, where its defaults do not do.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "DenseBFGS": {"max_iter": 3},
    "LBFGS": {"max_iter": 3},
    "NonlinearCG": {"max_iter": 3},
    "Shampoo": {"lr": 0.03},
    "SOAP": {"lr": 0.03},
    "Sophia": {"lr": 0.03},
    "sparse_lbfgs": {"max_iter": 3},
}
#: Optimizers whose weight decay moves the parameters, as in AdamW, instead of joining the loss.
DECOUPLED = {"AdaHessian", "KFAC", "SOAP", "Shampoo", "Sophia"}

#: Optimizers that refuse `maximize`: a sum of squares has no maximum.
ONLY_MINIMIZES = {"LevenbergMarquardt"}


def concrete_optimizers() -> list[type[SecondOrderOptimizer]]:
    public = (getattr(torch_secondorder, name) for name in torch_secondorder.__all__)
    return [
        thing
        for thing in public
        if isinstance(thing, type)
        and issubclass(thing, SecondOrderOptimizer)
        and not any(
            getattr(getattr(thing, name), "__isabstractmethod__", False) for name in dir(thing)
        )
    ]


def documented_optimizers() -> list[Callable[..., Any]]:
    blocks = [module_of("adding_an_optimizer", block) for block in (0, 2, 3)]
    return [blocks[0].DenseBFGS, blocks[1].DiagonalNewton, blocks[2].sparse_lbfgs]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs each test for the optimizer named on the command line, or for all of ours."""
    if "kind" not in metafunc.fixturenames:
        return
    kinds = [*concrete_optimizers(), *documented_optimizers(), Kronecker]
    if named := metafunc.config.getoption("--optimizer", None):
        module, _, name = named.partition(":")
        kinds = [getattr(importlib.import_module(module), name)]
    metafunc.parametrize("kind", kinds, ids=[kind.__name__ for kind in kinds])


@pytest.fixture
def make(kind: Any) -> Callable[..., Any]:
    """Makes an optimizer of the kind under test."""

    def make(params: Any, **more: Any) -> SecondOrderOptimizer:
        return kind(params, **(ARGUMENTS.get(kind.__name__, {}) | more))

    make.only_minimizes = kind.__name__ in ONLY_MINIMIZES
    make.decoupled = kind.__name__ in DECOUPLED or getattr(kind, "decoupled", False)
    return make


class Net:
    """A small classifier, its data and a standard closure."""

    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
        layers: tuple[nn.Module, ...] = (),
    ) -> None:
        torch.manual_seed(5)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), *layers, nn.Linear(6, 3))
        self.model.to(device, dtype)
        self.x = torch.randn(12, 4).to(device, dtype)
        self.y = torch.randint(3, (12,)).to(device)
        torch.manual_seed(6)

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.x).float(), self.y)

    def closure(self, loss: Callable[[], Tensor] | None = None) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            self.model.zero_grad()
            value = (loss or self.loss)()
            value.backward()
            return value

        return closure

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def identical(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def assert_close(first: list[Tensor], second: list[Tensor], tolerance: float) -> None:
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def trained(make: Callable, net: Net, steps: int = 3, **arguments: Any) -> list[Tensor]:
    optimizer = make(net.model.parameters(), **arguments)
    for _ in range(steps):
        optimizer.step(net.closure())
    return net.values()


def test_there_are_optimizers_to_test() -> None:
    assert torch_secondorder.LBFGS in concrete_optimizers()
    assert SecondOrderOptimizer not in concrete_optimizers()
    kinds = [*concrete_optimizers(), *documented_optimizers()]
    assert set(ARGUMENTS) <= {kind.__name__ for kind in kinds}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_goes_down_and_the_report_says_so(
    make: Callable, dtype: torch.dtype, device: torch.device
) -> None:
    net = Net(device, dtype)
    optimizer = make(net.model.parameters())
    assert optimizer.info is None
    before = net.loss().item()
    for _ in range(20):
        loss = optimizer.step(net.closure())
        info = optimizer.info
        assert isinstance(info, StepInfo)
        assert isinstance(info.status, StepStatus)
        assert info.loss == loss.item()
        assert info.evaluations >= 1
        assert not loss.requires_grad
    assert net.loss().item() < 0.9 * before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_checkpoint_goes_on_bit_for_bit(
    make: Callable, dtype: torch.dtype, device: torch.device
) -> None:
    net = Net(device, dtype, (nn.Dropout(0.2),))
    optimizer = make(net.model.parameters())
    for _ in range(3):
        optimizer.step(net.closure())
    file = io.BytesIO()
    torch.save((net.model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    random = torch.get_rng_state()
    on_device = torch.cuda.get_rng_state() if device.type == "cuda" else None
    for _ in range(3):
        optimizer.step(net.closure())
    other = Net(device, dtype, (nn.Dropout(0.2),))
    resumed = make(other.model.parameters())
    weights, state = torch.load(file, weights_only=True)
    other.model.load_state_dict(weights)
    resumed.load_state_dict(state)
    again = resumed.state_dict()["param_groups"]
    assert [group.keys() for group in again] == [group.keys() for group in state["param_groups"]]
    torch.set_rng_state(random)
    if on_device is not None:
        torch.cuda.set_rng_state(on_device)
    for _ in range(3):
        resumed.step(other.closure())
    assert identical(net.values(), other.values())


def test_a_copy_goes_its_own_way(make: Callable) -> None:
    net = Net()
    optimizer = make(net.model.parameters())
    optimizer.step(net.closure())
    twin, copied = copy.deepcopy((net, optimizer))
    before = net.values()
    random = torch.get_rng_state()
    copied.step(twin.closure())
    assert identical(net.values(), before)
    torch.set_rng_state(random)
    optimizer.step(net.closure())
    assert identical(net.values(), twin.values())
    assert optimizer.info == copied.info


def test_weight_decay_is_a_penalty(make: Callable, device: torch.device) -> None:
    if make.decoupled:
        pytest.skip("decoupled weight decay")
    net, other = Net(device), Net(device)
    decayed = trained(make, net, weight_decay=0.3)

    def penalized() -> Tensor:
        return other.loss() + 0.15 * sum(p.square().sum() for p in other.model.parameters())

    optimizer = make(other.model.parameters())
    for _ in range(3):
        optimizer.step(other.closure(penalized))
    assert_close(decayed, other.values(), 1e-8)


def test_decoupled_weight_decay_shrinks_by_the_rate(make: Callable, device: torch.device) -> None:
    if not make.decoupled:
        pytest.skip("weight decay is a penalty")
    plain, decayed = Net(device), Net(device)
    before = plain.values()
    trained(make, plain, 1, lr=0.1)
    trained(make, decayed, 1, lr=0.1, weight_decay=0.3)
    for old, a, b in zip(before, plain.values(), decayed.values(), strict=True):
        torch.testing.assert_close(a - b, 0.1 * 0.3 * old, rtol=1e-10, atol=1e-14)


def test_maximize_is_minimizing_the_negative(make: Callable, device: torch.device) -> None:
    if make.only_minimizes:
        pytest.skip("refuses to maximize")
    net, other = Net(device), Net(device)
    expected = trained(make, net)
    optimizer = make(other.model.parameters(), maximize=True)
    for _ in range(3):
        optimizer.step(other.closure(lambda: -other.loss()))
    assert identical(expected, other.values())


def test_groups_have_their_own_rate_and_decay(make: Callable, device: torch.device) -> None:
    net = Net(device)
    first, last = net.model[0], net.model[-1]
    groups = [
        {"params": first.parameters(), "lr": 0.0},
        {"params": last.parameters(), "weight_decay": 5.0 if make.decoupled else 1e3},
    ]
    before = net.values()
    optimizer = make(groups)
    for _ in range(3):
        optimizer.step(net.closure())
    after = net.values()
    assert identical(before[:2], after[:2])
    assert not identical(before[2:], after[2:])
    without = Net(device)
    trained(make, without)
    assert last.weight.norm() < min(before[2].norm(), without.model[-1].weight.norm())


def test_a_single_group_is_the_plain_list(make: Callable) -> None:
    net, other = Net(), Net()
    optimizer = make([{"params": [p]} for p in other.model.parameters()])
    for _ in range(3):
        optimizer.step(other.closure())
    assert identical(trained(make, net), other.values())


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_start_that_is_not_finite(
    make: Callable, steps_before: int, device: torch.device
) -> None:
    net = Net(device)
    optimizer = make(net.model.parameters())
    for _ in range(steps_before):
        optimizer.step(net.closure())
    before = net.values()
    optimizer.step(net.closure(lambda: net.loss() * math.nan))
    assert identical(net.values(), before)
    assert optimizer.info.status is StepStatus.NONFINITE_START
    loss = net.loss().item()
    for _ in range(5):
        optimizer.step(net.closure())
    assert net.loss().item() < loss


@pytest.mark.parametrize("steps_before", [0, 2])
def test_an_exception_leaves_the_parameters(make: Callable, steps_before: int) -> None:
    net = Net(layers=(nn.BatchNorm1d(6),))
    optimizer = make(net.model.parameters())
    for _ in range(steps_before):
        optimizer.step(net.closure())
    before, buffers = net.values(), [b.clone() for b in net.model.buffers()]

    def broken() -> Tensor:
        net.closure()()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        optimizer.step(broken)
    assert identical(net.values(), before)
    assert identical(list(net.model.buffers()), buffers)
    optimizer.step(net.closure())
    assert not identical(net.values(), before)


def test_a_step_without_a_closure(make: Callable) -> None:
    net = Net()
    before = net.values()
    with pytest.raises(RuntimeError, match=r"closure(.|\n)*loss\.backward\("):
        make(net.model.parameters()).step()
    assert identical(net.values(), before)


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_bad_numbers(make: Callable, name: str, value: float) -> None:
    net = Net()
    with pytest.raises(ValueError, match=f"{name} must be .*{value}"):
        make(net.model.parameters(), **{name: value})
    with pytest.raises(ValueError, match=f"{name} must be .*{value}"):
        make([{"params": net.model.parameters(), name: value}])


def test_a_function_in_place_of_the_closure(make: Callable, device: torch.device) -> None:
    net, other = Net(device), Net(device)
    optimizer = make(other.model.parameters(), weight_decay=0.01)

    def function(params: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(other.model, params, other.x).float(), other.y)

    objective = FunctionalObjective(function, dict(other.model.named_parameters()))
    for _ in range(3):
        optimizer.step(objective)
    assert_close(trained(make, net, weight_decay=0.01), other.values(), 1e-12)


def test_a_scheduler(make: Callable) -> None:
    net = Net()
    optimizer = make(net.model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    before, rate = net.loss().item(), optimizer.param_groups[0]["lr"]
    for _ in range(4):
        optimizer.step(net.closure())
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate / 16)
    assert net.loss().item() < before


def test_statistics_move_once_and_masks_stay_within_a_step(
    make: Callable, device: torch.device
) -> None:
    net = Net(device, layers=(nn.BatchNorm1d(6), nn.Dropout(0.3)))
    optimizer = make(net.model.parameters())
    draws: list[list[float]] = []

    def loss() -> Tensor:
        value = net.loss()
        draws[-1].append(torch.rand((), device=device).item())
        return value

    for step in range(1, 5):
        draws.append([])
        optimizer.step(net.closure(loss))
        assert int(net.model[2].num_batches_tracked) == step
        assert len(draws[-1]) == optimizer.info.evaluations
        assert len(set(draws[-1])) == 1
    assert len({row[0] for row in draws}) == 4


def test_no_tensor_outlives_a_step(make: Callable) -> None:
    net = Net()
    optimizer = make(net.model.parameters())
    closure = net.closure()
    counts = []
    for _ in range(30):  # until buffers have grown to their full size
        optimizer.step(closure)
    gc.collect()
    gc.disable()  # a cycle that only the collector frees would keep memory growing
    try:
        for _ in range(3):
            for _ in range(5):
                optimizer.step(closure)
            # But for what goes on to the next step, where there is any: a solution to begin with
            # is kept only if the last step was accepted.
            kept = sum(isinstance(v, Tensor) for v in tree_leaves(optimizer.state_dict()))
            alive = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
            counts.append(alive - kept)
    finally:
        gc.enable()
    assert len(set(counts)) == 1
    assert all(p.grad is None or p.grad.grad_fn is None for p in net.model.parameters())


def test_a_step_under_no_grad(make: Callable) -> None:
    net, other = Net(), Net()
    expected = trained(make, net)
    with torch.no_grad():
        assert identical(trained(make, other), expected)


def test_a_step_under_autocast_is_one_with_autocast_in_the_closure(
    make: Callable, device: torch.device
) -> None:
    """Products and directions keep their precision."""
    inside, around = Net(device, torch.float32), Net(device, torch.float32)

    def loss() -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return inside.loss()

    optimizer = make(inside.model.parameters())
    for _ in range(3):
        optimizer.step(inside.closure(loss))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert identical(trained(make, around), inside.values())
