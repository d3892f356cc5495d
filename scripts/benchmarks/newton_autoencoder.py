"""The autoencoder of `examples/deep_autoencoder.py`, on Fashion-MNIST, against the clock."""

from __future__ import annotations

from typing import Any

from .harness import load_peer, say
from .networks import images
from .race import Contender, load_example, race, show
from .registry import Options
from .report import Report

TESTED = 1_000
HESSIAN_FREE = "PyTorchHessianFree"


def contenders(example: Any) -> dict[str, Any]:
    """Those of the example, and one more where it is installed."""
    table: dict[str, Any] = {entry.label: entry for entry in example.CONTENDERS.values()}
    peer = load_peer("hessianfree.optimizer", HESSIAN_FREE)
    if peer is not None:
        table[HESSIAN_FREE] = Contender(peer.HessianFree, by_forward=True)
    return table


def run(options: Options, report: Report) -> None:
    """Trains with each, one after the other."""
    example = load_example("deep_autoencoder")
    if example is None:
        return
    count = 500 if options.quick else 4_000
    x, y, source = images(count + TESTED)
    # The example's widths go by the name; where the files are missing, noise has the same shape.
    data = example.Images("fashion-mnist", x[:count], y[:count], x[count:], y[count:])
    data = data.to(options.device)
    model = example.make_network(example.layer_widths(data), 0).to(options.device)
    task = example.make_task(data, model, 0)
    runs = race(task, contenders(example), options, "autoencoder", measurements=60)
    results = {
        "error": lambda run: run.loss,
        "on test images": lambda run: run.score,
    }
    title = f"Deep autoencoder, {count} images, {source}, float32"
    show(runs, title, results, "newton.autoencoder", report)
    if HESSIAN_FREE in runs:
        say(f"{HESSIAN_FREE}'s products and backward passes are part of its rest")
    report.record("newton.autoencoder", {"data": source, "images": count})
