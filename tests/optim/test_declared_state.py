"""Declared state: every kind of field in checkpoints, whole and in pieces, and in copies."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from tests.support.record_checkpoints import KINDS, Training
from tests.support.small_optimizers import Everything, Kronecker
from torch_secondorder import LBFGS
from torch_secondorder.optim.extending import FlatOptimizer, Number, Vector, declare

RECORDED = torch.load(Path(__file__).parent / "checkpoints_0_1_0.pt", weights_only=True)


def run(optimizer: Any, model: nn.Module, steps: int = 3) -> list[Tensor]:
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x.to(next(model.parameters()).dtype)).double() ** 2).mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return [p.detach().clone() for p in model.parameters()]


def made(
    kind: Callable[..., Any] = Everything, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, Any]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
    return model, kind(model.parameters())


def saved(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def identical(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# Checkpoints of earlier versions.


@pytest.mark.parametrize("kind", sorted(RECORDED))
def test_checkpoints_of_version_0_1_0_go_on(kind: str) -> None:
    checkpoint, training = RECORDED[kind], Training(kind.removesuffix("_in_pieces"))
    training.model.load_state_dict(checkpoint["model"])
    training.optimizer.load_state_dict(checkpoint["optimizer"])
    training.steps()
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if "bfloat16" in kind else {"rtol": 1e-6, "atol": 1e-8}
    for p, later in zip(training.model.parameters(), checkpoint["later"], strict=True):
        torch.testing.assert_close(p.detach(), later, **tolerance)


@pytest.mark.parametrize("kind", sorted(RECORDED))
def test_a_loaded_checkpoint_is_saved_with_the_names_of_version_0_1_0(kind: str) -> None:
    training = Training(kind.removesuffix("_in_pieces"))
    training.model.load_state_dict(RECORDED[kind]["model"])
    if kind.endswith("_in_pieces"):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        training.optimizer.load_state_dict(RECORDED[kind]["optimizer"])
        ours = training.optimizer.state_dict()["state"]
    finally:
        if kind.endswith("_in_pieces"):
            dist.destroy_process_group()
    torch.testing.assert_close(ours, RECORDED[kind]["optimizer"]["state"], rtol=0, atol=0)


def test_every_kind_of_optimizer_was_recorded() -> None:
    flat = [kind for kind, (name, _, _) in KINDS.items() if name in ("LBFGS", "NewtonCG")]
    assert set(RECORDED) == {*KINDS, *(f"{kind}_in_pieces" for kind in flat)}


# Every kind of field.


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", [Everything, Kronecker])
def test_training_goes_on_from_a_checkpoint(kind: Any, dtype: torch.dtype) -> None:
    model, optimizer = made(kind, dtype)
    run(optimizer, model)
    weights, state = saved((model.state_dict(), optimizer.state_dict()))
    expected = run(optimizer, model)
    other, resumed = made(kind, dtype)
    run(resumed, other, 1)  # is overwritten
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert identical(run(resumed, other), expected)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
    ids=["deepcopy", "pickle"],
)
def test_copies_go_on(duplicate: Callable[[Any], Any]) -> None:
    model, optimizer = made()
    run(optimizer, model)
    other, copied = duplicate((model, optimizer))
    assert copied.inner is not optimizer.inner
    assert identical(run(copied, other), run(optimizer, model))


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.usefixtures("process_group")
def test_distributed_checkpoints_go_on(flatten: bool, frozen: bool, tmp_path: Path) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = made()
    other, resumed = made()
    for net in (model, other):
        net[0].weight.requires_grad_(not frozen)
    run(optimizer, model)
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
    run(resumed, other, 1)  # state of each parameter is made in the first step
    weights, state = get_state_dict(other, resumed, options=options)
    loaded = {"model": weights, "optimizer": state}
    dcp.load(loaded, checkpoint_id=tmp_path)
    set_state_dict(
        other,
        resumed,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optimizer"],
        options=options,
    )
    assert identical(run(resumed, other), run(optimizer, model))


@pytest.mark.usefixtures("process_group")
def test_in_pieces_all_state_is_there_from_the_beginning() -> None:
    model, optimizer = made()
    fresh = optimizer.state_dict()["state"]
    run(optimizer, model, 5)
    later = optimizer.state_dict()["state"]

    def shapes(states: dict[int, Any]) -> dict[Any, Any]:
        return {
            (number, name): tuple(value.shape) if isinstance(value, Tensor) else type(value)
            for number, state in states.items()
            for name, value in state.items()
        }

    assert shapes(fresh) == shapes(later)
    assert later[0]["flat_recent"].shape == (3, 4, 3)
    assert later[0]["outer"].shape == (26, 26)
    assert (fresh[0]["has_recent"], later[0]["has_recent"]) == (0, 3)


@pytest.mark.usefixtures("process_group")
def test_a_state_in_pieces_goes_on_without_a_process_group() -> None:
    model, optimizer = made()
    run(optimizer, model)
    weights, state = saved((model.state_dict(), optimizer.state_dict()))
    expected = run(optimizer, model)
    dist.destroy_process_group()
    other, resumed = made()
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert identical(run(resumed, other), expected)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


@pytest.mark.parametrize("name", ["mean", "recent", "outer"])
def test_a_state_of_another_size_is_refused_and_changes_nothing(name: str) -> None:
    model, optimizer = made()
    run(optimizer, model)
    twin, expected = copy.deepcopy((model, optimizer))
    state = saved(optimizer.state_dict())
    state["state"][0][name] = torch.ones(27, 27)[0] if name == "mean" else torch.ones(27, 27)
    state["state"][0]["seen"] = 99
    with pytest.raises(ValueError, match="of 27 parameter entries, the optimizer has 26"):
        optimizer.load_state_dict(state)
    assert optimizer._seen == expected._seen
    assert identical(run(optimizer, model), run(expected, twin))


@pytest.mark.parametrize("name", ["velocity", "factor_0", "visits"])
def test_a_parameters_state_of_another_shape_is_refused(name: str) -> None:
    model, optimizer = made()
    run(optimizer, model)
    twin, expected = copy.deepcopy((model, optimizer))
    state = saved(optimizer.state_dict())
    state["state"][2][name] = torch.ones(5, 5)
    with pytest.raises(ValueError, match=rf"{name} of parameter 2 has shape \(5, 5\)"):
        optimizer.load_state_dict(state)
    assert identical(run(optimizer, model), run(expected, twin))


def test_a_checkpoint_from_before_the_first_step_resets_everything() -> None:
    model, optimizer = made()
    other, used = made()
    run(used, other)
    used.load_state_dict(saved(optimizer.state_dict()))
    other.load_state_dict(model.state_dict())
    assert used._mean is used._recent is used._outer is None
    assert (used._seen, used._finished, used.inner.total) == (0, False, 0.0)
    used.state.clear()  # of each parameter there is nothing in the checkpoint
    assert identical(run(used, other), run(optimizer, model))


def test_vectors_are_dropped_where_other_parameters_are_trained() -> None:
    model, optimizer = made()
    run(optimizer, model)
    state = saved(optimizer.state_dict())
    model[0].requires_grad_(False)
    run(optimizer, model, 1)
    assert optimizer._mean.numel() == 10
    assert len(optimizer._recent) == 2  # of this step's iterations
    assert optimizer._seen == 8
    # Saved with all parameters trained, loaded with all frozen, and some thawed then.
    model.requires_grad_(False)
    optimizer.load_state_dict(state)
    assert optimizer._mean.numel() == 26
    model[1].requires_grad_(True)
    run(optimizer, model, 1)
    assert optimizer._mean.numel() == 10


def test_numbers_keep_their_types() -> None:
    model, optimizer = made()
    run(optimizer, model)
    twin = made()[1]
    twin.load_state_dict(saved(optimizer.state_dict()))
    assert (twin._seen, type(twin._seen)) == (6, int)
    assert twin._finished is True
    assert twin._generator.get_state().equal(optimizer._generator.get_state())


def test_subclasses_add_to_the_declared_state() -> None:
    class More(LBFGS):
        _state_fields = declare(extra=Number(7))
        _carried = ("note",)

    model, optimizer = made(More)
    optimizer.note = "kept"
    names = [field.name for field in More._model_fields]
    assert names == [*(field.name for field in LBFGS._model_fields), "extra"]
    assert optimizer._extra == 7
    run(optimizer, model)
    optimizer._extra = 8
    assert optimizer.state_dict()["state"][0]["extra"] == 8
    twin = copy.deepcopy(optimizer)
    assert (twin._extra, twin.note, twin.line_search) == (8, "kept", optimizer.line_search)


def test_a_value_may_be_kept_by_another_attribute() -> None:
    class Held(FlatOptimizer):
        _state_fields = declare(direction=Vector("_memory.direction"))

        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 1.0, "weight_decay": 0.0, "maximize": False})
            self._memory = nn.Module()
            self._memory.direction = None

        def _iterate(self, descent: Any) -> Any:
            raise NotImplementedError

    _, optimizer = made(Held)
    optimizer._memory.direction = torch.arange(26.0, dtype=torch.float64)
    twin = made(Held)[1]
    twin.load_state_dict(saved(optimizer.state_dict()))
    assert torch.equal(twin._memory.direction, optimizer._memory.direction)
    assert "direction" not in made(Held)[1].state_dict()["state"][0]
