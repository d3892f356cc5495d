"""The nonlinear regression problems of NIST's Statistical Reference Datasets, with their models.

Source: https://www.itl.nist.gov/div898/strd/nls/nls_main.shtml (public domain). The certified
values have eleven digits, and were found in extended precision.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DATA = Path(__file__).parent / "data" / "nist_nonlinear.json"

#: A model: takes the predictor and the parameters, each a tensor.
Model = Callable[..., Tensor]


@dataclass(frozen=True)
class Problem:
    """A regression with certified results; all tensors are float64.

    Attributes:
        name: NIST's name.
        level: NIST's level of difficulty, `"lower"`, `"average"` or `"higher"`.
        formula: The model as text.
        model: The model; called as `model(x, *parameters)`.
        x: The predictor, `(N,)`; for Nelson two of them, `(2, N)`.
        y: The response, `(N,)`; for Nelson its logarithm, which is what the model describes.
        starts: The two starting points, one far from the solution and one close to it, each `(n,)`.
        certified: The parameters of the fit, `(n,)`.
        standard_deviations: Their standard deviations, `(n,)`.
        residual_sum_of_squares: Of the fit.
        residual_standard_deviation: The root of that over the degrees of freedom, `N - n`.
    """

    name: str
    level: str
    formula: str
    model: Model
    x: Tensor
    y: Tensor
    starts: tuple[Tensor, Tensor]
    certified: Tensor
    standard_deviations: Tensor
    residual_sum_of_squares: float
    residual_standard_deviation: float

    def residuals(self, b: Tensor) -> Tensor:
        """The residuals at parameters, from shape `(n,)` to `(N,)`."""
        return self.model(self.x, *b) - self.y


def load_problems() -> dict[str, Problem]:
    """All 27 problems, by name."""
    entries = json.loads(DATA.read_text(encoding="utf-8"))
    return {entry["name"]: _problem(entry) for entry in entries}


def digits(value: Tensor | float, certified: Tensor | float) -> float:
    """The number of correct digits of the worst entry, at most the eleven that are certified.

    This is `-log10(|value - certified| / |certified|)`, NIST's log relative error; 0 where nothing
    is right.
    """
    value, certified = (torch.as_tensor(v, dtype=torch.float64) for v in (value, certified))
    error = ((value - certified) / certified).abs().max().item()
    if not error < 1.0:  # NaN among them
        return 0.0
    return min(11.0, -math.log10(error)) if error else 11.0


def _problem(entry: dict[str, object]) -> Problem:
    def vector(key: str) -> Tensor:
        return torch.tensor(entry[key], dtype=torch.float64)

    name = str(entry["name"])
    y = vector("y")
    return Problem(
        name,
        str(entry["level"]),
        str(entry["model"]),
        MODELS[name],
        vector("x"),
        y.log() if name == "Nelson" else y,
        (vector("start_1"), vector("start_2")),
        vector("certified"),
        vector("standard_deviations"),
        vector("residual_sum_of_squares").item(),
        vector("residual_standard_deviation").item(),
    )


# The models. They take the predictor first, as `curve_fit` asks.


def bennett5(x: Tensor, b1: Tensor, b2: Tensor, b3: Tensor) -> Tensor:
    return b1 * (b2 + x) ** (-1.0 / b3)


def chwirut(x: Tensor, b1: Tensor, b2: Tensor, b3: Tensor) -> Tensor:
    return torch.exp(-b1 * x) / (b2 + b3 * x)


def danwood(x: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
    return b1 * x**b2


def eckerle4(x: Tensor, b1: Tensor, b2: Tensor, b3: Tensor) -> Tensor:
    return b1 / b2 * torch.exp(-0.5 * ((x - b3) / b2) ** 2)


def enso(x: Tensor, *b: Tensor) -> Tensor:
    b1, b2, b3, b4, b5, b6, b7, b8, b9 = b
    year, second, third = (2.0 * math.pi * x / period for period in (12.0, b4, b7))
    return (
        b1
        + (b2 * year.cos() + b3 * year.sin())
        + (b5 * second.cos() + b6 * second.sin())
        + (b8 * third.cos() + b9 * third.sin())
    )


def gauss(x: Tensor, *b: Tensor) -> Tensor:
    b1, b2, b3, b4, b5, b6, b7, b8 = b
    first = b3 * torch.exp(-((x - b4) ** 2) / b5**2)
    second = b6 * torch.exp(-((x - b7) ** 2) / b8**2)
    return b1 * torch.exp(-b2 * x) + first + second


def kirby2(x: Tensor, b1: Tensor, b2: Tensor, b3: Tensor, b4: Tensor, b5: Tensor) -> Tensor:
    return (b1 + x * (b2 + x * b3)) / (1.0 + x * (b4 + x * b5))


def lanczos(x: Tensor, *b: Tensor) -> Tensor:
    b1, b2, b3, b4, b5, b6 = b
    return b1 * torch.exp(-b2 * x) + b3 * torch.exp(-b4 * x) + b5 * torch.exp(-b6 * x)


def mgh09(x: Tensor, b1: Tensor, b2: Tensor, b3: Tensor, b4: Tensor) -> Tensor:
    return b1 * (x**2 + x * b2) / (x**2 + x * b3 + b4)


def mgh10(x: Tensor, b1: Tensor, b2: Tensor, b3: Tensor) -> Tensor:
    return b1 * torch.exp(b2 / (x + b3))


def mgh17(x: Tensor, b1: Tensor, b2: Tensor, b3: Tensor, b4: Tensor, b5: Tensor) -> Tensor:
    return b1 + b2 * torch.exp(-x * b4) + b3 * torch.exp(-x * b5)


def misra1a(x: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
    return b1 * (1.0 - torch.exp(-b2 * x))


def misra1b(x: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
    return b1 * (1.0 - (1.0 + b2 * x / 2.0) ** -2.0)


def misra1c(x: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
    return b1 * (1.0 - (1.0 + 2.0 * b2 * x) ** -0.5)


def misra1d(x: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
    return b1 * b2 * x / (1.0 + b2 * x)


def nelson(x: Tensor, b1: Tensor, b2: Tensor, b3: Tensor) -> Tensor:
    time, temperature = x
    return b1 - b2 * time * torch.exp(-b3 * temperature)


def rat42(x: Tensor, b1: Tensor, b2: Tensor, b3: Tensor) -> Tensor:
    return b1 / (1.0 + torch.exp(b2 - b3 * x))


def rat43(x: Tensor, b1: Tensor, b2: Tensor, b3: Tensor, b4: Tensor) -> Tensor:
    return b1 / (1.0 + torch.exp(b2 - b3 * x)) ** (1.0 / b4)


def rational(x: Tensor, *b: Tensor) -> Tensor:
    b1, b2, b3, b4, b5, b6, b7 = b
    above = b1 + x * (b2 + x * (b3 + x * b4))
    return above / (1.0 + x * (b5 + x * (b6 + x * b7)))


def roszman1(x: Tensor, b1: Tensor, b2: Tensor, b3: Tensor, b4: Tensor) -> Tensor:
    return b1 - b2 * x - torch.arctan(b3 / (x - b4)) / math.pi


MODELS: dict[str, Model] = {
    "Bennett5": bennett5,
    "BoxBOD": misra1a,
    "Chwirut1": chwirut,
    "Chwirut2": chwirut,
    "DanWood": danwood,
    "ENSO": enso,
    "Eckerle4": eckerle4,
    "Gauss1": gauss,
    "Gauss2": gauss,
    "Gauss3": gauss,
    "Hahn1": rational,
    "Kirby2": kirby2,
    "Lanczos1": lanczos,
    "Lanczos2": lanczos,
    "Lanczos3": lanczos,
    "MGH09": mgh09,
    "MGH10": mgh10,
    "MGH17": mgh17,
    "Misra1a": misra1a,
    "Misra1b": misra1b,
    "Misra1c": misra1c,
    "Misra1d": misra1d,
    "Nelson": nelson,
    "Rat42": rat42,
    "Rat43": rat43,
    "Roszman1": roszman1,
    "Thurber": rational,
}
