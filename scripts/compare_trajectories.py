"""Compares what two checkouts compute, bit for bit.

Each checkout runs, in a process of its own, the same table of optimizers, options and problems,
and the functions beside the optimizers. Losses, parameters and buffers after each step are compared
as bytes. In the middle of every run of an optimizer it is saved, and a new one on a new model goes
on from what was saved. An error is a result like any other: its class is compared.

With --state the states of the optimizers are compared too, as the sorted contents of all tensors in
`state_dict()` whatever their keys, and those fields of `optimizer.info` that both have.

Exit code 0 if all is equal, 1 if not.
"""

from __future__ import annotations

import argparse
import enum
import hashlib
import io
import math
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from _checkouts import PROBLEMS, Problem, check_source, checkout, run_child
from torch import Tensor, nn

Make = Callable[[Problem], Any]
Step = Callable[[Problem, Any, int], Any]
Record = dict[str, Any]

# Results of the runs: the label of a step, its tensors, the digests of its state, its report.


def digest(tensor: Tensor) -> str:
    """The SHA-256 of a tensor's bytes."""
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(plain.view(torch.uint8).numpy().tobytes()).hexdigest()


def tensors_in(item: Any) -> Iterator[Tensor]:
    """All tensors in nested containers."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, Mapping):
        for value in item.values():
            yield from tensors_in(value)
    elif isinstance(item, (list, tuple)):
        for value in item:
            yield from tensors_in(value)


def plain(value: Any) -> Any:
    """A value of a report as something that any process can load."""
    if isinstance(value, enum.Enum):
        return value.name
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Tensor):
        return digest(value)
    return value if isinstance(value, (int, float, str, type(None))) else type(value).__name__


def record(label: str, values: Mapping[str, Any], optimizer: Any = None) -> Record:
    """One step's results."""
    tensors = {
        name: value.detach().clone() if isinstance(value, Tensor) else torch.tensor(value)
        for name, value in values.items()
        if value is not None
    }
    result: Record = {"label": label, "values": tensors, "state": [], "info": {}}
    if optimizer is not None:
        saved = optimizer.state_dict()
        result["state"] = sorted(digest(t) for t in tensors_in(saved["state"]) if t.numel())
        info = getattr(optimizer, "info", None)
        result["info"] = plain(info) if is_dataclass(info) else {}
    return result


# Ways to make a step.


def with_closure(problem: Problem, optimizer: Any, step: int) -> Any:
    """A step with the standard closure."""
    return optimizer.step(problem.closure(optimizer))


def on_batches(problem: Problem, optimizer: Any, step: int) -> Any:
    """A step with the standard closure on a part of the data."""
    problem.rows = slice(step % 3 * 30, step % 3 * 30 + 40)
    return optimizer.step(problem.closure(optimizer))


def without_closure(problem: Problem, optimizer: Any, step: int) -> Any:
    """A step as a loop for Adam makes it."""
    problem.rows = slice(step % 3 * 30, step % 3 * 30 + 40)
    optimizer.zero_grad()
    loss = problem.loss()
    loss.backward()
    optimizer.step()
    return loss


def watched(problem: Problem, optimizer: Any, step: int) -> Any:
    """A step without a closure whose backward pass runs in `watching()`."""
    optimizer.zero_grad()
    with optimizer.watching():
        loss = problem.loss()
        loss.backward()
    optimizer.step()
    return loss


def in_micro_batches(problem: Problem, optimizer: Any, step: int) -> Any:
    """A step without a closure after two backward passes."""
    optimizer.zero_grad()
    total = 0.0
    for rows in (slice(0, 40), slice(40, 80)):
        problem.rows = rows
        loss = problem.loss() / 2
        loss.backward()
        total += loss.item()
    optimizer.step()
    return total


def accumulated(problem: Problem, optimizer: Any, step: int) -> Any:
    """A step whose closure is the last of two micro-batches."""
    optimizer.zero_grad()
    problem.rows = slice(0, 40)
    (problem.loss() / 2).backward()

    def closure() -> Tensor:
        problem.rows = slice(40, 80)
        loss = problem.loss() / 2
        loss.backward()
        return loss

    return optimizer.step(closure)


def closure_of_parts(problem: Problem, optimizer: Any, step: int) -> Any:
    """A step whose closure calls `backward()` twice."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros(())
        for rows in (slice(0, 40), slice(40, 80)):
            problem.rows = rows
            loss = problem.loss() / 2
            loss.backward()
            total = total + loss.detach()
        return total

    return optimizer.step(closure)


def without_backward(problem: Problem, optimizer: Any, step: int) -> Any:
    """A step whose closure only returns the loss."""
    return optimizer.step(problem.loss)


def not_finite_at_times(problem: Problem, optimizer: Any, step: int) -> Any:
    """A step with a closure whose loss is NaN in every third step."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss() * (float("nan") if step % 3 == 2 else 1.0)
        loss.backward()
        return loss

    return optimizer.step(closure)


def frozen_at_times(problem: Problem, optimizer: Any, step: int) -> Any:
    """A step with a first parameter that is frozen from the third to the fifth step."""
    problem.params[0].requires_grad_(step not in (2, 3, 4))
    return optimizer.step(problem.closure(optimizer))


def with_curvature_closure(problem: Problem, optimizer: Any, step: int) -> Any:
    """A step whose products come from a part of the data."""

    def part() -> Tensor:
        problem.rows = slice(0, 40)
        loss = problem.loss()
        loss.backward()
        problem.rows = slice(None)
        return loss

    return optimizer.step(problem.closure(optimizer), part)


def functional(problem: Problem, optimizer: Any, step: int) -> Any:
    """A step with a pure function."""
    import torch_secondorder as so

    return optimizer.step(so.FunctionalObjective(*pure(problem), compile=False))


def over_loader(problem: Problem, optimizer: Any, step: int, keep_graphs: int = 0) -> Any:
    """A step over a loader."""
    import torch_secondorder as so

    assert problem.inputs is not None and problem.targets is not None
    assert problem.criterion is not None
    data = torch.utils.data.TensorDataset(problem.inputs, problem.targets)
    loader = torch.utils.data.DataLoader(data, batch_size=64, shuffle=True)
    torch.manual_seed(step)
    closure = so.DatasetClosure(
        problem.network, problem.criterion, loader, keep_graphs=keep_graphs, progress=False
    )
    return optimizer.step(closure)


def over_loader_keeping(problem: Problem, optimizer: Any, step: int) -> Any:
    """A step over a loader, with graphs that are kept."""
    return over_loader(problem, optimizer, step, 2)


def pure(problem: Problem) -> tuple[Callable[[Any], Tensor], Any]:
    """The loss as a function of its parameters, and these."""
    model, inputs, targets = problem.model, problem.inputs, problem.targets
    assert model is not None and problem.criterion is not None and targets is not None
    criterion = problem.criterion

    def loss(params: Any) -> Tensor:
        return criterion(torch.func.functional_call(model, params, (inputs,)), targets)

    return loss, dict(model.named_parameters())


@dataclass(frozen=True)
class Run:
    """A row of the table of optimizers.

    Attributes:
        name: The optimizer and its options.
        problem: The name of the problem.
        make: Makes the optimizer.
        step: Makes a step.
        steps: How many.
        dtype: Of the parameters.
        resumes: Whether a new optimizer on a new model goes on in the middle.
    """

    name: str
    problem: str
    make: Make
    step: Step = with_closure
    steps: int = 12
    dtype: torch.dtype = torch.float32
    resumes: bool = True

    @property
    def title(self) -> str:
        """The name in tables."""
        kind = "" if self.dtype == torch.float32 else f", {str(self.dtype).removeprefix('torch.')}"
        return f"{self.name}, {self.problem}{kind}"

    def __call__(self) -> Iterator[Record]:
        """Runs it."""
        torch.manual_seed(0)
        problem = PROBLEMS[self.problem](self.dtype)
        optimizer = self.make(problem)
        for step in range(self.steps):
            if self.resumes and step == self.steps // 2:
                problem, optimizer = self._resumed(problem, optimizer)
            loss = self.step(problem, optimizer, step)
            parts = [torch.view_as_real(p) if p.is_complex() else p for p in problem.params]
            flat = torch.cat([part.detach().reshape(-1) for part in parts])
            values = {"loss": loss, "parameters": flat}
            if problem.model is not None:
                values |= dict(problem.model.named_buffers())
            yield record(f"step {step}", values, optimizer)

    def _resumed(self, problem: Problem, optimizer: Any) -> tuple[Problem, Any]:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        random = torch.get_rng_state()
        new = PROBLEMS[self.problem](self.dtype)
        if problem.model is not None:
            new.network.load_state_dict(problem.model.state_dict())
        with torch.no_grad():
            for ours, theirs in zip(new.params, problem.params, strict=True):
                ours.copy_(theirs)
        resumed = self.make(new)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        torch.set_rng_state(random)
        return new, resumed


@dataclass(frozen=True)
class Results:
    """A row of the table of functions: each gives named results.

    Attributes:
        title: The name in tables.
        compute: Gives names and results.
    """

    title: str
    compute: Callable[[], Iterator[tuple[str, Any]]]

    def __call__(self) -> Iterator[Record]:
        """Runs it."""
        torch.manual_seed(0)
        for label, value in self.compute():
            if is_dataclass(value) and not isinstance(value, type):
                value = {f.name: getattr(value, f.name) for f in fields(value)}
            items = value if isinstance(value, Mapping) else {"value": value}
            values: dict[str, Any] = {}
            for name, item in items.items():
                for place, tensor in enumerate(tensors_in(item)):
                    values[f"{name}.{place}"] = tensor
                if isinstance(item, (bool, int, float)):
                    values[name] = item
            yield record(label, values)


def grouped(problem: Problem) -> list[dict[str, Any]]:
    """Two groups that differ in learning rate and weight decay."""
    half = len(problem.params) // 2
    return [
        {"params": problem.params[:half], "lr": 0.05},
        {"params": problem.params[half:], "lr": 0.02, "weight_decay": 0.01},
    ]


def lbfgs_runs() -> Iterator[Run]:
    """L-BFGS."""
    import torch_secondorder as so

    def lbfgs(**options: Any) -> Make:
        return lambda problem: so.LBFGS(problem.params, **options)

    def groups(problem: Problem) -> Any:
        return so.LBFGS(grouped(problem), max_iter=3)

    wide = torch.float64
    yield Run("LBFGS", "rosenbrock", lbfgs(), dtype=wide)
    for problem in ("rosenbrock", "softmax", "cnn", "dropout"):
        yield Run("LBFGS max_iter=3", problem, lbfgs(max_iter=3))
    yield Run("LBFGS", "quadratic", lbfgs(), dtype=wide, steps=10)
    yield Run("LBFGS max_iter=1", "rosenbrock", lbfgs(max_iter=1), steps=40)
    yield Run("LBFGS max_iter=1", "quadratic", lbfgs(max_iter=1), dtype=wide, steps=30)
    yield Run("LBFGS", "mlp", lbfgs(), steps=6)
    yield Run("LBFGS max_iter=4", "batchnorm", lbfgs(max_iter=4))
    yield Run("LBFGS", "pinn", lbfgs(), dtype=wide, steps=8)
    for named in ("hager_zhang", "armijo"):
        for problem, dtype in (("rosenbrock", wide), ("mlp", torch.float32)):
            make = lbfgs(line_search_fn=named, max_iter=4)
            yield Run(f"LBFGS {named}", problem, make, dtype=dtype)
    fixed = lbfgs(line_search_fn=None, lr=0.1, max_iter=4)
    yield Run("LBFGS without a line search", "mlp", fixed)
    search = so.globalization.StrongWolfe(c2=0.1)
    yield Run("LBFGS StrongWolfe(c2=0.1)", "softmax", lbfgs(line_search_fn=search, max_iter=4))
    yield Run("LBFGS groups", "mlp", groups)
    yield Run("LBFGS groups", "quadratic", groups, dtype=wide)
    yield Run("LBFGS weight_decay", "softmax", lbfgs(weight_decay=0.01, max_iter=4))
    yield Run("LBFGS damping, history 3", "cnn", lbfgs(damping=True, history_size=3, max_iter=4))
    yield Run("LBFGS bfloat16", "mlp", lbfgs(max_iter=3), dtype=torch.bfloat16)
    yield Run("LBFGS functional", "mlp", lbfgs(max_iter=4), functional)
    yield Run("LBFGS over a loader", "softmax", lbfgs(max_iter=3), over_loader, steps=6)
    yield Run("LBFGS on batches", "mlp", lbfgs(max_iter=3), on_batches)
    for problem in ("barrier", "normalized", "attention"):
        yield Run("LBFGS max_iter=2", problem, lbfgs(max_iter=2))
    yield Run("LBFGS NaN", "mlp", lbfgs(max_iter=2), not_finite_at_times)
    yield Run("LBFGS frozen", "mlp", lbfgs(max_iter=2), frozen_at_times)
    yield Run("LBFGS no backward()", "softmax", lbfgs(max_iter=3), without_backward)


def newton_runs() -> Iterator[Run]:
    """Newton-CG."""
    import torch_secondorder as so

    def newton(**options: Any) -> Make:
        return lambda problem: so.NewtonCG(problem.params, **options)

    def groups(problem: Problem) -> Any:
        first, second = grouped(problem)
        return so.NewtonCG([{**first, "lr": 1.0}, {**second, "lr": 0.5}], max_cg_iter=8)

    wide = torch.float64
    yield Run("NewtonCG auto", "rosenbrock", newton(), dtype=wide)
    yield Run("NewtonCG auto", "quadratic", newton(), dtype=wide, steps=6)
    for problem in ("softmax", "mlp", "cnn", "batchnorm", "dropout", "autoencoder"):
        yield Run("NewtonCG auto", problem, newton(max_cg_iter=10), steps=8)
    yield Run("NewtonCG auto", "pinn", newton(max_cg_iter=20), dtype=wide, steps=8)
    hessian = newton(curvature="hessian", max_cg_iter=10)
    yield Run("NewtonCG hessian", "mlp", hessian)
    yield Run("NewtonCG hessian", "rosenbrock", newton(curvature="hessian"), steps=20)
    for globalization in ("damping", "line_search"):
        make = newton(curvature="hessian", globalization=globalization, max_cg_iter=10)
        yield Run(f"NewtonCG hessian {globalization}", "mlp", make, steps=8)
        make = newton(curvature="hessian", globalization=globalization)
        yield Run(f"NewtonCG hessian {globalization}", "rosenbrock", make, dtype=wide)
    for globalization in ("trust_region", "line_search"):
        make = newton(curvature="ggn", globalization=globalization, max_cg_iter=10)
        yield Run(f"NewtonCG ggn {globalization}", "mlp", make, steps=8)
    for curvature in ("fisher", "empirical_fisher"):
        make = newton(curvature=curvature, max_cg_iter=8)
        yield Run(f"NewtonCG {curvature}", "mlp", make, steps=8)
    differences = newton(curvature_products="finite_difference", max_cg_iter=8)
    yield Run("NewtonCG differences", "mlp", differences, dtype=wide, steps=8)
    yield Run("NewtonCG differences", "cnn", differences, steps=6)
    for preconditioner in ("kfac", "nystrom", "martens", None):
        make = newton(curvature="ggn", preconditioner=preconditioner, max_cg_iter=6)
        yield Run(f"NewtonCG {preconditioner}", "mlp", make, steps=8)
    make = newton(preconditioner="kfac", max_cg_iter=5)
    yield Run("NewtonCG kfac", "cnn", make, on_batches, steps=8)
    make = newton(preconditioner="nystrom", max_cg_iter=20)
    yield Run("NewtonCG nystrom", "pinn", make, dtype=wide, steps=8)
    for curvature in ("ggn", "hessian"):
        minres = {"solver": "minres", "globalization": "damping", "max_cg_iter": 10}
        make = newton(curvature=curvature, **minres)
        yield Run(f"NewtonCG minres {curvature}", "mlp", make, steps=8)
    yield Run("NewtonCG max_iter=3", "softmax", newton(max_iter=3, max_cg_iter=10), steps=6)
    yield Run("NewtonCG weight_decay", "softmax", newton(weight_decay=0.01, max_cg_iter=8))
    yield Run("NewtonCG groups", "mlp", groups, steps=8)
    yield Run("NewtonCG functional", "mlp", newton(max_cg_iter=8), functional, steps=8)
    loader = newton(preconditioner="kfac", max_cg_iter=5)
    yield Run("NewtonCG over a loader", "mlp", loader, over_loader, steps=6)
    yield Run("NewtonCG over a loader, graphs kept", "mlp", loader, over_loader_keeping, steps=6)
    two = newton(max_cg_iter=8)
    yield Run("NewtonCG two closures", "mlp", two, with_curvature_closure, steps=8)
    yield Run("NewtonCG two backward()", "mlp", two, closure_of_parts, steps=8)
    for problem in ("barrier", "normalized", "attention"):
        yield Run("NewtonCG auto", problem, newton(max_cg_iter=6), steps=6)
    yield Run("NewtonCG NaN", "mlp", two, not_finite_at_times, steps=8)
    yield Run("NewtonCG frozen", "mlp", two, frozen_at_times)
    yield Run("NewtonCG bfloat16", "mlp", two, steps=6, dtype=torch.bfloat16)


def diagonal_runs() -> Iterator[Run]:
    """AdaHessian and Sophia."""
    import torch_secondorder as so

    kinds: dict[str, tuple[Any, float]] = {"AdaHessian": (so.AdaHessian, 0.03)}
    kinds["Sophia"] = (so.Sophia, 2e-3)
    narrow = torch.bfloat16
    for name, (kind, lr) in kinds.items():

        def make(kind: Any = kind, lr: float = lr, **options: Any) -> Make:
            return lambda given: kind(given.params, **{"lr": lr, **options})

        def groups(problem: Problem, kind: Any = kind) -> Any:
            return kind(grouped(problem), update_period=2)

        every, often = make(update_period=1), make(update_period=10)
        yield Run(f"{name} every step", "mlp", every, on_batches, steps=15)
        yield Run(f"{name} every ten", "cnn", often, on_batches, steps=24)
        yield Run(f"{name} every step", "cnn", every, steps=8)
        yield Run(f"{name} every step", "rosenbrock", every, steps=15)
        yield Run(f"{name} every step", "quadratic", every, dtype=torch.float64, steps=15)
        yield Run(f"{name} every ten", "pinn", often, steps=24)
        gnb = make(estimator="gnb", update_period=1)
        yield Run(f"{name} gnb every step", "mlp", gnb, on_batches, steps=12)
        gnb = make(estimator="gnb", update_period=10)
        yield Run(f"{name} gnb every ten", "autoencoder", gnb, steps=24)
        yield Run(f"{name} groups", "mlp", groups)
        yield Run(f"{name} without a closure", "mlp", often, without_closure, steps=24)
        yield Run(f"{name} gnb without a closure", "mlp", gnb, without_closure, steps=12)
        yield Run(f"{name} watched", "batchnorm", make(update_period=2, watch=False), watched)
        yield Run(f"{name} micro-batches", "mlp", make(update_period=2), in_micro_batches)
        two = make(update_period=2, accumulation_steps=2)
        yield Run(f"{name} accumulation_steps=2", "mlp", two, accumulated)
        yield Run(f"{name} bfloat16", "mlp", make(update_period=2), dtype=narrow)
        yield Run(f"{name} weight_decay", "dropout", make(weight_decay=0.1, update_period=2))
        yield Run(f"{name} capturable", "mlp", make(capturable=True, update_period=2))
        for problem in ("barrier", "normalized", "attention"):
            yield Run(f"{name} every two", problem, make(update_period=2))
        yield Run(f"{name} NaN", "mlp", make(update_period=2), not_finite_at_times)
        yield Run(f"{name} frozen", "mlp", make(update_period=2), frozen_at_times)
        yield Run(f"{name} functional", "mlp", make(update_period=2), functional)
    blocks: dict[str, Any] = {"n_samples": 3, "average_block": 4, "hessian_power": 0.5, "lr": 0.03}
    yield Run("AdaHessian options", "mlp", lambda p: so.AdaHessian(p.params, **blocks))


def contractive_runs() -> Iterator[Run]:
    """The wrapper around several optimizers."""
    import torch_secondorder as so

    def around(inner: Callable[[Any], Any], **options: Any) -> Make:
        def make(problem: Problem) -> Any:
            encoder = next(problem.network.children())
            return so.Contractive(inner(problem.params), encoder, weight=0.1, **options)

        return make

    adam = around(lambda params: torch.optim.Adam(params, lr=0.01))
    yield Run("Contractive Adam", "autoencoder", adam)
    yield Run("Contractive Adam without a closure", "autoencoder", adam, without_closure)
    noisy = around(
        lambda params: torch.optim.SGD(params, lr=0.1), method="projection", noise=0.1, n_noise=2
    )
    yield Run("Contractive SGD, noise", "autoencoder", noisy)
    lbfgs = around(lambda params: so.LBFGS(params, max_iter=3))
    yield Run("Contractive LBFGS", "autoencoder", lbfgs, steps=8)
    newton = around(lambda params: so.NewtonCG(params, max_cg_iter=8))
    yield Run("Contractive NewtonCG", "autoencoder", newton, steps=6)
    ada = around(lambda params: so.AdaHessian(params, lr=0.03, update_period=2))
    yield Run("Contractive AdaHessian", "autoencoder", ada)
    yield Run("Contractive AdaHessian loop", "autoencoder", ada, without_closure)
    sophia = around(lambda params: so.Sophia(params, lr=2e-3))
    yield Run("Contractive Sophia", "autoencoder", sophia)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def diagnostics_results() -> Iterator[tuple[str, Any]]:
    """The diagnostics of a network."""
    from torch_secondorder import diagnostics as d

    problem = PROBLEMS["mlp"](torch.float64)
    assert problem.criterion is not None
    batch = (problem.inputs, problem.targets)
    curvatures: tuple[Any, ...] = ("hessian", "gauss_newton")
    for curvature in curvatures:
        source = d.from_model(problem.network, problem.criterion, batch, curvature=curvature)
        for which in ("largest", "smallest"):
            found = d.eigenpairs(
                source, 3, which, max_products=150, generator=_generator(), progress=False
            )
            yield f"eigenpairs {curvature} {which}", found
        yield f"trace {curvature}", d.trace(source, 30, generator=_generator(), progress=False)
        density = d.spectral_density(source, 2, 20, generator=_generator(), progress=False)
        yield f"spectral_density {curvature}", density
        answer = d.definiteness(source, max_products=60, generator=_generator(), progress=False)
        yield f"definiteness {curvature}", answer
    closure = d.from_closure(problem.loss, problem.params)
    yield "second_order_model", d.second_order_model(closure)
    small = PROBLEMS["softmax"](torch.float64)
    penalized = d.from_closure(
        lambda: small.loss() + 0.01 * sum(p.square().sum() for p in small.params), small.params
    )
    yield "observed_information", d.observed_information(penalized, progress=False)


def func_results() -> Iterator[tuple[str, Any]]:
    """Derivatives of pure functions."""
    from torch_secondorder import func

    problem = PROBLEMS["mlp"](torch.float32)
    loss, params = pure(problem)
    params = {name: p.detach() for name, p in params.items()}
    model, inputs = problem.network, problem.inputs
    assert inputs is not None and problem.criterion is not None and problem.targets is not None
    criterion, targets = problem.criterion, problem.targets
    v = {name: torch.randn(p.shape, generator=_generator()) for name, p in params.items()}
    yield "hvp", func.hvp(loss, params, v)
    yield "vhp", func.vhp(loss, params, v)

    def outputs(p: Any) -> Any:
        return torch.func.functional_call(model, p, (inputs,))

    yield "ggnvp", func.ggnvp(outputs, lambda z: criterion(z, targets), params, v)
    x = inputs[0]
    modes: tuple[Any, ...] = ("auto", "forward", "reverse")
    for mode in modes:
        yield f"jacobian {mode}", func.jacobian(model, x, mode)
        yield f"batch_jacobian {mode}", func.batch_jacobian(model, inputs[:32], mode)
    yield (
        "jacobian of parameters",
        func.jacobian(lambda p: torch.func.functional_call(model, p, (x,)), params),
    )
    yield "module_jacobian", func.module_jacobian(model, inputs[:8])
    yield "module_jacobian of parameters", func.module_jacobian(model, inputs[:8], "parameters")
    start = torch.linspace(-1, 1, 30, dtype=torch.float64)

    def rosenbrock(x: Tensor) -> Tensor:
        return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()

    yield "hessian_diagonal", func.hessian_diagonal(rosenbrock, start)
    yield "hessian_diagonal, chunks", func.hessian_diagonal(rosenbrock, start, chunk_size=7)
    report = func.check_derivatives(rosenbrock, start)
    yield "check_derivatives", {"passed": report.passed, "error": report.hessian.error}


def penalty_results() -> Iterator[tuple[str, Any]]:
    """Penalties and their gradients."""
    from torch_secondorder import penalties

    inputs = PROBLEMS["mlp"](torch.float32).inputs
    assert inputs is not None
    x = inputs[:50]
    torch.manual_seed(1)
    encoders = {
        "one layer": nn.Sequential(nn.Linear(64, 12), nn.Sigmoid()),
        "two layers": nn.Sequential(nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 8), nn.ReLU()),
        "convolution": nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten()
        ),
    }
    methods: tuple[Any, ...] = ("auto", "exact", "projection")
    for name, encoder in encoders.items():
        for method in methods:
            for noise in (None, 0.1):
                value = penalties.contractive_penalty(
                    encoder, x, method, noise=noise, n_noise=2, generator=_generator()
                )
                gradient = torch.autograd.grad(value, list(encoder.parameters()), allow_unused=True)
                label = f"contractive_penalty {name} {method} {noise}"
                yield label, {"value": value, "gradient": gradient}
        for method in methods[1:]:
            value = penalties.jacobian_penalty(encoder, x, method, generator=_generator())
            gradient = torch.autograd.grad(value, list(encoder.parameters()), allow_unused=True)
            yield f"jacobian_penalty {name} {method}", {"value": value, "gradient": gradient}


def operator_results() -> Iterator[tuple[str, Any]]:
    """Linear operators, estimates of their diagonals, and solvers over them."""
    import torch_secondorder as so
    from torch_secondorder import curvature as c
    from torch_secondorder import solvers as s

    for name in ("mlp", "cnn"):
        objective = so.FunctionalObjective(*pure(PROBLEMS[name](torch.float32)))
        evaluation = objective.evaluate(curvature=True)
        V = torch.randn(len(evaluation.grad), 3, generator=_generator())
        operators: dict[str, Any] = {
            "Hessian": c.Hessian(evaluation),
            "GaussNewton": c.GaussNewton(evaluation),
            "Fisher": c.Fisher(evaluation, generator=_generator()),
            "Fisher, two samples": c.Fisher(evaluation, n_samples=2, generator=_generator()),
            "empirical Fisher": c.Fisher(evaluation, labels="empirical"),
            "FiniteDifference": c.FiniteDifference(objective),
        }
        for title, operator in operators.items():
            yield f"{title} {name}", operator.matvec(V[:, 0])
            yield f"{title} {name}, three at once", operator @ V
        hessian, ggn = operators["Hessian"], operators["GaussNewton"]
        yield f"Hutchinson {name}", c.Hutchinson(2)(hessian, _generator())
        yield f"Bartlett {name}", c.GaussNewtonBartlett()(evaluation, _generator())
        if name == "mlp":
            yield "diagonal", ggn.diagonal(2, _generator())
            yield "exact_diagonal", c.exact_diagonal(ggn)
        damped, b = c.Damped(ggn, 0.1), -evaluation.grad
        solvers: dict[str, Any] = {"CG": s.CG(20), "Minres": s.Minres(20)}
        for title, solver in solvers.items():
            result = solver(damped, b)
            yield f"{title} {name}", {"x": result.x, "decrease": result.decrease}
        found = s.lanczos(hessian, V[:, 0], 12)
        yield f"lanczos {name}", found
    inverse = c.InverseBFGS(30, 5)
    generator = _generator()
    for place in range(9):
        step = torch.randn(30, generator=generator)
        inverse.push(step, step * torch.linspace(1, 9, 30) + 0.1 * step.roll(1))
        gradient = torch.randn(30, generator=generator)
        yield f"InverseBFGS {place}", inverse.direction(gradient)


def rule_results() -> Iterator[tuple[str, Any]]:
    """Line searches on functions of one number, damping and trust radii."""
    from torch_secondorder import globalization as g

    functions: dict[str, Callable[[float], tuple[float, float]]] = {
        "parabola": lambda t: ((t - 3.7) ** 2, 2 * (t - 3.7)),
        "wave": lambda t: (math.cos(3 * t) - t, -3 * math.sin(3 * t) - 1),
        "wall": lambda t: (
            (-math.log(1 - t) - 3 * t, 1 / (1 - t) - 3) if t < 1 else (math.inf, math.nan)
        ),
    }
    for search in (g.StrongWolfe(), g.HagerZhang(), g.Armijo(), g.FixedStep()):
        for name, f in functions.items():
            for first in (0.01, 0.5, 20.0):
                asked: list[float] = []

                def phi(t: float, f: Any = f, asked: list[float] = asked) -> Any:
                    asked.append(t)
                    return g.Trial(t, *f(t))

                result = search(phi, g.Trial(0.0, *f(0.0)), first, precision=1e-16)
                asked.append(result.trial.t)
                label = f"{type(search).__name__} {name} {first}"
                yield label, {"trials": torch.tensor(asked, dtype=torch.float64)}


def everything() -> list[Run | Results]:
    """The whole table."""
    return [
        *lbfgs_runs(),
        *newton_runs(),
        *diagonal_runs(),
        *contractive_runs(),
        Results("diagnostics", diagnostics_results),
        Results("func", func_results),
        Results("penalties", penalty_results),
        Results("curvature and solvers", operator_results),
        Results("globalization", rule_results),
    ]


def record_all(file: Path, only: str | None, verbose: bool) -> None:
    """Runs the table against the package that this process imports."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    warnings.simplefilter("ignore")
    results: dict[str, list[Record]] = {}
    for run in everything():
        if only is not None and only.lower() not in run.title.lower():
            continue
        assert run.title not in results, run.title
        records = results[run.title] = []
        start = time.perf_counter()
        try:
            records.extend(run())  # what came before an error is kept
        except Exception as error:
            records.append(record("error: " + type(error).__name__, {}))
            print(f"{run.title}: {type(error).__name__}: {error}", file=sys.stderr)
            if verbose:
                traceback.print_exc()
        if verbose:
            print(f"{time.perf_counter() - start:7.2f} s  {run.title}", file=sys.stderr)
    torch.save(results, file)


@dataclass
class Verdict:
    """The differences found.

    Attributes:
        runs: How many runs both have.
        steps: How many steps these have.
        values: Lines about losses, parameters and results.
        state: Lines about states and reports.
    """

    runs: int = 0
    steps: int = 0
    values: list[str] = field(default_factory=list)
    state: list[str] = field(default_factory=list)


def _same(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype) and digest(a) == digest(b)


def _difference(a: Tensor | None, b: Tensor | None) -> str:
    if a is None or b is None:
        return f"only in {'the new' if a is None else 'the old'}"
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return f"{tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}"
    if not a.numel():
        return "empty"
    gaps = (a.double() - b.double()).abs()
    largest = gaps.nan_to_num(nan=math.inf).max().item()
    return f"max abs difference {largest:.2e} in {int((gaps != 0).sum())} of {gaps.numel()}"


def _values_differ(a: Record, b: Record) -> str | None:
    """The first difference of two steps, in words."""
    if a["label"] != b["label"]:
        return f"{a['label']} and {b['label']}"
    ours, theirs = a["values"], b["values"]
    names = list(dict.fromkeys([*ours, *theirs]))
    for name in names:
        if name in ours and name in theirs and _same(ours[name], theirs[name]):
            continue
        found = [f"{name}: {_difference(ours.get(name), theirs.get(name))}"]
        if name == "loss" and "parameters" in ours and "parameters" in theirs:
            found.append("parameters: " + _difference(ours["parameters"], theirs["parameters"]))
        return f"{a['label']}, " + "; ".join(found)
    return None


def _state_differs(a: Record, b: Record) -> str | None:
    if a["state"] != b["state"]:
        lost, new = set(a["state"]) - set(b["state"]), set(b["state"]) - set(a["state"])
        counts = f"{len(a['state'])} and {len(b['state'])} tensors"
        return f"{a['label']}, state: {counts}, {len(lost)} lost, {len(new)} new"
    for name in a["info"].keys() & b["info"].keys():
        ours, theirs = a["info"][name], b["info"][name]
        if repr(ours) != repr(theirs):  # NaN is equal to itself there
            return f"{a['label']}, info.{name}: {ours!r} and {theirs!r}"
    return None


def compare(old: dict[str, list[Record]], new: dict[str, list[Record]]) -> Verdict:
    """Compares two recordings."""
    verdict = Verdict()
    for title in dict.fromkeys([*old, *new]):
        if title not in old or title not in new:
            where = "the new" if title not in old else "the old"
            verdict.values.append(f"{title}: only in {where}")
            continue
        verdict.runs += 1
        ours, theirs = old[title], new[title]
        verdict.steps += max(len(ours), len(theirs))
        pairs = list(zip(ours, theirs, strict=False))
        found = next(filter(None, (_values_differ(a, b) for a, b in pairs)), None)
        if found is None and len(ours) != len(theirs):
            found = f"{len(ours)} and {len(theirs)} steps"
        if found is not None:
            verdict.values.append(f"{title}: {found}")
        found = next(filter(None, (_state_differs(a, b) for a, b in pairs)), None)
        if found is not None:
            verdict.state.append(f"{title}: {found}")
    return verdict


def report(verdict: Verdict, state: bool) -> int:
    """Prints what was found; the exit code."""
    for line in verdict.values:
        print(f"differs: {line}")
    if state:
        for line in verdict.state:
            print(f"state differs: {line}")
    counts = f"{verdict.runs} runs, {verdict.steps} steps"
    if verdict.values or (state and verdict.state):
        more = f", of {len(verdict.state)} the state" if state else ""
        print(f"{counts}: {len(verdict.values)} runs differ{more}")
        return 1
    print(f"{counts}: equal bit for bit" + (", states too" if state else ""))
    if not state and verdict.state:
        print(f"(states or reports of {len(verdict.state)} runs differ: see --state)")
    return 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    assert __doc__ is not None
    first, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sources",
        nargs="*",
        metavar="OLD NEW",
        help="roots of checkouts, or files of recordings; one checkout with --record",
    )
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="only run one checkout, and write a recording"
    )
    parser.add_argument("--only", metavar="TEXT", help="only runs with this text in their names")
    parser.add_argument("--state", action="store_true", help="also compare states and reports")
    parser.add_argument("--verbose", action="store_true", help="times of the runs, and tracebacks")
    parser.add_argument("--child", type=checkout, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child is None:
        expected = 1 if given.record else 2
        if len(given.sources) != expected:
            parser.error("give two checkouts, or one with --record FILE")
        try:
            given.sources = [
                Path(s).resolve() if Path(s).is_file() else checkout(s) for s in given.sources
            ]
        except argparse.ArgumentTypeError as error:
            parser.error(str(error))
    return given


def _wanted(title: str, given: argparse.Namespace) -> bool:
    return given.only is None or given.only.lower() in title.lower()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs checkouts in processes of their own, and compares them."""
    given = parse(arguments)
    if given.child is not None:
        check_source(given.child)
        record_all(given.record, given.only, given.verbose)
        return 0
    passed = ["--only", given.only] if given.only else []
    passed += ["--verbose"] if given.verbose else []

    def recorded(source: Path, file: Path) -> None:
        arguments = ["--child", str(source), "--record", str(file), *passed]
        run_child(__file__, source, arguments)

    if given.record:
        recorded(given.sources[0], given.record)
        return 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        files = [
            source if source.is_file() else Path(folder, f"{place}.pt")
            for place, source in enumerate(given.sources)
        ]
        jobs = [
            pool.submit(recorded, source, file)
            for source, file in zip(given.sources, files, strict=True)
            if not source.is_file()
        ]
        for job in jobs:
            job.result()
        old, new = (
            {title: records for title, records in torch.load(file).items() if _wanted(title, given)}
            for file in files
        )
    verdict = compare(old, new)
    return report(verdict, given.state)


if __name__ == "__main__":
    sys.exit(main())
