"""L-BFGS on all that parameters can be: groups, dtypes, devices, frozen, sparse, complex."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

from tests.support.closures import rosenbrock, standard, start_at
from tests.support.oracles import make_case
from torch_secondorder import LBFGS, StepStatus


def coupled(a: Tensor, b: Tensor) -> Tensor:
    """A smooth function of two vectors of two entries, with its minimum inside."""
    quartic = ((a - 0.5) ** 4).sum() + ((b + 0.3) ** 4).sum()
    return quartic + (a @ b - 0.2) ** 2 + 0.1 * (a @ a + b @ b)


def run(optimizer: LBFGS, function: Callable[[], Tensor], steps: int = 4) -> list[float]:
    """The losses seen at the start of each step."""
    return [optimizer.step(standard(optimizer, function)).item() for _ in range(steps)]


def pair(device: torch.device | str = "cpu") -> tuple[nn.Parameter, nn.Parameter]:
    return start_at(1.0, -0.4, device=device), start_at(0.7, 0.9, device=device)


# Groups.


@pytest.mark.parametrize("search", ["strong_wolfe", "armijo", None])
def test_learning_rates_of_groups_are_a_change_of_variables(
    search: str | None, device: torch.device
) -> None:
    a, b = pair(device)
    groups = [{"params": [a], "lr": 0.02}, {"params": [b], "lr": 0.5}]
    optimizer = LBFGS(groups, max_iter=3, line_search_fn=search)
    ours = run(optimizer, lambda: coupled(a, b))
    scale = (0.02 / 0.5) ** 0.5
    z, w = pair(device)
    with torch.no_grad():
        z /= scale
    explicit = LBFGS([z, w], lr=0.5, max_iter=3, line_search_fn=search)
    theirs = run(explicit, lambda: coupled(scale * z, w))
    assert ours == pytest.approx(theirs, rel=1e-8)
    torch.testing.assert_close(a.detach(), scale * z.detach(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(b, w, rtol=1e-7, atol=1e-9)


def test_a_group_at_rest_stays_put(device: torch.device) -> None:
    a, b = pair(device)
    before = a.detach().clone()
    groups = [{"params": [a], "lr": 0.0, "weight_decay": 0.1}, {"params": [b]}]
    optimizer = LBFGS(groups, max_iter=100)
    run(optimizer, lambda: coupled(a, b), 1)
    assert torch.equal(a, before)
    assert optimizer.info.status is StepStatus.CONVERGED_GRADIENT
    (gradient,) = torch.autograd.grad(coupled(a, b), b)
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("decay", [(0.3, 0.3), (0.0, 0.4), (0.1, 0.7)])
def test_weight_decay_is_a_penalty(decay: tuple[float, float], device: torch.device) -> None:
    a, b = pair(device)
    z, w = pair(device)
    first, second = decay
    optimizer = LBFGS(
        [{"params": [a], "weight_decay": first}, {"params": [b], "weight_decay": second}]
    )
    run(optimizer, lambda: coupled(a, b), 2)
    written_in = LBFGS([z, w])
    run(written_in, lambda: coupled(z, w) + first * z @ z / 2 + second * w @ w / 2, 2)
    torch.testing.assert_close(a, z, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(b, w, rtol=1e-8, atol=1e-10)
    assert optimizer.info.loss == pytest.approx(written_in.info.loss, rel=1e-10)
    assert optimizer.info.loss_after == pytest.approx(written_in.info.loss_after, rel=1e-10)


def test_maximize_is_minimizing_the_negative(device: torch.device) -> None:
    x, z = start_at(-1.2, 1.0, device=device), start_at(-1.2, 1.0, device=device)
    up = LBFGS([x], max_iter=5, maximize=True, weight_decay=1e-3)
    seen = run(up, lambda: -rosenbrock(x))
    down = LBFGS([z], max_iter=5, weight_decay=1e-3)
    expected = run(down, lambda: rosenbrock(z))
    assert torch.equal(x, z)
    assert seen == [-value for value in expected]  # what the closure returned
    assert up.info.loss == down.info.loss  # what was minimized


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=8),
        lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=10.0),
    ],
    ids=["StepLR", "CosineAnnealingLR", "ReduceLROnPlateau"],
)
@pytest.mark.parametrize("relative", [None, 0.1, 0.3, 0.7])
def test_schedulers(make: Callable[[Any], Any], relative: float | None) -> None:
    """The rate is the fixed step's; groups that keep their ratio keep the history."""
    a, b = pair()
    groups = [{"params": [a]}, {"params": [b]}]
    if relative is not None:
        groups[0]["lr"] = 0.4 * relative
    optimizer = LBFGS(groups, lr=0.4, max_iter=1, line_search_fn=None)
    scheduler = make(optimizer)
    rates = []
    for _ in range(6):
        loss = run(optimizer, lambda: coupled(a, b), 1)[0]
        rates.append(optimizer.param_groups[1]["lr"])
        assert optimizer.info.step_length == rates[-1]
        assert not optimizer.info.history_reset
        scheduler.step(*([loss] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    assert len(set(rates)) > 2


def test_another_ratio_of_rates_drops_the_history() -> None:
    a, b = pair()
    optimizer = LBFGS([{"params": [a]}, {"params": [b]}], max_iter=3)
    function = lambda: coupled(a, b)  # noqa: E731
    run(optimizer, function, 1)
    optimizer.param_groups[0]["lr"] = 0.1
    run(optimizer, function, 1)
    assert "relative learning rates changed" in optimizer.info.history_reset
    run(optimizer, function, 1)
    assert not optimizer.info.history_reset


def test_a_group_added_later_moves(device: torch.device) -> None:
    a, b = pair(device)
    optimizer = LBFGS([a])
    run(optimizer, lambda: coupled(a, b), 1)
    optimizer.add_param_group({"params": [b], "weight_decay": 0.1})
    before = b.detach().clone()
    run(optimizer, lambda: coupled(a, b), 1)
    assert optimizer.info.history_reset
    assert not torch.equal(b, before)
    assert optimizer.info.loss_after < optimizer.info.loss


# Kinds of parameters.


def test_mixed_dtypes(device: torch.device) -> None:
    a = nn.Parameter(torch.tensor([1.0, -0.4], device=device))
    b = nn.Parameter(torch.tensor([0.7, 0.9], dtype=torch.float64, device=device))
    z, w = pair(device)
    mixed, wide = LBFGS([a, b], max_iter=3), LBFGS([z, w], max_iter=3)
    run(mixed, lambda: coupled(a.double(), b), 2)
    run(wide, lambda: coupled(z, w), 2)
    assert (a.dtype, b.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(a.double(), z, rtol=1e-4, atol=1e-5, check_dtype=False)
    torch.testing.assert_close(b, w, rtol=1e-4, atol=1e-5)


def test_mixed_devices(device: torch.device) -> None:
    a, _ = pair()
    _, b = pair(device)
    z, w = pair()
    mixed, plain = LBFGS([a, b], max_iter=3), LBFGS([z, w], max_iter=3)
    run(mixed, lambda: coupled(a, b.to(a.device)), 2)
    run(plain, lambda: coupled(z, w), 2)
    assert b.device.type == device.type
    torch.testing.assert_close(a, z, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(b.detach().cpu(), w.detach(), rtol=1e-8, atol=1e-10)


def test_complex_least_squares(device: torch.device) -> None:
    matrix = torch.randn(8, 5, dtype=torch.complex128, device=device)
    target = torch.randn(8, dtype=torch.complex128, device=device)
    z = nn.Parameter(torch.zeros(5, dtype=torch.complex128, device=device))
    shift = nn.Parameter(torch.zeros(1, dtype=torch.float64, device=device))
    optimizer = LBFGS([shift, z], max_iter=200, tolerance_grad=1e-10)

    def function() -> Tensor:
        return (matrix @ z + shift - target).abs().square().sum()

    run(optimizer, function, 2)
    rows = torch.cat([matrix.real, matrix.imag])
    left = torch.cat([-matrix.imag, matrix.real])
    ones = torch.cat([torch.ones(8, 1), torch.zeros(8, 1)]).to(rows)
    solution = torch.linalg.lstsq(
        torch.cat([rows, left, ones], dim=1), torch.cat([target.real, target.imag])[:, None]
    ).solution[:, 0]
    ours = torch.cat([z.detach().real, z.detach().imag, shift.detach()])
    torch.testing.assert_close(ours, solution, rtol=1e-8, atol=1e-8)


def test_sparse_gradients(device: torch.device) -> None:
    ends = []
    for sparse in (True, False):
        torch.manual_seed(1)
        embedding = nn.Embedding(10, 3, sparse=sparse, dtype=torch.float64, device=device)
        head = nn.Linear(3, 1, dtype=torch.float64, device=device)
        words = torch.tensor([1, 4, 4, 7], device=device)
        params = [*embedding.parameters(), *head.parameters()]
        optimizer = LBFGS(params, max_iter=5, weight_decay=0.01)
        run(optimizer, lambda e=embedding, h=head, w=words: (h(e(w)) - 1).square().mean(), 2)
        ends.append(torch.cat([p.detach().reshape(-1) for p in params]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_parameter_without_a_gradient(dtype: torch.dtype) -> None:
    unused = nn.Parameter(torch.ones(3, dtype=dtype))
    x = start_at(-1.2, 1.0)
    run(LBFGS([unused, x], max_iter=100), lambda: rosenbrock(x), 2)
    assert torch.equal(unused, torch.ones(3, dtype=dtype))
    torch.testing.assert_close(x.detach(), torch.ones_like(x), rtol=0, atol=1e-6)


def test_freezing_between_steps(device: torch.device) -> None:
    case = make_case("mlp", device)
    optimizer = LBFGS(case.model.parameters(), max_iter=3)
    weights = case.model[0].weight

    def step() -> Any:
        optimizer.step(case.closure())
        return optimizer.info

    step()
    assert not step().history_reset
    frozen = weights.detach().clone()
    weights.requires_grad_(False)
    info = step()
    assert "trainable parameters" in info.history_reset
    assert info.loss_after < info.loss
    assert not step().history_reset
    assert torch.equal(weights, frozen)
    weights.requires_grad_(True)
    assert "trainable parameters" in step().history_reset
    assert not torch.equal(weights, frozen)


def test_freezing_parameters_in_a_narrow_dtype() -> None:
    a, b = nn.Parameter(torch.ones(2).bfloat16()), nn.Parameter(torch.ones(3).bfloat16())
    optimizer = LBFGS([a, b], lr=5e-4, max_iter=1, line_search_fn=None)

    def function() -> Tensor:
        return a.float().sum() + b.float().sum()

    run(optimizer, function, 2)
    a.requires_grad_(False)
    run(optimizer, function, 200)
    assert a.tolist() == [1.0] * 2
    assert b.tolist() == pytest.approx([0.9 + 1e-3] * 3, abs=0.07)
    assert max(b.tolist()) < 0.98


@pytest.mark.parametrize("frozen_first", [True, False])
def test_frozen_from_the_start(frozen_first: bool) -> None:
    a, b = pair()
    still = a if frozen_first else b
    still.requires_grad_(False)
    before = still.detach().clone()
    run(LBFGS([a, b]), lambda: coupled(a, b), 2)
    assert torch.equal(still, before)


def test_a_model_that_changes_its_dtype_between_steps() -> None:
    case = make_case("mlp", torch.device("cpu"), torch.float32)
    optimizer = LBFGS(case.model.parameters(), max_iter=3)
    optimizer.step(case.closure())
    case.model.double()
    case.x = case.x.double()
    for _ in range(3):
        optimizer.step(case.closure())
        assert optimizer.info.loss_after < optimizer.info.loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_below_the_spacing_of_a_narrow_dtype_add_up(
    dtype: torch.dtype, device: torch.device
) -> None:
    """One in bfloat16 has its neighbours 0.004 and 0.008 away; the steps are 0.0005 long."""
    x = nn.Parameter(torch.ones(1, dtype=dtype, device=device))
    optimizer = LBFGS([x], lr=5e-4, max_iter=1, line_search_fn=None)
    run(optimizer, lambda: x.float().sum(), 200)
    assert x.item() == pytest.approx(0.9, abs=0.003)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_in_a_narrow_dtype(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(device, dtype)
    x, y = torch.randn(32, 4, device=device, dtype=dtype), torch.randint(3, (32,), device=device)
    optimizer = LBFGS(model.parameters(), max_iter=10)
    losses = run(optimizer, lambda: F.cross_entropy(model(x).float(), y), 5)
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.dtype == dtype and p.isfinite().all() for p in model.parameters())


def test_a_change_from_outside_is_kept_in_a_narrow_dtype() -> None:
    x = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = LBFGS([x], lr=5e-4, max_iter=1, line_search_fn=None)
    run(optimizer, lambda: x.float().sum(), 3)
    with torch.no_grad():
        x[0] = 3.0
    run(optimizer, lambda: x.float().sum(), 1)
    assert x.tolist() == [3.0, 1.0]
