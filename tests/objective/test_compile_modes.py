"""Modes of compilation: which are allowed, and results that outlive the next call."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.oracles import compiles_gradients
from torch_secondorder import FunctionalObjective
from torch_secondorder._objective import compiled
from torch_secondorder.curvature import Hessian

TREE = {"w": torch.tensor([1.0, 2.0, 3.0])}


def quartic(params: dict[str, Tensor]) -> Tensor:
    w = params["w"]
    return (w**4).sum() + (w[0] * w[1]).sin()


@pytest.fixture(autouse=True)
def _forgets_what_was_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    compiled._fronts.clear()
    with warnings.catch_warnings():
        # Some of the compiler's own name the caller as their place.
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
    torch._dynamo.reset()
    compiled._fronts.clear()


def assert_as_without(objective: FunctionalObjective) -> None:
    """At two points, with all results of the first kept."""
    plain = FunctionalObjective(quartic, TREE)
    kept: list[Any] = []
    v = torch.tensor([0.5, -1.0, 2.0])
    for step in (None, 0.1 * v):
        if step is not None:
            for one in (plain, objective):
                one.trial(step)
                one.accept(step)
        ours, expected = (one.evaluate(curvature=True) for one in (objective, plain))
        A, B = Hessian(ours), Hessian(expected)
        kept += [(ours.loss, expected.loss), (ours.grad, expected.grad)]
        kept += [(A @ (k * v), B @ (k * v)) for k in (1, 2, 3)]
    for found, wanted in kept:
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


class Overwriting:
    """Stands for code that a CUDA graph runs: results are always in the same memory."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.results: list[Tensor] | None = None

    def __call__(self, *inputs: Tensor) -> Any:
        found, structure = torch.utils._pytree.tree_flatten(self.function(*inputs))
        if self.results is None:
            self.results = [t.clone() if isinstance(t, Tensor) else t for t in found]
        for held, new in zip(self.results, found, strict=True):
            if isinstance(held, Tensor):
                held.copy_(new)
        return torch.utils._pytree.tree_unflatten(self.results, structure)


@pytest.mark.parametrize("keeps", [True, False])
def test_results_of_cuda_graphs_can_be_kept(keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    true_compile, made = torch.compile, []

    def compile(function: Any, **options: Any) -> Any:
        if "mode" not in options:
            return true_compile(function, **options)
        made.append(options["mode"])
        return Overwriting(function)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(compiled, "_overwrites_results", lambda *_: keeps)
    objective = FunctionalObjective(quartic, TREE, compile=True, mode="reduce-overhead")
    if keeps:
        assert_as_without(objective)
        assert {*made} == {"reduce-overhead"}
    else:
        with pytest.raises(AssertionError, match="not close"):
            assert_as_without(objective)


class _OnDevice:
    is_cuda = True


@pytest.mark.parametrize(
    ("options", "overwrites"),
    [
        ({}, False),
        ({"mode": "default"}, False),
        ({"mode": "reduce-overhead"}, True),
        ({"mode": "max-autotune"}, True),
        ({"mode": "max-autotune-no-cudagraphs"}, False),
        ({"options": {"triton.cudagraphs": True}}, True),
        ({"options": {"max_autotune": True}}, False),
        ({"options": None}, False),
        ({"backend": "cudagraphs"}, True),
    ],
)
def test_where_results_are_overwritten(options: dict[str, Any], overwrites: bool) -> None:
    inputs: list[Any] = [torch.ones(1), _OnDevice()]
    assert compiled._overwrites_results(options, inputs) is overwrites
    assert not compiled._overwrites_results(options, inputs[:1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"compile": True, "mode": "fastest"},
            "mode must be one of 'default', 'reduce-overhead', ",
        ),
        ({"mode": "max-autotune"}, "is one of compilation: pass compile=True as well"),
        (
            {"compile": {"backend": "aot_eager"}, "mode": "default"},
            "mode='default' goes with the backend 'inductor' only, got 'aot_eager'",
        ),
        (
            {"compile": {"mode": "default"}, "mode": "default"},
            "pass either mode='default' or compile={'mode': ...}",
        ),
        (
            {"compile": {"options": {"max_autotune": True}}, "mode": "default"},
            "pass either mode='default' or compile={'options': ...}",
        ),
    ],
)
def test_modes_that_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        FunctionalObjective(quartic, TREE, **arguments)


@pytest.mark.slow
@pytest.mark.skipif(not compiles_gradients(), reason="this torch does not compile gradients")
@pytest.mark.parametrize("mode", ["max-autotune", "reduce-overhead"])
def test_generated_code(mode: Any, device: torch.device) -> None:
    if device.type not in ("cpu", "cuda"):
        pytest.skip("the compiler generates no code for this device")
    if device.type == "cpu" and mode == "reduce-overhead":
        pytest.skip("it is the default mode there, and compiling takes seconds")
    tree = {"w": TREE["w"].to(device)}
    plain = FunctionalObjective(quartic, tree).evaluate(curvature=True)
    objective = FunctionalObjective(quartic, tree, compile=True, mode=mode)
    v = torch.tensor([0.5, -1.0, 2.0], device=device)
    for _ in range(4):  # the first calls on a device only prepare the graph
        ours = objective.evaluate(curvature=True)
        products = [Hessian(ours) @ (k * v) for k in (1, 2)]
        torch.testing.assert_close(products, [Hessian(plain) @ (k * v) for k in (1, 2)])
        torch.testing.assert_close((ours.loss, ours.grad), (plain.loss, plain.grad))
