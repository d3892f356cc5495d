"""Draws the picture of the README: the loss of one network against time, by several optimizers.

Poisson's equation by a small network, as in `examples/pinn_poisson.py`. Each optimizer gets the
same number of settings, and its curve is that of the setting with the smallest loss at the end.
Curves and settings are kept in a JSON file, from which the picture is drawn.

    python scripts/draw_readme.py             # draws the picture from the JSON file
    python scripts/draw_readme.py --measure   # trains for four minutes, writes the file, draws
"""

from __future__ import annotations

import argparse
import bisect
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "scripts" / "benchmarks" / "figures" / "loss_against_time.json"
PICTURE = ROOT / "docs" / "images" / "loss_against_time.svg"

SECONDS = 10.0  # for each setting
POINTS = 60  # of a curve in the picture

# Of the same contrast to white and to the background of dark pages, at least 4 to 1.
INK, FAINT = "#757c86", "#8b929c55"
COLOURS = {
    "Adam": "#c2682d",
    "torch.optim.LBFGS": "#b0609a",
    "LBFGS": "#2f82c9",
    "BFGS, ssbroyden": "#258b9c",
    "LevenbergMarquardt": "#2f8f4e",
}
OURS = {"LBFGS", "BFGS, ssbroyden", "LevenbergMarquardt"}


def settings() -> dict[str, dict[str, tuple[Callable[..., Any], Callable[[float], float] | None]]]:
    """The settings of each optimizer by name: what makes it, and a schedule of the rate or None."""
    import torch

    import torch_secondorder

    def cosine(part: float) -> float:
        return (1 + math.cos(math.pi * part)) / 2

    def adam(rate: float) -> Callable[..., Any]:
        return lambda p: torch.optim.Adam(p, lr=rate)

    def torch_lbfgs(iterations: int, history: int) -> Callable[..., Any]:
        return lambda p: torch.optim.LBFGS(
            p,
            max_iter=iterations,
            history_size=history,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

    def lbfgs(iterations: int, history: int) -> Callable[..., Any]:
        return lambda p: torch_secondorder.LBFGS(p, max_iter=iterations, history_size=history)

    def broyden(iterations: int) -> Callable[..., Any]:
        return lambda p: torch_secondorder.BFGS(p, max_iter=iterations, update="ssbroyden")

    def marquardt(**options: Any) -> Callable[..., Any]:
        return lambda p: torch_secondorder.LevenbergMarquardt(p, **options)

    pairs = [(10, 20), (10, 100), (50, 20), (50, 100)]
    return {
        "Adam": {f"lr={r:g}, cosine": (adam(r), cosine) for r in (1e-2, 3e-2, 1e-1, 3e-1)},
        "torch.optim.LBFGS": {
            f"max_iter={i}, history_size={m}": (torch_lbfgs(i, m), None) for i, m in pairs
        },
        "LBFGS": {f"max_iter={i}, history_size={m}": (lbfgs(i, m), None) for i, m in pairs},
        "BFGS, ssbroyden": {f"max_iter={i}": (broyden(i), None) for i in (5, 10, 20, 50)},
        "LevenbergMarquardt": {
            "default": (marquardt(), None),
            "max_iter=10": (marquardt(max_iter=10), None),
            "scaling=identity": (marquardt(scaling="identity"), None),
            "acceleration=None": (marquardt(acceleration=None), None),
        },
    }


def measure(seconds: float, names: Iterable[str] | None = None) -> dict[str, Any]:
    """Trains with every setting in turn.

    Returns:
        The machine, the problem, and for each optimizer its best setting with its curve, and the
        last loss of all settings.
    """
    sys.path[1:1] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "examples")]
    import torch
    from benchmarks.report import environment

    import _training
    from pinn_poisson import make_network, make_problem, make_task

    torch.set_num_threads(1)
    device = torch.device("cpu")
    task = make_task(make_problem(device), make_network(64, 0))
    results = {}
    for name, choices in settings().items():
        if names is not None and name not in names:
            continue
        runs = {}
        for choice, (make, schedule) in choices.items():
            label = f"{name} {choice}"
            contenders = {choice: _training.Contender(label, make, schedule=schedule)}
            # What else a machine does takes time on the clock, but not of this process.
            with patch.object(_training, "clock", lambda device: time.process_time()):
                runs[choice] = _training.train(task, contenders, choice, seconds=seconds)
        # The last step may take longer than there is time; what it finds does not count.
        last = {c: bisect.bisect_right(run.curve.seconds, seconds) - 1 for c, run in runs.items()}
        losses = {choice: run.curve.loss[last[choice]] for choice, run in runs.items()}
        best = min(losses, key=lambda choice: losses[choice])
        curve, end = runs[best].curve, last[best] + 1
        results[name] = {
            "setting": best,
            "last_loss": losses,
            "error": curve.score[end - 1],
            "ending": runs[best].ending,
            "curve": thinned(curve.seconds[:end], curve.loss[:end], seconds),
        }
    return {"environment": environment(device), "seconds": seconds, "results": results}


def thinned(times: Sequence[float], losses: Sequence[float], end: float) -> list[list[float]]:
    """At most `POINTS` points of a curve, denser at its beginning; both ends remain."""
    wanted = [end * (i / (POINTS - 1)) ** 2 for i in range(POINTS)]
    found = {min(bisect.bisect_left(times, t), len(times) - 1) for t in wanted}
    return [
        [float(f"{times[i]:.4g}"), float(f"{losses[i]:.4g}")]
        for i in sorted(found | {0, len(times) - 1})
    ]


def draw(data: Mapping[str, Any]) -> str:
    """The picture, in SVG: transparent, in colours that are readable on white and on black."""
    width, height = 760, 330
    left, right, top, bottom = 62, 200, 34, 44
    results = data["results"]
    values = [loss for r in results.values() for _, loss in r["curve"] if loss > 0]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))

    def at_x(time: float) -> float:
        return left + (width - left - right) * time / data["seconds"]

    def at_y(loss: float) -> float:
        share = (math.log10(max(loss, 10.0**low)) - low) / (high - low)
        return height - bottom - (height - top - bottom) * share

    lines = []
    for power in range(low, high + 1, 2):
        y = at_y(10.0**power)
        lines.append(
            f'<path d="M{left} {y:.1f}H{width - right}" stroke="{FAINT}"/>'
            f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">10'
            f'<tspan dy="-5" font-size="9">{power}</tspan></text>'
        )
    for tick in range(0, math.floor(data["seconds"]) + 1, 2):
        x = at_x(tick)
        lines.append(
            f'<text x="{x:.1f}" y="{height - bottom + 18}" text-anchor="middle">{tick}</text>'
        )
    ends = labels_apart({name: at_y(r["curve"][-1][1]) for name, r in results.items()}, 17)
    for name, result in results.items():
        colour = COLOURS[name]
        dash = "" if name in OURS else ' stroke-dasharray="6 3"'
        points = " ".join(f"{at_x(t):.1f},{at_y(loss):.1f}" for t, loss in result["curve"])
        last = result["curve"][-1]
        weight = "600" if name in OURS else "400"
        lines.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"'
            f' stroke-linejoin="round"{dash}/>'
            f'<path d="M{at_x(last[0]):.1f} {at_y(last[1]):.1f}'
            f'L{width - right + 8} {ends[name]:.1f}"'
            f' stroke="{colour}" stroke-width="0.8" stroke-dasharray="1 3"/>'
            f'<text x="{width - right + 12}" y="{ends[name] + 4:.1f}" fill="{colour}"'
            f' font-weight="{weight}">{name}</text>'
        )
    middle = (left + width - right) / 2
    caption = "Training loss of a PINN: Poisson's equation, 257 parameters, float64"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
            f' width="{width}" height="{height}" font-family="system-ui, sans-serif"'
            f' font-size="13" fill="{INK}">',
            f"<title>{caption}; {len(results)} optimizers</title>",
            f'<text x="{left}" y="18">{caption}</text>',
            *lines,
            f'<text x="{middle:.1f}" y="{height - 6}" text-anchor="middle">'
            "seconds of one CPU thread</text>",
            "</svg>\n",
        ]
    )


def in_short_lines(data: Mapping[str, Any]) -> str:
    """The data as JSON, with a point of a curve in each line."""
    text = json.dumps(data, indent=1)
    return re.sub(r"\[\s+([^][\s]+,)\s+([^][\s]+)\s+\]", r"[\1 \2]", text) + "\n"


def labels_apart(heights: Mapping[str, float], distance: float) -> dict[str, float]:
    """Heights of labels that are at least a distance apart, near those given."""
    order = sorted(heights, key=lambda name: heights[name])
    placed: dict[str, float] = {}
    for name in order:
        above = max(placed.values(), default=-math.inf)
        placed[name] = max(heights[name], above + distance)
    # Moved up together, so that what gave way below is shared.
    excess = max(placed[name] - heights[name] for name in order) / 2
    return {name: y - excess for name, y in placed.items()}


def main() -> None:
    """Measures if asked to, and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--measure", action="store_true", help="train, and write the JSON file")
    parser.add_argument("--only", nargs="+", choices=COLOURS, help="measure these; keep the others")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"for each setting; default: {SECONDS:g}"
    )
    arguments = parser.parse_args()
    if arguments.measure:
        for name in arguments.only or COLOURS:  # what an interrupted run has measured is kept
            data = measure(arguments.seconds, [name])
            results = json.loads(DATA.read_text(encoding="utf-8"))["results"] | data["results"]
            data["results"] = {name: results[name] for name in COLOURS if name in results}
            DATA.write_text(in_short_lines(data), encoding="utf-8")
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(draw(json.loads(DATA.read_text())), encoding="utf-8")
    print(PICTURE.relative_to(ROOT))


if __name__ == "__main__":
    main()
