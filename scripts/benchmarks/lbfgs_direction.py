"""One L-BFGS direction with its history update, against torch's two-loop recursion."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from .harness import Ratio, alternate, load_ours, progress, ratio
from .registry import Options
from .report import Report, Table, number, seconds

MEMORY = 20
SIZES = (1_000, 10_000, 100_000, 1_000_000, 5_000_000)
ON_A_DEVICE = (10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)


@dataclass(frozen=True)
class Iteration:
    """The data of an L-BFGS iteration: the last direction and two gradients."""

    direction: Tensor
    previous: Tensor
    gradient: Tensor


class TwoLoop:
    """The history update and two-loop recursion as `torch.optim.LBFGS.step` runs them.

    Copied statement by statement, because torch has no separate function for it. Its curvature test
    makes the host wait for the device once per iteration, and its `alpha`s twice per pair.
    """

    def __init__(self, history_size: int) -> None:
        self.history_size = history_size
        self.old_dirs: list[Tensor] = []
        self.old_stps: list[Tensor] = []
        self.ro: list[Tensor] = []
        self.al: list[Any] = [None] * history_size
        self.h_diag: Any = 1

    def __call__(self, at: Iteration) -> Tensor:
        """Adds the last step to the history and returns the next direction."""
        y = at.gradient.sub(at.previous)
        s = at.direction.mul(1.0)
        ys = y.dot(s)
        if ys > 1e-10:
            if len(self.old_dirs) == self.history_size:
                self.old_dirs.pop(0)
                self.old_stps.pop(0)
                self.ro.pop(0)
            self.old_dirs.append(y)
            self.old_stps.append(s)
            self.ro.append(1.0 / ys)
            self.h_diag = ys / y.dot(y)
        num_old = len(self.old_dirs)
        al = self.al
        q = at.gradient.neg()
        for i in range(num_old - 1, -1, -1):
            al[i] = self.old_stps[i].dot(q) * self.ro[i]
            q.add_(self.old_dirs[i], alpha=-al[i])
        d = r = torch.mul(q, self.h_diag)
        for i in range(num_old):
            be_i = self.old_dirs[i].dot(r) * self.ro[i]
            r.add_(self.old_stps[i], alpha=al[i] - be_i)
        return d


class Compact:
    """The history of this library, with the same work on y and s."""

    def __init__(self, history: Any) -> None:
        self.history = history

    def __call__(self, at: Iteration) -> Tensor:
        """Adds the last step to the history and returns the next direction."""
        y = at.gradient.sub(at.previous)
        s = at.direction.mul(1.0)
        self.history.push(s, y)
        direction: Tensor = self.history.direction(at.gradient)
        return direction


def make_history(inverse_bfgs: Any, size: int, device: torch.device) -> Any:
    """The history of this library; the only place to adapt when its constructor changes."""
    return inverse_bfgs(size, MEMORY, dtype=torch.float32, device=device)


def iterations(size: int, device: torch.device) -> list[Iteration]:
    """A few artificial iterations with y = D s, D positive, so that every pair is kept."""
    generator = torch.Generator(device).manual_seed(0)
    scale = 0.5 + 1.5 * torch.rand(size, generator=generator, device=device)
    made = []
    # Not a divisor of the memory, and small, because each takes three vectors.
    for _ in range(3):
        s, previous = torch.randn(2, size, generator=generator, device=device).unbind()
        made.append(Iteration(s, previous, previous + scale * s))
    return made


def bandwidth(size: int, options: Options) -> float:
    """Bytes per second when reading a tensor as large as the history, the best of several.

    A short history fits into caches, and its time is that of the call. Below n = 1e5 the floor is
    therefore no bound from memory, and the table leaves it out.
    """
    history = torch.ones(2 * MEMORY, size, device=options.device)
    timing = alternate({"sum": history.sum}, max(options.repeat, 5), options.device)["sum"]
    size_in_bytes = 4 * 2 * MEMORY * size
    return size_in_bytes / timing.minimum


def _next(method: Any, source: Any) -> Tensor:
    result: Tensor = method(next(source))
    return result


def _disagreement(methods: dict[str, Any], made: list[Iteration]) -> float:
    """Fills every history, and returns the relative difference of the last directions."""
    directions: dict[str, Tensor] = {}
    for name, method in methods.items():
        for index in range(MEMORY + 3):
            directions[name] = method(made[index % len(made)])
    theirs = directions["torch"]
    return max(float((d - theirs).norm() / theirs.norm()) for d in directions.values())


def sizes(options: Options) -> tuple[int, ...]:
    """The sizes to measure: on a device larger ones, as far as two histories fit and one more."""
    if options.quick:
        return SIZES[:3]
    if options.device.type != "cuda":
        return SIZES
    free, _ = torch.cuda.mem_get_info(options.device)
    return tuple(size for size in ON_A_DEVICE if 4 * size * (3 * 2 * MEMORY + 30) < free)


def _measure(size: int, inverse_bfgs: Any | None, options: Options) -> dict[str, Any]:
    """Times both on vectors of one size."""
    made = iterations(size, options.device)
    methods: dict[str, Any] = {"torch": TwoLoop(MEMORY)}
    if inverse_bfgs is not None:
        history = make_history(inverse_bfgs, size, options.device)
        methods = {"ours": Compact(history), **methods}
    difference = _disagreement(methods, made)
    calls = {name: partial(_next, method, cycle(made)) for name, method in methods.items()}
    timings = alternate(calls, max(options.repeat, 7), options.device)
    speed = bandwidth(size, options)
    # Every L-BFGS direction reads each pair twice: for products, and for the combination.
    floor = 2 * 2 * MEMORY * size * 4 / speed if size >= 100_000 else float("nan")
    ours, theirs = timings.get("ours"), timings["torch"]
    return {
        "ours": ours.as_dict() if ours else None,
        "torch": theirs.as_dict(),
        "ratio": ratio(ours, theirs).as_dict() if ours else None,
        "floor": floor,
        "ours / floor": ours.median / floor if ours else float("nan"),
        "torch / floor": theirs.median / floor,
        "bytes per second": speed,
        "difference": difference,
    }


def run(options: Options, report: Report) -> None:
    """Measures each size."""
    inverse_bfgs = load_ours("torch_secondorder.curvature.inverse_bfgs", "InverseBFGS")
    header = ["n", "ours", "torch", "ours / torch", "floor", "ours / floor", "torch / floor"]
    table = Table(
        f"One direction with its history update, m = {MEMORY}, float32",
        [*header, "GB/s", "difference"],
    )
    for size in progress(sizes(options), "directions"):
        found = _measure(size, inverse_bfgs, options)
        if options.device.type == "cuda":
            torch.cuda.empty_cache()  # the next history takes ten times as much, in one piece
        table.add(
            f"{size:.0e}",
            seconds(found["ours"]["median"]) if found["ours"] else "-",
            seconds(found["torch"]["median"]),
            Ratio(**found["ratio"]) if found["ratio"] else "-",
            seconds(found["floor"]),
            number(found["ours / floor"]),
            number(found["torch / floor"]),
            number(found["bytes per second"] / 1e9),
            f"{found['difference']:.0e}",
        )
        report.record(f"lbfgs.direction.{size}", found)
    report.show(table)
