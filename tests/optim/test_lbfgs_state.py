"""L-BFGS: checkpoints, copies, hooks, and the errors that bad input gets."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.closures import rosenbrock, standard, start_at
from tests.support.oracles import make_case
from torch_secondorder import LBFGS, StepStatus
from torch_secondorder.globalization import HagerZhang


def saved(*states: dict[str, Any]) -> Any:
    """Through a file, as a checkpoint goes."""
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Training:
    """A small network with dropout, its data and its optimizer."""

    def __init__(self, dtype: torch.dtype, device: torch.device, **arguments: Any) -> None:
        torch.manual_seed(4)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)).to(
            device, dtype
        )
        self.x = torch.randn(16, 4).to(device, dtype)
        self.y = torch.randint(3, (16,)).to(device)
        self.optimizer = LBFGS(self.model.parameters(), tolerance_grad=0, **arguments)

    def steps(self, count: int) -> list[Any]:
        """The losses and the parameters after each step."""
        path = []
        closure = standard(
            self.optimizer, lambda: F.cross_entropy(self.model(self.x).float(), self.y)
        )
        for _ in range(count):
            self.optimizer.step(closure)
            path.append((self.optimizer.info.loss, self.optimizer.info.loss_after))
            path.extend(p.tolist() for p in self.model.parameters())
        return path

    def state(self) -> Any:
        return saved(self.model.state_dict(), self.optimizer.state_dict())

    def load(self, state: Any) -> None:
        self.model.load_state_dict(state[0])
        self.optimizer.load_state_dict(state[1])


# Checkpoints.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "arguments",
    [
        {"history_size": 3, "max_iter": 3, "max_eval": 50},
        {"max_iter": 2, "max_eval": 50},
        {"max_iter": 2, "line_search_fn": None, "lr": 0.1},
        {"max_iter": 1, "maximize": False, "weight_decay": 1e-3, "powell_damping": True},
        {"max_iter": 3, "max_eval": 50, "update": "ssbroyden", "history_size": 4},
    ],
    ids=["wrapped", "growing", "fixed steps", "all options", "ssbroyden"],
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    arguments: dict, dtype: torch.dtype, device: torch.device
) -> None:
    original = Training(dtype, device, **arguments)
    original.steps(3)
    state, random = original.state(), torch.get_rng_state()
    on_device = torch.cuda.get_rng_state() if device.type == "cuda" else None
    expected = original.steps(4)
    kept = {name: arguments[name] for name in ("line_search_fn", "update") if name in arguments}
    resumed = Training(dtype, device, **kept)
    resumed.steps(1)  # must not survive
    resumed.load(state)
    torch.set_rng_state(random)
    if on_device is not None:
        torch.cuda.set_rng_state(on_device)
    assert resumed.steps(4) == expected


def test_a_relative_tolerance_survives_a_checkpoint() -> None:
    """The largest gradient, which it is relative to, was seen long before."""
    x = start_at(-1.2, 1.0)
    optimizer, resumed = (LBFGS([x], max_iter=200, max_eval=400) for _ in range(2))
    for _ in range(2):
        optimizer.step(standard(optimizer, lambda: 1e-6 * rosenbrock(x)))
    assert (optimizer.info.status, optimizer.info.iterations) == (
        StepStatus.CONVERGED_GRADIENT,
        0,
    )
    resumed.load_state_dict(saved(optimizer.state_dict())[0])
    resumed.step(standard(resumed, lambda: 1e-6 * rosenbrock(x)))
    assert resumed.info == optimizer.info


def test_saving_changes_nothing() -> None:
    plain, saving = (Training(torch.float32, torch.device("cpu"), max_iter=3) for _ in range(2))
    torch.manual_seed(0)
    expected = plain.steps(6)
    torch.manual_seed(0)
    path = []
    for _ in range(6):
        path += saving.steps(1)
        saving.state()
    assert path == expected


def test_a_checkpoint_before_the_first_step() -> None:
    fresh, other = (Training(torch.float32, torch.device("cpu")) for _ in range(2))
    other.steps(2)
    other.load(fresh.state())
    torch.manual_seed(0)
    expected = fresh.steps(2)
    torch.manual_seed(0)
    assert other.steps(2) == expected


def test_hyperparameters_are_loaded() -> None:
    x = start_at(-1.2, 1.0)
    source = LBFGS([x], lr=0.25, max_iter=3, max_eval=17, history_size=7, weight_decay=0.1)
    target = LBFGS([x])
    target.load_state_dict(saved(source.state_dict())[0])
    for name, value in source.param_groups[0].items():
        assert target.param_groups[0][name] is value or target.param_groups[0][name] == value


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rate", [1e-3, 0.0])
def test_a_state_of_another_shape_is_refused(dtype: torch.dtype, rate: float) -> None:
    """A rate of zero leaves no pair, only the master copy."""
    small, large = (nn.Parameter(torch.ones(n, dtype=dtype)) for n in (3, 5))
    source = LBFGS([small], lr=rate, max_iter=2, line_search_fn=None)
    source.step(standard(source, lambda: (small.double() ** 4).sum()))
    target = LBFGS([large], lr=1e-3, max_iter=2, line_search_fn=None)
    closure = standard(target, lambda: (large.double() ** 4).sum())
    for _ in range(5):
        target.step(closure)
    twin = copy.deepcopy(target)
    if rate or dtype == torch.bfloat16:
        with pytest.raises(ValueError, match=r"3 .*5"):
            target.load_state_dict(saved(source.state_dict())[0])
        assert target.param_groups[0]["lr"] == 1e-3
        assert large.tolist() == twin.param_groups[0]["params"][0].tolist()
    other = twin.param_groups[0]["params"][0]
    target.step(closure)
    if rate or dtype == torch.bfloat16:
        twin.step(standard(twin, lambda: (other.double() ** 4).sum()))
        assert target.info == twin.info


def test_a_state_with_another_number_of_parameters_is_refused() -> None:
    x, z = start_at(-1.2, 1.0), start_at(0.0)
    optimizer = LBFGS([x], max_iter=3)
    optimizer.step(standard(optimizer, lambda: rosenbrock(x)))
    with pytest.raises(ValueError, match="size of optimizer's group"):
        optimizer.load_state_dict(LBFGS([x, z]).state_dict())
    optimizer.step(standard(optimizer, lambda: rosenbrock(x)))
    assert not optimizer.info.history_reset


def test_a_checkpoint_of_torch_goes_on(device: torch.device) -> None:
    x = start_at(-1.2, 1.0, device=device)
    theirs = torch.optim.LBFGS([x], max_iter=6, line_search_fn="strong_wolfe")
    before = theirs.step(standard(theirs, lambda: rosenbrock(x)))
    ours = LBFGS([x])
    state = saved(theirs.state_dict())[0]
    pairs = len(state["state"][0]["old_dirs"])
    ours.load_state_dict(state)
    assert (ours.param_groups[0]["max_iter"], ours.param_groups[0]["tolerance_grad"]) == (6, 1e-7)
    assert ours._inverse.count == pairs > 0
    s, y = state["state"][0]["old_stps"][-1], state["state"][0]["old_dirs"][-1]
    torch.testing.assert_close(ours._inverse @ y, s, rtol=1e-8, atol=1e-10)
    # The history serves: a full step along the first direction is accepted.
    ours.param_groups[0].update(max_iter=200, max_eval=400)
    ours.step(standard(ours, lambda: rosenbrock(x)))
    assert ours.info.loss < before
    assert ours.info.status is StepStatus.CONVERGED_GRADIENT
    assert not ours.info.history_reset
    # What only torch knows is not carried on.
    assert set(ours.state_dict()["state"][0]) == set(LBFGS([x]).state_dict()["state"][0])


@pytest.mark.parametrize("all_frozen", [False, True])
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
    ids=["deepcopy", "pickle"],
)
def test_copies_keep_state_and_line_search(duplicate: Callable, all_frozen: bool) -> None:
    x = start_at(-1.2, 1.0)
    optimizer = LBFGS([x], max_iter=4, max_eval=50, line_search_fn=HagerZhang(sigma=0.5))
    optimizer.step(standard(optimizer, lambda: rosenbrock(x)))
    x.requires_grad_(not all_frozen)
    z, twin = duplicate((x, optimizer))
    assert twin.param_groups[0]["params"][0] is z
    x.requires_grad_()
    z.requires_grad_()
    assert twin.line_search == HagerZhang(sigma=0.5)
    assert twin.info == optimizer.info
    for _ in range(3):
        optimizer.step(standard(optimizer, lambda: rosenbrock(x)))
        twin.step(standard(twin, lambda: rosenbrock(z)))
        assert torch.equal(x, z)
        assert twin.info == optimizer.info


def test_a_pickle_of_the_last_release_keeps_the_float32_copy() -> None:
    x = start_at(-1.2, 1.0).bfloat16().detach().requires_grad_()
    optimizer = LBFGS([x], max_iter=4)
    optimizer.step(standard(optimizer, lambda: rosenbrock(x)))
    old = optimizer.__getstate__()
    master = old["_master"] = old["model_state"].pop("master")
    twin = LBFGS.__new__(LBFGS)
    twin.__setstate__(copy.deepcopy(old))
    assert not torch.equal(master, x.float())
    (z,) = twin.param_groups[0]["params"]
    for _ in range(3):
        optimizer.step(standard(optimizer, lambda: rosenbrock(x)))
        twin.step(standard(twin, lambda: rosenbrock(z)))
        assert torch.equal(x, z)
        assert twin.info == optimizer.info


def test_hooks_and_schedulers_see_every_step() -> None:
    x = start_at(-1.2, 1.0)
    optimizer = LBFGS([x], max_iter=2)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(2):  # a scheduler warns where it is stepped without the optimizer
        optimizer.step(standard(optimizer, lambda: rosenbrock(x)))
        scheduler.step()
    assert seen == ["before", "after"] * 2
    assert optimizer.param_groups[0]["lr"] == 0.25


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be a finite number of at least 0, got -1.0"),
        ({"lr": math.nan}, ValueError, "lr must be .*nan"),
        ({"lr": math.inf}, ValueError, "lr must be .*inf"),
        ({"lr": "fast"}, ValueError, "lr must be .*'fast'"),
        ({"lr": None}, ValueError, "lr must be .*None"),
        ({"max_iter": 0}, ValueError, "max_iter must be an integer of at least 1, got 0"),
        ({"max_iter": 1.5}, ValueError, "max_iter must be an integer .*1.5"),
        ({"max_iter": math.inf}, ValueError, "max_iter must be an integer .*inf"),
        ({"max_eval": 0}, ValueError, "max_eval must be an integer of at least 1 or None, got 0"),
        ({"max_eval": 2.5}, ValueError, "max_eval must be an integer .*2.5"),
        ({"tolerance_grad": -1e-9}, ValueError, "tolerance_grad must be .*-1e-09"),
        ({"tolerance_grad": math.nan}, ValueError, "tolerance_grad must be .*nan"),
        ({"tolerance_change": -1e-9}, ValueError, "tolerance_change must be .*-1e-09"),
        ({"tolerance_change": math.nan}, ValueError, "tolerance_change must be .*nan"),
        ({"history_size": 0}, ValueError, "history_size must be an integer of at least 1, got 0"),
        ({"history_size": 2.5}, ValueError, "history_size must be an integer .*2.5"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be .*-0.1"),
        ({"weight_decay": math.nan}, ValueError, "weight_decay must be .*nan"),
        (
            {"line_search_fn": "wolfe"},
            ValueError,
            "line_search_fn must be one of 'strong_wolfe', 'hager_zhang', 'armijo'.* got 'wolfe'",
        ),
        ({"line_search_fn": 3}, TypeError, "line_search_fn must be one of .*got 3"),
        ({"line_search_fn": HagerZhang}, TypeError, "line_search_fn must be one of"),
    ],
)
def test_bad_hyperparameters(arguments: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        LBFGS([nn.Parameter(torch.ones(2))], **arguments)


@pytest.mark.parametrize(
    ("params", "kind", "message"),
    [
        (lambda: [], ValueError, "empty parameter list"),
        (lambda: [torch.ones(2, dtype=torch.int64)], TypeError, "parameter 0 .*torch.int64"),
        (lambda: nn.LazyLinear(3).parameters(), ValueError, "not initialized"),
        (lambda: [torch.ones(2, requires_grad=True) * 2], ValueError, "non-leaf"),
        (lambda: ["w"], TypeError, "str"),
        (lambda: torch.ones(2), TypeError, "iterable"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_bad_parameters(params: Callable, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        LBFGS(params())


@pytest.mark.parametrize(
    ("group", "kind", "message"),
    [
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be .*-1.0"),
        ({"lr": math.nan}, ValueError, "lr must be .*nan"),
        ({"params": [torch.ones(2, dtype=torch.int32)]}, TypeError, "torch.int32"),
    ],
)
def test_a_bad_group_is_not_added(group: dict, kind: type[Exception], message: str) -> None:
    x, z = start_at(-1.2, 1.0), start_at(1.0)
    optimizer = LBFGS([x], max_iter=3)
    closure = standard(optimizer, lambda: rosenbrock(x))
    optimizer.step(closure)
    with pytest.raises(kind, match=message):
        optimizer.add_param_group({"params": [z], **group})
    assert len(optimizer.param_groups) == 1
    optimizer.step(closure)
    assert not optimizer.info.history_reset
    with pytest.raises(kind, match=message):
        LBFGS([{"params": [x]}, {"params": [z], **group}])


@pytest.mark.parametrize(
    ("closure", "kind", "message"),
    [
        (None, RuntimeError, r"(?s)needs a closure:.*def closure\(\):.*loss\.backward\(\)"),
        (torch.ones(()), TypeError, "must be callable, got Tensor"),
        (lambda x: None, TypeError, "must return the loss, got NoneType"),
        (lambda x: "low", TypeError, "must return the loss, got str"),
        (lambda x: x * 2, ValueError, r"real scalar loss, got shape \(2,\)"),
        (lambda x: (x * 1j).sum(), ValueError, "real scalar loss"),
        (lambda x: torch.ones(()), RuntimeError, "no gradient reached"),
        (lambda x: x.detach().sum(), RuntimeError, "no gradient reached"),
        (lambda x: 3.0, RuntimeError, "no gradient reached"),
    ],
)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_bad_closures_change_nothing(
    closure: Any, kind: type[Exception], message: str, steps_before: int
) -> None:
    x = start_at(-1.2, 1.0)
    optimizer = LBFGS([x], max_iter=3)
    good = standard(optimizer, lambda: rosenbrock(x))
    for _ in range(steps_before):
        optimizer.step(good)
    z, twin = copy.deepcopy((x, optimizer))
    passed = (lambda: closure(x)) if callable(closure) else closure
    with pytest.raises(kind, match=message):
        optimizer.step(passed) if passed is not None else optimizer.step()
    assert torch.equal(x, z)
    assert optimizer.info == twin.info
    optimizer.step(good)
    twin.step(standard(twin, lambda: rosenbrock(z)))
    assert torch.equal(x, z)
    assert optimizer.info == twin.info


def test_groups_that_disagree_on_maximize() -> None:
    x, z = start_at(-1.2, 1.0), start_at(1.0)
    optimizer = LBFGS([{"params": [x]}, {"params": [z], "maximize": True}])
    with pytest.raises(ValueError, match=r"maximize must be the same .*\[False, True\]"):
        optimizer.step(standard(optimizer, lambda: rosenbrock(x) + z.sum()))
    assert x.tolist() == [-1.2, 1.0]


def test_all_parameters_frozen() -> None:
    case = make_case("mlp", torch.device("cpu"))
    optimizer = LBFGS(case.model.parameters())
    case.model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="does not require grad"):  # from backward() itself
        optimizer.step(case.closure())
    case.model.requires_grad_(True)
    optimizer.step(case.closure())
    assert optimizer.info.loss_after < optimizer.info.loss


@pytest.mark.parametrize(("name", "value"), [("lr", -1.0), ("lr", math.nan), ("lr", math.inf)])
def test_a_rate_spoiled_later_is_noticed(name: str, value: float) -> None:
    """A scheduler can do that."""
    x = start_at(-1.2, 1.0)
    optimizer = LBFGS([x], max_iter=3)
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"{value}"):
        optimizer.step(standard(optimizer, lambda: rosenbrock(x)))
    assert x.tolist() == [-1.2, 1.0]


def test_the_loss_that_is_returned() -> None:
    x = start_at(-1.2, 1.0)
    optimizer = LBFGS([x], max_iter=3, maximize=True, weight_decay=0.1)
    loss: Tensor = optimizer.step(standard(optimizer, lambda: -rosenbrock(x)))
    assert loss.item() == pytest.approx(-24.2)
    assert loss.shape == ()
    assert not loss.requires_grad


@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize("at", range(2, 6))
def test_a_closure_may_load_a_state(at: int, history: bool) -> None:
    training = Training(torch.float64, torch.device("cpu"), max_iter=4)
    optimizer = training.optimizer
    if history:
        training.steps(1)
    state = copy.deepcopy(optimizer.state_dict())
    calls = 0

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at:
            optimizer.load_state_dict(state)
        return F.cross_entropy(training.model(training.x), training.y)

    optimizer.step(standard(optimizer, loss))
    assert calls >= at
    assert optimizer.info.loss_after < optimizer.info.loss
    training.steps(1)
    assert optimizer.info.loss_after < optimizer.info.loss
