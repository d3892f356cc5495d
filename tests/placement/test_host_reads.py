"""The number of times an optimizer waits for the device, on a simulated one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.support.placement import CUDA, DOUBLE, Problem, draw
from tests.support.simulated_device import Event, SimulatedDevice
from torch_secondorder import (
    BFGS,
    KFAC,
    LBFGS,
    SOAP,
    AdaHessian,
    AdaSecant,
    LevenbergMarquardt,
    Newton,
    NewtonCG,
    NonlinearCG,
    Shampoo,
    Sophia,
)
from torch_secondorder.curvature import Diagonal, InverseBFGS, LinearOperator
from torch_secondorder.solvers import CG, MINRES, lanczos


class Reads(NamedTuple):
    """Waits of an optimizer.

    Attributes:
        step: Of a step, however many iterations it has.
        trial: For each evaluation after the first, by the line search or what else judges it.
        solver: For each iteration of the solver of linear systems.
        iteration: Of an iteration, besides those.
    """

    step: int
    iteration: int
    trial: int = 1
    solver: int = 0


#: The most that each one waits. A number that grows is a fault; lower it where you save one.
FLAT: dict[str, tuple[Any, dict[str, Any], Reads]] = {
    "LBFGS": (LBFGS, {}, Reads(step=1, iteration=1)),
    "LBFGS, one pair": (LBFGS, {"history_size": 1}, Reads(step=1, iteration=1)),
    "LBFGS, decay": (LBFGS, {"weight_decay": 0.1}, Reads(step=1, iteration=1)),
    "LBFGS, damping": (LBFGS, {"powell_damping": True}, Reads(step=1, iteration=1)),
    "LBFGS, Armijo": (LBFGS, {"line_search_fn": "armijo"}, Reads(step=1, iteration=1)),
    "LBFGS, no search": (LBFGS, {"line_search_fn": None, "lr": 0.5}, Reads(step=1, iteration=1)),
    # Coordinates in the basis come to the host, where the small matrix is. A pair outside of the
    # basis, as after a step that has ended early, takes one more for each vector.
    "LBFGS, ssbroyden": (LBFGS, {"update": "ssbroyden", "max_iter": 3}, Reads(1, iteration=2)),
    # Three for each face of the box that is tried, and more faces than one.
    "LBFGS, bounds": (LBFGS, {"bounds": (-0.3, 0.3)}, Reads(step=3, iteration=12)),
    "BFGS": (BFGS, {}, Reads(step=1, iteration=2)),
    "BFGS, ssbroyden": (BFGS, {"update": "ssbroyden"}, Reads(step=1, iteration=2)),
    "NonlinearCG": (NonlinearCG, {}, Reads(step=2, iteration=2)),
    "NonlinearCG, beta": (NonlinearCG, {"beta": "polak_ribiere"}, Reads(step=1, iteration=2)),
    "NewtonCG": (NewtonCG, {}, Reads(step=2, iteration=4, trial=3, solver=1)),
    "NewtonCG, Hessian": (
        NewtonCG,
        {"curvature": "hessian"},
        Reads(step=2, iteration=4, trial=3, solver=1),
    ),
    "NewtonCG, line search": (
        NewtonCG,
        {"globalization": "line_search"},
        Reads(step=2, iteration=4, trial=3, solver=1),
    ),
    "Newton": (Newton, {}, Reads(step=2, iteration=8, trial=2, solver=53)),
    "LevenbergMarquardt": (LevenbergMarquardt, {}, Reads(step=2, iteration=7, trial=2)),
    "AdaSecant": (AdaSecant, {}, Reads(step=1, iteration=5)),
}
# The functions that wait, by what they do.
TRIALS = (
    "_optim.flat:__call__",
    "_optim.bounded_line:__call__",
    "_optim.quadratic_model:trial",
    "_optim.quadratic_model:propose",
)
SOLVERS = ("solvers.cg:iterate", "solvers.lanczos:", "solvers.dense:")


def kind_of(event: Event) -> str:
    """The field of `Reads` that counts an event."""
    if event.within(*TRIALS):
        return "trial"
    if event.within(*SOLVERS):
        return "solver"
    return "iteration" if event.within("_optim.flat:run") else "step"


@pytest.mark.parametrize("name", FLAT)
def test_optimizers_that_evaluate_more_than_once(name: str) -> None:
    kind, options, most = FLAT[name]
    if kind is not AdaSecant:
        options = {"max_iter": 2, **options}
    with SimulatedDevice() as device:
        problem = Problem(CUDA)
        optimizer = kind(problem.params, **options)
        optimizer.step(problem.closure())  # finds out what later ones know
        for _ in range(2):
            device.take()
            optimizer.step(problem.closure())
            events, info = device.take(), optimizer.info
            found = Counter(map(kind_of, events))
            report = "\n".join(map(str, events))
            assert found["step"] <= most.step, report
            assert found["iteration"] <= most.iteration * info.iterations, report
            assert found["trial"] <= most.trial * (info.evaluations - 1), report
            # Of one that ends at negative curvature, its size is read as well.
            systems = info.as_dict().get("solver_iterations", 0) + info.iterations
            assert found["solver"] <= most.solver * systems, report


def test_a_search_waits_once_for_each_trial() -> None:
    """The numbers of the table are right for L-BFGS, not bounds only."""
    with SimulatedDevice() as device:
        problem = Problem(CUDA)
        optimizer = LBFGS(problem.params, max_iter=5)
        device.uploads.clear()
        for _ in range(3):
            device.take()
            optimizer.step(problem.closure())
            info = optimizer.info
            # The start, a direction for each iteration, and the trials.
            assert len(device.take()) == 1 + info.iterations + (info.evaluations - 1)
        assert not device.uploads


# Optimizers that evaluate once.

ONCE: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdaHessian": (AdaHessian, {}),
    "AdaHessian, seldom": (AdaHessian, {"update_period": 3, "weight_decay": 0.1}),
    "AdaHessian, labels": (AdaHessian, {"estimator": "gnb", "weight_decay": 0.1}),
    "Sophia": (Sophia, {"weight_decay": 0.1}),
    "Sophia, seldom": (Sophia, {"update_period": 3, "estimator": "hutchinson"}),
    "Sophia, gamma": (Sophia, {"gamma": 1.0}),
    "SOAP": (SOAP, {"weight_decay": 0.1}),
    "SOAP, seldom": (SOAP, {"update_period": 3, "block_size": 3, "weight_decay": 0.1}),
    "SOAP, maximize": (SOAP, {"maximize": True}),
    "Shampoo, Newton": (Shampoo, {"root_method": "newton", "update_period": 2}),
    "Shampoo, cut": (Shampoo, {"root_method": "newton", "block_size": 3, "weight_decay": 0.1}),
    "KFAC": (KFAC, {"update_period": 2, "weight_decay": 0.1}),
}
STEADY = 3  # from this step on nothing has to be found out


def steps(
    kind: Any,
    options: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    *,
    with_closure: bool = True,
    clip: bool = False,
) -> tuple[list[list[Event]], list[list[Event]]]:
    """The reads and the uploads of each of six steps."""
    reads, uploads = [], []
    with SimulatedDevice() as device:
        problem = Problem(CUDA, dtype)
        optimizer = kind(problem.params, **options)
        closure = problem.closure()
        for _ in range(6):
            if not with_closure:
                closure()
            if clip:
                nn.utils.clip_grad_norm_(problem.params, 1.0)
            device.take()
            device.uploads.clear()
            optimizer.step(closure if with_closure else None)
            reads.append(device.take())
            uploads.append(list(device.uploads))
        assert optimizer.info.status.name == "MOVED"
    return reads, uploads


# In a loop without a closure, with gradients clipped and parameters in half precision, too.
RUNS = [(name, torch.float32, True) for name in ONCE]
RUNS += [(name, torch.bfloat16, False) for name in ("AdaHessian", "SOAP", "KFAC")]
RUNS += [(name, torch.bfloat16, False) for name in ("AdaHessian, labels", "Sophia, seldom")]
RUNS += [(name, torch.float32, False) for name in ("Sophia", "SOAP, seldom", "Shampoo, Newton")]


@pytest.mark.parametrize(("name", "dtype", "with_closure"), RUNS)
def test_steady_steps_never_wait(name: str, dtype: torch.dtype, with_closure: bool) -> None:
    kind, options = ONCE[name]
    clip = not with_closure
    reads, uploads = steps(kind, options, dtype, with_closure=with_closure, clip=clip)
    late = [str(event) for events in (*reads[STEADY:], *uploads[STEADY:]) for event in events]
    assert not late
    assert sum(map(len, reads[:STEADY])) <= 16


def test_eigendecompositions_of_shampoo_check_themselves() -> None:
    """`torch.linalg.eigh` waits to see whether it has converged; nothing else does."""
    reads, uploads = steps(Shampoo, {"update_period": 3, "weight_decay": 0.1})
    late = [event.name for events in reads[STEADY:] for event in events]
    # A call for each size of the factors on each side, in one of these steps.
    assert late == ["aten::_linalg_eigh"] * 4
    assert not any(uploads[STEADY:])


# Solvers and histories.


class Dense(LinearOperator):
    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.size = matrix, len(matrix)
        self.dtype, self.device = matrix.dtype, matrix.device

    def matvec(self, v: Tensor) -> Tensor:
        return self.matrix @ v


def system(size: int = 12) -> tuple[Dense, Tensor]:
    A = draw(size, size)
    return Dense((A @ A.T + torch.eye(size, dtype=DOUBLE)).to(CUDA)), draw(size, device=CUDA)


SOLVES: dict[str, tuple[Callable[[Any, Tensor], int], int]] = {
    # What runs, giving the number of iterations, and the waits at its start and end.
    "CG": (lambda A, b: CG()(A, b).iterations, 2),
    "CG, preconditioner": (
        lambda A, b: CG()(A, b, preconditioner=Diagonal(b.abs() + 1)).iterations,
        2,
    ),
    "CG, true residuals": (lambda A, b: CG(recompute=2)(A, b).iterations, 2),
    "CG, start": (lambda A, b: CG(keep_iterates=True)(A, b, x0=0.1 * b).iterations, 2),
    "CG, radius": (lambda A, b: CG()(A, b, radius=0.1).iterations, 2),
    "MINRES": (lambda A, b: MINRES()(A, b).iterations, 2),
    "lanczos": (lambda A, b: len(lanczos(A, b, 8).diagonal), 1),
}


@pytest.mark.parametrize("name", SOLVES)
def test_solvers_wait_once_an_iteration(name: str) -> None:
    run, ends = SOLVES[name]
    with SimulatedDevice() as device:
        A, b = system()
        device.take()
        iterations = run(A, b)
        assert iterations and len(device.take()) <= iterations + ends


def test_an_lbfgs_direction_never_waits() -> None:
    with SimulatedDevice() as device:
        H, g = InverseBFGS(12, 3, DOUBLE, CUDA), draw(12, device=CUDA)
        pairs = [draw(12, device=CUDA, seed=k) for k in range(5)]
        device.take()
        device.uploads.clear()
        for s in pairs:
            H.push(s, 2 * s, 0.5)
            H.direction(g)
            H.matmat(torch.stack((g, -g), 1))
        assert not device.reads and not device.uploads


def test_waits_are_seen() -> None:
    """A number that is read in a direction would count."""

    class Reading(LBFGS):
        def _direction(self, descent: Any) -> Tensor | None:
            math.sqrt(float(descent.point.grad.square().sum()))
            return super()._direction(descent)

    with SimulatedDevice() as device:
        problem = Problem(CUDA)
        device.take()
        optimizer = Reading(problem.params, max_iter=3)
        optimizer.step(problem.closure())
        found = Counter(map(kind_of, device.take()))
        assert found["iteration"] == 2 * optimizer.info.iterations
