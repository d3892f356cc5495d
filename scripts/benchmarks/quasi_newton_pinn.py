"""Quasi-Newton methods on physics-informed networks: loss and error by evaluations, and by time.

Counts of evaluations are the same on every machine, so runs of this kind may share a busy one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from torch_secondorder import BFGS, LBFGS, NonlinearCG

from .harness import load_peer, progress, say
from .race import load_example, race, show
from .registry import Options
from .report import Report, Table, number

SPEED = 30.0
POISSON_MARKS = (500, 1_000, 2_000, 4_000)
CONVECTION_MARKS = (500, 1_000, 1_500)
DTYPE = torch.float64

Make = Callable[[Iterable[nn.Parameter]], Any]
Solve = Callable[[Callable[[Tensor], Tensor], Tensor], object]


@dataclass(frozen=True)
class Pinn:
    """A network with an equation to satisfy.

    Attributes:
        title: The equation and the network, for tables.
        model: The initial network; each run trains a copy.
        loss: The training loss of a network.
        error: The relative L2 error of a network against the exact solution.
    """

    title: str
    model: nn.Module
    loss: Callable[[Any], Tensor]
    error: Callable[[Any], float]

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(p.numel() for p in self.model.parameters())


def network(widths: Sequence[int], seed: int, device: torch.device) -> nn.Sequential:
    """A tanh network in float64 with layers of these widths, the same for the same seed."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for wide, following in pairwise(widths):
        layers += [nn.Linear(wide, following, dtype=DTYPE), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(device)


def poisson(device: torch.device, seed: int = 0) -> Pinn | None:
    """Poisson's equation of `examples/pinn_poisson.py`, with its network 2-64-1 (257 parameters).

    Returns:
        The problem, or None where the example cannot be imported.
    """
    example = load_example("pinn_poisson")
    if example is None:
        return None
    problem = example.make_problem(device)

    def error(net: nn.Module) -> float:
        return float((net(problem.grid) - problem.exact).norm() / problem.exact.norm())

    model = example.make_network(64, seed).to(device)
    loss = partial(example.residual_loss, problem=problem)
    return Pinn("Poisson's equation, 2-64-1", model, loss, error)


def convection(
    device: torch.device,
    hidden: Sequence[int] = (50, 50, 50),
    speed: float = SPEED,
    points: int = 1000,
    seed: int = 0,
) -> Pinn:
    """The convection equation `u_t + speed u_x = 0`, periodic in x, from `u(x, 0) = sin x`.

    On x in [0, 2 pi], t in [0, 1]; the solution is `sin(x - speed t)`. A known hard case for such
    networks (Krishnapriyan et al., "Characterizing possible failure modes in physics-informed
    neural networks", NeurIPS 2021). The loss is the sum of the mean squares of the residual, of the
    initial condition and of the periodic one.

    Args:
        device: Where to compute.
        hidden: Widths of the hidden layers; by default the network has 5,301 parameters.
        speed: The speed of the wave.
        points: Number of points for the residual, a Sobol sequence: between the lines of a grid a
            network can satisfy the equation at the points only.
        seed: Seed of the network.
    """
    square = torch.quasirandom.SobolEngine(2).draw(points, dtype=DTYPE).to(device)
    inside = square * square.new_tensor([2.0 * math.pi, 1.0])
    x = torch.linspace(0.0, 2.0 * math.pi, 100, dtype=DTYPE, device=device)
    t = torch.linspace(0.0, 1.0, 100, dtype=DTYPE, device=device)
    at_start = torch.stack([x, torch.zeros_like(x)], dim=1)
    left = torch.stack([torch.zeros_like(t), t], dim=1)
    right = torch.stack([torch.full_like(t, 2.0 * math.pi), t], dim=1)
    wave = x.sin()[:, None]

    def loss(net: nn.Module) -> Tensor:
        at = inside.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(at).sum(), at, create_graph=True)
        residual = slope[:, 1] + speed * slope[:, 0]
        initial, periodic = net(at_start) - wave, net(left) - net(right)
        return residual.square().mean() + initial.square().mean() + periodic.square().mean()

    grid = torch.cartesian_prod(
        torch.linspace(0.0, 2.0 * math.pi, 101, dtype=DTYPE, device=device),
        torch.linspace(0.0, 1.0, 101, dtype=DTYPE, device=device),
    )
    exact = (grid[:, :1] - speed * grid[:, 1:]).sin()

    def error(net: nn.Module) -> float:
        return float((net(grid) - exact).norm() / exact.norm())

    widths = (2, *hidden, 1)
    title = f"convection, speed {speed:g}, {'-'.join(map(str, widths))}"
    return Pinn(title, network(widths, seed, device), loss, error)


def burgers(
    device: torch.device,
    hidden: Sequence[int] = (50, 50, 50),
    points: int = 400,
    seed: int = 0,
) -> Pinn | None:
    """Burgers' equation of `examples/pinn_burgers.py` at some of its points.

    Returns:
        The problem, or None where the example cannot be imported.
    """
    example = load_example("pinn_burgers")
    if example is None:
        return None
    problem = example.make_problem(device)
    problem = replace(problem, inside=problem.inside[:points])

    def error(net: nn.Module) -> float:
        return float((net(problem.grid) - problem.reference).norm() / problem.reference.norm())

    model = example.make_network(list(hidden), seed).to(device)
    loss = partial(example.residual_loss, problem=problem)
    return Pinn(f"Burgers' equation, 2-{'-'.join(map(str, hidden))}-1", model, loss, error)


@dataclass(frozen=True)
class Sample:
    """The state of a run at the last step that ended within a number of evaluations."""

    evaluations: int
    loss: float
    error: float


def by_evaluations(pinn: Pinn, make: Make, marks: Sequence[int]) -> list[Sample]:
    """Trains a copy of the network, and records loss and error after numbers of evaluations.

    Args:
        pinn: The problem.
        make: Makes the optimizer.
        marks: The numbers of evaluations, increasing.

    Returns:
        One sample for each mark. A run that ends early repeats its last one.
    """
    model = copy.deepcopy(pinn.model)
    optimizer = make(model.parameters())
    count = 0

    def closure() -> Tensor:
        nonlocal count
        count += 1
        optimizer.zero_grad()
        loss = pinn.loss(model)
        loss.backward()
        return loss

    def sample() -> Sample:
        loss = pinn.loss(model).item()
        with torch.no_grad():
            return Sample(count, loss, pinn.error(model))

    samples, latest = [], sample()
    for mark in marks:
        while count < mark:
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.step(closure)
            if count <= mark:
                latest = sample()
            if all(map(torch.equal, before, model.parameters())):
                break
        samples.append(latest)
        latest = sample()
    return samples


class _EnoughError(Exception):
    """Ends a solver that has no limit of evaluations."""


def by_function(pinn: Pinn, solve: Solve, marks: Sequence[int]) -> list[Sample]:
    """The same as `by_evaluations` for a solver that takes a function of a vector.

    Args:
        pinn: The problem.
        solve: Minimizes a function of a flat tensor from a starting point.
        marks: The numbers of evaluations, increasing.
    """
    model = copy.deepcopy(pinn.model)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    start = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    count, best, lowest = 0, start, math.inf
    samples: list[Sample] = []

    def network_at(x: Tensor) -> Callable[[Tensor], Tensor]:
        pieces = x.split([math.prod(shape) for shape in shapes.values()])
        views = (piece.view(shape) for piece, shape in zip(pieces, shapes.values(), strict=True))
        parameters = dict(zip(shapes, views, strict=True))
        return lambda points: torch.func.functional_call(model, parameters, (points,))

    def sample() -> None:
        with torch.no_grad():
            samples.append(Sample(count, lowest, pinn.error(network_at(best))))

    def function(x: Tensor) -> Tensor:
        nonlocal count, best, lowest
        if count == marks[len(samples)]:
            sample()
            if len(samples) == len(marks):
                raise _EnoughError
        count += 1
        loss = pinn.loss(network_at(x))
        if loss.item() < lowest:
            best, lowest = x.detach().clone(), loss.item()
        return loss

    with suppress(_EnoughError):
        solve(function, start)
    while len(samples) < len(marks):
        sample()
    return samples


def peers() -> dict[str, Solve]:
    """The installed peers with a dense inverse Hessian, which take a function of a vector."""
    table: dict[str, Solve] = {}
    optimize = load_peer("scipy.optimize", "scipy")
    if optimize is not None:
        table["SciPy's BFGS"] = partial(_scipy_bfgs, optimize.minimize)
    minimize = load_peer("torchmin", "pytorch-minimize")
    if minimize is not None:
        endless = {"gtol": 0.0, "xtol": 0.0, "max_iter": 1_000_000}
        table["pytorch-minimize's BFGS"] = lambda function, start: minimize.minimize(
            function, start, method="bfgs", options=endless
        )
    return table


def _scipy_bfgs(minimize: Any, function: Callable[[Tensor], Tensor], start: Tensor) -> None:
    def value_and_gradient(x: Any) -> tuple[float, Any]:
        point = torch.from_numpy(x).to(start).requires_grad_()
        loss = function(point)
        loss.backward()
        assert point.grad is not None
        return loss.item(), point.grad.cpu().numpy()

    endless = {"gtol": 0.0, "maxiter": 1_000_000}
    minimize(value_and_gradient, start.cpu().numpy(), jac=True, method="BFGS", options=endless)


def contenders() -> dict[str, Make]:
    """The optimizers to compare, by name; ten iterations in a step, so that marks are met."""
    table: dict[str, Make] = {}
    for update in ("ssbroyden", "ssbfgs", "bfgs"):
        table[f"BFGS, {update}"] = partial(BFGS, update=update, max_iter=10)
    table["LBFGS, ssbroyden"] = partial(LBFGS, update="ssbroyden", max_iter=10)
    table["LBFGS"] = partial(LBFGS, max_iter=10)
    table["NonlinearCG"] = partial(NonlinearCG, max_iter=10)
    table["torch.optim.LBFGS"] = partial(
        torch.optim.LBFGS,
        max_iter=10,
        line_search_fn="strong_wolfe",
        tolerance_grad=0.0,
        tolerance_change=0.0,
    )
    return table


def limited() -> dict[str, Make]:
    """The updates of `LBFGS` with the default history and with a short one."""
    table: dict[str, Make] = {}
    for update in ("ssbroyden", "ssbfgs", "bfgs"):
        for size in (None, 50, 20):
            name = f"LBFGS, {update}" + (f", history {size}" if size else "")
            table[name] = partial(LBFGS, update=update, history_size=size, max_iter=10)
    return table


def _compare(
    pinn: Pinn,
    marks: Sequence[int],
    key: str,
    options: Options,
    report: Report,
    others: Mapping[str, Solve],
    makes: Mapping[str, Make] | None = None,
) -> None:
    makes = contenders() if makes is None else makes
    runs: dict[str, Callable[[Sequence[int]], list[Sample]]] = {
        **{name: partial(by_evaluations, pinn, make) for name, make in makes.items()},
        **{name: partial(by_function, pinn, solve) for name, solve in others.items()},
    }
    if options.quick:
        marks = [mark // 50 for mark in marks]
    shown = Table(
        f"{pinn.title} ({pinn.size:,} parameters): loss and relative L2 error after evaluations",
        ["optimizer", *(f"{mark:,}" for mark in marks)],
    )
    for name, run in progress(options.chosen(runs).items(), pinn.title):
        samples = run(marks)
        shown.add(name, *(f"{number(s.loss, 2)}  {number(s.error, 2)}" for s in samples))
        by_mark = {str(mark): vars(s) for mark, s in zip(marks, samples, strict=False)}
        report.record(f"{key}.{name}", by_mark)
    report.show(shown)


def run_poisson(options: Options, report: Report) -> None:
    """The Poisson network, by evaluations."""
    pinn = poisson(options.device)
    if pinn is not None:
        _compare(pinn, POISSON_MARKS, "quasi_newton.poisson", options, report, peers())


def run_convection(options: Options, report: Report) -> None:
    """The deep network, by evaluations."""
    quick: dict[str, Any] = {"hidden": (10, 10), "points": 100}
    pinn = convection(options.device, **(quick if options.quick else {}))
    _compare(pinn, CONVECTION_MARKS, "quasi_newton.convection", options, report, {})


def run_limited(options: Options, report: Report) -> None:
    """Burgers' equation with networks of 5,301 and 20,601 parameters, in limited memory."""
    for width in (10,) if options.quick else (50, 100):
        pinn = burgers(options.device, hidden=(width,) * 3)
        if pinn is not None:
            key = f"quasi_newton.limited.{pinn.size}"
            _compare(pinn, CONVECTION_MARKS, key, options, report, {}, limited())


def run_seconds(options: Options, report: Report) -> None:
    """The Poisson network, 60 seconds for each optimizer of the example."""
    example = load_example("pinn_poisson")
    if example is None:
        return
    problem = example.make_problem(options.device)
    task = example.make_task(problem, example.make_network(64, 0).to(options.device))
    table = options.chosen({entry.label: entry for entry in example.CONTENDERS.values()})
    say(f"threads: {torch.get_num_threads()}")
    runs = race(task, table, options, "Poisson PINN", measurements=600)
    results = {
        "seconds to 1e-4": lambda run: run.reached(1e-4),
        "seconds to 1e-6": lambda run: run.reached(1e-6),
        "final relative L2": lambda run: run.score,
    }
    show(runs, "Poisson's equation, 2-64-1 tanh, float64", results, "quasi_newton.seconds", report)
