"""Timed training of the autoencoder of `examples/deep_autoencoder.py`, on Fashion-MNIST."""

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
    """The optimizers of the example, and PyTorchHessianFree if it is installed."""
    table: dict[str, Any] = {entry.label: entry for entry in example.CONTENDERS.values()}
    peer = load_peer("hessianfree.optimizer", HESSIAN_FREE)
    if peer is not None:
        table[HESSIAN_FREE] = Contender(peer.HessianFree, by_forward=True)
    return table


def run(options: Options, report: Report) -> None:
    """Trains with each optimizer in turn."""
    example = load_example("deep_autoencoder")
    if example is None:
        return
    count = 500 if options.quick else 4_000
    x, y, source = images(count + TESTED)
    # The name selects the example's widths; without the files, noise has the same shape.
    data = example.Images("fashion-mnist", x[:count], y[:count], x[count:], y[count:])
    data = data.to(options.device)
    model = example.make_network(example.layer_widths(data), 0).to(options.device)
    task = example.make_task(data, model, 0)
    runs = race(task, contenders(example), options, "autoencoder", measurements=60)
    results = {
        "error": lambda run: run.loss,
        "test error": lambda run: run.score,
    }
    title = f"Deep autoencoder, {count} images, {source}, float32"
    show(runs, title, results, "newton.autoencoder", report)
    if HESSIAN_FREE in runs:
        say(f"products and backward passes of {HESSIAN_FREE} are counted as rest")
    report.record("newton.autoencoder", {"data": source, "images": count})
