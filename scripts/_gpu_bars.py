"""The bars that the figures of scripts/gpu_check.py are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Found = Mapping[str, Any]
NETWORKS = ("MLP 784-512-256-10", "CNN 16-32", "autoencoder 784-...-30", "tanh 2-50-50-50-1")
#: Ways of `FunctionalObjective` to compile.
MODES = ("default", "reduce-overhead", "max-autotune")
DEEP = "MLP 20 x 64, ReLU"
STEPPED = ("MLP 784-512-256-10", "CNN 16-32", DEEP)


@dataclass(frozen=True)
class Bar:
    """A figure, the most that it may be, and how it is read from the results.

    Attributes:
        title: What is measured.
        most: The bar.
        read: Takes the figure from the results; raises a `LookupError`, `TypeError`, `ValueError`
            or `ZeroDivisionError` where it is not among them.
    """

    title: str
    most: float
    read: Callable[[Found], float]

    def row(self, results: Found) -> dict[str, Any]:
        """The bar, the figure and the verdict: met, missed, or not measured."""
        try:
            value = float(self.read(results))
        except (LookupError, TypeError, ValueError, ZeroDivisionError):
            return {"bar": self.title, "most": self.most, "figure": None, "verdict": "not measured"}
        verdict = "met" if value <= self.most else "missed"
        return {"bar": self.title, "most": self.most, "figure": value, "verdict": verdict}


def _at(*path: str) -> Callable[[Found], float]:
    def read(results: Found) -> float:
        value: Any = results
        for key in path:
            value = value[key]
        return float(value)

    return read


def _quotient(
    above: tuple[str, ...], below: tuple[str, ...], times: float = 1.0
) -> Callable[[Found], float]:
    return lambda results: _at(*above)(results) / (times * _at(*below)(results))


def _best(key: str, ways: tuple[str, ...], base: str) -> Callable[[Found], float]:
    """The fastest of several ways, over another one."""
    return lambda results: (
        min(results[key][way]["median"] for way in ways) / results[key][base]["median"]
    )


def _race(key: str, ours: tuple[str, ...], theirs: tuple[str, ...], result: str) -> Any:
    """The best of ours over the best of the others."""

    def best(results: Found, names: tuple[str, ...]) -> float:
        values = [results[f"{key}.{name}"]["results"][result] for name in names]
        return min(value for value in values if value is not None)

    return lambda results: best(results, ours) / best(results, theirs)


def _bars() -> Iterator[Bar]:
    for size, most in ((1_000_000, 0.1),):
        yield Bar(
            f"L-BFGS direction, n = {size:.0e}, over torch's two loops",
            most,
            _at(f"lbfgs.direction.{size}", "ratio", "of_medians"),
        )
    yield Bar(
        "L-BFGS direction, n = 1e+08, over two passes over the history",
        1.5,
        _at("lbfgs.direction.100000000", "ours / floor"),
    )
    for name in NETWORKS:
        key = f"products.{name}"
        yield Bar(
            f"Hessian product in gradients, {name}", 2.0, _at(key, "ours/gradient", "of_medians")
        )
    for kind, most in (("Hessian", 1.1), ("Gauss-Newton", 1.3)):
        yield Bar(
            f"{kind} product in gradients, compiled, Poisson PINN",
            most,
            _quotient(
                (f"compile.{kind} product", "compiled", "median"),
                ("compile.loss and gradient", "compiled", "median"),
            ),
        )
    for kind, most in (("Hessian", 1.1), ("Gauss-Newton", 1.3)):
        key = f"captured.product.{kind}.{DEEP}"
        yield Bar(
            f"{kind} product in gradients, compiled, {DEEP}", most, _best(key, MODES, "gradient")
        )
    for name in NETWORKS:
        key = f"products.gauss_newton.{name}"
        yield Bar(
            f"Gauss-Newton product in gradients, {name}",
            1.3,
            _at(key, "ours/gradient", "of_medians"),
        )
    for name in STEPPED:
        key = f"diagonal.steps.{name}"
        adam = (key, "Adam", "median")
        yield Bar(
            f"AdaHessian over Adam, {name}", 2.2, _quotient((key, "AdaHessian", "median"), adam)
        )
        yield Bar(
            f"AdaHessian, period 10, over Adam, {name}",
            1.2,
            _quotient((key, "AdaHessian/10", "median"), adam, 10.0),
        )
        key = f"captured.adahessian.{name}"
        yield Bar(
            f"AdaHessian, period 10, captured, over Adam, {name}",
            1.1,
            _quotient(
                (key, "AdaHessian/10, captured", "median"), (key, "Adam (fused)", "median"), 10.0
            ),
        )
    yield Bar(
        "Poisson PINN: our least error over that of torch.optim in the same time",
        1.0,
        _race(
            "newton.pinn",
            ("LevenbergMarquardt (ours)", "BFGS, ssbroyden (ours)"),
            ("torch.optim.LBFGS", "Adam"),
            "final relative L2",
        ),
    )
    yield Bar(
        "autoencoder: our least error over that of torch.optim in the same time",
        1.0,
        _race(
            "newton.autoencoder",
            ("KFAC (ours)", "NewtonCG (ours)"),
            ("torch.optim.LBFGS", "Adam"),
            "error",
        ),
    )


BARS = tuple(_bars())


def rows(results: Found, tests: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """All bars, that of the tests first."""
    title = "tests for the device that fail"
    row: dict[str, Any] = {"bar": title, "most": 0, "figure": None, "verdict": "not measured"}
    if tests is not None and "failed" in tests:
        bad = tests["failed"] + tests["errors"]
        if bad or tests["status"] == 0:
            row |= {"figure": bad, "verdict": "missed" if bad else "met"}
    return [row, *(bar.row(results) for bar in BARS)]


def table(found: list[dict[str, Any]]) -> str:
    """The bars as aligned text."""
    width = max(len(row["bar"]) for row in found)
    lines = [f"{'':{width}}  at most  measured  verdict"]
    for row in found:
        figure = "-" if row["figure"] is None else f"{row['figure']:.3g}"
        lines.append(f"{row['bar']:{width}}  {row['most']:>7g}  {figure:>8}  {row['verdict']}")
    return "\n".join(lines)
