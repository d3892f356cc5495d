"""Loops without a closure that run forward and backward inside `with optimizer.watching()`."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from tests.support.closures import standard
from tests.support.diagonal_references import Task, assert_same, values
from tests.support.diagonal_runs import (
    KINDS,
    PARTS,
    eval_loss,
    every,
    five_steps,
    live_graphs,
    live_tensors,
    periods,
    steps_on_parts,
    twice,
)
from tests.support.ranks import on_both, run_on_ranks
from tests.support.shares import Share
from torch_secondorder import AdaHessian, Sophia, StepStatus


@every
@periods
@pytest.mark.parametrize("clip", [False, True])
def test_a_loop_that_watches_equals_the_closure(kind: str, period: int, clip: bool) -> None:
    def step(optimizer: Any, task: Task, clip_gradients: Callable[[], None]) -> None:
        with optimizer.watching():
            loss = task.loss()
            loss.backward()
        clip_gradients()
        assert optimizer.step() is None
        optimizer.zero_grad()

    assert_same(five_steps(kind, period, clip, step), five_steps(kind, period, clip), 0)


@every
@periods
@pytest.mark.parametrize("contexts", ["one", "one each"])
@pytest.mark.parametrize("to_none", [True, False])
def test_micro_batches_add_up(kind: str, period: int, contexts: str, to_none: bool) -> None:
    task = Task()
    optimizer = KINDS[kind](task.model.parameters(), update_period=period)
    for _ in range(4):
        with optimizer.watching() if contexts == "one" else nullcontext():
            for part in PARTS:
                with optimizer.watching() if contexts == "one each" else nullcontext():
                    eval_loss(task, part).backward()
        optimizer.step()
        task.model.zero_grad(set_to_none=to_none)
    assert_same(values(task.model), steps_on_parts(kind, period), 1e-12)


@every
def test_where_no_curvature_is_due_nothing_is_watched(kind: str) -> None:
    task = Task()
    optimizer = KINDS[kind](task.model.parameters(), update_period=3)
    due = []
    for _ in range(12):
        with optimizer.watching():
            due.append(len(_get_current_function_mode_stack()))
            task.loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not any(due[10:12] if kind == "AdaHessian" else due[4:6])
    assert all(due[9:10])


@every
def test_a_batch_that_is_dropped_takes_its_curvature_along(kind: str) -> None:
    """The gradients are zeroed and no step is made; randomness has moved on, so on one sample."""

    def run(drops: bool) -> list[Tensor]:
        w = torch.tensor([[1.0, -2.0]], dtype=torch.float64, requires_grad=True)
        optimizer = KINDS[kind]([w])
        for target in [5.0, -2.0] if drops else [-2.0]:
            w.grad = None
            with optimizer.watching():
                # A diagonal Hessian: every probe gives it.
                z = w * torch.tensor([3.0, abs(target)])
                F.mse_loss(z, torch.full_like(z, target), reduction="sum").backward()
        optimizer.step()
        return [w.detach(), optimizer.state[w]["exp_hessian"]]

    assert_same(run(True), run(False), 1e-14)


@every
def test_no_graph_and_no_memory_are_kept(kind: str) -> None:
    task = Task()
    optimizer = KINDS[kind](task.model.parameters())
    counts, others = [], live_graphs()
    for _ in range(5):
        with optimizer.watching():
            loss = task.loss()
            loss.backward()
        assert all(p.grad.grad_fn is None for p in task.model.parameters())
        del loss
        if len(counts) < 3:
            gc.collect()
            counts.append(live_tensors())
        optimizer.step()
        optimizer.zero_grad()
    assert live_graphs() <= others
    assert counts[-1] == counts[-2]
    assert not any(p._post_accumulate_grad_hooks for p in task.model.parameters())
    gone = weakref.ref(optimizer)
    with optimizer.watching():
        task.loss().backward()
    del optimizer
    assert gone() is None


@twice
def test_gradients_are_nobody_elses(kind: str) -> None:
    """Where parameters are added up, autograd has one tensor for both."""
    a, b = (torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = KINDS[kind]([a, b])
    with optimizer.watching():
        ((a + b) ** 3).sum().backward()
    a.grad.mul_(0.5)
    assert_same([b.grad], [torch.full((3,), 12.0, dtype=torch.float64)], 0)


def test_a_state_that_is_loaded_in_the_middle_of_a_step() -> None:
    task = Task()
    optimizer = Sophia(task.model.parameters(), update_period=3)
    optimizer.step(standard(optimizer, task.loss))
    later = copy.deepcopy(optimizer.state_dict())  # no curvature is due there
    for _ in range(2):
        optimizer.step(standard(optimizer, task.loss))
    optimizer.zero_grad()
    with optimizer.watching():
        task.loss().backward()
    optimizer.load_state_dict(later)
    optimizer.step()
    assert optimizer.info.products == 0


@twice
def test_a_copy_in_the_middle_of_a_step(kind: str) -> None:
    task = Task()
    optimizer = KINDS[kind](task.model.parameters())
    with optimizer.watching():
        task.loss().backward()
    other, twin = copy.deepcopy((task, optimizer))
    for own, its in ((task, optimizer), (other, twin)):
        its.step(standard(its, own.loss))
        assert its.info.status is StepStatus.MOVED
    assert_same(other.model, task.model, 0)


def test_checkpointed_models() -> None:
    def run(reentrant: bool | None) -> list[Tensor]:
        task = Task()
        optimizer = AdaHessian(task.model.parameters(), lr=0.02)

        def rest(image: Tensor) -> Tensor:
            x = F.softplus(task.model.conv(image)).flatten(1)
            return task.model.linear(task.model.layernorm(x))

        for _ in range(2):
            with optimizer.watching():
                embedded = task.model.embedding(task.tokens).unsqueeze(1)
                if reentrant is None:
                    z = rest(embedded)
                else:
                    z = checkpoint(rest, embedded, use_reentrant=reentrant)
                F.cross_entropy(z, task.y).backward()
            optimizer.step()
            optimizer.zero_grad()
        return values(task.model)

    assert_same(run(False), run(None), 1e-12)
    with pytest.raises(RuntimeError, match="use_reentrant"):
        run(True)


# What is refused.


@every
def test_a_step_inside_the_context(kind: str) -> None:
    task = Task()
    optimizer = KINDS[kind](task.model.parameters())
    before = values(task.model)
    inside = pytest.raises(RuntimeError, match=r"inside `with optimizer.watching\(\)`")
    with inside, optimizer.watching():
        for _ in range(3):
            task.loss().backward()
            optimizer.step()
    assert_same(values(task.model), before, 0)
    assert _get_current_function_mode_stack() == []
    optimizer.zero_grad()
    optimizer.step(standard(optimizer, task.loss))


@every
@pytest.mark.parametrize("when", ["before", "between", "after", "inside, by torch.autograd"])
def test_gradients_from_elsewhere(kind: str, when: str) -> None:
    task = Task()
    optimizer = KINDS[kind](task.model.parameters(), watch=False)
    before = values(task.model)
    if when == "before":
        task.loss().backward()
    with pytest.raises(RuntimeError, match=r"not all from inside `with optimizer.watching"):
        with optimizer.watching():
            task.loss().backward()
            if when == "inside, by torch.autograd":
                torch.autograd.backward(task.loss())
        if when == "between":
            task.loss().backward()
            with optimizer.watching():
                task.loss().backward()
        if when == "after":
            task.loss().backward()
        optimizer.step()
    assert_same(values(task.model), before, 0)
    optimizer.zero_grad()
    with optimizer.watching():
        task.loss().backward()
    optimizer.step()
    assert optimizer.info.status is StepStatus.MOVED


@twice
def test_all_by_torch_autograd(kind: str) -> None:
    task = Task()
    optimizer = KINDS[kind](task.model.parameters(), watch=False)
    with optimizer.watching():
        torch.autograd.backward(task.loss())
    with pytest.raises(RuntimeError, match=r"no graph on the gradients(.|\n)*: run forward and"):
        optimizer.step()


@every
def test_an_exception_inside_leaves_nothing_behind(kind: str) -> None:
    task, other = Task(), Task()
    optimizer = KINDS[kind](task.model.parameters())
    with pytest.raises(ZeroDivisionError), optimizer.watching():
        task.loss().backward()
        _ = 1 / 0
    assert not any(p._post_accumulate_grad_hooks for p in task.model.parameters())
    other.loss().backward()
    assert all(p.grad is not None for p in other.model.parameters())


# Several processes.


def train(rank: int, ranks: int) -> list[Any]:
    """Two micro-batches a step, the first without synchronization."""
    found = []
    for kind, options in ((AdaHessian, {}), (Sophia, {}), (Sophia, {"estimator": "gnb"})):
        share = Share(rank, ranks)
        model: Any = share.model
        optimizer = kind(model.parameters(), lr=0.02, update_period=3, **options)
        for _ in range(6):
            with ExitStack() as stack:
                if ranks > 1:
                    stack.enter_context(model.no_sync())
                with optimizer.watching():
                    (share.loss() / 4).backward()
            with optimizer.watching():
                (share.loss() * 0.75).backward()
            optimizer.step()
            optimizer.zero_grad()
        found += share.values()
    return found


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_two_ranks_are_one_with_the_whole_batch(tmp_path: Path) -> None:
    ours = on_both(run_on_ranks([train], tmp_path), "train")
    torch.testing.assert_close(ours, train(0, 1), rtol=1e-12, atol=1e-12)
