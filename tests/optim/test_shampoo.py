"""Shampoo against a plain implementation, and its properties."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.closures import standard
from tests.support.diagonal_references import Task
from tests.support.shampoo_reference import PlainShampoo
from torch_secondorder import Shampoo, ShampooInfo, StepStatus

DOUBLE = torch.float64

#: All hyperparameters. The ridge is large enough that rounding errors of singular factors, which
#: both implementations make, stay below the tolerance.
OPTIONS: dict[str, Any] = {
    "lr": 0.01,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "exponent": 0.5,
    "grafting": "adam",
    "matrix_eps": 1e-3,
    "shampoo_beta": None,
    "update_period": 5,
    "root_method": "eigh",
    "block_size": 256,
    "max_precond_dim": 10000,
    "merge_dims": True,
    "maximize": False,
}
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "original exponents": {"exponent": None},
    "another exponent": {"exponent": 0.3},
    "grafting from SGD": {"grafting": "sgd", "lr": 0.1},
    "no grafting": {"grafting": None},
    "no grafting, original exponents": {"grafting": None, "exponent": None},
    "one-sided": {"max_precond_dim": 5, "exponent": None},
    "one-sided and cut": {"max_precond_dim": 5, "block_size": 2, "grafting": None},
    "no factors": {"max_precond_dim": 1},
    "blocks with a remainder": {"block_size": 5},
    "small blocks": {"block_size": 3, "exponent": None},
    "kernels as matrices": {"merge_dims": False},
    "no bounds": {"block_size": None, "max_precond_dim": None},
    "own decay of factors": {"shampoo_beta": 0.8},
    "every step": {"update_period": 1},
    "rarely": {"update_period": 20},
    "newton": {"root_method": "newton", "exponent": 0.25},
    "maximize": {"maximize": True},
    "no memory": {"betas": (0.0, 0.0), "eps": 0.1},
}


def options_of(case: str, **more: Any) -> dict[str, Any]:
    return {**OPTIONS, **CASES[case], **more}


def assert_trajectories_agree(
    options: dict[str, Any],
    *groups: dict[str, Any],
    device: torch.device,
    steps: int = 50,
    tolerance: float = 1e-12,
    **more: Any,
) -> Shampoo:
    """Steps of the optimizer and of the reference on the same task, compared after each."""
    ours, theirs = Task(device), Task()
    optimizer = Shampoo(ours.groups(*groups), **options, **more)
    reference = PlainShampoo([{**options, **group} for group in theirs.groups(*groups)])
    for _ in range(steps):
        optimizer.step(standard(optimizer, ours.loss))
        reference.step(theirs.loss)
        for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
            torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=0, atol=tolerance)
    return optimizer


@pytest.mark.parametrize("case", CASES)
def test_fifty_steps_are_those_of_the_reference(case: str, device: torch.device) -> None:
    # Newton's iteration has a ridge of its own kind, relative to a bound of the largest eigenvalue.
    tolerance = 1e-2 if case == "newton" else 1e-12
    optimizer = assert_trajectories_agree(
        options_of(case), device=device, capturable=False, tolerance=tolerance
    )
    assert isinstance(optimizer.info, ShampooInfo)
    assert optimizer.info.status is StepStatus.MOVED


def test_groups_have_hyperparameters_of_their_own(device: torch.device) -> None:
    groups = (
        {"lr": 0.02, "exponent": None, "merge_dims": False},
        {"grafting": "sgd", "block_size": 3, "weight_decay": 0.0},
        {"betas": (0.5, 0.5)},
    )
    assert_trajectories_agree(options_of("defaults"), *groups, device=device, capturable=False)


@pytest.mark.parametrize("case", ["defaults", "no grafting", "grafting from SGD", "maximize"])
def test_without_looking_at_the_host_it_is_the_same(case: str, device: torch.device) -> None:
    assert_trajectories_agree(options_of(case), device=device, capturable=True)


def matrix_problem(*shape: int, dtype: torch.dtype = DOUBLE, seed: int = 0) -> tuple[Any, Any]:
    """A parameter, and the loss of a linear map of badly scaled data with noise, for each step."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=DOUBLE).to(dtype)
    noise = torch.randn(30, *shape, generator=generator, dtype=DOUBLE)
    scales = torch.logspace(0, -3, shape[-1], dtype=DOUBLE)

    def loss_at(step: int) -> Callable[[Tensor], Tensor]:
        slope = (noise[step % 30] * scales).to(dtype)
        return lambda p: (p * slope.to(p)).sum() + 0.1 * (p * scales.to(p)).square().sum()

    return weight, loss_at


def trained(
    weight: Tensor, loss_at: Callable[[int], Callable[[Tensor], Tensor]], steps: int, **options: Any
) -> Tensor:
    p = nn.Parameter(weight.clone())
    optimizer = Shampoo([p], **options)
    for step in range(steps):
        optimizer.step(standard(optimizer, lambda step=step: loss_at(step)(p)))
    return p.detach()


def rotation(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=DOUBLE))[0]


@pytest.mark.parametrize("exponent", [None, 0.5, 0.7])
def test_steps_without_grafting_follow_rotations(exponent: float | None) -> None:
    weight, loss_at = matrix_problem(5, 4)
    u, v = rotation(5, 1), rotation(4, 2)
    options = {
        "lr": 0.05,
        "exponent": exponent,
        "grafting": None,
        "update_period": 3,
        "matrix_eps": 1e-3,
    }
    plain = trained(weight, loss_at, 20, **options)
    rotated = trained(
        u @ weight @ v, lambda step: lambda p: loss_at(step)(u.T @ p @ v.T), 20, **options
    )
    torch.testing.assert_close(rotated, u @ plain @ v, rtol=0, atol=1e-8)


@pytest.mark.parametrize("grafting", ["adam", None])
@pytest.mark.parametrize("exponent", [None, 0.5, 0.7])
@pytest.mark.parametrize("max_precond_dim", [None, 4])
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_the_loss_does_not_matter(
    grafting: Any, exponent: float | None, max_precond_dim: int | None, scale: float
) -> None:
    weight, loss_at = matrix_problem(5, 4)
    options = {"exponent": exponent, "grafting": grafting, "max_precond_dim": max_precond_dim}
    options |= {"lr": 0.05, "eps": 1e-30, "matrix_eps": 1e-3}
    plain = trained(weight, loss_at, 20, **options)
    scaled = trained(weight, lambda step: lambda p: scale * loss_at(step)(p), 20, **options)
    torch.testing.assert_close(scaled, plain, rtol=0, atol=1e-9)
    assert (plain - weight).abs().max() > 0.01


def test_half_as_the_exponent_makes_steps_of_unit_size() -> None:
    """As a full matrix would, where the covariance of the gradients is a Kronecker product."""
    torch.manual_seed(0)
    left, right = torch.randn(2, 8, 8, dtype=DOUBLE)
    p = nn.Parameter(torch.zeros(8, 8, dtype=DOUBLE))
    sizes = {}
    for exponent in (0.5, None):
        optimizer = Shampoo([p], lr=1.0, betas=(0.0, 0.999), exponent=exponent, grafting=None)
        moves = []
        for step in range(300):
            before = p.detach().clone()
            p.grad = left @ torch.randn(8, 8, dtype=DOUBLE) @ right
            optimizer.step()
            if step >= 100:
                moves.append((p.detach() - before).square().mean())
        sizes[exponent] = float(torch.stack(moves).mean().sqrt())
    assert sizes[0.5] == pytest.approx(1.0, rel=0.1)
    assert sizes[None] < 0.6


@pytest.mark.parametrize("block_size", [3, None])
@pytest.mark.parametrize("grafting", ["adam", "sgd"])
def test_grafted_steps_have_the_length_of_the_other_method(
    block_size: int | None, grafting: Any
) -> None:
    weight, loss_at = matrix_problem(6, 6)
    ours, other = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    optimizer = Shampoo([ours], lr=0.01, grafting=grafting, block_size=block_size)
    if grafting == "adam":
        plain: Any = torch.optim.Adam([other], lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    else:
        plain = torch.optim.SGD([other], lr=0.01 * 0.1)
    size = block_size or 6
    sums = torch.zeros(6, 6, dtype=DOUBLE)
    for step in range(12):
        before = ours.detach().clone()
        with torch.no_grad():
            other.copy_(before)  # the same gradients
        optimizer.step(standard(optimizer, lambda step=step: loss_at(step)(ours)))
        loss_at(step)(other).backward()
        sums = 0.9 * sums + other.grad
        if grafting == "sgd":
            other.grad = sums / (1 - 0.9 ** (step + 1))
        plain.step()
        other.grad = None
        ours_by_block, theirs_by_block = (
            (q.detach() - before).unfold(0, size, size).unfold(1, size, size).square().sum((-1, -2))
            for q in (ours, other)
        )
        torch.testing.assert_close(ours_by_block, theirs_by_block)


def test_vectors_are_updated_as_by_adamw() -> None:
    torch.manual_seed(0)
    start = torch.randn(7, dtype=DOUBLE)
    ours, other = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}
    optimizer, plain = Shampoo([ours], **options), torch.optim.AdamW([other], **options)
    for _ in range(20):
        gradient = torch.randn(7, dtype=DOUBLE)
        ours.grad, other.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        plain.step()
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-14)
    assert not any(name.startswith(("factor", "root")) for name in optimizer.state[ours])


def test_complex_matrices_are_pairs_of_columns() -> None:
    torch.manual_seed(0)
    start = torch.randn(4, 3, 2, dtype=DOUBLE)
    targets = torch.randn(4, 3, dtype=torch.complex128)
    real, whole = nn.Parameter(start.clone()), nn.Parameter(torch.view_as_complex(start.clone()))
    first, second = Shampoo([real], lr=0.05), Shampoo([whole], lr=0.05)
    for _ in range(15):
        first.step(
            standard(first, lambda: (torch.view_as_complex(real) - targets).abs().pow(3).sum())
        )
        second.step(standard(second, lambda: (whole - targets).abs().pow(3).sum()))
    torch.testing.assert_close(torch.view_as_real(whole.detach()), real.detach())


# State.


def test_a_checkpoint_at_any_step_goes_on_bit_for_bit(device: torch.device) -> None:
    """Between two computations of the roots, and with moments in the order of blocks."""
    options = {"lr": 0.01, "update_period": 4, "block_size": 5}

    def step(optimizer: Shampoo, task: Task) -> None:
        optimizer.step(standard(optimizer, task.loss))

    task = Task(device)
    optimizer = Shampoo(task.model.parameters(), **options)
    saved = []
    for _ in range(12):
        saved.append(copy.deepcopy((task.model.state_dict(), optimizer.state_dict())))
        step(optimizer, task)
    for done in (0, 1, 3, 4, 6, 9):
        other = Task(device)
        resumed = Shampoo(other.model.parameters(), **options)
        other.model.load_state_dict(saved[done][0])
        resumed.load_state_dict(saved[done][1])
        for _ in range(done, 12):
            step(resumed, other)
        for p, q in zip(task.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(p, q)


def test_a_state_in_other_blocks_is_refused() -> None:
    p = nn.Parameter(torch.randn(6, 6))
    optimizer = Shampoo([p], block_size=3)
    optimizer.step(standard(optimizer, lambda: p.square().sum()))
    other = Shampoo([p], block_size=6)
    state = optimizer.state_dict()
    state["param_groups"][0]["block_size"] = 6
    with pytest.raises(ValueError, match=r"factor_left_0 of parameter 0 has shape \(4, 3, 3\)"):
        other.load_state_dict(state)
    assert not other.state


def test_a_thawed_matrix_counts_its_own_steps() -> None:
    """Its roots are computed in its first step, not when the period of the others is over."""
    torch.manual_seed(0)
    start = torch.randn(2, 4, 4, dtype=DOUBLE)
    first, second = (nn.Parameter(matrix.clone()) for matrix in start)
    alone = nn.Parameter(start[1].clone())
    slope = torch.randn(4, 4, dtype=DOUBLE)
    options = {"lr": 0.01, "update_period": 100}
    both, other = Shampoo([first, second], **options), Shampoo([alone], **options)
    second.requires_grad_(False)
    for _ in range(5):
        both.step(standard(both, lambda: (first**4).sum()))
    second.requires_grad_(True)
    for _ in range(4):
        both.step(standard(both, lambda: (first**4).sum() + (second**4 * slope).sum()))
        other.step(standard(other, lambda: (alone**4 * slope).sum()))
    assert torch.equal(second, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor_dtype", [None, torch.bfloat16])
def test_narrow_parameters_and_factors(
    dtype: torch.dtype, factor_dtype: torch.dtype | None, device: torch.device
) -> None:
    weight, loss_at = matrix_problem(8, 6)
    plain = trained(weight.to(device), loss_at, 30, lr=0.02)
    narrow = nn.Parameter(weight.to(device, dtype))
    optimizer = Shampoo([narrow], lr=0.02, factor_dtype=factor_dtype)
    for step in range(30):
        optimizer.step(standard(optimizer, lambda step=step: loss_at(step)(narrow)))
    state = optimizer.state[narrow]
    assert state["factor_left_0"].dtype == (factor_dtype or torch.float32)
    assert state["root_left_0"].dtype == state["exp_avg"].dtype == torch.float32
    error = (narrow.detach().double() - plain).abs().max()
    assert error < (0.1 if factor_dtype or dtype != torch.float32 else 1e-3)
    assert (plain - weight.to(device)).abs().max() > 0.2


# Numbers at the edge.


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_gradient_that_is_not_finite_leaves_everything(
    capturable: bool, steps_before: int, device: torch.device
) -> None:
    task = Task(device)
    optimizer = Shampoo(task.model.parameters(), lr=0.01, update_period=2, capturable=capturable)
    for _ in range(steps_before):
        optimizer.step(standard(optimizer, task.loss))
    before = copy.deepcopy((task.model.state_dict(), optimizer.state_dict()["state"]))
    for p in task.model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    assert optimizer.info.status is StepStatus.NONFINITE_START
    for name, tensor in task.model.state_dict().items():
        assert torch.equal(tensor, before[0][name])
    if steps_before:
        after = optimizer.state_dict()["state"]
        for number, state in before[1].items():
            for name, tensor in state.items():
                counted_on_host = name == "host_step" or name.startswith("root")
                if isinstance(tensor, Tensor) and not counted_on_host:
                    assert torch.equal(after[number][name], tensor), name
    optimizer.step(standard(optimizer, task.loss))
    assert optimizer.info.status is StepStatus.MOVED
    assert all(bool(p.isfinite().all()) for p in task.model.parameters())


@pytest.mark.parametrize("grafting", ["adam", "sgd", None])
@pytest.mark.parametrize("exponent", [None, 0.5])
@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-30, 1e-12, 1e12, 1e18, 1e25, 1e38])
def test_parameters_stay_finite_whatever_the_size_of_gradients(
    grafting: Any, exponent: float | None, size: float
) -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(6, 4))
    optimizer = Shampoo([p], lr=0.01, grafting=grafting, exponent=exponent, update_period=4)
    before = p.detach().clone()
    for step in range(12):
        # Zero at first: the roots are those of an empty factor for a while.
        p.grad = (torch.randn(6, 4) * 0.1).mul_(size if step > 4 else 0.0)
        optimizer.step()
    assert bool(p.isfinite().all())
    if grafting == "adam":  # as Adam, whose steps are shorter than this
        assert (p - before).abs().max() < 0.01 * 12 * 4


@pytest.mark.parametrize("grafting", ["adam", "sgd", None])
@pytest.mark.parametrize("exponent", [None, 0.5])
@pytest.mark.parametrize(("small", "large"), [(1e-15, 1e25), (1e-18, 1e38), (1e15, 1e25)])
def test_parameters_stay_finite_where_gradients_outgrow_the_roots(
    grafting: Any, exponent: float | None, small: float, large: float
) -> None:
    """The roots are of small gradients, and whitened large ones leave the range of float32."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(6, 4))
    optimizer = Shampoo([p], lr=1e-6, grafting=grafting, exponent=exponent, update_period=100)
    for step in range(12):
        p.grad = torch.rand(6, 4) * (small if step < 9 else large)
        optimizer.step()
    assert bool(p.isfinite().all())


@pytest.mark.parametrize("exponent", [None, 0.5])
def test_a_matrix_moves_as_soon_as_it_has_a_gradient(exponent: float | None) -> None:
    """The roots of an empty factor let it pass, until they are computed again."""
    p = nn.Parameter(torch.ones(6, 4))
    optimizer = Shampoo([p], lr=0.01, exponent=exponent, update_period=100)
    for _ in range(9):
        p.grad = torch.zeros(6, 4)
        optimizer.step()
    assert torch.equal(p, torch.ones(6, 4))
    p.grad = torch.ones(6, 4)
    optimizer.step()
    assert bool((p < 1).all())


def test_rows_that_never_have_a_gradient_stay(device: torch.device) -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(6, 4, device=device))
    optimizer = Shampoo([p], lr=0.01)
    before, used = p.detach().clone(), torch.tensor([True, False, True, True, False, True])
    for _ in range(15):
        p.grad = torch.randn(6, 4).mul_(used[:, None]).to(device)
        optimizer.step()
    torch.testing.assert_close(p[~used], before[~used], rtol=0, atol=1e-4)
    assert (p - before)[used].abs().min() > 1e-4


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1, 1), (1, 5), (5, 1), (2, 1, 3), (2, 0, 3)])
@pytest.mark.parametrize("merge_dims", [False, True])
def test_shapes_without_much_of_a_matrix(shape: tuple[int, ...], merge_dims: bool) -> None:
    p, other = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(3, 2))
    optimizer = Shampoo([p, other], lr=0.1, merge_dims=merge_dims)
    for _ in range(12):
        optimizer.step(standard(optimizer, lambda: p.square().sum() + other.square().sum()))
    assert bool((p.abs() < 0.5).all()) and bool((other.abs() < 0.5).all())


def test_autocast_does_not_reach_into_the_step(device: torch.device) -> None:
    weight, loss_at = matrix_problem(6, 4, dtype=torch.float32)
    plain = trained(weight.to(device), loss_at, 12)
    with torch.autocast(device.type, torch.bfloat16):
        inside = trained(weight.to(device), loss_at, 12)
    torch.testing.assert_close(inside, plain)


# Arguments.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (1.0, 0.9)}, r"betas must be two numbers"),
        ({"eps": 0.0}, r"eps must be a finite number above 0"),
        ({"matrix_eps": -1.0}, r"matrix_eps must be a finite number of at least 0"),
        ({"exponent": 0.0}, r"exponent must be a finite number above 0 or None"),
        ({"grafting": "momentum"}, r"grafting must be one of 'adam', 'sgd', or None"),
        ({"root_method": "svd"}, r"root_method must be one of 'eigh', 'newton'"),
        ({"root_method": "newton", "exponent": 0.3}, r"small integers, such as 1/4, got 0\.3"),
        ({"shampoo_beta": 1.0}, r"shampoo_beta must lie in \[0, 1\) or None"),
        ({"update_period": 0}, r"update_period must be an integer of at least 1"),
        ({"block_size": 0}, r"block_size must be an integer of at least 1 or None"),
        ({"max_precond_dim": 0}, r"max_precond_dim must be an integer of at least 1 or None"),
        ({"merge_dims": 2}, r"merge_dims must be True or False, got 2"),
        ({"factor_dtype": torch.int32}, r"factor_dtype must be a floating-point dtype, such as"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    p = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=message):
        Shampoo([p], **options)
    optimizer = Shampoo([p])
    optimizer.param_groups[0].update(options)
    with pytest.raises(ValueError, match=message):
        optimizer.step(standard(optimizer, lambda: p.square().sum()))
    assert torch.equal(p, torch.ones(2, 2))


def test_a_grafting_that_is_no_name_is_refused() -> None:
    with pytest.raises(TypeError, match=r"grafting must be one of 'adam', 'sgd', or None, got 3"):
        Shampoo([nn.Parameter(torch.ones(2, 2))], grafting=3)  # type: ignore[arg-type]


def test_hyperparameters_are_in_the_groups() -> None:
    names = set(inspect.signature(Shampoo).parameters) - {"params"}
    assert names <= set(Shampoo([nn.Parameter(torch.ones(2, 2))]).param_groups[0])


def test_badly_scaled_rows_and_columns_are_no_obstacle() -> None:
    """The same rate and the same steps, on which Adam depends more."""
    losses = {}
    for kind in (Shampoo, torch.optim.AdamW):
        left, right = (
            rotation(12, seed) @ torch.diag(torch.logspace(0, -2, 12, dtype=DOUBLE))
            for seed in (1, 2)
        )
        target = left @ rotation(12, 3) @ right
        weight = nn.Parameter(torch.zeros(12, 12, dtype=DOUBLE))
        optimizer = kind([weight], lr=0.03, weight_decay=0.0)
        for _ in range(200):
            optimizer.zero_grad()
            loss = F.mse_loss(left @ weight @ right, target)
            loss.backward()
            optimizer.step()
        losses[kind] = loss.item()
    assert losses[Shampoo] < 0.3 * losses[torch.optim.AdamW]


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("options", [{}, {"grafting": "sgd"}, {"block_size": 3}])
def test_a_block_whose_squares_overflowed_begins_anew(
    options: dict[str, Any], capturable: bool, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.zeros(s, device=device)) for s in ((6, 5), (5,))]
    optimizer = Shampoo(params, lr=0.01, capturable=capturable, **options)
    for step in range(45):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(device)
            p.grad *= 1e25 if step == 15 else 1.0
        optimizer.step()
        moves = [(p - q).abs().max().item() for p, q in zip(params, before, strict=True)]
        assert max(moves) < 0.2
    assert min(moves) > 1e-4
    for state in optimizer.state.values():
        assert all(t.isfinite().all() for t in state.values() if isinstance(t, Tensor))
