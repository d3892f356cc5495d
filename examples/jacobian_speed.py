"""Compares methods for the Jacobian of a small classifier, from finite differences to a formula.

All compute the same `(10, 500)` matrix of a 500-100(relu)-10(softmax) network, in float64, and are
checked against finite differences in random columns. Then SciPy searches for the nearest input that
the network assigns to another class, once with its own finite differences and once with each of the
exact Jacobians.

    python examples/jacobian_speed.py
    python examples/jacobian_speed.py --widths 200,50,10 --repeat 20
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import Tensor, nn

import torch_secondorder.func
from _command_line import positive
from _report import format_table

Array = np.ndarray[Any, np.dtype[np.float64]]
Jacobian = Callable[[Array], Array]

DTYPE = torch.float64
STEP = float(np.finfo(np.float64).eps) ** (1 / 3)  # balances truncation and rounding errors
COLUMNS = 20  # checked against finite differences
WORST = 1e-6  # the largest relative error allowed
NEAR = 0.01  # weight of the distance from the given input, relative to the probabilities
OURS, FORMULA = "torch_secondorder.func.jacobian", "NumPy, written by hand"
DIFFERENCES = "finite differences"


@dataclass(frozen=True)
class Network:
    """A classifier, as a module and as arrays.

    Attributes:
        function: Maps `(inputs,)` to probabilities `(outputs,)`; its parameters are constants.
        weights: `W1, b1, W2, b2`.
    """

    function: nn.Module
    weights: tuple[Array, ...]

    @classmethod
    def make(cls, widths: tuple[int, int, int], seed: int) -> Network:
        """A random network, the same for the same seed."""
        torch.manual_seed(seed)
        inputs, hidden, outputs = widths
        net = nn.Sequential(
            nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs), nn.Softmax(-1)
        )
        net.to(DTYPE).requires_grad_(False)
        return cls(net, tuple(p.numpy() for p in net.parameters()))

    def __call__(self, x: Array) -> Array:
        """The probabilities, computed by PyTorch."""
        found: Array = self.function(torch.from_numpy(x)).numpy()
        return found

    def formula(self, x: Array) -> Array:
        """The Jacobian, derived by hand: `(diag p - p p') W2 diag(a > 0) W1`."""
        w1, b1, w2, b2 = self.weights
        a = w1 @ x + b1
        z = w2 @ np.maximum(a, 0) + b2
        p = np.exp(z - z.max())
        p /= p.sum()
        inner = (w2 * (a > 0)) @ w1
        found: Array = p[:, None] * (inner - p @ inner)
        return found


def differences(f: Callable[[Array], Array], x: Array, columns: Any = None) -> Array:
    """Columns of the Jacobian by central differences; by default all."""
    made = []
    for i in range(len(x)) if columns is None else columns:
        step = np.zeros_like(x)
        step[i] = STEP * max(1.0, abs(x[i]))
        made.append((f(x + step) - f(x - step)) / (2 * step[i]))
    return np.stack(made, axis=1)


def row_by_row(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A backward pass for each output, in a Python loop."""
    x = x.detach().requires_grad_()
    rows = [torch.autograd.grad(y, x, retain_graph=True)[0] for y in f(x)]
    return torch.stack(rows)


def ways(net: Network) -> dict[str, Jacobian]:
    """All methods, as functions of arrays."""
    functional = torch.autograd.functional.jacobian
    by_torch: dict[str, Callable[[Tensor], Tensor]] = {
        "loop over outputs": partial(row_by_row, net.function),
        "torch.autograd.functional": lambda x: functional(net.function, x),
        "the same, vectorize=True": lambda x: functional(net.function, x, vectorize=True),
        "torch.func.jacrev": torch.func.jacrev(net.function),
        OURS: lambda x: torch_secondorder.func.jacobian(net.function, x),
    }

    def of_arrays(way: Callable[[Tensor], Tensor], x: Array) -> Array:
        found: Array = way(torch.from_numpy(x)).detach().numpy()
        return found

    return {
        DIFFERENCES: partial(differences, net),
        **{name: partial(of_arrays, way) for name, way in by_torch.items()},
        FORMULA: net.formula,
    }


def measure(found: dict[str, Jacobian], x: Array, repeat: int) -> dict[str, float]:
    """Median seconds of each method; they take turns, so that a slow moment affects all."""
    samples: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(repeat + 1):
        for name, way in found.items():
            start = time.perf_counter()
            way(x)
            if turn > 0:  # the first is a warm-up
                samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in samples.items()}


def errors(net: Network, found: dict[str, Jacobian], x: Array, seed: int) -> dict[str, float]:
    """Errors of random columns against finite differences, relative to the largest entry.

    Raises:
        RuntimeError: An error is too large.
    """
    count = min(COLUMNS, len(x))
    columns = np.random.default_rng(seed).choice(len(x), count, replace=False)
    expected = differences(net, x, columns)
    result = {}
    for name, way in found.items():
        gap = np.abs(way(x)[:, columns] - expected).max()
        result[name] = float(gap / np.abs(expected).max())
        if not result[name] < WORST:
            raise RuntimeError(f"{name} is wrong: relative error {result[name]:.1e}")
    return result


@dataclass(frozen=True)
class Search:
    """The result of SciPy's `least_squares` with one Jacobian."""

    evaluations: int
    jacobians: int
    seconds: float
    cost: float


def search(net: Network, x: Array, way: Jacobian | None) -> Search:
    """Searches for an input near `x` of the class that is least likely at `x`.

    Args:
        net: The network.
        x: The input.
        way: Computes its Jacobian; None for SciPy's finite differences.
    """
    wanted = np.zeros_like(net(x))
    wanted[net(x).argmin()] = 1.0
    evaluations = 0

    def residuals(y: Array) -> Array:
        nonlocal evaluations
        evaluations += 1
        return np.concatenate([net(y) - wanted, NEAR * (y - x)])

    def jacobian(y: Array) -> Array:
        assert way is not None
        return np.concatenate([way(y), NEAR * np.eye(len(y))])

    start = time.perf_counter()
    done = least_squares(
        residuals, x, jac="2-point" if way is None else jacobian, tr_solver="lsmr", max_nfev=200
    )
    seconds = time.perf_counter() - start
    return Search(evaluations, int(done.njev), seconds, float(done.cost))


def main() -> None:
    """Checks and measures all methods, runs the searches, and prints two tables."""
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    net = Network.make(arguments.widths, arguments.seed)
    x = np.random.default_rng(arguments.seed).random(arguments.widths[0])
    found = ways(net)
    wrong = errors(net, found, x, arguments.seed)
    medians = measure(found, x, arguments.repeat)
    shape = "-".join(map(str, arguments.widths))
    print(f"Jacobian of a {shape} network by one input, float64, median of {arguments.repeat}")
    wrong_text = {name: f"{error:.0e}" for name, error in wrong.items()} | {DIFFERENCES: "-"}
    rows = [
        [name, f"{s * 1e6:,.0f}", f"{s / medians[FORMULA]:,.1f}", wrong_text[name]]
        for name, s in medians.items()
    ]
    print(format_table(["", "microseconds", "/ by hand", "relative error"], rows))
    print("\nSciPy's least_squares: the nearest input of another class")
    used = {"SciPy's finite differences": None, OURS: found[OURS], FORMULA: found[FORMULA]}
    searches = {name: search(net, x, way) for name, way in used.items()}
    rows = [
        [name, f"{s.evaluations:,}", str(s.jacobians), f"{s.seconds:.3f}", f"{s.cost:.6f}"]
        for name, s in searches.items()
    ]
    print(format_table(["Jacobian", "evaluations", "Jacobians", "seconds", "cost"], rows))


def three_widths(text: str) -> tuple[int, int, int]:
    """Parses numbers of inputs, hidden units and outputs."""
    widths = [int(part) for part in text.split(",")]
    if len(widths) != 3 or min(widths) < 1:
        raise argparse.ArgumentTypeError(
            f"{text} is not three positive numbers, such as 500,100,10"
        )
    return widths[0], widths[1], widths[2]


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; mistakes are reported before any work is done."""
    parser = argparse.ArgumentParser(
        description="Compare methods for the Jacobian of a small classifier."
    )
    add = parser.add_argument
    add("--widths", type=three_widths, default=(500, 100, 10), help="default: 500,100,10")
    add("--repeat", type=positive(int), default=50, help="timed rounds; default: 50")
    add("--seed", type=int, default=0, help="random seed; default: 0")
    add("--threads", type=positive(int), help="CPU threads; default: torch's choice")
    return parser.parse_args()


if __name__ == "__main__":
    main()
