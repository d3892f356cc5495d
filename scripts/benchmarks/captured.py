"""Gains from CUDA graphs, autotuned products and single transfers, and new vectors.

Graphs are recorded on a CUDA device only. On a CPU the sub-command shows that everything runs, and
times what does.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_secondorder import AdaHessian, CapturedStep, FunctionalObjective
from torch_secondorder._foundation.host_transfer import read_numbers
from torch_secondorder.curvature import GaussNewton, Hessian, InverseBFGS
from torch_secondorder.solvers import CG

from .diagonal_steps import PERIOD, RATE, stepping
from .harness import Timing, alternate, progress, ratio, say
from .networks import Case, chain, cnn, deep_mlp, mlp
from .registry import Options, command
from .report import Report, Table, seconds

PARTS = ("steps", "direction", "transfers", "allocations", "products")
MEMORY = 20
NUMBERS = 5
MODES = ("default", "reduce-overhead", "max-autotune")
KINDS = {"Hessian": Hessian, "Gauss-Newton": GaussNewton}
Call = Callable[[], object]


@command("captured", "CUDA graphs, autotuned products, transfers, new vectors", PARTS)
def run(options: Options, report: Report) -> None:
    """Runs the parts."""
    if options.device.type != "cuda" and options.wants(PARTS[0]):
        say("no CUDA device: steps and directions run without graphs")
    for name, part in zip(PARTS, (steps, direction, transfers, allocations, products), strict=True):
        if options.wants(name):
            part(options, report)


def _measured(calls: dict[str, Call], options: Options) -> dict[str, Timing]:
    return alternate(calls, 2 * options.repeat, options.device, 0.02 if options.quick else 0.1)


# Steps.


def captured(case: Case) -> Call:
    """Ten steps of AdaHessian, one of which estimates the curvature."""
    model = copy.deepcopy(case.model)
    optimizer = AdaHessian(model.parameters(), lr=RATE, update_period=PERIOD)

    def closure(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = case.loss(model(x), y)
        loss.backward()
        return loss

    step = CapturedStep(optimizer, closure)

    def call() -> None:
        for _ in range(PERIOD):
            step(case.inputs, case.targets)

    if case.inputs.is_cuda:
        for _ in range(4):  # warm-up, and graphs of both kinds of steps
            call()
        say(f"{case.name}: graphs of {', '.join(step.captured) or 'nothing: ' + step.reason}")
    return call


def steps(options: Options, report: Report) -> None:
    """A step of AdaHessian with `update_period=10`, over one of Adam."""
    makers: list[Callable[[torch.device], Case]] = [partial(mlp, batch=128), cnn, deep_mlp]
    kinds: Iterable[Any] = makers[-1:] if options.quick else makers
    adam = partial(torch.optim.Adam, fused=True)
    seldom = partial(AdaHessian, update_period=PERIOD)
    names = ("Adam (fused)", f"AdaHessian/{PERIOD}", f"AdaHessian/{PERIOD}, captured")
    table = Table("Mean time of a step", ["network", *names, "eager / Adam", "captured / Adam"])
    for make in progress(list(kinds), "captured steps"):
        case = make(options.device)
        makes = (stepping(case, adam), stepping(case, seldom, PERIOD), captured(case))
        timings = _measured(dict(zip(names, makes, strict=True)), options)
        means = [timings[names[0]].median, *(timings[name].median / PERIOD for name in names[1:])]
        table.add(
            case.name,
            *map(seconds, means),
            f"{means[1] / means[0]:.2f}",
            f"{means[2] / means[0]:.2f}",
        )
        report.record(
            f"captured.adahessian.{case.name}", {name: t.as_dict() for name, t in timings.items()}
        )
    report.show(table)


# A direction of L-BFGS.


def recorded(call: Callable[[], Tensor], device: torch.device) -> Call:
    """The call as a CUDA graph; the call itself where there is no such device."""
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def direction(options: Options, report: Report) -> None:
    """A product with the history, which is full and stays as it is."""
    sizes = (10_000,) if options.quick else (10_000, 100_000, 1_000_000)
    table = Table(f"An L-BFGS direction, {MEMORY} pairs", ["n", "eager", "captured", "ratio"])
    for size in sizes:
        history = InverseBFGS(size, MEMORY, device=options.device)
        for _ in range(MEMORY):
            s = torch.randn(size, device=options.device)
            history.push(s, s + 0.1 * torch.randn_like(s))
        gradient = torch.randn(size, device=options.device)
        call = partial(history.direction, gradient)
        call()  # enters the newest pair
        timings = _measured({"eager": call, "captured": recorded(call, options.device)}, options)
        compared = ratio(timings["captured"], timings["eager"])
        table.add(f"{size:,}", *(seconds(t.median) for t in timings.values()), compared)
        report.record(
            f"captured.lbfgs direction.{size}", {name: t.as_dict() for name, t in timings.items()}
        )
    report.show(table)


# Numbers for the host.


def transfers(options: Options, report: Report) -> None:
    """Some numbers brought to the host: each on its own, as one vector, by page-locked memory."""
    numbers = list(torch.rand(NUMBERS, device=options.device).unbind())
    calls: dict[str, Call] = {
        "each": lambda: [number.item() for number in numbers],
        "stacked": lambda: torch.stack(numbers).tolist(),
        "read_numbers": lambda: read_numbers(*numbers),
    }
    timings = _measured(calls, options)
    table = Table(f"{NUMBERS} numbers for the host", list(calls))
    table.add(*(seconds(timing.median) for timing in timings.values()))
    report.show(table)
    report.record("captured.transfers", {name: t.as_dict() for name, t in timings.items()})


# New memory.


def _asked_for(call: Call) -> int:
    """The number of blocks above a megabyte that a call asks the device's allocator for."""
    call()
    before: int = torch.cuda.memory_stats()["allocation.large_pool.allocated"]
    call()
    after: int = torch.cuda.memory_stats()["allocation.large_pool.allocated"]
    return after - before


def allocations(options: Options, report: Report) -> None:
    """Vectors that an L-BFGS direction and twenty iterations of CG ask for, on a CUDA device."""
    if options.device.type != "cuda":
        say("no CUDA device: allocations are not counted")
        return
    size = 1_000_000
    history = InverseBFGS(size, MEMORY, device=options.device)
    vectors = torch.rand(2, size, device=options.device)

    def pair() -> None:
        history.push(vectors[0], vectors[1], 0.5)
        history.direction(vectors[1])

    for _ in range(MEMORY + 1):
        pair()
    net = chain([100, 1000, 1000, 1], torch.nn.Tanh).to(options.device)
    params = dict(net.named_parameters())
    x = torch.rand(8, 100, device=options.device)
    objective = FunctionalObjective(
        lambda p: torch.func.functional_call(net, p, x).square().mean(), params
    )
    operator = GaussNewton(objective.evaluate(curvature=True))
    b = torch.rand(operator.size, device=options.device)
    found = {
        "direction": _asked_for(pair),
        "product": _asked_for(lambda: operator.matvec(b)),
        "CG, 5 iterations": _asked_for(lambda: CG(max_iterations=5, tolerance=0.0)(operator, b)),
        "CG, 25 iterations": _asked_for(lambda: CG(max_iterations=25, tolerance=0.0)(operator, b)),
    }
    table = Table("New blocks above a megabyte", list(found))
    table.add(*found.values())
    report.show(table)
    report.record("captured.allocations", found)


# Products.


def products(options: Options, report: Report) -> None:
    """A product with the curvature of a small network, in each mode of the compiler."""
    case = deep_mlp(options.device)
    model, params = case.model, dict(case.model.named_parameters())

    def loss(p: dict[str, Tensor]) -> Tensor:
        value: Tensor = case.loss(
            torch.func.functional_call(model, p, (case.inputs,)), case.targets
        )
        return value

    plain = FunctionalObjective(loss, params).evaluate(curvature=True)
    v = torch.ones_like(plain.grad)
    modes: Iterable[Any] = () if options.quick else MODES
    kinds = list(KINDS.items())[-1:] if options.quick else list(KINDS.items())
    table = Table(
        f"A product, {case.name}", ["curvature", "gradient", "eager", *MODES, "first calls"]
    )
    for kind, operator in kinds:
        calls: dict[str, Call] = {
            "gradient": lambda: torch.autograd.grad(case.value(), case.params),
            "eager": partial(operator(plain).matvec, v),
        }
        start = time.perf_counter()
        for mode in modes:
            objective = FunctionalObjective(loss, params, compile=True, mode=mode)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # those of the compiler
                product = partial(operator(objective.evaluate(curvature=True)).matvec, v)
                for _ in range(4):  # with graphs, the first calls only prepare them
                    product()
            calls[mode] = product
        first = time.perf_counter() - start
        timings = _measured(calls, options)
        cells = [
            seconds(timings[name].median) if name in timings else "-"
            for name in ("gradient", "eager", *MODES)
        ]
        table.add(kind, *cells, seconds(first) if modes else "-")
        recorded = {name: timing.as_dict() for name, timing in timings.items()}
        report.record(f"captured.product.{kind}.{case.name}", recorded | {"first calls": first})
    report.show(table)
