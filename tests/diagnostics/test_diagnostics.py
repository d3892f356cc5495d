"""Sources of diagnostics, restored state, and the second-order model along a line."""

from __future__ import annotations

import importlib
import io
import math
import random
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.support.oracles import assert_matrix, dense_hessian, flat, make_case
from torch_secondorder import FunctionalObjective
from torch_secondorder.curvature import Diagonal
from torch_secondorder.diagnostics import (
    definiteness,
    eigenpairs,
    from_closure,
    from_model,
    observed_information,
    second_order_model,
    spectral_density,
    trace,
)
from torch_secondorder.diagnostics._point import opened

CPU = torch.device("cpu")


def sources(name: str, device: torch.device) -> dict[str, Any]:
    """The same loss by all ways in."""
    case = make_case(name, device)
    params = dict(case.model.named_parameters())

    def function(p: dict[str, Tensor]) -> Tensor:
        return case.loss(torch.func.functional_call(case.model, p, (case.x,)), case.y)

    return {
        "model": from_model(case.model, case.loss, (case.x, case.y)),
        "closure": from_closure(case.closure(), case.model.parameters()),
        "function": FunctionalObjective(function, params),
    }


# Sources.


@pytest.mark.parametrize("name", ["mlp", "cnn", "batchnorm"])
@pytest.mark.parametrize("way", ["model", "closure", "function"])
def test_all_sources_give_the_same_matrix(name: str, way: str, device: torch.device) -> None:
    case = make_case(name, device)
    with opened(sources(name, device)[way], False, 0, "") as point:
        assert_matrix(point.operator, dense_hessian(case.pure(), case.params()))
        assert point.value == pytest.approx(case.value().item())
        torch.testing.assert_close(
            point.grad, flat(torch.autograd.grad(case.value(), case.params()))
        )


@pytest.mark.parametrize("retain", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batches_of_different_lengths_equal_one_batch(
    reduction: Any, retain: bool, device: torch.device
) -> None:
    case = make_case("mlp", device)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, reduction=reduction)

    data = TensorDataset(case.x, case.y)
    whole = from_model(case.model, loss, (case.x, case.y), reduction=reduction)
    parts = from_model(
        case.model, loss, DataLoader(data, batch_size=3), reduction=reduction, retain=retain
    )
    case.loss = loss
    expected = dense_hessian(case.pure(), case.params())
    for problem in (whole, parts):
        with opened(problem, False, 0, "") as point:
            assert_matrix(point.operator, expected)
            assert point.value == pytest.approx(case.value().item())
            gradient = flat(torch.autograd.grad(case.value(), case.params()))
            torch.testing.assert_close(point.grad, gradient)


def test_some_of_the_parameters_and_several_inputs(device: torch.device) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 1), nn.Linear(2, 1)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.first(a) * self.second(b)

    model = Two().double().to(device)
    a, b, y = (torch.randn(5, d, dtype=torch.float64, device=device) for d in (2, 2, 1))
    expected = dense_hessian(
        lambda w, c: F.mse_loss(F.linear(a, w, c) * model.second(b), y),
        list(model.first.parameters()),
    )
    for inputs in ((a, b), {"a": a, "b": b}):
        problem = from_model(model, F.mse_loss, [(inputs, y)], model.first.parameters())
        assert problem.names == ["first.weight", "first.bias"]
        with opened(problem, False, 0, "") as point:
            assert_matrix(point.operator, expected)
    model.second.requires_grad_(False)
    assert from_model(model, F.mse_loss, [((a, b), y)]).size == 3


def test_named_shapes_a_vector_like_the_parameters() -> None:
    model = nn.Linear(2, 1)
    problem = from_model(model, F.mse_loss, (torch.ones(3, 2), torch.ones(3, 1)))
    named = problem.named(torch.tensor([1.0, 2.0, 3.0]))
    assert {name: t.tolist() for name, t in named.items()} == {
        "weight": [[1.0, 2.0]],
        "bias": [3.0],
    }
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        problem.named(torch.ones(2))


@pytest.mark.parametrize("way", ["model", "closure", "function"])
def test_a_problem_uses_the_current_parameters(way: str) -> None:
    torch.manual_seed(3)
    w = torch.ones(2, requires_grad=True)
    model = nn.Linear(2, 1, bias=False)
    model.weight = nn.Parameter(torch.ones(1, 2))
    source = {
        "model": lambda: from_model(
            model, lambda z, _: z.sum() ** 4, (torch.eye(2), torch.zeros(2))
        ),
        "closure": lambda: from_closure(lambda: w.sum() ** 4, [w]),
        "function": lambda: FunctionalObjective(lambda p: p.sum() ** 4, w),
    }[way]()
    assert second_order_model(source).value == 16
    with torch.no_grad():
        (model.weight if way == "model" else w).mul_(2)
    assert second_order_model(source).value == 256


# Restored state.


class Noisy(nn.Module):
    """Everything that a diagnostic could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)
        )
        self.norm = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.train()
        self.calls += 1
        return self.norm(self.body(x + 0.1 * torch.randn_like(x)))


ASKS: dict[str, Callable[[Any], Any]] = {
    "eigenpairs": lambda s: eigenpairs(s, 2, max_products=5),
    "definiteness": lambda s: definiteness(s, max_products=5),
    "trace": lambda s: trace(s, 6),
    "spectral_density": lambda s: spectral_density(s, 2, 3),
    "second_order_model": second_order_model,
    "observed_information": lambda s: observed_information(
        s, directions=torch.ones(s.size), solver=_first_iterate
    ),
}


def _first_iterate(A: Any, b: Tensor, **_: Any) -> Any:
    from torch_secondorder.solvers import SolveStatus

    return SimpleNamespace(x=A @ b, status=SolveStatus.CONVERGED)


@pytest.mark.parametrize("ask", list(ASKS))
@pytest.mark.parametrize("retain", [True, False])
@pytest.mark.parametrize("batches", [1, 2])
def test_the_model_is_restored(batches: int, retain: bool, ask: str, device: torch.device) -> None:
    model = Noisy().to(device)
    model.eval()
    model.body.train()
    x, y = torch.randn(8, 4, device=device), torch.randint(3, (8,), device=device)
    kept = {}
    for i, p in enumerate(model.parameters()):
        p.grad = None if i == 1 else torch.full_like(p, i)
        kept[p] = p.grad, None if p.grad is None else p.grad.clone()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    loader = DataLoader(TensorDataset(x, y), batch_size=8 // batches, shuffle=True)
    randomness = torch.get_rng_state(), random.getstate()
    problem = from_model(model, F.cross_entropy, loader, retain=retain)
    assert torch.equal(torch.get_rng_state(), randomness[0])

    ASKS[ask](problem)

    assert torch.equal(torch.get_rng_state(), randomness[0])
    assert random.getstate() == randomness[1]
    assert [m.training for m in model.modules()] == modes
    for name, t in model.state_dict().items():
        assert torch.equal(t, state[name]), name
    for p, (grad, value) in kept.items():
        assert p.grad is grad
        assert grad is None or torch.equal(grad, value)
        assert p.requires_grad and not p._backward_hooks


@pytest.mark.parametrize("batches", [1, 2])
def test_other_gradients_of_model_and_loss_are_restored(batches: int) -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            return (self.weight * (z - y) ** 2).mean()

    model, loss = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), Weighted()
    others = [*model[0].parameters(), *loss.parameters()]
    grads = [torch.full_like(p, 3.0) for p in others]
    for p, g in zip(others, grads, strict=True):
        p.grad = g
    pairs = [(torch.randn(4, 3), torch.randn(4, 2)) for _ in range(batches)]
    trace(from_model(model, loss, pairs, model[1].parameters()))
    for p, g in zip(others, grads, strict=True):
        assert p.grad is g and bool((g == 3.0).all())


@pytest.mark.parametrize("way", ["closure", "function"])
@pytest.mark.parametrize("ask", list(ASKS))
def test_gradients_are_restored_for_closures_and_functions(ask: str, way: str) -> None:
    source = sources("batchnorm", CPU)[way]
    case = make_case("batchnorm", CPU)  # the same values again
    params = list(source.vector.params)
    grads = [torch.full_like(p, 2.0) for p in params]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    random_state = torch.get_rng_state()
    if ask == "observed_information":
        observed_information(
            source, directions=torch.ones(source.vector.size), solver=_first_iterate
        )
    else:
        ASKS[ask](source)
    assert torch.equal(torch.get_rng_state(), random_state)
    for p, g, same in zip(params, grads, case.params(), strict=True):
        assert p.grad is g and bool((g == 2.0).all()) and torch.equal(p, same)


@pytest.mark.parametrize("retain", [True, False])
def test_the_model_is_restored_after_an_error(retain: bool) -> None:
    model = Noisy()
    model.eval()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    grad = model.body[0].weight.grad = torch.ones(6, 4)
    random_state = torch.get_rng_state()

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return z.square().sum().sqrt() * math.inf

    problem = from_model(model, loss, (torch.ones(8, 4), torch.ones(8)), retain=retain)
    with pytest.raises(RuntimeError, match=r"the loss is (inf|nan) here"):
        eigenpairs(problem)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(m.training for m in model.modules())
    assert model.body[0].weight.grad is grad
    for name, t in model.state_dict().items():
        assert torch.equal(t, state[name]), name


def test_noise_is_the_same_in_all_products() -> None:
    """A graph that is made again has the dropout masks of the first."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3))
    data = (torch.randn(8, 4), torch.randint(3, (8,)))
    for retain in (True, False):
        problem = from_model(model, F.cross_entropy, [data, data], retain=retain)
        with opened(problem, False, 0, "") as point:
            products = [point.operator @ torch.ones(point.operator.size) for _ in range(3)]
        torch.testing.assert_close(products[0], products[1])
        torch.testing.assert_close(products[0], products[2])


# The parabola.


@pytest.mark.parametrize("way", ["model", "closure", "function"])
def test_the_parabola_agrees_with_the_dense_hessian(way: str, device: torch.device) -> None:
    case = make_case("mlp", device)
    source = sources("mlp", device)[way]
    h = dense_hessian(case.pure(), case.params())
    g = flat(torch.autograd.grad(case.value(), case.params()))
    down = second_order_model(source)
    assert down.value == pytest.approx(case.value().item())
    assert down.slope == pytest.approx(-float(g @ g))
    assert down.curvature == pytest.approx(float(g @ h @ g))
    assert down.step == pytest.approx(float(g @ g / (g @ h @ g)))
    assert down.reason is None and down.decrease == pytest.approx(down.value - down(down.step))
    d = torch.linspace(-1, 1, len(g), dtype=torch.float64, device=device)
    along = second_order_model(source, d)
    assert along.slope == pytest.approx(float(g @ d))
    assert along.curvature == pytest.approx(float(d @ h @ d))
    torch.testing.assert_close(along.direction, d)
    pieces = [
        piece.view(p.shape)
        for piece, p in zip(d.split([p.numel() for p in case.params()]), case.params(), strict=True)
    ]
    assert second_order_model(source, pieces).curvature == along.curvature
    t = 1e-4
    with torch.no_grad():
        for p, piece in zip(case.params(), pieces, strict=True):
            p.add_(t * piece)
    assert along(t) == pytest.approx(case.value().item(), abs=1e-10)


@pytest.mark.parametrize(
    ("function", "direction", "reason"),
    [
        (lambda w: -(w**2).sum(), None, "curvature is negative"),
        (lambda w: 3 * w.sum(), None, "curvature is zero"),
        (lambda w: ((w - 1) ** 2).sum(), None, "direction is zero"),
        (lambda w: (w**2).sum(), torch.zeros(2), "direction is zero"),
        (lambda w: w[0] * w[1], torch.tensor([1.0, -1.0]), "curvature is negative"),
    ],
)
def test_models_without_a_minimum_give_a_reason(
    function: Callable[[Tensor], Tensor], direction: Tensor | None, reason: str
) -> None:
    found = second_order_model(FunctionalObjective(function, torch.ones(2)), direction)
    assert found.step is None and found.decrease is None and reason in found.reason


# Errors.

W = torch.ones(3, requires_grad=True)
LINE = from_closure(lambda: (W**2).sum(), [W])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: eigenpairs(from_closure(lambda: W**2, [W]), 1), ValueError, "real scalar loss"),
        (lambda: eigenpairs(from_closure(lambda: None, [W]), 1), TypeError, "return the loss"),
        (
            lambda: trace(from_closure(lambda: W.detach().sum(), [W])),
            RuntimeError,
            "no gradient reached any",
        ),
        (
            lambda: trace(from_model(nn.Linear(1, 1), lambda z, _: 1.0, (W[:, None], W))),
            RuntimeError,
            "no gradient reached any",
        ),
        (lambda: from_closure(3, [W]), TypeError, "must be callable, got int"),
        (lambda: from_closure(lambda: W.sum(), []), ValueError, "there is no parameter"),
        (lambda: from_model(nn.ReLU(), F.mse_loss, (W, W)), ValueError, "there is no parameter"),
        (lambda: from_model(nn.Linear(1, 1), F.mse_loss, []), ValueError, "batches are empty"),
        (lambda: from_model(nn.Linear(1, 1), F.mse_loss, [W]), TypeError, "pair .* got Tensor"),
        (lambda: from_model(nn.Linear(1, 1), None, (W, W)), TypeError, "loss_fn must be callable"),
        (
            lambda: from_model(nn.Linear(1, 1), F.mse_loss, (W, W), reduction="none"),
            ValueError,
            "reduction must be one of 'mean', 'sum', got 'none'",
        ),
        (
            lambda: from_closure(lambda: W.sum(), [W], curvature="newton"),
            ValueError,
            "curvature must be one of .* got 'newton'",
        ),
        (lambda: trace(lambda: W.sum()), TypeError, r"of a function: pass from_model\(.*closure"),
        (lambda: trace(nn.Linear(1, 1)), TypeError, "of a Linear: pass from_model"),
        (
            lambda: second_order_model(Diagonal(torch.ones(3))),
            TypeError,
            "Diagonal is a matrix, and this needs a loss as well",
        ),
        (lambda: second_order_model(LINE, torch.ones(2)), ValueError, r"\(3,\) .* shape \(2,\)"),
        (lambda: second_order_model(LINE, [torch.ones(2)]), ValueError, r"shapes \[\(3,\)\]"),
        (lambda: second_order_model(LINE, W * math.nan), ValueError, "direction must be finite"),
        (
            lambda: second_order_model(from_closure(lambda: (W - 1).norm() ** 0.5, [W])),
            RuntimeError,
            "gradient is not finite",
        ),
    ],
)
def test_errors(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# The bar.


def test_the_progress_bar_appears_on_request_or_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tqdm")
    operator = Diagonal(torch.arange(30.0))
    trace(operator, 10)
    assert capsys.readouterr().err == ""
    trace(operator, 10, progress=True)
    assert "trace" in capsys.readouterr().err
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    trace(operator, 10)
    assert "trace" in terminal.getvalue()
    trace(operator, 10, progress=False)


def test_without_tqdm_and_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    operator = Diagonal(torch.arange(30.0))
    trace(operator, 10)
    with pytest.raises(ImportError, match=r"progress=True needs tqdm: pip install tqdm"):
        trace(operator, 10, progress=True)
    with pytest.raises(ImportError, match=r"plot\(\) needs matplotlib: pip install matplotlib"):
        spectral_density(operator, 1, 2).plot()


def test_a_problem_needs_batches() -> None:
    with pytest.raises(ValueError, match="no batch"):
        from_model(nn.Linear(1, 1), F.mse_loss, iter([]))
