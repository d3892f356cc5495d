"""Loops that pass no closure and know nothing of the optimizer: backward passes are seen."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tests.support.closures import standard
from tests.support.custom_functions import Cube, cube, custom_function, slope_of_cube
from tests.support.diagonal_references import Task, assert_same, values
from tests.support.diagonal_runs import (
    KINDS,
    NO_WARNING_OF_CYCLES,
    PARTS,
    eval_loss,
    every,
    five_steps,
    live_graphs,
    live_tensors,
    periods,
    steps_on_parts,
    tiny,
    twice,
)
from tests.support.ranks import on_both, run_on_ranks
from tests.support.shares import Share
from torch_secondorder import LBFGS, AdaHessian, NewtonCG, Sophia, StepStatus
from torch_secondorder._autograd.graph import MissingSecondDerivative

ORIGINAL = torch.autograd.backward

DOUBLE = torch.float64

pytestmark = NO_WARNING_OF_CYCLES


@pytest.fixture(scope="module", autouse=True)
def _nobody_else_listens() -> None:
    gc.collect()  # optimizers of other files, in cycles with the errors that they raised


# The same numbers as with a closure.


@every
@periods
@pytest.mark.parametrize("clip", [False, True])
def test_a_loop_equals_the_closure(kind: str, period: int, clip: bool) -> None:
    def step(optimizer: Any, task: Task, clip_gradients: Callable[[], None]) -> None:
        optimizer.zero_grad()
        task.loss().backward()
        clip_gradients()
        assert optimizer.step() is None

    found, expected = five_steps(kind, period, clip, step), five_steps(kind, period, clip)
    # Drawn labels go by logarithms of probabilities in the place of logits.
    assert_same(found, expected, 1e-14 if kind == "Sophia-G" else 0)


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "mse": lambda z: F.mse_loss(z, torch.ones_like(z)),
    "mse of a sum": lambda z: 3 * F.mse_loss(z, z.new_ones(3, 3), reduction="sum") + z.sum(),
    "cross-entropy": lambda z: F.cross_entropy(
        z, torch.tensor([0, 2, -100]), weight=z.new_tensor([1.0, 2.0, 3.0])
    ),
    "cross-entropy at positions": lambda z: F.cross_entropy(
        z.view(1, 3, 3, 1), torch.tensor([[[0], [2], [1]]]), reduction="none"
    ).mean(),
    "binary": lambda z: F.binary_cross_entropy(z.sigmoid(), torch.full_like(z, 0.3)),
    "binary with logits": lambda z: F.binary_cross_entropy_with_logits(
        z, torch.full_like(z, 0.3), pos_weight=z.new_tensor(2.0)
    ),
    "huber": lambda z: F.huber_loss(z, torch.ones_like(z)),
    "smooth l1": lambda z: F.smooth_l1_loss(z, torch.ones_like(z)),
    "soft margin": lambda z: F.soft_margin_loss(z, torch.ones_like(z)),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_outputs_are_found_behind(loss: str) -> None:
    def run(closes: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        x = torch.randn(3, 4, dtype=DOUBLE)
        optimizer = KINDS["Sophia-G"](model.parameters())
        closure = standard(optimizer, lambda: LOSSES[loss](model(x)))
        for _ in range(3):
            if closes:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        return [optimizer.state[p]["exp_hessian"] for p in model.parameters()]

    assert_same(run(False), run(True), 1e-12)


@every
@periods
@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("mixed", [False, True])
def test_micro_batches_add_up(kind: str, period: int, to_none: bool, mixed: bool) -> None:
    """Some of them in contexts, if mixed."""
    task = Task()
    optimizer = KINDS[kind](task.model.parameters(), update_period=period)
    for _ in range(4):
        for number, part in enumerate(PARTS):
            with optimizer.watching() if mixed and number == 1 else contextlib.nullcontext():
                eval_loss(task, part).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
    assert_same(values(task.model), steps_on_parts(kind, period), 1e-12)


@every
@pytest.mark.parametrize("to_none", [True, False])
def test_a_batch_that_is_dropped_takes_its_curvature_along(kind: str, to_none: bool) -> None:
    """As one whose backward pass was for looking at only."""

    def run(drops: bool) -> list[Tensor]:
        w = torch.tensor([[1.0, -2.0]], dtype=DOUBLE, requires_grad=True)
        optimizer = KINDS[kind]([w])
        for target in [5.0, -2.0] if drops else [-2.0]:
            optimizer.zero_grad(set_to_none=to_none)
            # A diagonal Hessian: every probe gives it.
            z = w * torch.tensor([3.0, abs(target)])
            F.mse_loss(z, torch.full_like(z, target), reduction="sum").backward()
        optimizer.step()
        return [w.detach(), optimizer.state[w]["exp_hessian"]]

    assert_same(run(True), run(False), 1e-14)


# Nothing where nothing is needed.


@every
def test_pytorchs_own_function_is_there_between(kind: str) -> None:
    task = Task()
    optimizer = KINDS[kind](task.model.parameters(), update_period=3)
    for _ in range(12):
        assert (torch.autograd.backward is ORIGINAL) is not optimizer.curvature_due
        task.loss().backward()
        assert not any(p._post_accumulate_grad_hooks for p in task.model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    gone = weakref.ref(optimizer)
    while not optimizer.curvature_due:
        task.loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    task.loss().backward()
    del optimizer
    assert gone() is None
    assert torch.autograd.backward is ORIGINAL


def test_optimizers_that_do_not_watch() -> None:
    p = nn.Parameter(torch.ones(2))
    made = [
        AdaHessian([p], watch=False),
        Sophia([p], watch=False),
        AdaHessian([p], accumulation_steps=2),
        LBFGS([p]),
        NewtonCG([p]),
    ]
    assert torch.autograd.backward is ORIGINAL
    assert [o._watches for o in made[:3]] == [False, False, True]


def test_a_function_that_somebody_wraps_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    x = torch.ones(2, dtype=DOUBLE, requires_grad=True)
    optimizer = AdaHessian([x], lr=1.0)
    inner = torch.autograd.backward

    def wrapped(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        inner(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "backward", wrapped)
    for _ in range(3):
        (x**2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.info.products == 1
    del optimizer
    (x**2).sum().backward()
    assert_same([x.grad], [2 * x.detach()], 0)
    assert len(calls) == 4  # each of the passes went through it


def test_functions_do_not_pile_up_where_somebody_puts_back_what_was_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def depth() -> int:
        function: Any = torch.autograd.backward
        found = 0
        while hasattr(function, "__wrapped__"):
            function, found = function.__wrapped__, found + 1
        return found

    x = torch.ones(2, dtype=DOUBLE, requires_grad=True)
    for _ in range(5):
        optimizer = AdaHessian([x], lr=0.1)
        with monkeypatch.context() as patch:
            patch.setattr(torch.autograd, "backward", partial(torch.autograd.backward))
            (x**2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert optimizer.info.products == 1
            del optimizer  # stops listening below another function
        assert depth() == 1
    optimizer = AdaHessian([x])
    assert depth() == 1
    del optimizer
    assert torch.autograd.backward is ORIGINAL


# What a backward pass does besides.


@twice
@pytest.mark.parametrize("before", ["none", "there"])
def test_everybody_gets_what_a_plain_pass_gives(kind: str, before: str) -> None:
    def run(watch: bool) -> tuple[list[Any], list[Tensor]]:
        told: list[Any] = []
        torch.manual_seed(3)
        model, other = nn.Linear(3, 3).double(), nn.Linear(3, 1).double()
        free = torch.randn(3, dtype=DOUBLE, requires_grad=True)
        x = torch.randn(2, 3, dtype=DOUBLE, requires_grad=True)
        leaves = [*model.parameters(), *other.parameters(), free, x]
        held = [None if before == "none" else torch.zeros_like(p) for p in leaves]
        for p, grad in zip(leaves, held, strict=True):
            p.grad = grad
        optimizer = KINDS[kind](model.parameters(), watch=watch)
        torch.optim.SGD(other.parameters())
        model.weight.register_hook(lambda g: 2 * g)
        free.register_hook(lambda g: told.append("tensor"))
        other.weight.register_post_accumulate_grad_hook(
            lambda p: told.append(("post", p.grad.detach().clone()))
        )
        accumulates = x.view_as(x).grad_fn.next_functions[0][0]
        accumulates.register_hook(lambda *_: told.append("node"))
        y = (model(x) * free).tanh()
        y.register_hook(lambda g: g.clamp(max=0.5))
        loss = other(y).square().sum()
        loss.backward(torch.tensor(0.5, dtype=DOUBLE), retain_graph=True)
        other(y.detach()).sum().backward()  # reaches none of the optimizer's
        loss.backward()
        assert all(p.grad.grad_fn is None and not p.grad.requires_grad for p in leaves)
        if before == "there":
            assert all(p.grad is grad for p, grad in zip(leaves, held, strict=True))
        del optimizer
        told = sorted((t if isinstance(t, str) else t[0]) for t in told)
        return told, [p.grad for p in leaves]

    (ours, grads), (told, expected) = run(True), run(False)
    assert ours == told
    assert len(told) == 7  # two passes: tensor, node; three with the post-accumulate one
    assert_same(grads, expected, 0)


@twice
def test_gradients_are_nobody_elses(kind: str) -> None:
    a, b = (torch.ones(3, dtype=DOUBLE, requires_grad=True) for _ in range(2))
    optimizer = KINDS[kind]([a, b])
    ((a + b) ** 3).sum().backward()
    a.grad.mul_(0.5)
    assert_same([b.grad], [torch.full((3,), 12.0, dtype=DOUBLE)], 0)
    del optimizer


WAYS: dict[str, Callable[[Tensor, list[Tensor]], None]] = {
    "torch.autograd.backward": lambda loss, _: torch.autograd.backward(loss),
    "by keyword": lambda loss, _: torch.autograd.backward(tensors=[loss]),
    "several losses": lambda loss, _: torch.autograd.backward(
        [0.25 * loss, loss.expand(2)], [None, torch.full((2,), 0.375, dtype=DOUBLE)]
    ),
    "gradient": lambda loss, _: (4 * loss).backward(torch.tensor(0.25, dtype=DOUBLE)),
    "inputs": lambda loss, params: loss.backward(inputs=params),
    "inputs in two parts": lambda loss, params: (
        loss.backward(inputs=params[:2], retain_graph=True),
        loss.backward(inputs=params[2:]),
    )[0],
    "create_graph": lambda loss, _: loss.backward(create_graph=True),
    "retain_graph": lambda loss, _: (
        (0.5 * loss).backward(retain_graph=True),
        (0.5 * loss).backward(),
    )[0],
}


@every
@pytest.mark.parametrize("way", WAYS)
def test_other_ways_of_going_backward(kind: str, way: str) -> None:
    def run(backward: Callable[[Tensor, list[Tensor]], None]) -> list[Tensor]:
        task = Task()
        params = list(task.model.parameters())
        optimizer = KINDS[kind](params)
        for _ in range(3):
            backward(eval_loss(task), params)
            optimizer.step()
            assert all(p.grad.grad_fn is None for p in params)
            assert optimizer.info.status is StepStatus.MOVED
            optimizer.zero_grad()
        return values(task.model)

    if (kind, way) == ("Sophia-G", "inputs in two parts"):
        with pytest.raises(RuntimeError, match=r"loss.backward\(inputs=...\)"):
            run(WAYS[way])
    elif kind == "Sophia-G" and way == "retain_graph":
        run(WAYS[way])  # draws for each
    else:
        assert_same(run(WAYS[way]), run(lambda loss, _: loss.backward()), 1e-12)


def test_inputs_of_others_are_none_of_ours() -> None:
    """A saliency map: the gradient by the input alone."""
    model = nn.Linear(3, 2)
    optimizer = AdaHessian(model.parameters())
    x = torch.ones(1, 3, requires_grad=True)
    for inputs in (x, [x]):
        model(x).square().sum().backward(inputs=inputs)
    assert model.weight.grad is None
    assert optimizer._observation is None
    with pytest.raises(RuntimeError, match="no gradient reached"):
        optimizer.step()


@every
def test_loops_that_ask_for_second_order(kind: str) -> None:
    """timm's `train_one_epoch` asks so."""
    task = Task()
    optimizer = KINDS[kind](task.model.parameters(), update_period=2)
    other = Task()
    expected = KINDS[kind](other.model.parameters(), update_period=2)
    asked, graphs = [], live_graphs()
    for _ in range(4):
        second = hasattr(optimizer, "is_second_order") and optimizer.is_second_order
        asked.append(second)
        task.loss().backward(create_graph=second)
        optimizer.step()
        optimizer.zero_grad()
        expected.step(standard(expected, other.loss))
    assert_same(values(task.model), values(other.model), 1e-14)
    assert live_graphs() <= graphs
    wanted = {"AdaHessian": [True, True, True, True], "Sophia": [True, False] * 2}
    assert asked[2:] == wanted.get(kind, [False] * 4)[2:] or kind == "AdaHessian"
    assert any(asked) is (kind != "Sophia-G")


@every
def test_no_graph_and_no_memory_are_kept(kind: str) -> None:
    task, graphs, counts = Task(), live_graphs(), []
    optimizer = KINDS[kind](task.model.parameters())
    for _ in range(5):
        loss = task.loss()
        loss.backward()
        assert all(p.grad.grad_fn is None for p in task.model.parameters())
        del loss
        if len(counts) == 3:
            assert live_graphs() <= graphs
        optimizer.step()
        optimizer.zero_grad()
        counts.append(live_tensors() if len(counts) > 2 else 0)
    assert counts[-1] == counts[-2]


@every
def test_memory_does_not_grow(kind: str) -> None:
    model, loss = tiny()
    optimizer = KINDS[kind](model.parameters(), update_period=3)

    def steps(count: int) -> int:
        for _ in range(count):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        return live_tensors()

    steps(6)
    gc.collect()
    gc.disable()
    try:
        assert steps(3) == steps(30)
    finally:
        gc.enable()


# Several optimizers, several threads.


@twice
def test_adversaries(kind: str) -> None:
    """The losses of both reach the parameters of both."""

    def run(closes: bool) -> list[Tensor]:
        torch.manual_seed(5)
        maker, judge = nn.Linear(2, 3).double(), nn.Linear(3, 1).double()
        z, real = torch.randn(4, 2, dtype=DOUBLE), torch.randn(4, 3, dtype=DOUBLE)
        a, b = KINDS[kind](maker.parameters()), KINDS[kind](judge.parameters(), seed=1)

        def make() -> Tensor:
            return F.softplus(-judge(maker(z).tanh())).mean()

        def judging() -> Tensor:
            return (F.softplus(judge(maker(z).tanh())) + F.softplus(-judge(real))).mean()

        for _ in range(4):
            for optimizer, loss in ((b, judging), (a, make)):
                if closes:
                    optimizer.step(standard(optimizer, loss))
                else:
                    optimizer.zero_grad()
                    loss().backward()
                    optimizer.step()
        return values(maker) + values(judge)

    # The other's estimates that are dropped draw random numbers: compared is what draws none.
    ours = run(False)
    assert all(bool(t.isfinite().all()) for t in ours)


@twice
def test_one_loss_of_two_optimizers(kind: str) -> None:
    """Each sees the block of its own parameters."""

    def run(joint: bool) -> list[Tensor]:
        torch.manual_seed(5)
        first, second = nn.Linear(3, 3).double(), nn.Linear(3, 2).double()
        x = torch.randn(4, 3, dtype=DOUBLE)
        made = [KINDS[kind](m.parameters(), seed=i) for i, m in enumerate((first, second))]

        def loss() -> Tensor:
            return second(first(x).tanh()).square().sum()

        for _ in range(3):
            if joint:
                loss().backward()
                for optimizer in made:
                    optimizer.step()
                    optimizer.zero_grad()
                continue
            at = [copy.deepcopy(p.detach()) for p in (*first.parameters(), *second.parameters())]
            moved = []
            for optimizer, m in zip(made, (first, second), strict=True):
                optimizer.step(standard(optimizer, loss))
                moved.append([p.detach().clone() for p in m.parameters()])
                with torch.no_grad():
                    for p, old in zip((*first.parameters(), *second.parameters()), at, strict=True):
                        p.copy_(old)
            with torch.no_grad():
                for m, those in zip((first, second), moved, strict=True):
                    for p, new in zip(m.parameters(), those, strict=True):
                        p.copy_(new)
        return values(first) + values(second)

    assert_same(run(True), run(False), 1e-13)


@every
def test_threads_that_train(kind: str) -> None:
    def train() -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        for p in model.parameters():
            nn.init.constant_(p, 0.1)
        x, y = torch.linspace(-1, 1, 12, dtype=DOUBLE).view(4, 3), torch.tensor([0, 1, 0, 1])
        optimizer = KINDS[kind](model.parameters(), update_period=2)
        for _ in range(30):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        return values(model)

    expected, found = train(), []
    threads = [threading.Thread(target=lambda: found.append(train())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for those in found:
        assert_same(those, expected, 0)


# Copies and checkpoints.


@every
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_see_by_themselves(kind: str, how: str) -> None:
    task = Task()
    optimizer = KINDS[kind](task.model.parameters())
    task.loss().backward()
    optimizer.step()
    optimizer.zero_grad()
    both = (task, optimizer)
    copied = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    for own, its in (both, copied):
        for _ in range(2):
            own.loss().backward()
            its.step()
            its.zero_grad()
            assert its.info.products == 1
    assert_same(copied[0].model, task.model, 0)
    silent = copy.deepcopy(KINDS[kind](task.model.parameters(), watch=False))
    assert not silent._watches


@every
def test_a_state_that_is_loaded(kind: str) -> None:
    task, other = Task(), Task()
    optimizer, fresh = (KINDS[kind](t.model.parameters(), update_period=2) for t in (task, other))
    for _ in range(3):
        optimizer.step(standard(optimizer, task.loss))
    optimizer.zero_grad()
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.model.load_state_dict(task.model.state_dict())
    for own, its in ((task, optimizer), (other, fresh)):
        for _ in range(4):
            own.loss().backward()
            its.step()
            its.zero_grad()
    assert_same(other.model, task.model, 0)


@every
def test_optimizers_that_are_made_after_the_backward_pass(kind: str) -> None:
    """Pyro makes one for each parameter, once its gradient is there."""
    w = torch.tensor([1.0, -2.0], dtype=DOUBLE, requires_grad=True)
    F.mse_loss(w * 2.0, w.new_zeros(2), reduction="sum").backward()
    optimizer = KINDS[kind]([w], update_period=5)
    optimizer.step()
    assert optimizer.info.status is StepStatus.NO_CURVATURE
    assert optimizer.curvature_due
    assert_same([w.detach()], [w.new_tensor([1.0, -2.0]).detach()], 0)
    optimizer.zero_grad()
    F.mse_loss(w * 2.0, w.new_zeros(2), reduction="sum").backward()
    optimizer.step()
    assert optimizer.info.status is StepStatus.MOVED
    assert optimizer.info.products == 1


@every
def test_a_closure_that_does_nothing(kind: str) -> None:
    """Lightning passes one under manual optimization; the model is one whose memory is kept."""

    def run(idle: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(300, 400), nn.Tanh(), nn.Linear(400, 3))
        x, y = torch.randn(8, 300), torch.randint(3, (8,))
        optimizer = KINDS[kind](model.parameters())
        for _ in range(3):
            F.cross_entropy(model(x), y).backward()
            optimizer.step((lambda: None) if idle else None)
            optimizer.zero_grad()
        return values(model)

    assert_same(run(True), run(False), 0)


# Mixed precision.


@every
@pytest.mark.parametrize("watched", [False, True])
def test_a_gradient_scaler(kind: str, watched: bool) -> None:
    """Scales are powers of two, which change no digit."""

    def run(scales: bool) -> list[Tensor]:
        task = Task(dtype=torch.float32)
        optimizer = KINDS[kind](task.model.parameters(), update_period=2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scales)
        for _ in range(4):
            with optimizer.watching() if watched else contextlib.nullcontext():
                for part in PARTS[:2]:
                    scaler.scale(eval_loss(task, part)).backward()
            scaler.step(optimizer)
            scaler.update()
            assert optimizer.info.status is StepStatus.MOVED
            optimizer.zero_grad()
        return values(task.model)

    assert_same(run(True), run(False), 1e-6 if kind == "Sophia-G" else 0)


def test_products_stay_in_the_range_of_float16() -> None:
    """The scale would take them out of it."""
    x = torch.ones(4, dtype=torch.float16, requires_grad=True)
    optimizer = AdaHessian([x], lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    with torch.no_grad():
        x.mul_(0.01)
    scaler.scale((16 * x * x).sum()).backward()  # the gradient is 5,243, the Hessian 2**19
    scaler.step(optimizer)
    assert optimizer.info.status is StepStatus.MOVED
    torch.testing.assert_close(optimizer.state[x]["exp_hessian"], torch.full((4,), 0.001 * 32**2))


@every
def test_a_scale_that_was_taken_out(kind: str) -> None:
    task = Task(dtype=torch.float32)
    optimizer = KINDS[kind](task.model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(task.loss()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"leave unscale_ out in steps"):
        scaler.step(optimizer)


# Operations without a second derivative of PyTorch's, or a wrong one.


class Attention(nn.Module):
    def __init__(self, causal: bool, heads: int = 2, gqa: bool = False, mask: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        # Without biases: those of keys have gradients of zero, and rounding decides their signs.
        self.q = nn.Linear(8, 8, bias=False)
        self.kv = nn.Linear(8, 8 if gqa else 16, bias=False)
        self.causal, self.heads, self.gqa = causal, heads, gqa
        self.mask = torch.randn(6, 6, dtype=DOUBLE) if mask else None

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (-1, 2 * q.shape[-1])).transpose(1, 2).chunk(2, -1)
        more: dict[str, Any] = {"enable_gqa": True} if self.gqa else {}
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.mask, is_causal=self.causal, scale=0.7, **more
        )


@twice
@pytest.mark.parametrize("how", ["plain", "causal", "gqa", "mask"])
def test_fused_attention(kind: str, how: str) -> None:
    def run(closes: bool) -> list[Tensor]:
        model = Attention(how == "causal", gqa=how == "gqa", mask=how == "mask").double()
        x = torch.randn(2, 6, 8, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
        optimizer = KINDS[kind](model.parameters())
        names = []
        for _ in range(3):
            optimizer.zero_grad()
            if closes:
                optimizer.step(standard(optimizer, lambda: model(x).square().sum()))
                continue
            z = model(x)
            names.append(z.grad_fn.name())
            z.square().sum().backward()
            optimizer.step()
        assert closes or all("Flash" in name for name in names)
        return values(model)

    assert_same(run(False), run(True), 1e-10)


@twice
@pytest.mark.parametrize("dim", [0, 1])
def test_fused_weight_normalization(kind: str, dim: int) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.v = nn.Parameter(torch.randn(3, 4, dtype=DOUBLE))
            self.g = nn.Parameter(torch.rand(3 if dim == 0 else 1, 4 if dim else 1).double())

        def forward(self, fused: bool) -> Tensor:
            if fused:
                return torch._weight_norm(self.v, self.g, dim)
            return self.v * self.g / self.v.norm(dim=1 - dim, keepdim=True)

    def run(fused: bool) -> list[Tensor]:
        model = Normed()
        optimizer = KINDS[kind](model.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            (model(fused) ** 3).sum().backward()
            optimizer.step()
        return values(model)

    assert_same(run(True), run(False), 1e-10)


def test_checkpointed_models() -> None:
    def run(reentrant: bool | None) -> list[Tensor]:
        task = Task()
        optimizer = AdaHessian(task.model.parameters(), lr=0.02)

        def rest(image: Tensor) -> Tensor:
            x = F.softplus(task.model.conv(image)).flatten(1)
            return task.model.linear(task.model.layernorm(x))

        for _ in range(2):
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
    with pytest.raises(MissingSecondDerivative, match=r"AdaHessian.step\(\)(.|\n)*use_reentrant"):
        run(True)


@twice
def test_a_pass_that_shows_no_curvature_is_an_error_at_the_step_only(kind: str) -> None:
    p = nn.Parameter(torch.full((2,), 2.0, dtype=DOUBLE))
    optimizer = KINDS[kind]([p])
    Cube.apply(p).sum().backward()
    assert_same([p.grad], [torch.full((2,), 12.0, dtype=DOUBLE)], 0)
    with pytest.raises(MissingSecondDerivative, match="Cube, marked once_differentiable"):
        optimizer.step()
    optimizer.zero_grad()
    (p**3).sum().backward()
    optimizer.step()
    assert optimizer.info.status is StepStatus.MOVED


@every
def test_an_exception_in_a_hook_passes_through(kind: str) -> None:
    task = Task()
    optimizer = KINDS[kind](task.model.parameters())

    def fails(_: Tensor) -> None:
        raise KeyError("mine")

    handle = task.model.linear.weight.register_hook(fails)
    with pytest.raises(KeyError, match="mine"):
        task.loss().backward()
    handle.remove()
    optimizer.zero_grad()
    task.loss().backward()
    optimizer.step()
    assert optimizer.info.status is StepStatus.MOVED


# What the errors say.


@every
def test_what_is_missing_is_named(kind: str) -> None:
    def fails(message: str, prepare: Callable[[Task, Any], Any], **options: Any) -> None:
        task = Task()
        optimizer = KINDS[kind](task.model.parameters(), **options)
        prepare(task, optimizer)
        before = values(task.model)
        with pytest.raises(RuntimeError, match=message) as error:
            optimizer.step()
        assert "Hugging" not in str(error.value)
        assert_same(values(task.model), before, 0)

    fails("no gradient reached(.|\n)*after loss.backward", lambda *_: None)
    fails("made with watch=False", lambda task, _: task.loss().backward(), watch=False)
    fails("accumulation_steps says", lambda task, _: task.loss().backward(), accumulation_steps=2)
    fails(
        "there were gradients before it",
        lambda task, _: (
            [setattr(p, "grad", torch.ones_like(p)) for p in task.model.parameters()],
            task.loss().backward(),
        ),
    )

    def by_hand(task: Task, _: Any) -> None:
        params = list(task.model.parameters())
        for p, g in zip(params, torch.autograd.grad(task.loss(), params), strict=True):
            p.grad = g

    fails(r"not from loss.backward\(\)", by_hand)


@pytest.mark.parametrize("make", [LBFGS, NewtonCG])
def test_optimizers_that_need_a_closure(make: Any) -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = make([p])
    (p**2).sum().backward()
    name = make.__name__
    with pytest.raises(
        RuntimeError, match=rf"{name}.step\(\) evaluates(.|\n)*use SOAP, Shampoo, KFAC"
    ):
        optimizer.step()


def test_losses_that_show_no_outputs() -> None:
    p = nn.Parameter(torch.ones(2, dtype=DOUBLE))
    optimizer = KINDS["Sophia-G"]([p])
    (p**2).sum().backward()
    with pytest.raises(RuntimeError, match="no model output was found"):
        optimizer.step()


# Several processes.


def train(rank: int, ranks: int) -> list[Any]:
    """Two micro-batches a step, the first without synchronization; gradients are clipped."""
    found = []
    for kind, options in ((AdaHessian, {}), (Sophia, {}), (Sophia, {"estimator": "gnb"})):
        for how in ({}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}):
            share = Share(rank, ranks)
            model: Any = share.plain if ranks == 1 else DistributedDataParallel(share.plain, **how)
            share.model = model
            optimizer = kind(model.parameters(), lr=0.02, update_period=3, **options)
            for _ in range(6):
                with model.no_sync() if ranks > 1 else contextlib.nullcontext():
                    (share.loss() / 4).backward()
                (share.loss() * 0.75).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad(set_to_none=not how)
            found += share.values()
    return found


def train_as_with_closures(rank: int, ranks: int) -> list[bool]:
    """Gradients that PyTorch averages are those that we average."""
    same = []
    for kind, options in ((AdaHessian, {}), (Sophia, {"update_period": 1})):
        results = []
        for closes in (True, False):
            share = Share(rank, ranks)
            optimizer = kind(share.model.parameters(), lr=0.02, **options)
            for _ in range(4):
                if closes:
                    optimizer.step(share.closure)
                else:
                    share.closure()
                    optimizer.step()
            results.append(share.values())
        same.append(all(torch.allclose(a, b, 1e-12, 1e-12) for a, b in zip(*results, strict=True)))
    return same


def train_statically(rank: int, ranks: int) -> list[Tensor]:
    """The first pass has a way out, and the others need none."""
    share = Share(rank, ranks)
    model = DistributedDataParallel(share.plain, static_graph=True)
    share.model = model
    optimizer = AdaHessian(model.parameters(), lr=0.02)
    share.closure()
    with pytest.raises(RuntimeError, match=r"static_graph=True\)(.|\n)*watching"):
        optimizer.step()
    for _ in range(3):
        share.closure()
        optimizer.step()
    return share.values()


def train_after_a_late_start(rank: int, ranks: int) -> list[Tensor]:
    """The optimizer was made when no one knew of processes."""
    share = Share(rank, ranks)
    counting, dist.get_world_size = dist.get_world_size, lambda *_: 1
    try:
        optimizer = AdaHessian(share.model.parameters(), lr=0.02)
    finally:
        dist.get_world_size = counting
    share.closure()
    with pytest.raises(RuntimeError, match="initialized after the optimizer was made"):
        optimizer.step()
    for _ in range(2):
        share.closure()
        optimizer.step()
    return share.values()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_two_ranks_are_one_with_the_whole_batch(tmp_path: Path) -> None:
    checks = [train, train_as_with_closures, train_statically, train_after_a_late_start]
    ranks = run_on_ranks(checks, tmp_path)
    ours = on_both(ranks, "train")
    torch.testing.assert_close(ours, train(0, 1), rtol=1e-12, atol=1e-12)
    assert on_both(ranks, "train_as_with_closures") == [True, True]
    on_both(ranks, "train_statically")
    on_both(ranks, "train_after_a_late_start")


# Custom functions.


@pytest.mark.parametrize("kind", ["right", "no_graph", "saved", "detached", "once"])
def test_custom_functions_are_examined_where_nobody_captures(kind: str) -> None:
    function = custom_function(cube, slope_of_cube, kind)
    for make in (AdaHessian, Sophia):
        x = torch.tensor([2.0, 3.0], dtype=DOUBLE, requires_grad=True)
        optimizer = make([x])
        function.apply(x).square().sum().backward()
        if kind == "right":
            optimizer.step()
            assert optimizer.info.status is StepStatus.MOVED
        else:
            before = x.detach().clone()
            with pytest.raises(MissingSecondDerivative, match=f"{function.__name__}.*gnb"):
                optimizer.step()
            assert torch.equal(x, before)


def test_a_custom_function_that_nobody_saw_applied_is_refused() -> None:
    gc.collect()  # optimizers of other tests
    x = torch.tensor([2.0, 3.0], dtype=DOUBLE, requires_grad=True)
    loss = custom_function(cube, slope_of_cube).apply(x).square().sum()
    optimizer = AdaHessian([x])
    loss.backward()
    with pytest.raises(MissingSecondDerivative, match="could not be examined"):
        optimizer.step()


def test_labels_need_no_examination() -> None:
    x = torch.tensor([2.0, 3.0], dtype=DOUBLE, requires_grad=True)
    optimizer = Sophia([x], estimator="gnb")
    function = custom_function(cube, slope_of_cube, "no_graph")
    F.mse_loss(function.apply(x), torch.ones(2, dtype=DOUBLE)).backward()
    optimizer.step()
    assert optimizer.info.status is StepStatus.MOVED


def test_nothing_examines_once_no_estimate_is_due() -> None:
    gc.collect()  # optimizers of other tests
    kinds = torch.autograd.Function, torch.autograd.function._SingleLevelFunction

    def held() -> list[Any]:
        return [vars(kind).get("apply") for kind in kinds]

    before = held()
    x = torch.ones(2, dtype=DOUBLE, requires_grad=True)
    optimizer = Sophia([x])
    assert held() != before
    x.square().sum().backward()
    optimizer.step()
    assert held() == before
