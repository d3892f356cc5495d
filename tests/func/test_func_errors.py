"""What `torch_secondorder.func` refuses, and what its check of derivatives finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_secondorder._foundation import memory
from torch_secondorder.func import (
    batch_jacobian,
    check_derivatives,
    ggnvp,
    hessian_diagonal,
    hvp,
    jacobian,
    module_jacobian,
    vhp,
)

ONES = torch.ones(3)

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script")


def total(x: Tensor) -> Tensor:
    return x.square().sum()


# --- arguments ---


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.arange(3), r"x has dtype torch.int64.*\.float\(\)"),
        ({"w": [ONES, torch.ones(2, dtype=torch.bool)]}, r"x\['w'\]\[1\] has dtype torch.bool"),
        ({"w": ONES, "n": 3}, r"x\['n'\] is int, not a tensor.*close over"),
        (ONES + 0j, "x is complex.*view_as_real"),
        (None, "x is NoneType"),
    ],
)
@pytest.mark.parametrize(
    "call",
    [
        lambda x: jacobian(lambda x: ONES, x),
        lambda x: jacobian(lambda x: ONES, x, "forward"),
        lambda x: hvp(lambda x: ONES.sum(), x, x),
        lambda x: vhp(lambda x: ONES.sum(), x, x),
        lambda x: ggnvp(lambda x: ONES, total, x, x),
        lambda x: hessian_diagonal(lambda x: ONES.sum(), x),
        lambda x: check_derivatives(lambda x: ONES.sum(), x),
    ],
)
def test_inputs_without_derivatives(call: Callable[[Any], Any], x: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call(x)


@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
def test_outputs_without_derivatives(mode: Any) -> None:
    with pytest.raises(TypeError, match=r"f\(x\)\['n'\] has dtype torch.int64"):
        jacobian(lambda x: {"y": x, "n": x.argmax()}, ONES, mode)
    with pytest.raises(TypeError, match=r"f\(x\) is complex"):
        jacobian(torch.fft.fft, ONES, mode)
    with pytest.raises(TypeError, match=r"f\(x\) is tuple: batch_jacobian is for"):
        batch_jacobian(lambda x: (x, x), torch.ones(2, 2), mode)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("chunk_size", [0, -1, 1.5, True])
def test_chunk_sizes(chunk_size: Any) -> None:
    for call in (
        lambda: jacobian(torch.sin, ONES, chunk_size=chunk_size),
        lambda: batch_jacobian(torch.sin, torch.ones(2, 2), chunk_size=chunk_size),
        lambda: hessian_diagonal(total, ONES, chunk_size=chunk_size),
        lambda: module_jacobian(nn.Tanh(), torch.ones(2, 2), chunk_size=chunk_size),
    ):
        with pytest.raises(ValueError, match="chunk_size must be an integer of at least 1"):
            call()


def test_modes() -> None:
    with pytest.raises(ValueError, match=r"mode must be one of .*'forward'.*got 'backward'"):
        jacobian(torch.sin, ONES, "backward")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode must be one of"):
        batch_jacobian(torch.sin, torch.ones(2, 2), "rev")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"wrt must be one of .*'parameters'.*got 'weights'"):
        module_jacobian(nn.Tanh(), torch.ones(2, 2), "weights")  # type: ignore[arg-type]


def test_a_hessian_needs_a_scalar() -> None:
    for call in (
        lambda f: hvp(f, ONES, ONES),
        lambda f: vhp(f, ONES, ONES),
        lambda f: hessian_diagonal(f, ONES),
        lambda f: ggnvp(torch.sin, f, ONES, ONES),
    ):
        with pytest.raises(ValueError, match=r"f\(x\) has shape \(3,\): reduce it"):
            call(torch.sin)
        with pytest.raises(ValueError, match=r"scalar function.*tuple"):
            call(lambda x: (x, x))
        with pytest.raises(TypeError, match=r"f\(x\) has dtype torch.int64"):
            call(lambda x: x.argmax())


@pytest.mark.parametrize("product", [hvp, vhp, lambda f, x, v: ggnvp(torch.sin, f, x, v)])
def test_vectors_are_like_the_point(product: Any) -> None:
    with pytest.raises(ValueError, match=r"v is \(2,\) torch.float32, but has to be \(3,\)"):
        product(total, ONES, torch.ones(2))
    with pytest.raises(ValueError, match=r"v is \(3,\) torch.float64.*has to be .*torch.float32"):
        product(total, ONES, ONES.double())
    with pytest.raises(ValueError, match="v is a tree"):
        product(total, ONES, [ONES])


# --- size ---


def test_jacobians_that_no_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(200_000)
    message = "200,000 x 200,000 = 40,000,000,000 elements, 149.0 GiB.*multiply with it.*projection"
    for mode in ("auto", "forward", "reverse"):
        with pytest.raises(MemoryError, match=message):
            jacobian(torch.sin, x, mode)  # type: ignore[arg-type]
    with pytest.raises(MemoryError, match=r"the Jacobian would have 200,000 x 100,000"):
        batch_jacobian(torch.sin, x.view(2, -1))
    with pytest.raises(MemoryError, match=r"unit vectors would have .*pass a smaller chunk_size"):
        hessian_diagonal(total, x)
    monkeypatch.setattr(memory, "free_memory", lambda device: float("inf"))
    with pytest.raises(MemoryError, match=r"and 2\*\*31 is the most"):
        jacobian(torch.sin, x)
    monkeypatch.setattr(memory, "free_memory", lambda device: 1e8)
    # The Jacobian fits, what it is made with does not.
    with pytest.raises(MemoryError, match=r"unit vectors.*0.1 GiB are free: pass a smaller chunk"):
        jacobian(lambda x: x[0].expand(6000) * 1, ONES, "reverse")
    jacobian(lambda x: x[0].expand(6000) * 1, ONES, "reverse", chunk_size=500)


def test_what_is_free_is_known() -> None:
    assert memory.free_memory(torch.device("cpu")) > 2**20
    assert memory.free_memory(torch.device("meta")) == float("inf")


# --- rows that depend on each other ---


def test_rows_that_depend_on_each_other_have_no_jacobians() -> None:
    x = torch.randn(6, 3)
    norm = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    image = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (3, 1, 1)), nn.BatchNorm2d(3))
    dropout = nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5))
    mixing: list[Callable[[Tensor], Tensor]] = [norm, image, dropout, lambda x: x - x.mean(0)]
    for f in mixing:
        for mode in ("auto", "forward", "reverse"):
            with pytest.raises(
                RuntimeError, match=r"per-sample Jacobians are undefined.*eval mode"
            ):
                batch_jacobian(f, x, mode)  # type: ignore[arg-type]
    for module in (norm, image, dropout):
        batch_jacobian(module.eval(), x)
    with pytest.raises(RuntimeError, match="per-sample Jacobians are undefined"):
        module_jacobian(nn.BatchNorm1d(3), x)


def test_rows_that_are_not_numbers_are_let_through() -> None:
    x = torch.tensor([[torch.nan, 1.0], [1.0, 2.0]])
    assert batch_jacobian(torch.sin, x)[0, 0, 0].isnan()


def test_batches_have_rows() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(\).*needs \(B, \.\.\.\).*`jacobian`"):
        batch_jacobian(torch.sin, torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"f\(x\) has shape \(2,\).*\(4, \.\.\.\), a row for each"):
        batch_jacobian(lambda x: x.sum(0), torch.ones(4, 2))
    assert batch_jacobian(torch.sin, torch.ones(0, 2)).shape == (0, 2, 2)


def test_a_module_without_parameters_to_differentiate_by() -> None:
    with pytest.raises(ValueError, match=r"no parameter.*requires_grad_"):
        module_jacobian(nn.Linear(2, 2).requires_grad_(False), torch.ones(2, 2), "parameters")


def test_random_numbers_are_refused_where_they_would_differ() -> None:
    for call in (
        lambda: jacobian(lambda x: F.dropout(x, 0.5), ONES, "forward"),
        lambda: hessian_diagonal(lambda x: F.dropout(x, 0.5).square().sum(), ONES),
    ):
        with pytest.raises(RuntimeError, match=r"draws random numbers.*eval mode"):
            call()


# --- the check ---


class Scaled(torch.autograd.Function):
    """The square, with mistakes of a chosen size in first and second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: float, second: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.errors = first, second
        return x**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        first, second = ctx.errors
        mistake = torch.zeros_like(x)
        mistake.view(-1)[2] = 1.0
        # The second part has the value zero, and a derivative.
        return g * (2 * x + first * mistake + second * mistake * (x - x.detach())), None, None


def test_right_derivatives_pass(device: torch.device) -> None:
    x = {"w": torch.randn(2, 3, device=device), "b": torch.randn(3, device=device)}
    report = check_derivatives(lambda p: {"y": (p["w"] * p["b"]).tanh(), "z": p["b"].exp()}, x)
    assert report
    assert report.passed is True
    assert max(e.error for e in (report.jacobian, report.gradient, report.hessian)) < 1e-8
    assert str(report).startswith("derivatives agree")
    assert check_derivatives(lambda x: 3 * x.sum(), torch.randn(4, device=device))
    assert check_derivatives(lambda x: torch.ones(2), torch.randn(4, device=device))
    assert check_derivatives(lambda x: x.pow(3), torch.tensor(2.0, device=device))


def test_derivatives_that_are_zero_but_for_rounding_pass() -> None:
    weight = torch.randn(5, 3, dtype=torch.float64)

    def f(p: dict[str, Tensor]) -> Tensor:  # the shift changes nothing
        return 1e3 + F.log_softmax(weight @ p["w"] + p["shift"], 0)[2]

    assert check_derivatives(f, {"w": torch.randn(3), "shift": torch.randn(1)})
    assert check_derivatives(lambda x: (weight @ x).sum(), torch.randn(3))


def test_a_wrong_gradient_is_named() -> None:
    x = {"w": torch.randn(2, 2), "b": torch.randn(3)}
    report = check_derivatives(lambda p: Scaled.apply(p["w"], 0.1, 0.0).sum() + p["b"].sum(), x)
    assert not report
    assert report.gradient.where == "x['w'][1, 0]"
    assert report.jacobian.error > 1e-3
    assert report.hessian.error < 1e-6
    assert "derivatives DIFFER" in str(report)
    assert str(report).count("<- wrong") == 2


def test_a_wrong_entry_of_the_jacobian_is_named() -> None:
    report = check_derivatives(lambda x: Scaled.apply(x, 0.1, 0.0), torch.randn(5))
    assert report.jacobian.where == "f(x)[2]"


def test_a_wrong_hessian_is_named() -> None:
    x = torch.randn(2, 2)
    report = check_derivatives(lambda x: Scaled.apply(x, 0.0, 0.1).sum(), x)
    assert (report.jacobian.error < 1e-6, report.gradient.error < 1e-6) == (True, True)
    assert not report.passed
    assert report.hessian.where == "x[1, 0]"


def test_what_is_not_a_number_does_not_pass() -> None:
    assert not check_derivatives(lambda x: x.sqrt().sum(), torch.zeros(3))


def test_checks_refuse_nothing_to_check() -> None:
    with pytest.raises(ValueError, match="no entries"):
        check_derivatives(torch.sin, torch.ones(0))
    with pytest.raises(ValueError, match="directions must be"):
        check_derivatives(torch.sin, ONES, directions=0)
