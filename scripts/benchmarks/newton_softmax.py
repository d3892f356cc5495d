"""Newton-CG on the softmax regression of the L-BFGS benchmark."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_secondorder import LBFGS, NewtonCG

from .lbfgs_softmax import TOLERANCES, Contest, Make, compare
from .registry import Options
from .report import Report
from .watch import Watch

THRESHOLDS = (1e-4, 1e-5, 1e-6)


def _newton(params: list[Tensor], **arguments: Any) -> NewtonCG:
    """Newton-CG with the Gauss-Newton matrix, as by default, with its products counted."""
    return NewtonCG(params, curvature=Watch(), **TOLERANCES, **arguments)


def run(options: Options, report: Report) -> None:
    """Runs Newton-CG with its defaults and variants, and L-BFGS, in turns."""
    newton: dict[str, Make] = {
        "NewtonCG": _newton,
        "NewtonCG nystrom": partial(_newton, preconditioner="nystrom"),
        "NewtonCG martens": partial(_newton, preconditioner="martens"),
        "NewtonCG trust region": partial(_newton, globalization="trust_region"),
    }
    theirs = partial(torch.optim.LBFGS, line_search_fn="strong_wolfe", **TOLERANCES)
    ours = partial(LBFGS, **TOLERANCES)
    table: dict[str, Make] = {**newton, "LBFGS (ours)": ours, "LBFGS (torch)": theirs}
    pairs = tuple((name, "LBFGS (ours)") for name in newton)
    compare(Contest("newton.softmax", THRESHOLDS, table, pairs), options, report)
