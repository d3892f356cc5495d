"""Tests of AdaSecant: the reference, its rules, and what it does where numbers are not finite."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.adasecant_reference import Reference, gradient_of
from tests.support.closures import standard
from torch_secondorder import AdaSecant, DatasetClosure, FunctionalObjective, StepStatus
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.optim import adasecant

DOUBLE = {"dtype": torch.float64}


class Regression:
    """Mini-batches of a small network with a matrix, a vector and a single number."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(40, 4, generator=generator, **DOUBLE).to(device)
        self.y = torch.sin(self.x.sum(1)) + 0.3 * torch.randn(40, generator=generator, **DOUBLE).to(
            device
        )
        start = (
            0.5 * torch.randn(3, 4, generator=generator, **DOUBLE),
            0.1 * torch.randn(3, generator=generator, **DOUBLE),
            torch.tensor(0.2, **DOUBLE),
        )
        self.params = [nn.Parameter(p.to(device)) for p in start]
        self.shapes = [p.shape for p in start]
        self.blocks = [p.flatten().tolist() for p in start]

    def loss(self, params: list[Tensor], step: int) -> Tensor:
        rows = slice(8 * (step % 5), 8 * (step % 5) + 8)
        weight, out, bias = params
        x, y = self.x[rows].to(weight.device), self.y[rows].to(weight.device)
        return (torch.tanh(x @ weight.T) @ out + bias - y).square().mean()

    def closure(self, optimizer: torch.optim.Optimizer, step: int) -> Callable[[], Tensor]:
        return standard(optimizer, lambda: self.loss(self.params, step))


def trained(params: list[Tensor], loss: Callable[[], Tensor], steps: int, **arguments: Any):
    """An optimizer after some steps on one function."""
    optimizer = AdaSecant(params, **arguments)
    for _ in range(steps):
        optimizer.step(standard(optimizer, loss))
    return optimizer


def parameter(*numbers: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(numbers, **DOUBLE))


# The method.


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"update_period": 1},
        {"secant": "coordinate", "update_period": 1, "outlier_deviations": 2.0},
        {"outlier_deviations": None},
        {"outlier_deviations": 1.0, "update_period": 3},
        {"use_adagrad": True},
        {"gamma_clip": 0.0},
        {"gamma_clip": 50.0, "start_var_reduction": 7},
        {"delta_clip": 0.2},
    ],
    ids=str,
)
def test_equal_to_plain_numbers(arguments: dict[str, Any], device: torch.device) -> None:
    problem = Regression(device)
    rates = [1.0, 0.5, 2.0]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(problem.params, rates, strict=True)]
    optimizer = AdaSecant(groups, **arguments)
    reference = Reference(problem.blocks, rates, **arguments)
    outliers = 0
    for step in range(40):
        # What both know, they have found out by themselves; the point is the same, or rounding
        # errors would grow from step to step.
        reference.blocks = [p.detach().flatten().tolist() for p in problem.params]
        optimizer.step(problem.closure(optimizer, step))
        reference.step(gradient_of(lambda p, step=step: problem.loss(p, step), problem.shapes))
        for p, block in zip(problem.params, reference.blocks, strict=True):
            expected = torch.tensor(block, device=device, **DOUBLE).reshape(p.shape)
            torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)
        assert optimizer._memory is not None
        memories = torch.tensor(reference.memories(), device=device, **DOUBLE)
        torch.testing.assert_close(optimizer._memory, memories, rtol=1e-9, atol=1e-9)
        assert optimizer.info is not None
        assert optimizer.info.outliers * 16 == pytest.approx(reference.outliers)
        period = arguments.get("update_period", 5)
        evaluated = step < period or step % period == 0
        assert optimizer.info.evaluations == 1 + (step == 0) + evaluated
        assert (optimizer.info.loss_after is None) == (not evaluated)
        assert optimizer.info.probes == (step == 0)
        outliers += reference.outliers
    assert (outliers > 0) == (arguments.get("outlier_deviations", 4.0) is not None)


def test_complex_parameters_are_pairs_of_numbers(device: torch.device) -> None:
    z = nn.Parameter(torch.tensor([1 + 2j, -0.5j], dtype=torch.complex128, device=device))
    pairs = nn.Parameter(torch.view_as_real(z.detach()).clone())
    target = torch.tensor([0.3 - 1j, 2.0], dtype=torch.complex128, device=device)
    trained([z], lambda: ((z - target).abs() ** 4).sum(), 12)
    trained([pairs], lambda: ((torch.view_as_complex(pairs) - target).abs() ** 4).sum(), 12)
    assert torch.equal(torch.view_as_real(z.detach()), pairs.detach())


def test_the_scale_of_the_loss_has_no_effect(device: torch.device) -> None:
    found = []
    for scale in (1.0, 2.0**40, 2.0**-40):
        problem = Regression(device)
        optimizer = AdaSecant(problem.params, tolerance_grad=0.0)
        for step in range(15):
            loss = lambda s=scale, k=step, p=problem: s * p.loss(p.params, k)  # noqa: E731
            optimizer.step(standard(optimizer, loss))
        found.append([p.detach() for p in problem.params])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-12)


def test_a_quadratic_is_minimized(device: torch.device) -> None:
    scales = torch.tensor([1.0, 30.0, 900.0], device=device, **DOUBLE)
    x = nn.Parameter(torch.ones(3, device=device, **DOUBLE))
    trained([x], lambda: (scales * x * x).sum(), 150)
    assert (scales * x * x).sum() < 1e-3


def test_rates_are_those_of_the_formulas() -> None:
    """A coordinate that hardly moves while its gradient changes: why `"block"` is the default."""
    rates = {}
    for secant in ("block", "coordinate"):
        optimizer = with_averages(5.0, secant=secant)
        optimizer._means[7] = torch.tensor([4.0, 4e-6], **DOUBLE)  # E[move^2]
        optimizer._means[8] = torch.tensor([0.5, 0.0], **DOUBLE)  # E[change * move]
        vector = ParameterVector(optimizer.param_groups[0]["params"])
        blocks = adasecant._Blocks(vector)
        rate = optimizer._rate(blocks, optimizer._means, optimizer.param_groups[0])
        rates[secant] = rate.tolist()
    floored = 1.01  # E[change^2], with a hundredth of its mean
    assert rates["block"] == pytest.approx([(2.000002 / floored) ** 0.5] * 2)
    assert rates["coordinate"] == pytest.approx(
        [2 / floored**0.5 - 0.5 / floored, 2e-3 / floored**0.5]
    )


def test_no_rate_is_negative_and_none_above_the_bound() -> None:
    optimizer = with_averages(5.0, secant="coordinate", delta_clip=0.7)
    optimizer._means[8] = torch.tensor([2.0, 0.1], **DOUBLE)
    blocks = adasecant._Blocks(ParameterVector(optimizer.param_groups[0]["params"]))
    rate = optimizer._rate(blocks, optimizer._means, optimizer.param_groups[0])
    assert rate.tolist() == [0.0, 0.7]


# Memory.


def test_steady_moves_have_the_shortest_memory() -> None:
    x = parameter(0.0)
    optimizer = trained([x], lambda: x.sum(), 6)
    assert optimizer._memory is not None and optimizer.info is not None
    # Each move is ten times the last one: E[move]^2 / E[move^2] is below one, but large.
    assert 1.5 <= optimizer._memory.item() < 3.0
    assert optimizer.info.memory == optimizer._memory.item()


def learned(optimizer: AdaSecant, gradient: list[float], change: list[float], move: list[float]):
    """Lets the averages learn from a made-up step; returns the outliers."""
    tensor = lambda numbers: torch.tensor(numbers, **DOUBLE)  # noqa: E731
    moves = torch.ones(len(gradient), dtype=torch.bool)
    one = torch.ones((), **DOUBLE)
    batch = adasecant._Batch(tensor(gradient), one, moves, 1.0, one)
    return optimizer._learn(batch, tensor(change), tensor(move)).tolist()


def with_averages(memory: float, **options: Any) -> AdaSecant:
    """An optimizer of two numbers whose averages have mean 0 and variance 1."""
    optimizer = AdaSecant([parameter(0.0, 0.0)], **({"outlier_deviations": 2.0} | options))
    optimizer._means = torch.zeros(9, 2, **DOUBLE)
    optimizer._means[[1, 5, 7]] = 1.0
    optimizer._memory = torch.full((2,), memory, **DOUBLE)
    optimizer._gradient_before = torch.zeros(2, **DOUBLE)
    return optimizer


def test_memory_grows_by_one_where_moves_have_no_direction() -> None:
    optimizer = with_averages(5.0)
    for expected in (6.0, 7.0, 8.0):
        learned(optimizer, [0.0, 0.0], [0.0, 0.0], [0.0, 0.0])
        assert optimizer._memory.tolist() == [expected, expected]


def test_memory_follows_the_formula() -> None:
    optimizer = with_averages(5.0)
    learned(optimizer, [0.1, 0.1], [0.0, 0.0], [2.0, -1.0])
    mean, square = [0.4, -0.2], [0.8 + 0.8, 0.8 + 0.2]
    expected = [5 * (1 - m * m / s) + 1 for m, s in zip(mean, square, strict=True)]
    torch.testing.assert_close(optimizer._memory, torch.tensor(expected, **DOUBLE))


def test_memory_has_bounds() -> None:
    optimizer = with_averages(1e8)
    optimizer._means[6] = torch.tensor([1.0, 0.0], **DOUBLE)
    learned(optimizer, [0.0, 0.0], [0.0, 0.0], [1.0, 0.0])
    assert optimizer._memory.tolist() == [1.5, 1e8]


@pytest.mark.parametrize("where", ["gradient", "change"])
def test_an_outlier_resets_the_memory_before_it_is_averaged(where: str) -> None:
    optimizer = with_averages(50.0)
    numbers = {"gradient": [0.0, 0.0], "change": [0.0, 0.0]} | {where: [2.01, 1.99]}
    assert learned(optimizer, **numbers, move=[0.0, 0.0]) == [True, False]
    torch.testing.assert_close(optimizer._memory, torch.tensor([3.2, 51.0], **DOUBLE))
    row = 0 if where == "gradient" else 4
    expected = torch.tensor([2.01 / 2.2, 1.99 / 50], **DOUBLE)
    torch.testing.assert_close(optimizer._means[row], expected)


def test_the_number_of_deviations() -> None:
    for deviations, expected in ((1.0, [True, True]), (3.0, [False, True]), (None, [False] * 2)):
        optimizer = with_averages(9.0, outlier_deviations=deviations)
        assert learned(optimizer, [2.5, -3.5], [0.0, 0.0], [0.0, 0.0]) == expected


def test_equal_gradients_are_no_outliers() -> None:
    """The variance of equal numbers is a rounding error, and so are their deviations."""
    x = parameter(0.3, -0.7, 1.1)
    slope = torch.tensor([0.1, 0.7, -0.3], **DOUBLE)
    optimizer = AdaSecant([x])
    for _ in range(10):
        optimizer.step(standard(optimizer, lambda: x @ slope))
        assert optimizer.info is not None
        assert optimizer.info.outliers == 0


# Variance reduction.


def test_gamma_minimizes_the_distance_from_the_next_gradient() -> None:
    generator = torch.Generator().manual_seed(1)
    drift = torch.zeros(2, **DOUBLE)
    optimizer = with_averages(1e8, gamma_clip=100.0, outlier_deviations=None)
    optimizer._means.zero_()
    gradients = []
    for step in range(1, 801):
        # One coordinate keeps half of its deviation, the other nothing but noise.
        drift = torch.tensor([0.5, 0.0], **DOUBLE) * drift + torch.randn(2, generator=generator)
        gradients.append(drift)
        optimizer._memory.fill_(float(step) + 1)
        learned(optimizer, drift.tolist(), [0.0, 0.0], [0.0, 0.0])
    gamma = optimizer._gamma(optimizer.param_groups[0])
    series = torch.stack(gradients)
    now, after = series[:-1], series[1:]
    grid = torch.linspace(0, 100, 20001, **DOUBLE)[:, None]
    error = [((now[:, i] / (1 + grid) - after[:, i]) ** 2).mean(1) for i in range(2)]
    assert gamma[0] == pytest.approx(grid[error[0].argmin()].item(), rel=0.1)
    assert gamma[1] > 10


def test_gamma_where_batches_have_nothing_in_common() -> None:
    optimizer = with_averages(5.0)
    group = optimizer.param_groups[0]
    assert optimizer._gamma(group).tolist() == [0.0, 0.0]  # nothing is known
    optimizer._means[2] = torch.tensor([1.0, 0.5], **DOUBLE)
    optimizer._means[3] = torch.tensor([-1.0, 1.0], **DOUBLE)
    assert optimizer._gamma(group).tolist() == [1.8, 0.5]
    optimizer._means[2] = -1.0
    optimizer._means[3] = 2.0
    assert optimizer._gamma(group).tolist() == [0.0, 0.0]


# Numbers that are not finite, and steps that are too long.


def test_a_move_into_numbers_that_are_not_finite_is_shortened(device: torch.device) -> None:
    x = nn.Parameter(torch.tensor([1.0], device=device, **DOUBLE))
    optimizer = AdaSecant([x], update_period=1)
    shortened = 0
    for _ in range(12):
        optimizer.step(standard(optimizer, lambda: walled(x)))
        assert optimizer.info is not None
        assert x.item() > 0 and optimizer.info.status is StepStatus.MAX_ITERATIONS
        assert (optimizer.info.step_length < 1.0) == (optimizer.info.nonfinite_trials > 0)
        shortened += optimizer.info.nonfinite_trials
    assert shortened


def walled(x: Tensor) -> Tensor:
    """A loss that is not finite below zero, with its minimum close by."""
    return x.sum() - 0.001 * torch.log(x).sum()


def test_a_move_that_turns_out_wrong_in_the_next_step_is_taken_back(device: torch.device) -> None:
    x = nn.Parameter(torch.tensor([1.0], device=device, **DOUBLE))
    optimizer = AdaSecant([x], update_period=3)
    back = 0
    last = [x.item()]
    for _ in range(20):
        loss = optimizer.step(standard(optimizer, lambda: walled(x)))
        assert loss.isfinite()
        assert optimizer.info is not None
        assert optimizer.info.status is StepStatus.MAX_ITERATIONS
        if last[-1] <= 0.0:
            back += 1
            assert optimizer.info.loss == pytest.approx(walled(torch.tensor([last[-2]], **DOUBLE)))
            assert optimizer.info.probes == 1  # it has begun anew
        last.append(x.item())
    assert back


@pytest.mark.parametrize("raises", [1, 2, 3])
def test_a_move_is_taken_back_after_an_exception(raises: int, device: torch.device) -> None:
    x = nn.Parameter(torch.tensor([1.0], device=device, **DOUBLE))
    optimizer = AdaSecant([x], update_period=3)
    left, wall = 0, -math.inf

    def loss() -> Tensor:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        return x.square().sum() + x.sum() + (torch.nan if x.item() == wall else 0.0)

    while optimizer._untested is None:
        before = x.item()
        optimizer.step(standard(optimizer, loss))
    wall, left = x.item(), raises
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(standard(optimizer, loss))
    assert x.item() == wall
    assert before != wall
    optimizer.step(standard(optimizer, loss))
    assert optimizer.info is not None
    assert optimizer.info.status is StepStatus.MAX_ITERATIONS
    assert x.item() != wall


def test_a_move_stays_if_the_batch_was_not_finite_before_it_either() -> None:
    problem = Regression()
    optimizer = AdaSecant(problem.params, update_period=2)
    for step in range(4):
        optimizer.step(problem.closure(optimizer, step))
    assert optimizer.info is not None
    assert optimizer.info.loss_after is None  # the last move was not evaluated
    before = [p.detach().clone() for p in problem.params]
    optimizer.step(standard(optimizer, lambda: problem.loss(problem.params, 0) * math.nan))
    assert optimizer.info.status is StepStatus.NONFINITE_START
    assert all(map(torch.equal, before, problem.params))
    optimizer.step(problem.closure(optimizer, 4))
    assert optimizer.info.probes == 0


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_the_parameters_stay_where_no_trial_is_finite(steps_before: int, what: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    x = torch.randn(10, 3, generator=torch.Generator().manual_seed(0), **DOUBLE)
    optimizer = AdaSecant(model.parameters())
    calls: list[int] = []

    def loss() -> Tensor:
        calls.append(1)
        value = model(x).square().mean()
        if len(calls) > 1 and broken:
            return value * math.nan if what == "loss" else value + (value * 0).sqrt()
        return value

    broken = False
    for _ in range(steps_before):
        optimizer.step(standard(optimizer, loss))
    broken, before = True, copy.deepcopy(model.state_dict())
    calls.clear()
    optimizer.step(standard(optimizer, loss))
    assert optimizer.info is not None
    assert optimizer.info.status is StepStatus.NONFINITE_TRIALS
    assert optimizer.info.nonfinite_trials == 10
    for p in model.parameters():
        assert torch.equal(p, before[next(k for k, v in model.named_parameters() if v is p)])
    broken = False
    value = loss().item()
    for _ in range(10):
        optimizer.step(standard(optimizer, loss))
    assert loss().item() < value


def test_a_batch_that_is_not_finite_leaves_the_averages() -> None:
    problem = Regression()
    optimizer = AdaSecant(problem.params)
    for step in range(4):
        optimizer.step(problem.closure(optimizer, step))
    before = optimizer.state_dict()["state"]
    optimizer.step(standard(optimizer, lambda: problem.loss(problem.params, 0) * math.nan))
    assert optimizer.info is not None
    assert optimizer.info.status is StepStatus.NONFINITE_START
    after = optimizer.state_dict()["state"]
    for name in before[0]:
        assert str(before[0][name]) == str(after[0][name])


def test_a_linear_loss_moves_ten_times_as_far_in_each_step() -> None:
    x = parameter(0.0, 0.0)
    optimizer = AdaSecant([x])
    for step in range(5):
        before = x.detach().clone()
        optimizer.step(standard(optimizer, lambda: 3 * x[0] - 4 * x[1]))
        assert (x - before).norm() <= 1e-3 * 2**0.5 * 10.0 ** (step + 1) * 1.0001
    assert x[0] < -0.1


def test_gradients_at_the_ends_of_the_range(device: torch.device) -> None:
    for scale in (1e-30, 1e30):
        x = nn.Parameter(torch.tensor([1.0, -2.0], device=device))
        optimizer = AdaSecant([x], tolerance_grad=0.0)
        for _ in range(30):
            optimizer.step(standard(optimizer, lambda x=x, s=scale: s * x.square().sum()))
        assert x.isfinite().all()
        assert x.norm() < 0.1


# Groups, and parameters without gradients.


def test_the_learning_rate_is_a_factor() -> None:
    moves = {}
    for lr in (1.0, 0.25):
        problem = Regression()
        before = [p.detach().clone() for p in problem.params]
        optimizer = AdaSecant(problem.params, lr=lr)
        optimizer.step(problem.closure(optimizer, 0))
        moves[lr] = [p.detach() - b for p, b in zip(problem.params, before, strict=True)]
    for whole, part in zip(moves[1.0], moves[0.25], strict=True):
        ratio = part / whole
        assert torch.all((ratio > 0.2) & (ratio <= 1.0))
        torch.testing.assert_close(ratio, torch.full_like(ratio, ratio.flatten()[0]))


def test_a_group_whose_rate_was_zero_begins_with_a_probe() -> None:
    problem = Regression()
    optimizer = AdaSecant(
        [{"params": problem.params[:1]}, {"params": problem.params[1:], "lr": 0.0}]
    )
    before = [p.detach().clone() for p in problem.params]
    for step in range(3):
        optimizer.step(problem.closure(optimizer, step))
    assert torch.equal(problem.params[1], before[1])
    assert not torch.equal(problem.params[0], before[0])
    optimizer.param_groups[1]["lr"] = 1.0
    optimizer.step(problem.closure(optimizer, 3))
    assert optimizer.info is not None
    assert optimizer.info.probes == 1
    for p, old in zip(problem.params, before, strict=True):
        assert not torch.equal(p, old)
    optimizer.step(problem.closure(optimizer, 4))
    assert optimizer.info.probes == 0


def test_parameters_without_gradients_stay_and_cost_no_probes() -> None:
    x, unused, dead = parameter(1.0, 2.0), parameter(3.0), parameter(4.0)
    empty = nn.Parameter(torch.zeros(0, 3, **DOUBLE))
    optimizer = AdaSecant([x, unused, dead, empty])
    for step in range(6):
        optimizer.step(standard(optimizer, lambda: x.square().sum() + 0.0 * dead.sum()))
        assert optimizer.info is not None
        assert math.isfinite(optimizer.info.gamma + optimizer.info.rate + optimizer.info.memory)
        assert optimizer.info.probes == (step == 0)
    assert (unused.item(), dead.item()) == (3.0, 4.0)
    for step in range(2):  # it comes alive, and is measured then
        optimizer.step(standard(optimizer, lambda: x.square().sum() + dead.square().sum()))
        assert optimizer.info.probes == (step == 0)
    assert dead.item() != 4.0


def test_frozen_parameters_begin_anew() -> None:
    problem = Regression()
    optimizer = AdaSecant(problem.params)
    for step in range(3):
        optimizer.step(problem.closure(optimizer, step))
    problem.params[0].requires_grad_(False)
    before = problem.params[0].detach().clone()
    for step in range(3):
        optimizer.step(problem.closure(optimizer, step))
    assert torch.equal(before, problem.params[0])
    problem.params[0].requires_grad_(True)
    optimizer.step(problem.closure(optimizer, 0))
    assert not torch.equal(before, problem.params[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 3).to(device, dtype)
    x, y = torch.randn(30, 5).to(device, dtype), torch.randint(3, (30,)).to(device)
    loss = lambda: F.cross_entropy(model(x).float(), y)  # noqa: E731
    before = loss().item()
    trained(list(model.parameters()), loss, 30)
    assert loss().item() < 0.9 * before


# Evaluations, checkpoints, and other sources of the loss.


def test_many_iterations_of_a_step_are_steps_on_the_same_data() -> None:
    one, many = Regression(), Regression()
    optimizer = AdaSecant(one.params, update_period=1)
    for _ in range(9):
        optimizer.step(one.closure(optimizer, 0))
    once = AdaSecant(many.params, max_iter=9)
    once.step(many.closure(once, 0))
    assert all(map(torch.equal, one.params, many.params))
    assert once.info is not None
    assert once.info.evaluations == 2 + 9  # the first probe and the start; then one each
    assert once.info.iterations == 9


def test_training_goes_on_bit_for_bit_from_each_step() -> None:
    problem = Regression()
    optimizer = AdaSecant(problem.params, use_adagrad=True, start_var_reduction=3)
    for steps in range(5):
        file = io.BytesIO()
        torch.save((problem.params, optimizer.state_dict()), file)
        file.seek(0)
        other = Regression()
        params, state = torch.load(file, weights_only=True)
        other.params = [nn.Parameter(p.detach()) for p in params]
        resumed = AdaSecant(other.params, use_adagrad=True, start_var_reduction=3)
        resumed.load_state_dict(state)
        third, copied = copy.deepcopy((problem, optimizer))
        for step in range(steps, steps + 3):
            resumed.step(other.closure(resumed, step))
            copied.step(third.closure(copied, step))
        assert all(map(torch.equal, other.params, third.params)), steps
        optimizer.step(problem.closure(optimizer, steps))


def test_statistics_move_as_with_one_evaluation(device: torch.device) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(2)
        models.append(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).to(device))
    ours, plain = models
    x = torch.randn(10, 3).to(device)
    plain(x)
    optimizer = AdaSecant(ours.parameters())
    optimizer.step(standard(optimizer, lambda: ours(x).square().mean()))
    for a, b in zip(ours[1].buffers(), plain[1].buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_whole_data_set() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    x = torch.randn(24, 3, **DOUBLE)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]], **DOUBLE)
    data = [(x[:12], y[:12]), (x[12:], y[12:])]
    optimizer = AdaSecant(model.parameters(), max_iter=40)
    closure = DatasetClosure(model, F.mse_loss, data)
    before = optimizer.step(closure)
    assert F.mse_loss(model(x), y) < 0.1 * before


def test_a_pure_function() -> None:
    x = parameter(1.0, -2.0)
    function = lambda p: (p["x"] ** 2).sum()  # noqa: E731
    optimizer = AdaSecant([x], max_iter=30)
    optimizer.step(FunctionalObjective(function, {"x": x}))
    assert x.norm() < 0.1


def test_the_report() -> None:
    problem = Regression()
    optimizer = AdaSecant(problem.params)
    before = torch.cat([p.detach().flatten() for p in problem.params])
    optimizer.step(problem.closure(optimizer, 0))
    info = optimizer.info
    assert info is not None
    problem_at_start = Regression()
    problem_at_start.loss(problem_at_start.params, 0).backward()
    grad = torch.cat([p.grad.flatten() for p in problem_at_start.params])
    moved = torch.cat([p.detach().flatten() for p in problem.params]) - before
    assert info.rate == pytest.approx((moved.norm() / grad.norm()).item())
    assert info.loss_after == pytest.approx(problem.loss(problem.params, 0).item())
    assert (info.gamma, info.step_length, info.iterations) == (0.0, 1.0, 1)


# Wrong arguments.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"secant": "newton"}, "secant must be one of 'block', 'coordinate', got 'newton'"),
        ({"gamma_clip": -1.0}, "gamma_clip must be a finite number of at least 0, got -1.0"),
        ({"outlier_deviations": 0.0}, "outlier_deviations must be a finite number above 0 or None"),
        ({"start_var_reduction": -1}, "start_var_reduction must be an integer of at least 0"),
        ({"delta_clip": 0.0}, "delta_clip must be a finite number above 0 or None, got 0.0"),
        ({"max_iter": 0}, "max_iter must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    x = parameter(1.0)
    with pytest.raises(ValueError, match=message):
        AdaSecant([x], **arguments)
    if "secant" not in arguments and "max_iter" not in arguments:
        optimizer = AdaSecant([x])
        optimizer.param_groups[0] |= arguments
        with pytest.raises(ValueError, match=message):
            optimizer.step(standard(optimizer, lambda: x.square().sum()))
        assert x.item() == 1.0


def test_what_it_does_not_take_is_refused() -> None:
    x = parameter(1.0)
    with pytest.raises(ValueError, match="bounds"):
        AdaSecant([{"params": [x], "bounds": (0.0, None)}])
    with pytest.raises(RuntimeError, match="needs a closure"):
        AdaSecant([x]).step()
    with pytest.raises(ValueError, match=r"no state of AdaSecant.*lack 'gamma_clip'"):
        AdaSecant([x]).load_state_dict(torch.optim.SGD([x]).state_dict())
