"""Cost of a step inside a Lightning trainer, compared with the same loop written by hand."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .harness import Ratio, Timing, load_ours, load_peer, progress, ratio, synchronize
from .networks import Case, cnn, mlp
from .registry import Options, command
from .report import Report, Table, seconds

RATE = 1e-6  # so small that the networks hardly change
Make = Callable[[Iterable[nn.Parameter]], Any]
Loop = Callable[[Case, Make, int], float]

LEAN = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Repeated:
    """The batch of a case, repeated; Lightning would take a list for several loaders."""

    def __init__(self, case: Case, steps: int) -> None:
        self._batch, self._steps = [case.inputs, case.targets], steps

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[Tensor]]:
        for _ in range(self._steps):
            yield self._batch


def by_hand(case: Case, make: Make, steps: int) -> float:
    """Seconds per step of a loop with the standard closure."""
    model = copy.deepcopy(case.model)
    optimizer = make(model.parameters())
    device = case.inputs.device
    synchronize(device)
    start = time.perf_counter()
    for x, y in Repeated(case, steps):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = case.loss(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    synchronize(device)
    return (time.perf_counter() - start) / steps


def trained(
    host: ModuleType,
    logs: bool,
    arguments: dict[str, Any],
    callbacks: Callable[[], list[Any]],
    case: Case,
    make: Make,
    steps: int,
) -> float:
    """Seconds per step of `Trainer.fit`, from the start of the training to its end."""
    times = []

    class Module(host.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = copy.deepcopy(case.model)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss: Tensor = case.loss(self.model(batch[0]), batch[1])
            if logs:
                self.log("loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> Any:
            return make(self.parameters())

    class Clock(host.Callback):  # type: ignore[misc, name-defined]
        def on_train_start(self, *_: Any) -> None:
            synchronize(case.inputs.device)
            times.append(time.perf_counter())

        def on_train_end(self, *_: Any) -> None:
            synchronize(case.inputs.device)
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = host.Trainer(
            accelerator="gpu" if case.inputs.device.type == "cuda" else "cpu",
            devices=1,
            max_epochs=1,
            default_root_dir=folder,
            callbacks=[*callbacks(), Clock()],
            **arguments,
        )
        trainer.fit(Module(), Repeated(case, steps))
    return (times[1] - times[0]) / steps


def alternate(candidates: dict[str, Callable[[], float]], rounds: int) -> dict[str, Timing]:
    """Runs the candidates in turns after a warm-up; each returns its own seconds."""
    for call in candidates.values():
        call()
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds):
        names = list(candidates)
        for name in reversed(names) if turn % 2 else names:
            samples[name].append(candidates[name]())
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def loops(host: ModuleType, monitor: Any) -> dict[str, Loop]:
    """The training loops of the comparison."""
    lean = partial(trained, host, False, LEAN)
    whole = partial(trained, host, True)
    return {
        "by hand": by_hand,
        "lean": partial(lean, list),
        "lean, monitor": partial(lean, lambda: [monitor()]),
        "default": partial(whole, {}, list),
        "default, monitor": partial(whole, {}, lambda: [monitor()]),
    }


@command("lightning", "Lightning's trainer with AdaHessian, compared with a loop written by hand")
def run(options: Options, report: Report) -> None:
    """Runs the comparison."""
    host = load_peer("lightning.pytorch", "lightning") or load_peer("pytorch_lightning")
    monitor = load_ours("torch_secondorder.integrations.lightning", "SecondOrderMonitor")
    adahessian = load_ours("torch_secondorder", "AdaHessian")
    if host is None or monitor is None or adahessian is None:
        return
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    makes: dict[str, Make] = {
        "AdaHessian": partial(adahessian, lr=RATE),
        "Adam": partial(torch.optim.Adam, lr=RATE, foreach=True),
    }
    steps = 10 if options.quick else 50
    ways = loops(host, monitor)
    table = Table(
        f"Seconds per step over {steps} steps; ratios to the loop by hand: of medians [rounds]",
        ["network, optimizer", *ways, "lean / by hand", "default / by hand", "cost of monitor"],
    )
    added = Table(
        "Additional time of a step in a lean trainer",
        ["network", "with Adam: Lightning's own", "with AdaHessian", "our part"],
    )
    for kind in progress([mlp, cnn][: 1 if options.quick else 2], "lightning"):
        case = kind(options.device, batch=128)
        more = {}
        for label, make in makes.items():
            calls = {way: partial(loop, case, make, steps) for way, loop in ways.items()}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about workers, which are not needed here
                timings = alternate(calls, 2 * options.repeat)
            medians = {way: timing.median for way, timing in timings.items()}
            ratios: list[Ratio] = [
                ratio(timings[way], timings["by hand"]) for way in ("lean", "default")
            ]
            more[label] = medians["lean"] - medians["by hand"]
            table.add(
                f"{case.name}, {label}",
                *map(seconds, medians.values()),
                *ratios,
                _signed(medians["lean, monitor"] - medians["lean"]),
            )
            key = f"lightning.{case.name}.{label}"
            report.record(key, {way: timing.as_dict() for way, timing in timings.items()})
            named = zip(("lean", "default"), ratios, strict=True)
            report.record(f"{key}.ratios", {way: entry.as_dict() for way, entry in named})
        added.add(
            case.name, *map(_signed, (*reversed(more.values()), more["AdaHessian"] - more["Adam"]))
        )
    report.show(table)
    report.show(added)


def _signed(value: float) -> str:
    return f"{value * 1e3:+.3f} ms"
