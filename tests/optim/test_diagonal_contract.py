"""What AdaHessian and Sophia make of closures, of loops without one, and of bad numbers."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tests.support.closures import standard
from tests.support.custom_functions import Cube
from tests.support.diagonal_references import (
    PlainAdaHessian,
    PlainSophia,
    Task,
    assert_moved,
    assert_same,
    plain,
    values,
)
from tests.support.diagonal_runs import (
    KINDS,
    NO_WARNING_OF_CYCLES,
    eval_loss,
    every,
    live_tensors,
    periods,
    tiny,
    twice,
)
from torch_secondorder import FunctionalObjective, StepStatus

DOUBLE = torch.float64

pytestmark = NO_WARNING_OF_CYCLES

REFERENCES = {"AdaHessian": PlainAdaHessian, "Sophia": PlainSophia}


def trained(
    kind: str,
    closure_of: Callable[[Task, Any], Callable[[], Any]],
    steps: int = 4,
    task: Task | None = None,
    **options: Any,
) -> list[Tensor]:
    task = task or Task()
    optimizer = KINDS[kind](task.model.parameters(), **options)
    for _ in range(steps):
        optimizer.step(closure_of(task, optimizer))
        assert optimizer.info.status is StepStatus.MOVED
    return values(task.model)


def of_the_whole(task: Task, optimizer: Any) -> Callable[[], Tensor]:
    return standard(optimizer, task.loss)


# Several ways to say the same.


@twice
@periods
@pytest.mark.parametrize("parts", [(3, 8), (2, 3, 4, 8)])
def test_several_backwards_are_one_of_the_sum(
    kind: str, period: int, parts: tuple[int, ...]
) -> None:
    def in_parts(task: Task, optimizer: Any) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            total, start = torch.zeros((), dtype=DOUBLE), 0
            for end in parts:
                loss = eval_loss(task, slice(start, end))
                loss.backward()
                total += loss.detach()
                start = end
            return total

        return closure

    def whole(task: Task, optimizer: Any) -> Callable[[], Tensor]:
        return standard(optimizer, lambda: eval_loss(task))

    ours = trained(kind, in_parts, update_period=period)
    assert_same(ours, trained(kind, whole, update_period=period))


@every
@periods
def test_a_closure_without_backward(kind: str, period: int) -> None:
    ours = trained(kind, lambda task, _: task.loss, update_period=period)
    assert_same(ours, trained(kind, of_the_whole, update_period=period))


@every
@periods
def test_a_closure_that_forgets_to_zero_does_not_accumulate(kind: str, period: int) -> None:
    def forgetful(task: Task, _: Any) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            loss = task.loss()
            loss.backward()
            return loss

        return closure

    ours = trained(kind, forgetful, update_period=period)
    assert_same(ours, trained(kind, of_the_whole, update_period=period))


@every
@periods
def test_zeros_in_place_of_none(kind: str, period: int) -> None:
    def zeroing(task: Task, optimizer: Any) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            optimizer.zero_grad(set_to_none=False)
            loss = task.loss()
            loss.backward()
            return loss

        return closure

    ours = trained(kind, zeroing, update_period=period)
    assert_same(ours, trained(kind, of_the_whole, update_period=period))


@every
@periods
def test_a_function(kind: str, period: int) -> None:
    def functional(task: Task, _: Any) -> Any:
        def function(params: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(functional_call(task.model, params, task.tokens), task.y)

        return FunctionalObjective(function, dict(task.model.named_parameters()))

    ours = trained(kind, functional, update_period=period)
    assert_same(ours, trained(kind, of_the_whole, update_period=period))


@twice
def test_a_function_takes_no_part_in_accumulation(kind: str) -> None:
    """What `p.grad` holds is not added to, so that nothing counts twice."""

    def estimate(left: bool) -> Tensor:
        p = nn.Parameter(torch.ones(2, dtype=DOUBLE))
        if left:
            p.grad = torch.ones_like(p)
        optimizer = KINDS[kind]([p], accumulation_steps=2)
        optimizer.step(FunctionalObjective(lambda w: (w**4).sum(), p))
        return optimizer.state[p]["exp_hessian"]

    torch.testing.assert_close(estimate(True), estimate(False))


@twice
@periods
def test_a_loop_without_closure_is_the_same(kind: str, period: int) -> None:
    def run(closure: bool) -> list[Tensor]:
        task = Task()
        optimizer = KINDS[kind](task.model.parameters(), update_period=period)
        for step in range(6):
            due = step % period == 0 or (kind == "AdaHessian" and step < period)
            assert optimizer.curvature_due is due
            if closure:
                loss = optimizer.step(standard(optimizer, task.loss))
                assert loss is not None
            else:
                optimizer.zero_grad()
                task.loss().backward(create_graph=optimizer.curvature_due)
                assert optimizer.step() is None
                assert optimizer.info.products == due
            assert optimizer.info.status is StepStatus.MOVED
            for p in task.model.parameters():
                assert p.grad is not None and p.grad.grad_fn is None
                assert not p.grad.requires_grad
        return values(task.model)

    assert_same(run(False), run(True), 1e-14)


@twice
def test_a_graph_where_no_curvature_is_due_is_dropped(kind: str) -> None:
    task, other = Task(), Task()
    optimizer = KINDS[kind](task.model.parameters(), update_period=3)
    expected = KINDS[kind](other.model.parameters(), update_period=3)
    for _ in range(4):
        optimizer.zero_grad()
        task.loss().backward(create_graph=True)
        optimizer.step()
        expected.step(standard(expected, other.loss))
        assert all(p.grad.grad_fn is None for p in task.model.parameters())
    assert_same(task.model, other.model, 1e-14)


@twice
def test_micro_batches_without_closure_add_up(kind: str) -> None:
    task, other = Task(), Task()
    optimizer, expected = (KINDS[kind](t.model.parameters()) for t in (task, other))
    for _ in range(3):
        optimizer.zero_grad()
        eval_loss(task, slice(0, 3)).backward(create_graph=True)
        eval_loss(task, slice(3, 8)).backward(create_graph=True)
        optimizer.step()
        expected.step(standard(expected, lambda: eval_loss(other)))
    assert_same(task.model, other.model)


@twice
@pytest.mark.parametrize("closure", [True, False])
def test_with_and_without_closure_by_turns(kind: str, closure: bool) -> None:
    task, other = Task(), Task()
    optimizer, expected = (KINDS[kind](t.model.parameters()) for t in (task, other))
    for step in range(4):
        if (step % 2 == 0) is closure:

            def forgetful() -> Tensor:
                loss = task.loss()
                loss.backward()
                return loss

            optimizer.step(forgetful)
        else:
            optimizer.zero_grad()
            task.loss().backward(create_graph=True)
            optimizer.step()
        expected.step(standard(expected, other.loss))
    assert_same(task.model, other.model)


# Gradients that are there before the step.


@every
def test_what_was_accumulated_outside_is_refused_where_curvature_is_due(kind: str) -> None:
    task = Task()
    before = values(task.model)
    optimizer = KINDS[kind](task.model.parameters())
    eval_loss(task, slice(0, 4)).backward()

    def closure() -> Tensor:
        loss = eval_loss(task, slice(4, 8))
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="accumulation_steps=N"):
        optimizer.step(closure)
    assert_same(task.model, before, 0)


@every
def test_what_was_accumulated_outside_counts_where_no_curvature_is_due(kind: str) -> None:
    task, other = Task(), Task()
    optimizer, expected = (
        KINDS[kind](t.model.parameters(), update_period=3) for t in (task, other)
    )
    for _ in range(4):
        optimizer.step(standard(optimizer, lambda: eval_loss(task)))
        expected.step(standard(expected, lambda: eval_loss(other)))
    for _ in range(2):
        assert not optimizer.curvature_due
        optimizer.zero_grad()
        eval_loss(task, slice(0, 3)).backward()

        def closure() -> Tensor:
            loss = eval_loss(task, slice(3, 8))
            loss.backward()
            return loss

        optimizer.step(closure)
        expected.step(standard(expected, lambda: eval_loss(other)))
        assert_same(task.model, other.model)


@twice
@periods
def test_the_last_of_several_equal_parts(kind: str, period: int) -> None:
    """The gradient is the sum, the curvature that of the last part, times their number."""
    options = {"lr": 0.02 if kind == "AdaHessian" else 0.01, "update_period": period}
    if kind == "Sophia":
        options["gamma"] = 20.0
    task, other = Task(), Task()
    optimizer = KINDS[kind](task.model.parameters(), accumulation_steps=4, **options)
    reference = plain(REFERENCES[kind], [{"params": other.model.parameters()}], options)

    for _ in range(4):
        optimizer.zero_grad()
        for start in (0, 2, 4):
            eval_loss(task, slice(start, start + 2)).backward()

        def closure() -> Tensor:
            loss = eval_loss(task, slice(6, 8))
            loss.backward()
            return loss

        optimizer.step(closure)

        params = list(other.model.parameters())
        gradients = torch.autograd.grad(eval_loss(other, slice(0, 6)), params)

        def loss(gradients: Any = gradients, params: Any = params) -> Tensor:
            # Four times this has the gradient of all parts, and four times the last's curvature.
            linear = sum(((g / 4) * p).sum() for g, p in zip(gradients, params, strict=True))
            last = eval_loss(other, slice(6, 8))
            own = torch.autograd.grad(last, params, create_graph=False, retain_graph=True)
            excess = sum(((g * 3 / 4) * p).sum() for g, p in zip(own, params, strict=True))
            return last + linear - excess

        reference.step(loss, factor=4.0)
        assert_same(task.model, other.model, 1e-11)


@twice
def test_a_closure_that_zeroes_has_nothing_accumulated(kind: str) -> None:
    ours = trained(kind, of_the_whole, accumulation_steps=4)
    assert_same(ours, trained(kind, of_the_whole))


# What a closure may do with gradients.


def clip_in_place(task: Task) -> None:
    nn.utils.clip_grad_value_(task.model.parameters(), 0.01)


def clip_by_data(task: Task) -> None:
    for p in task.model.parameters():
        p.grad.data = p.grad.data.clamp(-0.01, 0.01)


def clip_anew(task: Task) -> None:
    for p in task.model.parameters():
        p.grad = p.grad.clamp(-0.01, 0.01)


def clip_by_norm(task: Task) -> None:
    nn.utils.clip_grad_norm_(task.model.parameters(), 0.01)


@every
@pytest.mark.parametrize("clip", [clip_in_place, clip_by_data, clip_anew, clip_by_norm])
def test_clipping_reaches_the_gradient_and_not_the_curvature(kind: str, clip: Any) -> None:
    def moments(clips: bool) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        task = Task()
        optimizer = KINDS[kind](task.model.parameters(), betas=(0.0, 0.9))

        def closure() -> Tensor:
            loss = standard(optimizer, task.loss)()
            if clips:
                clip(task)
            return loss

        optimizer.step(closure)
        states = [optimizer.state[p] for p in task.model.parameters()]
        gradients = [p.grad.clone() for p in task.model.parameters()]
        return [s["exp_avg"] for s in states], [s["exp_hessian"] for s in states], gradients

    clipped, curvature, gradients = moments(True)
    free, expected, _ = moments(False)
    assert_same(curvature, expected, 0)
    assert_same(clipped, gradients, 1e-14)
    assert max(m.abs().max() for m in clipped) <= 0.01 + 1e-14 < max(m.abs().max() for m in free)


@twice
@periods
def test_two_losses_on_one_forward_pass(kind: str, period: int) -> None:
    def shared(task: Task, optimizer: Any) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            z = task.model(task.tokens)
            first = F.cross_entropy(z, task.y)
            second = z.square().mean()
            first.backward(retain_graph=True)
            second.backward()
            return (first + second).detach()

        return closure

    def together(task: Task, optimizer: Any) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            z = task.model(task.tokens)
            return F.cross_entropy(z, task.y) + z.square().mean()

        return standard(optimizer, loss)

    ours = trained(kind, shared, update_period=period)
    assert_same(ours, trained(kind, together, update_period=period))


@every
@pytest.mark.parametrize("period", [1, 2])
def test_all_forward_passes_before_the_first_backward(kind: str, period: int) -> None:
    def parts_first(task: Task, optimizer: Any) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            losses = [eval_loss(task, part) for part in (slice(0, 3), slice(3, 8))]
            for loss in losses:
                loss.backward()
            return torch.stack([loss.detach() for loss in losses]).sum()

        return closure

    def whole(task: Task, optimizer: Any) -> Callable[[], Tensor]:
        return standard(optimizer, lambda: eval_loss(task))

    ours = trained(kind, parts_first, update_period=period)
    if kind != "Sophia-G":  # which draws other labels
        assert_same(ours, trained(kind, whole, update_period=period))


@twice
@periods
def test_an_optimizer_inside_the_closure_of_another(kind: str, period: int) -> None:
    """As for two levels of optimization."""

    def run(inside: bool) -> list[Tensor]:
        outer, inner = (nn.Parameter(torch.ones(2, dtype=DOUBLE)) for _ in range(2))
        first = KINDS[kind]([outer])
        second = KINDS[kind]([inner], update_period=period)

        def train_inner() -> None:
            for _ in range(2):
                second.step(standard(second, lambda: (inner - outer.detach() + 1).pow(4).sum()))

        def closure() -> Tensor:
            if inside:
                train_inner()
            first.zero_grad()
            loss = (outer + inner.detach()).pow(4).sum()
            loss.backward()
            return loss

        for _ in range(3):
            if not inside:
                train_inner()
            first.step(closure)
        return values([outer, inner])

    assert_same(run(True), run(False))


@twice
def test_a_weight_given_to_backward(kind: str) -> None:
    def weighted(task: Task, optimizer: Any) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            losses = F.cross_entropy(task.model(task.tokens), task.y, reduction="none")
            losses.backward(torch.full((8,), 1 / 8, dtype=DOUBLE))
            return losses.mean()

        return closure

    assert_same(trained(kind, weighted), trained(kind, of_the_whole))


@every
def test_the_loss_is_given_back_as_it_was(kind: str) -> None:
    task = Task()
    optimizer = KINDS[kind](task.model.parameters())
    expected = task.loss().item()
    loss = optimizer.step(standard(optimizer, task.loss))
    assert loss.item() == expected
    assert not loss.requires_grad
    assert optimizer.info.loss == expected
    norm = max(float(p.grad.abs().max()) for p in task.model.parameters())
    assert optimizer.info.grad_norm == norm
    assert optimizer.info.evaluations == 1 and optimizer.info.iterations == 1


@every
def test_dropout_draws_as_in_any_loop(kind: str) -> None:
    """One evaluation draws once: the random numbers are those of an evaluation by hand."""
    task = Task()
    optimizer = KINDS[kind](task.model.parameters())
    losses = []
    for _ in range(3):
        state = torch.get_rng_state()
        expected = F.dropout(task.model(task.tokens), 0.5)
        following = torch.get_rng_state()
        torch.set_rng_state(state)
        seen = []

        def loss(seen: list[Tensor] = seen) -> Tensor:
            z = F.dropout(task.model(task.tokens), 0.5)
            seen.append(z.detach())
            return F.cross_entropy(z, task.y)

        losses.append(optimizer.step(standard(optimizer, loss)).item())
        torch.testing.assert_close(seen[0], expected.detach())
        assert torch.equal(torch.get_rng_state(), following)
    assert len(set(losses)) == 3


# Precision: autocast and scaled losses.


@every
def test_autocast_is_close_to_float32(kind: str, device: torch.device) -> None:
    def run(enabled: bool) -> list[Tensor]:
        task = Task(device, torch.float32)
        optimizer = KINDS[kind](task.model.parameters(), lr=1e-3)

        def loss() -> Tensor:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
                return F.cross_entropy(task.model(task.tokens).float(), task.y)

        optimizer.step(standard(optimizer, loss))
        names = ("exp_avg", "exp_hessian")
        states = [optimizer.state[p] for p in task.model.parameters()]
        found = [s[name].clone() for name in names for s in states]
        for _ in range(5):
            optimizer.step(standard(optimizer, loss))
            assert optimizer.info.status is StepStatus.MOVED
        return found

    for ours, expected in zip(run(True), run(False), strict=True):
        scale = expected.abs().max()
        assert torch.isfinite(ours).all()
        assert (ours - expected).abs().max() <= 0.1 * scale


def scaled_step(
    task: Any, optimizer: Any, scaler: Any, loss: Callable[[], Tensor], **flags: Any
) -> None:
    optimizer.zero_grad()
    scaler.scale(loss()).backward(create_graph=flags.get("graph", optimizer.curvature_due))
    scaler.step(optimizer)
    scaler.update()


@twice
@periods
@pytest.mark.parametrize("scale", [1.0, 1024.0, 3.0])
def test_the_scale_is_divided_out(kind: str, period: int, scale: float) -> None:
    """Of the gradient and of the diagonal, to float32."""
    task, other = Task(dtype=torch.float32), Task(dtype=torch.float32)
    optimizer, expected = (
        KINDS[kind](t.model.parameters(), update_period=period) for t in (task, other)
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    for _ in range(5):
        scaled_step(task, optimizer, scaler, task.loss)
        expected.step(standard(expected, other.loss))
        assert optimizer.info.status is StepStatus.MOVED
    assert scaler.get_scale() > scale
    for p, q in zip(task.model.parameters(), other.model.parameters(), strict=True):
        for name in ("exp_avg", "exp_hessian"):
            ours, theirs = optimizer.state[p][name], expected.state[q][name]
            atol = 1e-4 * float(theirs.abs().max())
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=atol)
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-2, atol=1e-4)


@twice
def test_the_scale_is_divided_out_of_sparse_gradients(kind: str) -> None:
    tokens = torch.tensor([1, 2, 2])

    def estimates(sparse: bool) -> list[Tensor]:
        embedding = nn.Embedding(5, 2, sparse=sparse)
        nn.init.ones_(embedding.weight)
        optimizer = KINDS[kind](embedding.parameters(), update_period=2)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for _ in range(2):
            scaled_step(None, optimizer, scaler, lambda: embedding(tokens).pow(4).sum())
        return [optimizer.state[embedding.weight][n] for n in ("exp_avg", "exp_hessian")]

    assert_same(estimates(True), estimates(False), 1e-6)


@twice
def test_float16_autocast_with_a_scaler(kind: str) -> None:
    task, other = Task(dtype=torch.float32), Task(dtype=torch.float32)
    optimizer, expected = (KINDS[kind](t.model.parameters()) for t in (task, other))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            return F.cross_entropy(task.model(task.tokens).float(), task.y)

    scaled_step(task, optimizer, scaler, loss)
    expected.step(standard(expected, other.loss))
    assert optimizer.info.status is StepStatus.MOVED
    for p, q in zip(task.model.parameters(), other.model.parameters(), strict=True):
        for name in ("exp_avg", "exp_hessian"):
            ours, theirs = optimizer.state[p][name], expected.state[q][name]
            atol = 0.05 * float(theirs.abs().max()) + 1e-6
            torch.testing.assert_close(ours, theirs, rtol=0.1, atol=atol)


@twice
@periods
def test_an_overflow_is_skipped_and_the_scale_falls(kind: str, period: int) -> None:
    task = Task(dtype=torch.float32)
    optimizer = KINDS[kind](task.model.parameters(), update_period=period)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled_step(task, optimizer, scaler, task.loss)
    before, moments = values(task.model), copy.deepcopy(optimizer.state_dict()["state"][0])
    scaled_step(task, optimizer, scaler, lambda: task.loss() * 3e38)
    assert optimizer.info.status is StepStatus.NONFINITE_START
    assert scaler.get_scale() == 512.0
    assert_same(task.model, before, 0)
    after = optimizer.state_dict()["state"][0]
    for name in ("exp_avg", "exp_hessian", "step", "curvature_step"):
        assert torch.equal(after[name], moments[name])
    scaled_step(task, optimizer, scaler, task.loss)
    assert optimizer.info.status is StepStatus.MOVED
    assert_moved(values(task.model), before)


@twice
@periods
@pytest.mark.parametrize("unscaled", [False, True])
def test_an_overflow_that_was_found_elsewhere_is_skipped(
    kind: str, period: int, unscaled: bool
) -> None:
    """A sharded scaler tells all ranks of what one has met; the gradients here are fine."""
    task = Task(dtype=torch.float32)
    optimizer = KINDS[kind](task.model.parameters(), update_period=period)
    optimizer.step(standard(optimizer, task.loss))
    before = values(task.model)
    optimizer.zero_grad()
    (task.loss() * 2).backward(create_graph=optimizer.curvature_due)
    if unscaled and optimizer.curvature_due:
        return
    optimizer.grad_scale = None if unscaled else torch.tensor(2.0)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert_same(task.model, before, 0)
    assert optimizer.info.status is StepStatus.NONFINITE_START
    assert all(torch.isfinite(s["exp_avg"]).all() for s in optimizer.state.values())


@twice
def test_unscaling_before_a_step_with_curvature_is_refused(kind: str) -> None:
    task = Task(dtype=torch.float32)
    before = values(task.model)
    optimizer = KINDS[kind](task.model.parameters(), update_period=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(task.loss()).backward(create_graph=True)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="unscale_"):
        scaler.step(optimizer)
    assert_same(task.model, before, 0)


@twice
def test_unscaling_and_clipping_where_no_curvature_is_due(kind: str) -> None:
    task, other = Task(dtype=torch.float32), Task(dtype=torch.float32)
    optimizer, expected = (
        KINDS[kind](t.model.parameters(), update_period=2) for t in (task, other)
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        scaled_step(task, optimizer, scaler, task.loss)
        expected.step(standard(expected, other.loss))
    assert not optimizer.curvature_due
    optimizer.zero_grad()
    scaler.scale(task.loss()).backward()
    scaler.unscale_(optimizer)
    clip_in_place(task)
    scaler.step(optimizer)
    scaler.update()
    expected.zero_grad()
    other.loss().backward()
    clip_in_place(other)
    expected.step()
    assert_same(task.model, other.model, 1e-3)


# Bad inputs.


@twice
def test_neither_graph_nor_closure(kind: str) -> None:
    task = Task()
    before = values(task.model)
    optimizer = KINDS[kind](task.model.parameters(), watch=False)
    task.loss().backward()
    with pytest.raises(RuntimeError, match=r"loss\.backward\(create_graph=True\)"):
        optimizer.step()
    assert_same(task.model, before, 0)


@every
def test_no_gradient_at_all(kind: str) -> None:
    task = Task()
    optimizer = KINDS[kind](task.model.parameters())
    with pytest.raises(RuntimeError, match="no gradient reached"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="no gradient reached"):
        optimizer.step(lambda: torch.zeros(()))
    with pytest.raises(TypeError, match="closure must be callable"):
        optimizer.step(3)


@every
@periods
def test_a_closure_without_backward_that_zeroes_in_place(kind: str, period: int) -> None:
    """Zeros are no gradient."""
    task = Task()
    optimizer = KINDS[kind](task.model.parameters(), update_period=period, betas=(0.0, 0.9))
    optimizer.step(standard(optimizer, task.loss))
    for p in task.model.parameters():
        p.grad = torch.ones_like(p)

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        return task.loss()

    before = values(task.model)
    try:
        optimizer.step(closure)
    except RuntimeError:
        return  # to say so is as good
    assert_moved(values(task.model), before)


@twice
def test_a_parameter_in_which_the_loss_is_linear(kind: str) -> None:
    bent, linear = (nn.Parameter(torch.ones(2, dtype=DOUBLE)) for _ in range(2))
    optimizer = KINDS[kind]([bent, linear])
    for _ in range(3):
        optimizer.step(standard(optimizer, lambda: (bent**4).sum() + 2 * linear.sum()))
    assert not optimizer.state[linear]["exp_hessian"].any()
    assert optimizer.state[bent]["exp_hessian"].all()
    assert optimizer.info.status is StepStatus.MOVED
    assert (linear < 1).all()


@twice
def test_a_loss_that_is_linear_altogether(kind: str) -> None:
    p = nn.Parameter(torch.ones(2, dtype=DOUBLE))
    optimizer = KINDS[kind]([p])
    optimizer.step(standard(optimizer, lambda: 2 * p.sum()))
    assert not optimizer.state[p]["exp_hessian"].any()
    assert optimizer.info.status is StepStatus.MOVED
    assert (p < 1).all() and torch.isfinite(p).all()


def kinked(p: Tensor, at: float) -> Tensor:
    """Of finite gradient everywhere; the second derivative at `at` is infinite."""
    return ((p - at).abs().pow(1.5) + p).sum()


@twice
@pytest.mark.parametrize("capturable", [False, True])
def test_products_that_are_not_finite_leave_the_last_curvature(kind: str, capturable: bool) -> None:
    p = nn.Parameter(torch.ones(2, dtype=DOUBLE))
    optimizer = KINDS[kind]([p], capturable=capturable)
    optimizer.step(standard(optimizer, lambda: kinked(p, 0.0)))
    curvature, before = optimizer.state[p]["exp_hessian"].clone(), values([p])
    at = p[0].item()
    optimizer.step(standard(optimizer, lambda: kinked(p, at)))
    assert optimizer.info.status is StepStatus.MOVED_ON_OLD_CURVATURE
    assert torch.equal(optimizer.state[p]["exp_hessian"], curvature)
    assert optimizer.state[p]["step"] == 2 and optimizer.state[p]["curvature_step"] == 1
    assert_moved(values([p]), before)
    assert torch.isfinite(p).all()
    optimizer.step(standard(optimizer, lambda: kinked(p, 0.0)))
    assert optimizer.info.status is StepStatus.MOVED


@twice
@pytest.mark.parametrize("capturable", [False, True])
def test_first_products_that_are_not_finite_leave_everything(kind: str, capturable: bool) -> None:
    def run(bad: bool) -> tuple[Tensor, Any]:
        p = nn.Parameter(torch.zeros(2, dtype=DOUBLE))
        optimizer = KINDS[kind]([p], capturable=capturable)
        if bad:
            optimizer.step(standard(optimizer, lambda: kinked(p, 0.0)))
            assert not p.any()
            assert optimizer.info.status is StepStatus.NONFINITE_PRODUCTS
            assert optimizer.info.iterations == 0
        for _ in range(3):
            optimizer.step(standard(optimizer, lambda: kinked(p, 1.0)))
            assert optimizer.info.status is StepStatus.MOVED
        return p.detach(), optimizer.state[p]["step"]

    (ours, step), (expected, count) = run(True), run(False)
    assert step == count == 3
    torch.testing.assert_close(ours, expected)


@twice
def test_curvature_is_due_again_where_the_first_was_not_finite(kind: str) -> None:
    p = nn.Parameter(torch.zeros(2, dtype=DOUBLE))
    optimizer = KINDS[kind]([p], update_period=10)
    optimizer.step(standard(optimizer, lambda: kinked(p, 0.0)))
    assert optimizer.curvature_due
    optimizer.step(standard(optimizer, lambda: kinked(p, 1.0)))
    assert optimizer.curvature_due is (kind == "AdaHessian")  # whose first ten all estimate
    assert p.all()


@every
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_start_that_is_not_finite_leaves_everything(
    kind: str, capturable: bool, what: str
) -> None:
    task, other = Task(), Task()
    optimizer, expected = (
        KINDS[kind](t.model.parameters(), capturable=capturable) for t in (task, other)
    )
    optimizer.step(standard(optimizer, task.loss))
    expected.step(standard(expected, other.loss))
    before = values(task.model)

    def bad() -> Tensor:
        loss = standard(optimizer, task.loss)()
        if what == "gradient":
            task.model.linear.weight.grad[0, 0] = math.inf
            return loss
        return loss * math.nan

    optimizer.step(bad)
    assert optimizer.info.status is StepStatus.NONFINITE_START
    assert optimizer.info.iterations == 0
    assert_same(task.model, before, 0)
    for p, q in zip(task.model.parameters(), other.model.parameters(), strict=True):
        for name in ("exp_avg", "exp_hessian", "step", "curvature_step"):
            assert torch.equal(optimizer.state[p][name], expected.state[q][name])


@every
@pytest.mark.parametrize("resumed", [False, True], ids=["running", "resumed"])
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_statistics_are_put_back_after_a_loss_that_is_not_finite(
    kind: str, steps: int, resumed: bool
) -> None:
    task = Task()
    optimizer = KINDS[kind](task.model.parameters(), update_period=3, capturable=False)
    for _ in range(steps):
        optimizer.step(standard(optimizer, task.loss))
    if resumed:
        state = optimizer.state_dict()
        optimizer = KINDS[kind](task.model.parameters(), update_period=3, capturable=False)
        optimizer.load_state_dict(state)
    buffers = [b.clone() for b in task.model.buffers()]
    optimizer.step(standard(optimizer, lambda: task.loss() * math.nan))
    assert optimizer.info.status is StepStatus.NONFINITE_START
    for b, expected in zip(task.model.buffers(), buffers, strict=True):
        assert torch.equal(b, expected)
    optimizer.step(standard(optimizer, task.loss))
    assert int(task.model.batchnorm.num_batches_tracked) == steps + 1


@twice
def test_functions_that_are_differentiable_once_are_refused(kind: str) -> None:
    p = nn.Parameter(torch.ones(2, dtype=DOUBLE))
    optimizer = KINDS[kind]([p])
    with pytest.raises(RuntimeError, match="no second derivative"):
        optimizer.step(standard(optimizer, lambda: Cube.apply(p).sum()))
    assert torch.equal(p, torch.ones_like(p))


def test_labels_drawn_from_the_model_need_no_second_derivative() -> None:
    p = nn.Parameter(torch.ones(3, dtype=DOUBLE))
    optimizer = KINDS["Sophia-G"]([p])
    target = torch.zeros(3, dtype=DOUBLE)
    optimizer.step(standard(optimizer, lambda: F.mse_loss(Cube.apply(p), target)))
    # J = 3, B = 2 / 3, and signs have no variance.
    torch.testing.assert_close(
        optimizer.state[p]["exp_hessian"], 0.01 * torch.full((3,), 6.0, dtype=DOUBLE)
    )


@every
def test_gradients_made_without_loss_backward_are_refused(kind: str) -> None:
    task = Task()
    optimizer = KINDS[kind](task.model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = task.loss()
        torch.autograd.backward(loss)
        return loss

    with pytest.raises(RuntimeError, match=r"without loss\.backward\(\)"):
        optimizer.step(closure)


@every
def test_an_exception_in_the_closure_leaves_everything(kind: str) -> None:
    task, other = Task(), Task()
    optimizer, expected = (
        KINDS[kind](t.model.parameters(), update_period=2) for t in (task, other)
    )
    buffers = [b.clone() for b in task.model.buffers()]

    def broken() -> Tensor:
        task.loss().backward()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        optimizer.step(broken)
    assert all(torch.equal(a, b) for a, b in zip(task.model.buffers(), buffers, strict=True))
    assert optimizer.curvature_due
    optimizer.step(standard(optimizer, task.loss))
    expected.step(standard(expected, other.loss))
    assert int(task.model.batchnorm.num_batches_tracked) == 1
    for p, q in zip(task.model.parameters(), other.model.parameters(), strict=True):
        # Probes may be others.
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], expected.state[q]["exp_avg"])


# Memory.


@every
@pytest.mark.parametrize("how", ["closure", "two backwards", "graph", "capturable"])
def test_memory_does_not_grow(kind: str, how: str) -> None:
    if how == "graph" and kind == "Sophia-G":
        pytest.skip("needs a closure")
    model, loss = tiny()
    optimizer = KINDS[kind](model.parameters(), update_period=3, capturable=how == "capturable")

    def step() -> None:
        if how in ("closure", "capturable"):
            optimizer.step(standard(optimizer, loss))
            return
        optimizer.zero_grad()
        if how == "graph":
            loss().backward(create_graph=optimizer.curvature_due)
            optimizer.step()
            return

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss()
            value.backward(retain_graph=True)
            value.backward()
            return value

        optimizer.step(closure)

    for _ in range(6):
        step()
    gc.collect()
    gc.disable()
    try:
        first = live_tensors()
        for _ in range(30):
            step()
        last = live_tensors()
    finally:
        gc.enable()
    assert last == first


@pytest.mark.slow
@every
def test_the_process_does_not_grow(kind: str) -> None:
    """Over 300 steps with activations of a megabyte each, by what the system says."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Softplus(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x, y = torch.randn(2, 1, 128, 128), torch.randint(8, (2,))
    optimizer = KINDS[kind](model.parameters(), update_period=3)
    closure = standard(optimizer, lambda: F.cross_entropy(model(x), y))

    def resident() -> float:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096 / 2**20

    try:
        resident()
    except OSError:
        pytest.skip("no /proc here")
    for _ in range(20):
        optimizer.step(closure)
    gc.collect()
    gc.disable()
    try:
        before = resident()
        for _ in range(300):
            optimizer.step(closure)
        grown = resident() - before
    finally:
        gc.enable()
    assert grown < 60


@every
@pytest.mark.parametrize("read", [False, True])
def test_an_optimizer_that_is_dropped_goes_at_once(kind: str, read: bool) -> None:
    """And with it memory of three times the parameters, without waiting for the collector."""
    model, loss = tiny()
    optimizer = KINDS[kind](model.parameters())
    for _ in range(2):
        optimizer.step(standard(optimizer, loss))
    if read:
        assert optimizer.info
    gc.collect()
    gc.disable()
    try:
        alive = weakref.ref(optimizer)
        del optimizer
        assert alive() is None
    finally:
        gc.enable()


# Copies and checkpoints.


def through_pickle(model: nn.Module, optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps((model, optimizer)))


def through_deepcopy(model: nn.Module, optimizer: Any) -> Any:
    return copy.deepcopy((model, optimizer))


@every
@periods
@pytest.mark.parametrize("way", [through_pickle, through_deepcopy])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.bfloat16])
def test_a_copy_goes_on_bit_for_bit(kind: str, period: int, way: Any, dtype: torch.dtype) -> None:
    task = Task(dtype=dtype)
    optimizer = KINDS[kind](task.model.parameters(), update_period=period)
    for _ in range(4):
        optimizer.step(standard(optimizer, task.loss))
    model, copied = way(task.model, optimizer)
    for _ in range(4):
        optimizer.step(standard(optimizer, task.loss))
    before = values(task.model)
    task.model, original = model, task.model
    for _ in range(4):
        copied.step(standard(copied, task.loss))
    assert_same(original, before, 0)
    assert_same(model, before, 0)


@every
@pytest.mark.parametrize("way", [through_pickle, through_deepcopy])
def test_parameters_of_a_copy_count_on_their_own(kind: str, way: Any) -> None:
    task = Task()
    optimizer = KINDS[kind](task.model.parameters(), update_period=2)
    for _ in range(4):
        optimizer.step(standard(optimizer, task.loss))
    model, copied = way(task.model, optimizer)
    for turn in range(4):
        for one, of in ((task.model, optimizer), (model, copied)):
            next(one.parameters()).requires_grad_(turn > 1)
            original, task.model = task.model, one
            of.step(standard(of, task.loss))
            task.model = original
    assert_same(model, values(task.model), 0)


@every
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [1, 4, 13])
def test_a_checkpoint_between_estimates_goes_on_bit_for_bit(
    kind: str, dtype: torch.dtype, steps: int, device: torch.device
) -> None:
    def groups(task: Task) -> list[dict[str, Any]]:
        return task.groups({"lr": 0.003}, {"betas": (0.5, 0.9)}, {"weight_decay": 0.1})

    task = Task(device, dtype)
    optimizer = KINDS[kind](groups(task), update_period=10)
    for _ in range(steps):
        optimizer.step(standard(optimizer, task.loss))
    file = io.BytesIO()
    torch.save((task.model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    for _ in range(12):
        optimizer.step(standard(optimizer, task.loss))
    other = Task(device, dtype)
    resumed = KINDS[kind](groups(other), update_period=10)
    if steps == 4:  # one that is not fresh
        for _ in range(2):
            resumed.step(standard(resumed, other.loss))
    weights, state = torch.load(file, weights_only=True)
    other.model.load_state_dict(weights)
    resumed.load_state_dict(state)
    for _ in range(12):
        resumed.step(standard(resumed, other.loss))
    assert_same(other.model, task.model, 0)


@every
def test_saving_changes_nothing(kind: str) -> None:
    task, other = Task(), Task()
    optimizer, expected = (
        KINDS[kind](t.model.parameters(), update_period=3) for t in (task, other)
    )
    for _ in range(5):
        optimizer.step(standard(optimizer, task.loss))
        optimizer.load_state_dict(optimizer.state_dict())
        expected.step(standard(expected, other.loss))
    assert_same(task.model, other.model, 0)


@every
def test_a_state_that_was_saved_does_not_move_on(kind: str) -> None:
    task = Task()
    optimizer = KINDS[kind](task.model.parameters())
    optimizer.step(standard(optimizer, task.loss))
    state = copy.deepcopy(optimizer.state_dict())
    again = KINDS[kind](task.model.parameters())
    again.load_state_dict(state)
    kept = copy.deepcopy(state)
    again.step(standard(again, task.loss))
    torch.testing.assert_close(state["state"], kept["state"], rtol=0, atol=0)


DTYPES = (DOUBLE, torch.float32, torch.bfloat16)


@every
@pytest.mark.parametrize("before", DTYPES)
@pytest.mark.parametrize("after", DTYPES)
def test_a_checkpoint_of_another_dtype_is_taken(
    kind: str, before: torch.dtype, after: torch.dtype
) -> None:
    """Moments are kept or converted; training goes on, and steps below bfloat16 add up."""
    p = nn.Parameter(torch.full((3,), 4.0, dtype=before))
    q = nn.Parameter(torch.full((3,), 4.0, dtype=after))

    def loss_of(p: Tensor) -> Callable[[], Tensor]:
        return lambda: F.mse_loss(p, torch.zeros_like(p), reduction="sum")

    optimizer = KINDS[kind]([p], lr=0.0, update_period=3)
    for _ in range(2):
        optimizer.step(standard(optimizer, loss_of(p)))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = KINDS[kind]([q], lr=0.0, update_period=3)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.param_groups[0]["lr"] = 1e-3
    for _ in range(8):
        resumed.step(standard(resumed, loss_of(q)))
        assert resumed.info.status is StepStatus.MOVED
    state = resumed.state[q]
    assert state["step"] == 10
    assert (q <= 4).all() and torch.isfinite(q).all()
    kept = state.get("master", q)
    assert (kept < 4).all() and torch.equal(kept.to(q.dtype), q)


@every
def test_a_state_of_others_is_refused(kind: str) -> None:
    task = Task()
    optimizer = KINDS[kind](task.model.parameters())
    optimizer.step(standard(optimizer, task.loss))
    other = torch.optim.AdamW(task.model.parameters())
    task.loss().backward()
    other.step()
    with pytest.raises(ValueError, match="this is no state of"):
        optimizer.load_state_dict(other.state_dict())
    optimizer.step(standard(optimizer, task.loss))
    assert optimizer.info.status is StepStatus.MOVED


@every
def test_zeroing_the_moments_by_hand_counts(kind: str) -> None:
    """They may be views of something larger; whose business is that?"""
    task = Task()
    optimizer = KINDS[kind](task.model.parameters(), lr=0.0, betas=(0.5, 0.9))
    optimizer.step(standard(optimizer, task.loss))
    weight = task.model.linear.weight
    optimizer.state[weight]["exp_avg"] = torch.zeros_like(weight)
    optimizer.step(standard(optimizer, task.loss))
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], weight.grad / 2)
