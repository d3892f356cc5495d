"""Replacements of `Tensor.backward` that stay in place while an object lives."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_secondorder._autograd.backward_hook import (
    Patch,
    backward_from,
    keep_patched,
    patched_backward,
)


class Holder:
    def f(self) -> str:
        return "f"


class User:
    pass


def louder(original: Callable[[Holder], str]) -> Callable[[Holder], str]:
    @functools.wraps(original)
    def f(self: Holder) -> str:
        return original(self) + "!"

    return f


def wrapped(original: Any) -> Any:
    @functools.wraps(original)
    def f(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        return f"({result})"

    return f


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    original, backward = Holder.f, Tensor.backward
    yield
    Holder.f = original  # type: ignore[method-assign]
    Tensor.backward = backward  # type: ignore[method-assign]


def test_it_stays_until_its_last_user_dies() -> None:
    original, patch = Holder.f, Patch(Holder, "f", louder)
    first, second = User(), User()
    Patch.keep(first, patch)
    Patch.keep(second, patch)
    kept = Holder.f
    Patch.begin(patch)
    Patch.end(patch)
    assert Holder.f is kept and Holder().f() == "f!"
    del first
    gc.collect()
    assert Holder.f is kept
    del second
    gc.collect()
    assert Holder.f is original


def test_who_has_wrapped_it_keeps_that() -> None:
    patch, user = Patch(Holder, "f", louder), User()
    Patch.keep(user, patch)
    ours, theirs = Holder.f, wrapped(Holder.f)
    Holder.f = theirs  # type: ignore[method-assign]
    del user
    gc.collect()
    assert Holder.f is theirs and Holder().f() == "(f!)"
    Holder.f = ours  # type: ignore[method-assign]
    # Put back by who saved it, it is known as ours: the next user takes it away.
    Patch.begin(patch)
    assert Holder.f is ours
    Patch.end(patch)
    assert Holder().f() == "f"


def test_it_comes_back_where_somebody_has_replaced_it() -> None:
    original, patch, user = Holder.f, Patch(Holder, "f", louder), User()
    Patch.keep(user, patch)
    ours = Holder.f
    Holder.f = original  # type: ignore[method-assign]
    patch.renew()
    assert Holder.f is ours
    for _ in range(3):  # as a profiler does that wraps it for a time
        Holder.f = wrapped(original)  # type: ignore[method-assign]
        patch.renew()
        assert Holder().f() == "(f)!"
        Holder.f = ours  # type: ignore[method-assign]
        patch.renew()
        assert Holder.f is ours
    assert len(patch._originals) <= 2


@pytest.mark.parametrize("kept", [False, True])
def test_handlers_are_asked_whoever_has_wrapped_backward(kept: bool) -> None:
    user, seen = User(), []
    if kept:
        keep_patched(user)
    ours = Tensor.backward

    @functools.wraps(ours)
    def theirs(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        seen.append("theirs")
        ours(tensor, *args, **kwargs)

    Tensor.backward = theirs  # type: ignore[method-assign]

    def handler(loss: Tensor) -> None:
        seen.append("handler")
        loss.backward()

    x = torch.ones((), requires_grad=True)
    with patched_backward(handler):
        (2 * x).backward()
    assert seen == ["handler", "theirs"] and x.grad == 2


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 2)])
@pytest.mark.parametrize("with_loss", [False, True])
def test_a_backward_pass_from_values(shape: tuple[int, ...], with_loss: bool) -> None:
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def outputs() -> tuple[Tensor, Tensor | None]:
        n = torch.Size(shape).numel()
        return x.square()[:n].reshape(shape), x.pow(3).sum() if with_loss else None

    derivative = torch.randn(shape, dtype=torch.float64)
    values, loss = outputs()
    total = (values * derivative).sum() + (0 if loss is None else loss)
    (expected,) = torch.autograd.grad(total, x)
    values, loss = outputs()
    backward_from(values, derivative, loss)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected)


def test_who_watches_backward_sees_that_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    x, calls, original = torch.ones(2, requires_grad=True), [], torch.autograd.backward

    def watching(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        original(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "backward", watching)
    backward_from(x * 2, torch.ones(2), x.sum())
    assert len(calls) == 1 and x.grad is not None and x.grad.tolist() == [3.0, 3.0]


def test_errors_are_those_of_pytorch() -> None:
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="only for scalar outputs"):
        backward_from(x * 2, torch.ones(2), x * 3)
    with pytest.raises(RuntimeError, match="does not require grad"):
        backward_from(x * 2, torch.ones(2), x.detach().sum())
