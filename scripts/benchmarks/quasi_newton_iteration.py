"""The cost of one iteration of BFGS beside the function, against the bandwidth of the memory."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from .harness import alternate, load_ours, progress
from .registry import Options
from .report import Report, Table, number, seconds

SIZES = (1_000, 2_000, 5_000)
UPDATES = ("bfgs", "ssbroyden")


def _classical(size: int, device: torch.device) -> Callable[[], None]:
    """BFGS as textbooks have it: two products with H, and two outer products added to it."""
    H = torch.eye(size, dtype=torch.float64, device=device)
    pairs = cycle(_pairs(size, device))

    def iteration() -> None:
        s, y, g = next(pairs)
        _ = H @ g
        h_y = H @ y
        s_y, y_h_y = s @ y, y @ h_y
        H.addr_(s, s, alpha=float((1 + y_h_y / s_y) / s_y))
        H.sub_(torch.outer(h_y / s_y, s)).sub_(torch.outer(s, h_y / s_y))

    return iteration


def _ours(inverse_broyden: Any, update: str, size: int, device: torch.device) -> Callable[[], None]:
    """The work of `BFGS` between two searches: one product, an update, the next direction."""
    H = inverse_broyden(size, torch.float64, device, update=update)
    pairs = cycle(_pairs(size, device))
    s, y, _ = next(pairs)
    H.push(s, y, expected=float(s @ y))

    def iteration() -> None:
        s, y, g = next(pairs)
        known = H.matvec(g)
        H.push(s, y, expected=float(s @ y), of_y=torch.add(known, s, alpha=1e-3))
        H.advance(known, g).neg_()

    return iteration


def _pairs(size: int, device: torch.device) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Steps, differences of gradients, and gradients, from a diagonal curvature."""
    generator = torch.Generator().manual_seed(0)
    curvature = 0.5 + 1.5 * torch.rand(size, generator=generator, dtype=torch.float64)
    made = []
    for _ in range(5):
        s = torch.randn(size, generator=generator, dtype=torch.float64)
        made.append((s.to(device), (curvature * s).to(device), (curvature * s).to(device)))
    return made


def run_iteration(options: Options, report: Report) -> None:
    """Measures each size."""
    inverse_broyden = load_ours("torch_secondorder.curvature", "InverseBroyden")
    device = options.device
    # Long samples, so that writes into the matrix, one in eight iterations, have their share.
    repeat, shortest = (options.repeat, 0.05) if options.quick else (max(options.repeat, 7), 0.4)
    table = Table(
        "One iteration of BFGS beside the function, float64; the bound is two reads and one write "
        "of H",
        ["n", "read", "write", "bound", *UPDATES, *(f"{u} / bound" for u in UPDATES), "textbook"],
    )
    for size in progress(SIZES[:1] if options.quick else SIZES, "iterations"):
        H = torch.ones(size, size, dtype=torch.float64, device=device)
        calls: dict[str, Callable[[], object]] = {
            "read": H.sum,
            "write": lambda H=H: H.fill_(1.0),
            "textbook": _classical(size, device),
        }
        if inverse_broyden is not None:
            calls |= {u: _ours(inverse_broyden, u, size, device) for u in UPDATES}
        timings = alternate(calls, repeat, device, min_seconds=shortest)
        median = {name: timing.median for name, timing in timings.items()}
        bound = 2 * median["read"] + median["write"]
        ours = [median.get(update, float("nan")) for update in UPDATES]
        table.add(
            f"{size:,}",
            *(seconds(value) for value in (median["read"], median["write"], bound, *ours)),
            *(number(value / bound) for value in ours),
            seconds(median["textbook"]),
        )
        found = {name: timing.as_dict() for name, timing in timings.items()}
        over = {f"{u} / bound": value / bound for u, value in zip(UPDATES, ours, strict=True)}
        report.record(f"quasi_newton.iteration.{size}", {**found, "bound": bound, **over})
    report.show(table)
