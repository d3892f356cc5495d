"""What holds of every optimizer of `torch.optim` holds of ours, and of `Contractive` around any."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn import functional as F
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.optim.swa_utils import SWALR, AveragedModel

from torch_secondorder import LBFGS, AdaHessian, Contractive, NewtonCG, Sophia, StepStatus
from torch_secondorder.curvature.diagonal import row_norms

PLAIN: dict[str, Callable[..., Any]] = {
    "LBFGS": lambda params, **more: LBFGS(params, **{"max_iter": 2, **more}),
    "NewtonCG": NewtonCG,
    "AdaHessian": lambda params, **more: AdaHessian(params, **{"update_period": 3, **more}),
    "AdaHessian gnb": lambda params, **more: AdaHessian(params, **{"estimator": "gnb", **more}),
    "Sophia": lambda params, **more: Sophia(params, **{"lr": 0.02, "update_period": 3, **more}),
}
#: What the penalty is around.
INNER: dict[str, Callable[..., Any]] = {
    "LBFGS": PLAIN["LBFGS"],
    "Sophia": PLAIN["Sophia"],
    "Adam": torch.optim.Adam,
}
ALL = [*PLAIN, *(f"Contractive {name}" for name in INNER)]
every = pytest.mark.parametrize("name", ALL)
ours = pytest.mark.parametrize("name", PLAIN)
diagonal = pytest.mark.parametrize("name", ["AdaHessian", "AdaHessian gnb", "Sophia"])


class Net:
    """A small classifier with an encoder, its data and a standard closure."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(5)
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.model = nn.Sequential(self.encoder, nn.Linear(6, 3)).to(dtype)
        self.x = torch.randn(12, 4).to(dtype)
        self.y = torch.randint(3, (12,))
        self.evaluations = 0

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.x).float(), self.y)

    def closure(self) -> Tensor:
        self.evaluations += 1
        self.model.zero_grad()
        value = self.loss()
        if value.requires_grad:
            value.backward()
        return value

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]


def make(name: str, net: Net, params: Any = None, **more: Any) -> Any:
    params = net.params if params is None else params
    if name in PLAIN:
        return PLAIN[name](params, **more)
    inner = INNER[name.removeprefix("Contractive ")](params, **more)
    return Contractive(inner, net.encoder, 0.1, "projection")


def train(optimizer: Any, net: Net, steps: int = 4) -> list[Tensor]:
    for _ in range(steps):
        optimizer.step(net.closure)
    return net.values()


def identical(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Groups and parameters that there is nothing to do for.


@every
@pytest.mark.parametrize("place", ["first", "last", "both", "added"])
def test_an_empty_group_changes_nothing(name: str, place: str) -> None:
    net, other, resumed = Net(), Net(), Net()
    expected = train(make(name, net), net)
    nothing: list[dict[str, Any]] = [{"params": [], "lr": 123.0, "weight_decay": 0.5}]

    def groups(net: Net) -> list[dict[str, Any]]:
        first = copy.deepcopy(nothing) if place in ("first", "both") else []
        last = copy.deepcopy(nothing) if place in ("last", "both") else []
        return [*first, {"params": net.params}, *last]

    optimizer = make(name, other, groups(other))
    train(optimizer, other, 2)
    if place == "added":
        optimizer.add_param_group(copy.deepcopy(nothing[0]))
    state = copy.deepcopy((other.model.state_dict(), optimizer.state_dict()))
    assert identical(train(optimizer, other, 2), expected)
    again = make(name, resumed, groups(resumed))
    if place == "added":
        again.add_param_group(copy.deepcopy(nothing[0]))
    resumed.model.load_state_dict(state[0])
    again.load_state_dict(state[1])
    assert identical(train(again, resumed, 2), expected)
    assert "123.0" in repr(optimizer)


@ours
def test_a_group_that_was_empty_at_first(name: str) -> None:
    """Whole-model state has no parameter to be under then."""
    net, other = Net(), Net()
    expected = train(make(name, net), net)
    optimizer = make(name, other, [{"params": []}])
    assert optimizer.step(other.closure).item() == other.loss().item()
    loaded = make(name, other, [{"params": []}])
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (
        optimizer,
        loaded,
        copy.deepcopy(optimizer),
        pickle.loads(pickle.dumps(optimizer)),
    ):
        assert each.info is None or each.info.status is StepStatus.NOTHING_TO_TRAIN
        each.zero_grad()
        if hasattr(each, "curvature_due"):
            assert not each.curvature_due
            with each.watching():
                pass
        assert each.step() is None
    optimizer.add_param_group({"params": other.params})
    assert identical(train(optimizer, other), expected)


@ours
def test_no_parameters_at_all(name: str) -> None:
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        make(name, Net(), [])


@ours
def test_all_parameters_frozen(name: str) -> None:
    """As with Adam: the closure is evaluated once, and its loss returned."""
    net = Net()
    optimizer = make(name, net)
    train(optimizer, net, 2)
    before = net.values()
    net.model.requires_grad_(False)
    net.evaluations = 0
    loss = optimizer.step(net.closure)
    assert loss.item() == net.loss().item() and net.evaluations == 1
    assert optimizer.info.status is StepStatus.NOTHING_TO_TRAIN
    assert optimizer.info.evaluations == 1
    assert optimizer.step() is None
    assert optimizer.step(lambda: None) is None
    with pytest.raises(TypeError, match="must be callable, got int"):
        optimizer.step(3)
    twin = make(name, net)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert twin.step(net.closure).item() == loss.item()
    assert identical(net.values(), before)
    net.model.requires_grad_(True)
    optimizer.step(net.closure)
    assert not identical(net.values(), before)


@every
def test_gradients_are_enabled_in_the_closure_of_a_frozen_model(name: str) -> None:
    net = Net()
    optimizer = make(name, net)
    if name.startswith("Contractive"):
        pytest.skip("there is nothing to penalize")
    net.model.requires_grad_(False)
    seen = []
    with torch.no_grad():
        optimizer.step(lambda: seen.append(torch.is_grad_enabled()))
    assert seen == [True]


@every
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_parameters_without_entries_change_nothing(name: str, shape: tuple[int, ...]) -> None:
    net, other, resumed = Net(), Net(), Net()
    expected = train(make(name, net), net)

    def params(net: Net) -> list[nn.Parameter]:
        empty = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        net.model.register_parameter("nothing", empty)
        return [empty, *(p for p in net.params if p is not empty)]

    given = params(other)
    optimizer = make(name, other, given)
    train(optimizer, other, 2)
    state = copy.deepcopy((other.model.state_dict(), optimizer.state_dict()))
    train(optimizer, other, 2)
    assert identical([p.detach() for p in given[1:]], expected)
    given = params(resumed)
    again = make(name, resumed, given)
    resumed.model.load_state_dict(state[0])
    again.load_state_dict(state[1])
    train(again, resumed, 2)
    assert identical([p.detach() for p in given[1:]], expected)
    assert given[0].shape == shape


@ours
def test_parameters_without_entries_alone(name: str) -> None:
    empty = nn.Parameter(torch.zeros(0, 3))
    optimizer = make(name, Net(), [empty])
    assert optimizer.step(lambda: empty.sum()).item() == 0.0
    assert optimizer.info.status is StepStatus.NOTHING_TO_TRAIN


def test_the_rate_of_a_frozen_group_scales_no_other() -> None:
    """L-BFGS takes the largest rate for its first step."""

    def moved(frozen_rate: float) -> list[Tensor]:
        net = Net()
        for p in net.encoder.parameters():
            p.requires_grad_(False)
        groups = [
            {"params": list(net.encoder.parameters()), "lr": frozen_rate},
            {"params": net.params[2:], "lr": 0.1},
        ]
        return train(LBFGS(groups, line_search_fn=None, max_iter=1), net, 1)

    assert identical(moved(0.1), moved(100.0))


# Hooks.


def events_of(name: str, kind: str = "") -> list[Any]:
    """The hooks that fire in a little training, in order, with what they are given."""
    net = Net()
    optimizer = torch.optim.Adam(net.params) if kind == "Adam" else make(name, net)
    seen: list[Any] = []
    inner = getattr(optimizer, "optimizer", None)

    def note(event: str, change: Any = None) -> Callable[..., Any]:
        def hook(which: Any, *rest: Any) -> Any:
            if which is inner:  # global hooks fire for both
                return None
            assert which is optimizer
            shown = [sorted(r) if isinstance(r, dict) else len(r) for r in rest]
            seen.append((event, *([] if name.startswith("Contractive") else shown)))
            return change(rest) if change else None

        return hook

    def marked(rest: tuple[Any, ...]) -> Any:
        return {**rest[0], "mark": len(rest[0])}

    first = Net()  # whose closure comes in the place of the given one
    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_pre_hook(
            lambda which, args, kwargs: ((which, net.closure), kwargs)
        ),
        optimizer.register_step_post_hook(note("post")),
        optimizer.register_state_dict_pre_hook(note("state pre")),
        optimizer.register_state_dict_pre_hook(note("state pre first"), prepend=True),
        optimizer.register_state_dict_post_hook(note("state post", marked)),
        optimizer.register_state_dict_post_hook(note("state post last")),
        optimizer.register_state_dict_post_hook(note("state post first"), prepend=True),
        optimizer.register_load_state_dict_pre_hook(note("load pre", marked)),
        optimizer.register_load_state_dict_pre_hook(note("load pre last")),
        optimizer.register_load_state_dict_pre_hook(note("load pre first"), prepend=True),
        optimizer.register_load_state_dict_post_hook(note("load post")),
        optimizer.register_load_state_dict_post_hook(note("load post first"), prepend=True),
    ]
    try:
        optimizer.step(first.closure)
        state = optimizer.state_dict()
        seen.append("mark" in state)
        optimizer.load_state_dict(copy.deepcopy(state))
        optimizer.step(first.closure)
    finally:
        for handle in handles:
            handle.remove()
    assert first.evaluations == 0 and net.evaluations >= 2
    count = len(seen)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step(net.closure)
    assert len(seen) == count
    return seen


@every
def test_hooks_fire_as_with_adam(name: str) -> None:
    found = events_of(name)
    expected = events_of(name, "Adam")
    assert found == expected
    assert [e if isinstance(e, bool) else e[0] for e in found][4:10] == [
        "state pre first",
        "state pre",
        "state post first",
        "state post",
        "state post last",
        True,
    ]


@every
def test_a_hook_sees_and_changes_the_whole_dict_that_is_saved(name: str) -> None:
    net = Net()
    optimizer = make(name, net)
    train(optimizer, net, 2)
    whole = optimizer.state_dict()
    seen: list[Any] = []
    optimizer.register_state_dict_post_hook(lambda _, s: seen.append(copy.deepcopy(s)), True)
    optimizer.register_state_dict_post_hook(lambda _, s: {"new": s})
    assert list(optimizer.state_dict()) == ["new"]
    (found,) = seen
    assert found.keys() == whole.keys()
    assert {k: v.keys() for k, v in found["state"].items()} == {
        k: v.keys() for k, v in whole["state"].items()
    }


@every
@pytest.mark.parametrize("how", ["new", "in place"])
def test_a_hook_changes_the_whole_dict_that_is_loaded(name: str, how: str) -> None:
    """Training goes on from what the hook gives, not from what was handed over."""
    net, other = Net(), Net()
    optimizer = make(name, net)
    train(optimizer, net, 3)
    right = copy.deepcopy(optimizer.state_dict())
    weights = copy.deepcopy(net.model.state_dict())
    expected = train(optimizer, net, 2)
    resumed = make(name, other)
    wrong = copy.deepcopy(resumed.state_dict())

    def hook(_: Any, state_dict: dict[str, Any]) -> Any:
        if how == "new":
            return right
        state_dict.update(right)
        return None

    resumed.register_load_state_dict_pre_hook(hook)
    other.model.load_state_dict(weights)
    resumed.load_state_dict(wrong)
    assert identical(train(resumed, other, 2), expected)


@every
def test_a_hook_after_loading_sees_what_was_loaded(name: str) -> None:
    net, other = Net(), Net()
    optimizer, resumed = make(name, net), make(name, other)
    train(optimizer, net, 3)
    state = copy.deepcopy(optimizer.state_dict())
    seen: list[Any] = []
    resumed.register_load_state_dict_post_hook(lambda o: seen.append(o.state_dict()), prepend=True)
    resumed.load_state_dict(state)
    torch.testing.assert_close(seen[0]["state"], state["state"], rtol=0, atol=0)


@ours
def test_a_state_that_does_not_fit_changes_nothing(name: str) -> None:
    net, twin, small = Net(), Net(), nn.Linear(2, 1).double()
    optimizer, expected = make(name, net), make(name, twin)
    train(optimizer, net, 3)
    train(expected, twin, 3)
    with pytest.raises(ValueError, match=r"size of optimizer's group"):
        optimizer.load_state_dict(PLAIN[name](small.parameters()).state_dict())
    with pytest.raises(ValueError, match="this is no state of"):
        optimizer.load_state_dict(torch.optim.SGD(net.params, lr=1.0).state_dict())
    if name == "LBFGS":
        state = copy.deepcopy(expected.state_dict())
        state["state"][0]["history"]["size"] += 1
        with pytest.raises(ValueError, match="this state is of"):
            optimizer.load_state_dict(state)
    assert identical(train(optimizer, net, 2), train(expected, twin, 2))
    assert optimizer.info == expected.info


@every
def test_a_hook_that_returns_something_else(name: str) -> None:
    net = Net()
    optimizer = make(name, net)
    optimizer.register_step_pre_hook(lambda *_: 3)
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step(net.closure)


# Distributed checkpoints of plain parameters.


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def prepared(name: str, dtype: torch.dtype, *, frozen: bool) -> tuple[Net, Any]:
    net = Net(dtype)
    net.params[0].requires_grad_(not frozen)
    return net, make(name, net)


@every
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_set_state_dict_goes_on_bit_for_bit(
    name: str, flatten: bool, frozen: bool, dtype: torch.dtype
) -> None:
    if flatten and name.startswith("Contractive"):
        pytest.skip("what is flattened has no place for it")
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    net, optimizer = prepared(name, dtype, frozen=frozen)
    train(optimizer, net)
    model_state, state = copy.deepcopy(get_state_dict(net.model, optimizer, options=options))
    expected = train(optimizer, net)
    for steps in (0, 2):  # a fresh one, and one that has been somewhere else
        other, resumed = prepared(name, dtype, frozen=frozen)
        train(resumed, other, steps)
        set_state_dict(
            other.model,
            resumed,
            model_state_dict=copy.deepcopy(model_state),
            optim_state_dict=copy.deepcopy(state),
            options=options,
        )
        assert identical(train(resumed, other), expected)


def saved_and_loaded(
    name: str, path: Path, dtype: torch.dtype, *, flatten: bool, frozen: bool
) -> bool:
    """Whether training goes on as it would have."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    net, optimizer = prepared(name, dtype, frozen=frozen)
    train(optimizer, net)
    model_state, state = get_state_dict(net.model, optimizer, options=options)
    dcp.save({"model": model_state, "optimizer": state}, checkpoint_id=path)
    other, resumed = prepared(name, dtype, frozen=frozen)
    model_state, state = get_state_dict(other.model, resumed, options=options)
    loaded = {"model": model_state, "optimizer": state}
    dcp.load(loaded, checkpoint_id=path)
    set_state_dict(
        other.model,
        resumed,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optimizer"],
        options=options,
    )
    return identical(train(resumed, other), train(optimizer, net))


NO_GROUP = "ignore:torch.distributed is disabled"


@diagonal
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.filterwarnings(NO_GROUP)
def test_distributed_checkpoints_of_one_process(
    name: str, flatten: bool, frozen: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    assert saved_and_loaded(name, tmp_path, dtype, flatten=flatten, frozen=frozen)


@ours
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_distributed_checkpoints_in_a_process_group(
    name: str, flatten: bool, frozen: bool, dtype: torch.dtype, tmp_path: Path, process_group: None
) -> None:
    assert saved_and_loaded(name, tmp_path, dtype, flatten=flatten, frozen=frozen)


@pytest.mark.parametrize("name", ["LBFGS", "NewtonCG"])
@pytest.mark.filterwarnings(NO_GROUP)
def test_a_checkpoint_whose_size_is_not_known_is_refused(name: str, tmp_path: Path) -> None:
    """Without a process group these are as long as the history; nothing is lost in silence."""
    with pytest.raises(BaseException, match="Missing key in checkpoint"):
        saved_and_loaded(name, tmp_path, torch.float64, flatten=False, frozen=False)


@ours
def test_asking_for_the_state_changes_nothing(name: str) -> None:
    net, other = Net(), Net()
    expected = train(make(name, other), other, 5)
    optimizer = make(name, net)
    before = net.values()
    get_optimizer_state_dict(net.model, optimizer)
    assert identical(net.values(), before)
    for _ in range(5):
        train(optimizer, net, 1)
        state = get_optimizer_state_dict(net.model, optimizer)
        set_optimizer_state_dict(net.model, optimizer, state)
    assert identical(net.values(), expected)


@ours
def test_a_step_without_a_closure_is_still_refused(name: str) -> None:
    """Zero rates alone, or zero gradients alone, ask for no state."""
    net = Net()
    more = {} if name in ("LBFGS", "NewtonCG") else {"watch": False}
    optimizer = make(name, net, lr=0.0, **more)
    net.closure()
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step()
    for p in net.params:
        p.grad = None
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step()
    optimizer = make(name, net)  # no backward pass that it could have seen
    for p in net.params:
        p.grad = torch.zeros_like(p)
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step()


@diagonal
def test_a_backward_pass_that_was_seen_is_as_good_as_a_closure(name: str) -> None:
    net, other = Net(), Net()
    optimizer = make(name, net)
    for _ in range(4):
        net.closure()
        optimizer.step()
    # Labels are drawn by logarithms of probabilities in the place of logits, in single precision.
    tolerance = 1e-7 if name in ("AdaHessian gnb", "Sophia") else 0.0
    for p, q in zip(net.values(), train(make(name, other), other, 4), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
    resting = make(name, net, lr=0.0)
    before = net.values()
    net.closure()
    resting.step()
    assert identical(net.values(), before)
    assert resting.info.products == (10 if name == "AdaHessian gnb" else 1)


@diagonal
def test_a_backward_pass_that_nobody_steps_on_draws_nothing(name: str) -> None:
    """A batch that was given up, or a pass before another kind of loop."""
    net, other = Net(), Net()
    optimizer = make(name, net)
    net.closure()
    assert identical(train(optimizer, net), train(make(name, other), other))
    net, other = Net(), Net()
    optimizer, plain = make(name, net), make(name, other)
    for given_up in (1, 0, 2, 1):
        for _ in range(given_up):
            net.closure()
            optimizer.zero_grad()
        net.closure()
        optimizer.step()
        other.closure()
        plain.step()
    assert identical(net.values(), other.values())


# Gradient scalers.


def scaled_closure(net: Net, scaler: Any) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        net.model.zero_grad()
        loss = net.loss()
        scaler.scale(loss).backward()
        return loss

    return closure


@every
@pytest.mark.parametrize("unscale", [False, True])
def test_a_scaler_with_a_closure_is_refused(name: str, unscale: bool) -> None:
    net, other = Net(torch.float32), Net(torch.float32)
    optimizer, scaler = make(name, net), torch.amp.GradScaler("cpu", init_scale=1024.0)
    closure = scaled_closure(net, scaler)
    before = net.values()
    closure()
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"called by a GradScaler(.|\n)*bfloat16"):
        scaler.step(optimizer, closure)
    with pytest.raises(RuntimeError, match="not currently supported"):  # PyTorch's own
        scaler.step(optimizer, closure=closure)
    assert identical(net.values(), before)
    # It is as if the scaler had never been.
    assert identical(train(optimizer, net, 2), train(make(name, other), other, 2))


@every
def test_a_scaler_that_is_off_is_none(name: str) -> None:
    net, other = Net(), Net()
    optimizer, scaler = make(name, net), torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(2):
        scaler.step(optimizer, scaled_closure(net, scaler))
        scaler.update()
    assert identical(net.values(), train(make(name, other), other, 2))


@pytest.mark.parametrize("name", ["LBFGS", "NewtonCG"])
def test_a_scaler_without_a_closure_is_named(name: str) -> None:
    net = Net(torch.float32)
    optimizer, scaler = make(name, net), torch.amp.GradScaler("cpu")
    scaled_closure(net, scaler)()
    with pytest.raises(RuntimeError, match="called by a GradScaler"):
        scaler.step(optimizer)


@diagonal
def test_an_error_under_a_scaler_leaves_nothing_behind(name: str) -> None:
    net = Net(torch.float32)
    optimizer, scaler = make(name, net, watch=False), torch.amp.GradScaler("cpu")
    scaled_closure(net, scaler)()
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr"):
        scaler.step(optimizer)
    assert not hasattr(optimizer, "found_inf")
    optimizer.param_groups[0]["lr"] = 0.02
    scaler.update()
    with pytest.raises(RuntimeError, match="step"):  # there is no graph
        scaler.step(optimizer)
    assert not hasattr(optimizer, "found_inf")
    before = net.values()
    assert not identical(train(optimizer, net, 1), before)


def test_a_step_that_a_scaler_skips_around_a_penalty() -> None:
    net = Net(torch.float32)
    optimizer = make("Contractive Adam", net)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    before = net.values()
    scaled_closure(net, scaler)()
    net.params[0].grad[0, 0] = math.inf
    assert scaler.step(optimizer) is None
    scaler.update()
    assert identical(net.values(), before) and scaler.get_scale() == 128.0
    scaled_closure(net, scaler)()
    scaler.step(optimizer)
    assert not identical(net.values(), before)


# What PyTorch's own tests of its optimizers look at (`test/test_optim.py`).


@every
def test_a_rate_that_is_a_tensor(name: str) -> None:
    if name == "Contractive Adam":
        pytest.skip("Adam itself rounds otherwise then")
    for rate in (torch.tensor(0.125), torch.tensor([0.125])):
        net, other = Net(), Net()
        expected = train(make(name, net, lr=0.125), net)
        assert identical(train(make(name, other, lr=rate.clone()), other), expected)


@every
def test_defaults_may_be_changed_in_the_groups(name: str) -> None:
    net, other = Net(), Net()
    optimizer = make(name, net)
    optimizer.param_groups[0]["lr"] = 0.0625
    assert identical(train(optimizer, net), train(make(name, other, lr=0.0625), other))


@every
def test_the_state_of_clones(name: str) -> None:
    net = Net()
    optimizer = make(name, net)
    train(optimizer, net, 3)
    clone = copy.deepcopy(net)
    fresh = make(name, clone)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert identical(train(optimizer, net, 3), train(fresh, clone, 3))
    torch.testing.assert_close(
        fresh.state_dict()["state"], optimizer.state_dict()["state"], rtol=0, atol=0
    )


@every
def test_an_older_state(name: str) -> None:
    """Hyperparameters that came later have their defaults then."""
    net, other = Net(), Net()
    optimizer, resumed = make(name, net), make(name, other)
    train(optimizer, net, 3)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group.pop("maximize", None)
        group.pop("capturable", None)
    other.model.load_state_dict(net.model.state_dict())
    resumed.load_state_dict(state)
    assert resumed.param_groups[0]["maximize"] is False
    assert identical(train(resumed, other, 3), train(optimizer, net, 3))


@every
def test_copies_have_all_that_is_public(name: str) -> None:
    net = Net()
    optimizer = make(name, net)
    train(optimizer, net, 2)

    def public(optimizer: Any) -> set[str]:
        return {key for key in vars(optimizer) if not key.startswith("_")}

    optimizer.register_step_pre_hook(lambda *_: None)  # no pickle has that
    optimizer.register_state_dict_pre_hook(lambda *_: None)
    twins = copy.deepcopy((net, optimizer)), pickle.loads(pickle.dumps((net, optimizer)))
    expected = train(optimizer, net)
    for twin, copied in twins:
        assert public(copied) == public(optimizer)
        assert copied.state_dict()["state"]
        assert repr(copied) == repr(optimizer)
        assert identical(train(copied, twin), expected)


@every
def test_a_copy_under_a_scheduler_steps_by_itself(name: str) -> None:
    net = Net()
    optimizer = make(name, net)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    train(optimizer, net, 1)
    twin, copied = copy.deepcopy((net, optimizer))
    before = net.values()
    train(copied, twin, 1)
    assert identical(net.values(), before) and not identical(twin.values(), before)


@every
def test_named_parameters(name: str) -> None:
    net, other = Net(), Net()
    named = list(net.model.named_parameters())
    optimizer = make(name, net, named)
    expected = train(make(name, other), other)
    assert identical(train(optimizer, net), expected)
    names = [key for key, _ in named]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
    again = make(name, net, list(net.model.named_parameters()))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert again.param_groups[0]["param_names"] == names
    plain = make(name, net)
    state = plain.state_dict()
    again.load_state_dict(state)
    assert again.param_groups[0]["param_names"] == names
    with pytest.raises(ValueError, match="with/without names"):
        again.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert len(again.param_groups) == 1


@ours
def test_errors_of_groups_are_those_of_torch(name: str) -> None:
    net = Net()
    for kind, params in (
        (ValueError, [{"params": net.params}, {"params": net.params[:1]}]),
        (TypeError, net.params[0]),
        (TypeError, [{"params": set(net.params)}]),
        (TypeError, [3]),
        (ValueError, [net.params[0] * 2]),
    ):
        with pytest.raises(kind) as found:
            make(name, net, params)
        with pytest.raises(kind) as expected:
            torch.optim.Adam(params)
        assert str(found.value) == str(expected.value)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        make(name, net, [net.params[0], net.params[0]])


@every
def test_a_group_that_is_added_between_steps(name: str) -> None:
    net = Net()
    optimizer = make(name, net, net.params[:2])
    train(optimizer, net, 2)
    before = net.values()
    optimizer.add_param_group({"params": net.params[2:]})
    optimizer.register_step_post_hook(lambda *_: None)
    train(optimizer, net, 1)
    moved = [not torch.equal(a, b) for a, b in zip(net.values(), before, strict=True)]
    assert all(moved)
    assert len(optimizer.state_dict()["param_groups"]) == 2
    other = copy.deepcopy(net)
    again = make(name, other, [{"params": other.params[:2]}, {"params": other.params[2:]}])
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert identical(train(optimizer, net, 2), train(again, other, 2))


@every
def test_averages_of_weights(name: str) -> None:
    net = Net()
    optimizer = make(name, net, lr=0.125)
    averaged = AveragedModel(net.model)
    scheduler = SWALR(optimizer, swa_lr=0.0625, anneal_epochs=2)
    paths = []
    for _ in range(3):
        train(optimizer, net, 1)
        averaged.update_parameters(net.model)
        scheduler.step()
        paths.append(net.values())
    assert optimizer.param_groups[0]["lr"] == 0.0625
    for p, *path in zip(averaged.module.parameters(), *paths, strict=True):
        torch.testing.assert_close(p.detach(), torch.stack(path).mean(0))


@every
@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # torch 2.11, with each profile
def test_the_profiler_knows_the_step(name: str) -> None:
    net = Net()
    optimizer = make(name, net)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step(net.closure)
    kind = type(optimizer).__name__
    assert f"Optimizer.step#{kind}.step" in {event.name for event in profile.events()}
    assert optimizer._zero_grad_profile_name == f"Optimizer.zero_grad#{kind}.zero_grad"
    assert type(optimizer).step.hooked


@every
def test_zeroing_gradients(name: str) -> None:
    net = Net()
    optimizer = make(name, net)
    net.closure()
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in net.params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in net.params)


@every
def test_nothing_to_gain_moves_nothing(name: str) -> None:
    net = Net()
    if name.startswith("Contractive"):
        pytest.skip("the penalty is something to gain")
    optimizer = make(name, net)
    before = net.values()

    def closure() -> Tensor:
        net.model.zero_grad()
        loss = 0 * F.mse_loss(net.model(net.x), torch.zeros(12, 3, dtype=torch.float64))
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert identical(net.values(), before)


@ours
def test_complex_numbers_are_pairs(name: str) -> None:
    torch.manual_seed(0)
    start, target = torch.randn(2, 3, 2, dtype=torch.float64)
    pairs = nn.Parameter(start.clone())
    numbers = nn.Parameter(torch.view_as_complex(start.clone()))
    outputs = (lambda: pairs**2), (lambda: torch.view_as_real(numbers) ** 2)
    for p, output in zip((pairs, numbers), outputs, strict=True):
        optimizer = make(name, Net(), [p])

        def closure(p: Any = p, output: Any = output, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(output(), target)
            loss.backward()
            return loss

        for _ in range(4):
            optimizer.step(closure)
    torch.testing.assert_close(torch.view_as_real(numbers.detach()), pairs.detach())


@ours
def test_what_torch_has_and_we_do_not_is_not_pretended(name: str) -> None:
    net = Net()
    optimizer = make(name, net)
    train(optimizer, net, 1)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for absent in ("foreach", "fused", "differentiable"):
        assert absent not in optimizer.defaults
        assert absent not in optimizer.param_groups[0]


# Parameters that come later.


@diagonal
@pytest.mark.parametrize("how", ["added", "thawed"])
@pytest.mark.parametrize("loop", ["closure", "graph", "watching", "plain"])
@pytest.mark.filterwarnings("ignore:Using backward")
def test_what_comes_later_moves_at_once(name: str, how: str, loop: str) -> None:
    net = Net()
    late = net.params[:2]
    if how == "thawed":
        for p in late:
            p.requires_grad_(False)
    optimizer = make(name, net, net.params[2:] if how == "added" else net.params, update_period=10)

    def step() -> None:
        if loop == "closure":
            optimizer.step(net.closure)
            return
        net.model.zero_grad()
        if loop == "watching":
            with optimizer.watching():
                net.loss().backward()
        else:
            net.loss().backward(create_graph=loop == "graph" and optimizer.curvature_due)
        optimizer.step()

    for _ in range(12):
        step()
    assert not optimizer.curvature_due
    if how == "added":
        optimizer.add_param_group({"params": late})
    else:
        for p in late:
            p.requires_grad_(True)
    assert optimizer.curvature_due  # before the backward pass
    before = net.values()
    unseen = loop == "plain" or (loop == "graph" and name == "AdaHessian gnb")
    if how == "thawed" and unseen:
        # Nobody says so before the backward pass: the others go by the curvature they have.
        step()
        assert optimizer.info.status is StepStatus.MOVED and optimizer.info.products == 0
        moved = [not torch.equal(a, b) for a, b in zip(net.values(), before, strict=True)]
        assert moved == [False, False, True, True]
        assert optimizer.curvature_due
        before = net.values()
    step()
    assert not any(torch.equal(a, b) for a, b in zip(net.values(), before, strict=True))
    for _ in range(10 if name.startswith("AdaHessian") else 1):  # its first ten all estimate
        due = optimizer.curvature_due
        step()
    assert not due or name.startswith("AdaHessian")


@diagonal
@pytest.mark.parametrize("how", ["added", "thawed", "frozen"])
def test_parameters_that_change_after_the_backward_pass(name: str, how: str) -> None:
    """What was seen is of others: the step goes by older curvature, and the next one estimates."""
    net = Net()
    late = net.params[0].requires_grad_(how != "thawed")
    optimizer = make(name, net, net.params[how == "added" :], update_period=5)
    for _ in range(5):
        net.closure()
        optimizer.step()
    net.closure()  # was seen
    if how == "added":
        optimizer.add_param_group({"params": [late]})
    else:
        late.requires_grad_(how == "thawed")
    for estimates in (False, True):
        before = net.values()
        optimizer.step()
        first, *others = [not torch.equal(a, b) for a, b in zip(net.values(), before, strict=True)]
        assert all(others) and first is (estimates and how != "frozen")
        assert (optimizer.info.products > 0) is estimates
        net.closure()


@diagonal
def test_what_is_used_for_the_first_time_gets_a_curvature_in_the_next_step(name: str) -> None:
    """Also where it rests in all the steps whose turn it is."""
    used, late = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    optimizer = make(name, Net(), [used, late], update_period=10, lr=0.01)
    steps = 0

    def closure() -> Tensor:
        optimizer.zero_grad()
        outputs = torch.cat([used**2, late**2]) if steps % 2 else used**2
        loss = F.mse_loss(outputs, torch.zeros_like(outputs))
        loss.backward()
        return loss

    first = 0
    for steps in range(40):
        optimizer.step(closure)
        if not first and not torch.equal(late, torch.ones_like(late)):
            first = steps
    assert 0 < first <= 3 or name.startswith("AdaHessian")
    assert first
    optimizer.zero_grad()
    assert not optimizer.curvature_due or steps % 10 == 9


# The first steps of AdaHessian with labels drawn from the model.


@pytest.mark.parametrize("samples", [1, 10])
@pytest.mark.parametrize("problem", ["regression", "classification"])
@pytest.mark.parametrize("seed", range(3))
def test_the_first_gauss_newton_steps_do_not_run_away(
    samples: int, problem: str, seed: int
) -> None:
    """The diagonal alone knows nothing of what coordinates do together."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(64, 20, generator=generator)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 16), nn.ReLU())
    model.append(nn.Linear(16, 4))
    labels = torch.randint(4, (64,), generator=generator)
    targets = torch.randn(64, 4, generator=generator)
    optimizer = AdaHessian(model.parameters(), estimator="gnb", n_samples=samples, seed=seed)

    def closure() -> Tensor:
        optimizer.zero_grad()
        outputs = model(x)
        if problem == "regression":
            loss = F.mse_loss(outputs, targets)
        else:
            loss = F.cross_entropy(outputs, labels)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(100)]
    assert max(losses) < 1.5 * losses[0]
    assert losses[-1] < 0.9 * losses[0]
    assert optimizer.info.products == samples


@pytest.mark.parametrize("factor", [0.0, 1e-15, 1.0, 1e15])
def test_row_norms_are_those_of_the_matrix(factor: float) -> None:
    """Also where the square of a curvature has no place in single precision."""
    roots = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    dense = torch.linalg.vector_norm(roots.double().T @ roots.double() / 4, dim=1)
    found = row_norms(factor * roots).double()
    torch.testing.assert_close(found, factor**2 * dense, rtol=1e-5, atol=0)
